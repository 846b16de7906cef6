/* Who this guest is, and whose: everything that differs between two clones of one template. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "calls.h"

enum { ENTROPY_MAX_BYTES = 512, FILE_MAX_BYTES = 4 << 20, MOUNTS_MAX = 256 };

#define BOOT_ID "/proc/sys/kernel/random/boot_id"

struct asked {
	const char *data;
	size_t length;
};

static const char *get(struct asked asked, const char *key)
{
	return records_get(asked.data, asked.length, key);
}

bool make_directories(const char *path, unsigned mode)
{
	char part[PATH_MAX];
	struct stat facts;
	if (path[0] != '/' || strlen(path) >= sizeof part)
		return false;
	strcpy(part, path);
	for (char *slash = strchr(part + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (mkdir(part, 0755) != 0 && errno != EEXIST)
			return false;
		*slash = '/';
	}
	if (mkdir(path, 0755) == 0)
		return chmod(path, mode) == 0;
	return stat(path, &facts) == 0 && S_ISDIR(facts.st_mode);
}

/* A file that is there keeps its inode: to write over it is the shortest way for a kernel that never did either. */
static bool write_over(const char *path, const char *text, size_t length, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, mode);
	struct stat facts;
	if (fd < 0)
		return false;
	bool done = fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_nlink == 1 &&
		    write(fd, text, length) == (ssize_t)length &&
		    ((size_t)facts.st_size <= length || ftruncate(fd, (off_t)length) == 0);
	return close(fd) == 0 && done;
}

static bool write_file(const char *path, const char *text, size_t length, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
	if (fd < 0)
		return false;
	bool done = write(fd, text, length) == (ssize_t)length;
	return close(fd) == 0 && done;
}

static void write_line(const char *path, const char *line, mode_t mode)
{
	char text[512];
	int length = snprintf(text, sizeof text, "%s\n", line);
	if (length < (int)sizeof text && write_over(path, text, (size_t)length, mode))
		return;
	/* Some images make these a link to somewhere that does not exist yet. */
	unlink(path);
	if (length >= (int)sizeof text || !write_file(path, text, (size_t)length, mode))
		dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", path, strerror(errno));
}

static char *read_file(const char *path, size_t *length)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat facts = {0};
	*length = 0;
	if (fd >= 0 && fstat(fd, &facts) != 0)
		facts.st_size = 0;
	size_t size = facts.st_size > FILE_MAX_BYTES ? FILE_MAX_BYTES : (size_t)facts.st_size;
	char *text = must_have(malloc(size + 1));
	ssize_t got = fd < 0 ? 0 : read(fd, text, size);
	*length = got > 0 ? (size_t)got : 0;
	text[*length] = '\0';
	if (fd >= 0)
		close(fd);
	return text;
}

/* --- clock, names, randomness --- */

void identity_set_clock(const char *data, size_t length)
{
	long long now_ns = records_number(data, length, "clock_ns", -1);
	struct timespec now = {.tv_sec = now_ns / 1000000000, .tv_nsec = now_ns % 1000000000};
	if (now_ns > 0 && clock_settime(CLOCK_REALTIME, &now) != 0)
		dprintf(STDERR_FILENO, "carrel-agent: clock: %s\n", strerror(errno));
}

static void set_boot_id(const char *boot_id)
{
	struct stat facts;
	bool is_bound = stat(AGENT_RUN "/boot_id", &facts) == 0;
	char text[64];
	int length = snprintf(text, sizeof text, "%s\n", boot_id);
	/* Written in place, so that a file that is bound already shows the new one. */
	if (length >= (int)sizeof text || !write_file(AGENT_RUN "/boot_id", text, (size_t)length, 0444))
		return;
	if (!is_bound && mount(AGENT_RUN "/boot_id", BOOT_ID, NULL, MS_BIND, NULL) != 0)
		dprintf(STDERR_FILENO, "carrel-agent: boot_id: %s\n", strerror(errno));
}

