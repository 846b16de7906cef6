/* carrel-enter's questions to carreld. docs/reference/node-socket.md is the contract. */
#ifndef CARREL_NODE_H
#define CARREL_NODE_H

#include "wire.h"

struct answer {
	int connection;  /* stays open: its end tells carreld that the task ended */
	int stream;      /* the relay stream; -1: refused */
	char *body;      /* records of the answer */
	size_t length;
	char *sentence;  /* why not */
};

/* Asks and waits for `ok` or `refused`. TERM, INT, HUP and QUIT end the process meanwhile, and so does the end of
 * `parent`, a pidfd or -1. */
struct answer node_ask(const char *socket_path, const struct records *question, int wait_s, int parent);
/* Ends this process when TERM, INT, HUP or QUIT is pending; others wait for the command. */
int node_watch_signals(void);

#endif
