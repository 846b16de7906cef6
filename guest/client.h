/* The asking side of a session: this process's stdio, signals and terminal are those of a command elsewhere.
 *
 * carrel-enter is a client on the host, for a task; the stub `srun` is one in the guest, for the host's srun.
 */
#ifndef CARREL_CLIENT_H
#define CARREL_CLIENT_H

#include <stdbool.h>
#include <sys/types.h>
#include <termios.h>

#include "relay.h"
#include "wire.h"

struct client;

struct client {
	struct relay relay;
	int signals;            /* signalfd of everything that can be caught */
	int parent;             /* pidfd of who started this process, which ends with it; -1: it does not */
	bool is_pty;
	bool is_batch;          /* scancel -b means the script alone */
	bool is_stub;           /* stands for one process; stops itself on SIGTSTP */
	bool ended;
	int status;             /* raw wait status, once ended */
	unsigned oom_kills;     /* processes that the guest's kernel killed for memory */
	char *sentence;         /* why the other side gave up; NULL: it did not say */
	void (*on_call)(struct client *client, const char *id);
	void (*on_child)(struct client *client);
	size_t (*more_polls)(struct client *client, struct pollfd *set); /* at most CLIENT_POLL_MAX */
	void (*take_polls)(struct client *client, const struct pollfd *set, size_t count);
};

enum { CLIENT_POLL_MAX = 256 };

void client_block_signals(void);
/* A pidfd of who started this process: readable when that is dead. -1 where the kernel has none. */
int client_watch_parent(void);
/* Makes the client of the stream fd; stdio is attached and a terminal is raw from here on. */
void client_init(struct client *client, int fd);
bool client_stdio_is_pty(void);
/* uid, umask, limits, cwd, terminal: what START says of this process. */
void client_describe(struct records *start, bool is_pty);
bool client_start(struct client *client, const struct records *start);
/* Relays until the command ended and all it said is written, or the stream did. */
void client_relay(struct client *client);
void client_restore_terminal(struct client *client);
/* Ends this process as the command ended. */
__attribute__((noreturn)) void client_end_as(int status);
__attribute__((noreturn)) void client_die_by(int signal_number);

#endif
