"""carrelctld's loop for guests that are nodes: look at Slurm, hosts and rooms; decide; act; again.

Whatever is killed, here or elsewhere, the next look finds where things stand. A look that fails decides nothing.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

import msgspec

from carrel.config import Config
from carrel.core import guestdeeds as deeds
from carrel.core import guestnodes as decide
from carrel.core.guestdeeds import Action, OnJob, OnLine, OnName
from carrel.core.guestnodes import Limits, World
from carrel.core.queue import Cancel, Launch
from carrel.daemons.kinds import Kinds, Remote
from carrel.daemons.lines import Lines, Taken
from carrel.daemons.patience import Patience
from carrel.errors import CarrelError, NodeFaultError, UnreachableError
from carrel.hosts.admission import Admission
from carrel.model.guestnode import HostReport, Orders
from carrel.model.job import JobKey
from carrel.model.pool import Look, PoolJob, reservation_name, run_of_reservation
from carrel.model.report import Event
from carrel.slurm.pool import SlurmPool

SOON_S = 0.1
"""The first look after something has changed; each further one that sees nothing new comes twice as late."""
LOOK_PERIOD_S = 0.5
QUIET_PERIOD_S = 1.0
"""At most this between looks while no job waits and no guest is carried; less where a look is cheap."""
QUIET_TIMES = 20.0
"""So many times longer than the look took: of a Slurm with few jobs a look takes 10 ms, of one with thousands 100."""
COMMANDS_AT_ONCE = 4
"""A command of Slurm is mostly the start of a process; slurmctld makes one change at a time."""
HELD_S = 10.0
"""So long a host's question waits for an answer that differs from its last one."""

SWEEP_PERIOD_S = 60.0

IN_QUEUE = deeds.FindRoom | deeds.Rest | deeds.GiveBackRoom
"""Deeds on the queue, which belongs to one thread at a time."""

