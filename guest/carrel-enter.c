/* carrel-enter is a task, as far as slurmstepd can tell: it asks carreld for the guest, runs the command in there,
 * carries its streams and signals, and ends as it ended. It never runs the command itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client.h"
#include "node.h"
#include "runner.h"

enum { GUEST_WAIT_MAX_S = 3600, END_FILE_TIMEOUT_MS = 2000, END_FILE_POLL_MS = 20, SCRIPT_MAX_BYTES = 8 << 20,
       READ_TRIES_MAX = 500, SENTENCE_TRAVEL_MS = 200 };

extern char **environ;

struct task {
	const char *socket_path;
	char **argv;
	bool is_batch;
	const char *job;
};

/* Where the user reads why. The command may have closed its stderr, and then ours is closed too. */
static int complaints = STDERR_FILENO;

__attribute__((noreturn)) static void give_up(const char *what, const char *sentence)
{
	dprintf(complaints, "carrel: %s%s\n", what, sentence);
	_exit(1);
}

/* srun drops what a task said on stderr in the last milliseconds before it died by a signal, also without a guest. */
static void wait_until_read(void)
{
	const struct timespec pause = {.tv_nsec = END_FILE_POLL_MS * 1000000L / 10};
	struct stat facts;
	int unread = 0;
	if (fstat(complaints, &facts) != 0 || !S_ISFIFO(facts.st_mode))
		return;
	for (int tries = 0; tries < READ_TRIES_MAX; tries++) {
		if (ioctl(complaints, FIONREAD, &unread) != 0 || unread == 0)
			return;
		nanosleep(&pause, NULL);
	}
}

/* The one sentence that must arrive: it also gets a moment on its way to srun, of which Slurm gives no sign. */
static void say_out_of_memory(const char *sentence)
{
	const struct timespec moment = {.tv_nsec = SENTENCE_TRAVEL_MS * 1000000L};
	dprintf(complaints, "carrel: out of memory: %s\n", sentence);
	wait_until_read();
	nanosleep(&moment, NULL);
}

static const char *variable(const char *name, const char *absent)
{
	const char *value = getenv(name);
	return value != NULL && *value != '\0' ? value : absent;
}

static bool is_batch_script(const char *argv0)
{
	/* What a batch step's slurmstepd starts; the step's number alone is not enough, since sbatch called inside a
	 * step hands that step's variables down to the new job's script. */
	const char *name = strrchr(argv0, '/');
	return name != NULL && strcmp(name, "/slurm_script") == 0;
}

static const char *step_name(bool is_batch)
{
	const char *step = variable("SLURM_STEP_ID", variable("SLURM_STEPID", "batch"));
	if (is_batch || strcmp(step, "4294967291") == 0 || strcmp(step, "-5") == 0)
		return "batch";
	if (strcmp(step, "4294967290") == 0 || strcmp(step, "-6") == 0)
		return "interactive";
	return step;
}

static void add_wish(struct records *question, const char *key, const char *name)
{
	const char *value = variable(name, NULL);
	if (value != NULL)
		records_add(question, key, "%s", value);
}

static void add_mounts(struct records *question)
{
	const char *mounts = variable("SLURM_SPANK_CARREL_JOB_MOUNT", "");
	while (*mounts != '\0') {
		size_t length = strcspn(mounts, "\n");
		if (length > 0)
			records_add_bytes(question, "mount", mounts, length);
		mounts += length + (mounts[length] == '\n' ? 1 : 0);
	}
}

static struct records enter_question(const struct task *task)
{
	struct records question = {0};
	char *cwd = getcwd(NULL, 0);
	records_add(&question, "verb", "enter");
	records_add(&question, "job", "%s", task->job);
	records_add(&question, "step", "%s", step_name(task->is_batch));
	records_add(&question, "task", "%s", task->is_batch ? "0" : variable("SLURM_PROCID", "0"));
	records_add(&question, "ntasks", "%s",
		    task->is_batch ? "1" : variable("SLURM_STEP_NUM_TASKS", variable("SLURM_NTASKS", "1")));
	records_add(&question, "cpus_per_task", "%s", variable("SLURM_CPUS_PER_TASK", "1"));
	records_add(&question, "cwd", "%s", cwd == NULL ? "/" : cwd);
	free(cwd);
	add_wish(&question, "image", "SLURM_SPANK_CARREL_JOB_IMAGE");
	add_wish(&question, "per", "SLURM_SPANK_CARREL_JOB_PER");
	add_wish(&question, "clone", "SLURM_SPANK_CARREL_JOB_CLONE");
	add_wish(&question, "driver", "SLURM_SPANK_CARREL_JOB_DRIVER");
	add_wish(&question, "root", "SLURM_SPANK_CARREL_JOB_ROOT");
	add_wish(&question, "boot_timeout_s", "SLURM_SPANK_CARREL_JOB_BOOT_TIMEOUT_S");
	add_mounts(&question);
	return question;
}

