"""Removing old samples, below directories that belong to users who may be moving things about meanwhile."""

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from carrel.config import Metrics
from carrel.core.retention import Kept, doomed

_DAY_S = 86400.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prune(settings: Metrics, *, now_s: float | None = None) -> tuple[Path, ...]:
    """Remove what the settings say and return what was removed. A second call, also at the same time, is fine."""
    root = Path(settings.root)
    chosen = doomed(
        kept(root),
        now_s=time.time() if now_s is None else now_s,
        keep_s=settings.keep_days * _DAY_S,
        user_bytes_max=settings.user_bytes_max,
    )
    removed: list[Path] = []
    for one in chosen:
        with contextlib.suppress(OSError):  # its owner may have removed it just now
            users = os.open(root / one.user, _DIRECTORY)
            try:
                # Follows no link, whatever is put in its way.
                shutil.rmtree(one.name, dir_fd=users)
            finally:
                os.close(users)
            removed.append(root / one.user / one.name)
    return tuple(removed)


def kept(root: Path) -> list[Kept]:
    """Return all directories of jobs. What is neither ours nor readable is left out."""
    found: list[Kept] = []
    for user in _names(root):
        for name in _names(root / user):
            with contextlib.suppress(OSError):
                found.append(_seen(root, user, name))
    return found


def _names(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(
                one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")
            )
    except OSError:
        return []


def _seen(root: Path, user: str, name: str) -> Kept:
    size_bytes, ended_s, finished = 0, 0.0, True
    descriptor = os.open(root / user / name, _DIRECTORY)
    try:
        for entry in os.listdir(descriptor):  # noqa: PTH208  # a descriptor has no iterdir
            about = os.stat(entry, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISREG(about.st_mode):
                size_bytes += about.st_blocks * 512
                ended_s = max(ended_s, about.st_mtime)
            finished = finished and not entry.endswith(".seg")
        ended_s = ended_s or os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
    return Kept(user=user, name=name, ended_s=ended_s, size_bytes=size_bytes, finished=finished)
