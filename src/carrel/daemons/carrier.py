"""What a host carries of guests that are nodes, kept as carrelctld orders it, whoever speaks for the host.

Both sides say everything, every time. The question waits at carrelctld until the answer changes (a long poll), and is
asked anew at once when something changes here. While carrelctld is away, all stays as it is.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from carrel.errors import CarrelError, UnreachableError
from carrel.model.guestnode import GuestNode, NodeOrder, Orders

RETRY_S = 1.0

_LOG = logging.getLogger(__name__)

Ask = Callable[[tuple[GuestNode, ...], str], Awaitable[Orders]]
"""Say what is carried, under the orders of this digest, and get those in force."""


Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Carriable(Protocol):
    """One guest that is a node, whether or not it is there yet."""

    @property
    def name(self) -> str:
        """Return its name in Slurm."""
        ...

    order: NodeOrder

    def begin(self) -> None:
        """Make it, in the background. Called once."""
        ...

    def update(self, order: NodeOrder) -> None:
        """Take a newer order for the same run."""
        ...

    def facts_for_controller(self) -> GuestNode:
        """Return how it does."""
        ...

    async def unmake(self) -> None:
        """Leave nothing of it. What is absent already is fine; what fails is tried again."""
        ...


_C = TypeVar("_C", bound=Carriable)


class Carrier(Generic[_C]):
    """The guests of one host."""

    def __init__(
        self,
        host: str,
        *,
        ask: Ask,
        make: Callable[[NodeOrder], _C],
        adopted: dict[str, _C],
        spawn: Spawn = asyncio.ensure_future,
    ) -> None:
        """Ask nobody yet.

        Args:
            host: Its name, for the log.
            ask: The controller.
            make: Describes a guest; ``begin`` makes it.
            adopted: What is there already, by name.
            spawn: Begins what goes on beside the caller.
        """
        self.carried = adopted
        self.changed = asyncio.Event()
        """Set by whoever sees that a guest has changed: the controller is told at once."""
        self._host = host
        self._ask = ask
        self._make = make
        self._spawn = spawn
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._told: tuple[GuestNode, ...] | None = None
        self._digest = ""

    def staying(self) -> list[_C]:
        """Return the guests that are not being unmade."""
        return [each for name, each in self.carried.items() if name not in self._leaving]

    def adopt(self, guest: _C) -> None:
        """Carry what turned up by itself: the controller says whether it stays."""
        self.carried[guest.name] = guest
        self._digest = ""
        self.changed.set()

    def look(self) -> None:
        """Say it, if something is not as the controller was told."""
        if self._facts() != self._told:
            self.changed.set()

    async def follow(self) -> None:
        """Carry what is wanted, until cancelled."""
        failures = 0
        while True:
            self.changed.clear()
            self._told = self._facts()
            asking = asyncio.ensure_future(self._ask(self._told, self._digest))
            changing = asyncio.ensure_future(self.changed.wait())
            try:
                await asyncio.wait([asking, changing], return_when=asyncio.FIRST_COMPLETED)
            finally:
                changing.cancel()
                if not asking.done():
                    asking.cancel()
            if asking.cancelled() or not asking.done():
                continue
            try:
                orders = asking.result()
            except CarrelError as error:
                if not failures:
                    _LOG.warning("host %s: no orders, trying again: %s", self._host, error)
                failures += 1
                await asyncio.sleep(RETRY_S)
                continue
            failures = 0
            self._digest = orders.digest
            self._apply(orders)

    def _facts(self) -> tuple[GuestNode, ...]:
        return tuple(carried.facts_for_controller() for _, carried in sorted(self.carried.items()))

    def _apply(self, orders: Orders) -> None:
        wanted = {order.node: order for order in orders.orders}
        for name, carried in self.carried.items():
            order = wanted.get(name)
            if name in self._leaving:
                continue
            if order and order.run == carried.order.run:
                carried.update(order)
            else:
                self._leaving[name] = self._spawn(self._unmake(carried))
        for name, order in wanted.items():
            if name not in self.carried:
                self.carried[name] = self._make(order)
                self.carried[name].begin()

    async def _unmake(self, carried: _C) -> None:
        try:
            await carried.unmake()
        except UnreachableError as error:  # the orders of the next answer try again
            _LOG.warning("node %s is not gone yet: %s", carried.name, error)
            await asyncio.sleep(RETRY_S)
            self._digest = ""
        except Exception:  # noqa: BLE001  # they do so whatever it was
            _LOG.exception("node %s is not gone yet", carried.name)
            await asyncio.sleep(RETRY_S)
            self._digest = ""
        else:
            del self.carried[carried.name]
        finally:
            del self._leaving[carried.name]
            self.changed.set()
