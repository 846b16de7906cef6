"""``carrel job watch``: what a job does now, on each of its nodes, for as long as it runs."""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from carrel import config
from carrel.cli import chart, output, samples
from carrel.cli.guest import Json
from carrel.cli.report import duration
from carrel.cli.samples import JobName
from carrel.core import curves
from carrel.core.curves import Chart
from carrel.core.report import natural
from carrel.errors import NotFoundError, UsageError
from carrel.sampling.follow import Follower, Tail

POLL_MIN_S = 0.1
STALE_S = 10.0
"""A node that said nothing for so long, and for five of its intervals, is marked."""
_MEASURES = tuple(curves.MEASURES[word] for word in curves.USUAL)
_BLOCKS = " ▁▂▃▄▅▆▇█"
_SPARK_CELLS = 24
_SPARK_MIN = 6
_FIGURES = 84
"""Letters that the figures of a node take; what is left of a line is for the last minutes."""
_ROWS_MIN = 5


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """What a job does on one node; null: not known."""

    time: datetime
    node: str
    view: str
    cpus_busy: float | None
    memory_bytes: int | None
    read_bytes_per_s: float | None
    written_bytes_per_s: float | None
    gpu_percent: float | None
    """Mean of its GPUs."""
    gpu_memory_bytes: int | None
    """Of all its GPUs together."""


def watch(
    job: JobName,
    /,
    *,
    every: Annotated[float, Parameter(name="--every", help="Seconds between two looks.")] = 1.0,
    json: Json = False,
) -> None:
    """Watch what a running job does on each of its nodes, until it ends. Ctrl-C leaves the job alone."""
    if not every >= POLL_MIN_S:
        raise UsageError(f"--every={every:g}: must be {POLL_MIN_S:g} seconds or more")
    directory = samples.one(config.load(), job)
    follower = Follower(directory)
    try:
        follower.poll()
        if not follower.tails:
            raise NotFoundError(f"job {job} has ended; see: carrel job report {job}")
        if json or not sys.stdout.isatty():
            _print(follower, every, json=json)
        else:
            _show(follower, every)
            print(f"job {job} has ended; see: carrel job report {job}")
    finally:
        follower.close()


def _print(follower: Follower, every: float, *, json: bool) -> None:
    new: Sequence[Tail] = follower.tails
    while True:
        for tail in sorted(new, key=lambda one: natural(one.node)):
            found = moment(tail)
            if found is None:
                continue
            print(msgspec.json.encode(found).decode() if json else _line(found), flush=True)
        if follower.over:
            return
        time.sleep(every)
        new = follower.poll()


def _line(found: Moment) -> str:
    words = [f"{found.time:%H:%M:%S}", found.node + ("" if found.view == "host" else " in the guest")]
    for name, value, unit in (
        ("CPUs", found.cpus_busy, "CPUs"),
        ("memory", found.memory_bytes, "B"),
        ("read", found.read_bytes_per_s, "B/s"),
        ("written", found.written_bytes_per_s, "B/s"),
        ("GPU", found.gpu_percent, "%"),
    ):
        if value is not None:
            words.append(f"{name} {chart.shown(value, unit)}")
    return output.printable("  ".join(words))


def moment(tail: Tail) -> Moment | None:
    """Return the last that is known of a node; None: no row yet."""
    recording = tail.recording()
    if recording is None:
        return None
    made = {one.name: one for one in curves.charts([recording], _MEASURES, points=recording.last_us)}
    gpus = _lasts(made.get("gpu"))
    memory, gpu_memory = _lasts(made.get("memory")), _lasts(made.get("gpu-memory"))
    return Moment(
        time=datetime.fromtimestamp(tail.last_us / 1e6, UTC),
        node=tail.node,
        view=tail.view,
        cpus_busy=_first(_lasts(made.get("cpu"))),
        memory_bytes=round(memory[0]) if memory else None,
        read_bytes_per_s=_first(_lasts(made.get("read"))),
        written_bytes_per_s=_first(_lasts(made.get("written"))),
        gpu_percent=round(sum(gpus) / len(gpus), 3) if gpus else None,
        gpu_memory_bytes=round(sum(gpu_memory)) if gpu_memory else None,
    )


def _lasts(made: Chart | None) -> list[float]:
    return [curve.last for curve in made.curves if curve.last is not None] if made else []


