/* Slurm's commands from inside: each call gets a child of this step that runs the host's own command. */
#ifndef CARREL_RUNNER_H
#define CARREL_RUNNER_H

#include "client.h"
#include "node.h"

void runner_attach(struct client *client, const char *socket_path, const char *job, const struct answer *answer);

#endif
