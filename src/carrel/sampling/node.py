"""What a whole node does, from ``/proc``: each file opened once and read again with ``pread``.

A file that this kernel lacks is left out. Names are the kernel's own, so that its documentation is ours; the two files
without names (``stat``, ``diskstats``) get those of proc(5).
"""

import re
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

from carrel.model.sample import Column, Schema
from carrel.sampling.blocks import Block, Layout, Opener, open_file

SLOW_PERIOD_S = 60.0

_CPU = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
_DISK = (
    ("reads", "count", "counter"),
    ("reads_merged", "count", "counter"),
    ("read_sectors", "sectors", "counter"),
    ("read_ms", "ms", "counter"),
    ("writes", "count", "counter"),
    ("writes_merged", "count", "counter"),
    ("written_sectors", "sectors", "counter"),
    ("write_ms", "ms", "counter"),
    ("in_flight", "count", "gauge"),
    ("busy_ms", "ms", "counter"),
    ("weighted_ms", "ms", "counter"),
)
_NET = (
    *(("rx_bytes", 0), ("rx_packets", 1), ("rx_errors", 2), ("rx_dropped", 3)),
    *(("tx_bytes", 8), ("tx_packets", 9), ("tx_errors", 10), ("tx_dropped", 11)),
)
_PRESSURES = ("cpu", "memory", "io")
_PSEUDO_DISK = re.compile(r"(?:loop|ram|zram)\d+")
_PSEUDO_DISK_ROW = re.compile(_PSEUDO_DISK.pattern.encode())
_VMSTAT_NR_COUNTERS = {"nr_dirtied", "nr_written", "nr_vmscan_write", "nr_vmscan_immediate_reclaim"}
_UNSAFE = re.compile(r"[^A-Za-z0-9_()-]+")

Parsed = tuple[Hashable, Sequence[float]]


class FileSource:
    """One file of the kernel. Its columns are described anew when the file's shape changes: a disk came, a CPU left."""

    def __init__(
        self,
        name: str,
        path: Path,
        parse: Callable[[bytes], Parsed],
        describe: Callable[[bytes], Sequence[Column]],
        *,
        period_s: float = 0.0,
        floating: bool = False,
        opened: Opener = open_file,
    ) -> None:
        """Open the file.

        Args:
            name: Name of the set.
            path: The file.
            parse: Returns the file's shape and its values.
            describe: Returns the columns, in the order of the values.
            period_s: See ``Source``.
            floating: The values are no integers.
            opened: What opens it.

        Raises:
            OSError: there is no such file.
        """
        self.name = name
        self.period_s = period_s
        self._path = path
        self._parse = parse
        self._describe = describe
        self._floating = floating
        self._shape: Hashable = None
        self._layout: Layout | None = None
        self._before = b""
        self._blocks: list[Block] = []
        self._data, self._close = opened(path, slow=period_s > 0)

    def read(self) -> list[Block]:
        data = self._data()
        if data == self._before:  # much of a node rests: what it said is known already
            return self._blocks
        shape, values = self._parse(data)
        if self._layout is None or shape != self._shape:
            columns = tuple(self._describe(data))
            schema = Schema(set=self.name, columns=columns, source=str(self._path), floating=self._floating)
            self._layout, self._shape = Layout(schema), shape
        self._before, self._blocks = data, [self._layout.block(values)]
        return self._blocks

    def close(self) -> None:
        self._close()


def sources(
    proc: Path = Path("/proc"), *, slow_period_s: float = SLOW_PERIOD_S, opened: Opener = open_file
) -> list[FileSource]:
    """Return the sources that a kernel offers: this one, or the one whose files ``opened`` opens."""
    file = partial(FileSource, opened=opened)
    wanted: list[Callable[[], FileSource]] = [
        lambda: file("meminfo", proc / "meminfo", Every(1, 2, skip=b"kB"), _meminfo_columns),
        lambda: file("vmstat", proc / "vmstat", Every(1, 2), _vmstat_columns),
        lambda: file("loadavg", proc / "loadavg", _loadavg, _loadavg_columns, floating=True),
        lambda: file("cpu", proc / "stat", _stat, _stat_columns),
        lambda: file(
            "disk",
            proc / "diskstats",
            _Rows(header=0, name=2, fields=range(3, 14), leave=_PSEUDO_DISK_ROW),
            _disk_columns,
        ),
        lambda: file(
            "net", proc / "net" / "dev", _Rows(header=2, name=0, fields=[1 + at for _, at in _NET]), _net_columns
        ),
        lambda: file("interrupts", proc / "interrupts", _interrupts, _interrupt_columns, period_s=slow_period_s),
        *(
            partial(file, f"pressure_{name}", proc / "pressure" / name, pressure, pressure_columns)
            for name in _PRESSURES
        ),
    ]
    found = []
    for make in wanted:
        try:
            source = make()
        except OSError:
            continue
        try:
            source.read()
        except OSError:  # pressure: compiled in and switched off
            source.close()
            continue
        found.append(source)
    return found


class Every:
    """Takes each n-th word of a file, as ``name value`` lines need it."""

    def __init__(self, first: int, step: int, *, skip: bytes = b"") -> None:
        """Take words ``first``, ``first + step`` …; words that are ``skip`` do not count."""
        self._cut = slice(first, None, step)
        self._skip = skip

    def __call__(self, data: bytes) -> Parsed:
        """Return the number of words, and the numbers."""
        # One pass of C over the text: taking the unit away first is cheaper than choosing words in Python.
        words = (data.replace(self._skip, b"") if self._skip else data).split()
        return len(words), list(map(int, words[self._cut]))


