/* spank_carrel: carries --guest and its kin from srun, sbatch and salloc to the node, where the task becomes
 * carrel-enter. It decides nothing: carreld does. docs/reference/environment.md is the contract.
 *
 * plugstack.conf: required /usr/libexec/carrel/spank_carrel.so socket=/var/spool/carrel/%n/carreld.sock
 *                          enter=/usr/libexec/carrel/carrel-enter [image=NAME]
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <slurm/spank.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

SPANK_PLUGIN(carrel, 1)

#define CARRIED "CARREL_JOB_"
#define IN_JOB "SLURM_SPANK_" CARRIED /* what Slurm makes of CARRIED in the job's own environment */

enum { NAME_MAX_BYTES = 96, VALUE_MAX_BYTES = 65536 };
enum { IMAGE, PER, CLONE, MOUNT, ROOT, BOOT_TIMEOUT, DRIVER, REPORT, CARRIED_COUNT };
enum { CLOUD = CARRIED_COUNT, CLOUD_TYPE, CLOUD_CREATE, REQUEST_COUNT };

static bool is_word(const char *value)
{
	for (const char *c = value; *c; c++)
		if (!isalnum((unsigned char)*c) && !strchr("._:/@+-", *c))
			return false;
	return *value != '\0' && *value != '-';
}

static bool is_seconds(const char *value)
{
	char *end;
	long seconds = strtol(value, &end, 10);
	return isdigit((unsigned char)*value) && !*end && seconds >= 1 && seconds <= 86400;
}

static bool is_mount(const char *value)
{
	const char *target = strchr(value, ':');
	return *value == '/' && !strchr(value, '\n') && (!target || target[1] == '/' || strcmp(target, ":ro") == 0);
}

static bool is_mounts(const char *value)
{
	char line[PATH_MAX * 2];
	for (size_t length; *value; value += length + (value[length] == '\n')) {
		length = strcspn(value, "\n");
		if (length >= sizeof line)
			return false;
		memcpy(line, value, length);
		line[length] = '\0';
		if (!is_mount(line))
			return false;
	}
	return true;
}

enum { WORDS_MAX = 4 };

/* A value is one of `words`, or what `check` takes. `input` is the variable that stands in for an absent option. */
static const struct request {
	const char *option, *argument, *usage, *input, *carried, *words[WORDS_MAX + 1];
	bool (*check)(const char *);
	const char *must_be;
} requests[REQUEST_COUNT] = {
	[IMAGE] = { "guest", "IMAGE", "run in a virtual machine of the job's own, made from IMAGE", "CARREL_GUEST",
		    CARRIED "IMAGE", { 0 }, is_word, "the name or the hash of an image; see: carrel image list" },
	[PER] = { "guest-per", "job|task|node", "one guest for the job on each node, for each task, or as a node",
		  "CARREL_GUEST_PER", CARRIED "PER", { "job", "task", "node" }, NULL, "job, task or node" },
	[CLONE] = { "guest-clone", "instant|linked|full|auto", "go on from a booted template, boot an overlay, or a copy",
		    "CARREL_GUEST_CLONE", CARRIED "CLONE", { "instant", "linked", "full", "auto" }, NULL,
		    "instant, linked, full or auto" },
	[MOUNT] = { "guest-mount", "SRC[:DST][:ro]", "show a directory of the node in the guest; repeatable",
		    "CARREL_GUEST_MOUNT", CARRIED "MOUNT", { 0 }, is_mounts, "SRC[:DST][:ro] with absolute paths" },
	[ROOT] = { "guest-root", NULL, "be root in the guest", "CARREL_GUEST_ROOT", CARRIED "ROOT", { "yes", "no" },
		   NULL, "yes or no" },
	[BOOT_TIMEOUT] = { "guest-boot-timeout", "S", "seconds to wait for the guest", "CARREL_GUEST_BOOT_TIMEOUT",
			   CARRIED "BOOT_TIMEOUT_S", { 0 }, is_seconds, "1 to 86400 seconds" },
	[DRIVER] = { "guest-driver", "NAME", "what makes the guest", "CARREL_GUEST_DRIVER", CARRIED "DRIVER", { 0 },
		     is_word, "the name of a driver; see: carrel node check" },
	[REPORT] = { "carrel-report", NULL, "print what the job used at the end of its output file (sbatch)",
		     "CARREL_REPORT", CARRIED "REPORT", { "yes", "no" }, NULL, "yes or no" },
	[CLOUD] = { .option = "cloud", "kvm", "as --guest-driver=qemu, in the site's image where --guest is absent",
		    .words = { "kvm" }, .must_be = "kvm" },
	[CLOUD_TYPE] = { .option = "cloud-type", "kvm", "as --cloud", .words = { "kvm" }, .must_be = "kvm" },
	[CLOUD_CREATE] = { .option = "cloud-create", "yes|no", "yes: as --guest-root", .words = { "yes", "no" },
			   .must_be = "yes or no" },
};

