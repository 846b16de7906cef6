/* Which of Slurm's commands a guest may call, under the names they have. */
#ifndef CARREL_CALLS_H
#define CARREL_CALLS_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* Not salloc: its shell would run on the host, outside the guest that the user asked for. */
static const char *const CALLS[] = {
	"srun",    "sbatch",  "squeue", "scancel",  "sinfo", "sacct",  "scontrol",
	"sstat",   "sattach", "sbcast", "sacctmgr", "sprio", "sshare",
};
enum { CALLS_COUNT = sizeof CALLS / sizeof CALLS[0] };

static inline bool call_is_allowed(const char *name)
{
	for (size_t i = 0; i < CALLS_COUNT; i++)
		if (strcmp(CALLS[i], name) == 0)
			return true;
	return false;
}

#endif
