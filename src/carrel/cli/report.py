"""How the report of a job reads on a terminal."""

from collections.abc import Iterator

from carrel.cli import output
from carrel.core.report import Report
from carrel.model.sample import NodeSummary


def lines(report: Report) -> Iterator[str]:
    """Yield the report, line by line."""
    state = "" if report.complete else ", so far"
    name = f" {report.name}" if report.name else ""
    yield f"job {report.job_id}{name}: {duration(report.elapsed_s)} on {_nodes(len(report.nodes))}{state}"
    yield ""
    yield from _rows(report)
    if len(report.nodes) > 1:
        yield ""
        yield f"  {'node':<16} {'CPU':>5} {'memory':>18} {'written':>9}"
        for node in report.nodes:
            yield _node(node)
    for advice in report.advice:
        yield ""
        yield f"next time: {advice.text}"
        if advice.directive:
            yield f"    {advice.directive}"


def _rows(report: Report) -> Iterator[str]:
    cpus = f"{report.cpus} CPUs" if report.cpus else "CPUs"
    if report.cpu_s is not None:
        yield _row("CPU", report.cpu_part, f"{duration(report.cpu_s)} of CPU time on {cpus}")
    if report.memory_peak_bytes is not None:
        limit = f" of {size(report.memory_limit_bytes)}" if report.memory_limit_bytes else ""
        where = ", on the fullest node" if len(report.nodes) > 1 else ""
        yield _row("memory", report.memory_part, f"{size(report.memory_peak_bytes)}{limit} at most{where}")
    if report.time_limit_s:
        text = f"{duration(report.elapsed_s)} of {duration(report.time_limit_s)}"
        yield _row("time limit", report.time_part, text)
    if report.read_bytes is not None and report.written_bytes is not None:
        yield _row("disk", None, f"{size(report.read_bytes)} read, {size(report.written_bytes)} written")
    if report.gap_s:
        yield _row("unseen", None, f"{duration(report.gap_s)} without samples; see job.json")


def _row(what: str, part: float | None, text: str) -> str:
    shown = "" if part is None else f"{part:.0%}"
    return f"  {what:<11} {shown:>5}  {text}"


def _node(node: NodeSummary) -> str:
    had = node.cpus * (node.last_s - node.first_s)
    cpu = f"{node.cpu_s / had:.0%}" if node.cpu_s is not None and had > 0 else "?"
    limit = f" of {size(node.memory_limit_bytes)}" if node.memory_limit_bytes else ""
    memory = "?" if node.memory_peak_bytes is None else size(node.memory_peak_bytes) + limit
    written = "?" if node.written_bytes is None else size(node.written_bytes)
    return f"  {output.printable(node.node):<16} {cpu:>5} {memory:>18} {written:>9}"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


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
