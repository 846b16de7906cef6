"""A guest that is a Slurm node: what the controller wants of a hypervisor host, and what the host has.

Both cross the wire whole, every time: a host that was told twice, or told nothing for a while, still knows all.
"""

from typing import Literal

import msgspec

from carrel.model.guest import GuestRequest
from carrel.model.job import JobKey
from carrel.model.template import Slurmd

GuestNodeState = Literal["starting", "ready", "refused", "failed", "ended"]
"""``refused``: what was asked for cannot be had anywhere, such as an image that nobody has. ``failed``: by no wish of
its owner, so Slurm is told that the node is down. ``ended``: the run's epilog has taken it, or its owner has shut it
down; no new one is made."""


class NodeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One guest that a host shall carry, and the node that it is to Slurm."""

    node: str
    """Slurm's name for it: one of the pool."""
    host: str
    run: JobKey
    uid: int
    gid: int
    user: str
    cpus: int
    memory_bytes: int
    """The job's memory on this node; the guest gets it less ``guests.memory_reserve_bytes``."""
    request: GuestRequest
    cwd: str = "/"
    join: bool = False
    """Slurm's record is ready for it: slurmd may be started under this name."""
    port: int = 0
    """Where a slurmd inside shall listen; 0: the cluster's ``SlurmdPort``."""
    peers: tuple[tuple[str, int], ...] = ()
    """The job's other nodes and their ports: an ``srun`` in a guest learns their addresses from Slurm, and no port."""
    address: str = ""
    """What a guest with a slurmd inside was given from the site's pool of addresses; empty: it finds its own."""
    started: bool = False
    """For a slurmd inside: the job has its nodes, so a guest that is not there is lost, and no new one is made."""


class GuestNode(msgspec.Struct, frozen=True, kw_only=True):
    """One guest that a host carries."""

    node: str
    run: JobKey
    state: GuestNodeState
    joined: bool = False
    """A slurmd runs for it."""
    reason: str = ""
    """Why it failed or ended, as a sentence."""
    started_s: float = 0.0
    """When this one was begun, by the host's clock: tells one that failed from the next."""
    ready_s: float = 0.0
    address: str = ""
    """Where slurmctld and srun reach a slurmd that is inside; empty: not known yet, or its slurmd is on the host."""


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that a host knows of itself."""

    host: str
    address: str
    """Where slurmctld and srun reach the slurmds of its guests; empty where each guest has its own inside."""
    guests: tuple[GuestNode, ...] = ()
    slurmd: Slurmd = "host"
    """Where the slurmds of its guests run."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """All that the controller wants of a host."""

    digest: str
    """Given back with the next report: it is answered at once where the orders have changed since, later where not."""
    orders: tuple[NodeOrder, ...] = ()
