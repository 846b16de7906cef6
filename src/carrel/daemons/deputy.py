"""Speaks for hosts that carry no carreld: carrelctld makes their guests itself, through a driver that reaches them.

To the reconcile loop they are hosts like any others, which ask what they shall carry and say what they do. A driver
that cannot tell what there is makes its hosts silent, with the reason, and nothing is concluded from it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, cast

import msgspec

from carrel.config import Config
from carrel.core.guestconf import ClusterFacts, cluster_facts
from carrel.daemons.carrier import Carrier
from carrel.daemons.farguest import FarGuest, far_name, order_of
from carrel.daemons.guestlogs import keep_pruned
from carrel.daemons.journal import one_line
from carrel.daemons.loading import load_driver
from carrel.errors import CarrelError, NodeFaultError, UnreachableError
from carrel.images.source import StoreImages
from carrel.model.guest import Guest, GuestRequest
from carrel.model.guestnode import GuestNode, HostReport, NodeOrder, Orders
from carrel.model.report import Event
from carrel.model.template import Recipe
from carrel.ports import DriverContext, RemoteDriver
from carrel.slurm import hostlist
from carrel.slurm.client import SlurmClient

LOOK_PERIOD_S = 1.0
LOOK_TIMEOUT_S = 60.0
CLUSTER_KEPT_S = 60.0

_LOG = logging.getLogger("carrelctld")

Exchange = Callable[[HostReport, str], Awaitable[Orders]]


class Deputy:
    """The hosts of one driver."""

    def __init__(
        self,
        name: str,
        hosts: str,
        settings: Config,
        *,
        tell: Callable[[Event], None],
        show: Callable[[tuple[Guest, ...]], None],
        driver: RemoteDriver | None = None,
        slurm: SlurmClient | None = None,
    ) -> None:
        """Reach nobody yet.

        Args:
            name: Of the driver.
            hosts: Names of hosts, as Slurm writes them.
            settings: The site's.
            tell: Takes what happened, for ``carrel job events``.
            show: Takes all guests that are there, whenever that may have changed, for ``carrel guest list``.
            driver: The driver; loaded by its name, if none is given.
            slurm: Slurm; that of the settings, if none is given.
        """
        self.settings = settings
        self._name = name
        self._hosts = frozenset(hostlist.expand(hosts))
        self._tell = tell
        self._show = show
        self._slurm = slurm or SlurmClient(settings.slurm)
        self._driver = driver
        self._tasks = asyncio.TaskGroup()
        """What is begun for guests ends with ``run``."""
        self._why_silent = f"driver {name} was not asked yet"
        self._carriers: dict[str, Carrier[FarGuest]] = {}
        self._removing: dict[str, asyncio.Task[None]] = {}
        self._gone_s: dict[str, float] = {}
        """When guests were destroyed, by the loop's clock: a look that began earlier may still have seen them."""
        self._found: dict[str, Guest] = {}
        """What the last look found, by name."""
        self._cluster: tuple[float, ClusterFacts] | None = None

    # -- for the reconcile loop ----------------------------------------------------------------------------------

    @property
    def hosts(self) -> frozenset[str]:
        return self._hosts

    @property
    def why_silent(self) -> str:
        return self._why_silent

    def recipe(self, request: GuestRequest) -> Recipe:
        """Return how a guest of this request is made; see ``carrel.ports.RemoteDriver``."""
        return self.driver.recipe(request)

    # -- for its guests ------------------------------------------------------------------------------------------

    @property
    def driver(self) -> RemoteDriver:
        """Return the driver.

        Raises:
            NodeFaultError: it does not load; tried again with each look.
        """
        if self._driver is None:
            raise NodeFaultError(self._why_silent)
        return self._driver

    async def cluster(self) -> ClusterFacts:
        """Return what a guest must know of the cluster; looked up once a minute.

        Raises:
            UnreachableError: Slurm does not answer.
        """
        now_s = time.monotonic()
        if self._cluster is None or now_s - self._cluster[0] > CLUSTER_KEPT_S:
            said = await self._slurm.settings()
            self._cluster = (now_s, cluster_facts(said, partition=self.settings.guest_nodes.partition))
        return self._cluster[1]

    async def destroy(self, name: str) -> None:
        """Leave nothing of a guest.

        Raises:
            UnreachableError: nobody can tell whether it is gone.
        """
        await self.driver.destroy(name)
        self._gone_s[name] = asyncio.get_running_loop().time()
        self._publish()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin what goes on beside the caller; it ends with ``run``, and raises nothing."""
        return self._tasks.create_task(work)

    def changed(self, guest: FarGuest) -> None:
        """Tell the controller, and who asks for guests, of this at once."""
        self._publish()
        self._carriers[guest.order.host].look()

    def say(self, order: NodeOrder, what: str, text: str) -> None:
        """Note what happened to a guest of a job."""
        _LOG.info("%s: %s job=%d guest=%s host=%s", what, text, order.run.job_id, order.node, order.host)
        event = Event(
            time_s=time.time(),
            node=order.host,
            what=what,
            text=one_line(text),
            job_id=order.run.job_id,
            guest=far_name(order),
            uid=order.uid,
        )
        self._tell(event)

    # -- the loop ------------------------------------------------------------------------------------------------

    async def run(self, exchange: Exchange) -> None:
        """Look, and carry what the controller orders, until cancelled."""
        async with self._tasks:
            self._tasks.create_task(keep_pruned(self.settings.guests.logs))
            while True:
                began_s = asyncio.get_running_loop().time()
                try:
                    async with asyncio.timeout(LOOK_TIMEOUT_S):
                        guests = await (await self._loaded()).guests()
                except (CarrelError, TimeoutError) as error:
                    self._fall_silent(str(error) or f"driver {self._name} did not answer within {LOOK_TIMEOUT_S:g} s")
                except Exception:  # noqa: BLE001  # a look that fails tells nothing, whatever it was
                    _LOG.exception("a look with driver %s failed", self._name)
                    self._fall_silent(f"driver {self._name} failed to look; see the log of carrelctld")
                else:
                    self._why_silent = ""
                    self._gone_s = {name: at_s for name, at_s in self._gone_s.items() if at_s >= began_s}
                    there = [guest for guest in guests if guest.per == "node" and guest.name not in self._gone_s]
                    self._saw(there, began_s, exchange)
                await asyncio.sleep(LOOK_PERIOD_S)

    async def _loaded(self) -> RemoteDriver:
        if self._driver is None:
            directory = self.settings.node.path("carrelctld")
            context = DriverContext(
                config=self.settings,
                node="carrelctld",
                directory=directory,
                lock=directory / "carrelctld.lock",
                images=StoreImages(self.settings.images.path),
            )
            driver = await asyncio.to_thread(load_driver, self._name, context)
            if not hasattr(driver, "recipe"):
                raise NodeFaultError(
                    f"driver '{self._name}' makes guests on its own node alone; guest_nodes.remote is not for it"
                )
            self._driver = cast("RemoteDriver", driver)
        return self._driver

    def _fall_silent(self, why: str) -> None:
        if not self._why_silent:
            _LOG.warning("%s; its hosts get no guests meanwhile", why)
        self._why_silent = why
        self._publish()
        for carrier in self._carriers.values():
            carrier.changed.set()  # a question that waits would speak for them

    def _saw(self, guests: list[Guest], began_s: float, exchange: Exchange) -> None:
        # A host that was taken from the settings keeps what it carries until its jobs have ended.
        for host in self._hosts.union(guest.node for guest in guests) - self._carriers.keys():
            self._carriers[host] = self._carrier(host, exchange)
            self._adopt(host, guests)
            self._tasks.create_task(self._carriers[host].follow())
        for guest in guests:
            self._claim(guest)
        known = {guest.name: guest for guest in guests}
        for carrier in self._carriers.values():
            for far in carrier.staying():
                far.saw(known.get(far.guest_name), began_s=began_s)
            carrier.look()
        self._found = known
        self._publish()

    def _publish(self) -> None:
        """Show the guests that are there, each by the newest that is known of it."""
        found, carried = dict(self._found), [far for each in self._carriers.values() for far in each.carried.values()]
        for far in carried:
            if far.seen is not None:
                found[far.guest_name] = far.seen
        whys = {far.guest_name: far.why for far in carried}
        as_of = f"as last seen: {self._why_silent}" if self._why_silent else ""
        self._show(
            tuple(
                msgspec.structs.replace(guest, reason=as_of or guest.reason or whys.get(name, ""))
                for name, guest in sorted(found.items())
                if name not in self._gone_s
            )
        )

    def _carrier(self, host: str, exchange: Exchange) -> Carrier[FarGuest]:
        async def ask(guests: tuple[GuestNode, ...], digest: str) -> Orders:
            if self._why_silent:
                raise UnreachableError(self._why_silent)
            return await exchange(HostReport(host=host, address="", guests=guests, slurmd="guest"), digest)

        return Carrier(host, ask=ask, make=lambda order: FarGuest(self, order), adopted={}, spawn=self.spawn)

    def _adopt(self, host: str, guests: Iterable[Guest]) -> None:
        for guest in guests:
            if guest.node == host:
                self._claim(guest)

    def _claim(self, guest: Guest) -> None:
        """Carry a guest that is there and that nobody here knows: of an earlier controller, or cloned late."""
        carrier, order = self._carriers[guest.node], order_of(guest)
        known = carrier.carried.get(guest.host_name)
        if known is None and order is not None:
            carrier.adopt(FarGuest(self, order, guest))
        elif (known is None or known.guest_name != guest.name) and guest.name not in self._removing:
            # Its name is another run's by now, so nobody can order it any more.
            task = self._removing[guest.name] = self.spawn(self._remove(guest))
            task.add_done_callback(lambda _: self._removing.pop(guest.name))

    async def _remove(self, guest: Guest) -> None:
        with suppress(CarrelError):  # the next look tries again
            await self.destroy(guest.name)
