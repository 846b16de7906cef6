"""A guest's console, kept bounded: a guest may print for ever."""

import contextlib
import os
from pathlib import Path

TAIL_BYTES = 16 * 1024


def bound(path: Path, limit_bytes: int) -> None:
    """Keep the last half of a console that grew beyond its bound. Its writer appends, so it goes on where we cut."""
    with contextlib.suppress(OSError):
        if path.stat().st_size <= limit_bytes:
            return
        with path.open("rb+") as file, path.open("ab") as appended:
            file.seek(-(limit_bytes // 2), os.SEEK_END)
            tail = file.read(limit_bytes)
            file.truncate(0)
            appended.write(tail)


def tail(path: Path) -> str:
    """Return the last of a console; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