static char *given[REQUEST_COUNT]; /* by option */
static bool mount_is_inherited;
static const char *socket_path, *enter_path, *default_image;

/* ---- everywhere: the options -------------------------------------------------------------------------------------- */

static const char *in_job(const struct request *request, char into[NAME_MAX_BYTES])
{
	snprintf(into, NAME_MAX_BYTES, "SLURM_SPANK_%s", request->carried);
	return into;
}

static bool is_allowed(const struct request *request, const char *value)
{
	if (request->check)
		return *value && request->check(value);
	const char *const *word = request->words;
	while (*word && strcmp(value, *word) != 0)
		word++;
	return *word;
}

static int keep(int which, const char *value, bool add)
{
	char *copy = NULL;
	if (asprintf(&copy, "%s%s%s", add ? given[which] : "", add ? "\n" : "", value) < 0)
		return -1;
	free(given[which]);
	given[which] = copy;
	return 0;
}

/* Slurm hands a job's options on to every srun inside it, but only the last of a repeated one. The whole list is in
 * the environment; so what only repeats its last entry must not replace it. */
static bool repeats_the_jobs(const char *mount)
{
	const char *last = getenv("_SLURM_SPANK_OPTION_carrel_guest_mount");
	if (!last)
		last = getenv("SLURM_SPANK__SLURM_SPANK_OPTION_carrel_guest_mount");
	return !given[MOUNT] && last && strcmp(last, mount) == 0;
}

static int on_option(int which, const char *value, int remote)
{
	const struct request *request = &requests[which];
	if (!request->argument)
		value = "yes";
	if (remote) /* srun has looked at it; and a list is only whole in the environment */
		return keep(which, value ? value : "", false);
	if (!value || !is_allowed(request, value)) {
		slurm_error("--%s=%s: must be %s", request->option, value ? value : "", request->must_be);
		return -1;
	}
	if (which != MOUNT)
		return keep(which, value, false);
	bool add = given[MOUNT] && !mount_is_inherited;
	mount_is_inherited = repeats_the_jobs(value);
	return keep(MOUNT, value, add);
}

static void read_settings(int argc, char **argv)
{
	default_image = "default";
	for (int i = 0; i < argc; i++)
		if (strncmp(argv[i], "socket=", 7) == 0)
			socket_path = argv[i] + 7;
		else if (strncmp(argv[i], "enter=", 6) == 0)
			enter_path = argv[i] + 6;
		else if (strncmp(argv[i], "image=", 6) == 0)
			default_image = argv[i] + 6;
		else
			slurm_error("plugstack.conf: carrel: unknown argument %s; known: socket= enter= image=", argv[i]);
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	spank_context_t context = spank_context();
	if (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR && context != S_CTX_REMOTE)
		return 0;
	read_settings(argc, argv);
	for (int i = 0; i < REQUEST_COUNT; i++) {
		struct spank_option option = { .name = (char *)requests[i].option,
					       .arginfo = (char *)requests[i].argument,
					       .usage = (char *)requests[i].usage,
					       .has_arg = requests[i].argument != NULL,
					       .val = i,
					       .cb = on_option };
		if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
			slurm_error("carrel: --%s cannot be offered; does another plug-in offer it?", option.name);
	}
	return 0;
}

/* ---- srun, sbatch, salloc: what is asked for -------------------------------------------------------------------------- */

static void resolve_aliases(void)
{
	if (given[CLOUD] || given[CLOUD_TYPE]) {
		if (!given[DRIVER])
			keep(DRIVER, "qemu", false);
		if (!given[IMAGE] && !getenv(IN_JOB "IMAGE") && !getenv(requests[IMAGE].input))
			keep(IMAGE, default_image, false);
	}
	if (given[CLOUD_CREATE] && !given[ROOT])
		keep(ROOT, given[CLOUD_CREATE], false);
	if (mount_is_inherited) {
		free(given[MOUNT]);
		given[MOUNT] = NULL;
	}
}

/* Inside a job that has a guest, what the job was given stands in for absent options, for a step as for a job that is
 * submitted there; the user's variables made it, and are not read again. */
static int read_inputs(bool in_guest_job)
{
	char name[NAME_MAX_BYTES];
	for (int i = 0; i < CARRIED_COUNT; i++) {
		const char *input = in_guest_job ? in_job(&requests[i], name) : requests[i].input;
		const char *value = getenv(input);
		if (given[i] || !value || !*value)
			continue;
		if (!is_allowed(&requests[i], value)) {
			slurm_error("%s=%s: must be %s", input, value, requests[i].must_be);
			return -1;
		}
		if (keep(i, value, false) != 0)
			return -1;
	}
	return 0;
}

static int carry(spank_t spank, const struct request *request, const char *value)
{
	char name[NAME_MAX_BYTES];
	/* The first reaches Prolog, Epilog and the batch script; the second a step, also of a job without a guest. */
	if (spank_job_control_setenv(spank, request->carried, value, 1) == ESPANK_SUCCESS
	    && (spank_context() != S_CTX_LOCAL || setenv(in_job(request, name), value, 1) == 0))
		return 0;
	slurm_error("--%s: cannot be carried to the job", request->option);
	return -1;
}

