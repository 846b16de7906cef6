/* How a command begins: descriptors, identity, limits, directory, exec; with the words slurmstepd would use. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/close_range.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "session.h"
#include "wire.h"

enum { PIPE_BYTES = 1 << 20, PMI_FD = 3 };

struct ends {
	int stdio[3];   /* the command's */
	int ours[3];    /* to its stdin, from its stdout and stderr */
	int pmi;        /* the command's end of its PMI connection; -1: none */
};

static void close_pair(int *first, int *second)
{
	if (*first >= 0)
		close(*first);
	if (*second >= 0 && *second != *first)
		close(*second);
	*first = -1;
	*second = -1;
}

static bool open_pty(const struct command *command, struct ends *ends)
{
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	int unlock = 0;
	if (master < 0)
		return false;
	int slave = ioctl(master, TIOCSPTLCK, &unlock) == 0
			    ? ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)
			    : -1;
	if (slave < 0) {
		close(master);
		return false;
	}
	struct winsize size = {.ws_row = command->rows, .ws_col = command->columns};
	ioctl(master, TIOCSWINSZ, &size);
	/* As slurmstepd: the terminal is the user's, so that mesg, screen and the like can open it by name. */
	if (geteuid() == 0 && fchown(slave, command->uid, command->gid) != 0)
		errno = 0;
	ends->ours[0] = master;
	ends->ours[1] = fcntl(master, F_DUPFD_CLOEXEC, 3);
	for (int i = 0; i < 3; i++)
		ends->stdio[i] = slave;
	return true;
}

static bool open_pipes(struct ends *ends)
{
	for (int i = 0; i < 3; i++) {
		int pair[2];
		if (pipe2(pair, O_CLOEXEC) != 0)
			return false;
		/* A pipe as deep as may be keeps writer and relay from taking turns page by page. */
		fcntl(pair[0], F_SETPIPE_SZ, PIPE_BYTES);
		ends->stdio[i] = pair[i == 0 ? 0 : 1];
		ends->ours[i] = pair[i == 0 ? 1 : 0];
		/* Our end is our own open file: the command never sees this flag on its end. */
		fcntl(ends->ours[i], F_SETFL, O_NONBLOCK | (i == 0 ? O_WRONLY : O_RDONLY));
	}
	return true;
}

static void give_stdio(const struct command *command, const struct ends *ends)
{
	if (geteuid() != 0 || command->uid == 0 || command->is_pty)
		return;
	/* /dev/stdout of a command is this pipe, and it opens it as its own user. */
	for (int i = 0; i < 3; i++)
		if (fchown(ends->stdio[i], command->uid, command->gid) != 0)
			return;
}

