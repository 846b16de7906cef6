"""What is measured of a job: columns with units, what a node saw in sum, and how well it was seen.

A value is absent, never 0, where it could not be read.
"""

from typing import Literal, NamedTuple

import msgspec

from carrel.model.job import Job, JobKey

Kind = Literal["counter", "gauge"]
View = Literal["host", "guest"]
"""Who looked: the node from outside, or the guest from inside."""


class OnGuestNode(NamedTuple):
    """A run on a guest that is a Slurm node: its host may carry several guests of one run."""

    run: JobKey
    node: str

    def __str__(self) -> str:
        """Return it as it stands in file names."""
        return f"{self.run}.{self.node}"


Series = JobKey | OnGuestNode
"""What a sampler samples: a run on its own node, or on a guest that is one."""


class Column(msgspec.Struct, frozen=True):
    """One series of numbers."""

    name: str
    unit: str
    """``ns``, ``us``, ``ms``, ``ticks``, ``bytes``, ``KiB``, ``pages``, ``sectors``, ``count``, ``percent``, ``mW``,
    ``mJ``, ``celsius``, ``MHz``; or empty."""
    kind: Kind = "gauge"
    """A counter only grows, except when its source begins anew."""


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """The columns that one source gives together."""

    set: str
    """``meminfo``, ``cpu``, ``job``, ``process`` …"""
    columns: tuple[Column, ...]
    source: str
    """The files read, for people."""
    instance: str = ""
    """Which one of several, where each has a schema of its own: the PID of a process."""
    label: str = ""
    """What people call the instance: the name of a process's program."""
    floating: bool = False
    """The values are binary64; else unsigned 64-bit integers."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the columns' full names: ``meminfo.MemFree``."""
        return tuple(f"{self.set}.{column.name}" for column in self.columns)


class Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that a reader of the numbers should know."""

    time_us: int
    what: Literal[
        "start", "end", "gap", "interval", "degraded", "restored", "failed", "clock", "cgroup", "tags", "older"
    ]
    """``older``: what is counted was there before the job, so the job's are the increases since the first row."""
    text: str
    from_us: int = 0
    """Of a gap: the last sample before it."""
    job: Job | None = None
    """Of ``start`` and ``tags``: what is known of the job."""
    cost_us: dict[str, float] = {}
    """Of ``end``: CPU time of one reading, for each source."""


class NodeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the job used on one node, from its first to its last sample."""

    node: str
    view: View
    first_s: float
    last_s: float
    samples: int
    gap_s: float = 0.0
    """Time without samples that should have had some."""
    cpus: int = 0
    """CPUs that the job had here; 0: not known."""
    memory_limit_bytes: int = 0
    """0: not known, or no limit."""
    cpu_s: float | None = None
    cpu_system_s: float | None = None
    cpu_peak: float | None = None
    """Most CPUs busy between two samples."""
    memory_peak_bytes: int | None = None
    """Most anonymous plus shared memory in any sample: what the job cannot do without."""
    memory_mean_bytes: int | None = None
    memory_cached_peak_bytes: int | None = None
    """The kernel's own peak, page cache included; it sees between samples."""
    read_bytes: int | None = None
    written_bytes: int | None = None
    io_wait_s: float | None = None
    """Time in which some process of the job waited for a disk."""
    throttled_s: float | None = None
    oom_kills: int | None = None
    processes_peak: int | None = None
    gpus: int = 0
    """GPUs of the job that were seen here."""
    gpus_idle: int = 0
    """Of them, those that were never busy."""
    gpu_part: float | None = None
    """Mean of how busy they were, of 1."""
    gpu_memory_peak_bytes: int | None = None
    """Most on any one of them."""
    gpu_memory_bytes: int | None = None
    """What that one has."""
    gpu_energy_j: float | None = None


class JobSummary(msgspec.Struct, frozen=True, kw_only=True):
    """``summary.json``: the whole job in one small file."""

    run: str
    job: Job
    nodes: tuple[NodeSummary, ...]
    complete: bool
    """Every view of every node that began has ended."""


class SeriesFile(msgspec.Struct, frozen=True, kw_only=True):
    """What ``job.json`` says of the samples of one node and view."""

    node: str
    view: View
    files: tuple[str, ...]
    rows: int
    complete: bool
    version: str
    kernel: str
    constants: dict[str, int | float]
    """Columns that never changed; they are in no other file."""
    units: dict[str, str]
    counters: tuple[str, ...]
    sources: dict[str, str]
    """Which file each set came from."""
    cost_us: dict[str, float] = {}
    notes: tuple[Note, ...] = ()
    """Gaps, changes of the interval, sources that were read less often to save time."""
    clock_ticks_per_s: int = 100
    page_bytes: int = 4096


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """``job.json``: what the numbers beside it mean."""

    run: str
    job: Job
    series: tuple[SeriesFile, ...]
    format: int = 1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """All that was read at one moment. ``seq`` counts from 0 in each series, so a row has one name for ever."""

    seq: int
    time_us: int
    values: dict[str, int | float]


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A note of a series; ``seq`` counts notes as that of ``Row`` counts rows."""

    seq: int
    note: Note


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive rows of one job on one node, as a sink gets them. A gap in ``seq`` is what was dropped."""

    job: Job
    node: str
    view: View
    rows: tuple[Row, ...] = ()
    notes: tuple[Told, ...] = ()
    columns: dict[str, Column] = {}
    """What the metrics are, also some that are in none of these rows."""
    ended: bool = False
    """Nothing will follow."""

    @property
    def series(self) -> str:
        """Return the name of the series: ``alpha.4711.1731000000.0/c1/host``; with ``seq``, that of a row."""
        return f"{self.job.key.cluster}.{self.job.key}/{self.node}/{self.view}"


class SamplerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the sampler of a node is doing."""

    jobs: int = 0
    samples: int = 0
    cost_us: dict[str, float] = {}
    """CPU time of one reading, for each source."""
    stretched: dict[str, int] = {}
    """Sources read only every so many samples, to stay within the budget."""
    failures: dict[str, int] = {}
    """What went wrong, and how often."""
    last_failure: str = ""
    awake_s: float = 0.0
    """When its thread last looked at the time; 0: never."""
    fault: str = ""
    """Why jobs are not sampled now as they should be; empty: they are."""
