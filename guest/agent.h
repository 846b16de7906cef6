/* The parts of carrel-agent. */
#ifndef CARREL_AGENT_H
#define CARREL_AGENT_H

#include <stdbool.h>

#include "wire.h"

#define AGENT_RUN "/run/carrel"
#define AGENT_BIN AGENT_RUN "/bin"
#define AGENT_STAGE AGENT_RUN "/stage"
#define AGENT_CALLS_SOCKET AGENT_RUN "/agent.sock"

/* As the first process of a machine: modules, root file system, the usual mounts. NULL, or why there is no root. */
const char *boot_machine(void);

/* Does what `identity` asks for, as often as asked. False: one sentence is in text. */
bool identity_apply(const char *records, size_t length, char *text, size_t text_size);
void identity_set_clock(const char *records, size_t length);
bool make_directories(const char *path, unsigned mode); /* the last one has this mode, its parents 0755 */

/* A command under one of Slurm's names: returns never, ends as the host's command ended. */
int call_host(const char *name, int argc, char **argv);

/* Serves the control port, task ports and calls for ever: ports of this machine, or connections to socket_path.
 * boot_fault, if any, is told to the host instead of `hello`. */
int agent_serve(const char *socket_path, const char *boot_fault);

#endif
