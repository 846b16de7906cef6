"""What hosts say they carry, and what they shall carry: each asks, and is answered at once when its orders change.

It is memory: after a restart each host speaks anew, and is told anew as soon as Slurm was seen and all could speak.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping

import msgspec

from carrel.errors import UnreachableError
from carrel.model.guestnode import HostReport, NodeOrder, Orders

HELD_S = 10.0
"""So long a host's question waits for an answer that differs from its last one."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What a host said last, when, and under which orders."""

    at_s: float
    report: HostReport
    digest: str


class HostOrders:
    """The hosts that have spoken, and the orders in force."""

    def __init__(self, *, silent_s: float, changed: Callable[[], None]) -> None:
        """Know of no host yet.

        Args:
            silent_s: Of a host that said nothing for so long, nothing is known.
            changed: Called when a host says something else than before.
        """
        self._silent_s = silent_s
        self._changed = changed
        self._heard: dict[str, Heard] = {}
        self._orders: dict[str, Orders] = {}
        self._news: dict[str, asyncio.Event] = {}
        """By host: set when its orders change."""

    async def exchange(self, report: HostReport, digest: str) -> Orders:
        """Take what a host says of itself and return what it shall carry, at once where that has changed since.

        Until Slurm was seen and all could speak, the answer waits: to tell a host nothing would empty it.
        """
        before = self._heard.get(report.host)
        heard = self._heard[report.host] = Heard(at_s=now_s(), report=report, digest=digest)
        if before is None or (before.report, before.digest) != (report, digest):
            self._changed()

        news = self._news.setdefault(report.host, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(HELD_S, self._silent_s / 3)):
                while report.host not in self._orders or self._orders[report.host].digest == digest:
                    news.clear()
                    await news.wait()
        if report.host not in self._orders:
            raise UnreachableError(
                "slurm was not seen yet, or not all hosts were heard, so nothing is known of this host"
            )
        if self._heard[report.host] is heard:  # else it has asked anew since
            self._heard[report.host] = msgspec.structs.replace(heard, at_s=now_s())
        return self._orders[report.host]

    def reports(self) -> dict[str, HostReport]:
        """Return what those said that were heard lately."""
        since_s = now_s() - self._silent_s
        return {name: heard.report for name, heard in self._heard.items() if heard.at_s > since_s}

    def address(self, host: str) -> str:
        """Return where Slurm reaches the slurmds of a host that was heard."""
        return self._heard[host].report.address

    def settled(self, hosts: Collection[str]) -> frozenset[str]:
        """Return those of these hosts that answered under the orders in force."""
        in_force = {name: orders.digest for name, orders in self._orders.items()}
        return frozenset(name for name in hosts if self._heard[name].digest == in_force.get(name))

    def lost(self, hosts: Collection[str]) -> set[str]:
        """Return the names that all others than these hosts carried when they were last heard."""
        return {guest.node for name, each in self._heard.items() if name not in hosts for guest in each.report.guests}

    def have_spoken(self, hosts: Collection[str]) -> bool:
        """Tell whether each of these hosts was heard, however long ago."""
        return set(hosts) <= self._heard.keys()

    def publish(self, wanted: Mapping[str, tuple[NodeOrder, ...]]) -> None:
        """Answer the hosts whose orders have changed; those that are not named have none."""
        # One that falls silent and speaks again is not told what it should have carried before.
        self._orders = {host: orders for host, orders in self._orders.items() if host in wanted}
        for host, orders in wanted.items():
            before = self._orders.get(host)
            if before is None or before.orders != orders:
                digest = hashlib.sha256(msgspec.json.encode(orders)).hexdigest()[:16]
                self._orders[host] = Orders(digest=digest, orders=orders)
                self._news.setdefault(host, asyncio.Event()).set()


def now_s() -> float:
    """Return the time by the loop's clock: no one can set it, and a test's may run faster."""
    return asyncio.get_running_loop().time()
