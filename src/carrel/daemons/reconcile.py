"""carrelctld's loop for guests that are nodes: look at Slurm, hosts and rooms; decide; act; again.

Whatever is killed, here or elsewhere, the next look finds where things stand. A look that fails decides nothing.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping

import msgspec

from carrel.config import Config
from carrel.core import guestdeeds as deeds
from carrel.core import guesthosts
from carrel.core import guestnodes as decide
from carrel.core.guestworld import Limits, World
from carrel.daemons.guestdeeds import Doer, Jobs
from carrel.daemons.hostorders import HostOrders, now_s
from carrel.daemons.kinds import Kinds, Remote
from carrel.daemons.lines import NAMED_MAX, Lines, Taken
from carrel.daemons.patience import Patience
from carrel.errors import UnreachableError
from carrel.hosts.admission import Admission
from carrel.model.guestnode import HostReport
from carrel.model.job import JobKey
from carrel.model.pool import Look
from carrel.model.report import Event
from carrel.slurm.pool import SlurmPool

SOON_S = 0.1
"""The first look after something has changed; each further one that sees nothing new comes twice as late."""
LOOK_PERIOD_S = 0.5
QUIET_PERIOD_S = 1.0
"""At most this between looks while no job waits and no guest is carried; less where a look is cheap."""
QUIET_TIMES = 20.0
"""So many times longer than the look took: of a Slurm with few jobs a look takes 10 ms, of one with thousands 100."""
EXPECTING_LOOKS = 2
"""After a knock: slurmctld may take a moment until it shows the job, which has no id yet when the knock is heard."""
SWEEP_PERIOD_S = 60.0

_LOG = logging.getLogger("carrelctld")


class Reconciler:
    """Guests-as-nodes of one cluster."""

    def __init__(
        self,
        settings: Config,
        admission: Admission,
        *,
        tell: Callable[[Event], None],
        pool: SlurmPool | None = None,
        remotes: Mapping[str, Remote] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Ask nobody yet.

        Args:
            settings: The site's.
            admission: The hosts, and what is taken of them.
            tell: Takes what happened, for ``carrel job show``.
            pool: Slurm; that of the settings, if none is given.
            remotes: Who speaks for hosts without a carreld, by the driver that makes guests there.
            clock: Returns the time, in seconds since the epoch.
        """
        mine = settings.guest_nodes
        self._silent_s = mine.host_silent_s
        self._limits = Limits(
            configuring_max_s=mine.configuring_max_s, start_max_s=mine.start_max_s, join_max_s=mine.join_max_s
        )
        self._kinds = Kinds(settings, remotes or {}, has_addresses=admission.has_addresses)
        self._pool = pool or SlurmPool(settings.slurm, mine.partition)
        self._clock = clock
        launches = settings.placement.launches
        self._lines = Lines(admission, launches, kinds=self._kinds, clock=clock)
        self._patience = Patience(
            attempts=launches.attempts, rest_s=mine.start_max_s, rest_max_s=launches.backoff_max_s
        )
        self._due = asyncio.Event()
        self.hosts = HostOrders(silent_s=self._silent_s, changed=self._due.set)
        """They speak to it."""
        self._doer = Doer(
            self._pool,
            self._lines,
            self._patience,
            address=self.hosts.address,
            assigned=self._foresee,
            tell=tell,
            clock=clock,
        )
        self._counted: set[guesthosts.Attempt] = set()
        self._world: World | None = None
        """As it was seen last, and what was made of it since."""
        self._expecting = 0
        """Looks that follow soon, though nothing is there to watch."""
        self._looked_s = -math.inf
        self._began_s = math.inf
        self._swept_s = -math.inf
        self._holds: frozenset[JobKey] = frozenset()
        """What the last round held."""
        self._unheld: frozenset[JobKey] = frozenset()
        """What two rounds held one after another: Slurm did not do it."""
        self.trouble = "slurm was not looked at yet"
        """Why nothing is done for the jobs that wait; empty: nothing is wrong."""

    def knocked(self) -> None:
        """Look soon, for a job may have been submitted; however many knock, looks do not follow without a pause."""
        if self._expecting == EXPECTING_LOOKS:
            return  # it was knocked since the last look began
        self._expecting = EXPECTING_LOOKS
        loop = asyncio.get_running_loop()
        loop.call_at(max(loop.time(), self._looked_s + SOON_S), self._due.set)

    async def run(self) -> None:
        """Look, decide and act until cancelled."""
        failures = 0
        pause_s = SOON_S
        self._began_s = now_s()
        while True:
            self._due.clear()
            began_s = self._looked_s = now_s()
            self._expecting = max(0, self._expecting - 1)
            try:
                acted, quiet = await self._once()
                failures = 0
                self.trouble = self._hampered()
            except UnreachableError as error:
                if not failures:
                    _LOG.warning("guests as nodes: %s", error)
                failures += 1
                self.trouble = str(error)
                acted, quiet, pause_s = False, False, LOOK_PERIOD_S
            except Exception:  # noqa: BLE001  # one odd job must not end the loop
                _LOG.exception("guests as nodes: a round failed")
                self.trouble = "a round failed, which is a bug of ours; carrelctld's log says where"
                acted, quiet, pause_s = False, False, QUIET_PERIOD_S
            if acted and not self._unheld:
                pause_s = SOON_S
                continue  # what a deed did, the next look shows
            with contextlib.suppress(TimeoutError):
                rest_s = min(QUIET_TIMES * (now_s() - began_s), QUIET_PERIOD_S)
                async with asyncio.timeout(max(rest_s, SOON_S) if quiet and not self._expecting else pause_s):
                    await self._due.wait()
            pause_s = SOON_S if self._due.is_set() else min(2 * pause_s, LOOK_PERIOD_S)

    async def _once(self) -> tuple[bool, bool]:
        """Return whether anything was done, and whether there is nothing to watch."""
        taken = await asyncio.to_thread(self._lines.taken)
        look = await self._pool.look()
        hosts = guesthosts.judged(
            look, self.hosts.reports(), counted=self._counted, now_s=self._clock(), limits=self._limits
        )
        self._lines.adopt(look, taken.places(look.cluster))
        self._hear_of_failures(look, hosts)
        world = self._world_of(look, taken, hosts)
        self._patience.see(look, decide.released(world), world.now_s)
        if world.complete:  # until then a job on two hosts may seem to have lost one, and would lose the other
            self.hosts.publish(guesthosts.orders(world))
        self._world = world = msgspec.structs.replace(world, settled=self.hosts.settled(hosts))
        actions = decide.plan(world)
        if not world.complete:
            actions = tuple(action for action in actions if isinstance(action, deeds.Hold | deeds.Close))
        holds = frozenset(action.run for action in actions if isinstance(action, deeds.Hold))
        self._holds, self._unheld = holds, holds & self._holds
        jobs = {job.key: job for job in look.jobs}
        acted = await self._doer.do(actions, jobs)
        if world.complete:
            acted |= await self._launch(hosts, jobs)
            await self._sweep(world, taken)
        self._forget(look)
        return acted, not any(job.alive for job in look.jobs) and not world.places

    @property
    def silent(self) -> tuple[str, ...]:
        """Return the hosts that should speak and were not heard lately."""
        return tuple(sorted(self._kinds.hosts - self.hosts.reports().keys()))

    def _hampered(self) -> str:
        if self._unheld:
            job_id = min(self._unheld).job_id
            return (
                f"slurm does not let carrelctld hold job {job_id}; it must run as SlurmUser or root, "
                "and its log has slurm's words"
            )
        if self._world is not None and not self._world.complete:
            return f"waits for the first words of {', '.join(self.silent[:NAMED_MAX])}, {self._silent_s:g} s at most"
        return ""

    def _world_of(self, look: Look, taken: Taken, hosts: Mapping[str, HostReport]) -> World:
        at_s = self._clock()
        return World(
            look=look,
            places=taken.places(look.cluster),
            hosts=hosts,
            settled=(),
            lost=self.hosts.lost(hosts),
            begun=self._lines.begun(),
            given_up=self._lines.given_up() | self._patience.never_started(look),
            resting=self._patience.resting(at_s),
            ready_since_s=self._patience.ready_since_s,
            now_s=at_s,
            limits=self._limits,
            complete=self.hosts.have_spoken(self._kinds.hosts) or now_s() - self._began_s > self._silent_s,
        )

    def _foresee(self, assigned: deeds.Assign) -> None:
        """Let hosts begin before a look shows what Slurm has taken."""
        if self._world is not None:
            self._world = guesthosts.foreseen(self._world, assigned)
            self.hosts.publish(guesthosts.orders(self._world))

    def _hear_of_failures(self, look: Look, hosts: Mapping[str, HostReport]) -> None:
        """Tell the queue of each attempt that failed, once."""
        for run, host, guest in guesthosts.failed(look, hosts):
            if run in self._lines.begun() and (run, guest.node, guest.started_s) not in self._counted:
                self._lines.failed(run, host, guest.reason)
            # The others of this attempt end with it: one that fails later is no second failure.
            carried = (each for report in hosts.values() for each in report.guests if each.run == run)
            self._counted |= {(run, each.node, each.started_s) for each in carried}

    def _forget(self, look: Look) -> None:
        alive = {job.key for job in look.jobs if job.alive}
        self._lines.keep_only(alive)
        self._doer.keep_only(alive)
        self._counted = {mark for mark in self._counted if mark[0] in alive}

    async def _sweep(self, world: World, taken: Taken) -> None:
        """Give back, now and then, what was taken by runs whose end nobody noticed."""
        if now_s() - self._swept_s < SWEEP_PERIOD_S:
            return
        living = await self._pool.living() if taken.listed else frozenset()
        await asyncio.to_thread(self._lines.sweep, taken, decide.over(world), living)
        self._swept_s = now_s()

    async def _launch(self, hosts: Mapping[str, HostReport], jobs: Jobs) -> bool:
        """Take room for those whose turn it is, and say to the others why they wait."""
        silent = (self._kinds.hosts - hosts.keys()) | self._kinds.silent()
        found = await self._doer.let_through(jobs, silent=silent)
        if found and self._world is not None:
            await self._give_names(self._world, jobs)
        await self._doer.say_why(jobs)
        return found

    async def _give_names(self, world: World, jobs: Jobs) -> None:
        """Give names at once to those that have just got room, of whom Slurm would say nothing new."""
        taken = await asyncio.to_thread(self._lines.taken)
        places = taken.places(world.look.cluster)
        self._world = msgspec.structs.replace(world, places=places, begun=self._lines.begun())
        named = [action for action in decide.plan(self._world) if isinstance(action, deeds.Assign)]
        await self._doer.do(named, jobs)
