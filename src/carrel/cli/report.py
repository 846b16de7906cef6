"""How the report of a job, and of an array of them, reads on a terminal and in a page."""

from collections.abc import Iterator
from typing import NamedTuple

from carrel.cli import output
from carrel.core.arrays import ArrayReport, Spread
from carrel.core.report import Advice, Report
from carrel.model.sample import NodeSummary


class Figure(NamedTuple):
    """One line of a report."""

    what: str
    part: float | None
    text: str


def lines(report: Report) -> Iterator[str]:
    """Yield the report, line by line."""
    yield headline(report)
    yield ""
    for figure in figures(report):
        shown = "" if figure.part is None else f"{figure.part:.0%}"
        yield f"  {figure.what:<11} {shown:>5}  {figure.text}"
    if len(report.nodes) > 1:
        yield ""
        titles, rows = cells(report)
        yield from _aligned([titles, *rows])
    yield from _advice(report.advice)


def headline(report: Report) -> str:
    """Return what job this is, in one line."""
    state = "" if report.complete else ", so far"
    name = f" {output.printable(report.name)}" if report.name else ""
    return f"job {report.job_id}{name}: {duration(report.elapsed_s)} on {_count(len(report.nodes), 'node')}{state}"


def figures(report: Report) -> Iterator[Figure]:
    """Yield what was measured; what was not is left out."""
    several = len(report.nodes) > 1
    cpus = _count(report.cpus, "CPU") if report.cpus else "CPUs"
    if report.cpu_s is not None:
        yield Figure("CPU", report.cpu_part, f"{duration(report.cpu_s)} of CPU time on {cpus}")
    if report.memory_peak_bytes is not None:
        limit = f" of {size(report.memory_limit_bytes)}" if report.memory_limit_bytes else ""
        where = ", on the fullest node" if several else ""
        yield Figure("memory", report.memory_part, f"{size(report.memory_peak_bytes)}{limit} at most{where}")
    yield from _gpu_figures(report)
    if report.time_limit_s:
        text = f"{duration(report.elapsed_s)} of {duration(report.time_limit_s)}"
        yield Figure("time limit", report.time_part, text)
    if report.read_bytes is not None and report.written_bytes is not None:
        yield Figure("disk", None, f"{size(report.read_bytes)} read, {size(report.written_bytes)} written")
    if report.imbalance is not None:
        yield Figure("balance", None, f"the busiest node used {report.imbalance:.2f} times the CPU time of the mean")
    if report.gap_s:
        yield Figure("unseen", None, f"{duration(report.gap_s)} without samples; see job.json")


def _gpu_figures(report: Report) -> Iterator[Figure]:
    if not report.gpus:
        return
    energy = f", {report.gpu_energy_j / 3.6e6:.3g} kWh" if report.gpu_energy_j else ""
    idle = f", {report.gpus_idle} of them never" if report.gpus_idle else ""
    yield Figure("GPU", report.gpu_part, f"busy on average, of {_count(report.gpus, 'GPU')}{idle}{energy}")
    if report.gpu_memory_peak_bytes is not None and report.gpu_memory_bytes:
        part = report.gpu_memory_peak_bytes / report.gpu_memory_bytes
        text = f"{size(report.gpu_memory_peak_bytes)} of {size(report.gpu_memory_bytes)} at most, on the fullest GPU"
        yield Figure("GPU memory", part, text)


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of a table of the nodes."""
    titles = ["node", "CPU", "memory", "written"]
    if report.gpus:
        titles[3:3] = ["GPU"]
    return titles, [_node(node, gpus=bool(report.gpus)) for node in report.nodes]


def _node(node: NodeSummary, *, gpus: bool) -> list[str]:
    had = node.cpus * (node.last_s - node.first_s)
    cpu = f"{node.cpu_s / had:.0%}" if node.cpu_s is not None and had > 0 else "?"
    limit = f" of {size(node.memory_limit_bytes)}" if node.memory_limit_bytes else ""
    memory = "?" if node.memory_peak_bytes is None else size(node.memory_peak_bytes) + limit
    written = "?" if node.written_bytes is None else size(node.written_bytes)
    name = output.printable(node.node) + ("" if node.view == "host" else " in the guest")
    gpu = ["?" if node.gpu_part is None else f"{node.gpu_part:.0%} of {node.gpus}"] if gpus else []
    return [name, cpu, memory, *gpu, written]


def array_lines(report: ArrayReport) -> Iterator[str]:
    """Yield the report of an array, line by line."""
    name = f" {output.printable(report.name)}" if report.name else ""
    running = f", {report.running} not finished" if report.running else ""
    yield f"array {report.array_job_id}{name}: {_count(report.tasks, 'task')}{running}"
    yield ""
    spreads = [
        ("CPU", report.cpu_part, _percent),
        ("memory", report.memory_peak_bytes, size),
        ("GPU", report.gpu_part, _percent),
        ("time", report.elapsed_s, duration),
    ]
    rows = [[what, *(show(value) for value in _values(spread))] for what, spread, show in spreads if spread]
    yield from _aligned([["", "least", "25%", "median", "75%", "most"], *rows])
    limits = [
        f"memory {size(report.memory_limit_bytes)}" if report.memory_limit_bytes else "",
        f"time {duration(report.time_limit_s)}" if report.time_limit_s else "",
    ]
    if any(limits):
        yield ""
        yield f"  limits of a task: {', '.join(filter(None, limits))}"
    if report.worst:
        yield ""
        yield "  tasks that stand out:"
        for task in report.worst:
            cpu = "" if task.cpu_part is None else f", CPU {task.cpu_part:.0%}"
            memory = "" if task.memory_peak_bytes is None else f", {size(task.memory_peak_bytes)}"
            where = f"{report.array_job_id}_{task.task_id} (job {task.job_id})"
            yield f"    {where}: {task.why} ({duration(task.elapsed_s)}{cpu}{memory})"
    yield from _advice(report.advice)


def _values(spread: Spread) -> tuple[float, ...]:
    return (spread.least, spread.quarter, spread.median, spread.three_quarters, spread.most)


def _percent(part: float) -> str:
    return f"{part:.0%}"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    """Yield rows with their first cell to the left and the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for first, *rest in rows:
        right = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        yield f"  {first:<{widths[0]}}{right}"


def _advice(found: tuple[Advice, ...]) -> Iterator[str]:
    for advice in found:
        yield ""
        yield f"next time: {advice.text}"
        if advice.directive:
            yield f"    {advice.directive}"


def _count(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def size(amount_bytes: float) -> str:
    """Return an amount of data for people.

    >>> size(0), size(1023), size(300 * 2**20), size(1.5 * 2**40)
    ('0B', '1023B', '300M', '1.5T')
    """
    units = iter("BKMGT")
    unit = next(units)
    while amount_bytes >= 1024 and unit != "T":
        amount_bytes /= 1024
        unit = next(units)
    digits = 0 if amount_bytes >= 100 or amount_bytes == int(amount_bytes) else 1
    return f"{amount_bytes:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Return a time span for people.

    >>> duration(2.4), duration(75), duration(3 * 3600 + 120), duration(200_000)
    ('2.4 s', '1:15 min', '3:02 h', '2 d 7 h')
    """
    whole = round(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 2 * 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
