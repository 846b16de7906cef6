/* The parts of carrel-agent. */
#ifndef CARREL_AGENT_H
#define CARREL_AGENT_H

#include <stdbool.h>

#include "wire.h"

#define AGENT_RUN "/run/carrel"
#define AGENT_CALLS_SOCKET AGENT_RUN "/agent.sock"

/* As the first process of a machine: file systems, modules, root. False: there is no root to go to. */
bool boot_machine(void);
/* Loads every file that /modules/order names. */
void boot_modules(void);

/* What `identity` and `clock` ask for; on failure one sentence in text. */
bool identity_apply(const char *records, size_t length, char *text, size_t text_size);
void identity_set_clock(const char *records, size_t length);

/* A command under one of Slurm's names; returns its exit status or dies as it died. */
int call_host(const char *name, int argc, char **argv);

/* Serves the control port, task ports and calls for ever: ports of this machine, or connections to socket_path. */
int agent_serve(const char *socket_path);

#endif
