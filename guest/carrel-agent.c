/* carrel-agent, the first process in a guest: it makes the machine usable, gives it its identity, and runs the job's
 * commands as the job's user. It trusts nothing that runs in the guest. Under the name of a Slurm command it is that
 * command's stand-in, which calls the host's.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "calls.h"
#include "session.h"

static int usage(void)
{
	fprintf(stderr, "usage: carrel-agent --serve SOCKET | --session FD | --version\n");
	return 2;
}

int main(int argc, char **argv)
{
	const char *name = argc == 0 ? "" : strrchr(argv[0], '/');
	name = name == NULL ? argv[0] : name + 1;
	if (call_is_allowed(name))
		return call_host(name, argc, argv);
	if (getpid() == 1 && argc == 1)
		return agent_serve(NULL, boot_machine());
	if (argc == 2 && strcmp(argv[1], "--version") == 0) {
		printf("carrel-agent %s, relay protocol %d\n", CARREL_VERSION, CARREL_PROTOCOL_VERSION);
		return 0;
	}
	if (argc != 3)
		return usage();
	if (strcmp(argv[1], "--serve") == 0)
		return agent_serve(argv[2], NULL);
	if (strcmp(argv[1], "--session") == 0)
		return session_serve(atoi(argv[2]), -1, "session", true, NULL);
	return usage();
}
