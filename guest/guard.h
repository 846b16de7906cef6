/* The parts of carrel-guard: carrel-guard.c watches, guard-child.c becomes QEMU, guard-end.c tells why it ended. */
#ifndef CARREL_GUARD_H
#define CARREL_GUARD_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { LIST_MAX = 256, GROUPS_MAX = 4096 };
enum { EXIT_USAGE = 2, EXIT_CGROUP = 3, EXIT_MOUNT = 4, EXIT_START = 5 };

struct list {
	const char *item[LIST_MAX];
	size_t count;
};

struct guest {
	const char *dir, *lock, *job_dir, *step_sockets;
	uid_t uid;
	gid_t gid;
	gid_t groups[GROUPS_MAX];
	size_t group_count;
	struct list cgroups, binds, keep;
	char **command;
	bool job_was_seen;
};

/* Where the child's sentence goes besides stderr, so that the parent can repeat it in `end`; -1: nowhere. */
extern int report_fd;

__attribute__((noreturn, format(printf, 2, 3))) void die(int code, const char *format, ...);
/* Longer than a path may be means that no such file can exist: the caller's next call fails and says so. */
__attribute__((format(printf, 2, 3))) const char *path_of(char into[PATH_MAX], const char *format, ...);
long now_ms(void);
size_t read_text(const char *path, char *into, size_t size);
/* Replaces a file of the guest's directory as a whole. */
void write_file(const struct guest *guest, const char *name, const char *text);

__attribute__((noreturn)) void become_qemu(const struct guest *guest, pid_t guard);

/* Writes `end`: what the guard did it for, or what QEMU's wait status and cgroups tell. */
void record_end(const struct guest *guest, int status, const char *reason);
/* The guest's cgroups, and the job's where nothing else is left in them. */
void remove_cgroups(const struct guest *guest);

#endif