int slurm_spank_init_post_opt(spank_t spank, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_ALLOCATOR)
		return 0;
	bool in_guest_job = getenv(IN_JOB "IMAGE") != NULL;
	resolve_aliases();
	for (int i = 0; i < REQUEST_COUNT && !given[IMAGE] && !in_guest_job && !getenv(requests[IMAGE].input); i++)
		if (given[i] && i != REPORT) {
			slurm_error("--%s: needs --guest=IMAGE", requests[i].option);
			return -1;
		}
	if (read_inputs(in_guest_job) != 0)
		return -1;
	for (int i = 0; i < CARRIED_COUNT; i++)
		if (given[i] && (given[IMAGE] || i == REPORT) && carry(spank, &requests[i], given[i]) != 0)
			return -1;
	return 0;
}

/* ---- slurmstepd: the task becomes carrel-enter ------------------------------------------------------------------------ */

/* Slurm does not put the node's name in place of %n in a plug-in's arguments. */
static void socket_of_node(spank_t spank, char into[PATH_MAX])
{
	char node[NAME_MAX_BYTES] = "";
	const char *hole = strstr(socket_path, "%n");
	spank_getenv(spank, "SLURMD_NODENAME", node, sizeof node);
	if (hole)
		snprintf(into, PATH_MAX, "%.*s%s%s", (int)(hole - socket_path), socket_path, node, hole + 2);
	else
		snprintf(into, PATH_MAX, "%s", socket_path);
}

/* carreld leaves a record of every job that asked for a guest: a step that lost its environment (env -i srun) must
 * not run on the bare node. And where the node itself is a guest, no task at all runs on the host that carries it. */
static bool node_says_so(spank_t spank, const char *socket)
{
	char path[PATH_MAX + 32];
	uint32_t job = 0;
	const char *slash = strrchr(socket, '/');
	if (!slash)
		return false;
	snprintf(path, sizeof path, "%.*s/is-guest", (int)(slash - socket), socket);
	if (access(path, F_OK) == 0)
		return true;
	if (spank_get_item(spank, S_JOB_ID, &job) != ESPANK_SUCCESS)
		return false;
	snprintf(path, sizeof path, "%.*s/jobs/%u", (int)(slash - socket), socket, job);
	return access(path, F_OK) == 0;
}

static bool in_environment(spank_t spank, int which)
{
	static char value[VALUE_MAX_BYTES];
	char name[NAME_MAX_BYTES];
	return spank_getenv(spank, in_job(&requests[which], name), value, sizeof value) != ESPANK_ENV_NOEXIST;
}

/* All that differs between Slurm's versions is here. */
static int become_enter(spank_t spank)
{
#if SLURM_VERSION_NUMBER >= SLURM_VERSION_NUM(23, 11, 0)
	const char *before[] = { enter_path, "--" };
	spank_unsetenv(spank, "CARREL_ENTER_ARGV0"); /* where there is one, carrel-enter looks for no `--` */
	return spank_prepend_task_argv(spank, 2, before) == ESPANK_SUCCESS ? 0 : -1;
#else
	char **argv, *enter = strdup(enter_path);
	int argc = 0;
	if (!enter || spank_get_item(spank, S_JOB_ARGV, &argc, &argv) != ESPANK_SUCCESS || argc < 1
	    || spank_setenv(spank, "CARREL_ENTER_ARGV0", argv[0], 1) != ESPANK_SUCCESS) {
		free(enter);
		return -1;
	}
	argv[0] = enter; /* slurmstepd executes this very array; TaskProlog, binding and limits stay as they are */
	return 0;
#endif
}

/* Refusals belong here: where user_init fails, srun 22.05 exits 0. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	char socket[PATH_MAX] = "", name[NAME_MAX_BYTES];
	if (socket_path)
		socket_of_node(spank, socket);
	if (!given[IMAGE] && !in_environment(spank, IMAGE) && !node_says_so(spank, socket))
		return 0;
	if (!socket_path || !enter_path) {
		slurm_error("carrel: plugstack.conf of this node gives no %s=", socket_path ? "enter" : "socket");
		return -1;
	}
	if (access(enter_path, X_OK) != 0) {
		slurm_error("carrel: %s: %s; is Carrel installed on this node?", enter_path, strerror(errno));
		return -1;
	}
	for (int i = 0; i < CARRIED_COUNT; i++)
		if (given[i] && (i != MOUNT || !in_environment(spank, MOUNT)))
			spank_setenv(spank, in_job(&requests[i], name), given[i], 1);
	if (spank_setenv(spank, "CARREL_ENTER_SOCKET", socket, 1) == ESPANK_SUCCESS && become_enter(spank) == 0)
		return 0;
	slurm_error("carrel: the task could not be made to enter its guest");
	return -1;
}
