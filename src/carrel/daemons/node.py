"""carreld: the node's daemon. The only part of Carrel that runs as root.

It answers on one unix socket, looks around every other second, and remembers nothing that it could not find again:
killed at any instruction, the next one goes on. Running tasks do not notice, since their streams lead to the guest
directly.
"""

import asyncio
import fcntl
import gc
import os
import signal
import socket
import sys
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from carrel import __version__, config
from carrel.daemons import console
from carrel.daemons.door import Door
from carrel.daemons.facts import JobFacts
from carrel.daemons.feeding import Feeding
from carrel.daemons.journal import Journal
from carrel.daemons.loading import load_driver
from carrel.daemons.measure import Measures
from carrel.daemons.metrics import JobMetrics
from carrel.daemons.peers import Peers, share
from carrel.daemons.records import Inside, JobRequests
from carrel.daemons.report import Reporter
from carrel.daemons.sweep import Sweep
from carrel.errors import CarrelError, NodeFaultError
from carrel.images.source import StoreImages
from carrel.model.guest import Guest
from carrel.model.report import NodeFacts, NodeReport
from carrel.ports import Driver, DriverContext
from carrel.slurm import hostlist
from carrel.slurm.client import SlurmClient

BACKLOG = 256
LAST_WORDS_MAX = 16
KEPT_S = 60.0  # consoles of guests that are gone go with the reports of so long
ACCEPT_RETRY_S = 0.2
LOCK_TIMEOUT_S = 2.0
"""While no carreld lives, each carrel-guard takes the lock for an instant, four times a second, to see that."""
LOCK_RETRY_S = 0.01


