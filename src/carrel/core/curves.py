"""From recorded numbers to curves that a person can read: rates of counters, units, a few hundred points each.

A metric is shown by its own name, or by a word for what people ask about (``MEASURES``); such a word stands for the
first of several metrics that a node has, since kernels and sites count different things.
"""

import difflib
import fnmatch
import itertools
import statistics
from array import array
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from carrel.core.report import natural
from carrel.errors import NotFoundError
from carrel.model.sample import Column, View

CHARTS_MAX = 24
"""A pattern that means more metrics than this means too many."""


class Series(msgspec.Struct, kw_only=True):
    """One metric of one node and view, wherever it was read."""

    column: Column
    times_us: "array[int]"
    values: "array[float]"


class Recording(msgspec.Struct, kw_only=True):
    """What was recorded on one node, as seen from outside or from inside a guest."""

    node: str
    view: View
    first_us: int
    last_us: int
    series: dict[str, Series]
    names: dict[str, Column]
    """All metrics there are, also those that were not asked for."""
    gaps: tuple[tuple[int, int], ...] = ()
    """(last sample before, first one after), in us."""
    cpus: int = 0
    memory_limit_bytes: int = 0
    clock_ticks_per_s: int = 100
    page_bytes: int = 4096


class Measure(msgspec.Struct, frozen=True):
    """Something that people ask about."""

    name: str
    title: str
    metrics: tuple[str, ...]
    """Patterns; the first one that means something on a node is shown."""
    ceiling: str = ""
    """The attribute of a recording that says how much there was to have."""


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("cpu", "CPUs busy", ("job.cpu_ns", "processes.cpu_ns"), "cpus"),
        Measure("memory", "memory in use", ("job.memory_used_bytes", "processes.resident_bytes"), "memory_limit_bytes"),
        Measure("read", "read from storage", ("processes.read_bytes", "job.device_read_bytes")),
        Measure("written", "written to storage", ("processes.written_bytes", "job.device_write_bytes")),
        Measure("gpu", "GPU busy", ("gpu.*.busy_percent",)),
        Measure("gpu-memory", "GPU memory in use", ("gpu.*.memory_used_bytes",)),
        Measure("received", "received by the whole node", ("net.*.rx_bytes",)),
        Measure("sent", "sent by the whole node", ("net.*.tx_bytes",)),
    )
}
USUAL = ("cpu", "memory", "read", "written", "gpu", "gpu-memory")
"""What is shown where nothing is asked for; what a node does not have is left out."""


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a chart. A value of None breaks it: nobody knows what was there."""

    label: str
    times_s: tuple[float, ...]
    values: tuple[float | None, ...]

    @property
    def peak(self) -> float | None:
        return max((value for value in self.values if value is not None), default=None)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Curves of one unit over one span of time."""

    name: str
    title: str
    unit: str
    """``CPUs``, ``B``, ``B/s``, ``%``, ``/s`` …"""
    curves: tuple[Curve, ...]
    from_s: float
    to_s: float
    ceiling: float | None = None
    """How much there was to have; None: not known, or not the same everywhere."""


def chosen(words: Sequence[str], names: Iterable[str], *, job: str) -> list[Measure]:
    """Return what is asked for, in that order; without words, what is usual and there.

    Raises:
        NotFoundError: the job has no such metric; the sentence names the nearest.
    """
    known = sorted(set(names))
    if not words:
        return [MEASURES[word] for word in USUAL if _of(MEASURES[word], known)]
    found: list[Measure] = []
    for word in words:
        measure = MEASURES.get(word)
        if measure is not None and _of(measure, known):
            found.append(measure)
            continue
        metrics = fnmatch.filter(known, word)
        if not metrics:
            near = difflib.get_close_matches(word, [*MEASURES, *known], n=1)
            hint = f"did you mean {near[0]}? " if near and near[0] != word else ""
            raise NotFoundError(f"job {job} has no metric {word!r}; {hint}see: carrel job plot {job} --list")
        found += [Measure(name, name, (name,)) for name in metrics]
    if len(found) > CHARTS_MAX:
        raise NotFoundError(f"{len(found)} metrics are too many to show at once (at most {CHARTS_MAX}); name fewer")
    return found


def wanted(measures: Sequence[Measure], names: Iterable[str]) -> set[str]:
    """Return the metrics that these measures need."""
    known = list(names)
    return {name for measure in measures for name in _of(measure, known)}


def _of(measure: Measure, names: Sequence[str]) -> list[str]:
    for pattern in measure.metrics:
        if found := fnmatch.filter(names, pattern):
            return found
    return []


