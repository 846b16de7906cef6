"""What Slurm says of guests that are nodes: the jobs of their partition, the names of the pool, and reservations.

A reservation of Slurm carries the run in its name and owns the names that the run's guests have, so no list of our own
could differ from it.
"""

import re
from collections.abc import Sequence

import msgspec

from carrel.model.guest import GuestRequest
from carrel.model.job import Job, JobKey

_ROOM = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:/(\d+))?")
_RESERVATION = re.compile(r"carrel_(\d+)_(\d+)_(\d+)")


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asked for when it was submitted, as its ``admin_comment`` says."""

    request: GuestRequest
    cwd: str = "/"
    held_by_user: bool = False
    """Submitted with ``--hold``: it waits for its owner first."""


class PoolJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job in the partition of the guests."""

    job: Job
    nodes: int
    cpus: int
    """Of each node."""
    memory_bytes: int
    """Of each node; 0: Slurm knows no number."""
    reservation: str = ""
    reason: str = ""
    """Slurm's own word for why it waits."""
    waits_for_others: bool = False
    """It depends on jobs that have not ended."""
    started_s: float | None = None
    begins_s: float = 0.0
    """Its owner lets it begin no sooner; 0: at any time."""
    tasks: tuple[int, ...] = ()
    """Tasks of an array that Slurm keeps as this one job as long as they wait; empty: it is a job by itself."""
    at_once: int = 0
    """How many tasks of its array its owner lets run at the same time (``%``); 0: all."""
    batch: bool = True
    """Nobody waits for it at a terminal, in an srun or a salloc."""
    wish: Wish | None = None
    """None: nobody noted any, so the job did not come through ``job_submit.lua``."""

    @property
    def key(self) -> JobKey:
        return self.job.key

    @property
    def name(self) -> str:
        """Return how Slurm's commands name this, and nothing else: to them an array's id means all of its tasks."""
        if len(self.tasks) > 1:
            return f"{self.job.array_job_id}_[{_ranges(self.tasks)}]"
        return self.one

    @property
    def one(self) -> str:
        """Return how Slurm's questions name this; of several tasks, the first."""
        if self.job.array_task_id is None:
            return str(self.key.job_id)
        return f"{self.job.array_job_id}_{self.job.array_task_id}"

    @property
    def starting(self) -> bool:
        """Tell whether it has its nodes and has not begun on them. 22.05 calls it running while its prolog does not."""
        word = self.job.slurm_state
        return word == "CONFIGURING" or (word == "RUNNING" and self.reason == "Prolog")

    @property
    def alive(self) -> bool:
        """Tell whether the run waits, runs, or is not done with its nodes."""
        return self.job.state != "ended" or self.job.slurm_state == "COMPLETING"


class PoolNode(msgspec.Struct, frozen=True, kw_only=True):
    """A name of the pool."""

    name: str
    state: frozenset[str]
    """Slurm's words: ``IDLE``, ``CLOUD``, ``DRAIN``, ``POWERED_DOWN`` …"""
    address: str
    host_name: str
    port: int = 0
    """Of its slurmd; 0: the cluster's ``SlurmdPort``."""

    @property
    def resting(self) -> bool:
        """Tell whether no slurmd is behind it, so that the name may be used."""
        return "POWERED_DOWN" in self.state

    @property
    def parting(self) -> bool:
        return not self.state.isdisjoint({"POWER_DOWN", "POWERING_DOWN"})

    @property
    def closed(self) -> bool:
        """Tell whether no job can start on it."""
        return "DRAIN" in self.state

    @property
    def busy(self) -> bool:
        return not self.state.isdisjoint({"ALLOCATED", "MIXED", "COMPLETING"})

    @property
    def joined(self) -> bool:
        """Tell whether its slurmd has registered and answers."""
        return self.state.isdisjoint(
            {"POWERED_DOWN", "POWER_DOWN", "POWERING_DOWN", "POWERING_UP", "NOT_RESPONDING", "DOWN"}
        )


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A reservation of ours."""

    name: str
    nodes: tuple[str, ...]
    users: str


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, seen at one time."""

    cluster: str
    jobs: tuple[PoolJob, ...]
    nodes: dict[str, PoolNode]
    reservations: dict[str, Reservation]
    partition_state: str = "UP"
    """``UP``; ``DOWN`` or ``INACTIVE``: no job starts; ``DRAIN``: none is accepted."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Room that a run has on a host, for one guest; from the controller's table of hosts."""

    run: JobKey
    attempt: int
    """Room on a host that fell silent is kept, and other room is sought as the next attempt."""
    host: str
    cpus: int
    memory_bytes: int
    address: str = ""
    """From the site's pool of addresses, for its guest."""


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as Slurm writes them.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def reservation_name(run: JobKey) -> str:
    """Return the name of the run's reservation.

    >>> reservation_name(JobKey(cluster="c", job_id=7, submit_s=1731000000, restart=1))
    'carrel_7_1731000000_1'
    """
    return f"carrel_{run.job_id}_{run.submit_s}_{run.restart}"


def run_of_reservation(name: str, cluster: str) -> JobKey | None:
    """Return the run that a reservation is for; None: it is not ours."""
    match = _RESERVATION.fullmatch(name)
    if match is None:
        return None
    job_id, submit_s, restart = map(int, match.groups())
    return JobKey(cluster=cluster, job_id=job_id, submit_s=submit_s, restart=restart)


def room_name(run: JobKey, attempt: int) -> str:
    """Return the name under which an attempt of a run takes room.

    >>> room_name(JobKey(cluster="c", job_id=7, submit_s=9), 0), room_name(JobKey(cluster="c", job_id=7, submit_s=9), 2)
    ('7.9.0', '7.9.0/2')
    """
    return f"{run}/{attempt}" if attempt else str(run)


def run_of_room(name: str, cluster: str) -> tuple[JobKey, int] | None:
    """Return the run and the attempt of such a name; None: it is of something else."""
    match = _ROOM.fullmatch(name)
    if match is None:
        return None
    job_id, submit_s, restart, attempt = (int(part or 0) for part in match.groups())
    return JobKey(cluster=cluster, job_id=job_id, submit_s=submit_s, restart=restart), attempt
