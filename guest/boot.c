/* From a bare kernel to a machine that programs expect: modules, the image as root, the usual file systems. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "calls.h"

enum { ROOT_TIMEOUT_MS = 10000, ROOT_POLL_MS = 5, AGENT_MAX_BYTES = 64 << 20 };

static char fault[512];

static void open_console(void)
{
	int console = open("/dev/console", O_RDWR | O_NOCTTY);
	if (console < 0)
		console = open("/dev/null", O_RDWR);
	for (int fd = 0; console >= 0 && fd < 3; fd++)
		if (console != fd)
			dup2(console, fd);
	if (console > 2)
		close(console);
}

static void load_modules(void)
{
	char name[128];
	char path[160];
	FILE *order = fopen("/modules/order", "re");
	while (order != NULL && fgets(name, sizeof name, order) != NULL) {
		name[strcspn(name, "\n")] = '\0';
		if (name[0] == '\0' || name[0] == '#')
			continue;
		snprintf(path, sizeof path, "/modules/%s", name);
		int module = open(path, O_RDONLY | O_CLOEXEC);
		if (module < 0 || (syscall(SYS_finit_module, module, "", 0) != 0 && errno != EEXIST))
			dprintf(STDERR_FILENO, "carrel-agent: module %s: %s\n", name, strerror(errno));
		if (module >= 0)
			close(module);
		/* The initramfs stays in memory for ever, in every clone. */
		unlink(path);
	}
	if (order != NULL)
		fclose(order);
}

/* Value of a word NAME=value on the kernel's command line. The kernel keeps names with a dot to itself. */
static bool kernel_argument(const char *name, char *value, size_t size)
{
	char line[4096];
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
	char *rest = line;
	const char *word;
	if (fd >= 0)
		close(fd);
	line[got > 0 ? got : 0] = '\0';
	while ((word = strsep(&rest, " \n")) != NULL)
		if (strncmp(word, name, strlen(name)) == 0 && word[strlen(name)] == '=') {
			snprintf(value, size, "%s", word + strlen(name) + 1);
			return true;
		}
	return false;
}

static bool wait_for_device(const char *path)
{
	struct stat facts;
	struct timespec pause = {.tv_nsec = ROOT_POLL_MS * 1000000L};
	for (int waited = 0; waited < ROOT_TIMEOUT_MS; waited += ROOT_POLL_MS) {
		if (stat(path, &facts) == 0)
			return true;
		nanosleep(&pause, NULL);
	}
	return false;
}

static const char *enter_root(const char *device, const char *type)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys"};
	char target[64];
	mkdir("/root", 0755);
	if (!wait_for_device(device)) {
		snprintf(fault, sizeof fault, "the guest has no root disk %.100s after %d s", device,
			 ROOT_TIMEOUT_MS / 1000);
		return fault;
	}
	/* The disk dies with the job: nothing need be written out because a file was replaced. */
	const char *options = strcmp(type, "ext4") == 0 ? "noauto_da_alloc" : NULL;
	if (mount(device, "/root", type, 0, options) != 0) {
		snprintf(fault, sizeof fault, "cannot mount %.100s as %.20s: %s; is the image a file system of that type?",
			 device, type, strerror(errno));
		return fault;
	}
	for (size_t i = 0; i < sizeof moved / sizeof moved[0]; i++) {
		snprintf(target, sizeof target, "/root%s", moved[i]);
		mkdir(target, 0755);
		if (mount(moved[i], target, NULL, MS_MOVE, NULL) != 0)
			return "the image's root has no place for /dev, /proc or /sys";
	}
	if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
		return "the image's root cannot become the root of the guest";
	return NULL;
}

static void mount_or_say(const char *type, const char *target, mode_t mode, unsigned long flags, const char *options)
{
	mkdir(target, mode);
	if (mount(type, target, type, flags, options) != 0)
		dprintf(STDERR_FILENO, "carrel-agent: mount %s on %s: %s\n", type, target, strerror(errno));
}

static void link_descriptors(void)
{
	const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
					{"/proc/self/fd/0", "/dev/stdin"},
					{"/proc/self/fd/1", "/dev/stdout"},
					{"/proc/self/fd/2", "/dev/stderr"}};
	for (size_t i = 0; i < sizeof links / sizeof links[0]; i++)
		if (symlink(links[i][0], links[i][1]) != 0 && errno != EEXIST)
			dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", links[i][1], strerror(errno));
}

static void mount_the_usual(void)
{
	mount_or_say("devpts", "/dev/pts", 0755, MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_or_say("tmpfs", "/dev/shm", 01777, MS_NOSUID | MS_NODEV, "mode=1777");
	mount_or_say("tmpfs", "/run", 0755, MS_NOSUID | MS_NODEV, "mode=0755");
	mount_or_say("cgroup2", "/sys/fs/cgroup", 0755, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	link_descriptors();
	make_directories("/tmp", 01777);
	make_directories("/run/lock", 01777);
}

static void raise_loopback(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return;
	if (ioctl(sock, SIOCGIFFLAGS, &request) == 0) {
		request.ifr_flags = (short)(request.ifr_flags | IFF_UP);
		ioctl(sock, SIOCSIFFLAGS, &request);
	}
	close(sock);
}

/* The stand-ins for Slurm's commands are this very program, which the image does not hold. */
static void install_calls(int self)
{
	char path[64];
	make_directories(AGENT_BIN, 0755);
	int copy = open(AGENT_BIN "/carrel-agent", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
	if (copy >= 0) {
		while (sendfile(copy, self, NULL, AGENT_MAX_BYTES) > 0)
			continue;
		close(copy);
	}
	for (size_t i = 0; i < CALLS_COUNT; i++) {
		snprintf(path, sizeof path, AGENT_BIN "/%s", CALLS[i]);
		unlink(path);
		if (symlink("carrel-agent", path) != 0)
			dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", path, strerror(errno));
	}
}

static void survive_memory_shortage(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "-1000", 5) != 5)
		dprintf(STDERR_FILENO, "carrel-agent: oom_score_adj: %s\n", strerror(errno));
	close(fd);
}

const char *boot_machine(void)
{
	char device[128];
	char type[32];
	const char *why = NULL;
	umask(0);
	mount_or_say("devtmpfs", "/dev", 0755, MS_NOSUID, "mode=0755");
	open_console();
	mount_or_say("proc", "/proc", 0555, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_or_say("sysfs", "/sys", 0555, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	load_modules();
	survive_memory_shortage();
	int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	if (!kernel_argument("carrel.fstype", type, sizeof type))
		strcpy(type, "ext4");
	if (kernel_argument("carrel.root", device, sizeof device))
		why = enter_root(device, type);
	mount_the_usual();
	raise_loopback();
	install_calls(self);
	close(self);
	umask(022);
	return why;
}
