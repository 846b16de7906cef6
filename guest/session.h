/* A session: one command that is served to a relay client, from START to EXIT.
 *
 * carrel-agent serves tasks with it; carrel-enter serves the Slurm commands that a task calls inside its guest.
 */
#ifndef CARREL_SESSION_H
#define CARREL_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "relay.h"

enum { RLIMITS_MAX = 16 };

struct command {
	uid_t uid;
	gid_t gid;
	gid_t *groups;
	size_t group_count;
	mode_t umask;
	struct {
		bool given;
		unsigned long long soft, hard;
	} limits[RLIMITS_MAX];
	const char *cwd;
	char **argv;
	const char *path;        /* what to execute; NULL: what argv[0] names */
	char **environ;
	bool is_pty;
	bool has_pmi;            /* a connection to slurmstepd waits at the other end */
	unsigned short rows, columns;
	const char *script;      /* text of a batch script; NULL: none */
	const char *script_path; /* where argv[0] expects it */
};

struct session;
/* May change the command, or refuse it with a sentence. */
typedef const char *command_check(struct command *command);

struct session {
	struct relay relay;
	int uplink;          /* sequenced packets to the agent: ids of calls that ask for a stream; -1: none */
	bool is_root_of_all; /* the agent's: changes identity and owns every descendant */
	char cgroup[128];    /* the session's own cgroup v2 directory; empty: there is none */
	char *start;
	size_t start_used;
	struct command command;
	command_check *check;
	pid_t leader;
	int status;
	bool leader_ended;
	bool exit_sent;
	int signals;         /* signalfd */
};

/* Serves one session on fd to its end; returns this process's exit status. */
int session_serve(int fd, int uplink, const char *name, bool is_root_of_all, command_check *check);

bool command_parse(struct command *command, char *records, size_t length);
void command_free(struct command *command);

/* Starts the command; on failure says why. Descriptors of this side are left in the relay's channels. */
const char *session_spawn(struct session *session);

pid_t parent_of(pid_t pid); /* 0: there is no such process */

/* How many of the session's processes this kernel killed for want of memory. */
unsigned session_oom_kills(const struct session *session);

void session_make_cgroup(struct session *session, const char *name);
void session_signal(const struct session *session, int signal_number, bool all);
/* Ends everything that the session started, and waits for it, bounded. */
void session_end_all(struct session *session);

#endif
