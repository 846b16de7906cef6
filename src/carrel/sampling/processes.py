"""The processes of one job: each by itself, and their sum, which lasts when they are gone.

The kernel adds what a reaped child used to its parent. So the sum over the living, children included, holds what the
dead used as long as their parents live; what an orphan had is carried from its last reading.

Version 1 control groups charge buffered writes to nobody: there, these sums are the only account of a job's I/O.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from carrel.model.sample import Column, Schema
from carrel.process import children
from carrel.sampling.blocks import Block, Layout

PROCESSES_MAX = 256
"""Descriptors are not for the taking: of more processes, only as many are read, and the sum says of how many."""
DENSE_S = 10.0
"""So long after its start a job's processes are read at each sample: a short job has no other time."""

_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")
_MANAGER = b"slurmstepd\n"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROCESS = (
    Column("pid", "count"),
    Column("parent", "count"),
    Column("threads", "count"),
    Column("user_ns", "ns", "counter"),
    Column("system_ns", "ns", "counter"),
    Column("page_faults_major", "count", "counter"),
    Column("virtual_bytes", "bytes"),
    Column("resident_bytes", "bytes"),
    Column("io_wait_ns", "ns", "counter"),
    Column("read_chars", "bytes", "counter"),
    Column("written_chars", "bytes", "counter"),
    Column("read_calls", "count", "counter"),
    Column("write_calls", "count", "counter"),
    Column("read_bytes", "bytes", "counter"),
    Column("written_bytes", "bytes", "counter"),
)
_SUM = (
    Column("processes", "count"),
    Column("processes_read", "count"),
    Column("threads", "count"),
    Column("resident_bytes", "bytes"),
    Column("cpu_ns", "ns", "counter"),
    Column("system_ns", "ns", "counter"),
    Column("io_wait_ns", "ns", "counter"),
    Column("read_chars", "bytes", "counter"),
    Column("written_chars", "bytes", "counter"),
    Column("read_bytes", "bytes", "counter"),
    Column("written_bytes", "bytes", "counter"),
)
_SUMMED = len([column for column in _SUM if column.kind == "counter"])


class Seen(NamedTuple):
    """One reading of one process."""

    parent: int
    threads: int
    resident: int
    sums: tuple[int, ...]
    """In the order of the counters of ``_SUM``, reaped children included."""
    block: Block


