"""The names of the pool: which may be given to a guest, and what brings the others to rest.

No name is open that is not reserved: a job that Slurm could start by itself would start there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from carrel.core.guestdeeds import Close, PowerDown, Unreserve
from carrel.model.pool import PoolNode

if TYPE_CHECKING:
    from carrel.core.guestnodes import World


def give_back(nodes: Sequence[PoolNode], reservation: str, why: str) -> list[Close | Unreserve]:
    """Return what takes names out of use: closed first."""
    return [Close(node.name, why) for node in nodes if not node.closed] or [Unreserve(reservation, why)]


def names_at_rest(world: "World") -> list[Close | PowerDown]:
    """Return what brings names that nobody uses to rest, closed."""
    actions: list[Close | PowerDown] = []
    for node in world.look.nodes.values():
        if node.name in world.reserved:
            continue
        if node.resting or "POWERING_DOWN" in node.state:  # which forgets that it was closed
            if not node.closed:
                actions.append(Close(node.name, "no guest has this name"))
        elif not node.parting:
            actions.append(PowerDown(node.name, "no guest has this name any more"))
    return actions


def free_names(world: "World") -> list[str]:
    """Return the names that a guest may have now."""
    carried = {guest.node for host in world.hosts.values() for guest in host.guests}
    used = world.reserved | carried | set(world.lost)
    return [
        node.name
        for node in world.look.nodes.values()
        if node.resting and node.closed and not node.parting and node.name not in used
    ]
