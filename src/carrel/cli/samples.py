"""Which job is meant, and where its samples are: the user's own, or all, for those whom the site lets read them."""

import asyncio
import contextlib
import os
import pwd
import re
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from carrel import process
from carrel.config import Config
from carrel.errors import CarrelError, NotFoundError, RefusedError, UsageError
from carrel.sampling import finding, reading
from carrel.slurm.client import SlurmClient

JobName = Annotated[str, Parameter(name="JOB", help="Id of the job; of an array's task: 4711_3.")]

_SACCT_TIMEOUT_S = 10.0


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A job, or an array of them."""

    job_id: int
    directory: Path | None = None
    tasks: dict[int, Path] = {}
    """Of an array: by task id."""


def find(settings: Config, name: str) -> Found:
    """Return where the samples of a job are, or those of all tasks where it is an array.

    Raises:
        UsageError: it is no job id.
        RefusedError: they are somebody else's.
        NotFoundError: there are none.
    """
    match = re.fullmatch(r"(\d{1,10})(?:_(\d{1,10}))?", name)
    if match is None:
        raise UsageError(f"{name!r} is no job id: 4711, or 4711_3 for a task of an array")
    root = Path(settings.metrics.root)
    job_id = int(match[1])
    try:
        if match[2] is not None:
            return Found(job_id=job_id, directory=finding.task(root, job_id, int(match[2])))
        return _plain(root, job_id)
    except NotFoundError:
        owner = _owner(settings, job_id)
        if owner and os.geteuid() != 0 and owner != _me():
            readers = settings.metrics.readers
            names = list(dict.fromkeys((owner, "root", *([f"the group {readers}"] if readers else []))))
            who = " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
            raise RefusedError(f"job {name} is {owner}'s: only {who} may read its samples (metrics.readers)") from None
        raise


def _plain(root: Path, job_id: int) -> Found:
    try:
        directory = reading.find(root, job_id)
    except NotFoundError:
        # Of an array, the task that has the array's own id may not have begun.
        if tasks := finding.tasks(root, job_id):
            return Found(job_id=job_id, tasks=tasks)
        raise
    job = finding.described(directory)
    if job is not None and job.array_job_id == job_id:
        return Found(job_id=job_id, tasks=finding.tasks(root, job_id))
    return Found(job_id=job_id, directory=directory)


def one(settings: Config, name: str) -> Path:
    """Return where the samples of one job are.

    Raises:
        UsageError: it is an array, or no job id.
        RefusedError: they are somebody else's.
        NotFoundError: there are none.
    """
    found = find(settings, name)
    if found.directory is None:
        some = next(iter(found.tasks))
        raise UsageError(f"job {name} is an array of {len(found.tasks)} tasks; name one of them, such as {name}_{some}")
    return found.directory


def _me() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _owner(settings: Config, job_id: int) -> str:
    """Return whose job it is, as far as Slurm tells; it forgets, and accounting may not be there."""
    with contextlib.suppress(CarrelError):
        if job := asyncio.run(SlurmClient(settings.slurm).job(job_id)):
            return job.user
    words = [f"{settings.slurm.bin_dir}/sacct", "-X", "-n", "-P", "-o", "User", "-j", str(job_id)]
    env = {"SLURM_CONF": settings.slurm.conf} if settings.slurm.conf else None
    with contextlib.suppress(CarrelError):
        return process.run(words, timeout_s=_SACCT_TIMEOUT_S, env=env).partition("\n")[0].strip()
    return ""