/* The command finds its PMI server at another number than the task does. */
static int open_pmi(struct session *session)
{
	static char entry[] = "PMI_FD=3";
	int pair[2];
	char **place = session->command.environ;
	if (!session->command.has_pmi || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		return -1;
	fcntl(pair[0], F_SETFL, O_NONBLOCK | O_RDWR);
	relay_connection(&session->relay, CHANNEL_PMI, pair[0], SINK_OWN);
	while (*place != NULL && strncmp(*place, "PMI_FD=", 7) != 0)
		place++;
	*place = entry;
	return pair[1];
}

static bool make_parents(const char *path)
{
	char parent[PATH_MAX];
	if (strlen(path) >= sizeof parent)
		return false;
	strcpy(parent, path);
	for (char *slash = strchr(parent + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (mkdir(parent, 0755) != 0 && errno != EEXIST)
			return false;
		*slash = '/';
	}
	return true;
}

static bool write_script(const struct command *command)
{
	if (command->script_path == NULL || command->script_path[0] != '/' || !make_parents(command->script_path))
		return false;
	/* A new file each time: whoever owns an old one must not be able to write into this one. */
	unlink(command->script_path);
	int fd = open(command->script_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0700);
	if (fd < 0)
		return false;
	size_t length = strlen(command->script);
	bool done = write(fd, command->script, length) == (ssize_t)length && fchmod(fd, 0700) == 0 &&
		    (geteuid() != 0 || fchown(fd, command->uid, command->gid) == 0);
	close(fd);
	return done;
}

static const char *variable(char **environment, const char *name)
{
	size_t length = strlen(name);
	for (; *environment != NULL; environment++)
		if (strncmp(*environment, name, length) == 0 && (*environment)[length] == '=')
			return *environment + length + 1;
	return NULL;
}

/* As slurmstepd signs what it says on a task's stderr. */
static void say(const struct command *command, const char *what, const char *name, const char *reason)
{
	const char *node = variable(command->environ, "SLURMD_NODENAME");
	dprintf(STDERR_FILENO, "slurmstepd%s%s: error: ", node == NULL ? "" : "-", node == NULL ? "" : node);
	dprintf(STDERR_FILENO, what, name, reason);
}

static void apply_limits(const struct command *command)
{
	for (unsigned i = 0; i < RLIMITS_MAX; i++) {
		if (!command->limits[i].given)
			continue;
		struct rlimit limit = {command->limits[i].soft, command->limits[i].hard};
		struct rlimit now;
		if (setrlimit(i, &limit) == 0 || getrlimit(i, &now) != 0)
			continue;
		/* This kernel allows less than the host's: as much as it does. */
		limit.rlim_max = limit.rlim_max > now.rlim_max ? now.rlim_max : limit.rlim_max;
		limit.rlim_cur = limit.rlim_cur > limit.rlim_max ? limit.rlim_max : limit.rlim_cur;
		setrlimit(i, &limit);
	}
}

/* As slurmstepd looks for a command: the first file of that name on the task's own PATH, else the name itself. */
static const char *find_command(const struct command *command, char *place)
{
	const char *name = command->argv[0];
	const char *path = variable(command->environ, "PATH");
	if (name[0] == '.' && getcwd(place, PATH_MAX) != NULL && strlen(place) + strlen(name) + 2 < PATH_MAX) {
		strcat(strcat(place, "/"), name);
		return place;
	}
	if (strchr(name, '/') != NULL || path == NULL)
		return name;
	while (*path != '\0') {
		size_t length = strcspn(path, ":");
		struct stat facts;
		int needed = snprintf(place, PATH_MAX, "%.*s/%s", (int)length, path, name);
		if (needed < PATH_MAX && stat(place, &facts) == 0 && !S_ISDIR(facts.st_mode))
			return place;
		path += length + (path[length] == ':' ? 1 : 0);
	}
	return name;
}

static bool says_bad_interpreter(const struct command *command, const char *path, int why)
{
	char line[256];
	int fd = why == ENOENT ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	ssize_t got = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
	if (fd >= 0)
		close(fd);
	if (got < 3 || line[0] != '#' || line[1] != '!')
		return false;
	line[got] = '\0';
	line[strcspn(line, "\n")] = '\0';
	say(command, "execve(): bad interpreter(%s): %s\n", line + 2, strerror(why));
	return true;
}

static bool take_identity(const struct command *command)
{
	return setgroups(command->group_count, command->groups) == 0 &&
	       setresgid(command->gid, command->gid, command->gid) == 0 &&
	       setresuid(command->uid, command->uid, command->uid) == 0;
}

static void join_cgroup(const char *directory)
{
	char path[160];
	if (directory[0] == '\0')
		return;
	snprintf(path, sizeof path, "%s/cgroup.procs", directory);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "0", 1) != 1)
		dprintf(STDERR_FILENO, "carrel: cannot enter cgroup %s: %s\n", directory, strerror(errno));
	close(fd);
}

/* The agent is the last that the guest's kernel may kill for memory; its commands are not. */
static void be_killable(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "0", 1) != 1)
		errno = 0;
	close(fd);
}

