#define _GNU_SOURCE
#include "runner.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "calls.h"
#include "session.h"

extern char **environ;

enum { RUNNERS_MAX = CLIENT_POLL_MAX, STREAM_WAIT_S = 10, SENTENCE_MAX = 900 };

struct runner {
	pid_t pid;       /* 0: a free place */
	int words;       /* its sentence, if it cannot run */
	char id[64];
};

static struct {
	struct runner list[RUNNERS_MAX];
	const char *socket_path, *job, *guest, *image, *slurm_bin, *slurm_conf;
	char command[512];
} here;

static void set_slurm_conf(char **environment, size_t *count)
{
	static char entry[4096 + 16];
	if (here.slurm_conf == NULL)
		return;
	snprintf(entry, sizeof entry, "SLURM_CONF=%s", here.slurm_conf);
	environment[(*count)++] = entry;
}

/* A caller that lost its environment (env -i srun) submits a job of its own, as it does without a guest; but nothing
 * that is called in a guest ever runs on the bare host, so it asks for a guest as this task's job did. */
static void add_request(char **environment, size_t *count)
{
	static const char prefix[] = "SLURM_SPANK_CARREL_JOB_";
	static const char image[] = "SLURM_SPANK_CARREL_JOB_IMAGE=";
	static char entry[512];
	for (size_t i = 0; i < *count; i++)
		if (strncmp(environment[i], image, sizeof image - 1) == 0)
			return;
	for (char **own = environ; *own != NULL; own++)
		if (strncmp(*own, prefix, sizeof prefix - 1) == 0 && strncmp(*own, image, sizeof image - 1) != 0)
			environment[(*count)++] = *own;
	snprintf(entry, sizeof entry, "%s%s", image, here.image);
	environment[(*count)++] = entry;
}

/* The environment of the caller, except for what would make the host's command another one than it is. */
static void change_environment(struct command *command)
{
	size_t count = 0;
	size_t size = 0;
	while (command->environ[size] != NULL)
		size++;
	for (char **own = environ; *own != NULL; own++)
		size++;
	char **kept = must_have(calloc(size + 3, sizeof *kept));
	for (char **entry = command->environ; *entry != NULL; entry++) {
		if (strncmp(*entry, "CARREL_ENTER_", 13) == 0 || strncmp(*entry, "SLURM_CONF=", 11) == 0 ||
		    strcmp(*entry, "SLURM_SPANK_CARREL_JOB_IMAGE=") == 0) /* no image is as good as a lost one */
			continue;
		if (strncmp(*entry, "LD_", 3) != 0)
			kept[count++] = *entry;
		/* The guest's libraries are not the host's; the task's carrel-enter gives the name back. */
		else if (asprintf(&kept[count], "CARREL_GUEST_%s", *entry) >= 0)
			count++;
	}
	set_slurm_conf(kept, &count);
	if (here.image != NULL)
		add_request(kept, &count);
	free(command->environ);
	command->environ = kept;
}

/* Where srun is called is where its tasks start. A directory of the guest alone is not the host's to enter, so it
 * travels beside srun, for the tasks that find it in their guests. */
static void carry_directory(struct command *command)
{
	static char entry[PATH_MAX + 32];
	size_t count = 0;
	snprintf(entry, sizeof entry, "CARREL_GUEST_CWD=%s", command->cwd);
	while (command->environ[count] != NULL)
		count++;
	command->environ = must_have(realloc(command->environ, (count + 2) * sizeof *command->environ));
	command->environ[count] = entry;
	command->environ[count + 1] = NULL;
}

static void choose_directory(struct command *command, const char *name)
{
	if (command->cwd == NULL || chdir(command->cwd) == 0)
		return;
	/* These look for files in it, so their user must read that they look elsewhere. */
	if (strcmp(name, "sbatch") == 0 || strcmp(name, "sbcast") == 0)
		return;
	if (strcmp(name, "srun") == 0)
		carry_directory(command);
	command->cwd = "/tmp";
}

static const char *check(struct command *command)
{
	const char *name = strrchr(command->argv[0], '/');
	name = name == NULL ? command->argv[0] : name + 1;
	if (!call_is_allowed(name))
		return "only Slurm's own commands are passed on from a guest to its host";
	/* Only a task is given a script; here it would be a file of the guest's choice, written on the host. */
	if (command->script != NULL)
		return "a Slurm command that is passed on from a guest has no script of its own";
	snprintf(here.command, sizeof here.command, "%s/%s", here.slurm_bin, name);
	/* Its own sentences begin with the name that the user called it by. */
	command->path = here.command;
	change_environment(command);
	choose_directory(command, name);
	return NULL;
}