def _first(values: list[float]) -> float | None:
    return round(values[0], 3) if values else None


def _show(follower: Follower, every: float) -> None:
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(_screen(follower, console), refresh=True)
            if follower.over:
                return
            time.sleep(every)
            follower.poll()


def _screen(follower: Follower, console: Console) -> Group:
    tails = sorted(follower.tails, key=lambda one: (natural(one.node), one.view == "guest"))
    gpus = any(summary.gpus for tail in tails if (summary := tail.summary))
    cells = min(_SPARK_CELLS, (console.width - _FIGURES) // 2)
    spark = [""] if cells >= _SPARK_MIN else []
    titles = ["node", "CPUs busy", *spark, "memory", *spark, "read", "written"]
    titles += ["GPU", "GPU memory"] if gpus else []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in [*titles, ""]:
        table.add_column(title, justify="left" if title in ("node", "") else "right", no_wrap=True)
    room = max(_ROWS_MIN, console.height - 4)
    for tail in tails[:room]:
        table.add_row(*_row(tail, gpus=gpus, spark=cells if spark else 0))
    left = len(tails) - room
    return Group(_headline(tails), "", table, *([f"… and {left} more nodes; see: --json"] if left > 0 else []))


def _headline(tails: Sequence[Tail]) -> Text:
    job = next((tail.job for tail in tails if tail.job), None)
    first_s = min((summary.first_s for tail in tails if (summary := tail.summary)), default=0.0)
    last_s = max((tail.last_us for tail in tails), default=0) / 1e6
    if job is None:
        return Text("no sample yet")
    limit = f" of {duration(job.time_limit_s)}" if job.time_limit_s else ""
    found = Text(f"job {job.key.job_id}", style="bold")
    found.append(f" {output.printable(job.name)}".rstrip(), style="bold")
    found.append(f"  {duration(last_s - first_s)}{limit}  (Ctrl-C leaves it alone)", style="not bold")
    return found


def _row(tail: Tail, *, gpus: bool, spark: int) -> list[Text]:
    name = Text(tail.node + ("" if tail.view == "host" else " in the guest"), style="dim" if tail.ended else "")
    recording, found = tail.recording(), moment(tail)
    if recording is None or found is None:
        return [name, Text("no sample yet", style="dim")]
    made = {one.name: one for one in curves.charts([recording], _MEASURES[:2], points=spark or 1)}
    cells = [name, _amount(found.cpus_busy, "CPUs", recording.cpus)]
    cells += [_spark(made.get("cpu"), spark, "cyan")] if spark else []
    cells += [_amount(found.memory_bytes, "B", recording.memory_limit_bytes)]
    cells += [_spark(made.get("memory"), spark, "magenta")] if spark else []
    cells += [_amount(found.read_bytes_per_s, "B/s", 0), _amount(found.written_bytes_per_s, "B/s", 0)]
    if gpus:
        cells += [_amount(found.gpu_percent, "%", 0), _amount(found.gpu_memory_bytes, "B", 0)]
    return [*cells, Text(_state(tail), style="dim" if tail.ended else "red")]


def _state(tail: Tail) -> str:
    silent_s = time.time() - tail.last_us / 1e6
    if tail.ended:
        return "ended"
    return f"silent {duration(silent_s)}" if silent_s > max(STALE_S, 5 * _interval_s(tail)) else ""


def _interval_s(tail: Tail) -> float:
    summary = tail.summary
    if summary is None or summary.samples < 2:
        return 0.0
    return (summary.last_s - summary.first_s) / (summary.samples - 1)


def _amount(value: float | None, unit: str, of: float) -> Text:
    if value is None:
        return Text("?", style="dim")
    full = of and value >= 0.9 * of
    limit = f" of {chart.shown(of, unit)}" if of else ""
    return Text(chart.shown(value, unit) + limit, style="yellow" if full and unit == "B" else "")


def _spark(made: Chart | None, cells: int, style: str) -> Text:
    """Return the last minutes as blocks, against what there was to have, else against the most."""
    values = made.curves[0].values[-cells:] if made else ()
    top = (made.ceiling if made else None) or max((value or 0.0 for value in values), default=0.0) or 1.0
    levels = len(_BLOCKS) - 1
    found = ["?" if value is None else _BLOCKS[min(levels, round(value / top * levels))] for value in values]
    return Text("".join(found).rjust(cells), style=style)
