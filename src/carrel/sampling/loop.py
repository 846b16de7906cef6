"""The sampler of a node: one thread for all jobs, so that what is the node's is read once.

It needs no event loop and shares no lock with its callers but that of a list: whatever else the process does, a
sample is late by microseconds. Its methods may be called from any thread and return at once; what they ask for is done
by the thread that is in ``run``.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import msgspec

from carrel.config import Metrics
from carrel.core import schedule
from carrel.errors import NotFoundError, RefusedError
from carrel.model.job import Job, JobKey
from carrel.model.sample import OnGuestNode, SamplerStatus, Series, View
from carrel.sampling import cgroup, gpu, node, owner
from carrel.sampling.blocks import Block, Reading, Source
from carrel.sampling.folder import JobFolder
from carrel.sampling.inside import GuestFiles, GuestProcesses, job_source
from carrel.sampling.inside import sources as guest_sources
from carrel.sampling.job import SampledJob
from carrel.sampling.spool import Spool
from carrel.sampling.sync import Syncer

GOVERN_EVERY = 10
"""Samples between two looks at what sampling costs."""
_CLOCK_STEP_US = 500_000
_WAIT_MAX_S = 60.0
"""Also without a job: who is not heard of for longer is taken to hang."""
_SMOOTHING = 0.2

_T = TypeVar("_T")


class _State:
    """When a source of the node was last read, and what that costs."""

    __slots__ = ("last_us", "source")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.last_us = 0


class Sampler:
    """Samples jobs from their first to their last second."""

    def __init__(
        self,
        settings: Metrics,
        name: str,
        *,
        view: View = "host",
        sources: Sequence[Source] | None = None,
        inside: GuestFiles | None = None,
        spool: Spool | None = None,
    ) -> None:
        """Open the node's sources; nothing is sampled before ``run``.

        Args:
            settings: Where to, how often, and what it may cost.
            name: The node's name.
            view: Whether this is the job's node, or the inside of its guest.
            sources: What to read of the node; by default all that its kernel offers.
            inside: Look into this guest, for its one job, and not at this node.
            spool: Where sinks find what they have to take; None: there are none.

        Raises:
            OSError: the guest does not answer.
        """
        self._settings = settings
        self._name = name
        self._view = view
        self._spool = spool
        self._inside = inside
        found = sources
        if found is None and inside is not None:
            found = guest_sources(inside, slow_period_s=settings.slow_period_s)
        if found is None:
            found = node.sources(slow_period_s=settings.slow_period_s)
        self._node = [_State(source) for source in found]
        self._gpus = gpu.Watcher()
        self._jobs: dict[Series, SampledJob] = {}
        self._commands: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._stopping = False
        self._costs_us: dict[str, float] = {}
        self._stretched: dict[str, int] = {}
        self._failures: Counter[str] = Counter()
        self._last_failure = ""
        self._samples = 0
        self._awake_us = 0
        self._offset_us = _offset_us()
        self._syncer = Syncer(period_s=settings.sync_period_s, failed=self._failed)

    # ---- what callers ask for

    def add(self, job: Job, *, pid: int = 0, interval_s: float | None = None) -> "Future[Path]":
        """Sample a job, at once and from then on; the answer is its directory. A second call changes nothing.

        Args:
            job: The run; its user, and on this node its CPUs and memory.
            pid: Any process of it, where there is one yet; see ``attach``.
            interval_s: Time between two samples; by default the site's.

        The answer fails with:
            RefusedError: the run has been sampled to its end, or the interval is out of bounds.
            CarrelError: its directory is not the user's own.
            OSError: the directory or the segment cannot be made.
        """
        return self._ask(lambda: self._add(job, pid, interval_s))

    def carry(
        self, job: Job, node: str, groups: cgroup.JobGroups, *, pid: int, interval_s: float | None = None
    ) -> "Future[Path]":
        """Sample a job on a guest that is a Slurm node and that this node carries; see ``add``.

        Args:
            job: The run; its CPUs and memory are those that it has on that guest.
            node: The guest's name.
            groups: Where the guest is counted, with the tasks that are in it; see ``cgroup.of_guest_node``.
            pid: The guest's process; 0: it is gone, and its groups still hold all that it used.
            interval_s: Time between two samples; by default the site's.
        """
        return self._ask(lambda: self._carry(job, node, groups, pid, interval_s))

    def attach(self, run: JobKey, pid: int) -> "Future[cgroup.JobGroups]":
        """Count what the groups of this process count; the answer is all groups that are counted for the job now.

        Until then, only the node is sampled. Where there are no groups, the process and its descendants are counted,
        beside those of other calls.
        """
        return self._ask(lambda: self._attach(self._job(run), cgroup.of_process(pid), pid))

    def adopt(self, run: JobKey, groups: cgroup.JobGroups) -> "Future[cgroup.JobGroups]":
        """Count what these groups count, as an earlier sampler of this node did: their processes may all be gone."""
        return self._ask(lambda: self._attach(self._job(run), groups, 0))

    def attach_guest(self, run: JobKey, pid: int) -> "Future[None]":
        """Look from outside at the CPUs of a guest of this job, whose process this is."""
        return self._ask(lambda: self._job(run).outside().add(pid))

    def guest_disks(self, run: Series, guest: str, counters: Mapping[str, int]) -> "Future[None]":
        """Take what the disks of a guest of this job did so far; names are those of ``outside.DISK_NAMES``."""
        return self._ask(lambda: self._job(run).outside().tell(guest, counters))

    def describe(self, job: Job, *, node: str = "") -> "Future[None]":
        """Keep what is better known of a job now: its name, account and limits; ``node``: the guest that it is on."""
        return self._ask(lambda: self._describe(self._job(_series(job, node)), job))

    def interval(self, run: Series, seconds: float) -> "Future[None]":
        """Sample a running job this often from now on.

        The answer fails with:
            RefusedError: the interval is out of bounds.
            NotFoundError: the run is not being sampled.
        """
        return self._ask(lambda: self._change_interval(self._job(run), seconds))

    def sample(self, run: Series) -> "Future[None]":
        """Take one more sample now; the answer comes when it is taken, and not yet on the disk.

        The answer fails with:
            NotFoundError: the run is not being sampled.
        """
        return self._ask(lambda: self._sample([self._job(run)], forced=True))

    def remove(self, run: Series) -> "Future[JobFolder]":
        """Take the last sample; the answer, which the caller must close, comes when it is on the disk.

        The answer fails with:
            NotFoundError: the run is not being sampled.
        """
        answer: Future[JobFolder] = Future()
        self._ask(lambda: self._remove(run, answer)).add_done_callback(_pass_failure_to(answer))
        return answer

    def runs(self) -> tuple[JobKey, ...]:
        """Return what is being sampled of this node's own jobs."""
        return tuple(run for run in tuple(self._jobs) if isinstance(run, JobKey))

    def samples(self, run: Series) -> bool:
        """Say whether it is being sampled."""
        return run in self._jobs

    def status(self) -> SamplerStatus:
        """Return how the sampler is doing; costs are those of late."""
        gpus = {"gpu": self._gpus.cost_us} if self._gpus.cost_us else {}
        return SamplerStatus(
            jobs=len(self._jobs),
            samples=self._samples,
            cost_us={name: round(cost, 1) for name, cost in {**self._costs_us, **gpus}.items()},
            stretched=dict(self._stretched),
            failures=dict(self._failures),
            last_failure=self._last_failure,
            awake_s=self._awake_us / 1e6,
        )

    def stop(self) -> None:
        """End ``run``. Jobs go on; a later sampler of this node appends to their segments."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # ---- the thread

    def run(self) -> None:
        """Sample until stopped."""
        syncer = threading.Thread(target=self._syncer.run, name="carrel-sync", daemon=True)
        syncer.start()
        try:
            while True:
                self._awake_us = _now_us()
                for command in self._awaited():
                    command()
                if self._stopping:
                    return
                self._sample_due()
        finally:
            for job in self._jobs.values():
                job.let_go(release=False)
                job.folder.close()
            for state in self._node:
                state.source.close()
            if self._inside:
                self._inside.close()
            self._syncer.stop()
            syncer.join()

    def _awaited(self) -> list[Callable[[], None]]:
        """Wait for a command or for the next sample."""
        with self._wake:
            if not self._commands and not self._stopping:
                wait_s = min([_WAIT_MAX_S, *((job.due_us - _now_us()) / 1e6 for job in self._jobs.values())])
                if wait_s > 0:
                    self._wake.wait(wait_s)
            found, self._commands = self._commands, []
            return found

    def _ask(self, deed: Callable[[], _T]) -> "Future[_T]":
        answer: Future[_T] = Future()

        def command() -> None:
            try:
                answer.set_result(deed())
            except Exception as error:  # noqa: BLE001  # whatever it is, it is the caller's, and the sampler goes on
                if not isinstance(error, NotFoundError | RefusedError):
                    self._failed("command", error)
                answer.set_exception(error)

        with self._wake:
            self._commands.append(command)
            self._wake.notify()
        return answer

    def _job(self, run: Series) -> SampledJob:
        if run not in self._jobs:
            raise NotFoundError(f"job {run} is not being sampled on {self._name}; has it ended?")
        return self._jobs[run]

    def _add(self, job: Job, pid: int, interval_s: float | None) -> Path:
        if job.key in self._jobs:
            if pid:
                self._attach(self._jobs[job.key], cgroup.of_process(pid), pid)
            return self._jobs[job.key].folder.path
        made = self._made(job, self._name, interval_s)
        self._jobs[job.key] = made
        if self._inside:
            with contextlib.suppress(OSError):  # it has gone, and says so itself
                processes = GuestProcesses(self._inside, period_s=self._settings.process_period_s)
                made.attach_inside(job_source(self._inside), processes)
        self._watch_gpus(made, 0)
        if pid:
            with contextlib.suppress(OSError):  # it has ended meanwhile; another one will be attached
                self._attach(made, cgroup.of_process(pid), pid)
        self._sample([made], forced=True)
        return made.folder.path

    def _carry(self, job: Job, node: str, groups: cgroup.JobGroups, pid: int, interval_s: float | None) -> Path:
        series = OnGuestNode(job.key, node)
        if series not in self._jobs:
            self._jobs[series] = made = self._made(job, node, interval_s)
            made.say("older", "the guest was there before its job: what it used until then is not the job's", _now_us())
            made.attach(groups, pid=pid, process_period_s=self._settings.process_period_s)
            if pid:
                made.outside().add(pid)
            self._sample([made], forced=True)
        return self._jobs[series].folder.path

    def _made(self, job: Job, node: str, interval_s: float | None) -> SampledJob:
        """Return a job whose segment is open and known to all who care."""
        interval_us = self._interval_us(interval_s or self._settings.period_s)
        user, own_gid = owner.of_job(job)
        gid = owner.readers(self._settings.readers, own_gid)
        folder = JobFolder.make(Path(self._settings.root), job.key, user=user, uid=job.uid, gid=gid)
        now_us = _now_us()
        try:
            known = msgspec.structs.replace(job, user=user, gid=own_gid)
            made = SampledJob(known, folder, node=node, view=self._view, interval_us=interval_us, now_us=now_us)
        except BaseException:
            folder.close()
            raise
        self._enlist(made)
        self._syncer.watch(made.writer)
        return made

    def _describe(self, sampled: SampledJob, job: Job) -> None:
        sampled.describe(job, _now_us())
        self._enlist(sampled)

    def _enlist(self, job: SampledJob) -> None:
        """Have the sinks take it; files come first, and a sink that misses a job is counted."""
        if self._spool is not None:
            try:
                self._spool.enlist(job.job, job.folder, node=job.node, view=self._view, since_us=_now_us())
            except OSError as error:
                self._failed("spool", error)

    def _attach(self, job: SampledJob, groups: cgroup.JobGroups, pid: int) -> cgroup.JobGroups:
        job.attach(groups, pid=pid, process_period_s=self._settings.process_period_s)
        self._watch_gpus(job, pid)
        return job.groups

    def _watch_gpus(self, job: SampledJob, pid: int) -> None:
        if self._inside is not None or job.gpus is not None:
            return
        if found := gpu.of_job(job.job.gpus, job.groups, [pid] if pid else []):
            job.gpus = self._gpus.source(found)

    def _interval_us(self, seconds: float) -> int:
        low, high = self._settings.period_min_s, self._settings.period_max_s
        if not low <= seconds <= high:
            raise RefusedError(f"a job cannot be sampled every {seconds:g} s; here from {low:g} to {high:g} s")
        return round(seconds * 1e6)

    def _change_interval(self, job: SampledJob, seconds: float) -> None:
        now_us = _now_us()
        job.change_interval(self._interval_us(seconds), now_us)
        job.say("interval", f"sampled every {seconds:g} s from now on", now_us)

    def _remove(self, run: Series, answer: "Future[JobFolder]") -> None:
        job = self._job(run)
        self._sample([job], forced=True)
        del self._jobs[run]
        job.end(_now_us(), self.status().cost_us)
        job.let_go(release=True)
        self._syncer.close(job.writer).add_done_callback(lambda _: answer.set_result(job.folder))

    def _sample_due(self) -> None:
        self._mind_the_clock()
        now_us = _now_us()
        due = [job for job in self._jobs.values() if job.due_us <= now_us]
        if due:
            self._sample(due, forced=False)
            if self._samples % GOVERN_EVERY == 0:
                self._govern()

    def _mind_the_clock(self) -> None:
        """A clock that was set makes all that is due wrong by as much."""
        offset_us = _offset_us()
        step_us = offset_us - self._offset_us
        self._offset_us = offset_us
        if abs(step_us) > _CLOCK_STEP_US:
            now_us = _now_us()
            for job in self._jobs.values():
                job.due_us = now_us
                job.say("clock", f"the clock of {self._name} was set by {step_us / 1e6:+.3f} s", now_us)

    def _sample(self, jobs: list[SampledJob], *, forced: bool) -> None:
        now_us = _now_us()
        if self._gone(jobs, now_us):
            return
        if self._inside:
            self._inside.forget()
        costs_us: dict[str, float] = {}
        stretch = self._stretched.get("processes", 1)
        own = [job.read(now_us, forced=forced, stretch=stretch, costs_us=costs_us) for job in jobs]
        shared = self._read_node(now_us, forced=forced, costs_us=costs_us)
        if self._gone(jobs, now_us):
            return  # half a sample is none
        began_ns = time.thread_time_ns()
        for job, reading in zip(jobs, own, strict=True):
            if error := job.store(now_us, (shared, reading)):
                self._failed("store", error)
            job.due_us = schedule.next_due_us(now_us, job.interval_us)
            job.bound(self._settings.job_bytes_max, round(self._settings.period_max_s * 1e6), now_us)
        costs_us["store"] = (time.thread_time_ns() - began_ns) / 1000
        for name, cost in costs_us.items():
            before = self._costs_us.get(name, cost)
            self._costs_us[name] = before + _SMOOTHING * (cost - before)
        self._samples += 1

    def _gone(self, jobs: list[SampledJob], now_us: int) -> bool:
        """Say whether there is nothing to be seen any more; whoever made this sampler makes another one."""
        if self._inside is None or not self._inside.gone:
            return False
        for job in jobs:
            job.due_us = schedule.next_due_us(now_us, job.interval_us)
        return True

    def _read_node(self, now_us: int, *, forced: bool, costs_us: dict[str, float]) -> Reading:
        interval_us = self._fastest_us()
        blocks: list[Block] = []
        began_ns = time.thread_time_ns()
        for state in self._node:
            source = state.source
            period_us = max(source.period_s * 1e6, interval_us * self._stretched.get(source.name, 1))
            rare = period_us > interval_us
            if rare and not forced and now_us - state.last_us < period_us - interval_us / 2:
                continue
            state.last_us = now_us
            try:
                blocks += source.read()
            except (OSError, ValueError, IndexError) as error:
                if self._inside and self._inside.gone:
                    break
                self._failed(source.name, error)
            ended_ns = time.thread_time_ns()
            costs_us[source.name] = (ended_ns - began_ns) / 1000
            began_ns = ended_ns
        return Reading(blocks)

    def _fastest_us(self) -> int:
        return min((job.interval_us for job in self._jobs.values()), default=round(self._settings.period_s * 1e6))

    def _govern(self) -> None:
        periods_s = {state.source.name: state.source.period_s for state in self._node}
        interval_s = self._fastest_us() / 1e6
        fixed = ("job", "store")  # what a job used is what sampling is for
        able = {name: cost for name, cost in self._costs_us.items() if name not in fixed}
        budget = self._settings.budget_cores - sum(self._costs_us.get(name, 0.0) for name in fixed) / 1e6 / interval_s
        before = self._stretched
        self._stretched = schedule.stretched(able, before, interval_s=interval_s, periods_s=periods_s, budget=budget)
        for name in sorted(before.keys() | self._stretched.keys()):
            self._tell_stretch(name, before.get(name, 1), self._stretched.get(name, 1))

    def _tell_stretch(self, name: str, before: int, after: int) -> None:
        if before == after:
            return
        what = "degraded" if after > before else "restored"
        text = f"{name} is read at each {after}. sample: one reading takes {self._costs_us[name]:.0f} us"
        text += f" and sampling may take {self._settings.budget_cores:g} of a core"
        now_us = _now_us()
        for job in self._jobs.values():
            job.say(what, text, now_us)

    def _failed(self, what: str, error: Exception) -> None:
        self._failures[what] += 1
        self._last_failure = f"{what}: {error}"


def _series(job: Job, node: str) -> Series:
    return OnGuestNode(job.key, node) if node else job.key


def _now_us() -> int:
    return time.time_ns() // 1000


def _offset_us() -> int:
    return (time.time_ns() - time.monotonic_ns()) // 1000


def _pass_failure_to(answer: "Future[JobFolder]") -> Callable[["Future[None]"], None]:
    def passing(done: "Future[None]") -> None:
        if error := done.exception():
            answer.set_exception(error)

    return passing
