#define _GNU_SOURCE
#include "wire.h"

#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

void *must_have(void *memory)
{
	if (memory == NULL) {
		static const char text[] = "carrel: out of memory\n";
		if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
			_exit(1);
		_exit(1);
	}
	return memory;
}

void records_add_bytes(struct records *records, const char *key, const char *value, size_t length)
{
	size_t key_length = strlen(key);
	size_t needed = records->used + key_length + length + 2;
	if (records->data == NULL || needed > records->size) {
		records->size = needed * 2;
		records->data = must_have(realloc(records->data, records->size));
	}
	char *end = records->data + records->used;
	memcpy(end, key, key_length);
	end[key_length] = '=';
	memcpy(end + key_length + 1, value, length);
	end[key_length + 1 + length] = '\0';
	records->used = needed;
}

void records_add(struct records *records, const char *key, const char *format, ...)
{
	char *value = NULL;
	va_list arguments;
	va_start(arguments, format);
	int length = vasprintf(&value, format, arguments);
	va_end(arguments);
	if (length < 0 || value == NULL)
		must_have(NULL);
	else
		records_add_bytes(records, key, value, (size_t)length);
	free(value);
}

void records_free(struct records *records)
{
	free(records->data);
	*records = (struct records){0};
}

const char *records_next(const char *data, size_t length, const char *key, const char **cursor)
{
	size_t key_length = strlen(key);
	const char *end = data + length;
	const char *record = *cursor == NULL ? data : *cursor;
	while (record < end) {
		size_t record_length = strnlen(record, (size_t)(end - record));
		*cursor = record + record_length + 1;
		if (record_length > key_length && record[key_length] == '=' && memcmp(record, key, key_length) == 0)
			return record + key_length + 1;
		record = *cursor;
	}
	*cursor = end;
	return NULL;
}

const char *records_get(const char *data, size_t length, const char *key)
{
	const char *cursor = NULL;
	return records_next(data, length, key, &cursor);
}

size_t records_count(const char *data, size_t length, const char *key)
{
	size_t count = 0;
	const char *cursor = NULL;
	while (records_next(data, length, key, &cursor) != NULL)
		count++;
	return count;
}

long long records_number(const char *data, size_t length, const char *key, long long absent)
{
	const char *value = records_get(data, length, key);
	if (value == NULL || *value == '\0')
		return absent;
	char *end = NULL;
	errno = 0;
	long long number = strtoll(value, &end, 10);
	return errno != 0 || *end != '\0' ? absent : number;
}

bool records_are_whole(const char *data, size_t length)
{
	return length > 0 && data[length - 1] == '\0';
}

bool wire_send(int fd, const struct records *records)
{
	uint32_t head = htole32((uint32_t)records->used);
	size_t length = sizeof head + records->used;
	char *message = must_have(malloc(length));
	memcpy(message, &head, sizeof head);
	if (records->used > 0)
		memcpy(message + sizeof head, records->data, records->used);
	size_t sent = 0;
	while (sent < length) {
		ssize_t put = send(fd, message + sent, length - sent, MSG_NOSIGNAL);
		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			break;
		sent += (size_t)put;
	}
	free(message);
	return sent == length;
}

void wire_reader_init(struct wire_reader *reader)
{
	*reader = (struct wire_reader){.fd = -1};
}

static ssize_t receive_with_fd(int sock, void *buffer, size_t length, int *fd)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {.iov_base = buffer, .iov_len = length};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got <= 0)
		return got;
	for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head != NULL; head = CMSG_NXTHDR(&message, head))
		if (head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS) {
			if (*fd >= 0)
				close(*fd);
			memcpy(fd, CMSG_DATA(head), sizeof *fd);
		}
	return got;
}

static enum wire_state head_is_read(struct wire_reader *reader)
{
	uint32_t length = 0;
	memcpy(&length, reader->head, sizeof length);
	reader->length = le32toh(length);
	if (reader->length == 0 || reader->length > WIRE_MESSAGE_MAX_BYTES)
		return WIRE_CLOSED;
	free(reader->body);
	reader->body = must_have(malloc(reader->length));
	return WIRE_MORE;
}

enum wire_state wire_read(struct wire_reader *reader, int sock)
{
	for (;;) {
		bool in_head = reader->got < sizeof reader->head;
		size_t done = in_head ? reader->got : reader->got - sizeof reader->head;
		void *place = in_head ? (void *)(reader->head + done) : (void *)(reader->body + done);
		size_t wanted = (in_head ? sizeof reader->head : reader->length) - done;
		ssize_t got = receive_with_fd(sock, place, wanted, &reader->fd);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN)
			return WIRE_MORE;
		if (got <= 0)
			return WIRE_CLOSED;
		reader->got += (size_t)got;
		if (reader->got == sizeof reader->head && head_is_read(reader) == WIRE_CLOSED)
			return WIRE_CLOSED;
		if (reader->got > sizeof reader->head && reader->got == sizeof reader->head + reader->length) {
			reader->got = 0;
			return records_are_whole(reader->body, reader->length) ? WIRE_DONE : WIRE_CLOSED;
		}
	}
}
