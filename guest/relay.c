#define _GNU_SOURCE
#include "relay.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum {
	IN_BYTES = 2 * (FRAME_HEAD_BYTES + FRAME_PAYLOAD_MAX_BYTES),
	/* A virtio port takes at most 32 KiB a write; a frame with its head fills that exactly. */
	CHUNK_BYTES = 32768 - FRAME_HEAD_BYTES,
	/* Above this, sources wait; what is left above it is for frames that must not wait behind them. */
	OUT_HIGH_BYTES = 131072,
	OUT_BYTES = OUT_HIGH_BYTES + 2 * (FRAME_HEAD_BYTES + FRAME_PAYLOAD_MAX_BYTES),
	READS_PER_TURN = 32,
	/* What poll promises of a pipe or terminal that others write to as well. */
	FOREIGN_WRITE_BYTES = 4096,
	TERMINAL_DRAIN_BYTES = 1 << 20,
};

void relay_init(struct relay *relay, int fd, frame_handler *on_frame, void *owner)
{
	*relay = (struct relay){.fd = fd, .on_frame = on_frame, .owner = owner};
	relay->in = must_have(malloc(IN_BYTES));
	relay->out = must_have(malloc(OUT_BYTES));
	for (unsigned i = 0; i < CHANNELS_MAX; i++)
		relay->channels[i] = (struct channel){
			.source = -1, .sink = -1, .source_slot = -1, .sink_slot = -1, .credit = WINDOW_BYTES};
}

void relay_close(struct relay *relay)
{
	for (unsigned i = 0; i < CHANNELS_MAX; i++)
		relay_close_channel(relay, i);
	free(relay->in);
	free(relay->out);
	if (relay->fd >= 0)
		close(relay->fd);
	relay->fd = -1;
	relay->gone = true;
}

static void fail(struct relay *relay, const char *fault)
{
	relay->gone = true;
	if (relay->fault == NULL)
		relay->fault = fault;
}

void relay_source(struct relay *relay, unsigned channel, int fd)
{
	struct channel *c = &relay->channels[channel];
	c->source = fd;
	c->limit = UINT64_MAX;
	c->dry_is_end = false;
}

void relay_sink(struct relay *relay, unsigned channel, int fd, enum sink_kind kind)
{
	struct channel *c = &relay->channels[channel];
	struct stat facts;
	c->sink = fd;
	c->kind = kind;
	c->receives = true;
	c->sink_ends = false;
	c->window = WINDOW_BYTES;
	c->owed = 0;
	if (kind == SINK_FOREIGN && fstat(fd, &facts) == 0) {
		c->foreign_is_file = S_ISREG(facts.st_mode);
		c->foreign_is_socket = S_ISSOCK(facts.st_mode);
	}
}

void relay_connection(struct relay *relay, unsigned channel, int fd, enum sink_kind kind)
{
	relay_source(relay, channel, fd);
	relay_sink(relay, channel, fd, kind);
	relay->channels[channel].never_half_close = true;
}

static void close_sink(struct channel *c)
{
	if (c->sink >= 0 && c->sink != c->source)
		close(c->sink);
	c->sink = -1;
	c->hold_start = 0;
	c->hold_used = 0;
	free(c->hold);
	c->hold = NULL;
}

void relay_close_source(struct relay *relay, unsigned channel)
{
	struct channel *c = &relay->channels[channel];
	if (c->source >= 0 && c->source != c->sink)
		close(c->source);
	c->source = -1;
}

void relay_close_channel(struct relay *relay, unsigned channel)
{
	struct channel *c = &relay->channels[channel];
	relay_close_source(relay, channel);
	close_sink(c);
	c->receives = false;
}

void relay_drain(struct relay *relay, unsigned channel, bool is_terminal)
{
	struct channel *c = &relay->channels[channel];
	int readable = 0;
	if (c->source < 0)
		return;
	c->dry_is_end = true;
	if (is_terminal)
		/* A terminal hands over in the background what was written to it, so its count says little. */
		c->limit = TERMINAL_DRAIN_BYTES;
	else if (ioctl(c->source, FIONREAD, &readable) == 0)
		c->limit = (uint64_t)readable;
	if (c->limit == 0)
		relay_close_source(relay, channel);
}

/* --- out --- */

static size_t out_pending(const struct relay *relay)
{
	return relay->out_end - relay->out_start;
}

bool relay_has_room(const struct relay *relay)
{
	return !relay->gone && out_pending(relay) < OUT_HIGH_BYTES;
}