static void add_environment(struct records *start)
{
	static const char guest_prefix[] = "CARREL_GUEST_LD_";
	for (char **entry = environ; *entry != NULL; entry++) {
		if (strncmp(*entry, "CARREL_ENTER_", 13) == 0 || strncmp(*entry, "CARREL_GUEST_CWD=", 17) == 0)
			continue;
		/* The runner of a call from inside renamed it, so that it would not hit the host's srun. */
		bool renamed = strncmp(*entry, guest_prefix, sizeof guest_prefix - 1) == 0;
		records_add(start, "env", "%s", renamed ? *entry + strlen("CARREL_GUEST_") : *entry);
	}
}

/* The srun that was called in a directory of the guest alone ran in /tmp instead; the first cwd of START counts. */
static void add_guest_directory(struct records *start)
{
	const char *directory = variable("CARREL_GUEST_CWD", NULL);
	char *here = getcwd(NULL, 0);
	if (directory != NULL && here != NULL && strcmp(here, "/tmp") == 0)
		records_add(start, "cwd", "%s", directory);
	free(here);
}

static void add_script(struct records *start, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat facts;
	if (fd < 0 || fstat(fd, &facts) != 0 || facts.st_size > SCRIPT_MAX_BYTES)
		give_up("cannot read the batch script: ", strerror(errno));
	char *text = must_have(malloc((size_t)facts.st_size + 1));
	size_t got = 0;
	while (got < (size_t)facts.st_size) {
		ssize_t part = read(fd, text + got, (size_t)facts.st_size - got);
		if (part <= 0)
			break;
		got += (size_t)part;
	}
	close(fd);
	if (memchr(text, '\0', got) != NULL)
		give_up("the batch script holds a NUL byte", "");
	records_add_bytes(start, "script", text, got);
	records_add(start, "script_path", "%s", path);
	free(text);
}

/* Taken before the wait for the guest: until then, script and directory are what slurmstepd left. */
static struct records describe(const struct task *task, bool is_pty)
{
	struct records start = {0};
	add_guest_directory(&start);
	client_describe(&start, is_pty);
	for (char **word = task->argv; *word != NULL; word++)
		records_add(&start, "argv", "%s", *word);
	add_environment(&start);
	if (task->is_batch)
		add_script(&start, task->argv[0]);
	return start;
}

static void add_user(struct records *start, const struct answer *answer)
{
	const char *cursor = NULL;
	const char *group;
	records_add(start, "uid", "%lld", records_number(answer->body, answer->length, "uid", (long long)getuid()));
	records_add(start, "gid", "%lld", records_number(answer->body, answer->length, "gid", (long long)getgid()));
	while ((group = records_next(answer->body, answer->length, "group", &cursor)) != NULL)
		records_add(start, "group", "%s", group);
}

/* Reads what carrel-guard wrote about the guest's end; waits for it a moment, since the stream ends first. Where the
 * guest is a node, carreld says how long: Slurm is to hear of a lost node before it hears of a failed task. */
static char *end_of_guest(const char *path, long long wait_ms)
{
	char text[1024];
	for (long long waited = 0; path != NULL && waited < wait_ms; waited += END_FILE_POLL_MS) {
		struct timespec pause = {.tv_nsec = END_FILE_POLL_MS * 1000000L};
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t got = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
		if (fd >= 0)
			close(fd);
		if (got > 0) {
			text[got] = '\0';
			return must_have(strdup(text));
		}
		nanosleep(&pause, NULL);
	}
	return NULL;
}

