"""A job array in a dozen numbers: how far its tasks differ, which stand out, and what the next array should ask for.

All tasks ask for the same, so advice follows from the one that needed most, and says so where that one is alone.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from carrel.config import Guests
from carrel.core import report
from carrel.core.report import Advice, Report
from carrel.model.sample import JobSummary

WORST = 5
"""Tasks that are named."""
OUTLIER = 2.0
"""A task that needs so many times the median is one."""
_MANY = 4
"""Of fewer tasks, none stands out."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How a figure is spread over the tasks for which it is known."""

    least: float
    quarter: float
    median: float
    three_quarters: float
    most: float


class TaskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One task."""

    task_id: int
    job_id: int
    complete: bool
    elapsed_s: float
    cpu_part: float | None
    memory_peak_bytes: int | None
    gpu_part: float | None
    why: str = ""
    """What makes it stand out."""


class ArrayReport(msgspec.Struct, frozen=True, kw_only=True):
    """All tasks of an array that were sampled."""

    array_job_id: int
    user: str
    name: str
    account: str
    tasks: int
    running: int
    """Of them, those that have not ended, or not said their last word."""
    time_limit_s: int | None
    memory_limit_bytes: int
    """Most of any task, on a node."""
    elapsed_s: Spread | None
    cpu_part: Spread | None
    memory_peak_bytes: Spread | None
    gpu_part: Spread | None
    cpu_s: float | None
    """Of all tasks together."""
    worst: tuple[TaskFigures, ...]
    advice: tuple[Advice, ...]


def array_report(array_job_id: int, summaries: Sequence[JobSummary], guests: Guests) -> ArrayReport:
    """Return the report of an array's tasks; there is at least one. ``guests``: see ``report.report``."""
    tasks = sorted(summaries, key=lambda one: one.job.array_task_id or 0)
    reports = [report.report(one, guests) for one in tasks]
    ids = [one.job.array_task_id or 0 for one in tasks]
    known_cpu = [one.cpu_s for one in reports if one.cpu_s is not None]
    job = tasks[0].job
    return ArrayReport(
        array_job_id=array_job_id,
        user=job.user,
        name=next((one.job.name for one in tasks if one.job.name), ""),
        account=next((one.job.account for one in tasks if one.job.account), ""),
        tasks=len(tasks),
        running=sum(not one.complete for one in reports),
        time_limit_s=max((one.time_limit_s for one in reports if one.time_limit_s), default=None),
        memory_limit_bytes=max(one.memory_limit_bytes for one in reports),
        elapsed_s=_spread([one.elapsed_s for one in reports]),
        cpu_part=_spread([one.cpu_part for one in reports]),
        memory_peak_bytes=_spread([one.memory_peak_bytes for one in reports]),
        gpu_part=_spread([one.gpu_part for one in reports]),
        cpu_s=sum(known_cpu) if len(known_cpu) == len(reports) else None,
        worst=_worst(ids, reports),
        advice=tuple(_advice(ids, reports)),
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3
    return Spread(least=known[0], quarter=low, median=middle, three_quarters=high, most=known[-1])


def _worst(ids: Sequence[int], reports: Sequence[Report]) -> tuple[TaskFigures, ...]:
    """Return the tasks that stand out, each once, those with the gravest reason first."""
    found: dict[int, str] = {}
    for at, one in enumerate(reports):
        if killed := sum(node.oom_kills or 0 for node in one.nodes):
            found[at] = f"{killed} processes killed for memory"
    if len(reports) >= _MANY:
        for why, figure in (("memory", _memory), ("time", _elapsed)):
            for at, times in _outliers([figure(one) for one in reports]):
                found.setdefault(at, f"{times:.1f} times the {why} of the median task")
        for at, part in _idle(reports):
            found.setdefault(at, f"used {part:.0%} of its CPU time")
    return tuple(_figures(ids[at], reports[at], why) for at, why in list(found.items())[:WORST])


def _memory(one: Report) -> float | None:
    return one.memory_peak_bytes


def _elapsed(one: Report) -> float | None:
    return one.elapsed_s


def _outliers(values: Sequence[float | None]) -> list[tuple[int, float]]:
    median = statistics.median([value for value in values if value is not None] or [0.0])
    if median <= 0:
        return []
    found = [(at, value / median) for at, value in enumerate(values) if value is not None and value > OUTLIER * median]
    return sorted(found, key=lambda one: -one[1])


def _idle(reports: Sequence[Report]) -> list[tuple[int, float]]:
    """Return tasks that did next to nothing while others worked."""
    parts = [one.cpu_part for one in reports if one.cpu_part is not None]
    if not parts or statistics.median(parts) < report.WASTEFUL:
        return []
    return sorted(
        (
            (at, one.cpu_part)
            for at, one in enumerate(reports)
            if one.complete
            and one.elapsed_s >= report.SHORT_S
            and one.cpu_part is not None
            and one.cpu_part < report.IDLE
        ),
        key=lambda one: one[1],
    )


def _figures(task_id: int, one: Report, why: str) -> TaskFigures:
    return TaskFigures(
        task_id=task_id,
        job_id=one.job_id,
        complete=one.complete,
        elapsed_s=one.elapsed_s,
        cpu_part=one.cpu_part,
        memory_peak_bytes=one.memory_peak_bytes,
        gpu_part=one.gpu_part,
        why=why,
    )


def _advice(ids: Sequence[int], reports: Sequence[Report]) -> list[Advice]:
    """Return advice that holds for the task that needed most; a part of an array says nothing about the others."""
    found: list[Advice] = []
    killed = [one for one in reports if any(node.oom_kills for node in one.nodes)]
    fullest = max(killed or reports, key=lambda one: one.memory_peak_bytes or 0)
    longest = max(reports, key=lambda one: one.elapsed_s)
    rules: tuple[tuple[Report, Callable[[Report], list[Advice]]], ...] = (
        (fullest, report.memory_advice),
        (longest, report.time_advice),
    )
    for one, rule in rules:
        task = ids[reports.index(one)]
        found += [Advice(text=f"task {task}: {line.text}", directive=line.directive) for line in rule(one)]
    return [*_cpus(reports), *found, *_small(reports)]


def _cpus(reports: Sequence[Report]) -> list[Advice]:
    long = [one for one in reports if one.elapsed_s >= report.SHORT_S and one.cpu_part is not None]
    had = max((node.cpus for one in long for node in one.nodes), default=0)
    used = [report.cpu_advice(one) for one in long]
    lines = {line.directive for advice in used for line in advice}
    # One task that needs them all is reason enough to keep them.
    if not long or not all(used) or "" in lines or any(len(one.nodes) > 1 for one in long):
        return []
    most = max(int(line.rpartition("=")[2]) for line in lines)
    if most >= had:
        return []
    text = f"no task kept more than {most} of {had} CPUs busy"
    return [Advice(text=text, directive=f"#SBATCH --cpus-per-task={most}")]


def _small(reports: Sequence[Report]) -> list[Advice]:
    done = [one.elapsed_s for one in reports if one.complete]
    if len(done) < _MANY or statistics.median(done) >= report.SHORT_S:
        return []
    text = f"the median task takes {statistics.median(done):.0f} s"
    return [Advice(text=f"{text}: starting one costs Slurm as much; can each do the work of several?")]
