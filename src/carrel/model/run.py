"""A run as the bank sees it: what Slurm's queue shows of it, and what Slurm's accounting says it used."""

import msgspec

from carrel.model.job import JobKey, JobState
from carrel.model.price import Resources

GUEST_PER_NODE = "g"
GUEST_PER_TASK = "t"
_MARK = "bank="
_HELD = "held"


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
    tasks: int = 1
    mark: str = ""
    """What ``job_submit.lua`` left in its admin_comment."""

    @property
    def token(self) -> str:
        """What its lien was placed under at submit; empty: it went past us.

        A job that was taken in silence does not name the number of its guests, where each task has one.
        """
        token = token_of(self.mark)
        return f"{token}{self.tasks}" if token.endswith(f".{GUEST_PER_TASK}") else token

    @property
    def held_for_us(self) -> bool:
        """Whether it waits for the bank, and not for its user."""
        return self.state == "held" and self.mark.startswith(_MARK) and self.mark.split(";")[1:2] == [_HELD]

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


def mark_of(token: str, *, held: bool = False, before: str = "") -> str:
    """Return what a job's admin_comment shall say of its lien; what others of Carrel wrote ``before`` stays.

    >>> mark_of("5fe9.g", held=True, before="carrel:image=debian12")
    'bank=5fe9.g;held;carrel:image=debian12'
    """
    others = [part for part in before.split(";") if part and part != _HELD and not part.startswith(_MARK)]
    return ";".join([f"{_MARK}{token}", *([_HELD] if held else []), *others])


def token_of(mark: str) -> str:
    """Return the token that an admin_comment names; empty: none.

    >>> token_of("bank=5fe9.g;held"), token_of("carrel:image=debian12")
    ('5fe9.g', '')
    """
    return mark.partition(";")[0].removeprefix(_MARK) if mark.startswith(_MARK) else ""


def guests_of(token: str, *, nodes: int) -> int:
    """Return how many guests a job has by its token: one for each node, or for each task, if that number is known.

    >>> [guests_of(token, nodes=2) for token in ("5fe9.g", "5fe9.t8", "5fe9.t", "5fe9")]
    [2, 8, 2, 0]
    """
    _, _, kind = token.partition(".")
    if kind in {GUEST_PER_NODE, GUEST_PER_TASK}:
        return nodes
    return int(kind[1:]) if kind[:1] == GUEST_PER_TASK and kind[1:].isdigit() else 0
