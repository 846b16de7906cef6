"""A run as the bank sees it: what Slurm's queue shows of it, and what Slurm's accounting says it used."""

import msgspec

from carrel.model.job import JobKey, JobState
from carrel.model.price import Resources

GUEST_PER_NODE = "g"
GUEST_PER_TASK = "t"
_MARK = "bank="
_HELD = ";held"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the queue: a run, or all tasks of an array that wait."""

    key: JobKey
    state: JobState
    slurm_state: str
    user: str
    account: str
    array_job_id: int = 0
    """0: no array."""
    waiting_tasks: int = 0
    """How many tasks of an array the line stands for; 0: it stands for one run."""
    partitions: tuple[str, ...]
    qos: str
    resources: Resources
    """Allocated; of what waits, requested."""
    limit_s: int | None
    """None: unlimited."""
    start_s: int = 0
    """0: it has not begun."""
    end_s: int = 0
    elapsed_s: int = 0
    """Without the time that it was suspended."""
    placed: bool = False
    """It has, or had, nodes."""
    mark: str = ""
    """What ``job_submit.lua`` left in its admin_comment."""

    @property
    def token(self) -> str:
        """What its lien was placed under at submit; empty: it went past us."""
        return token_of(self.mark)

    @property
    def held_for_us(self) -> bool:
        """Whether it waits for the bank, and not for its user."""
        return self.state == "held" and self.mark.startswith(_MARK) and self.mark.endswith(_HELD)

    @property
    def over(self) -> bool:
        return self.state == "ended"


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What the accounting says of a run that has ended."""

    job_id: int
    submit_s: int
    """Of this run: a requeue submits anew."""
    restart: int = 0
    array_job_id: int = 0
    state: str
    """``COMPLETED``, ``NODE_FAIL`` …"""
    user: str
    account: str
    partition: str
    qos: str
    resources: Resources
    start_s: int
    end_s: int
    elapsed_s: int
    mark: str = ""
    source: str = "slurmdbd"
    """Who says so: ``slurmdbd``, ``slurmctld``, or ``last_seen``."""

    @property
    def token(self) -> str:
        return token_of(self.mark)


def mark_of(token: str, *, held: bool = False) -> str:
    """Return what a job's admin_comment says of its lien."""
    return f"{_MARK}{token}{_HELD if held else ''}"


def token_of(mark: str) -> str:
    """Return the token that an admin_comment names; empty: none.

    >>> token_of("bank=5fe9.g;held")
    '5fe9.g'
    """
    return mark.removeprefix(_MARK).removesuffix(_HELD) if mark.startswith(_MARK) else ""


def guests_of(token: str, *, nodes: int) -> int:
    """Return how many guests a job has by its token: one for each node, or for each task.

    >>> guests_of("5fe9.g", nodes=2), guests_of("5fe9.t8", nodes=2), guests_of("5fe9", nodes=2)
    (2, 8, 0)
    """
    _, _, kind = token.partition(".")
    if kind == GUEST_PER_NODE:
        return nodes
    return int(kind[1:]) if kind[:1] == GUEST_PER_TASK and kind[1:].isdigit() else 0
