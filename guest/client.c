#define _GNU_SOURCE
#include "client.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { START_TIMEOUT_S = 60 };

static struct termios saved_terminal;
static bool terminal_is_raw;

void client_block_signals(void)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
}

int client_watch_parent(void)
{
	return (int)syscall(SYS_pidfd_open, getppid(), 0);
}

bool client_stdio_is_pty(void)
{
	return isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
}

static void make_terminal_raw(void)
{
	struct termios raw;
	if (tcgetattr(STDIN_FILENO, &saved_terminal) != 0)
		return;
	raw = saved_terminal;
	cfmakeraw(&raw);
	terminal_is_raw = tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
}

void client_restore_terminal(struct client *client)
{
	if (client->is_pty && terminal_is_raw)
		tcsetattr(STDIN_FILENO, TCSADRAIN, &saved_terminal);
	terminal_is_raw = false;
}

void client_describe(struct records *start, bool is_pty)
{
	char cwd[PATH_MAX];
	mode_t mask = umask(0);
	umask(mask);
	records_add(start, "umask", "%u", mask);
	if (getcwd(cwd, sizeof cwd) != NULL)
		records_add(start, "cwd", "%s", cwd);
	for (int i = 0; i < (int)RLIM_NLIMITS; i++) {
		struct rlimit limit;
		if (getrlimit((__rlimit_resource_t)i, &limit) == 0)
			records_add(start, "rlimit", "%d:%llu:%llu", i, (unsigned long long)limit.rlim_cur,
				    (unsigned long long)limit.rlim_max);
	}
	struct winsize size = {0};
	if (!is_pty || ioctl(STDIN_FILENO, TIOCGWINSZ, &size) != 0)
		return;
	records_add(start, "flag", "pty");
	records_add(start, "rows", "%u", size.ws_row);
	records_add(start, "cols", "%u", size.ws_col);
}

static bool take_exit(struct client *client, const char *payload, uint32_t length)
{
	uint32_t end[2] = {0};
	if (length != sizeof end[0] && length != sizeof end)
		return false;
	memcpy(end, payload, length);
	client->status = (int)le32toh(end[0]);
	client->oom_kills = le32toh(end[1]);
	client->ended = true;
	return true;
}

static bool take_frame(struct relay *relay, enum frame_type type, uint8_t channel, const char *payload,
		       uint32_t length)
{
	struct client *client = relay->owner;
	(void)channel;
	if (type == FRAME_EXIT)
		return take_exit(client, payload, length);
	if (type == FRAME_ERROR && client->sentence == NULL) {
		client->sentence = must_have(strndup(payload, length));
		relay->gone = true;
		return true;
	}
	if (type == FRAME_RELAY && client->on_call != NULL && length > 0 && length < 64) {
		char id[64];
		memcpy(id, payload, length);
		id[length] = '\0';
		client->on_call(client, id);
		return true;
	}
	return false;
}

void client_init(struct client *client, int fd)
{
	sigset_t all;
	sigfillset(&all);
	client->signals = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
	relay_init(&client->relay, fd, take_frame, client);
}

bool client_start(struct client *client, const struct records *start)
{
	if (!relay_send_start(&client->relay, start->data, start->used, START_TIMEOUT_S))
		return false;
	if (client->is_pty)
		make_terminal_raw();
	relay_source(&client->relay, CHANNEL_STDIN, STDIN_FILENO);
	relay_sink(&client->relay, CHANNEL_STDOUT, STDOUT_FILENO, SINK_FOREIGN);
	relay_sink(&client->relay, CHANNEL_STDERR, STDERR_FILENO, SINK_FOREIGN);
	return true;
}

static void send_winsize(struct client *client)
{
	struct winsize size;
	if (!client->is_pty || ioctl(STDIN_FILENO, TIOCGWINSZ, &size) != 0)
		return;
	uint16_t sides[2] = {htole16(size.ws_row), htole16(size.ws_col)};
	relay_send(&client->relay, FRAME_WINSIZE, 0, sides, sizeof sides);
}

static void forward_signal(struct client *client, int number)
{
	/* scancel -b reaches the script's shell alone, everything else every process of the step; which one it was
	 * cannot be told from here. Scripts trap USR1, USR2 and real-time signals, their commands do not. */
	bool leader_only = client->is_stub ||
			   (client->is_batch && (number == SIGUSR1 || number == SIGUSR2 || number >= SIGRTMIN));
	relay_send_number(&client->relay, FRAME_SIGNAL, leader_only ? SIGNAL_LEADER : SIGNAL_ALL, (uint32_t)number);
}

static void take_signals(struct client *client)
{
	struct signalfd_siginfo info;
	while (relay_has_room(&client->relay) && read(client->signals, &info, sizeof info) == (ssize_t)sizeof info) {
		int number = (int)info.ssi_signo;
		if (number == SIGCHLD && client->on_child != NULL)
			client->on_child(client);
		else if (number == SIGWINCH)
			send_winsize(client);
		else if (number == SIGCHLD || (number == SIGPIPE && (pid_t)info.ssi_pid == getpid()))
			continue; /* our own writing, answered by BROKEN */
		else if (client->is_stub && number == SIGTSTP)
			kill(getpid(), SIGSTOP);
		else
			forward_signal(client, number);
	}
}

static bool is_over(const struct client *client)
{
	return (client->ended || client->relay.gone) && relay_is_delivered(&client->relay);
}

void client_relay(struct client *client)
{
	struct pollfd set[RELAY_POLL_MAX + 2 + CLIENT_POLL_MAX];
	while (!is_over(client)) {
		if (client->ended) /* nothing is read on behalf of the dead */
			relay_close_source(&client->relay, CHANNEL_STDIN);
		size_t count = relay_poll_set(&client->relay, set);
		size_t signals = count++;
		bool room = relay_has_room(&client->relay);
		set[signals] = (struct pollfd){.fd = room ? client->signals : -1, .events = POLLIN};
		size_t parent = count++;
		set[parent] = (struct pollfd){.fd = client->parent, .events = POLLIN};
		size_t more = client->more_polls == NULL ? 0 : client->more_polls(client, set + count);
		while (more > 0 && set[count + more - 1].fd < 0)
			more--; /* poll refuses more entries than the task may open files */
		poll(set, count + more, -1);
		if (set[parent].revents != 0)
			_exit(1); /* nobody is left to hear of an end, and the task must not outlive its step */
		if (set[signals].revents != 0)
			take_signals(client);
		relay_turn(&client->relay, set);
		if (more > 0)
			client->take_polls(client, set + count, more);
	}
}

void client_die_by(int signal_number)
{
	struct rlimit no_core = {0, 0};
	struct sigaction as_ever = {.sa_handler = SIG_DFL};
	sigset_t one;
	/* The command's core, if any, is in the guest; ours would only mislead. */
	setrlimit(RLIMIT_CORE, &no_core);
	prctl(PR_SET_DUMPABLE, 0);
	sigaction(signal_number, &as_ever, NULL);
	sigemptyset(&one);
	sigaddset(&one, signal_number);
	kill(getpid(), signal_number);
	sigprocmask(SIG_UNBLOCK, &one, NULL);
	_exit(128 + signal_number);
}

void client_end_as(int status)
{
	if (WIFSIGNALED(status))
		client_die_by(WTERMSIG(status));
	_exit(WEXITSTATUS(status));
}