def charts(recordings: Sequence[Recording], measures: Sequence[Measure], *, points: int) -> list[Chart]:
    """Return a chart for each measure that some node has, each curve with ``points`` points at most."""
    if not recordings:
        return []
    recordings = sorted(recordings, key=lambda one: (natural(one.node), one.view == "guest"))
    first_us = min(recording.first_us for recording in recordings)
    last_us = max(recording.last_us for recording in recordings)
    found = []
    for measure in measures:
        curves: list[Curve] = []
        unit = ""
        for recording in recordings:
            names = sorted(_of(measure, list(recording.series)), key=natural)
            for name in names:
                series = recording.series[name]
                unit, factor = shown_unit(series.column, recording)
                width_us = max(1, -(-(last_us - first_us) // points))
                values = _values(series, recording, first_us=first_us, width_us=width_us, factor=factor)
                curves.append(_curve(_label(recording, name, many=len(names) > 1 or "*" in measure.metrics[0]), values))
        if curves:
            ceilings = {getattr(recording, measure.ceiling) for recording in recordings} if measure.ceiling else {0}
            ceiling = float(ceilings.pop()) if len(ceilings) == 1 else 0.0
            found.append(
                Chart(
                    name=measure.name,
                    title=measure.title,
                    unit=unit,
                    curves=tuple(curves),
                    from_s=first_us / 1e6,
                    to_s=last_us / 1e6,
                    ceiling=ceiling or None,
                )
            )
    return found


def _label(recording: Recording, name: str, *, many: bool) -> str:
    where = recording.node if recording.view == "host" else f"{recording.node} in the guest"
    if not many:
        return where
    device = name.split(".")[1]
    return f"{where} {f'GPU {device}' if name.startswith('gpu.') else device}"


def shown_unit(column: Column, recording: Recording) -> tuple[str, float]:
    """Return the unit in which people read a metric, and what to multiply it, or its rate in a second, by."""
    sizes = {"bytes": 1, "KiB": 1024, "sectors": 512, "pages": recording.page_bytes}
    if column.unit in sizes:
        return ("B/s" if column.kind == "counter" else "B"), float(sizes[column.unit])
    if column.kind == "gauge":
        return {"percent": ("%", 1.0), "mW": ("W", 1e-3), "count": ("", 1.0)}.get(column.unit, (column.unit, 1.0))
    if column.unit == "ticks":
        return "CPUs", 1 / recording.clock_ticks_per_s
    if column.unit == "ns" and not column.name.endswith(("wait_ns", "throttled_ns")):
        return "CPUs", 1e-9
    # Time in which something waited, as a part of all time.
    parts = {"ns": 1e-7, "us": 1e-4, "ms": 0.1}
    if column.unit in parts:
        return "%", parts[column.unit]
    return ("W", 1e-3) if column.unit == "mJ" else ("/s", 1.0)


Points = list[tuple[int, float | None]]


def _values(series: Series, recording: Recording, *, first_us: int, width_us: int, factor: float) -> Points:
    """Return the curve's points: of a gauge the most in each bucket of time, of a counter its mean rate over it."""
    if series.column.kind == "gauge":
        peaks: dict[int, tuple[int, float]] = {}
        for time_us, value in zip(series.times_us, series.values, strict=True):
            bucket = (time_us - first_us) // width_us
            if bucket not in peaks or value > peaks[bucket][1]:
                peaks[bucket] = (time_us, value)
        return _broken([(time_us, value * factor) for time_us, value in peaks.values()], recording.gaps)
    lasts: dict[int, tuple[int, float]] = {}
    times = list(zip(series.times_us, series.values, strict=True))
    for time_us, value in times[1:]:
        lasts[(time_us - first_us) // width_us] = (time_us, value)
    return _broken(_rates([*times[:1], *lasts.values()], factor), recording.gaps)


def _rates(kept: Sequence[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    if len(kept) < 2:
        return []
    # The first and the last sample fall where they may: over a hundredth of a second, a tick would look like a CPU.
    least_us = statistics.median(b[0] - a[0] for a, b in itertools.pairwise(kept)) / 4
    found: list[tuple[int, float]] = []
    before_us, before = kept[0]
    for time_us, value in kept[1:]:
        if time_us - before_us < least_us:
            continue
        if value >= before:  # else the counter began anew
            if not found:
                found.append((before_us, (value - before) * 1e6 / (time_us - before_us) * factor))
            found.append((time_us, (value - before) * 1e6 / (time_us - before_us) * factor))
        before_us, before = time_us, value
    return found


def _broken(points: Sequence[tuple[int, float]], gaps: Sequence[tuple[int, int]]) -> Points:
    found: Points = []
    before_us = points[0][0] if points else 0
    for time_us, value in points:
        # A rate stands at the end of its time, which began at the point before.
        if any(from_us < time_us and to_us > before_us for from_us, to_us in gaps):
            found.append((before_us + 1, None))
        found.append((time_us, value))
        before_us = time_us
    return found


def _curve(label: str, points: Points) -> Curve:
    return Curve(
        label=label,
        times_s=tuple(time_us / 1e6 for time_us, _ in points),
        values=tuple(value for _, value in points),
    )


def gathered(chart: Chart, *, curves: int, points: int) -> Chart:
    """Return a chart of at most so many curves; of more, the most, the median and the least of all at each time."""
    if len(chart.curves) <= curves:
        return chart
    width_s = (chart.to_s - chart.from_s) / points or 1.0
    buckets: dict[int, list[float]] = {}
    for curve in chart.curves:
        for time_s, value in zip(curve.times_s, curve.values, strict=True):
            if value is not None:
                at = min(int((time_s - chart.from_s) / width_s), points - 1)  # the last sample ends the last bucket
                buckets.setdefault(at, []).append(value)
    # A bucket in which only some have a value would make the curves jump between some and all.
    full = {at: values for at, values in sorted(buckets.items()) if len(values) * 2 > len(chart.curves)}
    times_s = tuple(chart.from_s + (at + 0.5) * width_s for at in full)
    rows: Mapping[str, tuple[float, ...]] = {
        f"most of {len(chart.curves)}": tuple(max(values) for values in full.values()),
        "median": tuple(statistics.median(values) for values in full.values()),
        "least": tuple(min(values) for values in full.values()),
    }
    made = tuple(Curve(label=label, times_s=times_s, values=values) for label, values in rows.items())
    return msgspec.structs.replace(chart, curves=made)
