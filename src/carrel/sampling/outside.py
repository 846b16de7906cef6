"""A job's guests, seen from outside: how long their CPUs ran, and how long they had to wait for one of the node's.

What a guest takes for its own slowness is, seen from here, ``guest.vcpu_wait_ns``: its CPU wanted to run, and another
process ran. QEMU calls the threads that are a guest's CPUs ``CPU 0/KVM``, ``CPU 1/TCG``.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from carrel.model.sample import Column, Schema
from carrel.sampling.blocks import Block, Layout

_CPUS = (Column("vcpus", "count"), Column("vcpu_ns", "ns", "counter"), Column("vcpu_wait_ns", "ns", "counter"))
_DISK = (
    Column("read_bytes", "bytes", "counter"),
    Column("written_bytes", "bytes", "counter"),
    Column("reads", "count", "counter"),
    Column("writes", "count", "counter"),
)
DISK_NAMES = tuple(column.name for column in _DISK)


class GuestsOutside:
    """All guests of one job on this node. Sums go on when one of them is gone."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Know of no guest yet."""
        self._proc = proc
        self._cpus: dict[int, list[int]] = {}
        """Of each guest's process, its CPUs' open ``schedstat``."""
        self._last: dict[int, tuple[int, int]] = {}
        self._gone = (0, 0)
        self._disks: dict[str, tuple[int, ...]] = {}
        self._told = False
        self._layout = Layout(Schema(set="guest", columns=_CPUS, source="/proc/PID/task/TID/schedstat"))
        self._disk_layout = Layout(Schema(set="guest_disk", columns=_DISK, source="query-blockstats of QEMU"))

    def add(self, pid: int) -> None:
        """Look at one more guest's process; a second call changes nothing."""
        if pid in self._cpus:
            return
        opened: list[int] = []
        with contextlib.suppress(OSError):  # it ends just now
            for thread in sorted((self._proc / str(pid) / "task").iterdir()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # QEMU's workers come and go
                    if (thread / "comm").read_bytes().startswith(b"CPU "):
                        opened.append(os.open(thread / "schedstat", os.O_RDONLY | os.O_CLOEXEC))
        if opened:
            self._cpus[pid] = opened

    def tell(self, name: str, counters: Mapping[str, int]) -> None:
        """Take what a guest's disks did so far, as its hypervisor says."""
        self._disks[name] = tuple(counters.get(each, 0) for each in DISK_NAMES)
        self._told = True

    def read(self) -> list[Block]:
        blocks: list[Block] = []
        if self._cpus or self._last or any(self._gone):
            for pid in list(self._cpus):
                self._look(pid)
            sums = zip(self._gone, *self._last.values(), strict=True)
            blocks.append(self._layout.block((sum(map(len, self._cpus.values())), *map(sum, sums))))
        if self._told:
            self._told = False  # told anew only when it was read anew
            blocks.append(self._disk_layout.block([sum(each) for each in zip(*self._disks.values(), strict=True)]))
        return blocks

    def _look(self, pid: int) -> None:
        try:
            pairs = [os.pread(descriptor, 128, 0).split() for descriptor in self._cpus[pid]]
            self._last[pid] = (sum(int(pair[0]) for pair in pairs), sum(int(pair[1]) for pair in pairs))
        except (OSError, IndexError):  # it has ended
            self._close(pid)
            ran, waited = self._last.pop(pid, (0, 0))
            self._gone = (self._gone[0] + ran, self._gone[1] + waited)

    def _close(self, pid: int) -> None:
        for descriptor in self._cpus.pop(pid):
            os.close(descriptor)

    def close(self) -> None:
        for pid in list(self._cpus):
            self._close(pid)
