/* carrel-guard: QEMU's parent. Ends the guest with its job, also when carreld is dead, and records why it ended.
 *
 * It decides nothing: while carreld lives, carreld decides. It exists because a guest must not outlive its job
 * when nobody is left to end it, and because only a parent learns how a process died.
 * The command line, and what it leaves in the guest's directory, are in docs/reference/guard.md.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LIST_MAX = 256, TICK_MS = 250, ORPHAN_MS = 5000, RMDIR_MS = 2000 };
enum { EXIT_USAGE = 2, EXIT_CGROUP = 3, EXIT_MOUNT = 4, EXIT_START = 5 };

struct list {
	const char *item[LIST_MAX];
	size_t count;
};

struct guest {
	const char *dir, *lock, *job_dir, *step_sockets;
	uid_t uid;
	gid_t gid;
	gid_t groups[LIST_MAX];
	size_t group_count;
	struct list cgroups, binds, keep;
	char **command;
	bool job_was_seen;
};

/* ---- words ---------------------------------------------------------------------------------------------------- */

/* Where the child's sentence goes besides stderr, so that the parent can repeat it in `end`. */
static int report_fd = -1;

__attribute__((noreturn, format(printf, 2, 3))) static void die(int code, const char *format, ...)
{
	char sentence[PATH_MAX + 256];
	va_list args;
	va_start(args, format);
	vsnprintf(sentence, sizeof sentence, format, args);
	va_end(args);
	fprintf(stderr, "carrel-guard: %s\n", sentence);
	if (report_fd >= 0 && write(report_fd, sentence, strlen(sentence)) < 0)
		perror("carrel-guard: report");
	_exit(code);
}

/* Longer than a path may be means that no such file can exist: the caller's next call fails and says so. */
__attribute__((format(printf, 2, 3))) static const char *path_of(char into[PATH_MAX], const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(into, PATH_MAX, format, args);
	va_end(args);
	return into;
}

static long now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static size_t read_text(const char *path, char *into, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t count = fd < 0 ? -1 : read(fd, into, size - 1);
	if (fd >= 0)
		close(fd);
	into[count > 0 ? count : 0] = '\0';
	return count > 0 ? (size_t)count : 0;
}

static void write_file(const struct guest *guest, const char *name, const char *text)
{
	char path[PATH_MAX], temporary[PATH_MAX];
	path_of(path, "%s/%s", guest->dir, name);
	path_of(temporary, "%s/.%s.new", guest->dir, name);
	int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
	bool written = fd >= 0 && fchmod(fd, 0644) == 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text)
		       && fsync(fd) == 0;
	if (fd >= 0)
		close(fd);
	if (!written || rename(temporary, path) != 0)
		fprintf(stderr, "carrel-guard: %s: %s\n", path, strerror(errno));
}

/* ---- the child: from root to QEMU ------------------------------------------------------------------------------ */

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

__attribute__((noreturn)) static void become_qemu(const struct guest *guest, pid_t guard)
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

/* ---- the guard: is anybody left to decide, and is there still a job? -------------------------------------------- */

/* carreld holds the lock exclusively while it lives. An error is "cannot tell", and that ends nothing. */
static bool carreld_is_dead(const struct guest *guest)
{
	int fd = open(guest->lock, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT;
	bool dead = flock(fd, LOCK_SH | LOCK_NB) == 0;
	close(fd);
	return dead;
}

static bool has_process(const char *cgroup, int depth)
{
	char path[PATH_MAX], first[16];
	if (read_text(path_of(path, "%s/cgroup.procs", cgroup), first, sizeof first) > 0)
		return true;
	DIR *dir = depth > 0 ? opendir(cgroup) : NULL;
	bool found = false;
	for (struct dirent *entry; dir && !found && (entry = readdir(dir));)
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.')
			found = has_process(path_of(path, "%s/%s", cgroup, entry->d_name), depth - 1);
	if (dir)
		closedir(dir);
	return found;
}

static bool accepts(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof address.sun_path)
		return true; /* cannot tell */
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	bool accepted = fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) == 0 || errno == EAGAIN;
	if (fd >= 0)
		close(fd);
	return accepted;
}

