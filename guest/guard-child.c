/* From root to QEMU: into the job's cgroups, its own mounts, the user's identity, and next to no descriptors. */
#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

static void join_cgroup(const char *dir)
{
	char path[PATH_MAX];
	int fd = open(path_of(path, "%s/cgroup.procs", dir), O_WRONLY | O_CLOEXEC);
	if (fd < 0 || dprintf(fd, "%d\n", (int)getpid()) < 0)
		die(EXIT_CGROUP, "cgroup %s: %s", dir, strerror(errno));
	close(fd);
}

static void become_user_to_look(const struct guest *guest)
{
	if (setgroups(guest->group_count, guest->groups) != 0 || setresgid((gid_t)-1, guest->gid, (gid_t)-1) != 0
	    || setresuid((uid_t)-1, guest->uid, (uid_t)-1) != 0)
		die(EXIT_START, "cannot look as uid %u: %s", guest->uid, strerror(errno));
}

static void become_root_again(void)
{
	if (setresuid((uid_t)-1, 0, (uid_t)-1) != 0 || setresgid((gid_t)-1, 0, (gid_t)-1) != 0 || setgroups(0, NULL) != 0)
		die(EXIT_START, "cannot become root again: %s", strerror(errno));
}

/* Opened as the user, so that root cannot be led to share what the user may not reach. */
static int open_as_user(const struct guest *guest, const char *source)
{
	become_user_to_look(guest);
	int fd = open(source, O_PATH | O_CLOEXEC);
	struct stat about;
	bool usable = fd >= 0 && fstat(fd, &about) == 0;
	if (usable && S_ISDIR(about.st_mode))
		usable = faccessat(fd, ".", X_OK, AT_EACCESS) == 0;
	else if (usable && S_ISREG(about.st_mode))
		usable = faccessat(fd, "", R_OK, AT_EACCESS | AT_EMPTY_PATH) == 0;
	else if (usable) {
		errno = EINVAL; /* a device or a socket is not a thing to mount */
		usable = false;
	}
	if (!usable)
		die(EXIT_MOUNT, "mount source %s: %s", source, strerror(errno));
	become_root_again();
	return fd;
}

/* spec is INDEX:ro|rw:SOURCE; the source may itself contain colons. */
static void bind_mount(const struct guest *guest, const char *spec)
{
	char target[PATH_MAX];
	const char *mode = strchr(spec, ':'), *slash = strchr(spec, '/');
	if (!mode || mode == spec || (slash && slash < mode) || (strncmp(mode, ":ro:/", 5) && strncmp(mode, ":rw:/", 5)))
		die(EXIT_USAGE, "--bind %s: must be INDEX:ro:/PATH or INDEX:rw:/PATH", spec);
	const char *source = mode + 4;
	int fd = open_as_user(guest, source);
	struct stat about;
	path_of(target, "%s/stage/%.*s", guest->dir, (int)(mode - spec), spec);
	int made = fstat(fd, &about) != 0	 ? -1
		   : S_ISDIR(about.st_mode)	 ? mkdir(target, 0755)
						 : mknod(target, S_IFREG | 0644, 0);
	int tree = made != 0 ? -1 : open_tree(fd, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
	/* Recursive, unlike a remount: what is mounted below a read-only share must not stay writable. */
	struct mount_attr attributes = { .attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV };
	if (mode[2] == 'o')
		attributes.attr_set |= MOUNT_ATTR_RDONLY;
	if (tree < 0 || mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes) != 0
	    || move_mount(tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH) != 0)
		die(EXIT_MOUNT, "mount source %s: %s", source, strerror(errno));
	close(tree);
	close(fd);
}

/* On a tmpfs of this namespace, so that the host sees an empty directory and everything vanishes with QEMU. */
static void stage_mounts(const struct guest *guest)
{
	char stage[PATH_MAX];
	path_of(stage, "%s/stage", guest->dir);
	if (mkdir(stage, 0755) != 0 && errno != EEXIST)
		die(EXIT_MOUNT, "%s: %s", stage, strerror(errno));
	if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL) != 0
	    || mount("carrel", stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m") != 0)
		die(EXIT_MOUNT, "private mounts at %s: %s", stage, strerror(errno));
	for (size_t i = 0; i < guest->binds.count; i++)
		bind_mount(guest, guest->binds.item[i]);
}

__attribute__((noreturn)) void become_qemu(const struct guest *guest, pid_t guard)
{
	for (size_t i = 0; i < guest->cgroups.count; i++)
		join_cgroup(guest->cgroups.item[i]);
	stage_mounts(guest);
	if (setgroups(guest->group_count, guest->groups) != 0 || setresgid(guest->gid, guest->gid, guest->gid) != 0
	    || setresuid(guest->uid, guest->uid, guest->uid) != 0)
		die(EXIT_START, "cannot become uid %u: %s", guest->uid, strerror(errno));
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		die(EXIT_START, "no_new_privs: %s", strerror(errno));
	/* After the change of credentials, which clears it; the guard may have died before it was set. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != guard)
		die(EXIT_START, "carrel-guard ended before qemu began");
	if (close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) != 0)
		die(EXIT_START, "close_range: %s", strerror(errno));
	for (size_t i = 0; i < guest->keep.count; i++)
		if (fcntl(atoi(guest->keep.item[i]), F_SETFD, 0) != 0)
			die(EXIT_START, "--keep-fd %s: %s", guest->keep.item[i], strerror(errno));
	execv(guest->command[0], guest->command);
	die(EXIT_START, "%s: %s", guest->command[0], strerror(errno));
}
