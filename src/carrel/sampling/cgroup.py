"""What one job uses, from its control groups, version 1 and 2 alike.

The job's directories are found from one of its processes and never from a template of a path: Slurm calls them
``job_4711`` or by the SLUID, below ``slurm``, ``slurm_<node>`` or ``slurmstepd.scope``, and only a step's directory is
called ``step_*`` everywhere. The directory above the step is the job's.

Names and units are the same for both versions; what a kernel or a site does not count is absent.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from carrel.model.sample import Column, Schema
from carrel.sampling.blocks import Block, Layout, Opener, open_file

HELD = "carrel.sampler"
"""Directory that keeps the job's own, and so its counters, until they were read for the last time."""
_REMOVE_TIMEOUT_S = 2.0
_RETRY_S = 0.01
_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")
_UNLIMITED = 2**62
"""Version 1 says "no limit" with a number near 2^63."""


class JobGroups(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job is counted: the directory in each hierarchy in which it has one of its own."""

    unified: str = ""
    v1: dict[str, str] = {}
    """By controller: ``memory``, ``cpuacct``, ``cpu``, ``blkio``, ``pids``, ``freezer``."""

    @property
    def any(self) -> bool:
        return bool(self.unified or self.v1)

    @property
    def processes(self) -> str:
        """Return the hierarchy in which the job's processes are best looked for; empty: none.

        Of those that count, since the processes of a guest are in no freezer: Slurm shall not stop them with a step.
        """
        return next((self.v1[name] for name in ("memory", "cpuacct", "freezer") if name in self.v1), self.unified)

    def joined(self, other: "JobGroups") -> "JobGroups":
        """Return these and what only the other has: a process may have been put into some of its groups only."""
        return JobGroups(unified=self.unified or other.unified, v1={**other.v1, **self.v1})


def _job_part(path: str) -> str | None:
    parts = path.rstrip("/").split("/")
    for at, part in enumerate(parts):
        if part.startswith("step_") and at > 1:
            return "/".join(parts[:at])
    return None


def of_process(pid: int, *, proc: Path = Path("/proc"), part: Callable[[str], str | None] = _job_part) -> JobGroups:
    """Return the groups of the job that a process belongs to.

    A process that is in no step's group has none: its own may be that of a whole service, or of the node.

    Args:
        pid: The process.
        proc: Where processes are.
        part: Returns which part of a group's path is the job's; None: the job has no group there.

    Raises:
        OSError: the process is gone.
    """
    mounts = _mounts(proc)
    unified, v1 = "", {}
    for line in (proc / str(pid) / "cgroup").read_text(errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        job = part(path)
        if job is None:
            continue
        for controller in controllers.split(","):
            if (mounted := mounts.get(controller)) is None:
                continue
            where = mounted + job
            if controller:
                v1[controller] = where
            else:
                unified = where
    return JobGroups(unified=unified, v1=v1)


def of_guest_node(pid: int, node: str) -> JobGroups:
    """Return the groups of a guest that is a Slurm node, its tasks' among them; ``pid`` is its process.

    carreld has made them: the guest is there before its job. None where it has made none.

    Raises:
        OSError: the process is gone.
    """
    return of_process(pid, part=lambda path: _guest_node_part(path, node))


def _guest_node_part(path: str, node: str) -> str | None:
    top, _, last = path.rpartition("/")
    return top if last == "carrel" and top.endswith(f"/slurm_{node}") else None


def _mounts(proc: Path) -> dict[str, str]:
    """Return where each v1 controller is mounted, and the unified hierarchy under the name ``""``."""
    found: dict[str, str] = {}
    # Users may mount too (FUSE), on a directory whose name is no UTF-8.
    for line in (proc / "self" / "mounts").read_text(errors="surrogateescape").splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup":
            for controller in options.split(","):
                found.setdefault(controller, where)
        elif kind == "cgroup2":
            found.setdefault("", where)
    return found


Extract = Callable[[bytes], Sequence[int]]


class _File:
    """One open file of a group and the columns that it gives."""

    __slots__ = ("_before", "_data", "_extract", "_values", "close", "columns", "path")

    def __init__(self, path: Path, columns: Sequence[Column], extract: Extract, opened: Opener) -> None:
        """Open it and read it once: a controller may be there and answer nothing.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not say what it should.
        """
        self.path = path
        self.columns = tuple(columns)
        self._extract = extract
        self._data, self.close = opened(path)
        self._before = b""
        self._values: Sequence[int] = ()
        try:
            self.read()
        except (OSError, ValueError, KeyError, IndexError):
            self.close()
            raise

    def read(self) -> Sequence[int]:
        """Return the values of the columns.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not say what it should.
        """
        data = self._data()
        if data != self._before:  # of a job's files, few change between two samples
            self._values, self._before = self._extract(data), data
        return self._values


class GroupSource:
    """The counters of one job. Slurm may remove and make its groups between two steps: counters then go on."""

    def __init__(self, groups: JobGroups, *, carried: dict[str, int] | None = None, opened: Opener = open_file) -> None:
        """Open what is there.

        Args:
            groups: The job's directories.
            carried: What an earlier incarnation of the groups had counted, as ``totals`` returned it.
            opened: What opens their files.
        """
        self.name = "job"
        self.period_s = 0.0
        self.groups = groups
        self._files = _opened(groups, opened)
        columns = [column for file in self._files for column in file.columns]
        names = [column.name for column in columns]
        self._adds = [(carried or {}).get(column.name, 0) if column.kind == "counter" else 0 for column in columns]
        self._carries = any(self._adds)
        self._used = (
            (names.index("memory_anon_bytes"), names.index("memory_shmem_bytes"))
            if ("memory_anon_bytes" in names)
            else None
        )
        if self._used:
            columns.append(Column("memory_used_bytes", "bytes"))
        where = " ".join(dict.fromkeys(str(file.path) for file in self._files))
        self.columns = tuple(columns)
        self._layout = Layout(Schema(set="job", columns=self.columns, source=where))
        self._last: list[int] = []

    def read(self) -> list[Block]:
        values: list[int] = []
        for file in self._files:
            values += file.read()
        if self._carries:
            values = list(map(int.__add__, values, self._adds))
        if self._used:
            values.append(values[self._used[0]] + values[self._used[1]])
        self._last = values
        return [self._layout.block(values)] if values else []

    def totals(self) -> dict[str, int]:
        """Return the counters as they were last read."""
        columns = self._layout.schema.columns
        return {c.name: v for c, v in zip(columns, self._last, strict=False) if c.kind == "counter"}

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def _opened(groups: JobGroups, opened: Opener) -> list[_File]:
    """Return the files that exist; the first one that gives a column wins."""
    found: list[_File] = []
    taken: set[str] = set()
    for path, columns, extract in _wanted(groups):
        if {column.name for column in columns} & taken:
            continue
        try:
            found.append(_File(path, columns, extract, opened))
        except (OSError, ValueError, KeyError, IndexError):
            continue
        taken |= {column.name for column in columns}
    return found


def _wanted(groups: JobGroups) -> list[tuple[Path, list[Column], Extract]]:
    wanted: list[tuple[Path, list[Column], Extract]] = []
    v1 = {name: Path(where) for name, where in groups.v1.items()}
    if "memory" in v1:
        wanted += _memory_v1(v1["memory"])
    if "cpuacct" in v1:
        wanted += _cpu_v1(v1["cpuacct"])
    if "cpu" in v1:
        wanted.append((v1["cpu"] / "cpu.stat", [_counter("throttled_ns", "ns")], _Keys(("throttled_time", 1))))
    if "pids" in v1:
        wanted.append((v1["pids"] / "pids.current", [Column("tasks", "count")], _one))
    if "blkio" in v1:
        for file, unit in (("io_service_bytes", "bytes"), ("io_serviced", "count")):
            path = v1["blkio"] / f"blkio.throttle.{file}_recursive"
            wanted.append((path, _device_columns(unit), _blkio))
    if groups.unified:
        wanted += _unified(Path(groups.unified))
    return wanted


def _memory_v1(path: Path) -> list[tuple[Path, list[Column], Extract]]:
    stat = _Keys(
        ("total_rss", 1),
        ("total_cache", 1),
        ("total_shmem", 1),
        ("total_mapped_file", 1),
        ("total_pgfault", 1),
        ("total_pgmajfault", 1),
    )
    return [
        (path / "memory.stat", _memory_columns(), stat),
        (path / "memory.usage_in_bytes", [Column("memory_bytes", "bytes")], _one),
        (path / "memory.max_usage_in_bytes", [Column("memory_peak_bytes", "bytes")], _one),
        (path / "memory.limit_in_bytes", [Column("memory_limit_bytes", "bytes")], _limit),
    ]


def _cpu_v1(path: Path) -> list[tuple[Path, list[Column], Extract]]:
    split = [_counter("cpu_user_ns", "ns"), _counter("cpu_system_ns", "ns")]
    return [
        (path / "cpuacct.usage", [_counter("cpu_ns", "ns")], _one),
        (path / "cpuacct.stat", split, _Keys(("user", _TICK_NS), ("system", _TICK_NS))),
    ]


def _unified(path: Path) -> list[tuple[Path, list[Column], Extract]]:
    cpu = [_counter("cpu_ns", "ns"), _counter("cpu_user_ns", "ns"), _counter("cpu_system_ns", "ns")]
    stat = _Keys(("anon", 1), ("file", 1), ("shmem", 1), ("file_mapped", 1), ("pgfault", 1), ("pgmajfault", 1))
    wanted: list[tuple[Path, list[Column], Extract]] = [
        (path / "cpu.stat", cpu, _Keys(("usage_usec", 1000), ("user_usec", 1000), ("system_usec", 1000))),
        (path / "cpu.stat", [_counter("throttled_ns", "ns")], _Keys(("throttled_usec", 1000))),
        (path / "memory.stat", _memory_columns(), stat),
        (path / "memory.current", [Column("memory_bytes", "bytes")], _one),
        (path / "memory.peak", [Column("memory_peak_bytes", "bytes")], _one),
        (path / "memory.max", [Column("memory_limit_bytes", "bytes")], _limit),
        (path / "memory.swap.current", [Column("swap_bytes", "bytes")], _one),
        (path / "memory.events", [_counter("oom_kills", "count")], _Keys(("oom_kill", 1))),
        (path / "pids.current", [Column("tasks", "count")], _one),
        (path / "io.stat", [*_device_columns("bytes"), *_device_columns("count")], _io_stat),
    ]
    for name in ("cpu", "memory", "io"):
        columns = [_counter(f"{name}_some_us", "us"), _counter(f"{name}_full_us", "us")]
        wanted.append((path / f"{name}.pressure", columns, _pressure))
    return wanted


def _counter(name: str, unit: str) -> Column:
    return Column(name, unit, "counter")


def _memory_columns() -> list[Column]:
    gauges = [Column(f"memory_{what}_bytes", "bytes") for what in ("anon", "cache", "shmem", "mapped")]
    return [*gauges, _counter("page_faults", "count"), _counter("page_faults_major", "count")]


def _device_columns(unit: str) -> list[Column]:
    return [_counter(f"device_read_{unit}", unit), _counter(f"device_write_{unit}", unit)]


class _Keys:
    """Takes named lines of a flat ``name value`` file. Their places are remembered, as a kernel does not move them."""

    def __init__(self, *wanted: tuple[str, int]) -> None:
        """Take these names, each multiplied by its factor."""
        self._wanted = [(name.encode(), factor) for name, factor in wanted]
        self._places: list[tuple[int, bytes, int]] = []

    def __call__(self, data: bytes) -> list[int]:
        """Return the values in the order of the names.

        Raises:
            ValueError: a name is missing.
        """
        words = data.split()
        for at, name, _ in self._places:
            if at >= len(words) or words[at - 1] != name:
                self._places = []
                break
        if not self._places:
            self._places = [(words.index(name) + 1, name, factor) for name, factor in self._wanted]
        return [int(words[at]) * factor for at, _, factor in self._places]


def _one(data: bytes) -> list[int]:
    return [int(data)]


def _limit(data: bytes) -> list[int]:
    """Return the limit; 0 stands for none, as it does for Slurm."""
    value = 0 if data.startswith(b"max") else int(data)
    return [value if value < _UNLIMITED else 0]


def _blkio(data: bytes) -> list[int]:
    read = write = 0
    for line in data.splitlines():
        words = line.split()
        if words[1] == b"Read":
            read += int(words[2])
        elif words[1] == b"Write":
            write += int(words[2])
    return [read, write]


def _io_stat(data: bytes) -> list[int]:
    sums = {b"rbytes": 0, b"wbytes": 0, b"rios": 0, b"wios": 0}
    for word in data.split():
        name, _, value = word.partition(b"=")
        if name in sums:
            sums[name] += int(value)
    return list(sums.values())


def _pressure(data: bytes) -> list[int]:
    totals = [int(line.rpartition(b"=")[2]) for line in data.splitlines()]
    return [totals[0], totals[1]]


def hold(groups: JobGroups) -> None:
    """Keep Slurm's directories of the job: slurmstepd removes them, and the last counters, before any epilog."""
    for where in _counted(groups):
        # Gone already, or a hierarchy that we may not write: then the last sample is the last that was in time.
        with contextlib.suppress(OSError):
            (where / HELD).mkdir()


def release(groups: JobGroups) -> None:
    """Remove what ``hold`` made, and the job's directories where nothing else is in them. A second call is fine."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    for where in _counted(groups):
        with contextlib.suppress(OSError):
            (where / HELD).rmdir()
            _remove_empty(where, deadline)


def _counted(groups: JobGroups) -> list[Path]:
    v1 = [groups.v1[name] for name in ("memory", "cpuacct", "cpu", "blkio", "pids") if name in groups.v1]
    return [Path(where) for where in dict.fromkeys([*v1, groups.unified]) if where]


def _remove_empty(job: Path, deadline: float) -> None:
    """Remove the job's directory and its user's as slurmstepd would have, under the lock that it takes for that.

    It makes ``uid_U``, ``job_J`` and ``step_S`` under a lock of the mount point; without it a new job could lose the
    directory between two of its mkdir.
    """
    top = next((path for path in job.parents if path.is_mount()), None)
    if top is None or job.parent == top:
        return
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return
                time.sleep(_RETRY_S)
        with contextlib.suppress(OSError):  # somebody is in it, so it is theirs
            job.rmdir()
            if job.parent.name.startswith("uid_"):
                job.parent.rmdir()
    finally:
        os.close(descriptor)
