"""Where the slurmd of a guest stands: beside it on its host, or inside it. All that differs between the two is here.

==============================  =====================================  ========================================
                                beside (``slurmd = "host"``)           inside (``slurmd = "guest"``)
==============================  =====================================  ========================================
the name is on a host where     address and host name are the host's   the host name is the host's
Slurm reaches it at             the host's address, known beforehand   the guest's own, known when it has one
the guest is made               at once; slurmd when the name is open  when the name is open: its slurmd starts
                                                                       with it
a guest that is not there       is made                                is lost, once its job has its nodes
==============================  =====================================  ========================================
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from carrel.model.guestnode import GuestNode, HostReport, NodeOrder
from carrel.model.pool import Place, PoolJob, PoolNode
from carrel.model.template import Slurmd


class Standing(Protocol):
    """What the decision asks of either."""

    def is_on(self, node: PoolNode, host: HostReport) -> bool:
        """Tell whether this name was given to a guest of this host."""
        ...

    def address(self, host: HostReport, guest: GuestNode | None) -> str:
        """Return where Slurm reaches the guest's slurmd; empty: nobody knows yet."""
        ...

    def order(self, plain: NodeOrder, job: PoolJob, nodes: Sequence[PoolNode], place: Place) -> NodeOrder | None:
        """Return what the host is told of a guest; None: not yet. ``nodes`` are all that the job has."""
        ...


class Beside:
    """On the host, under the guest's name."""

    def is_on(self, node: PoolNode, host: HostReport) -> bool:
        return (node.address, node.host_name) == (host.address, host.host)

    def address(self, host: HostReport, guest: GuestNode | None) -> str:
        del guest
        return host.address

    def order(self, plain: NodeOrder, job: PoolJob, nodes: Sequence[PoolNode], place: Place) -> NodeOrder | None:
        del job, nodes, place
        return plain


class Inside:
    """In the guest, which holds the cluster's key."""

    def is_on(self, node: PoolNode, host: HostReport) -> bool:
        return node.host_name == host.host

    def address(self, host: HostReport, guest: GuestNode | None) -> str:
        del host
        return guest.address if guest else ""

    def order(self, plain: NodeOrder, job: PoolJob, nodes: Sequence[PoolNode], place: Place) -> NodeOrder | None:
        """Nobody could hold back a slurmd inside, and one that registers under a closed name would stay outside."""
        if not plain.join:
            return None
        started = job.job.state in {"running", "suspended", "ended"}
        ports = {node.name: node.port for node in nodes}
        port = ports.pop(plain.node)
        peers = tuple(sorted(ports.items()))
        return msgspec.structs.replace(plain, port=port, peers=peers, address=place.address, started=started)


_STANDINGS: dict[Slurmd, Standing] = {"host": Beside(), "guest": Inside()}


def of(host: HostReport) -> Standing:
    """Return where the slurmds of a host's guests stand."""
    return _STANDINGS[host.slurmd]
