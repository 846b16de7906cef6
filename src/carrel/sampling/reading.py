"""Finding and reading the samples of a job: finished, still running, or of a node that lost its power."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from carrel import process
from carrel.errors import CarrelError, NotFoundError
from carrel.model.job import Job
from carrel.model.sample import JobFile, JobSummary, NodeSummary, SeriesFile
from carrel.sampling.folder import RUN_FILE, component, of_stem
from carrel.sampling.tables import Survey, Value

_ZSTD_TIMEOUT_S = 600.0
_S = TypeVar("_S", JobFile, JobSummary)
_NUMBERS = {False: "Int64", True: "Float64"}


def find(root: Path, job_id: int, *, user: str = "") -> Path:
    """Return the directory of the latest run of a job.

    Args:
        root: Where samples are.
        job_id: Slurm's job id.
        user: Only this user's.

    Raises:
        NotFoundError: there is none that the caller may read.
    """
    whose = component(user) if user else "*"
    found: list[tuple[tuple[int, ...], Path]] = []
    for pattern in (str(job_id), f"{job_id}.*"):
        for path in root.glob(f"{whose}/{pattern}"):
            try:
                words = (path / RUN_FILE).read_text(errors="surrogateescape").rsplit(".", 3)
                found.append(((int(words[2]), int(words[3])), path))
            except (OSError, ValueError, IndexError):
                continue  # somebody else's, or not ours
    if not found:
        raise NotFoundError(f"no samples of job {job_id} below {root} that you may read; did it run, and is it yours?")
    return max(found)[1]


def summary(directory: Path) -> JobSummary:
    """Return what the job used so far; of nodes where it runs, up to the last whole sample.

    Raises:
        NotFoundError: nothing has been sampled yet.
        CarrelError: a file is damaged.
    """
    known = decoded(directory / "summary.json", JobSummary)
    nodes = {(node.node, node.view): node for node in known.nodes} if known else {}
    job = known.job if known else None
    running = False
    for survey in surveys(directory):
        if survey.summary is not None:
            nodes[survey.summary.node, survey.summary.view] = survey.summary
        if survey.usage.job is not None and (job is None or of_stem(survey.path.name)[1] == "host"):
            job = survey.usage.job  # a guest has less than its job
        running = True
    if job is None:
        raise NotFoundError(f"{directory}: nothing has been sampled yet")
    complete = not running and known is not None and known.complete
    ordered: list[NodeSummary] = [nodes[key] for key in sorted(nodes)]
    return JobSummary(run=str(job.key), job=job, nodes=tuple(ordered), complete=complete)


def surveys(directory: Path) -> Iterator[Survey]:
    """Yield the nodes and views whose samples have not become tables yet.

    Raises:
        CarrelError: a file is damaged, or not the caller's to read.
    """
    for path in sorted(directory.glob("samples.*.seg")):
        node, view = of_stem(path.name)
        try:
            yield Survey(path, node=node, view=view)
        except CarrelError:
            if path.exists():  # else it became a table meanwhile
                raise


def decoded(path: Path, kind: type[_S]) -> _S | None:
    """Return what a file of JSON says, or None where there is none.

    Raises:
        CarrelError: it is damaged, or not the caller's to read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CarrelError(f"{path}: {error}; it can be removed") from error


def frame(directory: Path, *, constants: bool = False) -> Any:
    """Return all samples of a job as a pandas DataFrame: ``time``, ``node``, ``view``, and a column for each metric.

    Its ``attrs`` have ``units`` and ``job``. Missing values are NA; numbers stay whole numbers.

    Args:
        directory: The job's.
        constants: Also the metrics that never changed.

    Raises:
        NotFoundError: nothing has been sampled yet.
        CarrelError: pandas is not installed, or a file is damaged.
    """
    try:
        # Only notebooks pay for it.
        import pandas as pd  # noqa: PLC0415
    except ImportError as error:
        raise CarrelError("a DataFrame needs pandas; see: pip install carrel[frames]") from error
    about: JobFile | None = decoded(directory / "job.json", JobFile)
    frames: list[Any] = []
    units: dict[str, str] = {}
    job = about.job if about else None
    for series in about.series if about else ():
        part = _finished(pd, directory, series)
        frames.append(_labelled(pd, part, series.node, series.view, series.constants if constants else {}))
        units |= series.units
    for survey in surveys(directory):
        node, view = of_stem(survey.path.name)
        fixed = {name: value for name, (_, value) in survey.constants.items()} if constants else {}
        frames.append(_labelled(pd, _running(pd, survey), node, view, fixed))
        units |= survey.units | {name: column.unit for name, (column, _) in survey.constants.items()}
        job = survey.usage.job or job
    if not frames:
        raise NotFoundError(f"{directory}: nothing has been sampled yet")
    whole = pd.concat(frames, ignore_index=True).sort_values(["time", "node", "view"], ignore_index=True)
    whole.attrs = {"units": units, "job": _plain(job)}
    return whole


def _plain(job: Job | None) -> Any:
    return msgspec.to_builtins(job)


def _labelled(pd: Any, part: Any, node: str, view: str, constants: dict[str, Value]) -> Any:
    fixed = {name: pd.Series([value] * len(part), dtype=_dtype([value])) for name, value in constants.items()}
    head = pd.DataFrame({"time": part.pop("time"), "node": node, "view": view})
    return pd.concat([head, part, pd.DataFrame(fixed)], axis=1)


def _dtype(values: list[Any]) -> str:
    floating = any(isinstance(value, float) for value in values)
    return (
        "UInt64"
        if not floating and any(value is not None and value >= 2**63 for value in values)
        else _NUMBERS[floating]
    )


def _finished(pd: Any, directory: Path, series: SeriesFile) -> Any:
    samples = [directory / name for name in series.files if name.startswith("samples.")]
    for path in samples:
        if path.suffix == ".parquet" and path.exists():
            return _from_parquet(pd, path)
    for path in samples:
        if path.exists():
            return _from_csv(pd, path)
    raise CarrelError(f"{directory}: the samples of node {series.node} are missing; were they removed?")


def _from_parquet(pd: Any, path: Path) -> Any:
    import pyarrow as pa  # noqa: PLC0415  # only who reads Parquet pays for it
    import pyarrow.parquet as pq  # noqa: PLC0415

    kinds = {pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype(), pa.float64(): pd.Float64Dtype()}
    return pq.read_table(path, partitioning=None).to_pandas(types_mapper=kinds.get)


def _from_csv(pd: Any, path: Path) -> Any:
    import io  # noqa: PLC0415  # beside pandas it is nothing

    text = process.run(["zstd", "-dcq", path], timeout_s=_ZSTD_TIMEOUT_S) if path.suffix == ".zst" else path.read_text()
    part = pd.read_csv(io.StringIO(text), dtype_backend="numpy_nullable", dtype={"time_s": "string"})
    # A float would round the microseconds of today's seconds.
    time_us = part.pop("time_s").str.replace(".", "", regex=False).astype("int64")
    part.insert(0, "time", pd.to_datetime(time_us, unit="us", utc=True))
    return part


def _running(pd: Any, survey: Survey) -> Any:
    times: list[int] = []
    columns: list[list[Value | None]] = [[] for _ in survey.varying]
    for time_us, values in survey.table():
        times.append(time_us)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    named = {c.name: pd.array(v, dtype=_dtype(v)) for c, v in zip(survey.varying, columns, strict=True)}
    return pd.DataFrame({"time": pd.to_datetime(times, unit="us", utc=True), **named})
