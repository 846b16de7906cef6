/* The relay protocol, version 1: how a task's streams, signals and end travel between carrel-enter and carrel-agent.
 *
 * docs/reference/relay-protocol.md is the text of the contract; this header is its numbers.
 */
#ifndef CARREL_PROTOCOL_H
#define CARREL_PROTOCOL_H

#include <stdint.h>

#define CARREL_PROTOCOL_VERSION 1
#define CARREL_VERSION "0.1.0"

#define FRAME_HEAD_BYTES 8u
#define FRAME_PAYLOAD_MAX_BYTES 65536u
#define WINDOW_BYTES 262144u           /* what may be under way on a channel before a CREDIT returns */
#define START_MAX_BYTES (16u << 20)    /* argv, environment and batch script together */
#define CHANNELS_MAX 40u

enum frame_type {
	FRAME_ABORT = 0,    /* the sender died; see relay_abort_bytes() for why it is zero */
	FRAME_START = 1,    /* records; channel 1: another piece follows */
	FRAME_DATA = 2,     /* bytes of a channel */
	FRAME_EOF = 3,      /* no more bytes on this channel */
	FRAME_CREDIT = 4,   /* u32: as many bytes were taken from the channel and may be sent again */
	FRAME_SIGNAL = 5,   /* u32 signal number; channel 0: everything of the session, 1: its leader */
	FRAME_WINSIZE = 6,  /* u16 rows, u16 columns */
	FRAME_EXIT = 7,     /* u32 raw wait status, u32 processes killed for memory where any were; nothing follows */
	FRAME_RELAY = 8,    /* text id: a command inside asks for a stream carrel.r.<id> */
	FRAME_ERROR = 9,    /* text: one sentence; nothing follows */
	FRAME_BROKEN = 10,  /* nobody reads this channel any more: stop sending */
	FRAME_OPEN = 11,    /* a connection inside begins on this channel; text names its kind */
	FRAME_CLOSE = 12,   /* that connection is over in both directions */
	FRAME_CONTROL = 13, /* records; on the control port only */
	FRAME_NAME = 14,    /* text: over a unix socket, the name that a port would have had */
	FRAME_REFUSED = 15, /* text id, NUL, sentence: the answer to RELAY when there will be no stream */
};

enum { CHANNEL_STDIN = 0, CHANNEL_STDOUT = 1, CHANNEL_STDERR = 2, CHANNEL_PMI = 3, CHANNEL_CONNECTION_FIRST = 8 };
enum { SIGNAL_ALL = 0, SIGNAL_LEADER = 1 };

#endif