def _meminfo_columns(data: bytes) -> list[Column]:
    found = []
    for line in data.decode().splitlines():
        name, value = line.split(":")
        found.append(Column(_UNSAFE.sub("_", name), "KiB" if value.endswith("kB") else "count"))
    return found


def _vmstat_columns(data: bytes) -> list[Column]:
    names = data.decode().split()[::2]
    kinds = [("pages", "gauge") if _is_gauge(name) else ("count", "counter") for name in names]
    return [Column(_UNSAFE.sub("_", name), *kind) for name, kind in zip(names, kinds, strict=True)]  # type: ignore[arg-type]  # a kind by construction


def _is_gauge(name: str) -> bool:
    return name.startswith("nr_") and name not in _VMSTAT_NR_COUNTERS


def _loadavg(data: bytes) -> Parsed:
    one, five, fifteen, tasks, last = data.split()
    running, _, all_ = tasks.partition(b"/")
    return 1, (float(one), float(five), float(fifteen), float(running), float(all_), float(last))


def _loadavg_columns(_: bytes) -> list[Column]:
    loads = [Column(f"load{minutes}", "") for minutes in (1, 5, 15)]
    return [*loads, Column("runnable", "count"), Column("threads", "count"), Column("last_pid", "count")]


def _stat(data: bytes) -> Parsed:
    cpus, _, rest = data.partition(b"intr ")
    words = cpus.split()
    width = 1 + len(_CPU)
    del words[::width]
    tail = rest[rest.index(b"\nctxt") :].split()
    return len(words), [*map(int, words), int(tail[1]), int(tail[5]), int(tail[7]), int(tail[9])]


def _stat_columns(data: bytes) -> list[Column]:
    lines = data.partition(b"intr ")[0].decode().splitlines()
    found = []
    for line in lines:
        name = line.split()[0]
        number = name.removeprefix("cpu")
        found += [Column(f"{number}.{state}" if number else state, "ticks", "counter") for state in _CPU]
    switches = [Column("context_switches", "count", "counter"), Column("forks", "count", "counter")]
    return [*found, *switches, Column("running", "count"), Column("blocked", "count")]


class _Rows:
    """Takes some numbers of each row of a file, whose rows all have as many words."""

    def __init__(
        self, *, header: int, name: int, fields: Sequence[int], leave: re.Pattern[bytes] | None = None
    ) -> None:
        """Take words ``fields`` of each row, after ``header`` lines; leave out rows whose word ``name`` matches."""
        self._header = header
        self._name = name
        self._fields = fields
        self._leave = leave
        self._names: list[bytes] = []
        self._shape: Hashable = None
        self._take: Callable[[list[bytes]], Sequence[bytes]] = tuple

    def __call__(self, data: bytes) -> Parsed:
        """Return the names and the numbers."""
        at = 0
        for _ in range(self._header):
            at = data.index(b"\n", at) + 1
        words = data[at:].split()
        width = len(words) // (data.count(b"\n") - self._header or 1)
        names = words[self._name :: width] if width else []
        if names != self._names:
            self._remember(names, width)
        return self._shape, list(map(int, self._take(words)))

    def _remember(self, names: list[bytes], width: int) -> None:
        leave = self._leave
        rows = [row for row, name in enumerate(names) if leave is None or not leave.fullmatch(name)]
        places = [row * width + field for row in rows for field in self._fields]
        # itemgetter returns no tuple for one place; there are none or many.
        self._take = itemgetter(*places) if places else lambda _: ()
        self._names, self._shape = names, (width, *(names[row] for row in rows))


def _disk_columns(data: bytes) -> list[Column]:
    names = (line.split()[2] for line in data.decode().splitlines())
    real = (_UNSAFE.sub("_", name) for name in names if not _PSEUDO_DISK.fullmatch(name))
    return [Column(f"{name}.{what}", unit, kind) for name in real for what, unit, kind in _DISK]  # type: ignore[arg-type]  # a kind by construction


def _net_columns(data: bytes) -> list[Column]:
    names = [line.rpartition(":")[0].strip() for line in data.decode(errors="replace").splitlines()[2:]]
    return [
        Column(f"{_UNSAFE.sub('_', name)}.{what}", "bytes" if what.endswith("bytes") else "count", "counter")
        for name in names
        for what, _ in _NET
    ]


def _interrupts(data: bytes) -> Parsed:
    """Sum over the CPUs: a column for each of them would be most of all columns and tell nobody anything."""
    lines = data.splitlines()
    cpus = len(lines[0].split())
    names, values = [], []
    for line in lines[1:]:
        words = line.split(None, cpus + 1)
        names.append(words[0])
        values.append(sum(int(word) for word in words[1 : cpus + 1] if word.isdigit()))
    return tuple(names), values


def _interrupt_columns(data: bytes) -> list[Column]:
    lines = data.decode(errors="replace").splitlines()
    cpus = len(lines[0].split())
    found = []
    for line in lines[1:]:
        words = line.split(None, cpus + 1)
        name = words[0].rstrip(":")
        device = words[-1].split()[-1] if name.isdigit() and len(words) > cpus + 1 else ""
        found.append(Column(_UNSAFE.sub("_", f"{name}-{device}" if device else name), "count", "counter"))
    return found


def pressure(data: bytes) -> Parsed:
    """Read a pressure file: the totals alone, since averages can be had from them."""
    totals = [int(line.rpartition(b"=")[2]) for line in data.splitlines()]
    return len(totals), totals


def pressure_columns(data: bytes) -> list[Column]:
    """Name what ``pressure`` returns."""
    return [Column(f"{line.split()[0].decode()}_us", "us", "counter") for line in data.splitlines()]