static void add_entropy(const char *hex)
{
	struct {
		struct rand_pool_info head;
		unsigned char bytes[ENTROPY_MAX_BYTES];
	} pool = {0};
	unsigned char *bytes = (unsigned char *)pool.head.buf;
	int count = 0;
	unsigned byte = 0;
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	while (count < ENTROPY_MAX_BYTES && sscanf(hex + 2 * count, "%2x", &byte) == 1)
		bytes[count++] = (unsigned char)byte;
	pool.head.entropy_count = 8 * count;
	pool.head.buf_size = count;
	if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG) != 0)
		dprintf(STDERR_FILENO, "carrel-agent: entropy: %s\n", strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* --- people --- */

/* Field `index` of a colon-separated line. */
static void field(const char *line, size_t length, int index, const char **value, size_t *value_length)
{
	const char *end = line + length;
	for (; index > 0 && line < end; index--) {
		const char *colon = memchr(line, ':', (size_t)(end - line));
		line = colon == NULL ? end : colon + 1;
	}
	const char *colon = memchr(line, ':', (size_t)(end - line));
	*value = line;
	*value_length = (size_t)((colon == NULL ? end : colon) - line);
}

static bool same_field(const char *line, size_t length, const char *other, int index)
{
	const char *a;
	const char *b;
	size_t a_length;
	size_t b_length;
	field(line, length, index, &a, &a_length);
	field(other, strlen(other), index, &b, &b_length);
	return a_length == b_length && memcmp(a, b, a_length) == 0;
}

/* Name or number of the line is that of an entry which the host has sent. */
static bool is_replaced(struct asked asked, const char *key, const char *line, size_t length)
{
	const char *cursor = NULL;
	const char *entry;
	while ((entry = records_next(asked.data, asked.length, key, &cursor)) != NULL)
		if (same_field(line, length, entry, 0) || same_field(line, length, entry, 2))
			return true;
	return false;
}

static bool replace_entries(struct asked asked, const char *key, const char *path)
{
	size_t length;
	size_t used = 0;
	const char *cursor = NULL;
	const char *entry;
	char temporary[64];
	if (get(asked, key) == NULL)
		return true;
	char *old = read_file(path, &length);
	char *text = must_have(malloc(length + asked.length + 2));
	for (const char *line = old; line < old + length;) {
		size_t line_length = strcspn(line, "\n");
		if (line_length > 0 && !is_replaced(asked, key, line, line_length)) {
			memcpy(text + used, line, line_length);
			used += line_length;
			text[used++] = '\n';
		}
		line += line_length + 1;
	}
	while ((entry = records_next(asked.data, asked.length, key, &cursor)) != NULL)
		used += (size_t)sprintf(text + used, "%s\n", entry);
	snprintf(temporary, sizeof temporary, "%s.carrel", path);
	bool done = write_over(path, text, used, 0644) ||
		    (write_file(temporary, text, used, 0644) && rename(temporary, path) == 0);
	free(old);
	free(text);
	return done;
}

static void add_hosts(struct asked asked, const char *host_name)
{
	size_t length;
	const char *cursor = NULL;
	const char *line;
	char *old = read_file("/etc/hosts", &length);
	FILE *hosts = fopen("/etc/hosts", "ae");
	if (hosts != NULL) {
		if (length > 0 && old[length - 1] != '\n')
			fputc('\n', hosts);
		if (strstr(old, "localhost") == NULL)
			fputs("127.0.0.1 localhost\n", hosts);
		while ((line = records_next(asked.data, asked.length, "hosts", &cursor)) != NULL)
			if (strstr(old, line) == NULL)
				fprintf(hosts, "%s\n", line);
		/* A name that nothing resolves makes sudo, hostname -f and mpirun wait or fail. */
		if (host_name != NULL && get(asked, "hosts") == NULL && strstr(old, host_name) == NULL)
			fprintf(hosts, "127.0.1.1 %s\n", host_name);
		fclose(hosts);
	}
	free(old);
}

/* --- directories --- */

static bool stage_is_mounted(void)
{
	static bool mounted;
	if (!mounted && make_directories(AGENT_STAGE, 0700))
		/* One attach, and this kernel checks permissions by the owner, group and mode that the host shows:
		 * they are right by themselves, since users have the same numbers on both sides. */
		mounted = mount("carrel", AGENT_STAGE, "9p", MS_NODEV | MS_NOSUID,
				"trans=virtio,version=9p2000.L,msize=262144,cache=mmap,access=client") == 0;
	return mounted;
}

static bool make_target(const char *source, const char *target)
{
	struct stat facts;
	char parent[PATH_MAX];
	if (stat(source, &facts) != 0)
		return false;
	if (S_ISDIR(facts.st_mode))
		return make_directories(target, 0755);
	snprintf(parent, sizeof parent, "%s", target);
	*strrchr(parent, '/') = '\0';
	if (parent[0] != '\0' && !make_directories(parent, 0755))
		return false;
	int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

/* `<index>:<ro|rw>:<target>` */
static bool bind_one(const char *wish, char *text, size_t text_size)
{
	char source[128];
	char mode[4] = "";
	int index = 0;
	int path_at = 0;
	if (sscanf(wish, "%d:%3[a-z]:%n", &index, mode, &path_at) != 2 || path_at == 0 || wish[path_at] != '/') {
		snprintf(text, text_size, "mount '%.200s' is not INDEX:ro|rw:/PATH", wish);
		return false;
	}
	const char *target = wish + path_at;
	snprintf(source, sizeof source, AGENT_STAGE "/%d", index);
	if (!make_target(source, target) || mount(source, target, NULL, MS_BIND, NULL) != 0) {
		snprintf(text, text_size, "cannot mount on %.200s in the guest: %s", target, strerror(errno));
		return false;
	}
	unsigned long flags = MS_BIND | MS_REMOUNT | MS_NODEV | MS_NOSUID;
	if (strcmp(mode, "ro") == 0 && mount(NULL, target, NULL, flags | MS_RDONLY, NULL) != 0) {
		snprintf(text, text_size, "cannot make %.200s read-only in the guest: %s", target, strerror(errno));
		return false;
	}
	return true;
}

static bool bind_all(struct asked asked, char *text, size_t text_size)
{
	static char *done[MOUNTS_MAX];
	const char *cursor = NULL;
	const char *wish;
	while ((wish = records_next(asked.data, asked.length, "mount", &cursor)) != NULL) {
		size_t i = 0;
		while (i < MOUNTS_MAX && done[i] != NULL && strcmp(done[i], wish) != 0)
			i++;
		if (i < MOUNTS_MAX && done[i] != NULL)
			continue;
		if (i == MOUNTS_MAX) {
			snprintf(text, text_size, "more than %d mounts in one guest", MOUNTS_MAX);
			return false;
		}
		if (!stage_is_mounted()) {
			snprintf(text, text_size, "the guest cannot mount the host's directories: %s", strerror(errno));
			return false;
		}
		if (!bind_one(wish, text, text_size))
			return false;
		done[i] = must_have(strdup(wish));
	}
	return true;
}

static void make_scratch(struct asked asked)
{
	const char *cursor = NULL;
	const char *path;
	while ((path = records_next(asked.data, asked.length, "scratch", &cursor)) != NULL)
		if (!make_directories(path, 01777) || chmod(path, 01777) != 0)
			dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", path, strerror(errno));
}

static void make_home(struct asked asked)
{
	const char *home = get(asked, "home");
	struct stat facts;
	uid_t uid = (uid_t)records_number(asked.data, asked.length, "uid", 0);
	gid_t gid = (gid_t)records_number(asked.data, asked.length, "gid", 0);
	if (home == NULL || home[0] != '/' || stat(home, &facts) == 0)
		return;
	if (!make_directories(home, 0700) || chown(home, uid, gid) != 0)
		dprintf(STDERR_FILENO, "carrel-agent: home %s: %s\n", home, strerror(errno));
}

static void link_calls(const char *directory)
{
	char path[PATH_MAX];
	char target[64];
	char now[64];
	if (directory[0] != '/' || strcmp(directory, AGENT_BIN) == 0 || !make_directories(directory, 0755))
		return;
	for (size_t i = 0; i < CALLS_COUNT; i++) {
		snprintf(path, sizeof path, "%s/%s", directory, CALLS[i]);
		snprintf(target, sizeof target, AGENT_BIN "/%s", CALLS[i]);
		ssize_t length = readlink(path, now, sizeof now);
		if (length == (ssize_t)strlen(target) && memcmp(now, target, (size_t)length) == 0)
			continue;
		/* An image's own srun could reach no controller: the guest has no munge key. */
		unlink(path);
		if (symlink(target, path) != 0)
			dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", path, strerror(errno));
	}
}

bool identity_apply(const char *data, size_t length, char *text, size_t text_size)
{
	struct asked asked = {data, length};
	const char *value;
	const char *host_name = get(asked, "host_name");
	identity_set_clock(data, length);
	if ((value = get(asked, "entropy")) != NULL)
		add_entropy(value);
	if (access("/bin/sh", X_OK) != 0) {
		snprintf(text, text_size, "image has no /bin/sh, so no command can run in it");
		return false;
	}
	if (host_name != NULL) {
		if (sethostname(host_name, strlen(host_name)) != 0)
			dprintf(STDERR_FILENO, "carrel-agent: host name: %s\n", strerror(errno));
		write_line("/etc/hostname", host_name, 0644);
	}
	if ((value = get(asked, "machine_id")) != NULL)
		write_line("/etc/machine-id", value, 0444);
	if ((value = get(asked, "boot_id")) != NULL)
		set_boot_id(value);
	if (!replace_entries(asked, "passwd", "/etc/passwd") || !replace_entries(asked, "group", "/etc/group")) {
		snprintf(text, text_size, "cannot add the job's user to /etc/passwd and /etc/group: %s", strerror(errno));
		return false;
	}
	add_hosts(asked, host_name);
	if (!bind_all(asked, text, text_size))
		return false;
	make_scratch(asked);
	make_home(asked);
	link_calls("/usr/bin");
	link_calls((value = get(asked, "slurm_bin")) != NULL ? value : "/usr/bin");
	return true;
}
