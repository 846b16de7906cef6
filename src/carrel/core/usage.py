"""From rows of samples to what a job used: sums and peaks of one node and view.

Fed row by row, so that a week of samples needs no more memory than a second of them.
"""

from collections.abc import Mapping
from typing import Any

from carrel.model.job import Job
from carrel.model.sample import NodeSummary, Note, View

_PEAKS = (
    "job.memory_used_bytes",
    "job.memory_peak_bytes",
    "job.memory_limit_bytes",
    "processes.processes",
    "processes.resident_bytes",
)
_COUNTERS = (
    "job.cpu_ns",
    "job.cpu_system_ns",
    "job.throttled_ns",
    "job.oom_kills",
    "job.device_read_bytes",
    "job.device_write_bytes",
    "processes.cpu_ns",
    "processes.system_ns",
    "processes.io_wait_ns",
    "processes.read_bytes",
    "processes.written_bytes",
)
_WANTED = frozenset((*_PEAKS, *_COUNTERS))


def wanted(name: str) -> bool:
    """Return whether a column matters here; rows may have others."""
    return name in _WANTED or name.startswith("gpu.")


class _Gpu:
    """What one GPU did so far."""

    def __init__(self) -> None:
        self.busy_area = self.busy_us = 0.0
        self.ever_busy = False
        self.memory_peak = self.memory = 0.0
        self.energy_first: float | None = None
        self.energy_last = 0.0
        self._before: tuple[int, float] | None = None

    def take(self, time_us: int, metric: str, value: float) -> None:
        match metric:
            case "busy_percent":
                if self._before is not None:
                    before_us, before = self._before
                    self.busy_area += (value + before) / 2 * (time_us - before_us)
                    self.busy_us += time_us - before_us
                self._before = (time_us, value)
                self.ever_busy = self.ever_busy or value > 0
            case "memory_used_bytes":
                self.memory_peak = max(self.memory_peak, value)
            case "memory_bytes":
                self.memory = value
            case "energy_mj":
                self.energy_first = value if self.energy_first is None else self.energy_first
                self.energy_last = value

    @property
    def part(self) -> float | None:
        return self.busy_area / self.busy_us / 100 if self.busy_us else None