static void reset_signals(void)
{
	struct sigaction as_ever = {.sa_handler = SIG_DFL};
	for (int number = 1; number < NSIG; number++)
		sigaction(number, &as_ever, NULL);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void enter_directory(const struct session *session)
{
	const struct command *command = &session->command;
	if (command->cwd == NULL || chdir(command->cwd) == 0)
		return;
	if (session->is_root_of_all)
		say(command, "couldn't chdir to `%s': %s: going to /tmp instead\n", command->cwd, strerror(errno));
	else
		dprintf(STDERR_FILENO, "carrel: %s: %s on the host, going to /tmp instead; see: --guest-mount\n",
			command->cwd, strerror(errno));
	if (chdir("/tmp") != 0)
		say(command, "couldn't chdir to /tmp either: %s%s\n", strerror(errno), "");
}

__attribute__((noreturn)) static void become(const struct session *session, const struct ends *ends)
{
	const struct command *command = &session->command;
	char place[PATH_MAX];
	setsid();
	join_cgroup(session->cgroup);
	for (int i = 0; i < 3; i++)
		dup2(ends->stdio[i], i);
	if (command->is_pty)
		ioctl(STDIN_FILENO, TIOCSCTTY, 0);
	if (session->is_root_of_all) {
		const struct sched_param any = {0};
		sched_setscheduler(0, SCHED_OTHER, &any);
		apply_limits(command);
		be_killable();
	}
	if (session->is_root_of_all && geteuid() == 0 && !take_identity(command)) {
		dprintf(STDERR_FILENO, "carrel: cannot become the job's user: %s\n", strerror(errno));
		_exit(1);
	}
	umask(command->umask);
	enter_directory(session);
	reset_signals();
	/* Whatever this process was itself given by its own parent is nothing of the command's. */
	/* By way of a copy: onto itself, dup2 would leave it to be closed by exec. */
	int pmi = ends->pmi >= 0 ? fcntl(ends->pmi, F_DUPFD_CLOEXEC, PMI_FD + 1) : -1;
	if (pmi >= 0)
		dup2(pmi, PMI_FD);
	close_range(pmi >= 0 ? PMI_FD + 1 : PMI_FD, ~0U, CLOSE_RANGE_CLOEXEC);
	const char *path = command->path != NULL ? command->path : find_command(command, place);
	execve(path, command->argv, command->environ);
	int why = errno;
	if (!says_bad_interpreter(command, path, why))
		say(command, "execve(): %s: %s\n", path, strerror(why));
	_exit(why);
}

const char *session_spawn(struct session *session)
{
	const struct command *command = &session->command;
	struct ends ends = {{-1, -1, -1}, {-1, -1, -1}, -1};
	if (command->script != NULL && !write_script(command))
		return "the batch script cannot be written in the guest; is its root file system full or read-only?";
	if (command->is_pty ? !open_pty(command, &ends) : !open_pipes(&ends))
		return "no terminal or pipe can be made in the guest";
	give_stdio(command, &ends);
	ends.pmi = open_pmi(session);
	/* vfork: the child shares this memory until it execs, and only makes system calls of its own until then. */
	pid_t child = vfork();
	if (child == 0)
		become(session, &ends);
	if (command->is_pty) {
		close(ends.stdio[0]);
		ends.stdio[0] = ends.stdio[1] = ends.stdio[2] = -1;
	}
	for (int i = 0; i < 3; i++)
		if (ends.stdio[i] >= 0)
			close(ends.stdio[i]);
	if (ends.pmi >= 0)
		close(ends.pmi);
	if (child < 0) {
		close_pair(&ends.ours[0], &ends.ours[1]);
		if (ends.ours[2] >= 0)
			close(ends.ours[2]);
		return "no process can be started in the guest";
	}
	session->leader = child;
	relay_sink(&session->relay, CHANNEL_STDIN, ends.ours[0], SINK_OWN);
	relay_source(&session->relay, CHANNEL_STDOUT, ends.ours[1]);
	if (ends.ours[2] >= 0)
		relay_source(&session->relay, CHANNEL_STDERR, ends.ours[2]);
	return NULL;
}
