"""What carrelctld remembers of runs that had all they need, and that Slurm did not start.

It is memory, and forgotten by a restart on purpose: that is a try more than else, never a guest more.
"""

from collections.abc import Collection

import msgspec

from carrel.core.pacing import backoff_s
from carrel.model.job import JobKey
from carrel.model.pool import Look


class Recalled(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was held again."""

    times: int
    until_s: float
    """It rests so long."""
    why: str


class Patience:
    """Who waits for Slurm, who rests after that, and who was given his nodes in vain too often."""

    def __init__(self, *, attempts: int, rest_s: float, rest_max_s: float) -> None:
        """Remember nothing yet.

        Args:
            attempts: A job that did not start on its nodes so often is not tried again.
            rest_s: So long rests a run that was recalled; twice as long after each further time.
            rest_max_s: But no longer.
        """
        self._attempts = attempts
        self._rest_s = rest_s
        self._rest_max_s = max(rest_s, rest_max_s)
        self.ready_since_s: dict[JobKey, float] = {}
        """Since when released runs were seen to have all that they need."""
        self._recalled: dict[JobKey, Recalled] = {}
        self._given_back: dict[int, set[JobKey]] = {}

    def see(self, look: Look, released: Collection[JobKey], now_s: float) -> None:
        """Take note of who may start now; forget who runs, or is gone."""
        self.ready_since_s = {run: self.ready_since_s.get(run, now_s) for run in released}
        waiting = {job.key for job in look.jobs if job.job.state in {"held", "pending"}}
        self._recalled = {run: what for run, what in self._recalled.items() if run in waiting}
        started = {job.key.job_id for job in look.jobs if job.job.slurm_state == "RUNNING" and not job.starting}
        alive = {job.key.job_id for job in look.jobs if job.alive} - started
        self._given_back = {job_id: runs for job_id, runs in self._given_back.items() if job_id in alive}

    def recall(self, run: JobKey, why: str, now_s: float) -> str:
        """Let a run rest that Slurm did not start; return the sentence for its owner."""
        times = self._recalled[run].times + 1 if run in self._recalled else 1
        rest_s = backoff_s(times, first_s=self._rest_s, most_s=self._rest_max_s)
        said = f"{why}; its guests begin anew in {rest_s:g} s"
        self._recalled[run] = Recalled(times=times, until_s=now_s + rest_s, why=said)
        return said

    def resting(self, now_s: float) -> dict[JobKey, str]:
        """Return the runs that rest, and why."""
        return {run: what.why for run, what in self._recalled.items() if what.until_s > now_s}

    def give_back(self, run: JobKey) -> None:
        """Note that a run had its nodes and did not start on them."""
        self._given_back.setdefault(run.job_id, set()).add(run)

    def never_started(self, look: Look) -> dict[JobKey, str]:
        """Return the runs whose job had its nodes so often, and did not start on them, that it is not tried again."""
        said = f"it had its nodes {self._attempts} times and did not start on them; see the log of slurmctld"
        return {
            job.key: said
            for job in look.jobs
            if len(self._given_back.get(job.key.job_id, set()) - {job.key}) >= self._attempts
        }
