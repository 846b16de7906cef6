"""Small facts that carreld keeps on disk, as nobody else has them: what was asked for, who is inside, what is sampled.

``jobs/<job id>`` is also what ``spank_carrel.so`` looks for: where it exists, no task of the job runs bare, whatever
the user did to the environment.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec

from carrel.model.guest import GuestRequest
from carrel.model.job import Job
from carrel.model.sample import OnGuestNode, Series
from carrel.process import Pid, process_state
from carrel.sampling.cgroup import JobGroups


class JobRequests:
    """What each job of this node asked for, as the prolog told it."""

    def __init__(self, directory: Path) -> None:
        """Keep them in ``directory``."""
        self._directory = directory
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)

    def put(self, job_id: int, request: GuestRequest) -> None:
        _write(self._directory / str(job_id), request)

    def get(self, job_id: int) -> GuestRequest | None:
        try:
            return msgspec.json.decode((self._directory / str(job_id)).read_bytes(), type=GuestRequest)
        except (OSError, msgspec.DecodeError):
            return None

    def remove(self, job_id: int) -> None:
        (self._directory / str(job_id)).unlink(missing_ok=True)

    def all(self) -> list[int]:
        return [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]


class Inside:
    """The tasks inside each guest: a file per ``carrel-enter``, so that a later carreld knows them too."""

    def __init__(self, directory: Path) -> None:
        """Keep them in ``directory``."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, guest: str, pid: int) -> None:
        state = process_state(pid)
        if state:
            (self._directory / guest).mkdir(exist_ok=True)
            (self._directory / guest / str(pid)).write_text(str(state[1]))

    def remove(self, guest: str, pid: int) -> None:
        (self._directory / guest / str(pid)).unlink(missing_ok=True)

    def forget(self, guest: str) -> None:
        """Remove all of a guest that is gone."""
        with contextlib.suppress(OSError):
            for file in list((self._directory / guest).iterdir()):
                file.unlink(missing_ok=True)
            (self._directory / guest).rmdir()

    def living(self, guest: str) -> list[Pid]:
        """Return the tasks that are inside; files of the dead are removed on the way."""
        found = []
        with contextlib.suppress(OSError):
            for file in list((self._directory / guest).iterdir()):
                with contextlib.suppress(OSError, ValueError):
                    task = Pid(int(file.name), int(file.read_text()))
                    if task.alive:
                        found.append(task)
                    else:
                        file.unlink(missing_ok=True)
        return found

    def guests(self) -> list[str]:
        return [path.name for path in self._directory.iterdir()]


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """A run whose samples are not finished yet."""

    job: Job
    node: str = ""
    """The guest that is the job's node here; empty: this node itself."""
    groups: JobGroups = JobGroups()
    """Where it is counted; its processes may all be gone when the next carreld wants to know."""
    interval_s: float | None = None
    """Chosen for this run; None: the site's."""
    report: bool = False
    """What it used is to be printed at the end of its output file."""
    ended: bool = False
    """Only its tables are still to be made."""

    @property
    def series(self) -> Series:
        return OnGuestNode(self.job.key, self.node) if self.node else self.job.key


class SampledJobs:
    """A file per run that is being sampled."""

    def __init__(self, directory: Path) -> None:
        """Keep them in ``directory``."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, sampled: Sampled) -> None:
        """Keep it; a full disk costs no more than what the next carreld does not know."""
        with contextlib.suppress(OSError):
            _write(self._directory / str(sampled.series), sampled)

    def remove(self, series: Series) -> None:
        (self._directory / str(series)).unlink(missing_ok=True)

    def all(self) -> list[Sampled]:
        found = []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Sampled))
        return found


def _write(path: Path, value: object) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(value))
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
