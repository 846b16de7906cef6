/* START's records as a struct, and back to nothing. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"
#include "wire.h"

static char **values(const char *data, size_t length, const char *key)
{
	size_t count = records_count(data, length, key);
	/* One more than the end needs: the spawner may add a variable. */
	char **list = must_have(calloc(count + 2, sizeof *list));
	const char *cursor = NULL;
	for (size_t i = 0; i < count; i++)
		/* The records outlive the list and nobody writes through it. */
		list[i] = (char *)(uintptr_t)records_next(data, length, key, &cursor);
	return list;
}

static void parse_groups(struct command *command, const char *data, size_t length)
{
	command->group_count = records_count(data, length, "group");
	command->groups = must_have(calloc(command->group_count + 1, sizeof *command->groups));
	const char *cursor = NULL;
	for (size_t i = 0; i < command->group_count; i++) {
		const char *value = records_next(data, length, "group", &cursor);
		command->groups[i] = (gid_t)strtoul(value == NULL ? "" : value, NULL, 10);
	}
}

static void parse_limits(struct command *command, const char *data, size_t length)
{
	const char *cursor = NULL;
	const char *value;
	while ((value = records_next(data, length, "rlimit", &cursor)) != NULL) {
		unsigned resource = 0;
		unsigned long long soft = 0;
		unsigned long long hard = 0;
		if (sscanf(value, "%u:%llu:%llu", &resource, &soft, &hard) != 3 || resource >= RLIMITS_MAX)
			continue;
		command->limits[resource].given = true;
		command->limits[resource].soft = soft;
		command->limits[resource].hard = hard;
	}
}

static bool has_flag(const char *data, size_t length, const char *flag)
{
	const char *cursor = NULL;
	const char *value;
	while ((value = records_next(data, length, "flag", &cursor)) != NULL)
		if (strcmp(value, flag) == 0)
			return true;
	return false;
}

bool command_parse(struct command *command, char *records, size_t length)
{
	*command = (struct command){0};
	if (!records_are_whole(records, length) || records_get(records, length, "argv") == NULL)
		return false;
	command->uid = (uid_t)records_number(records, length, "uid", 65534);
	command->gid = (gid_t)records_number(records, length, "gid", 65534);
	command->umask = (mode_t)records_number(records, length, "umask", 022);
	parse_groups(command, records, length);
	parse_limits(command, records, length);
	command->cwd = records_get(records, length, "cwd");
	command->argv = values(records, length, "argv");
	command->environ = values(records, length, "env");
	command->is_pty = has_flag(records, length, "pty");
	command->has_pmi = has_flag(records, length, "pmi");
	command->rows = (unsigned short)records_number(records, length, "rows", 0);
	command->columns = (unsigned short)records_number(records, length, "cols", 0);
	command->script = records_get(records, length, "script");
	command->script_path = records_get(records, length, "script_path");
	return true;
}

void command_free(struct command *command)
{
	free(command->groups);
	free(command->argv);
	free(command->environ);
	*command = (struct command){0};
}
