"""What Slurm says of guests that are nodes: the jobs of their partition, the names of the pool, and reservations.

A reservation of Slurm carries the run in its name and owns the names that the run's guests have, so no list of our own
could differ from it.
"""

import re

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
    wish: Wish | None = None
    """None: nobody noted any, so the job did not come through ``job_submit.lua``."""

    @property
    def key(self) -> JobKey:
        return self.job.key

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
