"""``carrel job plot``: what a job did over time, in the terminal or as one page that needs nothing else."""

import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console

from carrel import config
from carrel.cli import chart, output, page, samples
from carrel.cli.guest import Json
from carrel.cli.samples import JobName
from carrel.core import curves, report
from carrel.core.curves import Chart, Measure
from carrel.errors import NotFoundError
from carrel.sampling import reading, recorded
from carrel.sampling.recorded import Recorded

POINTS = 240
"""Of a curve in the terminal: two to a letter of a wide one."""
PAGE_POINTS = 1500
PAGE_CURVES = 16
_HEIGHTS = (5, 10)
_WIDTH_MAX = 140


class MetricView(msgspec.Struct, frozen=True, kw_only=True):
    """A metric that can be plotted."""

    name: str
    unit: str
    kind: str
    nodes: tuple[str, ...]


def plot(
    job: JobName,
    /,
    *metrics: Annotated[
        str, Parameter(help="Metrics, or patterns of their names, or words such as cpu; else what is usual.")
    ],
    node: Annotated[
        tuple[str, ...],
        Parameter(name=["--node", "-w"], negative="", show_default=False, help="Only this node; repeatable."),
    ] = (),
    html: Annotated[
        Path | None, Parameter(show_default=False, help="Write one page with all curves that opens without a network.")
    ] = None,
    list_: Annotated[
        bool, Parameter(name="--list", negative="", show_default=False, help="List the metrics that there are.")
    ] = False,
    json: Json = False,
) -> None:
    """Plot what a job used over time, on each of its nodes; also while it runs."""
    settings = config.load()
    directory = samples.one(settings, job)
    if list_:
        _list(directory, json=json)
        return
    asked: list[Measure] = []

    def choice(names: AbstractSet[str]) -> AbstractSet[str]:
        asked.extend(curves.chosen(metrics, names, job=job))
        return curves.wanted(asked, names)

    found = _of_nodes(recorded.read(directory, choice), node)
    made = curves.charts(found.recordings, asked, points=PAGE_POINTS if html else POINTS)
    if html is not None:
        shown = [curves.gathered(one, curves=PAGE_CURVES, points=PAGE_POINTS) for one in made]
        page.write(html, report.report(reading.summary(directory), settings.guests), shown)
        print(f"{html}: open it in any browser")
    elif json:
        output.objects(made)
    else:
        _print(found, made)


def _of_nodes(found: Recorded, nodes: Sequence[str]) -> Recorded:
    if not nodes:
        return found
    known = sorted({one.node for one in found.recordings})
    for node in nodes:
        if node not in known:
            raise NotFoundError(f"job {found.job.key.job_id} has no samples of node {node}; of: {' '.join(known)}")
    kept = [one for one in found.recordings if one.node in nodes]
    return Recorded(job=found.job, recordings=kept, complete=found.complete)


def _list(directory: Path, *, json: bool) -> None:
    all_of_them = recorded.read(directory, lambda _: frozenset())
    found: dict[str, MetricView] = {}
    for recording in all_of_them.recordings:
        for name, column in recording.names.items():
            before = found[name].nodes if name in found else ()
            found[name] = MetricView(
                name=name, unit=column.unit, kind=column.kind, nodes=tuple(dict.fromkeys((*before, recording.node)))
            )
    if json:
        output.objects(found.values())
        return
    words = [
        (measure.name, "", "", measure.title) for measure in curves.MEASURES.values() if curves.wanted([measure], found)
    ]
    rows = [(one.name, one.unit, one.kind, " ".join(one.nodes)) for one in found.values()]
    output.table(("METRIC", "UNIT", "KIND", "WHAT OR WHERE"), [*words, *rows])


def _print(found: Recorded, made: Sequence[Chart]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    terminal = console.is_terminal
    width = min(console.width, _WIDTH_MAX) if terminal else 100
    height = _height(len(made), console.height if terminal else 0)
    colour = terminal and console.color_system is not None and not console.no_color
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    job = found.job
    state = "" if found.complete else ", so far"
    name = f" {output.printable(job.name)}" if job.name else ""
    print(f"job {job.key.job_id}{name}{state}")
    for one in made:
        shown = curves.gathered(one, curves=len(chart.COLOURS), points=POINTS)
        print()
        for line in chart.drawn(shown, width=width, height=height, colour=colour, unicode=unicode):
            line.rstrip()
            console.print(line)


def _height(charts: int, lines: int) -> int:
    """Return lines for each chart: all fit the terminal where they can."""
    low, high = _HEIGHTS
    return max(low, min(high, (lines - 2) // max(1, charts) - 4))
