"""Files and directories that appear whole or not at all, in a store that many processes read without a lock."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from carrel.errors import RefusedError

MIB = 2**20


def write(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, readable by all. A second call, also a concurrent one, replaces it whole.

    Raises:
        RefusedError: the store cannot be written by this user, or is full.
    """
    with as_sentence(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        with contextlib.suppress(OSError) if path.is_dir() else as_sentence(path.parent):
            temporary.rename(path)
    finally:
        remove_tree(temporary)


def remove_tree(path: Path) -> None:
    """Remove a directory with all below it, also directories that a package made read-only. Absent is fine."""
    if not path.exists():
        return
    for parent, names, _ in os.walk(path):
        for name in names:
            below = Path(parent, name)
            if not below.is_symlink():
                with contextlib.suppress(PermissionError):
                    below.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def require_space(
    store: Path, needed_bytes: int, *, what: str, hint: str = "carrel image remove, images.store"
) -> None:
    """Refuse before anything is written when the store's file system cannot hold it; ``hint`` is what to see.

    Raises:
        RefusedError: less than ``needed_bytes`` are free.
    """
    exists = next(path for path in (store, *store.parents) if path.exists())
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
        raise RefusedError(
            f"image store {store}: {error.strerror}; run this as its owner, or name another in images.store"
        ) from error
