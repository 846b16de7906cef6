"""A host's part in guests that are Slurm nodes: carreld asks carrelctld what the host shall carry, and makes it so."""

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

import msgspec

from carrel.daemons import transport
from carrel.daemons.carrier import Carrier
from carrel.daemons.guestlogs import keep_pruned
from carrel.daemons.guestnode import Carried, records
from carrel.model.guestnode import GuestNode, HostReport, NodeOrder, Orders

if TYPE_CHECKING:
    from carrel.daemons.node import Node

LOOK_PERIOD_S = 0.25
POLL_TIMEOUT_S = 30.0
"""More than the controller keeps a question."""

_LOG = logging.getLogger("carreld")


class Hypervisor:
    """Carries guest-nodes on one host."""

    def __init__(self, host: "Node") -> None:
        """Adopt what an earlier carreld carried here."""
        self._host = host
        self._due = asyncio.Event()
        self._carrier = Carrier(
            host.name,
            ask=self._ask,
            make=self._carry,
            adopted={record.order.node: self._carry(record.order) for record in records(host)},
        )

    async def run(self) -> None:
        """Carry what is wanted, until cancelled."""
        for carried in self._carrier.carried.values():
            carried.begin()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._carrier.follow())
            group.create_task(keep_pruned(self._host.config.guests.logs))

    def _carry(self, order: NodeOrder) -> Carried:
        return Carried(self._host, order, changed=self._due.set)

    async def _watch(self) -> None:
        """Look at the guests, and say when one changed."""
        while True:
            self._due.clear()
            for carried in self._carrier.staying():
                await self._look_at(carried)
            await self._sweep()
            self._carrier.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_PERIOD_S):
                    await self._due.wait()

    async def _look_at(self, carried: Carried) -> None:
        try:
            await carried.look()
        except Exception as error:  # noqa: BLE001  # one odd guest must not end the look at all others
            _LOG.exception("a look at node %s failed", carried.name)
            carried.journal.add("sweep-failed", str(error), job_id=carried.order.run.job_id, uid=carried.order.uid)

    async def _sweep(self) -> None:
        """Destroy guest-nodes that no order is noted for: begun by a carreld that was killed while it unmade them."""
        for guest in (await self._host.report()).guests:
            if guest.per == "node" and guest.node not in self._carrier.carried:
                await self._host.end(guest)

    async def _ask(self, guests: tuple[GuestNode, ...], digest: str) -> Orders:
        body = msgspec.json.encode(HostReport(host=self._host.name, address=_address(), guests=guests))
        path = f"/v1/hosts/{self._host.name}/report?digest={digest}"
        answer = await transport.request(self._host.config.controller, "POST", path, body, timeout_s=POLL_TIMEOUT_S)
        return transport.converted(transport.decoded(answer), Orders)


def _address() -> str:
    """Return the address by which others reach this host: what its own name stands for."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET)[0][4][0])
    except OSError:
        return socket.gethostname()
