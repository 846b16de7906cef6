/* The agent's loop: ports that appear become sessions, calls from inside find the session they come from.
 *
 * Each session is a process of its own, so that one command's flood or fault never touches another's, and so that a
 * port that waits for its START has its process already. In a container there are no ports: connections to a unix
 * socket say with their first frame which port they would have been.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/close_range.h>
#include <linux/netlink.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "relay.h"
#include "readout.h"
#include "session.h"

enum { EVENTS_PER_TURN = 32, NOBODY = 65534, CALLERS_MAX = 256, NAME_MAX_BYTES = 64, UPLINK_MAX_BYTES = 1024, BACKLOG = 64 };

#define PORTS "/sys/class/virtio-ports"

enum kind { SIGNALS, UEVENTS, CONTROL, CALLS, CALLER, SESSION, CONNECTIONS, NEWCOMER };

struct watch {
	enum kind kind;
	int fd;
	struct watch *next;
	char name[NAME_MAX_BYTES];   /* of the port */
	char device[NAME_MAX_BYTES]; /* vport0p1; empty for a connection */
	pid_t pid;                   /* SESSION: its process */
	int port;                    /* SESSION, CALLER: the stream it got, kept to tell its peer of a death; -1 */
	unsigned long id;            /* CALLER */
	bool connected;              /* CONTROL: the host has it open */
	struct relay *relay;         /* CONTROL */
};

static struct watch *watches;
static int events;
static unsigned long last_id;
static const char *boot_fault;

static struct watch *watch(enum kind kind, int fd, uint32_t mask)
{
	struct watch *w = must_have(calloc(1, sizeof *w));
	*w = (struct watch){.kind = kind, .fd = fd, .port = -1, .next = watches};
	struct epoll_event event = {.events = mask, .data.ptr = w};
	epoll_ctl(events, EPOLL_CTL_ADD, fd, &event);
	watches = w;
	return w;
}

/* The watch is freed when its turn is over (sweep): events of the same turn may still point at it. */
static void unwatch(struct watch *w)
{
	if (w->fd >= 0) {
		epoll_ctl(events, EPOLL_CTL_DEL, w->fd, NULL);
		close(w->fd);
	}
	if (w->port >= 0)
		close(w->port);
	w->fd = -1;
	w->port = -1;
}

static void sweep(void)
{
	struct watch **place = &watches;
	while (*place != NULL) {
		struct watch *w = *place;
		if (w->fd >= 0 || w->pid > 0) {
			place = &w->next;
			continue;
		}
		*place = w->next;
		if (w->relay != NULL) {
			free(w->relay->in);
			free(w->relay->out);
			free(w->relay);
		}
		free(w);
	}
}

static struct watch *find_caller(unsigned long id)
{
	for (struct watch *w = watches; w != NULL; w = w->next)
		if (w->kind == CALLER && w->fd >= 0 && w->id == id)
			return w;
	return NULL;
}

/* Tells the host that whoever spoke on this port is dead; in a process of its own, since the port may be full. */
static void tell_of_death(int port)
{
	if (fork() != 0)
		return;
	relay_abort_bytes(port);
	_exit(0);
}

/* --- sessions --- */

static void keep_only(int first, int second)
{
	int a = fcntl(first, F_DUPFD_CLOEXEC, 10);
	int b = fcntl(second, F_DUPFD_CLOEXEC, 10);
	dup3(a, 3, O_CLOEXEC);
	dup3(b, 4, O_CLOEXEC);
	close_range(5, ~0U, 0);
}

static bool is_readout(const char *name)
{
	return strncmp(name, "carrel.m.", 9) == 0;
}

/* A port that was added in advance may not be open at the host yet, and poll would only say so again and again. */
static void wait_until_spoken_to(int port)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	int turns = epoll_create1(EPOLL_CLOEXEC);
	struct pollfd now = {.fd = port, .events = POLLIN};
	epoll_ctl(turns, EPOLL_CTL_ADD, port, &event);
	while (poll(&now, 1, 0) <= 0 || (now.revents & POLLIN) == 0)
		epoll_wait(turns, &event, 1, -1);
	close(turns);
}

