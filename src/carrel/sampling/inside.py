"""The inside of a guest, read from outside: its files come through a port of its carrel-agent, and are parsed here.

So no image needs an interpreter, and what both views call by one name is read by the same code. All files of a sample
come in one exchange: each one costs the guest a turn of its port.

Whoever is root in there may answer anything. So an answer is bounded in bytes and in time, a number is made to fit, and
a file whose shape changes again and again is not read any more: each shape is described in the samples, once for ever.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from carrel.sampling import node
from carrel.sampling.blocks import Block, Layout, Opened, Source
from carrel.sampling.cgroup import GroupSource, JobGroups
from carrel.sampling.processes import ProcessSource, Seen, parsed

SESSIONS = "/sys/fs/cgroup/carrel"
"""The agent's group in its guest: below it is a group for each task."""
SHAPES_MAX = 16
ANSWER_MAX_BYTES = 2**20
_CONTROL = 13
_HEAD = struct.Struct("<BBHI")
_NUMBER = struct.Struct("<I")


class GuestFiles:
    """One stream to one guest. Only the sampler's thread uses it."""

    def __init__(self, descriptor: int, *, timeout_s: float) -> None:
        """Take over a connected stream.

        Args:
            descriptor: The host's end of a port ``carrel.m.*``.
            timeout_s: A guest that does not answer in time has gone, as far as this stream is concerned.
        """
        self.gone = False
        """Nothing will ever come from it again."""
        self.why = ""
        self._socket = socket.socket(fileno=descriptor)
        self._timeout_s = timeout_s
        self._fast: list[str] = []
        self._cached: dict[str, bytes] = {}
        self._processes: bytes | None = None

    def open(self, path: Path, *, slow: bool = False) -> Opened:
        """Return what reads a file, and what closes it; ``slow``: apart from all others, whenever it is wanted.

        Raises:
            OSError: it is not there, or the guest does not answer.
        """
        name = str(path)
        if not self._exchange([name])[0]:
            raise FileNotFoundError(2, "not in the guest", name)
        if slow:
            return lambda: self._exchange([name])[0], _nothing
        self._fast.append(name)
        return partial(self._read, name), partial(self._fast.remove, name)

    def forget(self) -> None:
        """A new sample begins: what it reads shall be of now."""
        self._cached = {}
        self._processes = None

    def _read(self, name: str) -> bytes:
        if name not in self._cached:
            self._refill()
        return self._cached.pop(name)

    def processes(self) -> list[tuple[bytes, bytes]]:
        """Return (stat, io) of each process of all tasks.

        Raises:
            OSError: the guest does not answer.
        """
        if self._processes is None:
            self._refill()
        raw, self._processes = self._processes or b"", None
        parts = _parts(raw)
        return list(zip(parts[::2], parts[1::2], strict=False))

    def _refill(self) -> None:
        *files, processes = self._exchange(self._fast, SESSIONS)
        self._cached = dict(zip(self._fast, files, strict=True))
        self._processes = processes

    def _exchange(self, files: Sequence[str], processes: str = "") -> list[bytes]:
        """Ask for files; return their contents, and what there is of processes last.

        Raises:
            OSError: the guest does not answer, or not as an agent does; it will not be asked again.
        """
        if self.gone:
            raise ConnectionAbortedError(103, self.why)
        words = ["verb=read", *(f"file={name}" for name in files), *([f"processes={processes}"] if processes else [])]
        body = b"".join(word.encode() + b"\0" for word in words)
        deadline_s = time.monotonic() + self._timeout_s
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.sendall(_HEAD.pack(_CONTROL, 0, 0, len(body)) + body)
            (length,) = _NUMBER.unpack(self._receive(_NUMBER.size, deadline_s))
            if length > ANSWER_MAX_BYTES:
                raise ConnectionAbortedError(103, f"the guest wants to say {length} bytes")
            found = _parts(self._receive(length, deadline_s))
            if len(found) != len(files) + bool(processes):
                raise ConnectionAbortedError(103, f"the guest answered {len(found)} of {len(files)} files")
        except (OSError, ValueError) as error:
            self.gone = True
            self.why = f"{error or 'no answer'}"
            raise ConnectionAbortedError(103, self.why) from error
        return found

    def _receive(self, count: int, deadline_s: float) -> bytes:
        parts: list[bytes] = []
        while count:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no answer within {self._timeout_s:g} s")
            self._socket.settimeout(left_s)
            part = self._socket.recv(min(count, 1 << 18))
            if not part:
                raise ConnectionResetError(104, "the guest closed its port")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def abandon(self) -> None:
        """End the stream, from any thread; who waits for an answer has none to expect."""
        self.gone = True
        self.why = self.why or "nobody wants to know any more"
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the descriptor; only the sampler's thread may."""
        self.gone = True
        self._socket.close()


class _Bounded:
    """A source whose shape may change only so often."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.period_s = source.period_s
        self._source = source
        self._shapes: set[int] = set()

    def read(self) -> list[Block]:
        if len(self._shapes) > SHAPES_MAX:
            return []
        try:
            blocks = self._source.read()
        except OSError:
            raise
        except Exception as error:  # whatever it is, the guest has said it
            raise ValueError(f"{self.name} of the guest: {error!r}") from error
        self._shapes |= {block.layout.number for block in blocks}
        return blocks

    def close(self) -> None:
        self._source.close()


class _GuestGroup(GroupSource):
    """The group of all tasks, as its guest tells it."""

    def read(self) -> list[Block]:
        try:
            return super().read()
        except OSError:
            raise
        except Exception as error:  # whatever it is, the guest has said it
            raise ValueError(f"the guest's control group: {error!r}") from error


class GuestProcesses(ProcessSource):
    """All processes of all tasks in a guest."""

    def __init__(self, files: GuestFiles, *, period_s: float) -> None:
        """Look nowhere yet; see ``ProcessSource``."""
        super().__init__("", period_s=period_s)
        self._files = files
        self._layouts: dict[int, Layout] = {}

    def read(self) -> list[Block]:
        seen: dict[int, Seen] = {}
        for stat, counted in self._files.processes():
            try:
                pid = int(stat.partition(b" ")[0])
                seen[pid] = parsed(stat, counted, self._layouts.get(pid))
            except (ValueError, IndexError):
                continue  # it ended meanwhile
        self._layouts = {pid: one.block.layout for pid, one in seen.items()}
        return self._summed(seen, len(seen)) if seen or self._last else []


def sources(files: GuestFiles, *, slow_period_s: float) -> list[Source]:
    """Return what the guest's kernel offers of the machine that it takes itself for."""
    return [_Bounded(source) for source in node.sources(slow_period_s=slow_period_s, opened=files.open)]


def job_source(files: GuestFiles) -> GroupSource | None:
    """Return the counters of all tasks in the guest; None: its kernel has none."""
    found = _GuestGroup(JobGroups(unified=SESSIONS), opened=files.open)
    return found if found.columns else None


def _parts(raw: bytes) -> list[bytes]:
    """Cut what has its length in front.

    Raises:
        ValueError: the last one is cut off.
    """
    found, at = [], 0
    while at < len(raw):
        if len(raw) - at < _NUMBER.size:
            raise ValueError(f"{len(raw) - at} bytes too many")
        (length,) = _NUMBER.unpack_from(raw, at)
        at += _NUMBER.size
        if at + length > len(raw):
            raise ValueError(f"{at + length - len(raw)} bytes are missing")
        found.append(raw[at : at + length])
        at += length
    return found


def _nothing() -> None:
    """A file that is read whenever it is wanted needs no end."""
