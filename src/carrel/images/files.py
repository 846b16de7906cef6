"""Files and directories that appear whole or not at all, in a store that many processes read without a lock."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from carrel.errors import RefusedError

MIB = 2**20
_ABANDONED_AFTER_S = 86400.0


def write(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, readable by all. A second call, also a concurrent one, replaces it whole.

    Raises:
        RefusedError: the store cannot be written by this user, or is full.
    """
    with as_sentence(path.parent):
        make_public(path.parent)
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` at the end; it vanishes on failure and on Ctrl-C.

    Where another process made ``path`` meanwhile, that one stays: both hold the same, being named by content.

    Raises:
        RefusedError: the store cannot be written by this user, or is full.
    """
    with as_sentence(path.parent):
        make_public(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        with as_sentence(path.parent):
            try:
                temporary.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
    finally:
        remove_tree(temporary)


def sync(path: Path) -> None:
    """Have a file on disk before its name says that it is whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_public(path: Path) -> None:
    """Make a directory, with those above it, that all users can read: guests run as the users of jobs."""
    for directory in reversed((path, *path.parents)):
        if not directory.exists():
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)


def sweep(directory: Path) -> None:
    """Remove what processes that were killed had begun in ``directory``, a day after."""
    for path in (*directory.glob(".new-*"), *directory.glob(".gone-*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime < _ABANDONED_AFTER_S:
                continue
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory with all below it, also directories that a package made read-only. Absent is fine."""
    if not path.exists():
        return
    for parent, names, _ in os.walk(path):
        for name in names:
            below = Path(parent, name)
            if not below.is_symlink():
                with contextlib.suppress(PermissionError, FileNotFoundError):  # another process removes it too
                    below.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def require_space(
    store: Path, needed_bytes: int, *, what: str, hint: str = "carrel image remove, images.store"
) -> None:
    """Refuse before anything is written when the store's file system cannot hold it; ``hint`` is what to see.

    Raises:
        RefusedError: less than ``needed_bytes`` are free, or this user may not write.
    """
    exists = next(path for path in (store, *store.parents) if path.exists())
    if not os.access(exists, os.W_OK):
        raise RefusedError(f"{store}: not writable by you; run this as its owner, or name another in images.store")
    free_bytes = shutil.disk_usage(exists).free
    if free_bytes < needed_bytes:
        raise RefusedError(
            f"{store}: {free_bytes // MIB} MiB free, {what} needs about {needed_bytes // MIB} MiB; see: {hint}"
        )


@contextlib.contextmanager
def as_sentence(store: Path) -> Iterator[None]:
    """Let a failure to write the store be a sentence.

    Raises:
        RefusedError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        hint = "see: carrel image remove, carrel image prune" if full else "run this as its owner"
        raise RefusedError(f"image store {store}: {error.strerror}; {hint}, or name another in images.store") from error