__attribute__((noreturn)) static void be_session(int port, int uplink, const char *name, bool is_port)
{
	char own_name[NAME_MAX_BYTES];
	snprintf(own_name, sizeof own_name, "%s", name);
	keep_only(port, uplink);
	prctl(PR_SET_NAME, "carrel-session");
	if (is_port)
		wait_until_spoken_to(3);
	_exit(is_readout(own_name) ? readout_serve(3) : session_serve(3, 4, own_name, true, NULL));
}

static struct watch *add_session(int port, const char *name, bool is_port)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0)
		return NULL;
	pid_t child = fork();
	if (child == 0)
		be_session(port, pair[1], name, is_port);
	close(pair[1]);
	if (child < 0) {
		close(pair[0]);
		return NULL;
	}
	struct watch *w = watch(SESSION, pair[0], EPOLLIN);
	w->pid = child;
	w->port = port;
	snprintf(w->name, sizeof w->name, "%s", name);
	return w;
}

static void reap(int signals)
{
	struct signalfd_siginfo info;
	int status;
	pid_t pid;
	while (read(signals, &info, sizeof info) > 0)
		continue;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (struct watch *w = watches; w != NULL; w = w->next)
			if (w->kind == SESSION && w->pid == pid) {
				if (WIFSIGNALED(status))
					tell_of_death(w->port);
				w->pid = 0;
				unwatch(w);
			}
}

/* --- calls from inside --- */

