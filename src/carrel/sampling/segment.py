r"""The file that a job's samples go to while it runs: appended to, and whole up to its last frame whatever happens.

::

    file    = "CARREL1\n" frame*
    frame   = length of body (u32)  CRC-32 of body (u32)  body
    body    = "S" number (u32)  JSON of a Schema           before its first row
            | "N" JSON of a Note
            | "R" time in us (u64)  (length (u32)  blob)*   a row: each blob is ``Reading.delta`` to the one that was
                                                           in its place before; an empty one says nothing
            | "K" like R, its blobs in full                 the first row of each writer, and every so often

    blob    = count (u32; 2^32 - 1: as in the blob before)  numbers of layouts (u32 each)  ``squeezed``: their rows, one
              after the other, exclusive or those of the same layouts in the blob before (else zeros); 64 bits a column

Numbers are little-endian. A reader stops at the first frame that is short or does not have its sum; a writer cuts the
file there and goes on, so that a row is there wholly or not at all.
"""

import contextlib
import functools
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from carrel.errors import CarrelError
from carrel.model.sample import Note, Schema
from carrel.sampling.blocks import Block, Layout, Reading, unpacked

MAGIC = b"CARREL1\n"
KEY_EVERY = 600
"""Rows between two that stand alone: a flaw in the middle costs so many at most."""
BODY_MAX = 64 * 2**20
"""A length beyond this is no length."""

_HEAD = struct.Struct("<II")
_PARTS = 2


class RowRead(NamedTuple):
    """A row as it stands in the file."""

    seq: int
    time_us: int
    blocks: list[Block]


class SegmentReader:
    """Reads a segment, also one that is still written: each call of ``entries`` goes on where the last one stopped."""

    def __init__(self, file: BinaryIO, *, name: str) -> None:
        """Read from ``file``, which must be seekable; ``name`` is for messages.

        Raises:
            CarrelError: it is no segment.
        """
        self.name = name
        self.rows = 0
        self.end = len(MAGIC)
        """Where the last whole frame ends."""
        self._file = file
        self._layouts: dict[int, Layout] = {}
        self._before: list[dict[int, bytes]] = []
        file.seek(0)
        start = file.read(len(MAGIC))
        if not MAGIC.startswith(start):
            raise CarrelError(f"{name}: not a file of samples; was it written by another program?")
        if len(start) < len(MAGIC):
            self.end = 0  # its writer died in its first write

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(self._layouts.values())

    def entries(self) -> Iterator[RowRead | Note]:
        """Yield what whole frames there are beyond those that were yielded before."""
        if self.end == 0:
            return
        self._file.seek(self.end)
        while True:
            head = self._file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            length, total = _HEAD.unpack(head)
            body = self._file.read(length) if length <= BODY_MAX else b""
            if not body or len(body) < length or zlib.crc32(body) != total:
                return
            try:
                entry = self._entry(body)
            except (KeyError, ValueError, msgspec.MsgspecError, struct.error):
                return  # with the right sum: its owner has edited the file
            self.end += _HEAD.size + length
            if entry is not None:
                yield entry

    def skip(self, count: int) -> None:
        """Pass over the first ``count`` rows and notes of the file; it stops before them where there are fewer.

        Of most frames only the head is read: the last row that stands alone is where unpacking begins.
        """
        passed = rows = 0
        place, found = self.end, (self.end, 0, 0)
        self._file.seek(place)
        while passed < count:
            head = self._file.read(_HEAD.size + 1)
            if len(head) <= _HEAD.size:
                break
            length = _HEAD.unpack_from(head)[0]
            kind = head[_HEAD.size :]
            if kind == b"K":
                found = (place, passed, rows)
            place += _HEAD.size + length
            passed += kind in (b"K", b"R", b"N")
            rows += kind in (b"K", b"R")
            if kind == b"S" and length <= BODY_MAX:
                self._entry(kind + self._file.read(length - 1))
            self._file.seek(place)
        self.end, passed, self.rows = found
        entries = self.entries()
        while passed < count and next(entries, None) is not None:
            passed += 1

    def _entry(self, body: bytes) -> RowRead | Note | None:
        match body[:1]:
            case b"S":
                layout = Layout(_schema(body[5:]))
                layout.number = int.from_bytes(body[1:5], "little")
                self._layouts[layout.number] = layout
                return None
            case b"N":
                return msgspec.json.decode(body[1:], type=Note)
            case b"R" | b"K":
                return self._row(body)
            case _:
                return None  # of a later version

    def _row(self, body: bytes) -> RowRead:
        time_us = int.from_bytes(body[1:9], "little")
        if body[:1] == b"K":
            self._before = []
        blocks: list[Block] = []
        at, place = 9, 0
        while at < len(body):
            size = int.from_bytes(body[at : at + 4], "little")
            at += 4
            if place == len(self._before):
                self._before.append({})
            if size:
                rows = unpacked(body[at : at + size], self._layouts, self._before[place])
                self._before[place] = rows
                blocks += [Block(self._layouts[number], packed) for number, packed in rows.items()]
            at += size
            place += 1
        self.rows += 1
        return RowRead(self.rows - 1, time_us, blocks)