static unsigned char *out_place(struct relay *relay, size_t length)
{
	if (relay->out_end + length > OUT_BYTES) {
		memmove(relay->out, relay->out + relay->out_start, out_pending(relay));
		relay->out_end -= relay->out_start;
		relay->out_start = 0;
	}
	return relay->out_end + length > OUT_BYTES ? NULL : relay->out + relay->out_end;
}

static void put_head(unsigned char *place, enum frame_type type, unsigned channel, size_t length)
{
	uint32_t length_le = htole32((uint32_t)length);
	place[0] = (unsigned char)type;
	place[1] = (unsigned char)channel;
	place[2] = 0;
	place[3] = 0;
	memcpy(place + 4, &length_le, sizeof length_le);
}

static void flush_out(struct relay *relay)
{
	while (!relay->gone && out_pending(relay) > 0) {
		ssize_t put = write(relay->fd, relay->out + relay->out_start, out_pending(relay));
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0 && errno == EAGAIN)
			return;
		if (put <= 0) {
			/* What the peer said before it left may still be readable, so the end is found by reading. */
			relay->out_start = relay->out_end = 0;
			return;
		}
		relay->out_start += (size_t)put;
	}
	if (out_pending(relay) == 0)
		relay->out_start = relay->out_end = 0;
}

void relay_send(struct relay *relay, enum frame_type type, unsigned channel, const void *payload, size_t length)
{
	if (relay->gone)
		return;
	unsigned char *place = out_place(relay, FRAME_HEAD_BYTES + length);
	if (place == NULL) {
		fail(relay, "nothing, and takes nothing");
		return;
	}
	put_head(place, type, channel, length);
	if (length > 0)
		memcpy(place + FRAME_HEAD_BYTES, payload, length);
	relay->out_end += FRAME_HEAD_BYTES + length;
	flush_out(relay);
}

void relay_send_number(struct relay *relay, enum frame_type type, unsigned channel, uint32_t number)
{
	uint32_t number_le = htole32(number);
	relay_send(relay, type, channel, &number_le, sizeof number_le);
}

static int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool relay_send_start(struct relay *relay, const char *records, size_t length, int timeout_s)
{
	int64_t until = now_ms() + (int64_t)timeout_s * 1000;
	size_t sent = 0;
	while (sent < length && !relay->gone) {
		size_t piece = length - sent < FRAME_PAYLOAD_MAX_BYTES ? length - sent : FRAME_PAYLOAD_MAX_BYTES;
		int64_t left = until - now_ms();
		if (left <= 0)
			return false;
		if (relay_has_room(relay)) {
			relay_send(relay, FRAME_START, sent + piece < length ? 1 : 0, records + sent, piece);
			sent += piece;
			continue;
		}
		struct pollfd link = {.fd = relay->fd, .events = POLLOUT};
		if (poll(&link, 1, (int)left) > 0 && (link.revents & (POLLERR | POLLHUP)) != 0)
			return false;
		flush_out(relay);
	}
	return !relay->gone;
}

static void source_ends(struct relay *relay, unsigned channel)
{
	relay_close_source(relay, channel);
	relay_send(relay, FRAME_EOF, channel, NULL, 0);
}

static void read_source(struct relay *relay, unsigned channel)
{
	struct channel *c = &relay->channels[channel];
	size_t most = CHUNK_BYTES;
	if (most > c->credit)
		most = c->credit;
	if (most > c->limit)
		most = (size_t)c->limit;
	unsigned char *place = out_place(relay, FRAME_HEAD_BYTES + CHUNK_BYTES);
	if (place == NULL || most == 0)
		return;
	ssize_t got = read(c->source, place + FRAME_HEAD_BYTES, most);
	if (got < 0 && (errno == EINTR || errno == EAGAIN)) {
		if (errno == EAGAIN && c->dry_is_end)
			relay_close_source(relay, channel);
		return;
	}
	if (got <= 0) { /* EIO is how a terminal says that nobody has it open any more */
		source_ends(relay, channel);
		return;
	}
	put_head(place, FRAME_DATA, channel, (size_t)got);
	relay->out_end += FRAME_HEAD_BYTES + (size_t)got;
	c->credit -= (uint32_t)got;
	if (c->limit != UINT64_MAX)
		c->limit -= (uint64_t)got;
	if (c->limit == 0)
		relay_close_source(relay, channel);
}

/* --- in --- */

