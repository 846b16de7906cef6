"""The names of the pool: what takes them out of use, and what brings them to rest.

No name is open that is not reserved: a job that Slurm could start by itself would start there.
"""

from collections.abc import Sequence

from carrel.core.guestdeeds import Close, PowerDown, Unreserve
from carrel.core.guestworld import World
from carrel.model.pool import PoolNode


def give_back(nodes: Sequence[PoolNode], reservation: str, why: str) -> list[Close | Unreserve]:
    """Return what takes names out of use: closed first."""
    return [Close(node.name, why) for node in nodes if not node.closed] or [Unreserve(reservation, why)]


def names_at_rest(world: World) -> list[Close | PowerDown]:
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