class SegmentWriter:
    """Appends to a segment. Everything of one moment is one write."""

    def __init__(self, descriptor: int, *, name: str) -> None:
        """Take over ``descriptor``, open for reading and appending; cut off what an earlier writer left unfinished.

        Raises:
            CarrelError: the file is no segment.
            OSError: it cannot be written.
        """
        self.name = name
        self.last_us = 0
        """Time of the last row, also of an earlier writer; 0: there is none."""
        self.bytes_cut = 0
        self._descriptor = descriptor
        self._known: set[int] = set()
        self._before: list[Reading | None] = [None] * _PARTS
        self._since_key = 0
        self._synced = self._end = 0
        self.rows = self._recover()

    def _recover(self) -> int:
        with open(self._descriptor, "rb", closefd=False) as file:
            reader = SegmentReader(file, name=self.name)
            for entry in reader.entries():
                if isinstance(entry, RowRead):
                    self.last_us = entry.time_us
            size = file.seek(0, os.SEEK_END)
        self.bytes_cut = size - reader.end
        self._end = reader.end
        if self.bytes_cut:
            os.ftruncate(self._descriptor, self._end)
        if self._end == 0:
            self._write(MAGIC)
        return reader.rows

    @property
    def size(self) -> int:
        return self._end

    def row(self, time_us: int, readings: Sequence[Reading | None]) -> None:
        """Append a row; a reading that was in the row before is not stored again.

        Raises:
            OSError: it could not be written; nothing of it is in the file, and the next may fare better.
        """
        key = self._since_key % KEY_EVERY == 0
        before: list[Reading | None] = [None] * _PARTS if key else self._before
        blobs = [
            b"" if now is None or now is then else now.delta(then) for now, then in zip(readings, before, strict=True)
        ]
        described = self._described(readings)
        parts = [b"K" if key else b"R", time_us.to_bytes(8, "little")]
        for blob in blobs:
            parts += (len(blob).to_bytes(4, "little"), blob)
        frames = [_frame(b"S" + n.to_bytes(4, "little") + msgspec.json.encode(s)) for n, s in described.items()]
        self._write(b"".join([*frames, _frame(b"".join(parts))]))
        self._known |= described.keys()
        self._before = [now or then for now, then in zip(readings, before, strict=True)]
        self._since_key += 1
        self.rows += 1
        self.last_us = time_us

    def _described(self, readings: Sequence[Reading | None]) -> dict[int, Schema]:
        return {
            block.layout.number: block.layout.schema
            for reading in readings
            if reading is not None
            for block in reading.blocks
            if block.layout.number not in self._known
        }

    def note(self, note: Note) -> None:
        """Append a note.

        Raises:
            OSError: it could not be written.
        """
        self._write(_frame(b"N" + msgspec.json.encode(note)))

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            # The disk is full: half a frame would hide all that follow it.
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(data)

    def sync(self) -> None:
        """Bring to the disk what was written since the last call. Blocks; another thread may call it."""
        end = self._end
        if end != self._synced:
            os.fdatasync(self._descriptor)
            self._synced = end

    def close(self) -> None:
        os.close(self._descriptor)


@functools.lru_cache(maxsize=64)
def _schema(encoded: bytes) -> Schema:
    """Jobs of one node have most schemas in common: a thousand columns are kept once, whoever reads them."""
    return msgspec.json.decode(encoded, type=Schema)


def _frame(body: bytes) -> bytes:
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


@contextlib.contextmanager
def open_reader(path: Path) -> Iterator[SegmentReader]:
    """Open a segment for reading.

    Raises:
        CarrelError: there is none, or it is none.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CarrelError(f"{path}: {error.strerror}; are these your samples?") from error
    with file:
        yield SegmentReader(file, name=str(path))