static ssize_t write_sink(const struct channel *c, const char *data, size_t length)
{
	if (c->kind == SINK_OWN || c->foreign_is_file)
		return write(c->sink, data, length);
	if (c->foreign_is_socket)
		return send(c->sink, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
	struct pollfd ready = {.fd = c->sink, .events = POLLOUT};
	if (poll(&ready, 1, 0) <= 0) {
		errno = EAGAIN;
		return -1;
	}
	return write(c->sink, data, length < FOREIGN_WRITE_BYTES ? length : FOREIGN_WRITE_BYTES);
}

static void sink_breaks(struct relay *relay, unsigned channel)
{
	close_sink(&relay->channels[channel]);
	relay_send(relay, FRAME_BROKEN, channel, NULL, 0);
}

/* Writes what the sink takes now; returns how much that was. */
static size_t push(struct relay *relay, unsigned channel, const char *data, size_t length)
{
	struct channel *c = &relay->channels[channel];
	size_t done = 0;
	while (done < length) {
		ssize_t put = write_sink(c, data + done, length - done);
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0 && errno == EAGAIN)
			break;
		if (put <= 0) {
			sink_breaks(relay, channel);
			return length;
		}
		done += (size_t)put;
	}
	c->owed += (uint32_t)done;
	return done;
}

static void hold(struct channel *c, const char *data, size_t length)
{
	if (c->hold == NULL)
		c->hold = must_have(malloc(WINDOW_BYTES));
	size_t end = (c->hold_start + c->hold_used) % WINDOW_BYTES;
	size_t first = length < WINDOW_BYTES - end ? length : WINDOW_BYTES - end;
	memcpy(c->hold + end, data, first);
	memcpy(c->hold, data + first, length - first);
	c->hold_used += (uint32_t)length;
}

static void push_held(struct relay *relay, unsigned channel)
{
	struct channel *c = &relay->channels[channel];
	while (c->sink >= 0 && c->hold_used > 0) {
		size_t run = WINDOW_BYTES - c->hold_start;
		size_t length = c->hold_used < run ? c->hold_used : run;
		size_t put = push(relay, channel, c->hold + c->hold_start, length);
		if (c->sink < 0)
			return;
		c->hold_start = (uint32_t)((c->hold_start + put) % WINDOW_BYTES);
		c->hold_used -= (uint32_t)put;
		if (put < length)
			break;
	}
	if (c->sink >= 0 && c->sink_ends && c->hold_used == 0)
		close_sink(c);
}

static void give_credit(struct relay *relay, unsigned channel)
{
	struct channel *c = &relay->channels[channel];
	if (c->owed < WINDOW_BYTES / 4 || c->sink < 0 || !relay_has_room(relay))
		return;
	uint32_t owed = c->owed;
	c->owed = 0;
	c->window += owed;
	relay_send_number(relay, FRAME_CREDIT, channel, owed);
}

static void take_data(struct relay *relay, unsigned channel, const char *data, uint32_t length)
{
	struct channel *c = &relay->channels[channel];
	if (!c->receives || c->sink_ends || length > c->window) {
		fail(relay, "bytes that it had no leave to send");
		return;
	}
	c->window -= length;
	if (c->sink < 0)
		return; /* BROKEN is under way to the peer */
	size_t done = c->hold_used == 0 ? push(relay, channel, data, length) : 0;
	if (c->sink >= 0 && done < length)
		hold(c, data + done, length - done);
}

static void take_credit(struct relay *relay, unsigned channel, const char *payload, uint32_t length)
{
	struct channel *c = &relay->channels[channel];
	uint32_t more = 0;
	if (length == sizeof more)
		memcpy(&more, payload, sizeof more);
	more = le32toh(more);
	if (more == 0 || more > WINDOW_BYTES || c->credit + more > WINDOW_BYTES)
		fail(relay, "credit for bytes that were never sent");
	else
		c->credit += more;
}

static void take_frame(struct relay *relay, enum frame_type type, uint8_t channel, const char *payload,
		       uint32_t length)
{
	bool about_channel =
		type == FRAME_DATA || type == FRAME_EOF || type == FRAME_CREDIT || type == FRAME_BROKEN;
	if (about_channel && channel >= CHANNELS_MAX) {
		fail(relay, "a channel that does not exist");
		return;
	}
	switch (type) {
	case FRAME_DATA:
		take_data(relay, channel, payload, length);
		break;
	case FRAME_EOF:
		relay->channels[channel].sink_ends = !relay->channels[channel].never_half_close;
		push_held(relay, channel);
		break;
	case FRAME_CREDIT:
		take_credit(relay, channel, payload, length);
		break;
	case FRAME_BROKEN:
		relay_close_source(relay, channel);
		break;
	case FRAME_ABORT:
		fail(relay, "word that the session in the guest died");
		break;
	case FRAME_START:
	case FRAME_SIGNAL:
	case FRAME_WINSIZE:
	case FRAME_EXIT:
	case FRAME_RELAY:
	case FRAME_ERROR:
	case FRAME_OPEN:
	case FRAME_CLOSE:
	case FRAME_CONTROL:
	case FRAME_NAME:
	case FRAME_REFUSED:
	default:
		if (!relay->on_frame(relay, type, channel, payload, length))
			fail(relay, "a frame that has no place here");
	}
}

