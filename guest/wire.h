/* Messages of `key=value` records, each ended by a NUL: carreld's socket, START and the control port speak them.
 *
 * docs/reference/node-socket.md is the contract; src/carrel/wire.py is the same in Python.
 */
#ifndef CARREL_WIRE_H
#define CARREL_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_MESSAGE_MAX_BYTES (1u << 20)

struct records {
	char *data;
	size_t used;
	size_t size;
};

void records_add(struct records *records, const char *key, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void records_add_bytes(struct records *records, const char *key, const char *value, size_t length);
void records_free(struct records *records);

/* First value of `key`, or NULL. */
const char *records_get(const char *data, size_t length, const char *key);
/* Next value of `key` at or after *cursor (NULL to begin), or NULL. */
const char *records_next(const char *data, size_t length, const char *key, const char **cursor);
size_t records_count(const char *data, size_t length, const char *key);
long long records_number(const char *data, size_t length, const char *key, long long absent);
/* Every record ends, so that each value is a C string. */
bool records_are_whole(const char *data, size_t length);

/* One message with its length in front, blocking. */
bool wire_send(int fd, const struct records *records);

/* A message that is being read from a non-blocking socket; a descriptor may ride on it. */
struct wire_reader {
	unsigned char head[4];
	size_t got;
	uint32_t length;
	char *body;
	int fd;
};

enum wire_state { WIRE_MORE, WIRE_DONE, WIRE_CLOSED };

void wire_reader_init(struct wire_reader *reader);
enum wire_state wire_read(struct wire_reader *reader, int sock);

void *must_have(void *memory); /* ends the program when there is no memory */

#endif
