"""Which directories hold the tasks of a job array: each is a job of its own, whose samples know the array."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from carrel.errors import CarrelError, NotFoundError
from carrel.model.job import Job
from carrel.model.sample import Note
from carrel.sampling.segment import open_reader


class _About(msgspec.Struct):
    """Of ``summary.json``, all that is needed here."""

    job: Job


def tasks(root: Path, array_job_id: int) -> dict[int, Path]:
    """Return the directory of each task's latest run, by task id; empty: no array that the caller may read.

    Slurm numbers the tasks of an array from its own id on, so no directory of an earlier job is opened.
    """
    found: dict[int, tuple[Job, Path]] = {}
    for path in _from(root, array_job_id):
        job = described(path)
        if job is None or job.array_job_id != array_job_id or job.array_task_id is None:
            continue
        before = found.get(job.array_task_id)
        if before is None or (job.key.submit_s, job.key.restart) > (before[0].key.submit_s, before[0].key.restart):
            found[job.array_task_id] = job, path
    return {task: found[task][1] for task in sorted(found)}


def task(root: Path, array_job_id: int, task_id: int) -> Path:
    """Return the directory of the latest run of one task.

    Raises:
        NotFoundError: there is none that the caller may read.
    """
    known = tasks(root, array_job_id)
    if task_id not in known:
        some = ", ".join(str(number) for number in list(known)[:8]) or "none"
        raise NotFoundError(f"no samples of task {task_id} of job {array_job_id} that you may read; there are: {some}")
    return known[task_id]


def _from(root: Path, job_id: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        users = [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
        for user in users:
            with contextlib.suppress(OSError):  # somebody else's
                for entry in os.scandir(user):
                    number = entry.name.partition(".")[0]
                    if number.isdecimal() and int(number) >= job_id:
                        yield Path(entry.path)


def described(directory: Path) -> Job | None:
    """Return whose samples these are; None: there are none, or they are not the caller's to read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((directory / "summary.json").read_bytes(), type=_About).job
    for path in sorted(directory.glob("samples.*.seg")):
        with contextlib.suppress(CarrelError, OSError), open_reader(path) as reader:
            for entry in reader.entries():
                if isinstance(entry, Note) and entry.job is not None:
                    return entry.job
    return None