static void take_frames(struct relay *relay)
{
	while (!relay->gone && relay->in_end - relay->in_start >= FRAME_HEAD_BYTES) {
		const unsigned char *head = relay->in + relay->in_start;
		uint32_t length = 0;
		memcpy(&length, head + 4, sizeof length);
		length = le32toh(length);
		if (length > FRAME_PAYLOAD_MAX_BYTES) {
			fail(relay, "a frame that is too long");
			return;
		}
		if (relay->in_end - relay->in_start < FRAME_HEAD_BYTES + length)
			break;
		relay->in_start += FRAME_HEAD_BYTES + length;
		take_frame(relay, (enum frame_type)head[0], head[1], (const char *)head + FRAME_HEAD_BYTES, length);
	}
	memmove(relay->in, relay->in + relay->in_start, relay->in_end - relay->in_start);
	relay->in_end -= relay->in_start;
	relay->in_start = 0;
}

static void read_link(struct relay *relay)
{
	for (int i = 0; i < READS_PER_TURN && !relay->gone; i++) {
		ssize_t got = read(relay->fd, relay->in + relay->in_end, IN_BYTES - relay->in_end);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN)
			return;
		if (got <= 0) {
			relay->gone = true;
			return;
		}
		relay->in_end += (size_t)got;
		take_frames(relay);
	}
}

bool relay_is_delivered(const struct relay *relay)
{
	for (unsigned i = 0; i < CHANNELS_MAX; i++)
		if (relay->channels[i].hold_used > 0)
			return false;
	return true;
}

/* --- turns --- */

size_t relay_poll_set(struct relay *relay, struct pollfd *set)
{
	size_t count = 0;
	bool room = relay_has_room(relay);
	set[count++] = (struct pollfd){
		.fd = relay->gone ? -1 : relay->fd,
		.events = (short)(POLLIN | (out_pending(relay) > 0 ? POLLOUT : 0)),
	};
	for (unsigned i = 0; i < CHANNELS_MAX; i++) {
		struct channel *c = &relay->channels[i];
		c->source_slot = -1;
		c->sink_slot = -1;
		if (c->source >= 0 && c->credit > 0 && room) {
			c->source_slot = (short)count;
			set[count++] = (struct pollfd){.fd = c->source, .events = POLLIN};
		}
		if (c->sink >= 0 && c->hold_used > 0) {
			c->sink_slot = (short)count;
			set[count++] = (struct pollfd){.fd = c->sink, .events = POLLOUT};
		}
	}
	return count;
}

void relay_turn(struct relay *relay, const struct pollfd *set)
{
	if (set[0].revents != 0)
		read_link(relay);
	for (unsigned i = 0; i < CHANNELS_MAX; i++) {
		struct channel *c = &relay->channels[i];
		if (c->sink_slot >= 0 && c->sink >= 0 && set[c->sink_slot].revents != 0)
			push_held(relay, i);
		give_credit(relay, i);
		/* A drain must find its end also where poll has nothing to tell. */
		if (c->source >= 0 && c->credit > 0 && relay_has_room(relay) &&
		    (c->dry_is_end || (c->source_slot >= 0 && set[c->source_slot].revents != 0)))
			read_source(relay, i);
	}
	flush_out(relay);
}

void relay_abort_bytes(int fd)
{
	/* A frame that was cut off can swallow at most one payload; the head of zeros after it is FRAME_ABORT. */
	static const unsigned char zeros[FRAME_PAYLOAD_MAX_BYTES + FRAME_HEAD_BYTES];
	size_t sent = 0;
	while (sent < sizeof zeros) {
		ssize_t put = write(fd, zeros + sent, sizeof zeros - sent);
		struct pollfd room = {.fd = fd, .events = POLLOUT};
		if (put > 0)
			sent += (size_t)put;
		else if (put < 0 && errno == EAGAIN && poll(&room, 1, 1000) > 0 && (room.revents & POLLHUP) == 0)
			continue;
		else
			return;
	}
}