_LOG = logging.getLogger("carrelctld")


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What a host said last, when, and under which orders."""

    at_s: float
    report: HostReport
    digest: str


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
        self._settings = mine
        self._limits = Limits(
            configuring_max_s=mine.configuring_max_s, start_max_s=mine.start_max_s, join_max_s=mine.join_max_s
        )
        self._kinds = Kinds(settings, remotes or {}, has_addresses=admission.has_addresses)
        self._pool = pool or SlurmPool(settings.slurm, mine.partition)
        self._clock = clock
        self._lines = Lines(admission, settings.placement.launches, kinds=self._kinds, clock=clock)
        self._tell = tell
        self._heard: dict[str, Heard] = {}
        self._counted: set[decide.Attempt] = set()
        launches = settings.placement.launches
        self._patience = Patience(
            attempts=launches.attempts, rest_s=mine.start_max_s, rest_max_s=launches.backoff_max_s
        )
        self._told: dict[JobKey, str] = {}
        self._orders: dict[str, Orders] = {}
        self._world: World | None = None
        """As it was seen last, and what was made of it since."""
        self._news: dict[str, asyncio.Event] = {}
        """By host: set when its orders change."""
        self._due = asyncio.Event()
        self._began_s: float | None = None
        self._swept_s = -math.inf

    # -- hosts ---------------------------------------------------------------------------------------------------

    async def exchange(self, report: HostReport, digest: str) -> Orders:
        """Take what a host says of itself and return what it shall carry, at once where that has changed since.

        Until Slurm was seen, the answer to a question waits: to tell a host nothing would empty it.
        """
        before = self._heard.get(report.host)
        heard = self._heard[report.host] = Heard(at_s=_now_s(), report=report, digest=digest)
        if before is None or (before.report, before.digest) != (report, digest):
            self._due.set()

        news = self._news.setdefault(report.host, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(HELD_S, self._settings.host_silent_s / 3)):
                while report.host not in self._orders or self._orders[report.host].digest == digest:
                    news.clear()
                    await news.wait()
        if report.host not in self._orders:
            raise UnreachableError("slurm was not seen yet, so nothing is known of this host")
        if self._heard[report.host] is heard:  # else it has asked anew since
            self._heard[report.host] = msgspec.structs.replace(heard, at_s=_now_s())
        return self._orders[report.host]

    def poke(self) -> None:
        """Something changed: look soon. Returns at once."""
        self._due.set()

    # -- the loop ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look, decide and act until cancelled."""
        failures = 0
        pause_s = SOON_S
        self._began_s = _now_s()
        while True:
            self._due.clear()
            began_s = _now_s()
            try:
                acted, quiet = await self._once()
                failures = 0
            except UnreachableError as error:
                if not failures:
                    _LOG.warning("guests as nodes: %s", error)
                failures += 1
                acted, quiet, pause_s = False, False, LOOK_PERIOD_S
            except Exception:  # noqa: BLE001  # one odd job must not end the loop
                _LOG.exception("guests as nodes: a round failed")
                acted, quiet, pause_s = False, False, QUIET_PERIOD_S
            if acted:
                pause_s = SOON_S
                continue  # what a deed did, the next look shows
            with contextlib.suppress(TimeoutError):
                rest_s = min(QUIET_TIMES * (_now_s() - began_s), QUIET_PERIOD_S)
                async with asyncio.timeout(max(rest_s, SOON_S) if quiet else pause_s):
                    await self._due.wait()
            pause_s = SOON_S if self._due.is_set() else min(2 * pause_s, LOOK_PERIOD_S)

    async def _once(self) -> tuple[bool, bool]:
        """Return whether anything was done, and whether there is nothing to watch."""
        taken = await asyncio.to_thread(self._lines.taken)
        look = await self._pool.look()
        heard = self._lately()
        said = {name: each.report for name, each in heard.items()}
        hosts = decide.judged(look, said, counted=self._counted, now_s=self._clock(), limits=self._limits)
        self._lines.adopt(look, taken.places(look.cluster))
        self._hear_of_failures(look, hosts)
        world = self._world_of(look, taken, hosts)
        self._patience.see(look, decide.released(world), world.now_s)
        self._publish(world)
        self._world = world = msgspec.structs.replace(world, settled=self._settled(heard))
        actions = decide.plan(world)
        if not world.complete:
            actions = tuple(action for action in actions if isinstance(action, deeds.Hold | deeds.Close))
        jobs = {job.key: job for job in look.jobs}
        done = await self._act_on_all(actions, jobs)
        if world.complete:
            done.append(await self._launch(hosts, jobs))
            await self._sweep(world, taken)
        self._forget(look)
        return any(done), not any(job.alive for job in look.jobs) and not world.places

    def _lately(self) -> dict[str, Heard]:
        """Return the hosts that were heard lately."""
        since_s = _now_s() - self._settings.host_silent_s
        return {name: heard for name, heard in self._heard.items() if heard.at_s > since_s}

    def _settled(self, heard: Mapping[str, Heard]) -> frozenset[str]:
        """Return the hosts that answered under the orders in force."""
        in_force = {name: orders.digest for name, orders in self._orders.items()}
        return frozenset(name for name, each in heard.items() if each.digest == in_force.get(name))

    def _world_of(self, look: Look, taken: Taken, hosts: Mapping[str, HostReport]) -> World:
        now_s = self._clock()
        return World(
            look=look,
            places=taken.places(look.cluster),
            hosts=hosts,
            settled=(),
            lost={
                guest.node for name, each in self._heard.items() if name not in hosts for guest in each.report.guests
            },
            begun=self._lines.begun(),
            given_up=self._lines.given_up() | self._patience.never_started(look),
            resting=self._patience.resting(now_s),
            ready_since_s=self._patience.ready_since_s,
            now_s=now_s,
            limits=self._limits,
            complete=self._all_heard(),
        )

    def _all_heard(self) -> bool:
        """Tell whether every host could have spoken since this controller began."""
        return self._kinds.hosts <= self._heard.keys() or (
            self._began_s is not None and _now_s() - self._began_s > self._settings.host_silent_s
        )

    def _publish(self, world: World) -> None:
        """Answer the hosts whose orders have changed."""
        # One that falls silent and speaks again is not told what it should have carried before.
        self._orders = {host: orders for host, orders in self._orders.items() if host in world.hosts}
        for host in world.hosts:
            orders, before = decide.orders(world, host), self._orders.get(host)
            if before is None or before.orders != orders:
                digest = hashlib.sha256(msgspec.json.encode(orders)).hexdigest()[:16]
                self._orders[host] = Orders(digest=digest, orders=orders)
                self._news.setdefault(host, asyncio.Event()).set()

    def _hear_of_failures(self, look: Look, hosts: Mapping[str, HostReport]) -> None:
        """Tell the queue of each attempt that failed, once."""
        for run, host, guest in decide.failed(look, hosts):
            if run in self._lines.begun() and (run, guest.node, guest.started_s) not in self._counted:
                self._lines.failed(run, host, guest.reason)
            # The others of this attempt end with it: one that fails later is no second failure.
            carried = (each for report in hosts.values() for each in report.guests if each.run == run)
            self._counted |= {(run, each.node, each.started_s) for each in carried}

    def _forget(self, look: Look) -> None:
        alive = {job.key for job in look.jobs if job.alive}
        self._lines.keep_only(alive)
        self._told = {run: value for run, value in self._told.items() if run in alive}
        self._counted = {mark for mark in self._counted if mark[0] in alive}

    async def _sweep(self, world: World, taken: Taken) -> None:
        """Give back, now and then, what was taken by runs whose end nobody noticed."""
        if _now_s() - self._swept_s < SWEEP_PERIOD_S:
            return
        living = await self._pool.living() if taken.listed else frozenset()
        await asyncio.to_thread(self._lines.sweep, taken, decide.over(world), living)
        self._swept_s = _now_s()

    # -- deeds ---------------------------------------------------------------------------------------------------

    async def _act_on_all(self, actions: Sequence[Action], jobs: dict[JobKey, PoolJob]) -> list[bool]:
        """Do what is due: side by side for several runs and names, one after another for each of them."""
        lines: dict[object, list[Action]] = {}
        for action in actions:
            if not isinstance(action, IN_QUEUE):
                lines.setdefault(_subject(action), []).append(action)
        free = asyncio.Semaphore(COMMANDS_AT_ONCE)

        async def follow(line: list[Action]) -> list[bool]:
            async with free:
                return [await self._act(action, jobs) for action in line]

        found = await asyncio.gather(*map(follow, lines.values()), return_exceptions=True)  # none goes on by itself
        done = [acted for line in found for acted in _unless_failed(line)]
        return done + [await self._act(action, jobs) for action in actions if isinstance(action, IN_QUEUE)]

    async def _act(self, action: Action, jobs: dict[JobKey, PoolJob]) -> bool:
        """Do one thing; return whether a look at once would show something new."""
        if isinstance(action, deeds.OnJob):
            return await self._act_on_job(action, jobs[action.run])
        if isinstance(action, deeds.OnLine):
            await self._act_in_line(action, jobs[action.run])
            return False
        return await self._act_on_name(action, jobs)

    async def _act_on_job(self, action: OnJob, job: PoolJob) -> bool:
        match action:
            case deeds.Hold():
                self._complain(action, await self._pool.hold(job))
            case deeds.Split():
                self._complain(action, await self._pool.split(job, action.tasks))
            case deeds.Assign():
                return await self._assign(action, job)
            case deeds.Pin():
                self._complain(action, await self._pool.pin(job, action.reservation))
            case deeds.Release():
                await self._release(action, job)
            case deeds.Watch():
                await self._say(job, action.reason)
                self._lines.leave(job.key)
                self._complain(action, await self._pool.release(job))
            case deeds.Recall():
                why = self._patience.recall(job.key, action.reason, self._clock())
                self._complain(action, await self._pool.hold(job))
                await self._say(job, why, what="job-recalled")
            case deeds.GiveBackJob():
                await self._give_back_job(action, job)
            case deeds.Cancel():
                await self._cancel(job, action.reason)
            case _:
                assert_never(action)
        return True

    async def _act_in_line(self, action: OnLine, job: PoolJob) -> None:
        match action:
            case deeds.FindRoom():
                await self._seek(action, job)
            case deeds.Tell():
                await self._say(job, action.reason)
            case deeds.Rest():
                self._lines.leave(job.key)
                await self._say(job, action.reason)
            case _:
                assert_never(action)

    async def _act_on_name(self, action: OnName, jobs: dict[JobKey, PoolJob]) -> bool:
        pool = self._pool
        match action:
            case deeds.Point():
                said = await pool.assign(action.node, address=action.address)
            case deeds.Open():
                said = await pool.node(action.node, "resume", action.reason)
            case deeds.Close():
                said = await pool.node(action.node, "drain", action.reason)
            case deeds.Down():
                self._note(jobs[action.run], "node-down", f"node {action.node}: {action.reason}")
                said = await pool.node(action.node, "down", action.reason)
            case deeds.PowerDown():
                said = await pool.node(action.node, "power_down_force", action.reason)
            case deeds.Unreserve():
                said = await pool.unreserve(action.reservation)
            case deeds.GiveBackRoom():
                said = ""
                await asyncio.to_thread(self._lines.give_back, action.run, action.attempt)
            case _:
                assert_never(action)
        self._complain(action, said)
        return not said  # what Slurm refuses now is asked again at the next look, and no sooner

    async def _launch(self, hosts: Mapping[str, HostReport], jobs: dict[JobKey, PoolJob]) -> bool:
        """Take room for those whose turn it is, and say to the others why they wait."""
        silent = (self._kinds.hosts - hosts.keys()) | self._kinds.silent()
        found = await asyncio.to_thread(self._lines.launches, silent)
        for run, action in found:
            match action:
                case Launch():
                    self._note(jobs[run], "guest-placed", f"on {', '.join(action.here.hosts)}")
                case Cancel():
                    await self._cancel(jobs[run], action.reason)
                case _:
                    assert_never(action)
        if found and self._world is not None:
            await self._give_names(self._world, jobs)
        for run, why in self._lines.waiting():
            await self._say(jobs[run], why)
        return bool(found)

    async def _give_names(self, world: World, jobs: dict[JobKey, PoolJob]) -> None:
        """Give names at once to those that have just got room, of whom Slurm would say nothing new."""
        taken = await asyncio.to_thread(self._lines.taken)
        places = taken.places(world.look.cluster)
        self._world = msgspec.structs.replace(world, places=places, begun=self._lines.begun())
        named = [action for action in decide.plan(self._world) if isinstance(action, deeds.Assign)]
        await self._act_on_all(named, jobs)

    async def _give_back_job(self, action: deeds.GiveBackJob, job: PoolJob) -> None:
        self._note(job, "job-requeued", action.reason)
        self._patience.give_back(job.key)
        for name in job.job.nodes:  # Slurm requeues no srun, but ends it with its nodes
            self._complain(action, await self._pool.node(name, "down", action.reason))

    async def _seek(self, action: deeds.FindRoom, job: PoolJob) -> None:
        """Let a job stand in line, unless no guests are made for what it asked for."""
        try:
            await asyncio.to_thread(self._lines.add, job, action)
        except (NodeFaultError, UnreachableError) as error:  # the site's fault, which may be cured
            await self._say(job, str(error))
        except CarrelError as error:
            await self._cancel(job, str(error))

    async def _cancel(self, job: PoolJob, why: str) -> None:
        await self._say(job, f"cancelled: {why}", what="job-cancelled")
        self._complain(why, await self._pool.cancel(job))

    async def _assign(self, action: deeds.Assign, job: PoolJob) -> bool:
        """Point the names at their hosts, reserve them, pin the job and open them; where all went well, tell the hosts.

        What Slurm did not take is found by the next look as what is yet to be done.
        """
        names, name, pool = dict(action.hosts), reservation_name(action.run), self._pool
        addresses = {host: self._heard[host].report.address for host in names.values()}
        said = await asyncio.gather(
            *(pool.assign(node, address=addresses[host], host_name=host) for node, host in names.items()),
            pool.reserve(name, action.user, list(names)),
        )
        if said[-1]:  # an administrator keeps the names, perhaps for hours
            await self._say(job, "waits for node names of the pool that can be reserved; see carrelctld's log")
        if not any(said):  # a name that is open and not reserved would be anybody's
            why = "it is reserved for its job"
            said = await asyncio.gather(pool.pin(job, name), *(pool.node(node, "resume", why) for node in names))
        for words in said:
            self._complain(action, words)
        if not any(said) and self._world is not None:
            self._world = decide.foreseen(self._world, action)
            self._publish(self._world)
        return not any(said)

    async def _release(self, action: deeds.Release, job: PoolJob) -> None:
        if action.run.restart:
            self._complain(action, await self._pool.start_now(job))
        self._complain(action, await self._pool.release(job))
        self._lines.ready(action.run)
        self._note(job, "job-released", action.reason)
        self._told.pop(action.run, "")
        await self._pool.tell(job, "")

    async def _say(self, job: PoolJob, text: str, *, what: str = "job-waits") -> None:
        if self._told.get(job.key) == text:
            return
        self._told[job.key] = text
        self._note(job, what, text)
        self._complain(text, await self._pool.tell(job, text))

    def _note(self, job: PoolJob, what: str, text: str) -> None:
        _LOG.info("%s: %s job=%d", what, text, job.key.job_id)
        self._tell(
            Event(time_s=self._clock(), node="carrelctld", what=what, text=text, job_id=job.key.job_id, uid=job.job.uid)
        )

    def _complain(self, about: object, said: str) -> None:
        if said:
            _LOG.info("%s: %s", about, said)


def _subject(action: Action) -> object:
    """Return what is to be done in order: all that concerns one run, or one name."""
    match action:
        case deeds.Point() | deeds.Open() | deeds.Close() | deeds.PowerDown():
            return action.node
        case deeds.Unreserve():
            return run_of_reservation(action.reservation, "")
        case _:
            return msgspec.structs.replace(action.run, cluster="")


def _unless_failed(line: list[bool] | BaseException) -> list[bool]:
    if isinstance(line, BaseException):
        raise line
    return line


def _now_s() -> float:
    """Return the time by the loop's clock: no one can set it, and a test's may run faster."""
    return asyncio.get_running_loop().time()
