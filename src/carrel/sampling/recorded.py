"""Some metrics of a job, of all its nodes, without the libraries of a notebook: what plots are drawn from."""

import contextlib
import subprocess
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, cast

import msgspec

from carrel.core.curves import Recording, Series
from carrel.errors import CarrelError, NotFoundError
from carrel.model.job import Job
from carrel.model.sample import Column, JobFile, JobSummary, NodeSummary, SeriesFile
from carrel.sampling.reading import decoded, surveys
from carrel.sampling.tables import Survey

Choice = Callable[[AbstractSet[str]], AbstractSet[str]]
"""Given the names of all metrics, those to read."""


class Recorded(msgspec.Struct, kw_only=True):
    """What there is of a job now."""

    job: Job
    recordings: list[Recording]
    complete: bool
    """False: some node still runs, or did not say its last word."""


def read(directory: Path, choice: Choice) -> Recorded:
    """Return the chosen metrics; of nodes where the job runs, up to the last whole sample.

    Raises:
        NotFoundError: nothing has been sampled yet.
        CarrelError: a file is damaged, or needs a program or library that is not there.
    """
    about = decoded(directory / "job.json", JobFile)
    summary = decoded(directory / "summary.json", JobSummary)
    nodes = {(node.node, node.view): node for node in summary.nodes} if summary else {}
    job = about.job if about else None
    running = list(surveys(directory))
    names = {name for series in (about.series if about else ()) for name in series.units}
    for survey in running:
        names |= survey.units.keys() | survey.constants.keys()
    wanted = choice(names)
    recordings: list[Recording] = []
    for series in about.series if about else ():
        recordings += _finished(directory, series, nodes.get((series.node, series.view)), wanted)
    for survey in running:
        job = survey.usage.job or job
        recordings += _running(survey, wanted)
    if job is None or not recordings:
        raise NotFoundError(f"{directory}: nothing has been sampled yet")
    return Recorded(job=job, recordings=recordings, complete=not running and summary is not None and summary.complete)


def _finished(
    directory: Path, about: SeriesFile, summary: NodeSummary | None, wanted: AbstractSet[str]
) -> list[Recording]:
    if summary is None:
        return []
    counters = set(about.counters)
    columns = {
        name: Column(name, unit, "counter" if name in counters else "gauge") for name, unit in about.units.items()
    }
    first_us, last_us = round(summary.first_s * 1e6), round(summary.last_s * 1e6)
    varying = sorted(name for name in wanted if name in columns and name not in about.constants)
    found = {name: Series(column=columns[name], times_us=array("q"), values=array("d")) for name in varying}
    if varying:
        for time_us, cells in _rows(directory, about, varying):
            for name, cell in zip(varying, cells, strict=True):
                if cell is not None:
                    found[name].times_us.append(time_us)
                    found[name].values.append(cell)
    for name in wanted & about.constants.keys():
        found[name] = _constant(columns[name], about.constants[name], first_us, last_us)
    gaps = tuple((note.from_us, note.time_us) for note in about.notes if note.what == "gap" and note.from_us)
    return [
        Recording(
            node=about.node,
            view=about.view,
            first_us=first_us,
            last_us=last_us,
            series=found,
            names=columns,
            gaps=gaps,
            cpus=summary.cpus,
            memory_limit_bytes=summary.memory_limit_bytes,
            clock_ticks_per_s=about.clock_ticks_per_s,
            page_bytes=about.page_bytes,
        )
    ]


def _constant(column: Column, value: float, first_us: int, last_us: int) -> Series:
    """A metric that never changed is in no table; its curve is level."""
    return Series(column=column, times_us=array("q", (first_us, last_us)), values=array("d", (value, value)))


def _rows(directory: Path, about: SeriesFile, names: list[str]) -> Iterator[tuple[int, list[float | None]]]:
    samples = [directory / name for name in about.files if name.startswith("samples.")]
    for path in sorted(samples, key=lambda path: path.suffix == ".parquet"):
        if path.exists():
            return _from_parquet(path, names) if path.suffix == ".parquet" else _from_csv(path, names)
    raise CarrelError(f"{directory}: the samples of node {about.node} are missing; were they removed?")


def _from_parquet(path: Path, names: list[str]) -> Iterator[tuple[int, list[float | None]]]:
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415  # only who reads Parquet pays for it
    except ImportError as error:
        raise CarrelError(f"{path}: reading Parquet needs pyarrow; see: pip install carrel[parquet]") from error
    for batch in pq.ParquetFile(path).iter_batches(columns=["time", *names]):
        times = batch.column(0).cast("int64").to_pylist()
        columns = [batch.column(name).to_pylist() for name in names]
        for time_us, *cells in zip(times, *columns, strict=True):
            yield time_us, cells


def _from_csv(path: Path, names: list[str]) -> Iterator[tuple[int, list[float | None]]]:
    with _opened(path) as file:
        header = file.readline().rstrip("\n").split(",")
        try:
            places = [header.index(name) for name in names]
        except ValueError as error:
            raise CarrelError(f"{path}: {error}, though job.json says so; was it edited?") from error
        last = max(places) + 1
        for line in file:
            # What is the job's own comes first in a row of a thousand columns: the rest need not be cut up.
            cells = line.rstrip("\n").split(",", last)
            try:
                second, _, micro = cells[0].partition(".")
                row = [float(cells[at]) if cells[at] else None for at in places]
                yield int(second) * 10**6 + int(micro), row
            except (ValueError, IndexError) as error:
                raise CarrelError(f"{path}: a line that is no row of numbers: {line[:40]!r}; was it edited?") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a table. A week of samples is a gigabyte when unpacked, so it is read as it is unpacked."""
    if path.suffix != ".zst":
        with path.open() as file:
            yield file
        return
    words = ["zstd", "-dcq", "--", str(path)]
    try:
        # Its output is read while it runs, which carrel.process has no way for.
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise CarrelError(f"{path}: zstd is not installed; see: apt-get install zstd") from error
    with child, cast("IO[str]", child.stdout) as unpacked:
        try:
            yield unpacked
        except BaseException:
            child.kill()  # nobody reads what is left
            raise
    if child.returncode != 0:
        raise CarrelError(f"{path}: zstd cannot unpack it; was it cut off?")


def _running(survey: Survey, wanted: AbstractSet[str]) -> list[Recording]:
    summary = survey.summary
    if summary is None:
        return []
    first_us, last_us = round(summary.first_s * 1e6), round(summary.last_s * 1e6)
    constants = {name: _named(name, column) for name, (column, _) in survey.constants.items()}
    columns = {one.name: _named(one.name, one.column) for one in survey.varying} | constants
    places = [(at, one.name) for at, one in enumerate(survey.varying) if one.name in wanted]
    found = {name: Series(column=columns[name], times_us=array("q"), values=array("d")) for _, name in places}
    if places:
        for time_us, values in survey.table():
            for at, name in places:
                if (value := values[at]) is not None:
                    found[name].times_us.append(time_us)
                    found[name].values.append(value)
    for name in wanted & survey.constants.keys():
        found[name] = _constant(columns[name], survey.constants[name][1], first_us, last_us)
    gaps = tuple((note.from_us, note.time_us) for note in survey.notes if note.what == "gap" and note.from_us)
    return [
        Recording(
            node=summary.node,
            view=summary.view,
            first_us=first_us,
            last_us=last_us,
            series=found,
            names=columns,
            gaps=gaps,
            cpus=summary.cpus,
            memory_limit_bytes=summary.memory_limit_bytes,
        )
    ]


def _named(name: str, column: Column) -> Column:
    return Column(name, column.unit, column.kind)
