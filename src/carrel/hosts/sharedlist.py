"""Addresses from a list that other programs share: a file of lines ``ADDRESS;JOB;USED``.

Its title is ``#IP;SLURM_JOB_ID;USED``; a free line is ``ADDRESS;;``. The file is replaced as a whole, so whoever reads
it without a lock sees one state or the next. Whoever changes it locks ``FILE.lock`` (``flock``): the list itself is
another file after each change. Lines that are not understood stay as they are, and so does a line that is used and
names no job: a person put it there.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from carrel.errors import UnreachableError

LOCK_TIMEOUT_S = 30.0
_LOCK_PERIOD_S = 0.02
_USED = "USED"


class _Line(msgspec.Struct, frozen=True):
    text: str
    address: str = ""
    """Empty: nothing to give away, a comment or what somebody else wrote."""
    job_id: int = 0
    free: bool = False


class SharedList:
    """The file, for processes and hosts at once. It is one cluster's: it names jobs by their number alone."""

    def __init__(self, path: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Open nothing yet."""
        self._path = path
        self._lock_timeout_s = lock_timeout_s

    def take(self, job_id: int, count: int) -> tuple[str, ...] | None:
        """Return so many addresses that are the job's; those it has already are among them. None: too few are free.

        Raises:
            UnreachableError: the list cannot be read or written, or is locked for too long; ask again.
        """
        with self._locked():
            lines = self._read()
            mine = [line.address for line in lines if line.job_id == job_id and line.address]
            wanted = [line.address for line in lines if line.free][: max(count - len(mine), 0)]
            if len(mine) + len(wanted) < count:
                return None
            if wanted:
                self._write([_taken(line, job_id) if line.free and line.address in wanted else line for line in lines])
            return (*mine, *wanted)[:count]

    def jobs(self) -> set[int]:
        """Return the jobs that have addresses; ask Slurm about them after this, and free those that it does not know.

        In that order no job can be missed: one whose line is here was known to Slurm before.
        """
        return {line.job_id for line in self._read() if line.job_id}

    def free(self, jobs: Collection[int]) -> None:
        """Return all addresses of these jobs; they may have none."""
        with self._locked():
            lines = self._read()
            if any(line.job_id in jobs for line in lines if line.job_id):
                self._write([_freed(line) if line.job_id and line.job_id in jobs else line for line in lines])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UnreachableError(f"{self._path}.lock: {error.strerror}; can this user write there?") from error
        try:
            self._wait(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        until_s = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise UnreachableError(
                        f"{self._path}.lock: locked by somebody else for {self._lock_timeout_s:g} s; see: lslocks"
                    ) from None
                time.sleep(_LOCK_PERIOD_S)
            else:
                return

    def _read(self) -> list[_Line]:
        try:
            return [_line(text) for text in self._path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UnreachableError(f"{self._path}: {error}; is it the list of addresses?") from error

    def _write(self, lines: list[_Line]) -> None:
        try:
            was = self._path.stat()
            # Whoever holds the lock has this name alone, and what a killed one left is overwritten.
            new = self._path.with_name(f".{self._path.name}.new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o600), "w") as file:
                file.write("".join(f"{line.text}\n" for line in lines))
                os.fchmod(file.fileno(), was.st_mode & 0o7777)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            raise UnreachableError(f"{self._path}: {error.strerror}; is the disk full, or not writable?") from error


def _line(text: str) -> _Line:
    fields = [field.strip() for field in text.split(";")]
    if text.lstrip().startswith("#") or len(fields) != 3 or not fields[0]:
        return _Line(text)
    address, job, used = fields
    if not job and not used:
        return _Line(text, address, free=True)
    return _Line(text, address, int(job)) if job.isascii() and job.isdigit() else _Line(text)


def _taken(line: _Line, job_id: int) -> _Line:
    return _Line(f"{line.address};{job_id};{_USED}", line.address, job_id)


def _freed(line: _Line) -> _Line:
    return _Line(f"{line.address};;", line.address, free=True)
