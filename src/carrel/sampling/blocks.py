"""Readings: rows of numbers packed once, however many jobs store them."""

import itertools
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Protocol

from carrel.model.sample import Schema

_LARGEST = 2**64 - 1
_NUMBERS = itertools.count(1)
CACHED_DELTAS = 8
"""Jobs on one schedule share what was computed for the first; more schedules than this share less."""


class Layout:
    """A schema with what packs and unpacks its rows. Its number is never used again in this process."""

    __slots__ = ("number", "packing", "schema", "zeros")

    def __init__(self, schema: Schema) -> None:
        """Number the schema."""
        self.number = next(_NUMBERS)
        self.schema = schema
        self.packing = struct.Struct(f"<{len(schema.columns)}{'d' if schema.floating else 'Q'}")
        self.zeros = bytes(self.packing.size)

    def block(self, values: Sequence[float]) -> "Block":
        """Pack a row; what does not fit (the kernel knows few negative numbers) becomes the nearest that does."""
        try:
            packed = self.packing.pack(*values)
        except struct.error:
            packed = self.packing.pack(*(min(max(int(value), 0), _LARGEST) for value in values))
        return Block(self, packed)


class Block:
    """One row of one layout."""

    __slots__ = ("layout", "packed")

    def __init__(self, layout: Layout, packed: bytes) -> None:
        """Keep a row."""
        self.layout = layout
        self.packed = packed


class Source(Protocol):
    """Something that can be read again and again."""

    name: str
    period_s: float
    """Not read more often than this, except at the first and the last sample of a job."""

    def read(self) -> list[Block]:
        """Return what there is now.

        Raises:
            OSError: it cannot be read; it will be tried again.
        """
        ...

    def close(self) -> None:
        """Let go of its descriptors."""
        ...


class Reading:
    """The blocks that one moment gave, and their differences to earlier ones, each computed once."""

    __slots__ = ("_deltas", "blocks", "serial")
    _serials = itertools.count(1)

    def __init__(self, blocks: list[Block]) -> None:
        """Keep blocks; an equal serial means the same reading."""
        self.serial = next(Reading._serials)
        self.blocks = blocks
        self._deltas: dict[int, bytes] = {}

    def delta(self, before: "Reading | None") -> bytes:
        """Return the blocks as differences to ``before``, compressed; ``None``: in full.

        Most counters rest, so the exclusive or of two rows is mostly zeros: 400 values become about 400 bytes.
        """
        key = before.serial if before else 0
        found = self._deltas.get(key)
        if found is None:
            found = self._computed(before)
            if len(self._deltas) < CACHED_DELTAS:
                self._deltas[key] = found
        return found

    def _computed(self, before: "Reading | None") -> bytes:
        blocks = self.blocks
        known = {block.layout.number: block.packed for block in before.blocks} if before else {}
        earlier = b"".join([known.get(block.layout.number, block.layout.zeros) for block in blocks])
        now = b"".join([block.packed for block in blocks])
        head = struct.pack(f"<{len(blocks) + 1}I", len(blocks), *[block.layout.number for block in blocks])
        return _compressed(head + _xor(now, earlier))


def _compressed(data: bytes) -> bytes:
    """Compress with a small window: with zlib's usual one, most of the time goes into making 260 KB for it."""
    making = zlib.compressobj(1, zlib.DEFLATED, -12, 5)
    return making.compress(data) + making.flush()


def _xor(now: bytes, before: bytes) -> bytes:
    return (int.from_bytes(now, "little") ^ int.from_bytes(before, "little")).to_bytes(len(now), "little")


def unpacked(blob: bytes, layouts: dict[int, Layout], before: dict[int, bytes]) -> dict[int, bytes]:
    """Undo ``delta``: return each layout's number and row, given what the blob before it returned.

    Raises:
        KeyError: it names a layout that was not described.
        zlib.error, struct.error, OverflowError: it is damaged.
    """
    data = zlib.decompress(blob, -15)
    (count,) = struct.unpack_from("<I", data)
    chosen = [layouts[number] for number in struct.unpack_from(f"<{count}I", data, 4)]
    earlier = b"".join([before.get(layout.number, layout.zeros) for layout in chosen])
    rows = _xor(data[4 + 4 * count :], earlier)
    found: dict[int, bytes] = {}
    at = 0
    for layout in chosen:
        found[layout.number] = rows[at : at + layout.packing.size]
        at += layout.packing.size
    return found


def read_all(descriptor: int) -> bytes:
    """Return all of a file of the kernel.

    It gives what fits its own buffer, so a short read is not the end: only an empty one is.
    """
    data = os.pread(descriptor, 1 << 16, 0)
    if len(data) < 1024:  # smaller than any record that its buffer of a page could have had no room for
        return data
    parts = [data]
    at = len(data)
    while chunk := os.pread(descriptor, 1 << 16, at):
        parts.append(chunk)
        at += len(chunk)
    return b"".join(parts) if len(parts) > 1 else data