class Node:
    """Everything that one carreld has in its hands."""

    def __init__(self, settings: config.Config, name: str) -> None:
        """Take the node's directory; nothing is started yet.

        Raises:
            CarrelError: another carreld has it.
        """
        self.config = settings
        self.name = name
        self.directory = settings.node.path(name)
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock = _locked(self.directory / "carreld.lock")
        self.scheduler = SlurmClient(settings.slurm, name)
        self.facts = JobFacts(self.scheduler)
        self.requests = JobRequests(self.directory / "jobs")
        self.inside = Inside(self.directory / "inside")
        self.measures = Measures(self.driver)
        self.reporter = Reporter(
            settings.controller,
            self._measured,
            period_s=settings.node.report_period_s,
            answered=lambda answer: self.metrics.grant(answer.sampling),
        )
        self.journal = Journal(name, self.reporter.tell)
        self.images = StoreImages(settings.images.path)
        self.drivers: dict[str, Driver] = {}
        self.metrics = JobMetrics(self)
        self.feeding = Feeding(settings, name)
        self._started_s = time.time()
        self._faults: tuple[str, ...] = ()
        self._accelerator = ("", "")
        self._last_words: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def driver(self, name: str = "") -> Driver:
        """Return the driver of this name, the site's default where it is empty; it is loaded when first asked for.

        Raises:
            NodeFaultError: none of this name is installed, or it does not load.
        """
        name = name or self.config.guests.driver
        if name not in self.drivers:
            self.drivers[name] = load_driver(name, self._context(name))
        return self.drivers[name]

    def _context(self, name: str) -> DriverContext:
        default = name == self.config.guests.driver
        return DriverContext(
            config=self.config,
            node=self.name,
            directory=self.directory / ("guests" if default else f"guests-{name}"),
            lock=self.directory / "carreld.lock",
            images=self.images,
        )

    def adopt(self) -> None:
        """Load the drivers whose guests an earlier carreld left here, also those that only a user asked for."""
        for directory in sorted(self.directory.glob("guests-*")):
            try:
                self.driver(directory.name.removeprefix("guests-"))
            except NodeFaultError as error:
                self.journal.add("node-fault", f"{directory} cannot be looked after: {error}")

    async def _measured(self) -> NodeReport:
        return await self.report(counters_max_age_s=self.config.node.report_period_s)

    async def report(self, *, counters_max_age_s: float | None = None) -> NodeReport:
        """Return everything that is known, as the controller and ``carrel node show`` get it.

        Args:
            counters_max_age_s: How old may be what guests use; None: leave it out.
        """
        guests = []
        for driver in list(self.drivers.values()):  # one may be loaded while another looks
            guests += list(await driver.guests())
        counters = {}
        if counters_max_age_s is not None:
            counters = await self.measures.of(guests, max_age_s=counters_max_age_s)
            self.metrics.measured(guests, counters)
        counted = [msgspec.structs.replace(guest, tasks=len(self.inside.living(guest.name))) for guest in guests]
        facts = NodeFacts(
            node=self.name,
            version=__version__,
            started_s=self._started_s,
            accelerator=self._accelerator[0],
            accelerator_why=self._accelerator[1],
            faults=self._faults,
            cpus=self.config.guest_nodes.host_cpus or len(os.sched_getaffinity(0)),
            memory_bytes=self.config.guest_nodes.host_memory_mib * 2**20
            or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
        consoles = {name: text for name, (at_s, text) in self._last_words.items() if time.monotonic() - at_s < KEPT_S}
        consoles |= {
            g.name: console.tail(Path(g.console)) for g in guests if g.console and g.state in {"starting", "down"}
        }
        return NodeReport(
            facts=facts,
            guests=tuple(counted),
            counters=counters,
            consoles=consoles,
            sampler=self.metrics.status(),
            sinks=self.feeding.status(),
            sent_s=time.time(),
        )

    async def end(self, guest: Guest) -> None:
        """Destroy a guest, and keep the end of its console until the controller has been told: it says why."""
        if guest.console:
            self._last_words[guest.name] = (time.monotonic(), console.tail(Path(guest.console)))
            while len(self._last_words) > LAST_WORDS_MAX:
                self._last_words.popitem(last=False)
        await self.metrics.guests.end(guest.name)
        await self.driver(guest.driver).destroy(guest.name)
        self.inside.forget(guest.name)

    async def check(self) -> None:
        """Note, in sentences, what keeps this node from running guests."""
        try:
            driver = await asyncio.to_thread(self.driver)
            self._accelerator = await driver.check()
        except CarrelError as error:
            self._faults = (str(error),)
            self.journal.add("node-fault", str(error))
        self.reporter.poke()

    def door(self) -> Door:
        return Door(self, Peers(share()))

    async def serve(self) -> None:
        """Answer until cancelled."""
        path = self.directory / "carreld.sock"
        path.unlink(missing_ok=True)
        door = self.door()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                except OSError as error:  # no descriptor or no memory left for one more: others will end
                    self.journal.add("failed", f"cannot accept a connection: {error.strerror}")
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                door.answer(connection)
                await asyncio.sleep(0)  # a turn for those who came before, however many stand in line

    async def run(self) -> None:
        """Do everything, until a signal."""
        self.driver()
        self.adopt()
        gc.freeze()  # what is there now stays: no collection, in whatever thread it happens, need look at it again
        sweep = Sweep(self)
        works = [self.serve(), self.reporter.run(), sweep.run(), self.metrics.run(), self.feeding.run()]
        if self.name in hostlist.expand(self.config.guest_nodes.hosts):
            from carrel.daemons import hypervisor  # noqa: PLC0415  # it is made of nodes such as this one

            works.append(hypervisor.Hypervisor(self).run())
        works.append(self.check())
        tasks = [asyncio.ensure_future(work) for work in works]
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lambda: [task.cancel() for task in tasks])
        self.journal.add("node-up", f"carreld {__version__} serves node {self.name}")
        for task in tasks:
            task.add_done_callback(_say_why)
        done, pending = await asyncio.wait(tasks[:-1], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait([*pending, tasks[-1]])
        for task in done:
            if not task.cancelled():
                task.result()  # a loop that ended by itself ends carreld, with its reason


def main(node: str) -> None:
    """Serve until a signal ends it.

    Raises:
        CarrelError: not root, another carreld serves this node, or the configuration is wrong.
    """
    if os.geteuid() != 0:
        raise CarrelError("carreld must run as root: it makes guests as the users of the jobs")
    asyncio.run(Node(config.load(), node).run())


def _say_why(task: "asyncio.Future[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        print(f"carreld: {error!r}", file=sys.stderr, flush=True)  # noqa: T201  # the service's log


def _locked(path: Path) -> int:
    """Return a descriptor that holds the lock for as long as this process lives; carrel-guard looks at it.

    Raises:
        CarrelError: another carreld has held it for ``LOCK_TIMEOUT_S``.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise CarrelError(f"{path}: another carreld serves this node") from error
            time.sleep(LOCK_RETRY_S)
        else:
            return descriptor
