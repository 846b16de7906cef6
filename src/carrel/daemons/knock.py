"""A file that ``job_submit.lua`` opens when it has taken a job whose guest is a node: carrelctld sees that, and looks.

The Lua runs in slurmctld, under its locks, so it may neither wait nor fail. To open a file that may be there takes it
some microseconds; it needs no right to write, and leaves nothing behind. Whoever else opens the file causes a look at
Slurm's queue. A knock that nobody hears makes a job begin later, by the time between two looks.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_IN_OPEN = 0x20
"""Of ``inotify(7)``, for which Python's library has no words."""
_EVENTS_BYTES = 4096


class Knock:
    """The file, and who listens."""

    def __init__(self, path: Path, heard: Callable[[], None]) -> None:
        """Touch nothing yet.

        Args:
            path: The file, on a disk of this machine.
            heard: Called after one or more have knocked.
        """
        self._path = path
        self._heard = heard
        self._fd = -1

    def begin(self) -> None:
        """Listen. The file stays when we end: the next one listens at the same.

        Raises:
            OSError: there is no such place, or the kernel watches nothing more for this user.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(PermissionError):  # it is there, from when we ran as somebody else
            os.fchmod(fd, 0o644)  # whatever our umask: slurmctld may run as another user
        os.close(fd)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(self._path), _IN_OPEN) < 0:
            code = ctypes.get_errno()
            self.end()
            raise OSError(code, os.strerror(code), str(self._path))
        asyncio.get_running_loop().add_reader(self._fd, self._take)

    def end(self) -> None:
        """Listen no more; a second time changes nothing."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, _EVENTS_BYTES)  # once: who opens it without end shall not have all of this process
        self._heard()
