/* carrel-guard: QEMU's parent. Ends the guest with its job, also when carreld is dead, and records why it ended.
 *
 * It decides nothing: while carreld lives, carreld decides. It exists because a guest must not outlive its job
 * when nobody is left to end it, and because only a parent learns how a process died.
 * The command line, and what it leaves in the guest's directory, are in docs/reference/guard.md.
 */
#define _GNU_SOURCE
#include "guard.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/pidfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 250, ORPHAN_MS = 5000 };

/* ---- words ---------------------------------------------------------------------------------------------------- */

int report_fd = -1;

__attribute__((noreturn, format(printf, 2, 3))) void die(int code, const char *format, ...)
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

__attribute__((format(printf, 2, 3))) const char *path_of(char into[PATH_MAX], const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(into, PATH_MAX, format, args);
	va_end(args);
	return into;
}

long now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

size_t read_text(const char *path, char *into, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t count = fd < 0 ? -1 : read(fd, into, size - 1);
	if (fd >= 0)
		close(fd);
	into[count > 0 ? count : 0] = '\0';
	return count > 0 ? (size_t)count : 0;
}

void write_file(const struct guest *guest, const char *name, const char *text)
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
		if (guest->group_count == GROUPS_MAX)
			die(EXIT_USAGE, "--groups: more than %d", GROUPS_MAX);
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
