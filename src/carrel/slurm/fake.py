"""A Slurm in memory: for the model test, and for whoever tests a daemon's decisions without a cluster.

What a user or slurmctld would do is a plain method (``submit``, ``start``, ``end`` …), named by the run, and does
nothing to a run that is past it. Anything that talks to real Slurm is tested with ``carrel sandbox`` instead.
"""

import dataclasses
from collections.abc import Sequence

import msgspec

from carrel.errors import RefusedError, UnreachableError
from carrel.model.job import Job, JobKey, JobState


@dataclasses.dataclass
class _Run:
    job: Job
    elapsed_s: int = 0
    forgotten: bool = False


class FakeSlurm:
    """See ``carrel.ports.Scheduler`` for what ``jobs``, ``job``, ``drain`` and ``requeue`` promise."""

    def __init__(self, *, cluster: str = "fake", nodes: Sequence[str] = ("c1",)) -> None:
        """Start with no jobs; each job takes all of ``nodes``, and they are never full."""
        self.answers = True
        """False: every question raises, as with slurmctld down. What users do still happens."""
        self.drained: dict[str, str] = {}
        self._cluster = cluster
        self._nodes = tuple(nodes)
        self._runs: dict[JobKey, _Run] = {}

    async def jobs(self) -> Sequence[Job]:
        self._answer()
        return tuple(run.job for run in self._runs.values() if run.job.state != "ended")

    async def job(self, job_id: int) -> Job | None:
        self._answer()
        found = [run.job for key, run in self._runs.items() if key.job_id == job_id and not run.forgotten]
        return found[-1] if found else None

    async def drain(self, node: str, reason: str) -> None:
        self._answer()
        self.drained.setdefault(node, reason)

    async def requeue(self, job_id: int) -> None:
        job = await self.job(job_id)
        if job is None or job.state == "held":
            raise RefusedError(f"job {job_id} cannot be requeued: it is {job.state if job else 'unknown'}")
        if job.state == "pending":
            return
        self._set(job.key, "ended")
        again = msgspec.structs.replace(job.key, restart=job.key.restart + 1)
        self._runs[again] = _Run(msgspec.structs.replace(job, key=again, state="pending", nodes=()))

    def run(self, key: JobKey) -> Job:
        """Return this very run; ``unknown`` where Slurm has none."""
        self._answer()
        run = self._runs.get(key)
        return Job(key=key, state="unknown") if run is None or run.forgotten else run.job

    def elapsed_s(self, key: JobKey) -> int:
        """Return how long the run ran so far, as the accounting says."""
        self._answer()
        return self._runs[key].elapsed_s

    def runs(self) -> tuple[Job, ...]:
        """Return every run there ever was, whether or not Slurm answers: the truth, for assertions."""
        return tuple(run.job for run in self._runs.values())

    def submit(
        self, *, time_limit_s: int = 60, held: bool = True, wants_guest: bool = True, job_id: int | None = None
    ) -> JobKey:
        """Submit a job; ``job_id`` lets an old id come back, as after ``MaxJobId``."""
        number = len(self._runs) + 1
        key = JobKey(cluster=self._cluster, job_id=job_id or number, submit_s=number)
        job = Job(key=key, state="held" if held else "pending", time_limit_s=time_limit_s, wants_guest=wants_guest)
        self._runs[key] = _Run(job)
        return key

    def release(self, key: JobKey) -> None:
        self._set(key, "pending", only={"held"})

    def start(self, key: JobKey) -> None:
        if self._set(key, "running", only={"pending"}):
            self._runs[key].job = msgspec.structs.replace(self._runs[key].job, nodes=self._nodes)

    def suspend(self, key: JobKey) -> None:
        self._set(key, "suspended", only={"running"})

    def resume(self, key: JobKey) -> None:
        self._set(key, "running", only={"suspended"})

    def cancel(self, key: JobKey) -> None:
        self._set(key, "ended")

    def end(self, key: JobKey) -> None:
        self._set(key, "ended", only={"running"})

    def raise_limit(self, key: JobKey, time_limit_s: int) -> None:
        run = self._runs[key]
        if run.job.state != "ended":
            run.job = msgspec.structs.replace(run.job, time_limit_s=time_limit_s)

    def forget(self, key: JobKey) -> None:
        """Lose an ended run, from memory and from the accounting."""
        if self._runs[key].job.state == "ended":
            self._runs[key].forgotten = True

    def advance(self, seconds: int) -> None:
        """Let time pass for what runs; a run that reaches its limit ends there."""
        for run in self._runs.values():
            if run.job.state == "running":
                limit_s = run.job.time_limit_s
                run.elapsed_s += seconds
                if limit_s is not None and run.elapsed_s >= limit_s:
                    run.elapsed_s = limit_s
                    run.job = msgspec.structs.replace(run.job, state="ended")

    def _answer(self) -> None:
        if not self.answers:
            raise UnreachableError("slurmctld does not answer; is it running?")

    def _set(self, key: JobKey, state: JobState, *, only: set[JobState] | None = None) -> bool:
        run = self._runs[key]
        if run.job.state == "ended" or (only is not None and run.job.state not in only):
            return False
        run.job = msgspec.structs.replace(run.job, state=state)
        return True
