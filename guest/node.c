#define _GNU_SOURCE
#include "node.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

enum { RETRY_MS = 100, CONNECT_TIMEOUT_MS = 5000, ASKS_MAX = 20 };

static int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int node_watch_signals(void)
{
	/* Only these end a wait; USR1 and its like stay pending until there is a command to get them. */
	sigset_t fatal;
	sigemptyset(&fatal);
	sigaddset(&fatal, SIGTERM);
	sigaddset(&fatal, SIGINT);
	sigaddset(&fatal, SIGHUP);
	sigaddset(&fatal, SIGQUIT);
	return signalfd(-1, &fatal, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* What ends this process while it waits. */
struct ends {
	int signals;
	int parent; /* pidfd, or -1 */
};

static void wait_for(int fd, const struct ends *ends, int timeout_ms)
{
	struct pollfd set[3] = {
		{.fd = ends->signals, .events = POLLIN},
		{.fd = ends->parent, .events = POLLIN},
		{.fd = fd, .events = POLLIN},
	};
	struct signalfd_siginfo info;
	poll(set, 3, timeout_ms);
	if (set[0].revents != 0 && read(ends->signals, &info, sizeof info) == (ssize_t)sizeof info)
		client_die_by((int)info.ssi_signo);
	if (set[1].revents != 0)
		_exit(1);
}

/* carreld may be starting again just now, so one refusal to connect is not yet an answer. */
static int connect_to(const char *path, const struct ends *ends)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int64_t until = now_ms() + CONNECT_TIMEOUT_MS;
	if (strlen(path) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	for (;;) {
		int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address) == 0)
			return sock;
		int why = errno;
		close(sock);
		errno = why;
		if ((why != ECONNREFUSED && why != ENOENT && why != EAGAIN) || now_ms() >= until)
			return -1;
		wait_for(-1, ends, RETRY_MS);
	}
}

static void explain(struct answer *answer, const char *path, const char *reason)
{
	if (asprintf(&answer->sentence, "carreld does not answer on %s: %s; see: carrel node check", path, reason) < 0)
		must_have(NULL);
}

/* False: the connection ended without an answer. */
static bool read_answer(struct answer *answer, struct wire_reader *reader, const struct ends *ends,
			int64_t until)
{
	for (;;) {
		enum wire_state state = wire_read(reader, answer->connection);
		if (state == WIRE_CLOSED)
			return false;
		if (state == WIRE_MORE) {
			int64_t left = until - now_ms();
			if (left <= 0)
				return false;
			wait_for(answer->connection, ends, (int)left);
			continue;
		}
		const char *status = records_get(reader->body, reader->length, "status");
		if (status != NULL && strcmp(status, "wait") == 0)
			continue;
		answer->body = reader->body;
		answer->length = reader->length;
		answer->stream = reader->fd;
		reader->body = NULL;
		reader->fd = -1;
		if (status != NULL && strcmp(status, "ok") == 0 && answer->stream >= 0)
			return true;
		const char *text = records_get(answer->body, answer->length, "text");
		answer->sentence = must_have(strdup(text != NULL ? text : "carreld refused and gave no reason"));
		return true;
	}
}

struct answer node_ask(const char *path, const struct records *question, int wait_s, int parent)
{
	struct answer answer = {.connection = -1, .stream = -1};
	struct ends ends = {.signals = node_watch_signals(), .parent = parent};
	int64_t until = now_ms() + (int64_t)wait_s * 1000;
	for (int i = 0; i < ASKS_MAX && now_ms() < until; i++) {
		struct wire_reader reader;
		wire_reader_init(&reader);
		answer.connection = connect_to(path, &ends);
		if (answer.connection < 0)
			break;
		errno = 0;
		bool answered = wire_send(answer.connection, question) &&
				read_answer(&answer, &reader, &ends, until);
		free(reader.body);
		if (reader.fd >= 0)
			close(reader.fd);
		if (answered) {
			close(ends.signals);
			return answer;
		}
		/* It ended before it answered: a carreld that is started again answers the same question. */
		close(answer.connection);
		answer.connection = -1;
		wait_for(-1, &ends, RETRY_MS);
	}
	explain(&answer, path, errno != 0 ? strerror(errno) : "it ended the conversation");
	close(ends.signals);
	return answer;
}