/* A step lives where its cgroup has a process, or where slurmstepd answers on its socket. */
static bool has_step(const struct guest *guest)
{
	char where[PATH_MAX], path[PATH_MAX];
	path_of(where, "%s", guest->job_dir ? guest->job_dir : guest->step_sockets);
	const char *prefix = "step_";
	if (!guest->job_dir) {
		char *slash = strrchr(where, '/');
		if (!slash)
			return true; /* cannot tell; main() has refused it already */
		*slash = '\0';
		prefix = slash + 1;
	}
	DIR *dir = opendir(where);
	if (!dir)
		return errno != ENOENT;
	bool found = false;
	for (struct dirent *entry; !found && (entry = readdir(dir));)
		if (strncmp(entry->d_name, prefix, strlen(prefix)) == 0) {
			path_of(path, "%s/%s", where, entry->d_name);
			found = guest->job_dir ? has_process(path, 3) : accepts(path);
		}
	closedir(dir);
	return found;
}

/* The prolog starts the guest before Slurm has made the job's cgroup: absence counts only after presence. */
static bool job_seems_gone(struct guest *guest)
{
	if (guest->job_dir && access(guest->job_dir, F_OK) == 0)
		guest->job_was_seen = true;
	if (guest->job_dir && !guest->job_was_seen)
		return false;
	return carreld_is_dead(guest) && !has_step(guest);
}

/* Waits until QEMU is gone; returns why the guard ended it, or NULL where it ended by itself. */
static const char *watch(struct guest *guest, pid_t qemu)
{
	sigset_t term;
	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	struct pollfd watched[] = { { .fd = pidfd_open(qemu, 0), .events = POLLIN },
				    { .fd = signalfd(-1, &term, SFD_CLOEXEC), .events = POLLIN } };
	const char *reason = NULL;
	long gone_since_ms = 0;
	if (watched[0].fd < 0 || watched[1].fd < 0)
		reason = "carrel-guard could not watch it";
	while (!reason) {
		int ready = poll(watched, 2, TICK_MS);
		if (watched[0].revents)
			break;
		if (watched[1].revents)
			reason = "the guest was destroyed";
		if (ready > 0)
			continue;
		if (!job_seems_gone(guest))
			gone_since_ms = 0;
		else if (!gone_since_ms)
			gone_since_ms = now_ms();
		else if (now_ms() - gone_since_ms >= ORPHAN_MS)
			reason = "the job is gone and carreld is not running";
	}
	if (reason)
		kill(qemu, SIGKILL);
	return reason;
}

/* ---- afterwards: why, and nothing left behind --------------------------------------------------------------------- */

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

static void record_end(const struct guest *guest, int status, const char *reason)
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

static void remove_cgroups(const struct guest *guest)
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

/* ---- main ----------------------------------------------------------------------------------------------------------- */

static void append(struct list *list, const char *what)
{
	if (list->count == LIST_MAX)
		die(EXIT_USAGE, "%s: more than %d of a kind", what, LIST_MAX);
	list->item[list->count++] = what;
}

static unsigned parse_id(const char *text, const char **rest)
{
	char *end;
	errno = 0;
	unsigned long id = strtoul(text, &end, 10);
	if (end == text || errno || id > UINT_MAX - 1 || !isdigit((unsigned char)*text))
		die(EXIT_USAGE, "%s: must be a number", text);
	*rest = end;
	return (unsigned)id;
}

static void parse_groups(struct guest *guest, const char *text)
{
	while (*text) {
		if (guest->group_count == LIST_MAX)
			die(EXIT_USAGE, "--groups: more than %d", LIST_MAX);
		guest->groups[guest->group_count++] = parse_id(text, &text);
		text += *text == ',';
	}
}

