"""Whose child is whose, read from /proc: the exact list of what a sandbox must end, never a name or a pattern."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_STATE, _PARENT = 0, 1


def living(root: int) -> set[int]:
    """Return all living descendants of ``root``; zombies are dead."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)):
            parents[int(entry.name)] = stat
    found: set[int] = set()
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return {pid for pid in found if alive(pid)}


def alive(pid: int) -> bool:
    """Tell whether ``pid`` exists and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[_STATE] not in {"Z", "X"}


def with_variable(name: str, value: str) -> set[int]:
    """Return the processes that were started with ``name=value``, as far as we may look, without ourselves."""
    wanted = f"{name}={value}".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables:
            found.add(int(entry.name))
    return {pid for pid in found if alive(pid)}


def has_variable(pid: int, name: str) -> bool:
    """Tell whether ``pid`` was started with the variable, as far as we may look."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(f"{name}=".encode()) for variable in variables)


def with_open_file(command: str, below: Path) -> set[int]:
    """Return the processes of this command name that have a file below ``below`` open."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == command:
                found |= {int(entry.name)} if any(path.startswith(f"{below}/") for path in _opened(entry)) else set()
        except OSError:
            continue
    return {pid for pid in found if alive(pid)}


def _opened(entry: Path) -> Iterator[str]:
    """Yield what a process has open; what it closes meanwhile hides nothing else."""
    for link in (entry / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield str(link.readlink())


def _stat(entry: Path) -> int | None:
    """Return the parent. A command's name may contain a parenthesis, so the fields start after the last one."""
    try:
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[_PARENT])
    except (OSError, IndexError, ValueError):
        return None
