"""What LDMS has stored of a job, made into files as those of our own sampler: for reports, plots and notebooks.

The rows become a segment, and that becomes tables as any other: so there is one way to read samples, not two.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from carrel.errors import CarrelError, NotFoundError
from carrel.ldms.csvfile import LdmsRow, read
from carrel.model.job import Job
from carrel.model.sample import Column, Note, Schema
from carrel.sampling import compact
from carrel.sampling.blocks import Block, Layout, Reading
from carrel.sampling.folder import JobFolder, stem
from carrel.sampling.segment import SegmentWriter

TICK_US = 50_000
"""Sets that were read so close together are one sample."""
_COUNTERS = {"vmstat", "procinterrupts", "procstat2"}


def load(job: Job, files: Sequence[Path], root: Path, *, node: str, formats: Sequence[str]) -> tuple[Path, int]:
    """Make the files of one job on one node; return its directory, and how many samples it has.

    Args:
        job: Whose they are. Rows of other producers and other jobs are left out.
        files: LDMS's, one for each set.
        root: Where all samples are.
        node: Which one it was.
        formats: ``csv``, ``parquet``.

    Raises:
        NotFoundError: there are no rows of this job.
        CarrelError: a file is none of LDMS, or the job has samples of this node already.
    """
    rows = sorted((row for path in files for row in read(path) if _is_of(row, job, node)), key=lambda row: row.time_us)
    if not rows:
        raise NotFoundError(f"no rows of job {job.key.job_id} of {job.user} on {node} in {len(files)} files")
    folder = JobFolder.make(root, job.key, user=job.user, uid=job.uid, gid=job.gid)
    try:
        name = stem(node, "host")
        if any(path.name.startswith(f"{name}.") for path in folder.path.iterdir()):
            raise CarrelError(f"{folder.path}: there are samples of {node} already; remove {name}.* to import others")
        writer = SegmentWriter(folder.create(f"{name}.seg"), name=f"{folder.path / name}.seg")
        samples = 0
        try:
            writer.note(Note(time_us=rows[0].time_us, what="start", text="sampled by LDMS", job=job))
            for time_us, blocks in _samples(rows):
                writer.row(time_us, (Reading(blocks), None))
                samples += 1
            writer.note(Note(time_us=rows[-1].time_us, what="end", text="the last row that LDMS stored"))
        finally:
            writer.close()
        child = compact.spawn(folder, name, formats)
        _, said = child.communicate()
        if child.returncode:
            raise CarrelError(f"{folder.path}: {said.decode(errors='replace').strip()}")
        return folder.path, samples
    finally:
        folder.close()


def _is_of(row: LdmsRow, job: Job, node: str) -> bool:
    """Say whether a row is this job's. Where producers are named without the job, the component tells it."""
    if row.producer in {f"{job.user}-{job.key.job_id}-{node}", ""}:
        return row.component in {0, job.key.job_id}
    return row.producer == f"{job.user}-{node}" and row.component == job.key.job_id


def _samples(rows: Sequence[LdmsRow]) -> Iterator[tuple[int, list[Block]]]:
    layouts: dict[tuple[str, tuple[str, ...], bool], Layout] = {}
    sample: dict[str, dict[str, int | float]] = {}
    began_us = rows[0].time_us
    for row in rows:
        if row.time_us - began_us > TICK_US:
            yield began_us, _blocks(sample, layouts)
            sample, began_us = {}, row.time_us
        sample.setdefault(row.set, {}).update(row.values)
    yield began_us, _blocks(sample, layouts)


def _blocks(
    sample: dict[str, dict[str, int | float]], layouts: dict[tuple[str, tuple[str, ...], bool], Layout]
) -> list[Block]:
    """Numbers with and without a fraction have columns of their own."""
    blocks = []
    for name, values in sample.items():
        for floating in (False, True):
            chosen = {key: value for key, value in values.items() if _floats(name, value) == floating}
            key = (name, tuple(chosen), floating)
            if chosen and key not in layouts:
                kind = "counter" if name in _COUNTERS else "gauge"
                columns = tuple(Column(column, "", kind) for column in chosen)  # type: ignore[arg-type]  # one of both
                layouts[key] = Layout(Schema(set=name, columns=columns, source=f"LDMS {name}", floating=floating))
            if chosen:
                blocks.append(layouts[key].block(list(chosen.values())))
    return blocks


def _floats(name: str, value: float) -> bool:
    """A load that happens to be 4 is a fraction all the same."""
    return isinstance(value, float) or name == "loadavg"


def nodes_of(store: Path, job: Job) -> dict[str, list[Path]]:
    """Return LDMS's files of a job by node: ``<store>/<user>/<job>/<node>/<set>``.

    Raises:
        NotFoundError: there are none.
    """
    top = store / job.user / str(job.key.job_id)
    found = {one.name: sorted(path for path in one.iterdir() if path.is_file()) for one in _directories(top)}
    if not found:
        raise NotFoundError(f"{top}: LDMS has stored nothing of job {job.key.job_id}; is ldms.store_dir on this host?")
    return found


def _directories(top: Path) -> list[Path]:
    try:
        return sorted(path for path in top.iterdir() if path.is_dir())
    except OSError:
        return []
