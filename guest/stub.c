/* A Slurm command inside a guest: the host's command runs for it, as a child of the calling step. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"
#include "client.h"

enum { STREAM_WAIT_MS = 30000, SENTENCE_BYTES = 1024 };

extern char **environ;

__attribute__((noreturn)) static void give_up(const char *name, const char *sentence)
{
	dprintf(STDERR_FILENO, "%s: error: carrel: %s\n", name, sentence);
	_exit(1);
}

static int connect_to_agent(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = AGENT_CALLS_SOCKET};
	const char *elsewhere = getenv("CARREL_AGENT_SOCKET");
	if (elsewhere != NULL && strlen(elsewhere) < sizeof address.sun_path)
		strcpy(address.sun_path, elsewhere);
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (sock >= 0 && connect(sock, (struct sockaddr *)&address, sizeof address) == 0)
		return sock;
	return -1;
}

/* The stream to the host, or -1 and a sentence. */
static int receive_stream(int sock, char *sentence)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {.iov_base = sentence, .iov_len = SENTENCE_BYTES - 1};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct pollfd answer = {.fd = sock, .events = POLLIN};
	int stream = -1;
	ssize_t got = poll(&answer, 1, STREAM_WAIT_MS) > 0 ? recvmsg(sock, &message, MSG_CMSG_CLOEXEC) : -1;
	if (got <= 0) {
		snprintf(sentence, SENTENCE_BYTES, "no answer from the host within %d s", STREAM_WAIT_MS / 1000);
		return -1;
	}
	sentence[got] = '\0';
	const struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	if (head != NULL && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
		memcpy(&stream, CMSG_DATA(head), sizeof stream);
	return stream;
}

static struct records describe(const char *name, int argc, char **argv, bool is_pty)
{
	struct records start = {0};
	client_describe(&start, is_pty);
	records_add(&start, "uid", "%u", getuid());
	records_add(&start, "gid", "%u", getgid());
	records_add(&start, "argv", "%s", name);
	for (int i = 1; i < argc; i++)
		records_add(&start, "argv", "%s", argv[i]);
	for (char **entry = environ; *entry != NULL; entry++)
		records_add(&start, "env", "%s", *entry);
	return start;
}

int call_host(const char *name, int argc, char **argv)
{
	struct client client = {.is_stub = true, .parent = -1};
	char sentence[SENTENCE_BYTES];
	int sock = connect_to_agent();
	if (sock < 0)
		give_up(name, "the agent of this guest does not answer");
	int stream = receive_stream(sock, sentence);
	if (stream < 0)
		give_up(name, sentence);
	/* Until there is a stream, signals end this process as they would any other. */
	client_block_signals();
	client.is_pty = client_stdio_is_pty();
	fcntl(stream, F_SETFL, fcntl(stream, F_GETFL) | O_NONBLOCK);
	client_init(&client, stream);
	struct records start = describe(name, argc, argv, client.is_pty);
	if (client_start(&client, &start))
		client_relay(&client);
	records_free(&start);
	client_restore_terminal(&client);
	if (client.ended)
		client_end_as(client.status);
	give_up(name, client.sentence != NULL ? client.sentence : "the host ended the stream before the command ended");
}
