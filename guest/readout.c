/* What the kernel of this machine counts, read for its host: the sampler outside needs no interpreter in here.
 *
 * docs/reference/relay-protocol.md is the contract. One request after the other is answered, in one write where it
 * fits, since each turn of a port costs a guest more than all that it reads.
 */
#define _GNU_SOURCE
#include "readout.h"

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"
#include "wire.h"

enum { FILE_MAX_BYTES = 1 << 20, ANSWER_MAX_BYTES = 4 << 20, PROCESSES_MAX = 256 };

struct answer {
	char *data;
	size_t used, size;
};

static char *room(struct answer *answer, size_t bytes)
{
	if (answer->used + bytes > answer->size) {
		answer->size = (answer->used + bytes) * 2;
		answer->data = must_have(realloc(answer->data, answer->size));
	}
	return answer->data + answer->used;
}

/* A file with its length in front: 0 where it cannot be read. */
static void add_file(struct answer *answer, const char *path)
{
	size_t length_at = answer->used;
	uint32_t length;
	room(answer, sizeof length);
	answer->used += sizeof length;
	size_t start = answer->used;
	int fd = answer->used > ANSWER_MAX_BYTES ? -1 : open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	ssize_t got = 1;
	while (fd >= 0 && got > 0 && answer->used - start < FILE_MAX_BYTES) {
		got = read(fd, room(answer, 1 << 16), 1 << 16);
		answer->used += got > 0 ? (size_t)got : 0;
	}
	if (fd >= 0)
		close(fd);
	length = htole32((uint32_t)(answer->used - start));
	memcpy(answer->data + length_at, &length, sizeof length);
}

/* Of each process of the sessions: stat and io, each with its length in front. */
static void add_processes_of(struct answer *answer, const char *directory, unsigned *count)
{
	char path[600];
	int pid = 0;
	snprintf(path, sizeof path, "%s/cgroup.procs", directory);
	FILE *list = fopen(path, "re");
	while (list != NULL && *count < PROCESSES_MAX && fscanf(list, "%d", &pid) == 1) {
		snprintf(path, sizeof path, "/proc/%d/stat", pid);
		add_file(answer, path);
		snprintf(path, sizeof path, "/proc/%d/io", pid);
		add_file(answer, path);
		(*count)++;
	}
	if (list != NULL)
		fclose(list);
}

/* The directory's children are the sessions; a session's own children are those that root inside has made. */
static void add_processes(struct answer *answer, const char *top)
{
	size_t length_at = answer->used;
	uint32_t length;
	unsigned count = 0;
	char path[512];
	room(answer, sizeof length);
	answer->used += sizeof length;
	DIR *sessions = opendir(top);
	const struct dirent *entry;
	while (sessions != NULL && (entry = readdir(sessions)) != NULL)
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.' &&
		    snprintf(path, sizeof path, "%s/%s", top, entry->d_name) < (int)sizeof path)
			add_processes_of(answer, path, &count);
	if (sessions != NULL)
		closedir(sessions);
	length = htole32((uint32_t)(answer->used - length_at - sizeof length));
	memcpy(answer->data + length_at, &length, sizeof length);
}

static bool take_all(int fd, char *data, size_t length)
{
	for (size_t got = 0; got < length;) {
		ssize_t part = read(fd, data + got, length - got);
		if (part > 0) {
			got += (size_t)part;
			continue;
		}
		struct pollfd more = {.fd = fd, .events = POLLIN};
		bool again = part < 0 && (errno == EAGAIN || errno == EINTR);
		if (!again || poll(&more, 1, -1) < 0 || (more.revents & (POLLIN | POLLHUP)) == POLLHUP)
			return false;
	}
	return true;
}

static bool give_all(int fd, const char *data, size_t length)
{
	for (size_t given = 0; given < length;) {
		ssize_t part = write(fd, data + given, length - given);
		if (part > 0) {
			given += (size_t)part;
			continue;
		}
		struct pollfd more = {.fd = fd, .events = POLLOUT};
		bool again = part < 0 && (errno == EAGAIN || errno == EINTR);
		if (!again || poll(&more, 1, -1) < 0 || (more.revents & POLLHUP) != 0)
			return false;
	}
	return true;
}

static bool answer_one(int fd, const char *records, size_t length, struct answer *answer)
{
	const char *cursor = NULL;
	const char *path;
	uint32_t total;
	answer->used = 0;
	room(answer, sizeof total);
	answer->used += sizeof total;
	while ((path = records_next(records, length, "file", &cursor)) != NULL)
		add_file(answer, path);
	cursor = NULL;
	while ((path = records_next(records, length, "processes", &cursor)) != NULL)
		add_processes(answer, path);
	total = htole32((uint32_t)(answer->used - sizeof total));
	memcpy(answer->data, &total, sizeof total);
	return give_all(fd, answer->data, answer->used);
}

int readout_serve(int fd)
{
	struct answer answer = {0};
	char *records = must_have(malloc(FRAME_PAYLOAD_MAX_BYTES));
	unsigned char head[FRAME_HEAD_BYTES];
	uint32_t length;
	while (take_all(fd, (char *)head, sizeof head)) {
		memcpy(&length, head + 4, sizeof length);
		length = le32toh(length);
		if (head[0] != FRAME_CONTROL || length > FRAME_PAYLOAD_MAX_BYTES || !take_all(fd, records, length) ||
		    !records_are_whole(records, length) || !answer_one(fd, records, length, &answer))
			break;
	}
	free(records);
	free(answer.data);
	return 0;
}