static void parse(struct guest *guest, int argc, char **argv)
{
	static const struct option options[] = {
		{ "dir", 1, NULL, 'd' },     { "uid", 1, NULL, 'u' },	       { "gid", 1, NULL, 'g' },
		{ "groups", 1, NULL, 'G' },  { "lock", 1, NULL, 'l' },	       { "job-dir", 1, NULL, 'j' },
		{ "cgroup", 1, NULL, 'c' },  { "step-sockets", 1, NULL, 's' }, { "bind", 1, NULL, 'b' },
		{ "keep-fd", 1, NULL, 'k' }, { 0 },
	};
	guest->uid = guest->gid = (uid_t)-1;
	const char *rest;
	for (int option; (option = getopt_long(argc, argv, "+", options, NULL)) != -1;)
		switch (option) {
		case 'd': guest->dir = optarg; break;
		case 'u': guest->uid = parse_id(optarg, &rest); break;
		case 'g': guest->gid = parse_id(optarg, &rest); break;
		case 'G': parse_groups(guest, optarg); break;
		case 'l': guest->lock = optarg; break;
		case 'j': guest->job_dir = optarg; break;
		case 's': guest->step_sockets = optarg; break;
		case 'c': append(&guest->cgroups, optarg); break;
		case 'b': append(&guest->binds, optarg); break;
		case 'k': append(&guest->keep, optarg); break;
		default: exit(EXIT_USAGE);
		}
	guest->command = argv + optind;
	if (!guest->dir || !guest->lock || guest->uid == (uid_t)-1 || guest->gid == (gid_t)-1 || optind >= argc)
		die(EXIT_USAGE, "needs --dir, --uid, --gid, --lock and, after --, a command");
	if (!guest->job_dir == !(guest->step_sockets && strchr(guest->step_sockets, '/')))
		die(EXIT_USAGE, "needs either --job-dir DIR or --step-sockets DIR/PREFIX");
}

static unsigned long long start_time(pid_t pid)
{
	char path[PATH_MAX], text[1024];
	read_text(path_of(path, "/proc/%d/stat", (int)pid), text, sizeof text);
	char *field = strrchr(text, ')'); /* a command's name may itself contain one */
	for (int number = 2; field && number < 22; number++)
		field = strchr(field + 1, ' ');
	return field ? strtoull(field + 1, NULL, 10) : 0;
}

int main(int argc, char **argv)
{
	static struct guest guest;
	char text[PATH_MAX + 512];
	int pipe_fds[2], status = 0;
	sigset_t all;

	parse(&guest, argc, argv);
	guest.job_was_seen = guest.job_dir && access(guest.job_dir, F_OK) == 0;
	/* QEMU inherits the mask and keeps it: no signal that Slurm or the user sends to a job ends a guest. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	pid_t guard = getpid();
	if (pipe2(pipe_fds, O_CLOEXEC) != 0)
		die(EXIT_START, "pipe: %s", strerror(errno));
	pid_t qemu = fork();
	if (qemu < 0)
		die(EXIT_START, "fork: %s", strerror(errno));
	if (qemu == 0) {
		report_fd = pipe_fds[1];
		become_qemu(&guest, guard);
	}
	/* What QEMU was given must be QEMU's alone, or its peers would not notice that it died. */
	if (dup2(pipe_fds[0], 3) < 0 || close_range(4, ~0U, 0) != 0)
		fprintf(stderr, "carrel-guard: close_range: %s\n", strerror(errno));
	char failure[PATH_MAX + 256];
	ssize_t count = read(3, failure, sizeof failure - 1); /* 0: the exec closed it */
	close(3);
	if (count > 0) {
		failure[count] = '\0';
		waitpid(qemu, &status, 0);
		snprintf(text, sizeof text, "exited\n%s\n", failure);
		write_file(&guest, "end", text);
		remove_cgroups(&guest);
		return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_START;
	}
	snprintf(text, sizeof text, "guard=%d %llu\nqemu=%d %llu\n", (int)guard, start_time(guard), (int)qemu,
		 start_time(qemu));
	write_file(&guest, "pids", text);
	int adjust = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (adjust >= 0 && write(adjust, "-900", 4) < 0) {
		/* Not permitted without CAP_SYS_RESOURCE: then the guard is as good a victim as any. */
	}
	if (adjust >= 0)
		close(adjust);
	const char *reason = watch(&guest, qemu);
	waitpid(qemu, &status, 0);
	record_end(&guest, status, reason);
	remove_cgroups(&guest);
	return EXIT_SUCCESS;
}
