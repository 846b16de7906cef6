"""Jobs that were sampled, made up: what plots, reports and sinks are tried on where no job needs to run for it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from carrel.model.job import Job, JobKey
from carrel.model.sample import Column, Note, Schema, View
from carrel.sampling import compact
from carrel.sampling.blocks import Layout, Reading
from carrel.sampling.folder import JobFolder, stem
from carrel.sampling.segment import SegmentWriter

BEGAN_US = 1_795_000_000_000_000
GIB = 2**30

Value = Callable[[float], float]
"""What a metric is so many seconds after the job began."""


def job(job_id: int = 7, **known: object) -> Job:
    """Return a job of the user ``ann`` that has four CPUs and a GiB, and an hour."""
    key = JobKey(cluster="k", job_id=job_id, submit_s=BEGAN_US // 10**6 - 60)
    plain: dict[str, object] = {"state": "running", "user": "ann", "cpus": 4, "memory_bytes": GIB}
    plain |= {"time_limit_s": 3600, "account": "physics", "name": "solve"}
    return msgspec.convert({"key": msgspec.to_builtins(key), **plain, **known}, Job)


def steady(*, cpus: float = 3.0, memory_bytes: float = 0.5 * GIB) -> dict[Column, Value]:
    """Return what a job does that keeps some CPUs busy, holds some memory, and writes a mebibyte each second."""
    return {
        Column("job.cpu_ns", "ns", "counter"): lambda at: at * cpus * 1e9,
        Column("job.memory_used_bytes", "bytes"): lambda at: min(at / 20, 1) * memory_bytes,
        Column("job.memory_limit_bytes", "bytes"): lambda _: GIB,
        Column("processes.read_bytes", "bytes", "counter"): lambda _: 0,
        Column("processes.written_bytes", "bytes", "counter"): lambda at: at * 2**20,
    }


def record(
    root: Path,
    of: Job,
    metrics: Mapping[Column, Value],
    *,
    node: str = "c1",
    view: View = "host",
    seconds: Sequence[float] = tuple(range(61)),
    formats: Sequence[str] = (),
    uid: int,
    gid: int,
) -> Path:
    """Write what a sampler would have, and return the job's directory.

    Args:
        root: Where all samples are.
        of: The job.
        metrics: By full name, ``job.cpu_ns``.
        node: Of which node.
        view: Who looked.
        seconds: When samples were taken, after the job's beginning.
        formats: What the job's end makes of them; none: it runs.
        uid: Whose files they are.
        gid: Their group.
    """
    folder = JobFolder.make(root, of.key, user=of.user, uid=uid, gid=gid)
    writer = SegmentWriter(folder.create(f"{stem(node, view)}.seg"), name=node)
    writer.note(Note(time_us=BEGAN_US, what="start", text="", job=of))
    sets: dict[str, list[Column]] = {}
    for column in metrics:
        sets.setdefault(column.name.partition(".")[0], []).append(column)
    layouts = {name: _layout(name, columns) for name, columns in sets.items()}
    for at in seconds:
        blocks = [layouts[name].block([metrics[column](at) for column in columns]) for name, columns in sets.items()]
        writer.row(BEGAN_US + round(at * 1e6), (None, Reading(blocks)))
    if formats:
        writer.note(Note(time_us=BEGAN_US + round(seconds[-1] * 1e6), what="end", text=""))
    writer.close()
    if formats:
        with contextlib.chdir(folder.path):
            compact.compact(stem(node, view), formats)
    folder.close()
    return folder.path


def _layout(name: str, columns: Sequence[Column]) -> Layout:
    short = tuple(msgspec.structs.replace(column, name=column.name.partition(".")[2]) for column in columns)
    return Layout(Schema(set=name, columns=short, source="made up", floating=name == "loadavg"))
