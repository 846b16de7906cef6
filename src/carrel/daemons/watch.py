"""Waking up when something appears in a directory: what a poll would find late, at no cost while nothing happens.

It is a hint like any other: whoever waits for it looks around from time to time too.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from carrel.errors import CarrelError

_CREATE, _DELETE, _MOVED_TO = 0x100, 0x200, 0x80
_READ_BYTES = 1 << 16


class DirectoryWatch:
    """Calls back, in the event loop, after names came to or went from the directories that it was given."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Watch nothing yet.

        Raises:
            CarrelError: the kernel allows no more watches.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._changed = changed
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            why = os.strerror(ctypes.get_errno())
            raise CarrelError(f"inotify: {why}; see: sysctl fs.inotify.max_user_instances")
        asyncio.get_running_loop().add_reader(self._descriptor, self._read)

    def add(self, directory: Path) -> bool:
        """Watch a directory too; a second call changes nothing. False: it is not there."""
        words = (self._descriptor, os.fsencode(directory), _CREATE | _DELETE | _MOVED_TO)
        return bool(self._libc.inotify_add_watch(*words) >= 0)

    def _read(self) -> None:
        os.read(self._descriptor, _READ_BYTES)  # what happened does not matter: who is called looks
        self._changed()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
