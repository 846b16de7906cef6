#define _GNU_SOURCE
#include "session.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "wire.h"

enum { UPLINK_MAX_BYTES = 1024 };

static void end_with(struct session *session, const char *sentence)
{
	relay_send(&session->relay, FRAME_ERROR, 0, sentence, strlen(sentence));
	session->exit_sent = true;
}

static void start(struct session *session)
{
	if (!command_parse(&session->command, session->start, session->start_used)) {
		end_with(session, "the request to start a command cannot be read");
		return;
	}
	const char *refusal = session->check == NULL ? NULL : session->check(&session->command);
	if (refusal == NULL)
		refusal = session_spawn(session);
	if (refusal != NULL)
		end_with(session, refusal);
}

static bool take_start(struct session *session, bool more, const char *payload, uint32_t length)
{
	if (session->leader > 0 || session->start_used + length > START_MAX_BYTES)
		return false;
	session->start = must_have(realloc(session->start, session->start_used + length + 1));
	memcpy(session->start + session->start_used, payload, length);
	session->start_used += length;
	if (!more)
		start(session);
	return true;
}

static bool take_signal(struct session *session, bool leader_only, const char *payload, uint32_t length)
{
	uint32_t number = 0;
	if (length != sizeof number)
		return false;
	memcpy(&number, payload, sizeof number);
	number = le32toh(number);
	if (number == 0 || number >= NSIG)
		return false;
	session_signal(session, (int)number, !leader_only);
	return true;
}

static bool take_winsize(struct session *session, const char *payload, uint32_t length)
{
	uint16_t sides[2];
	if (length != sizeof sides)
		return false;
	memcpy(sides, payload, sizeof sides);
	struct winsize size = {.ws_row = le16toh(sides[0]), .ws_col = le16toh(sides[1])};
	int master = session->relay.channels[CHANNEL_STDOUT].source;
	if (session->command.is_pty && master >= 0) {
		ioctl(master, TIOCSWINSZ, &size);
		/* The terminal tells its foreground group alone; slurmstepd tells the task as well, whoever has it. */
		session_signal(session, SIGWINCH, false);
	}
	return true;
}

static bool take_frame(struct relay *relay, enum frame_type type, uint8_t channel, const char *payload,
		       uint32_t length)
{
	struct session *session = relay->owner;
	switch ((int)type) {
	case FRAME_START:
		return take_start(session, channel != 0, payload, length);
	case FRAME_SIGNAL:
		return take_signal(session, channel == SIGNAL_LEADER, payload, length);
	case FRAME_WINSIZE:
		return take_winsize(session, payload, length);
	case FRAME_REFUSED:
		return session->uplink >= 0 && length <= UPLINK_MAX_BYTES &&
		       send(session->uplink, payload, length, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
	default:
		return false;
	}
}

static void leader_ends(struct session *session, int status)
{
	session->leader_ended = true;
	session->status = status;
	for (unsigned i = CHANNEL_STDOUT; i <= CHANNEL_STDERR; i++)
		relay_drain(&session->relay, i, session->command.is_pty);
}

static void reap(struct session *session)
{
	struct signalfd_siginfo info;
	int status = 0;
	pid_t pid;
	while (read(session->signals, &info, sizeof info) == (ssize_t)sizeof info)
		/* carrel-enter ends the runner of a call whose caller is gone. */
		if (info.ssi_signo == SIGTERM)
			session->relay.gone = true;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == session->leader)
			leader_ends(session, status);
}

static void pass_call(struct session *session)
{
	char id[UPLINK_MAX_BYTES];
	ssize_t got = recv(session->uplink, id, sizeof id, MSG_DONTWAIT);
	if (got > 0)
		relay_send(&session->relay, FRAME_RELAY, 0, id, (size_t)got);
	else if (got == 0 || errno != EAGAIN) {
		close(session->uplink);
		session->uplink = -1;
	}
}

static void send_exit(struct session *session)
{
	uint32_t end[] = {htole32((uint32_t)session->status), htole32(session_oom_kills(session))};
	relay_send(&session->relay, FRAME_EXIT, 0, end, end[1] == 0 ? sizeof end[0] : sizeof end);
	session->exit_sent = true;
}

static bool all_is_read(const struct session *session)
{
	for (unsigned i = CHANNEL_STDOUT; i <= CHANNEL_STDERR; i++)
		if (session->relay.channels[i].source >= 0)
			return false;
	return true;
}

static void turn(struct session *session)
{
	struct pollfd set[RELAY_POLL_MAX + 2];
	size_t count = relay_poll_set(&session->relay, set);
	struct pollfd *child = &set[count];
	struct pollfd *call = &set[count + 1];
	*child = (struct pollfd){.fd = session->signals, .events = POLLIN};
	/* A call is taken only when its frame has room, so a flood of them fills nothing but its own socket. */
	*call = (struct pollfd){.fd = relay_has_room(&session->relay) ? session->uplink : -1, .events = POLLIN};
	poll(set, count + 2, -1);
	if (child->revents != 0)
		reap(session);
	relay_turn(&session->relay, set);
	if (call->revents != 0)
		pass_call(session);
	if (session->leader_ended && !session->exit_sent && all_is_read(session) && relay_has_room(&session->relay)) {
		send_exit(session);
	}
}

static int watch_signals(void)
{
	sigset_t wanted;
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGCHLD);
	sigaddset(&wanted, SIGTERM);
	return signalfd(-1, &wanted, SFD_NONBLOCK | SFD_CLOEXEC);
}

/* A relay that wakes for every line of its command takes turns with it on a guest's only CPU. As batch work it waits
 * until the command rests or its pipe is full, and then carries all at once. */
static void yield_to_the_command(void)
{
	const struct sched_param any = {0};
	sched_setscheduler(0, SCHED_BATCH, &any);
}

int session_serve(int fd, int uplink, const char *name, bool is_root_of_all, command_check *check)
{
	struct session session = {.uplink = uplink, .is_root_of_all = is_root_of_all, .check = check};
	relay_init(&session.relay, fd, take_frame, &session);
	session.signals = watch_signals();
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	if (is_root_of_all) {
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		yield_to_the_command();
		session_make_cgroup(&session, name);
	}
	/* The stream is the reader's to end, here and on the host: QEMU drops what it still holds for a port that one of
	 * its sides has closed, and whoever sent EXIT cannot see how far that came. */
	while (!session.relay.gone)
		turn(&session);
	if (session.relay.fault != NULL && !session.exit_sent)
		dprintf(STDERR_FILENO, "carrel: %s: the peer sent %s\n", name, session.relay.fault);
	/* Everything of the task goes before its stream does: the host may take the stream's end for the task's. */
	session_end_all(&session);
	relay_close(&session.relay);
	command_free(&session.command);
	free(session.start);
	close(session.signals);
	return session.exit_sent ? 0 : 1;
}
