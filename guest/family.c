/* Everything that a session started: how it is found, signalled and ended.
 *
 * In a guest the session has a cgroup, which nothing leaves. Where there is no cgroup v2, the session's process is the
 * reaper of its orphans, so that whatever it started is below it in the process tree.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "session.h"
#include "wire.h"

enum { END_ROUNDS = 40, END_ROUND_MS = 50 };

#define CGROUPS "/sys/fs/cgroup/carrel"

struct process {
	pid_t pid, parent;
	bool ours;
};

struct processes {
	struct process *list;
	size_t count, size;
};

pid_t parent_of(pid_t pid)
{
	char path[64];
	char text[512];
	snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t got = read(fd, text, sizeof text - 1);
	close(fd);
	text[got > 0 ? got : 0] = '\0';
	/* The command's name may hold blanks and parentheses; the last one closes it. */
	const char *after = strrchr(text, ')');
	int parent = 0;
	return after != NULL && sscanf(after + 1, " %*c %d", &parent) == 1 ? parent : 0;
}

static struct processes all_processes(void)
{
	struct processes all = {0};
	DIR *proc = opendir("/proc");
	const struct dirent *entry;
	while (proc != NULL && (entry = readdir(proc)) != NULL) {
		pid_t pid = (pid_t)atoi(entry->d_name);
		if (pid <= 0)
			continue;
		if (all.count == all.size) {
			all.size = all.size == 0 ? 128 : all.size * 2;
			all.list = must_have(realloc(all.list, all.size * sizeof *all.list));
		}
		all.list[all.count++] = (struct process){.pid = pid, .parent = parent_of(pid)};
	}
	if (proc != NULL)
		closedir(proc);
	return all;
}

static bool is_ours(const struct processes *all, pid_t pid)
{
	for (size_t i = 0; i < all->count; i++)
		if (all->list[i].pid == pid)
			return all->list[i].ours;
	return false;
}

static bool takes_by_default(pid_t pid, int signal_number)
{
	char path[64];
	char line[128];
	unsigned long long mask = 0;
	bool found = false;
	bool by_default = true;
	snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
	FILE *status = fopen(path, "re");
	while (status != NULL && fgets(line, sizeof line, status) != NULL)
		if (sscanf(line, "SigIgn: %llx", &mask) == 1 || sscanf(line, "SigCgt: %llx", &mask) == 1) {
			found = true;
			by_default = by_default && (mask >> (signal_number - 1) & 1) == 0;
		}
	if (status != NULL)
		fclose(status);
	return found && by_default;
}

/* Under slurmstepd TSTP stops a task. A session's processes have no parent beside them that could let them go on, so
 * the kernel would pass over it. */
static void signal_one(pid_t pid, int signal_number)
{
	bool stops = signal_number == SIGTSTP && takes_by_default(pid, SIGTSTP);
	kill(pid, stops ? SIGSTOP : signal_number);
}

static void signal_descendants(int signal_number)
{
	struct processes all = all_processes();
	bool more = true;
	while (more) {
		more = false;
		for (size_t i = 0; i < all.count; i++) {
			struct process *p = &all.list[i];
			if (!p->ours && (p->parent == getpid() || is_ours(&all, p->parent)))
				p->ours = more = true;
		}
	}
	for (size_t i = 0; i < all.count; i++)
		if (all.list[i].ours)
			signal_one(all.list[i].pid, signal_number);
	free(all.list);
}

static void signal_cgroup(const char *directory, int signal_number)
{
	char path[160];
	int pid = 0;
	snprintf(path, sizeof path, "%s/cgroup.procs", directory);
	FILE *list = fopen(path, "re");
	while (list != NULL && fscanf(list, "%d", &pid) == 1)
		signal_one(pid, signal_number);
	if (list != NULL)
		fclose(list);
}

void session_signal(const struct session *session, int signal_number, bool all)
{
	if (session->leader <= 0)
		return;
	if (!all || !session->is_root_of_all) {
		if (!session->leader_ended)
			kill(session->leader, signal_number);
	} else if (session->cgroup[0] != '\0')
		signal_cgroup(session->cgroup, signal_number);
	else
		signal_descendants(signal_number);
}

/* So that each session's own kills for memory are counted; a kernel without the controller counts none. */
static void count_memory(const char *directory)
{
	char path[160];
	snprintf(path, sizeof path, "%s/cgroup.subtree_control", directory);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && write(fd, "+memory", 7) != 7)
		errno = 0;
	if (fd >= 0)
		close(fd);
}

unsigned session_oom_kills(const struct session *session)
{
	char path[160];
	char word[32];
	unsigned long count = 0;
	unsigned long kills = 0;
	snprintf(path, sizeof path, "%s/memory.events", session->cgroup);
	FILE *events = session->cgroup[0] == '\0' ? NULL : fopen(path, "re");
	while (events != NULL && fscanf(events, "%31s %lu", word, &count) == 2)
		if (strcmp(word, "oom_kill") == 0)
			kills = count;
	if (events != NULL)
		fclose(events);
	return (unsigned)kills;
}

void session_make_cgroup(struct session *session, const char *name)
{
	static const char *const counted[] = {"/sys/fs/cgroup", CGROUPS};
	struct stat facts;
	int needed = snprintf(session->cgroup, sizeof session->cgroup, CGROUPS "/%s", name);
	if (needed >= (int)sizeof session->cgroup || strchr(name, '/') != NULL || geteuid() != 0 ||
	    stat("/sys/fs/cgroup/cgroup.procs", &facts) != 0 ||
	    (mkdir(CGROUPS, 0755) != 0 && errno != EEXIST) ||
	    (mkdir(session->cgroup, 0755) != 0 && errno != EEXIST))
		session->cgroup[0] = '\0';
	else
		for (size_t i = 0; i < sizeof counted / sizeof counted[0]; i++)
			count_memory(counted[i]);
}

static void kill_cgroup(const char *directory)
{
	char path[160];
	snprintf(path, sizeof path, "%s/cgroup.kill", directory);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, "1", 1) == 1;
	if (fd >= 0)
		close(fd);
	if (!done) /* a kernel before 5.14 */
		signal_cgroup(directory, SIGKILL);
}

static bool all_are_reaped(struct session *session)
{
	for (;;) {
		pid_t pid = waitpid(-1, NULL, WNOHANG);
		if (pid == 0)
			return false;
		if (pid < 0)
			return errno == ECHILD;
		if (pid == session->leader)
			session->leader_ended = true;
	}
}

void session_end_all(struct session *session)
{
	if (!session->is_root_of_all) {
		/* A host's srun that dies leaves the rest to its own shepherd, as it does without a guest. */
		session_signal(session, SIGKILL, false);
		return;
	}
	for (int round = 0; round < END_ROUNDS; round++) {
		struct pollfd child = {.fd = session->signals, .events = POLLIN};
		struct signalfd_siginfo info;
		if (session->cgroup[0] != '\0')
			kill_cgroup(session->cgroup);
		else
			signal_descendants(SIGKILL);
		if (all_are_reaped(session))
			break;
		if (poll(&child, 1, END_ROUND_MS) > 0 && read(session->signals, &info, sizeof info) < 0)
			break;
	}
	if (session->cgroup[0] != '\0')
		rmdir(session->cgroup);
	if (session->command.script_path != NULL && session->command.script != NULL)
		unlink(session->command.script_path);
}