__attribute__((noreturn)) static void end_without_exit(struct client *client, const struct answer *answer)
{
	if (client->sentence != NULL)
		give_up("", client->sentence);
	if (client->relay.fault != NULL)
		give_up("the guest's agent broke off: it sent ", client->relay.fault);
	long long wait_ms = records_number(answer->body, answer->length, "end_wait_ms", END_FILE_TIMEOUT_MS);
	char *end = end_of_guest(records_get(answer->body, answer->length, "end_file"), wait_ms);
	char *sentence = end == NULL ? NULL : strchr(end, '\n');
	if (end == NULL || sentence == NULL)
		give_up("the guest is gone: ", "its stream closed and nobody said why");
	*sentence++ = '\0';
	sentence[strcspn(sentence, "\n")] = '\0';
	if (strcmp(end, "oom") != 0)
		give_up("the guest is gone: ", sentence);
	say_out_of_memory(sentence);
	client_die_by(SIGKILL);
}

/* The socket that mpi/pmi2 gives a task; -1: none. */
static int pmi_connection(void)
{
	struct stat facts;
	int fd = atoi(variable("PMI_FD", "-1"));
	return fd > STDERR_FILENO && fstat(fd, &facts) == 0 && S_ISSOCK(facts.st_mode) ? fd : -1;
}

__attribute__((noreturn)) static void enter(const struct task *task)
{
	struct client client = {
		.is_pty = client_stdio_is_pty(), .is_batch = task->is_batch, .parent = client_watch_parent()};
	struct records question = enter_question(task);
	struct records start = describe(task, client.is_pty);
	int pmi = pmi_connection();
	if (pmi >= 0)
		records_add(&start, "flag", "pmi");
	struct answer answer = node_ask(task->socket_path, &question, GUEST_WAIT_MAX_S, client.parent);
	if (answer.sentence != NULL)
		give_up("", answer.sentence);
	records_free(&question);
	add_user(&start, &answer);
	fcntl(answer.stream, F_SETFL, fcntl(answer.stream, F_GETFL) | O_NONBLOCK);
	client_init(&client, answer.stream);
	complaints = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
	runner_attach(&client, task->socket_path, task->job, &answer);
	if (pmi >= 0)
		relay_connection(&client.relay, CHANNEL_PMI, pmi, SINK_FOREIGN);
	if (client_start(&client, &start))
		client_relay(&client);
	records_free(&start);
	client_restore_terminal(&client);
	if (client.oom_kills > 0) {
		char sentence[160];
		snprintf(sentence, sizeof sentence, "in the guest (%lld MiB), %u %s killed; ask for more with --mem",
			 records_number(answer.body, answer.length, "memory_mib", 0), client.oom_kills,
			 client.oom_kills == 1 ? "process was" : "processes were");
		say_out_of_memory(sentence);
	}
	if (client.ended && WIFSIGNALED(client.status))
		wait_until_read();
	if (client.ended)
		client_end_as(client.status);
	end_without_exit(&client, &answer);
}

int main(int argc, char **argv)
{
	client_block_signals();
	struct task task = {.socket_path = variable("CARREL_ENTER_SOCKET", NULL), .job = variable("SLURM_JOB_ID", NULL)};
	char *argv0 = getenv("CARREL_ENTER_ARGV0");
	if (argc == 2 && argv0 == NULL && strcmp(argv[1], "--version") == 0) {
		printf("carrel-enter %s, relay protocol %d\n", CARREL_VERSION, CARREL_PROTOCOL_VERSION);
		return 0;
	}
	/* A command's own first argument may be `--` too, so the variable decides where there is one. */
	if (argv0 != NULL)
		argv[0] = argv0;
	else if (argc > 2 && strcmp(argv[1], "--") == 0)
		argv += 2;
	else
		give_up("carrel-enter is started by Slurm for a task with --guest, not by hand", "");
	if (task.socket_path == NULL || task.job == NULL)
		give_up(task.job == NULL ? "SLURM_JOB_ID" : "CARREL_ENTER_SOCKET",
			" is not set; is spank_carrel.so in plugstack.conf?");
	task.argv = argv;
	task.is_batch = is_batch_script(argv[0]);
	enter(&task);
}
