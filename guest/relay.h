/* One framed stream and the channels on it: the engine under carrel-enter, the agent, the runner and the stubs. */
#ifndef CARREL_RELAY_H
#define CARREL_RELAY_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "protocol.h"

/* What a descriptor allows. A task's own descriptors are shared with strangers, so they are never set O_NONBLOCK. */
enum sink_kind { SINK_OWN, SINK_FOREIGN };

struct channel {
	int source;            /* what is read here goes out as DATA; -1: nothing (any more) */
	int sink;              /* DATA that comes in is written here; -1: nothing (any more) */
	enum sink_kind kind;
	bool foreign_is_file;
	bool foreign_is_socket;
	bool receives;         /* the peer may send DATA here */
	bool sink_ends;        /* the peer sent EOF: close once all is written */
	bool never_half_close; /* slurmstepd dies of half a PMI connection */
	bool dry_is_end;       /* the writer is dead: an empty source is a finished one */
	uint32_t credit;       /* bytes that the peer still takes */
	uint32_t window;       /* bytes that we still take */
	uint32_t owed;         /* bytes written since the last CREDIT */
	uint64_t limit;        /* bytes still to be read from the source */
	char *hold;            /* ring of WINDOW_BYTES, made at need */
	uint32_t hold_start;
	uint32_t hold_used;
	short source_slot;     /* place in the poll set of this turn, -1: none */
	short sink_slot;
};

struct relay;
/* Takes a frame that is not about a channel. False: the peer broke the protocol. */
typedef bool frame_handler(struct relay *relay, enum frame_type type, uint8_t channel, const char *payload,
			   uint32_t length);

struct relay {
	int fd;
	bool gone;         /* the stream ended or the peer broke the protocol */
	const char *fault; /* how it broke the protocol; NULL: it just ended */
	frame_handler *on_frame;
	void *owner;
	unsigned char *in;
	size_t in_start, in_end;
	unsigned char *out;
	size_t out_start, out_end;
	struct channel channels[CHANNELS_MAX];
};

#define RELAY_POLL_MAX (1 + 2 * CHANNELS_MAX)

void relay_init(struct relay *relay, int fd, frame_handler *on_frame, void *owner);
void relay_close(struct relay *relay);
void relay_source(struct relay *relay, unsigned channel, int fd);
void relay_sink(struct relay *relay, unsigned channel, int fd, enum sink_kind kind);
/* Both directions of one socket, of which only the whole is ever closed: half a PMI connection kills slurmstepd. */
void relay_connection(struct relay *relay, unsigned channel, int fd, enum sink_kind kind);
/* The writer of this source is dead: read what is there and no more. */
void relay_drain(struct relay *relay, unsigned channel, bool is_terminal);
void relay_close_source(struct relay *relay, unsigned channel);
void relay_close_channel(struct relay *relay, unsigned channel);

bool relay_has_room(const struct relay *relay);
/* Only when there is room. */
void relay_send(struct relay *relay, enum frame_type type, unsigned channel, const void *payload, size_t length);
void relay_send_number(struct relay *relay, enum frame_type type, unsigned channel, uint32_t number);
/* START, in as many pieces as it needs; waits at most timeout_s for the peer to take them. */
bool relay_send_start(struct relay *relay, const char *records, size_t length, int timeout_s);
/* Everything that came has been written where it belongs. */
bool relay_is_delivered(const struct relay *relay);

size_t relay_poll_set(struct relay *relay, struct pollfd *set);
void relay_turn(struct relay *relay, const struct pollfd *set);
/* Ends any frame that a dead sender left unfinished, and tells the peer that it is dead. */
void relay_abort_bytes(int fd);

#endif
