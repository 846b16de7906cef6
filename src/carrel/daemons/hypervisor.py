"""A host's part in guests that are Slurm nodes: carreld asks carrelctld what the host shall carry, and makes it so.

Both sides say everything, every time. The question waits at carrelctld until the answer changes (a long poll), and is
asked anew at once when something changes here. While carrelctld is away, all stays as it is.
"""

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

import msgspec

from carrel.daemons import transport
from carrel.daemons.guestlogs import GuestLogs
from carrel.daemons.guestnode import Carried, records
from carrel.errors import CarrelError
from carrel.model.guestnode import GuestNode, HostReport, NodeOrder, Orders

if TYPE_CHECKING:
    from carrel.daemons.node import Node

LOOK_PERIOD_S = 0.25
POLL_TIMEOUT_S = 30.0
"""More than the controller keeps a question."""
RETRY_S = 1.0
PRUNE_PERIOD_S = 3600.0

_LOG = logging.getLogger("carreld")


class Hypervisor:
    """Carries guest-nodes on one host."""

    def __init__(self, host: "Node") -> None:
        """Adopt what an earlier carreld carried here."""
        self._host = host
        self._due = asyncio.Event()
        self._carried = {record.order.node: self._carry(record.order) for record in records(host)}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._told: tuple[GuestNode, ...] | None = None
        self._digest = ""

    async def run(self) -> None:
        """Carry what is wanted, until cancelled."""
        for carried in self._carried.values():
            carried.begin()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._follow())
            group.create_task(self._prune())

    def _carry(self, order: NodeOrder) -> Carried:
        return Carried(self._host, order, changed=self._due.set)

    async def _watch(self) -> None:
        """Look at the guests, and say when one changed."""
        while True:
            self._due.clear()
            for carried in list(self._carried.values()):
                if carried.name not in self._leaving:
                    await self._look_at(carried)
            await self._sweep()
            if self._facts() != self._told:
                self._changed.set()
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
            if guest.per == "node" and guest.node not in self._carried:
                await self._host.end(guest)

    async def _prune(self) -> None:
        """Remove logs of guests that ended long ago."""
        logs = GuestLogs(self._host.config.guests.logs)
        while True:
            try:
                await asyncio.to_thread(logs.prune)
            except (OSError, CarrelError) as error:
                _LOG.warning("old logs of guests stay for now: %s", error)
            await asyncio.sleep(PRUNE_PERIOD_S)

    async def _follow(self) -> None:
        failures = 0
        while True:
            self._changed.clear()
            asking = asyncio.ensure_future(self._ask())
            changing = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([asking, changing], return_when=asyncio.FIRST_COMPLETED)
            changing.cancel()
            if not asking.done():
                asking.cancel()
                continue
            try:
                orders = asking.result()
            except CarrelError as error:
                if not failures:
                    _LOG.warning("no orders, trying again: %s", error)
                failures += 1
                await asyncio.sleep(RETRY_S)
                continue
            failures = 0
            self._digest = orders.digest
            self._apply(orders)

    async def _ask(self) -> Orders:
        self._told = self._facts()
        body = msgspec.json.encode(
            HostReport(
                host=self._host.name,
                address=_address(),
                guests=self._told,
            )
        )
        path = f"/v1/hosts/{self._host.name}/report?digest={self._digest}"
        answer = await transport.request(self._host.config.controller, "POST", path, body, timeout_s=POLL_TIMEOUT_S)
        return transport.converted(transport.decoded(answer), Orders)

    def _facts(self) -> tuple[GuestNode, ...]:
        return tuple(carried.facts_for_controller() for _, carried in sorted(self._carried.items()))

    def _apply(self, orders: Orders) -> None:
        wanted = {order.node: order for order in orders.orders}
        for name, carried in self._carried.items():
            order = wanted.get(name)
            if name in self._leaving:
                continue
            if order and order.run == carried.order.run:
                carried.update(order)
            else:
                self._leaving[name] = asyncio.ensure_future(self._unmake(carried))
        for name, order in wanted.items():
            if name not in self._carried:
                self._carried[name] = self._carry(order)
                self._carried[name].begin()
        self._due.set()  # a slurmd may be wanted

    async def _unmake(self, carried: Carried) -> None:
        try:
            await carried.unmake()
        except Exception:  # noqa: BLE001  # the orders of the next answer try again
            _LOG.exception("node %s is not gone yet", carried.name)
            self._digest = ""
        else:
            del self._carried[carried.name]
        finally:
            del self._leaving[carried.name]
            self._changed.set()


def _address() -> str:
    """Return the address by which others reach this host: what its own name stands for."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET)[0][4][0])
    except OSError:
        return socket.gethostname()
