"""A job is one *run* of a Slurm job. Job ids come back: after a requeue, after ``MaxJobId``, after a crash."""

from typing import Literal

import msgspec

JobState = Literal["held", "pending", "running", "suspended", "ended", "unknown"]
"""What Slurm says. ``unknown``: Slurm answered and has no such run. No answer at all is not a state."""


class JobKey(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """Names one run: cluster, job id, submit time, restart count."""

    cluster: str
    job_id: int
    submit_s: int
    """Seconds since the epoch, as Slurm reports the submission."""
    restart: int = 0

    def __str__(self) -> str:
        """Return the key as it stands in file names: ``4711.1731000000.0``."""
        return f"{self.job_id}.{self.submit_s}.{self.restart}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A run as Slurm describes it, seen from one node where ``cpus`` and ``memory_bytes`` are given."""

    key: JobKey
    state: JobState
    user: str = ""
    uid: int = -1
    gid: int = -1
    name: str = ""
    account: str = ""
    partition: str = ""
    nodes: tuple[str, ...] = ()
    """Allocated nodes, in Slurm's order; empty while pending."""
    cpus: int = 0
    """CPUs allocated on the node that looked; 0 where no node was asked about."""
    memory_bytes: int = 0
    """Memory allocated on the node that looked; 0: not limited or not asked."""
    gpus: tuple[int, ...] | None = None
    """Numbers of the GPUs allocated on the node that looked; None where no node was asked about."""
    time_limit_s: int | None = None
    wants_guest: bool = False
    array_job_id: int = 0
    """What the tasks of an array have in common; 0: none, or not known."""
    array_task_id: int | None = None
    slurm_state: str = ""
    """Slurm's own word, for people: ``COMPLETING``, ``NODE_FAIL`` …"""
