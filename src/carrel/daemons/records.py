"""Two small facts that carreld keeps on disk, since nobody else has them: what a job asked for, and who is inside.

``jobs/<job id>`` is also what ``spank_carrel.so`` looks for: where it exists, no task of the job runs bare, whatever
the user did to the environment.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec

from carrel.model.guest import GuestRequest
from carrel.process import Pid, process_state


class JobRequests:
    """What each job of this node asked for, as the prolog told it."""

    def __init__(self, directory: Path) -> None:
        """Keep them in ``directory``."""
        self._directory = directory
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)

    def put(self, job_id: int, request: GuestRequest) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix=".")
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(request))
        Path(temporary).replace(self._directory / str(job_id))

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