static void answer_caller(struct watch *caller, const char *sentence)
{
	if (send(caller->fd, sentence, strlen(sentence), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		errno = 0; /* it is gone already */
	unwatch(caller);
}

/* Each session's process is the reaper of its orphans, so every descendant of its command stays below it. */
static struct watch *session_above(pid_t pid)
{
	for (int depth = 0; pid > 1 && depth < 4096; depth++, pid = parent_of(pid))
		for (struct watch *w = watches; w != NULL; w = w->next)
			if (w->kind == SESSION && w->pid == pid && w->fd >= 0)
				return w;
	return NULL;
}

static size_t count_callers(void)
{
	size_t count = 0;
	for (struct watch *w = watches; w != NULL; w = w->next)
		count += w->kind == CALLER && w->fd >= 0 ? 1 : 0;
	return count;
}

static void accept_caller(int listener)
{
	struct ucred peer = {0};
	socklen_t length = sizeof peer;
	char id[24];
	int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (sock < 0)
		return;
	struct watch *caller = watch(CALLER, sock, EPOLLIN | EPOLLRDHUP);
	caller->id = ++last_id;
	getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &length);
	const struct watch *session = session_above(peer.pid);
	int id_length = snprintf(id, sizeof id, "%lu", caller->id);
	if (session == NULL)
		answer_caller(caller, "this process belongs to no task of a job");
	else if (count_callers() > CALLERS_MAX)
		answer_caller(caller, "too many Slurm commands run in this guest at once");
	else if (send(session->fd, id, (size_t)id_length, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		answer_caller(caller, "the task's way to its host is full or gone");
}

static void give_stream(struct watch *caller, int port)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	char text[] = "ok";
	struct iovec part = {.iov_base = text, .iov_len = 2};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof port);
	memcpy(CMSG_DATA(head), &port, sizeof port);
	caller->port = port;
	if (sendmsg(caller->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
		tell_of_death(port);
		unwatch(caller);
	}
}

static void take_caller(struct watch *caller)
{
	char nothing[16];
	if (recv(caller->fd, nothing, sizeof nothing, MSG_DONTWAIT) > 0)
		return;
	/* It ended. Where it ended well, this is how the runner hears that everything was read. */
	if (caller->port >= 0)
		tell_of_death(caller->port);
	unwatch(caller);
}

/* A session passes on that its host refused a call: id, NUL, sentence. */
static void take_refusal(const struct watch *session)
{
	char packet[UPLINK_MAX_BYTES + 1];
	ssize_t got = recv(session->fd, packet, UPLINK_MAX_BYTES, MSG_DONTWAIT);
	if (got <= 0)
		return;
	packet[got] = '\0';
	struct watch *caller = find_caller(strtoul(packet, NULL, 10));
	const char *sentence = packet + strlen(packet) + 1;
	if (caller != NULL && caller->port < 0)
		answer_caller(caller, sentence < packet + got ? sentence : "the host refused");
}

/* --- control --- */

static void send_control(struct watch *w, struct records *records)
{
	if (relay_has_room(w->relay))
		relay_send(w->relay, FRAME_CONTROL, 0, records->data, records->used);
	records_free(records);
}

static void send_verb(struct watch *w, const char *verb, const char *text)
{
	struct records records = {0};
	records_add(&records, "verb", "%s", verb);
	if (text != NULL)
		records_add(&records, "text", "%s", text);
	send_control(w, &records);
}

static void send_hello(struct watch *w)
{
	struct records records = {0};
	struct utsname system;
	struct timespec up;
	if (boot_fault != NULL) {
		send_verb(w, "failed", boot_fault);
		return;
	}
	uname(&system);
	clock_gettime(CLOCK_BOOTTIME, &up);
	records_add(&records, "verb", "hello");
	records_add(&records, "version", "%d", CARREL_PROTOCOL_VERSION);
	records_add(&records, "kernel", "%s", system.release);
	records_add(&records, "boot_ms", "%lld", (long long)up.tv_sec * 1000 + up.tv_nsec / 1000000);
	send_control(w, &records);
}

/* Before a template is stopped: what every task needs first is then in the memory that its clones share. */
static void warm_up(void)
{
	pid_t child = fork();
	if (child == 0) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		close_range(3, ~0U, CLOSE_RANGE_CLOEXEC);
		if (setgroups(0, NULL) == 0 && setresgid(NOBODY, NOBODY, NOBODY) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0)
			execl("/bin/sh", "sh", "-c", "id >/dev/null; exit 0", NULL);
		_exit(127);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
}

static bool take_control_frame(struct relay *relay, enum frame_type type, uint8_t channel, const char *payload,
			       uint32_t length)
{
	struct watch *w = relay->owner;
	char text[600];
	(void)channel;
	const char *verb = type == FRAME_CONTROL && records_are_whole(payload, length)
				   ? records_get(payload, length, "verb")
				   : NULL;
	if (verb == NULL)
		return false;
	if (strcmp(verb, "ping") == 0)
		send_verb(w, "pong", NULL);
	else if (strcmp(verb, "hello") == 0)
		send_hello(w);
	else if (strcmp(verb, "identity") == 0 && boot_fault != NULL)
		send_verb(w, "failed", boot_fault);
	else if (strcmp(verb, "identity") == 0) {
		bool done = identity_apply(payload, length, text, sizeof text);
		send_verb(w, done ? "ready" : "failed", done ? NULL : text);
	} else if (strcmp(verb, "warm") == 0) {
		warm_up();
		send_verb(w, "warm", NULL);
	} else if (strcmp(verb, "clock") == 0)
		identity_set_clock(payload, length);
	else if (strcmp(verb, "poweroff") == 0 && getpid() == 1) {
		sync();
		reboot(RB_POWER_OFF);
	} else
		send_verb(w, "failed", "the agent does not know this verb");
	return true;
}

static void take_control(struct watch *w)
{
	struct pollfd now = {.fd = w->fd, .events = POLLIN | POLLOUT};
	poll(&now, 1, 0);
	bool was_connected = w->connected;
	bool connected = (now.revents & POLLHUP) == 0;
	/* carreld may have come back: it is greeted again. */
	if (connected && !was_connected)
		send_hello(w);
	w->connected = connected;
	relay_turn(w->relay, &(struct pollfd){.fd = w->fd, .revents = POLLIN});
	if (!w->relay->gone)
		return;
	if (w->device[0] == '\0') {
		unwatch(w);
		return;
	}
	/* What a host says may arrive before the news that it is there. That is no end, and what was answered meanwhile
	 * is still to be sent. */
	bool ended = was_connected || connected || w->relay->fault != NULL;
	w->relay->gone = false;
	w->relay->fault = NULL;
	w->connected = false;
	if (!ended)
		return;
	w->relay->in_start = w->relay->in_end = 0;
	w->relay->out_start = w->relay->out_end = 0;
}

static struct watch *add_control(int port, const char *device)
{
	struct watch *w = watch(CONTROL, port, EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP);
	w->relay = must_have(calloc(1, sizeof *w->relay));
	relay_init(w->relay, port, take_control_frame, w);
	snprintf(w->device, sizeof w->device, "%s", device);
	/* Nothing tells that a host is there already but looking. */
	take_control(w);
	return w;
}

/* --- ports and connections --- */

static void take_stream(int port, const char *name, const char *device)
{
	struct watch *w = NULL;
	if (strcmp(name, "carrel.0") == 0)
		w = add_control(port, device);
	else if (strncmp(name, "carrel.t.", 9) == 0 || is_readout(name))
		w = add_session(port, name, device[0] != '\0');
	else if (strncmp(name, "carrel.r.", 9) == 0 &&
		 (w = find_caller(strtoul(name + 9, NULL, 10))) != NULL && w->port < 0) {
		give_stream(w, port);
	} else
		w = NULL;
	if (w == NULL)
		close(port);
	else
		snprintf(w->device, sizeof w->device, "%s", device);
}

static bool is_open(const char *device)
{
	for (const struct watch *w = watches; w != NULL; w = w->next)
		if (strcmp(w->device, device) == 0 && (w->fd >= 0 || w->pid > 0))
			return true;
	return false;
}

static void open_port(const char *device)
{
	char path[160];
	char name[NAME_MAX_BYTES];
	snprintf(path, sizeof path, PORTS "/%s/name", device);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
	if (fd >= 0)
		close(fd);
	if (got <= 0 || is_open(device))
		return;
	name[got] = '\0';
	name[strcspn(name, "\n")] = '\0';
	snprintf(path, sizeof path, "/dev/%s", device);
	int port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (port >= 0)
		take_stream(port, name, device);
	else if (errno != EBUSY)
		dprintf(STDERR_FILENO, "carrel-agent: %s: %s\n", path, strerror(errno));
}

static void open_all_ports(void)
{
	DIR *ports = opendir(PORTS);
	const struct dirent *entry;
	while (ports != NULL && (entry = readdir(ports)) != NULL)
		if (entry->d_name[0] != '.' && strlen(entry->d_name) < NAME_MAX_BYTES)
			open_port(entry->d_name);
	if (ports != NULL)
		closedir(ports);
}

static void take_uevents(int sock)
{
	char event[8192];
	ssize_t got;
	while ((got = recv(sock, event, sizeof event - 1, MSG_DONTWAIT)) != 0) {
		if (got < 0 && errno == ENOBUFS) {
			/* The kernel had more to say than the socket held. */
			open_all_ports();
			continue;
		}
		if (got < 0)
			return;
		event[got] = '\0';
		/* On add@ the kernel does not find the port yet when it is opened. */
		const char *port = strstr(event, "/virtio-ports/");
		if (strncmp(event, "change@", 7) == 0 && port != NULL && strlen(port + 14) < NAME_MAX_BYTES)
			open_port(port + 14);
	}
}

/* A container has no ports: a connection's first frame names the port that it stands for. */
static void take_newcomer(struct watch *w)
{
	unsigned char frame[FRAME_HEAD_BYTES + NAME_MAX_BYTES];
	ssize_t got = recv(w->fd, frame, sizeof frame, MSG_PEEK | MSG_DONTWAIT);
	uint32_t length = 0;
	if (got < 0 && errno == EAGAIN)
		return;
	if (got >= (ssize_t)FRAME_HEAD_BYTES) {
		memcpy(&length, frame + 4, sizeof length);
		length = le32toh(length);
	}
	bool is_name = got > 0 && frame[0] == FRAME_NAME && length < NAME_MAX_BYTES;
	if (is_name && (size_t)got < FRAME_HEAD_BYTES + length)
		return;
	if (is_name && recv(w->fd, frame, FRAME_HEAD_BYTES + length, MSG_DONTWAIT) > 0) {
		int stream = fcntl(w->fd, F_DUPFD_CLOEXEC, 3);
		frame[FRAME_HEAD_BYTES + length] = '\0';
		unwatch(w);
		take_stream(stream, (const char *)frame + FRAME_HEAD_BYTES, "");
		return;
	}
	unwatch(w);
}

static int listen_on(const char *path, int type)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path)
		return -1;
	strcpy(address.sun_path, path);
	unlink(path);
	int sock = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock >= 0 && bind(sock, (struct sockaddr *)&address, sizeof address) == 0 && listen(sock, BACKLOG) == 0)
		return sock;
	dprintf(STDERR_FILENO, "carrel-agent: cannot listen on %s: %s\n", path, strerror(errno));
	return -1;
}

