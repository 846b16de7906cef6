/* Afterwards: why the guest is gone, and nothing of it left in the job's cgroups. */
#define _GNU_SOURCE
#include "guard.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RMDIR_MS = 2000 };

static long oom_kills(const struct guest *guest)
{
	static const char *const files[] = { "memory.oom_control", "memory.events" }; /* cgroup v1, v2 */
	char path[PATH_MAX], text[1024];
	long kills = 0;
	for (size_t i = 0; i < guest->cgroups.count * 2; i++) {
		read_text(path_of(path, "%s/%s", guest->cgroups.item[i / 2], files[i % 2]), text, sizeof text);
		const char *found = strstr(text, "oom_kill ");
		kills += found ? strtol(found + strlen("oom_kill "), NULL, 10) : 0;
	}
	return kills;
}

/* The smallest limit from the guest's cgroup upwards, in MiB. Above the mount's root there are no such files. */
static unsigned long long memory_limit_mib(const struct guest *guest)
{
	static const char *const files[] = { "memory.limit_in_bytes", "memory.max" };
	char dir[PATH_MAX], path[PATH_MAX], text[64];
	unsigned long long least = ULLONG_MAX; /* "no limit" is a huge number in v1 and the word max in v2 */
	for (size_t i = 0; i < guest->cgroups.count; i++) {
		path_of(dir, "%s", guest->cgroups.item[i]);
		for (char *slash = dir; slash; slash = strrchr(dir, '/'), slash ? *slash = '\0' : 0)
			for (int version = 0; version < 2; version++) {
				read_text(path_of(path, "%s/%s", dir, files[version]), text, sizeof text);
				unsigned long long limit = strtoull(text, NULL, 10);
				least = limit && limit < least ? limit : least;
			}
	}
	return least >> 20;
}

static void last_line(const struct guest *guest, char *into, size_t size)
{
	char path[PATH_MAX], text[4096];
	int fd = open(path_of(path, "%s/guard.log", guest->dir), O_RDONLY | O_CLOEXEC);
	ssize_t count = 0;
	if (fd >= 0) {
		off_t end = lseek(fd, 0, SEEK_END), from = (off_t)sizeof text - 1;
		count = pread(fd, text, sizeof text - 1, end > from ? end - from : 0);
		close(fd);
	}
	text[count > 0 ? count : 0] = '\0';
	for (char *end = text + strlen(text); end > text && isspace((unsigned char)end[-1]);)
		*--end = '\0';
	char *line = strrchr(text, '\n');
	snprintf(into, size, "%s", line ? line + 1 : text);
	for (char *c = into; *c; c++)
		if (iscntrl((unsigned char)*c))
			*c = ' ';
}

void record_end(const struct guest *guest, int status, const char *reason)
{
	char text[PATH_MAX + 512], line[512];
	unsigned long long limit_mib = memory_limit_mib(guest);
	if (reason)
		snprintf(text, sizeof text, "destroyed\n%s\n", reason);
	else if (WIFSIGNALED(status) && oom_kills(guest) > 0)
		snprintf(text, sizeof text,
			 "oom\nthe guest needed more memory than the job has (%llu MiB); ask for more with --mem\n",
			 limit_mib);
	else if (WIFSIGNALED(status))
		snprintf(text, sizeof text, "killed\nqemu was killed by signal %d\n", WTERMSIG(status));
	else if (WEXITSTATUS(status) == 0)
		snprintf(text, sizeof text, "stopped\nthe guest was shut down\n");
	else {
		last_line(guest, line, sizeof line);
		snprintf(text, sizeof text, "exited\nqemu exited with %d: %s\n", WEXITSTATUS(status),
			 *line ? line : "it said nothing");
	}
	write_file(guest, "end", text);
}

/* slurmstepd makes uid_U, job_J and step_S under this lock, on the controller's mount point: without it we could
 * remove uid_U between two of its mkdir, and a job would fail. Returns -1 when it is not had in time. */
static int lock_like_slurmstepd(const char *cgroup, long deadline_ms)
{
	const struct timespec pause = { .tv_nsec = 10000000 };
	char root[PATH_MAX], above[PATH_MAX + 8];
	struct stat here, there;
	path_of(root, "%s", cgroup);
	for (char *slash; (slash = strrchr(root, '/')) && slash != root; *slash = '\0') {
		snprintf(above, sizeof above, "%s/..", root);
		if (stat(root, &here) == 0 && stat(above, &there) == 0 && here.st_dev != there.st_dev)
			break;
	}
	int fd = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	while (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0) {
		if (errno != EWOULDBLOCK || now_ms() >= deadline_ms) {
			close(fd);
			return -1;
		}
		nanosleep(&pause, NULL);
	}
	return fd;
}

/* job_J and uid_U go too where nothing else is in them; no other directory of Slurm's is ours to remove. */
static void remove_job_and_user(char *dir)
{
	for (char *slash; (slash = strrchr(dir, '/'));) {
		*slash = '\0';
		const char *name = strrchr(dir, '/');
		if (!name || (strncmp(name, "/job_", 5) && strncmp(name, "/uid_", 5)) || rmdir(dir) != 0)
			return;
	}
}

void remove_cgroups(const struct guest *guest)
{
	const struct timespec pause = { .tv_nsec = 10000000 };
	long deadline_ms = now_ms() + RMDIR_MS;
	for (size_t i = 0; i < guest->cgroups.count; i++) {
		char dir[PATH_MAX];
		path_of(dir, "%s", guest->cgroups.item[i]);
		/* The kernel lets go of a cgroup shortly after its last process was reaped. */
		while (rmdir(dir) != 0 && errno == EBUSY && now_ms() < deadline_ms)
			nanosleep(&pause, NULL);
		int lock = lock_like_slurmstepd(dir, deadline_ms);
		if (lock < 0)
			continue; /* an empty directory that stays does less harm */
		remove_job_and_user(dir);
		close(lock);
	}
}
