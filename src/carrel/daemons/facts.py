"""What Slurm says of a job, asked once for all of its tasks that come to the door together."""

import asyncio
import time

from carrel.errors import RefusedError, UnreachableError
from carrel.model.job import Job
from carrel.ports import Scheduler

KEPT_S = 10.0  # long enough for the tasks of a step to come; a requeued run has the same job id
RETRY_PERIOD_S = 0.5


class JobFacts:
    """Jobs of this node, as Slurm described them when they began here."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Ask nothing yet."""
        self._scheduler = scheduler
        self._known: dict[int, tuple[float, Job]] = {}
        self._asking: dict[int, asyncio.Task[Job]] = {}

    def forget(self, job_id: int) -> None:
        """Ask anew next time: the prolog or the epilog says that another run has this id."""
        self._known.pop(job_id, None)

    async def job(self, job_id: int, *, timeout_s: float) -> Job:
        """Return the job; while Slurm does not answer, ask again until ``timeout_s`` has passed.

        Raises:
            RefusedError: Slurm has no such job.
            UnreachableError: Slurm did not answer in time.
        """
        known = self._known.get(job_id)
        if known and time.monotonic() - known[0] < KEPT_S:
            return known[1]
        return await asyncio.shield(self.expect(job_id, timeout_s=timeout_s))

    def expect(self, job_id: int, *, timeout_s: float) -> asyncio.Task[Job]:
        """Ask at once, for tasks that will want to know in a moment; they share the one question."""
        task = self._asking.get(job_id)
        if task is None:
            task = asyncio.ensure_future(self._ask(job_id, timeout_s))
            self._asking[job_id] = task
            task.add_done_callback(lambda _: self._asking.pop(job_id, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _ask(self, job_id: int, timeout_s: float) -> Job:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                job = await self._scheduler.job(job_id)
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_PERIOD_S)
                continue
            if job is None:
                raise RefusedError(f"slurm knows no job {job_id}")
            now_s = time.monotonic()
            self._known = {other: fact for other, fact in self._known.items() if now_s - fact[0] < KEPT_S}
            self._known[job_id] = (now_s, job)
            return job
