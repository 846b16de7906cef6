"""Every job of this node is sampled, from its first second to its last, whether anybody announced it or not.

A hook leaves a hint and goes on; slurmd's step sockets and the sweep tell the same later. Nothing here is ever waited
for by a job: what fails is counted, told and tried again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from carrel.core import schedule
from carrel.core.guests import living
from carrel.daemons import people, sinks
from carrel.daemons.attach import Attacher
from carrel.daemons.carried import CarriedJobs
from carrel.daemons.failures import Failures
from carrel.daemons.finish import Finisher
from carrel.daemons.held import HeldGroups
from carrel.daemons.hints import Hints
from carrel.daemons.inside import GuestViews
from carrel.daemons.ldms import LdmsSampler
from carrel.daemons.records import Sampled, SampledJobs
from carrel.daemons.sampler_thread import JobSampler, SamplerThread, answer
from carrel.daemons.watch import DirectoryWatch
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.guest import Counters as GuestCounters
from carrel.model.guest import Guest
from carrel.model.job import Job, JobKey
from carrel.model.report import SamplingWish
from carrel.model.sample import OnGuestNode, SamplerStatus
from carrel.sampling import cgroup
from carrel.sampling.folder import component
from carrel.sampling.loop import Sampler
from carrel.sampling.outside import DISK_NAMES
from carrel.sampling.spool import Spool
from carrel.slurm import hostlist
from carrel.slurm.steps import Steps

if TYPE_CHECKING:
    from carrel.daemons.node import Node

FACTS_TIMEOUT_S = 60.0
RETRY_S = 30.0
WISHES_S = 3600.0
"""Longer than the controller repeats a wish."""
TOLD_PERIODS = 5
"""So many sweeps pass between two looks where the kernel tells of hints and steps: a look costs what a sample costs."""
GRACE_S = 30.0
"""What began so lately may have begun after Slurm was looked at."""

_LOG = logging.getLogger("carreld")


class JobMetrics:
    """The sampling of one node's jobs."""

    def __init__(self, node: "Node") -> None:
        """Take up what an earlier carreld left; ``run`` does the work."""
        self._node = node
        self._settings = node.config.metrics
        self._records = SampledJobs(node.directory / "sampled")
        self._held = HeldGroups(node.directory / "held")
        self._jobs = {sampled.job.key: sampled for sampled in self._records.all() if not sampled.node}
        self._hints = Hints(node.directory / "hints")
        self._failures = Failures()
        self._failed = self._failures.add
        self._steps = Steps(Path(node.config.slurm.spool_dir.replace("{node}", node.name)), node.name)
        self._spool = Spool(sinks.directory(node.config, node.name)) if self._settings.sinks else None
        self._finisher = Finisher(self._settings, node.name, node.scheduler, spool=self._spool, failed=self._failed)
        self._sampling = SamplerThread(self._make_sampler, failed=self._failed)
        self.guests = GuestViews(self._settings, node.driver, self._known, spool=self._spool, failed=self._failed)
        self.carried = CarriedJobs(node, self._sampling, self._records, self._finisher, self._failures)
        self._due = asyncio.Event()
        self._beginning: dict[int, asyncio.Task[None]] = {}
        self._ending: dict[JobKey, asyncio.Task[None]] = {}
        self._granted_s: dict[int, float] = {}
        self._since_s: dict[JobKey, float] = {}
        self._alive: set[JobKey] = set()
        """Known to run by this process: they are sampled. Others wait for Slurm's word."""
        self._retry_at_s: dict[JobKey, float] = {}
        self._to_report: set[int] = set()
        """Ids of jobs that begin and asked for a report in their output."""
        self._attacher = Attacher(
            self._sampling, self._held, self._beginning, lambda run, groups: self._remember(run, groups=groups)
        )
        self._living: frozenset[int] = frozenset()
        """Job ids with a step on this node, as last seen."""

    def _make_sampler(self) -> JobSampler:
        if self._settings.sampler == "ldms":
            return LdmsSampler(self._node.config, self._node.name, self._node.directory)
        return Sampler(self._settings, self._node.name, spool=self._spool)

    # -- what others tell

    def begin(self, job_id: int, *, anew: bool = False) -> None:
        """A job is on this node: sample it. A second call changes nothing. Returns at once.

        Args:
            job_id: Slurm's.
            anew: A hook says that it begins now: it may be another run of an id that is known already.
        """
        if not self._settings.enabled:
            return
        if beginning := self._beginning.get(job_id):
            if anew:
                beginning.add_done_callback(lambda _: self.begin(job_id, anew=True))
            return
        if not anew and any(run.job_id == job_id and not job.ended for run, job in self._jobs.items()):
            return
        if anew:
            self._node.facts.forget(job_id)
        self._beginning[job_id] = task = asyncio.ensure_future(self._begin(job_id, told=anew))
        task.add_done_callback(lambda _: self._beginning.pop(job_id, None))

    def end(self, job_id: int) -> None:
        """A job has ended on this node: take its last sample. A second call changes nothing. Returns at once."""
        beginning = self._beginning.get(job_id)
        if beginning is None:
            self._end_all([run for run in self._jobs if run.job_id == job_id])
        else:
            beginning.add_done_callback(lambda _: self.end(job_id))

    async def sample_every(self, job_id: int, seconds: float, *, uid: int) -> bool:
        """Change how often a running job is sampled on this node, for ``uid`` who asks for it; False: it is not here.

        Raises:
            RefusedError: it is somebody else's, or the interval is out of bounds.
            UnreachableError: the sampler does not answer.
        """
        runs = [run for run, job in self._jobs.items() if run.job_id == job_id and not job.ended]
        found = [*([self._jobs[max(runs)]] if runs else []), *self.carried.of_job(job_id)]
        if not found or self._sampling.sampler is None:
            return False
        sampled = found[0]
        if uid not in (0, sampled.job.uid) and not await people.in_group(uid, self._settings.operators):
            raise RefusedError(f"job {job_id} belongs to {sampled.job.user}, not to uid {uid}")
        try:
            for one in found:
                if one.node:
                    await self.carried.sample_every(one, seconds)
                else:
                    await answer(self._sampling.sampler.interval(one.job.key, seconds))
                    self._remember(one.job.key, interval_s=seconds)
            await self.guests.sample_every(sampled.job.key, seconds)
        except TimeoutError as error:
            raise UnreachableError(
                f"the sampler of {self._node.name} does not answer; see: carrel node check"
            ) from error
        return True

    def grant(self, wishes: Sequence[SamplingWish]) -> None:
        """Do once what was asked for through the controller. Returns at once."""
        for wish in wishes:
            here = any(run.job_id == wish.job_id for run in self._jobs) or self.carried.of_job(wish.job_id)
            if here and wish.asked_s > self._granted_s.get(wish.job_id, 0.0):
                self._granted_s[wish.job_id] = wish.asked_s
                asyncio.ensure_future(self._grant(wish))  # noqa: RUF006  # it ends by itself, within a bound
        self._granted_s = {job_id: at_s for job_id, at_s in self._granted_s.items() if time.time() - at_s < WISHES_S}

    async def _grant(self, wish: SamplingWish) -> None:
        try:
            await self.sample_every(wish.job_id, wish.every_s, uid=wish.uid)
        except CarrelError as error:
            self._node.journal.add("refused", str(error), job_id=wish.job_id, uid=wish.uid)

    def _known(self, guest: Guest) -> tuple[Job, float | None] | None:
        """Return a guest's run if it is being sampled, and the interval chosen for it."""
        if guest.per == "node":
            return self.carried.known(guest)
        sampled = self._jobs.get(guest.run) if guest.run else None
        if sampled is None or sampled.ended or sampled.job.key not in self._alive:
            return None
        return sampled.job, self._allowed_s(sampled)

    def _allowed_s(self, sampled: Sampled) -> float | None:
        return schedule.allowed_s(sampled.interval_s, self._settings.period_min_s, self._settings.period_max_s)

    def look_at(self, guests: Sequence[Guest]) -> None:
        """Look into the guests of this node too. Returns at once."""
        self.guests.look(guests)
        for guest in guests:
            self.guest_ready(guest)

    def guest_ready(self, guest: Guest) -> None:
        """Look into one guest, and count its processes: without control groups they are below no step."""
        self.guests.begin(guest)
        if guest.run in self._alive:
            self._attacher.guest(guest)

    def measured(self, guests: Sequence[Guest], counters: Mapping[str, GuestCounters]) -> None:
        """Keep what drivers say of their guests, however seldom they are asked. Returns at once."""
        for guest in guests:
            found = counters.get(guest.name)
            disks = {name: getattr(found, f"disk_{name}", None) for name in DISK_NAMES}
            known = {name: value for name, value in disks.items() if value is not None}
            if known and guest.run and self._known(guest) and self._sampling.sampler:
                series = OnGuestNode(guest.run, guest.node) if guest.per == "node" else guest.run
                self._sampling.sampler.guest_disks(series, guest.name, known)

    def suspicious(self) -> bool:
        """Say whether Slurm should be asked: a job has no step here, so it may be over."""
        return any(run.job_id not in self._living for run, job in self._jobs.items() if not job.ended)

    def compare(self, jobs: Sequence[Job]) -> None:
        """Take Slurm's word on which jobs live here."""
        # Asked for this node by its name, squeue also says what is on the guests that it carries as nodes.
        alive = {job.key: job for job in jobs if living(job) and self._node.name in job.nodes}
        waiting = {job.key.job_id for job in jobs if job.slurm_state == "COMPLETING"} & self._living
        known_s = time.monotonic() - GRACE_S
        for run in list(self._jobs):
            if run in alive:
                self._alive.add(run)
            elif run.job_id not in waiting and self._since_s.get(run, 0.0) < known_s:
                self._end_all([run])
        for run in alive.keys() - self._jobs.keys():
            self._node.facts.forget(run.job_id)
            self.begin(run.job_id)
        self._due.set()

    def status(self) -> SamplerStatus | None:
        """Return how sampling goes; None: it is off."""
        if not self._settings.enabled:
            return None
        return self._failures.with_those_of(self._sampling.status())

    # -- the work

    async def run(self) -> None:
        """Sample until cancelled."""
        try:
            self._hints.prepare(wanted=self._settings.enabled)
        except OSError as error:
            self._failed("hints", error)
        watch = self._watch()
        finishing = asyncio.ensure_future(self._finisher.run())
        leftovers = asyncio.ensure_future(self._recover())
        try:
            while True:
                told = watch is not None and watch.add(self._hints.directory) and watch.add(self._steps.spool)
                try:
                    self._look()
                except Exception as error:  # noqa: BLE001  # one odd job must not end the look at all others
                    _LOG.exception("a look at the jobs to sample failed")
                    self._failed("look", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._node.config.node.sweep_period_s * (TOLD_PERIODS if told else 1)):
                        await self._due.wait()
                self._due.clear()
        finally:
            for task in (finishing, leftovers, *self._beginning.values()):
                task.cancel()
            self._attacher.stop()
            self.carried.stop()
            if watch:
                watch.close()
            await self.guests.stop()
            await self._sampling.stop()

    def _watch(self) -> DirectoryWatch | None:
        try:
            return DirectoryWatch(self._due.set)
        except CarrelError as error:
            self._failed("watch", error)
            return None

    async def _recover(self) -> None:
        """Finish what earlier carrelds of this node left, also one that lost its power."""
        for run, sampled in list(self._jobs.items()):
            if sampled.ended:
                self._finish(run)
            elif not self._settings.enabled:
                self._end_all([run])
        self.carried.recover()
        mine = {(component(job.job.user), job.job.key.job_id) for job in self._jobs.values()}
        try:
            await self._finisher.leftovers(
                lambda folder: any(
                    folder.parent.name == user and folder.name.partition(".")[0] == str(job_id) for user, job_id in mine
                )
            )
        except OSError as error:
            self._failed("leftovers", error)

    def _look(self) -> None:
        """Look once; whatever takes time goes on by itself."""
        if self._sampling.mind():
            self._attacher.anew()
            self._retry_at_s.clear()
        self._failures.tell(self.status() or SamplerStatus(), self._node.journal.add)
        for hint in self._hints.taken():
            match hint.what:
                case "report":
                    self._wants_report(hint.job_id)
                case "begin":
                    self.begin(hint.job_id, anew=True)
                case "end":
                    self.end(hint.job_id)
        try:
            steps = self._steps.living()
        except OSError as error:
            if self._node.name not in hostlist.expand(self._node.config.guest_nodes.hosts):  # these need no slurmd
                self._failures.fault = (
                    f"no steps of jobs are seen: {error.strerror}: {error.filename}; see: slurm.spool_dir"
                )
            return
        self._failures.fault = ""
        self._living = frozenset(step.job_id for step in steps)
        if self._settings.enabled:
            for step in steps:
                self.begin(step.job_id)
            self._attacher.steps(steps)
        self._resume()
        known = {run.job_id for run, job in self._jobs.items() if not job.ended}
        self._held.release(self._living | self._beginning.keys() | known)

    def _resume(self) -> None:
        """Sample what should be and is not: a carreld or a sampler died, or the disk was full when the job began."""
        sampler = self._sampling.sampler
        if sampler is None:
            return
        runs = set(sampler.runs())
        self._alive |= {run for run in self._jobs if run.job_id in self._living and self._only(run)}
        for run in self._alive - runs - self._ending.keys():
            sampled = self._jobs.get(run)
            if sampled and not sampled.ended and time.monotonic() >= self._retry_at_s.get(run, 0.0):
                self._retry_at_s[run] = time.monotonic() + RETRY_S
                asyncio.ensure_future(self._add(sampled))  # noqa: RUF006  # it ends by itself, within a bound

    def _only(self, run: JobKey) -> bool:
        """Say whether no other run of this job id is known: a step does not say whose it is."""
        return sum(other.job_id == run.job_id for other in self._jobs) == 1

    def _wants_report(self, job_id: int) -> None:
        self._to_report.add(job_id)
        for run, sampled in list(self._jobs.items()):
            if run.job_id == job_id and not sampled.ended:
                self._remember(run, report=True)

    async def _begin(self, job_id: int, *, told: bool) -> None:
        try:
            job = await self._node.facts.job(job_id, timeout_s=FACTS_TIMEOUT_S)
        except RefusedError:
            return  # it is gone already
        except CarrelError as error:
            self._failed("facts", error)
            return
        self._end_all([run for run in self._jobs if run.job_id == job_id and run != job.key])
        # A job that its prolog announced and that is over by now has its two samples all the same.
        if not living(job) and not (told and job.state == "ended"):
            return
        if job.key not in self._jobs:
            self._since_s[job.key] = time.monotonic()
            self._jobs[job.key] = Sampled(job=job, report=job_id in self._to_report)
            self._records.put(self._jobs[job.key])
        self._alive.add(job.key)
        if not self._jobs[job.key].ended:
            self._retry_at_s[job.key] = time.monotonic() + RETRY_S
            if await self._add(self._jobs[job.key]):
                await self._attacher.take_over(job.key)
            await self._describe(job)

    async def _describe(self, job: Job) -> None:
        """Add what nothing is decided on: its name and account."""
        try:
            (known,) = await self._node.scheduler.described([job])
            if self._sampling.sampler and known != job and job.key in self._sampling.sampler.runs():
                self._remember(job.key, job=known)
                await answer(self._sampling.sampler.describe(known))
        except (CarrelError, TimeoutError) as error:
            self._failed("describe", error)

    def _remember(self, run: JobKey, **changes: object) -> None:
        sampled = self._jobs.get(run)
        if sampled and (known := msgspec.structs.replace(sampled, **changes)) != sampled:
            self._jobs[run] = known
            self._records.put(known)

    async def _add(self, sampled: Sampled) -> bool:
        """Have a job sampled; tell whether it is."""
        sampler, run = self._sampling.sampler, sampled.job.key
        if sampler is None or run in sampler.runs():
            return sampler is not None
        try:
            await answer(sampler.add(sampled.job, interval_s=self._allowed_s(sampled)))
            if sampled.groups.any:
                await answer(sampler.adopt(run, sampled.groups))
        except RefusedError:
            self._ended(run)  # an earlier carreld died between its tables and forgetting it
            return False
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("begin", error)
            return False
        return True

    def _end_all(self, runs: Sequence[JobKey]) -> None:
        for run in runs:
            if run in self._jobs and run not in self._ending and not self._jobs[run].ended:
                self._ending[run] = task = asyncio.ensure_future(self._end(run))
                task.add_done_callback(partial(_forget, self._ending, run))

    async def _end(self, run: JobKey) -> None:
        """Take the last sample, and have the rest done when there is time."""
        await self.guests.end_run(run)
        sampler, sampled = self._sampling.sampler, self._jobs[run]
        try:
            # What was never sampled, or not since another carreld died: its groups still hold all that it used.
            if sampler and await self._add(sampled):
                (await answer(sampler.remove(run))).close()
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("end", error)
        await asyncio.to_thread(cgroup.release, self._jobs[run].groups)
        self._ended(run)

    def _ended(self, run: JobKey) -> None:
        if not self._jobs[run].ended:
            self._remember(run, ended=True)
            self._finish(run)

    def _finish(self, run: JobKey) -> None:
        def done() -> None:
            self._jobs.pop(run, None)
            self._alive.discard(run)
            self._retry_at_s.pop(run, None)
            self._since_s.pop(run, None)
            self._to_report.discard(run.job_id)
            self._records.remove(run)

        self._finisher.put(self._jobs[run], done)


def _forget(tasks: dict[JobKey, "asyncio.Task[None]"], run: JobKey, _: "asyncio.Task[None]") -> None:
    tasks.pop(run, None)