static int listen_to_kernel(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
	int room = 1 << 20;
	int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
	if (sock < 0 || bind(sock, (struct sockaddr *)&address, sizeof address) != 0)
		return -1;
	setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
	return sock;
}

static void take(struct watch *w, uint32_t mask)
{
	int fd;
	if (w->fd < 0)
		return;
	switch (w->kind) {
	case SIGNALS:
		reap(w->fd);
		break;
	case UEVENTS:
		take_uevents(w->fd);
		break;
	case CONTROL:
		take_control(w);
		break;
	case CALLS:
		accept_caller(w->fd);
		break;
	case CALLER:
		take_caller(w);
		break;
	case SESSION:
		/* Its end is told by SIGCHLD, with the reason. */
		if ((mask & EPOLLHUP) != 0)
			epoll_ctl(events, EPOLL_CTL_DEL, w->fd, NULL);
		else
			take_refusal(w);
		break;
	case CONNECTIONS:
		fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd >= 0)
			watch(NEWCOMER, fd, EPOLLIN | EPOLLRDHUP | EPOLLET);
		break;
	case NEWCOMER:
		take_newcomer(w);
		break;
	}
}

static int watch_children(void)
{
	sigset_t all;
	sigset_t child;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	return signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
}

static bool begin(const char *socket_path)
{
	char calls_path[sizeof((struct sockaddr_un *)0)->sun_path];
	events = epoll_create1(EPOLL_CLOEXEC);
	watch(SIGNALS, watch_children(), EPOLLIN);
	make_directories(AGENT_RUN, 0755);
	/* Beside the given socket where there is one: several agents may live on one machine in tests. */
	int length = socket_path == NULL ? snprintf(calls_path, sizeof calls_path, AGENT_CALLS_SOCKET)
					 : snprintf(calls_path, sizeof calls_path, "%s.calls", socket_path);
	int calls = length < (int)sizeof calls_path ? listen_on(calls_path, SOCK_SEQPACKET) : -1;
	/* Anyone inside may call; who it was is told by the kernel. */
	if (calls < 0 || chmod(calls_path, 0666) != 0)
		return false;
	watch(CALLS, calls, EPOLLIN);
	if (socket_path != NULL) {
		int connections = listen_on(socket_path, SOCK_STREAM);
		if (connections >= 0)
			watch(CONNECTIONS, connections, EPOLLIN);
		return connections >= 0;
	}
	int kernel = listen_to_kernel();
	if (kernel >= 0)
		watch(UEVENTS, kernel, EPOLLIN);
	open_all_ports();
	return kernel >= 0;
}

int agent_serve(const char *socket_path, const char *why_not_booted)
{
	boot_fault = why_not_booted;
	if (boot_fault != NULL)
		dprintf(STDERR_FILENO, "carrel-agent: %s\n", boot_fault);
	if (!begin(socket_path))
		return 1;
	for (;;) {
		struct epoll_event list[EVENTS_PER_TURN];
		int count = epoll_wait(events, list, EVENTS_PER_TURN, -1);
		for (int i = 0; i < count; i++)
			take(list[i].data.ptr, list[i].events);
		sweep();
	}
}
