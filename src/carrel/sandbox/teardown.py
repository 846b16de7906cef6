"""What is left when all processes are gone: mounts, cgroups, files. Found by looking; only ours is touched."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from carrel.errors import CarrelError
from carrel.process import CommandError, run

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_TIMEOUT_S = 10.0
_CGROUP_POLL_S = 0.02


def mounts_below(root: Path) -> list[str]:
    """Return the mount points below ``root``, the innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(f"{root}/"):
            found.append(point)
    return found[::-1]


def unmount(root: Path) -> None:
    """Unmount all below ``root``, lazily: a process that still has a file open must not keep the rest."""
    for point in mounts_below(root):
        run(["umount", "--lazy", point])


def thaw(nodes: Iterable[str]) -> None:
    """Let go of suspended jobs: a frozen process dies of no signal before it is thawed."""
    for node in nodes:
        for directory, _, files in os.walk(_CGROUPS / "freezer" / f"slurm_{node}"):
            if "freezer.state" in files:
                with contextlib.suppress(FileNotFoundError):  # its step has just ended
                    Path(directory, "freezer.state").write_text("THAWED")


def remove_cgroups(nodes: Iterable[str]) -> None:
    """Remove the empty cgroups that slurmd leaves behind for each node; one that is in use stays.

    The kernel lets go of a dead process a moment after it was reaped, so that is waited for, bounded.
    """
    deadline = time.monotonic() + _CGROUP_TIMEOUT_S
    tops = [top for node in nodes for top in _CGROUPS.glob(f"*/slurm_{node}")]
    while (tops := [top for top in tops if not _remove_tree(top)]) and time.monotonic() < deadline:
        time.sleep(_CGROUP_POLL_S)


def _remove_tree(top: Path) -> bool:
    try:
        for directory, _, _ in os.walk(top, topdown=False):
            Path(directory).rmdir()
    except OSError:
        return False
    return True


def remove_directory(root: Path, *, keep_itself: bool) -> None:
    """Delete the sandbox's files.

    Raises:
        CarrelError: something is still mounted there: its files may be the user's own, so nothing is deleted.
    """
    if left := mounts_below(root):
        raise CarrelError(f"{root}: kept, since {left[0]} is still mounted; see: umount --lazy {left[0]}")
    if keep_itself:
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        shutil.rmtree(root)


def unmount_or_say(root: Path) -> str:
    """Unmount, and return why not all of it could be, or an empty string."""
    try:
        unmount(root)
    except CommandError as error:
        return str(error)
    return ""