__attribute__((noreturn)) static void run(const char *id, int words)
{
	/* carreld takes the end of our parent's connection for the end of the task: no copy of it may live here. */
	int kept = fcntl(words, F_DUPFD_CLOEXEC, 3);
	if (kept != 3)
		dup3(kept, 3, O_CLOEXEC);
	close_range(4, ~0U, 0);
	struct records question = {0};
	records_add(&question, "verb", "runner");
	records_add(&question, "job", "%s", here.job);
	records_add(&question, "guest", "%s", here.guest);
	records_add(&question, "id", "%s", id);
	struct answer answer = node_ask(here.socket_path, &question, STREAM_WAIT_S, -1);
	if (answer.sentence != NULL) {
		dprintf(3, "%.*s", SENTENCE_MAX, answer.sentence);
		_exit(1);
	}
	close(3);
	_exit(session_serve(answer.stream, -1, id, false, check));
}

static void refuse(struct client *client, const char *id, const char *sentence)
{
	char payload[64 + SENTENCE_MAX + 2];
	size_t id_length = strlen(id);
	size_t length = strnlen(sentence, SENTENCE_MAX);
	memcpy(payload, id, id_length + 1);
	memcpy(payload + id_length + 1, sentence, length);
	relay_send(&client->relay, FRAME_REFUSED, 0, payload, id_length + 1 + length);
}

static void on_call(struct client *client, const char *id)
{
	struct runner *runner = here.list;
	int words[2];
	while (runner < here.list + RUNNERS_MAX && runner->pid != 0)
		runner++;
	if (runner == here.list + RUNNERS_MAX || pipe2(words, O_CLOEXEC | O_NONBLOCK) != 0) {
		refuse(client, id, "too many Slurm commands run in this task's guest at once");
		return;
	}
	pid_t child = fork();
	if (child == 0)
		run(id, words[1]);
	close(words[1]);
	if (child < 0) {
		close(words[0]);
		refuse(client, id, "no process can be started for a Slurm command from the guest");
		return;
	}
	*runner = (struct runner){.pid = child, .words = words[0]};
	snprintf(runner->id, sizeof runner->id, "%s", id);
}

static void on_child(struct client *client)
{
	pid_t pid;
	(void)client;
	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		for (struct runner *runner = here.list; runner < here.list + RUNNERS_MAX; runner++)
			if (runner->pid == pid)
				/* Its words, if any, are still in the pipe: the place is free when they are read. */
				runner->pid = runner->words >= 0 ? -1 : 0;
}

static size_t more_polls(struct client *client, struct pollfd *set)
{
	bool room = relay_has_room(&client->relay);
	for (size_t i = 0; i < RUNNERS_MAX; i++) {
		bool open = here.list[i].pid != 0 && here.list[i].words >= 0;
		set[i] = (struct pollfd){.fd = open && room ? here.list[i].words : -1, .events = POLLIN};
	}
	return RUNNERS_MAX;
}

static void take_polls(struct client *client, const struct pollfd *set, size_t count)
{
	char sentence[SENTENCE_MAX + 1];
	for (size_t i = 0; i < count; i++) {
		struct runner *runner = &here.list[i];
		if (set[i].fd < 0 || set[i].revents == 0)
			continue;
		ssize_t got = read(runner->words, sentence, sizeof sentence - 1);
		if (got > 0) {
			sentence[got] = '\0';
			refuse(client, runner->id, sentence);
		}
		close(runner->words);
		runner->words = -1;
		if (runner->pid < 0)
			runner->pid = 0;
	}
}

void runner_attach(struct client *client, const char *socket_path, const char *job, const struct answer *answer)
{
	const char *guest = records_get(answer->body, answer->length, "guest");
	const char *slurm_bin = records_get(answer->body, answer->length, "slurm_bin");
	here.image = records_get(answer->body, answer->length, "image");
	here.socket_path = socket_path;
	here.job = job;
	here.guest = guest == NULL ? "" : guest;
	here.slurm_bin = slurm_bin == NULL ? "/usr/bin" : slurm_bin;
	here.slurm_conf = getenv("SLURM_CONF");
	client->on_call = on_call;
	client->on_child = on_child;
	client->more_polls = more_polls;
	client->take_polls = take_polls;
}
