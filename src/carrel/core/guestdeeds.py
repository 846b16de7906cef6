"""What the controller may do for guests that are Slurm nodes. Each deed may be done twice, and carries its reason.

Which is due when is decided by ``carrel.core.guestnodes``.
"""

import msgspec

from carrel.model.host import Demand
from carrel.model.job import JobKey


class Hold(msgspec.Struct, frozen=True):
    run: JobKey
    reason: str


class Split(msgspec.Struct, frozen=True):
    """Make jobs of their own of these tasks of an array that waits."""

    run: JobKey
    tasks: tuple[int, ...]
    reason: str


class FindRoom(msgspec.Struct, frozen=True):
    """Let the run stand in the queue for room (``carrel.core.queue``): for all of its guests, or for none."""

    run: JobKey
    demand: Demand
    attempt: int
    reason: str


class Assign(msgspec.Struct, frozen=True):
    """Point these names at their hosts, and then reserve them for the run's owner."""

    run: JobKey
    user: str
    hosts: tuple[tuple[str, str], ...]
    """(name, host)."""
    reason: str


class Pin(msgspec.Struct, frozen=True):
    run: JobKey
    reservation: str
    """Empty: in none."""
    reason: str


class Point(msgspec.Struct, frozen=True):
    """Tell Slurm the address that the guest of this name has got."""

    node: str
    address: str
    reason: str


class Open(msgspec.Struct, frozen=True):
    """Let jobs start on a name; it is reserved."""

    node: str
    reason: str


class Close(msgspec.Struct, frozen=True):
    """Let no further job start on a name."""

    node: str
    reason: str


class Release(msgspec.Struct, frozen=True):
    run: JobKey
    reason: str


class Recall(msgspec.Struct, frozen=True):
    """Hold a job again that was released and that Slurm does not start; it rests before it is tried again."""

    run: JobKey
    reason: str


class GiveBackJob(msgspec.Struct, frozen=True):
    """Let Slurm requeue, or end, a job that has nodes and does not start: these nodes are down."""

    run: JobKey
    reason: str


class Down(msgspec.Struct, frozen=True):
    """Tell Slurm that a node is gone; it ends or requeues the job that runs there."""

    node: str
    run: JobKey
    reason: str


class Unreserve(msgspec.Struct, frozen=True):
    reservation: str
    reason: str


class PowerDown(msgspec.Struct, frozen=True):
    node: str
    reason: str


class GiveBackRoom(msgspec.Struct, frozen=True):
    """Give back all room that an attempt of a run has taken."""

    run: JobKey
    attempt: int
    reason: str


class Cancel(msgspec.Struct, frozen=True):
    run: JobKey
    reason: str


class Tell(msgspec.Struct, frozen=True):
    """Say why the job waits."""

    run: JobKey
    reason: str


class Rest(msgspec.Struct, frozen=True):
    """Let the run stand in no line for room, and say what it waits for."""

    run: JobKey
    reason: str


OnJob = Hold | Split | Assign | Pin | Release | Recall | GiveBackJob | Cancel
OnLine = FindRoom | Tell | Rest
"""What a look at Slurm and the hosts does not show."""
OnName = Point | Open | Close | Down | PowerDown | Unreserve | GiveBackRoom
Action = OnJob | OnLine | OnName
