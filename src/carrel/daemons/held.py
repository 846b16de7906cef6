"""Control groups that are kept before anybody has said whose they are.

A job of a second may be over before a busy Slurm has told its submit time, and without that its run has no name. Its
groups, and so its totals, are kept from the moment when its first task is seen; the rest can come late.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path

import msgspec

from carrel.sampling import cgroup
from carrel.sampling.cgroup import JobGroups


class HeldGroups:
    """By job id; each is a file too, so that a killed carreld leaves no group behind for ever."""

    def __init__(self, directory: Path) -> None:
        """Find what an earlier carreld kept."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held: dict[int, JobGroups] = {}
        for path in directory.iterdir():
            with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
                self._held[int(path.name)] = msgspec.json.decode(path.read_bytes(), type=JobGroups)

    def hold(self, job_id: int, groups: JobGroups) -> None:
        """Keep the groups of a job; those of a second call are added."""
        known = self._held.get(job_id, JobGroups())
        whole = known.joined(groups)
        if whole.any and whole != known:
            self._held[job_id] = whole
            with contextlib.suppress(OSError):  # a full disk costs no more than what the next carreld does not know
                (self._directory / str(job_id)).write_bytes(msgspec.json.encode(whole))
            cgroup.hold(whole)

    def of(self, job_id: int) -> JobGroups:
        """Return what is kept of a job; it may be nothing."""
        return self._held.get(job_id, JobGroups())

    def hand_over(self, job_id: int) -> None:
        """Forget what a sampler keeps from now on."""
        if self._held.pop(job_id, None) is not None:
            (self._directory / str(job_id)).unlink(missing_ok=True)

    def release(self, wanted: Collection[int]) -> None:
        """Let go of all but these. May take a moment."""
        for job_id in self._held.keys() - wanted:
            cgroup.release(self._held[job_id])
            self.hand_over(job_id)