class _Process:
    """One process, by descriptors that name it and no later one of its number."""

    __slots__ = ("_io", "_layout", "_stat", "pid")

    def __init__(self, pid: int, proc: Path) -> None:
        """Open it.

        Raises:
            OSError: it is gone, or not ours to look at.
        """
        self.pid = pid
        self._stat = os.open(proc / str(pid) / "stat", os.O_RDONLY | os.O_CLOEXEC)
        self._io = -1
        self._layout: Layout | None = None
        try:
            self._io = os.open(proc / str(pid) / "io", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def read(self) -> Seen:
        """Read it.

        Raises:
            OSError: it is gone.
        """
        seen = parsed(os.pread(self._stat, 4096, 0), os.pread(self._io, 4096, 0), self._layout)
        self._layout = seen.block.layout
        return seen

    def close(self) -> None:
        for descriptor in (self._stat, self._io):
            if descriptor >= 0:
                os.close(descriptor)


def parsed(stat: bytes, counted: bytes, layout: Layout | None) -> Seen:
    """Return what ``/proc/PID/stat`` and ``io`` say; ``layout``: of an earlier reading of the same process.

    Raises:
        ValueError, IndexError: it is gone.
    """
    head, _, tail = stat.rpartition(b")")  # a name may itself hold a parenthesis
    pid, _, name = head.partition(b" (")
    field = tail.split()
    io = [int(word) for word in counted.split()[1::2]]
    user, system = int(field[11]) * _TICK_NS, int(field[12]) * _TICK_NS
    waited = int(field[39]) * _TICK_NS
    resident = int(field[21]) * _PAGE
    parent, threads = int(field[1]), int(field[17])
    if layout is None:
        label, source = name.decode(errors="replace"), "/proc/PID/stat /proc/PID/io"
        layout = Layout(Schema(set="process", columns=_PROCESS, source=source, instance=str(int(pid)), label=label))
    row = (int(pid), parent, threads, user, system, int(field[9]), int(field[20]), resident, waited, *io[:6])
    own_and_reaped = sum(map(int, field[11:15])) * _TICK_NS
    sums = (own_and_reaped, (int(field[12]) + int(field[14])) * _TICK_NS, waited, io[0], io[1], io[4], io[5])
    return Seen(parent, threads, resident, sums, layout.block(row))


class ProcessSource:
    """All processes of a job."""

    def __init__(self, where: str, *, period_s: float, root_pid: int = 0, proc: Path = Path("/proc")) -> None:
        """Look nowhere yet.

        Args:
            where: The job's control group; empty: there is none.
            period_s: See ``Source``.
            root_pid: Without a group, this process and its descendants are the job's; ``add_root`` adds more.
            proc: Where processes are.
        """
        self.name = "processes"
        self.period_s = period_s
        self._where = where
        self._roots: dict[int, bytes] = {}
        """When each of them began: its number may be another's some day."""
        self._proc = proc
        self._known: dict[int, _Process] = {}
        self._last: dict[int, Seen] = {}
        self._carried = [0] * _SUMMED
        self._most = [0] * _SUMMED
        self._layout = Layout(Schema(set="processes", columns=_SUM, source="/proc/PID/stat /proc/PID/io"))
        self.add_root(root_pid)

    def add_root(self, pid: int) -> None:
        """Without a group: this process and its descendants are the job's too."""
        if pid and (began := _began(pid, self._proc)):
            self._roots[pid] = began

    def read(self) -> list[Block]:
        pids = group_pids(self._where) if self._where else self._below_roots()
        if not pids and not self._known:
            return []  # nothing has started yet, or all has ended: absent, not 0
        seen = self._look(pids)
        for pid in self._last.keys() - seen.keys():
            self._known.pop(pid).close()
        return self._summed(seen, len(pids))

    def _summed(self, seen: dict[int, Seen], count: int) -> list[Block]:
        for pid in self._last.keys() - seen.keys():
            if self._last[pid].parent not in seen:
                self._carried = list(map(int.__add__, self._carried, self._last[pid].sums))
        self._last = seen
        sums = map(sum, zip(self._carried, *(one.sums for one in seen.values()), strict=True))
        # A child may be reaped between the readings of its parent and of itself; a counter never falls.
        self._most = list(map(max, self._most, sums))
        threads = sum(one.threads for one in seen.values())
        resident = sum(one.resident for one in seen.values())
        whole = self._layout.block((count, len(seen), threads, resident, *self._most))
        return [whole, *(one.block for one in seen.values())]

    def _below_roots(self) -> list[int]:
        self._roots = {pid: began for pid, began in self._roots.items() if _began(pid, self._proc) == began}
        return sorted({pid for root in self._roots for pid in descendants(root, self._proc)})

    def _look(self, pids: Iterable[int]) -> dict[int, Seen]:
        seen: dict[int, Seen] = {}
        for pid in pids:
            process = self._known.get(pid)
            try:
                if process is None:
                    if len(self._known) >= PROCESSES_MAX:
                        continue
                    process = self._known[pid] = _Process(pid, self._proc)
                seen[pid] = process.read()
            except (OSError, IndexError):  # it has ended meanwhile, or ends now: its descriptor names no other
                if process is not None and pid not in self._last:
                    self._known.pop(pid).close()
        return seen

    def close(self) -> None:
        for process in self._known.values():
            process.close()
        self._known = {}


def _began(pid: int, proc: Path) -> bytes:
    """Return when a process began, in ticks since boot; empty: there is none."""
    try:
        return (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return b""


def group_pids(where: str) -> list[int]:
    """Return the processes in a control group and below it; none where it is gone."""
    found: list[int] = []
    for directory, _, files in os.walk(where):
        if "cgroup.procs" in files:
            try:
                descriptor = os.open(f"{directory}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                while chunk := os.read(descriptor, 1 << 16):
                    found += map(int, chunk.split())
            except OSError:
                continue
            finally:
                os.close(descriptor)
    return found


def descendants(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and all that descend from it; Slurm's own manager of a step is not the job's."""
    found, look = [], [pid]
    while look:
        one = look.pop()
        look += children(one, proc)
        with contextlib.suppress(OSError):
            if (proc / str(one) / "comm").read_bytes() != _MANAGER:
                found.append(one)
    return found
