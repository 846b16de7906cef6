"""Readings: rows of numbers packed once, however many jobs store them."""

import itertools
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from carrel.model.sample import Schema

_LARGEST = 2**64 - 1
_PAGE_BYTES = 4096
_AS_BEFORE = 2**32 - 1
_DIGITS = b"0" + b"1" * 255
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
        """Return the blocks as differences to ``before``, without their zeros; ``None``: in full.

        Most counters rest, so the exclusive or of two rows is mostly zeros: 400 values become about 300 bytes.
        """
        key = before.serial if before else 0
        found = self._deltas.get(key)
        if found is None:
            found = self._computed(before)
            if len(self._deltas) < CACHED_DELTAS:
                self._deltas[key] = found
        return found

    def _computed(self, before: "Reading | None") -> bytes:
        numbers = [block.layout.number for block in self.blocks]
        known = {block.layout.number: block.packed for block in before.blocks} if before else {}
        # Mostly the same sources as before: nothing needs to be said of them then.
        said = [_AS_BEFORE] if before and numbers == list(known) else [len(numbers), *numbers]
        earlier = b"".join([known.get(block.layout.number, block.layout.zeros) for block in self.blocks])
        now = b"".join([block.packed for block in self.blocks])
        return struct.pack(f"<{len(said)}I", *said) + squeezed(_xor(now, earlier))


def squeezed(data: bytes) -> bytes:
    """Return mostly zeros as: a mask of those bytes of a mask that are not zero; these; the bytes that are not zero.

    Each step is one pass of C. Deflate takes three times as long when it comes to cold caches, and makes more.
    """
    mask, rest = _without_zeros(data)
    return b"".join([*_without_zeros(mask), rest])


def _without_zeros(data: bytes) -> tuple[bytes, bytes]:
    mask = int(data.translate(_DIGITS) or b"0", 2).to_bytes((len(data) + 7) // 8, "big")
    return mask, data.translate(None, b"\0")


def spread(data: bytes, length: int) -> bytes:
    """Undo ``squeezed`` for data of this length.

    Raises:
        ValueError: it cannot be that.
    """
    upper = (length + 7) // 8
    cut = (upper + 7) // 8
    count = int.from_bytes(data[:cut], "big").bit_count()
    mask = _with_zeros(data[:cut], data[cut : cut + count], upper)
    return _with_zeros(mask, data[cut + count :], length)


def _with_zeros(mask: bytes, rest: bytes, length: int) -> bytes:
    bits = int.from_bytes(mask, "big")
    if bits.bit_count() != len(rest) or bits.bit_length() > length:
        raise ValueError(f"{len(rest)} bytes for {bits.bit_count()} places in {length}")
    found = bytearray(length)
    digits = f"{bits:0{length}b}"
    at = -1
    for byte in rest:
        at = digits.index("1", at + 1)
        found[at] = byte
    return bytes(found)


def _xor(now: bytes, before: bytes) -> bytes:
    return (int.from_bytes(now, "little") ^ int.from_bytes(before, "little")).to_bytes(len(now), "little")


def unpacked(blob: bytes, layouts: dict[int, Layout], before: dict[int, bytes]) -> dict[int, bytes]:
    """Undo ``delta``: return each layout's number and row, given what the blob before it returned.

    Raises:
        KeyError: it names a layout that was not described.
        ValueError, struct.error: it is damaged.
    """
    (count,) = struct.unpack_from("<I", blob)
    numbers = tuple(before)
    rest = blob[4:]
    if count != _AS_BEFORE:
        numbers = struct.unpack_from(f"<{count}I", rest)
        rest = rest[4 * count :]
    chosen = [layouts[number] for number in numbers]
    earlier = b"".join([before.get(layout.number, layout.zeros) for layout in chosen])
    rows = _xor(spread(rest, len(earlier)), earlier)
    found: dict[int, bytes] = {}
    at = 0
    for layout in chosen:
        found[layout.number] = rows[at : at + layout.packing.size]
        at += layout.packing.size
    return found


Opened = tuple[Callable[[], bytes], Callable[[], None]]
"""What reads a file, and what closes it."""


class Opener(Protocol):
    """Opens files of a kernel: of this one, or of a guest's."""

    def __call__(self, path: Path, *, slow: bool = False) -> Opened:
        """Open one; ``slow``: it is read more rarely than others.

        Raises:
            OSError: there is none.
        """
        ...


def open_file(path: Path, *, slow: bool = False) -> Opened:
    """Open a file of this kernel, once for all readings."""
    del slow  # here no file waits for another
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return partial(read_all, descriptor), partial(os.close, descriptor)


def read_all(descriptor: int) -> bytes:
    """Return all of a file of the kernel.

    It gives what fits its own buffer, so a short read is not the end: only an empty one is.
    """
    data = os.pread(descriptor, _PAGE_BYTES, 0)  # most files fit: to make room for 64 KiB takes as long as to read one
    if len(data) < 1024:  # smaller than any record that its buffer of a page could have had no room for
        return data
    parts = [data]
    at = len(data)
    while chunk := os.pread(descriptor, 1 << 16, at):
        parts.append(chunk)
        at += len(chunk)
    return b"".join(parts) if len(parts) > 1 else data
