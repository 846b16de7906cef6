"""A site of guests as nodes in memory and in virtual time: what carrelctld talks to, with all that may go wrong there.

The controller in it is the real one: its loop, its decisions, its queue, and its table of hosts on disk. Slurm and the
hosts are simulated from what they were seen to do. Virtual time leaps to the next event, so that an hour of a busy
site takes seconds, and the same seed gives the same hour.
"""

import asyncio
import contextlib
import random
from typing import Any, cast

import msgspec

from carrel.config import Config
from carrel.daemons.deputy import Deputy
from carrel.daemons.reconcile import Reconciler
from carrel.errors import UnreachableError
from carrel.hosts.admission import Admission
from carrel.hosts.table import Facts, HostTable
from carrel.model.guest import Guest
from carrel.model.guestnode import GuestNode, HostReport, NodeOrder, Orders
from carrel.model.job import JobKey
from carrel.model.report import Event
from carrel.ports import RemoteDriver
from carrel.slurm.client import SlurmClient
from carrel.testing.fardriver import FarDriver, Hypervisor, SlurmWords
from carrel.testing.guestslurm import Slurm

EPOCH_S = 1_700_000_000


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """How often what goes wrong."""

    clone_fails: float = 0.0
    """Share of clones that fail."""
    clone_slow: float = 0.0
    """Share that takes a minute."""
    message_max_s: float = 0.3
    """What a host's question takes, and its answer."""
    nothing_starts: bool = False
    """Slurm gives jobs their nodes, and they never start on them."""
    command_max_s: float = 0.02
    """What a command of Slurm takes before its effect, and after it."""


class Site:
    """Slurm, its hosts, and the controller, which may be killed. What must never be is noted in ``wrong``."""

    def __init__(self, settings: Config, *, hosts: dict[str, int], names: int, trouble: Trouble, seed: int) -> None:
        """Describe it; ``begin`` starts it.

        Args:
            settings: Of the controller.
            hosts: The CPUs of each; memory is never short.
            names: How many names the pool has.
            trouble: What goes wrong.
            seed: Of all chance.
        """
        self._loop = asyncio.get_running_loop()
        self.settings = settings
        self.trouble = trouble
        self.random = random.Random(seed)  # noqa: S311  # chance that can be repeated is what is wanted
        self.wrong: list[str] = []
        self.table = HostTable(settings.placement.path)
        self.table.put([Facts(name=name, cpus=cpus, memory_bytes=2**40) for name, cpus in hosts.items()])
        self.slurm = Slurm(self, names)
        self.hosts = {name: SimulatedHost(self, name, cpus) for name, cpus in hosts.items()}
        self.hypervisor = Hypervisor(self)
        """What carries the guests of hosts that have no carreld: those of ``guest_nodes.remote``."""
        self.kills = 0
        self.controller: Reconciler | None = None
        self._works: dict[str, asyncio.Task[None]] = {}
        self._questions: set[asyncio.Task[Orders]] = set()

    def now_s(self) -> float:
        """Return the time as Slurm and the controller tell it, in whatever thread."""
        return EPOCH_S + self._loop.time()

    async def pause(self, most_s: float) -> None:
        """Take some of this time."""
        await asyncio.sleep(self.random.uniform(0, most_s))

    def begin(self) -> None:
        """Start all of it."""
        self._works["slurm"] = asyncio.ensure_future(self.slurm.run())
        for host in self.hosts.values():
            if self.settings.guest_nodes.hosts:
                host.begin()
        self.begin_controller()

    def begin_controller(self) -> None:
        """Start a controller that knows nothing."""
        admission = Admission(self.settings.placement)
        driver = cast("RemoteDriver", FarDriver(self, self.hypervisor))  # of whose verbs not all are called
        slurm = cast("SlurmClient", SlurmWords())
        deputies = {
            name: Deputy(name, hosts, self.settings, tell=_hear_nothing, show=_hear_nothing, driver=driver, slurm=slurm)
            for name, hosts in self.settings.guest_nodes.remote.items()
        }
        controller = Reconciler(
            self.settings, admission, tell=_hear_nothing, pool=self.slurm, remotes=deputies, clock=self.now_s
        )
        self.controller = controller

        async def run() -> None:
            await asyncio.gather(
                controller.run(), *(deputy.run(controller.hosts.exchange) for deputy in deputies.values())
            )

        self._works["controller"] = asyncio.ensure_future(run())

    async def kill_controller(self, *, away_s: float) -> None:
        """Lose all that the controller has in memory, wherever it is, and start another one later."""
        self.kills += 1
        self._works["controller"].cancel()
        self.controller = None
        for question in self._questions:
            question.cancel()
        await asyncio.sleep(away_s)
        self.begin_controller()

    async def exchange(self, report: HostReport, digest: str) -> Orders:
        """Carry a host's question to the controller, and its answer back."""
        await self.pause(self.trouble.message_max_s)
        if self.controller is None:
            raise UnreachableError("nobody listens")
        question = asyncio.ensure_future(self.controller.hosts.exchange(report, digest))
        self._questions.add(question)
        try:
            await asyncio.wait([question])
            if question.cancelled():
                raise UnreachableError("it died while it was asked")
            orders = question.result()
        finally:
            question.cancel()
            self._questions.discard(question)
        await self.pause(self.trouble.message_max_s)
        return orders

    def guests(self) -> list[tuple[str, str, JobKey]]:
        """Return host, name and run of each guest there is."""
        near = [(host.name, node, guest.run) for host in self.hosts.values() for node, guest in host.guests.items()]
        far = self.hypervisor.guests.values()
        return near + [(guest.node, guest.host_name, guest.run) for guest in far if guest.run]

    def leaks(self) -> list[str]:
        """Return what is left when no job is."""
        left = [f"{run} on {host} as {name}" for host, name, run in self.guests()]
        left += [f"room of {place.run} on {place.host}" for place in self.table.places()]
        left += list(self.slurm.reservations)
        return left + [name for name, node in self.slurm.nodes.items() if not (node.resting and node.closed)]

    async def end(self) -> None:
        """Stop all of it."""
        for host in self.hosts.values():
            host.lose_power()
        works = list(self._works.values())
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        self.table.close()


