"""Does in Slurm, and in the lines for room, what was decided for guests that are nodes, and tells the jobs' owners.

What Slurm does not take is logged, and found by the next look as what is yet to be done.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

import msgspec

from carrel.core import guestdeeds as deeds
from carrel.core.guestdeeds import Action, OnJob, OnLine, OnName
from carrel.core.queue import Cancel, Launch
from carrel.daemons.lines import Lines
from carrel.daemons.patience import Patience
from carrel.errors import CarrelError, NodeFaultError, UnreachableError
from carrel.model.job import JobKey
from carrel.model.pool import PoolJob, reservation_name, run_of_reservation
from carrel.model.report import Event
from carrel.slurm.pool import SlurmPool

COMMANDS_AT_ONCE = 4
"""A command of Slurm is mostly the start of a process; slurmctld makes one change at a time."""

IN_QUEUE = deeds.FindRoom | deeds.Rest | deeds.GiveBackRoom
"""Deeds on the queue, which belongs to one thread at a time."""

Jobs = dict[JobKey, PoolJob]

_LOG = logging.getLogger("carrelctld")


class Doer:
    """The hands of the loop: it decides nothing."""

    def __init__(
        self,
        pool: SlurmPool,
        lines: Lines,
        patience: Patience,
        *,
        address: Callable[[str], str],
        assigned: Callable[[deeds.Assign], None],
        tell: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        """Do nothing yet.

        Args:
            pool: Slurm.
            lines: Who waits for room.
            patience: Remembers whom Slurm did not start.
            address: Returns where Slurm reaches the slurmds of a host.
            assigned: Called when Slurm has taken all of an assignment: its hosts may begin before the next look.
            tell: Takes what happened, for ``carrel job show``.
            clock: Returns the time, in seconds since the epoch.
        """
        self._pool = pool
        self._lines = lines
        self._patience = patience
        self._address = address
        self._assigned = assigned
        self._tell = tell
        self._clock = clock
        self._told: dict[JobKey, str] = {}

    async def do(self, actions: Sequence[Action], jobs: Jobs) -> bool:
        """Do what is due: side by side for several runs and names, one after another for each of them.

        Returns:
            Whether a look at once would show something new.
        """
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
        done += [await self._act(action, jobs) for action in actions if isinstance(action, IN_QUEUE)]
        return any(done)

    async def let_through(self, jobs: Jobs, *, silent: Collection[str]) -> bool:
        """Take room on hosts that are not silent for those whose turn it is; return whether it was anybody's."""
        found = await asyncio.to_thread(self._lines.launches, silent)
        for run, action in found:
            match action:
                case Launch():
                    self._note(jobs[run], "guest-placed", f"on {', '.join(action.here.hosts)}")
                case Cancel():
                    await self._cancel(jobs[run], action.reason)
                case _:
                    assert_never(action)
        return bool(found)

    async def say_why(self, jobs: Jobs) -> None:
        """Say to those that wait for room why they do."""
        for run, why in self._lines.waiting():
            await self._say(jobs[run], why)

    def keep_only(self, alive: Collection[JobKey]) -> None:
        """Forget the runs that are over."""
        self._told = {run: text for run, text in self._told.items() if run in alive}

    async def _act(self, action: Action, jobs: Jobs) -> bool:
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

    async def _act_on_name(self, action: OnName, jobs: Jobs) -> bool:
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
        """Point the names at their hosts, reserve them, pin the job and open them; where all went well, say so."""
        names, name, pool = dict(action.hosts), reservation_name(action.run), self._pool
        addresses = {host: self._address(host) for host in names.values()}
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
        if not any(said):
            self._assigned(action)
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