class Usage:
    """What was used so far."""

    def __init__(self, node: str, view: View) -> None:
        """Know nothing yet."""
        self.job: Job | None = None
        """As the last note that said so described it."""
        self.ended = False
        self._node = node
        self._view = view
        self._first_us = self._last_us = 0
        self._samples = 0
        self._gap_us = 0
        self._peaks: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._firsts: dict[str, float] | None = None
        """Where counters stood when the job began; None: at 0, as all that is counted began with it."""
        self._memory_area = self._memory_us = 0.0
        self._memory_before: tuple[int, float] | None = None
        self._cpu_before: tuple[int, float] | None = None
        self._cpu_peak: float | None = None
        self._gpus: dict[str, _Gpu] = {}

    def note(self, note: Note) -> None:
        """Take what a note says: whose job it is, where samples are missing, whether it has ended."""
        if note.job is not None:
            self.job = note.job
        if note.what == "gap" and note.from_us:
            self._gap_us += note.time_us - note.from_us
        if note.what == "older" and self._firsts is None:
            self._firsts = {}
        self.ended = note.what == "end" or (self.ended and note.what != "start")

    def row(self, time_us: int, values: Mapping[str, float]) -> None:
        """Take a row, in the order of time."""
        self._first_us = self._first_us or time_us
        self._last_us = time_us
        self._samples += 1
        for name in _PEAKS:
            if name in values:
                self._peaks[name] = max(values[name], self._peaks.get(name, 0))
        for name in _COUNTERS:
            if name in values:
                # A counter that fell began anew, in groups that another sampler saw: the most is the least it can be.
                self._counters[name] = max(values[name] - self._first(name, values), self._counters.get(name, 0))
        self._memory(time_us, values)
        self._cpu(time_us, values)
        for name, value in values.items():
            if name.startswith("gpu."):
                _, number, metric = name.split(".", 2)
                self._gpus.setdefault(number, _Gpu()).take(time_us, metric, value)

    def _first(self, name: str, values: Mapping[str, float]) -> float:
        return 0 if self._firsts is None else self._firsts.setdefault(name, values[name])

    def _memory(self, time_us: int, values: Mapping[str, float]) -> None:
        used = values.get("job.memory_used_bytes")
        if used is None:
            self._memory_before = None
            return
        if self._memory_before is not None:
            before_us, before = self._memory_before
            self._memory_area += (used + before) / 2 * (time_us - before_us)
            self._memory_us += time_us - before_us
        self._memory_before = (time_us, used)

    def _cpu(self, time_us: int, values: Mapping[str, float]) -> None:
        used = values.get("job.cpu_ns", values.get("processes.cpu_ns"))
        if used is None:
            return
        if self._cpu_before is not None:
            before_us, before = self._cpu_before
            # Over a hundredth of a second, one tick of a counter would look like a CPU.
            if time_us - before_us < 100_000:
                return
            self._cpu_peak = max(self._cpu_peak or 0.0, (used - before) / 1000 / (time_us - before_us))
        self._cpu_before = (time_us, used)

    def summary(self) -> NodeSummary | None:
        """Return the sums; None where there was no row."""
        if not self._samples:
            return None
        count, peak = self._counters.get, self._peaks.get
        return NodeSummary(
            node=self._node,
            view=self._view,
            first_s=self._first_us / 1e6,
            last_s=self._last_us / 1e6,
            samples=self._samples,
            gap_s=self._gap_us / 1e6,
            cpus=self.job.cpus if self.job else 0,
            memory_limit_bytes=int(peak("job.memory_limit_bytes", 0)) or (self.job.memory_bytes if self.job else 0),
            cpu_s=_scaled(count("job.cpu_ns", count("processes.cpu_ns")), 1e-9),
            cpu_system_s=_scaled(count("job.cpu_system_ns", count("processes.system_ns")), 1e-9),
            cpu_peak=self._cpu_peak,
            memory_peak_bytes=_whole(peak("job.memory_used_bytes", peak("processes.resident_bytes"))),
            memory_mean_bytes=_whole(self._memory_area / self._memory_us if self._memory_us else None),
            memory_cached_peak_bytes=_whole(peak("job.memory_peak_bytes")),
            read_bytes=_larger(count("processes.read_bytes"), count("job.device_read_bytes")),
            written_bytes=_larger(count("processes.written_bytes"), count("job.device_write_bytes")),
            io_wait_s=_scaled(count("processes.io_wait_ns"), 1e-9),
            throttled_s=_scaled(count("job.throttled_ns"), 1e-9),
            oom_kills=_whole(count("job.oom_kills")),
            processes_peak=_whole(peak("processes.processes")),
            **self._gpu_sums(),
        )

    def _gpu_sums(self) -> dict[str, Any]:
        """Return the fields of a summary that are about GPUs; none where none was seen."""
        gpus = list(self._gpus.values())
        if not gpus:
            return {}
        parts = [gpu.part for gpu in gpus if gpu.part is not None]
        fullest = max(gpus, key=lambda gpu: gpu.memory_peak)
        energies = [gpu.energy_last - gpu.energy_first for gpu in gpus if gpu.energy_first is not None]
        return {
            "gpus": len(gpus),
            "gpus_idle": sum(gpu.part is not None and not gpu.ever_busy for gpu in gpus),
            "gpu_part": round(sum(parts) / len(parts), 6) if parts else None,
            "gpu_memory_peak_bytes": _whole(fullest.memory_peak or None),
            "gpu_memory_bytes": _whole(fullest.memory or None),
            "gpu_energy_j": _scaled(sum(energies), 1e-3) if len(energies) == len(gpus) else None,
        }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else round(value * factor, 6)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _larger(one: float | None, other: float | None) -> int | None:
    """Each of two accounts misses something: processes that ended between two looks, writes that nobody is charged."""
    known = [value for value in (one, other) if value is not None]
    return round(max(known)) if known else None
