"""Jobs on guests that are Slurm nodes: the sampler of the host that carries them samples them too.

Of such a node the host knows whose run it is before Slurm starts it, and where it is counted: nobody is asked and
nothing is looked for. What was begun is noted until its tables are made; by then the node is long gone.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from carrel.core import schedule
from carrel.daemons.facts import JobFacts
from carrel.daemons.failures import Failures
from carrel.daemons.finish import Finisher
from carrel.daemons.inside import GuestViews
from carrel.daemons.records import Sampled, SampledJobs
from carrel.daemons.sampler_thread import JobSampler, SamplerThread, answer
from carrel.errors import CarrelError, RefusedError
from carrel.model.guest import Guest
from carrel.model.guestnode import NodeOrder
from carrel.model.job import Job
from carrel.model.sample import OnGuestNode
from carrel.sampling import cgroup
from carrel.sampling.loop import Sampler

if TYPE_CHECKING:
    from carrel.daemons.node import Node

FACTS_TIMEOUT_S = 60.0
LAST_TIMEOUT_S = 2.0
"""An epilog waits no longer for a last sample."""
RETRY_S = 30.0


class CarriedJobs:
    """The sampling of all guest-nodes of one host."""

    def __init__(
        self,
        host: "Node",
        sampling: SamplerThread[JobSampler],
        records: SampledJobs,
        finisher: Finisher,
        failures: Failures,
    ) -> None:
        """Take up what an earlier carreld left.

        Args:
            host: Carries them.
            sampling: Has the sampler. That of LDMS samples whole nodes: then jobs are seen from inside alone.
            records: Also has those of the host's own jobs.
            finisher: Makes their tables.
            failures: Where it is counted what went wrong.
        """
        self._host = host
        self._settings = host.config.metrics
        self._sampling = sampling
        self._records = records
        self._finisher = finisher
        self._failed = failures.add
        self._jobs = {OnGuestNode(one.job.key, one.node): one for one in records.all() if one.node}
        self._beginning: dict[OnGuestNode, asyncio.Task[None]] = {}
        self._ending: dict[OnGuestNode, asyncio.Task[None]] = {}
        self._retry_at_s: dict[OnGuestNode, float] = {}

    @property
    def _views(self) -> GuestViews:
        return self._host.metrics.guests

    @property
    def _sampler(self) -> Sampler | None:
        sampler = self._sampling.sampler
        return sampler if isinstance(sampler, Sampler) else None

    def recover(self) -> None:
        """Have the tables made that an earlier carreld has not made. Returns at once."""
        for sampled in list(self._jobs.values()):
            if sampled.ended:
                self._finish(sampled)

    def began(self, series: OnGuestNode) -> bool:
        """Say whether a job is to be sampled, by this carreld or by an earlier one."""
        return series in self._jobs and not self._jobs[series].ended

    def begin(self, order: NodeOrder, guest: Guest, facts: JobFacts) -> None:
        """Sample the job of a guest-node, whose guest this is. A second call changes nothing. Returns at once."""
        series = OnGuestNode(order.run, order.node)
        if not self._settings.enabled or series in self._beginning or series in self._ending:
            return
        if series in self._jobs and (
            self._jobs[series].ended or self._sampler is None or self._sampler.samples(series)
        ):
            return
        if self._sampling.sampler is None or time.monotonic() < self._retry_at_s.get(series, 0.0):
            return
        self._retry_at_s[series] = time.monotonic() + RETRY_S
        self._beginning[series] = task = asyncio.ensure_future(self._begin(series, order, guest, facts))
        task.add_done_callback(lambda _: self._beginning.pop(series, None))

    async def _begin(self, series: OnGuestNode, order: NodeOrder, guest: Guest, facts: JobFacts) -> None:
        if series not in self._jobs:
            groups = cgroup.JobGroups()
            try:
                groups = cgroup.of_guest_node(guest.pid, order.node)
            except OSError as error:  # it has just ended
                self._failed("begin", error)
            self._remember(Sampled(job=_as_ordered(order), node=order.node, groups=groups))
        if await self._carry(series, pid=guest.pid):
            self._views.begin(guest)
            await self._describe(series, facts)

    async def _carry(self, series: OnGuestNode, *, pid: int) -> bool:
        """Have a job sampled; tell whether it may be looked into as well."""
        sampled, sampler = self._jobs[series], self._sampler
        if sampler is None:
            return True
        try:
            interval_s = self._allowed_s(sampled)
            await answer(sampler.carry(sampled.job, series.node, sampled.groups, pid=pid, interval_s=interval_s))
        except RefusedError:
            self._ended(series)  # an earlier carreld died between its tables and forgetting it
            return False
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("begin", error)
        return True

    async def _describe(self, series: OnGuestNode, facts: JobFacts) -> None:
        """Add what the order does not say: its name, account, nodes and time limit."""
        try:
            job = await facts.job(series.run.job_id, timeout_s=FACTS_TIMEOUT_S)
            (job,) = await self._host.scheduler.described([job])
            if job.key == series.run and series in self._jobs:
                # Slurm's record of the node says what the largest guest would have; the order, what this one has.
                own = self._jobs[series].job
                job = msgspec.structs.replace(job, cpus=own.cpus, memory_bytes=own.memory_bytes)
                self._remember(msgspec.structs.replace(self._jobs[series], job=job))
                if self._sampler is not None:
                    await answer(self._sampler.describe(job, node=series.node))
        except (CarrelError, TimeoutError) as error:
            self._failed("describe", error)

    def known(self, guest: Guest) -> tuple[Job, float | None] | None:
        """Return the run of a guest-node if it is sampled, and the interval chosen for it."""
        sampled = self._jobs.get(OnGuestNode(guest.run, guest.node)) if guest.run else None
        return None if sampled is None or sampled.ended else (sampled.job, self._allowed_s(sampled))

    def _allowed_s(self, sampled: Sampled) -> float | None:
        return schedule.allowed_s(sampled.interval_s, self._settings.period_min_s, self._settings.period_max_s)

    def of_job(self, job_id: int) -> Sequence[Sampled]:
        """Return what is sampled of a job here."""
        return [one for series, one in self._jobs.items() if series.run.job_id == job_id and not one.ended]

    async def sample_every(self, sampled: Sampled, seconds: float) -> None:
        """Change how often a job is sampled from outside.

        Raises:
            RefusedError: the interval is out of bounds.
            TimeoutError: the sampler does not answer.
        """
        series = OnGuestNode(sampled.job.key, sampled.node)
        if self._sampler is not None and self._sampler.samples(series):
            await answer(self._sampler.interval(series, seconds))
        self._remember(msgspec.structs.replace(self._jobs.get(series, sampled), interval_s=seconds))

    async def last(self, series: OnGuestNode) -> None:
        """Take a sample of a guest that shall end now, if that can be had in time."""
        if self._sampler is not None and self._sampler.samples(series):
            try:
                async with asyncio.timeout(LAST_TIMEOUT_S):
                    await answer(self._sampler.sample(series))
            except (CarrelError, TimeoutError) as error:
                self._failed("end", error)

    def end(self, series: OnGuestNode, *, guest: str, report: bool) -> "asyncio.Task[None] | None":
        """Have a job's samples finished, whose guest is gone. A second call changes nothing.

        Args:
            series: The job and its node.
            guest: The guest's name.
            report: What the job used shall be printed at the end of its output.

        Returns:
            What ends when nothing of the node is needed any more; None: nothing is.
        """
        if series not in self._ending and self.began(series):
            if report:
                self._remember(msgspec.structs.replace(self._jobs[series], report=True))
            self._ending[series] = task = asyncio.ensure_future(self._end(series, guest))
            task.add_done_callback(lambda _: self._ending.pop(series, None))
        return self._ending.get(series)

    async def _end(self, series: OnGuestNode, guest: str) -> None:
        if beginning := self._beginning.get(series):
            await asyncio.wait([beginning])
        await self._views.closed(guest)
        sampler = self._sampler
        try:
            # What was not sampled since another carreld died: its groups still hold all that it used.
            if sampler and (sampler.samples(series) or await self._carry(series, pid=0)):
                (await answer(sampler.remove(series))).close()
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("end", error)
        await asyncio.to_thread(cgroup.release, self._jobs[series].groups)
        self._ended(series)

    def _ended(self, series: OnGuestNode) -> None:
        if self.began(series):
            self._remember(msgspec.structs.replace(self._jobs[series], ended=True))
            self._finish(self._jobs[series])

    def _finish(self, sampled: Sampled) -> None:
        series = OnGuestNode(sampled.job.key, sampled.node)

        def done() -> None:
            self._jobs.pop(series, None)
            self._retry_at_s.pop(series, None)
            self._records.remove(series)

        self._finisher.put(sampled, done)

    def _remember(self, sampled: Sampled) -> None:
        self._jobs[OnGuestNode(sampled.job.key, sampled.node)] = sampled
        self._records.put(sampled)

    def stop(self) -> None:
        """Begin nothing more; the next carreld goes on."""
        for task in (*self._beginning.values(), *self._ending.values()):
            task.cancel()


def _as_ordered(order: NodeOrder) -> Job:
    return Job(
        key=order.run,
        state="running",
        user=order.user,
        uid=order.uid,
        gid=order.gid,
        cpus=order.cpus,
        memory_bytes=order.memory_bytes,
        wants_guest=True,
    )