class SimulatedHost:
    """A carreld with its guests."""

    def __init__(self, site: Site, name: str, cpus: int) -> None:
        """Carry nothing yet."""
        self.name = name
        self.guests: dict[str, GuestNode] = {}
        """What there is of guests, whatever is known of them."""
        self._site = site
        self.lost: dict[str, JobKey] = {}
        """Runs by the names of their guests, which were ready and died of themselves; Slurm may not know yet."""
        self.cpus = cpus
        self._sizes: dict[str, int] = {}
        """CPUs of each guest."""
        self._orders: dict[str, NodeOrder] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._lost_s: float | None = None

    def begin(self) -> None:
        """Switch it on."""
        if self._work is None:
            self._work = asyncio.ensure_future(self._follow())

    def lose_power(self) -> None:
        """Lose everything at once."""
        if self._work is not None:
            self._lost_s = asyncio.get_running_loop().time()
            for task in (self._work, *self._making.values()):
                task.cancel()
        self._work = None
        self._lose([name for name, guest in self.guests.items() if guest.state == "ready"])
        for part in (self.guests, self._orders, self._making):
            part.clear()

    def away_for_s(self) -> float:
        """Return for how long it has been switched off; one without a carreld never is."""
        if self._work or self._lost_s is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._lost_s

    def kill_a_guest(self) -> None:
        """End one that is ready, if there is any."""
        ready = [name for name, guest in self.guests.items() if guest.state == "ready"]
        if ready:
            name = self._site.random.choice(ready)
            self._lose([name])
            self._put(name, state="failed", reason="its qemu was killed")

    def _lose(self, names: list[str]) -> None:
        self.lost.update({name: self.guests[name].run for name in names})

    async def _follow(self) -> None:
        digest = ""
        while True:
            self._changed.clear()
            report = HostReport(host=self.name, address=f"at-{self.name}", guests=tuple(self.guests.values()))
            asking = asyncio.ensure_future(self._site.exchange(report, digest))
            changing = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait([asking, changing], return_when=asyncio.FIRST_COMPLETED)
            finally:
                changing.cancel()
                if not asking.done():
                    asking.cancel()
            if asking.cancelled() or not asking.done():
                with contextlib.suppress(asyncio.CancelledError, UnreachableError):
                    await asking
                continue
            try:
                orders = asking.result()
            except UnreachableError:
                await asyncio.sleep(1.0)
                continue
            digest = orders.digest
            self._apply({order.node: order for order in orders.orders})

    def _apply(self, wanted: dict[str, NodeOrder]) -> None:
        for name, order in list(self._orders.items()):
            if name not in wanted or wanted[name].run != order.run:
                del self._orders[name]
                self._making[name].cancel()
                self._making[name] = asyncio.ensure_future(self._unmake(name))
        for name, order in wanted.items():
            if name in self._orders:
                self._orders[name] = order
            elif name not in self.guests:
                self._orders[name] = order
                self._begin(order)
            if order.join and name in self._orders:
                self._site.slurm.register(name, self.name)

    def _begin(self, order: NodeOrder) -> None:
        now_s = asyncio.get_running_loop().time()
        self.guests[order.node] = GuestNode(node=order.node, run=order.run, state="starting", started_s=now_s)
        self._sizes[order.node] = order.cpus
        taken = sum(self._sizes[name] for name in self.guests)
        if taken > self.cpus:
            self._site.wrong.append(f"{self.name} has {self.cpus} CPUs and carries guests of {taken}: {self.guests}")
        same = [(host, name) for host, name, run in self._site.guests() if run == order.run]
        if len(same) > self._site.slurm.jobs[order.run.job_id].job.nodes:
            self._site.wrong.append(f"{order.run} has guests {same}")
        self._making[order.node] = asyncio.ensure_future(self._make(order.node))

    async def _make(self, name: str) -> None:
        random, trouble = self._site.random, self._site.trouble
        slow = random.random() < trouble.clone_slow
        fails = random.random() < trouble.clone_fails
        await asyncio.sleep(random.uniform(30, 60) if slow else random.uniform(0.1, 1.0))
        if fails:
            self._put(name, state="failed", reason="the clone failed")
        else:
            self._put(name, state="ready", joined=True)

    async def _unmake(self, name: str) -> None:
        await asyncio.sleep(self._site.random.uniform(0.05, 2.0))
        self.guests.pop(name, None)
        self.lost.pop(name, None)
        self._changed.set()

    def _put(self, name: str, **words: Any) -> None:
        self.guests[name] = msgspec.structs.replace(self.guests[name], **words)
        self._changed.set()


def _hear_nothing(_: Event | tuple[Guest, ...]) -> None:
    """The journal is for people, and so is the list of guests."""
