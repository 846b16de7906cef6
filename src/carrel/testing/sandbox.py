"""Fixtures: a real Slurm, with guests or without, and an ordinary user. Tests of Carrel and of plug-ins share them.

What is missing on a machine (no slurmd, not root, C parts not built) skips a test with the reason.
When a test fails, the logs of the sandboxes that live then stand in its report.
"""

import fcntl
import glob
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from typing import IO, Any

import msgspec
import pytest

from carrel import paths
from carrel.process import run
from carrel.sandbox.cluster import Sandbox

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
_LOG_TAIL_BYTES = 6000
_LOGS = ("log/*", "nodes/*/guests/*/console.log", "nodes/*/guests/*/guard.log")
_USER = "carreltest"
_GROUP = "carreltesters"
_USER_MARK = "made for the tests of carrel"
_USER_ATTEMPTS = 10
_USER_LOCK = Path("/run/lock/carreltest.lock")

MakeSandbox = Callable[..., Sandbox]

_living: list[Sandbox] = []


class User(msgspec.Struct, frozen=True):
    """An ordinary Unix user."""

    name: str
    uid: int
    gid: int
    home: Path


@pytest.fixture(scope="session")
def sandbox_factory() -> Iterator[MakeSandbox]:
    """Make sandboxes, up and running, with the arguments of ``Sandbox``; all end with the session.

    ``down()`` of one may be called earlier.
    """
    made: list[Sandbox] = []

    def make(**arguments: Any) -> Sandbox:
        if reason := _missing(arguments):
            pytest.skip(reason)
        box = Sandbox(**arguments)
        box.up()
        made.append(box)
        _living.append(box)
        return box

    yield make
    for box in made:
        _end(box)


@pytest.fixture(scope="module")
def slurm(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Three nodes of plain Slurm, for all tests of a module."""
    box = sandbox_factory(guests=False)
    yield box
    _end(box)


@pytest.fixture(scope="module")
def sandbox(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Three nodes that can carry guests, for all tests of a module."""
    box = sandbox_factory()
    yield box
    _end(box)


@pytest.fixture(scope="session")
def user() -> Iterator[User]:
    """Name an ordinary user, ``carreltest``, with a home and a second group; made here if absent.

    Whoever was made here is removed by the last session that uses it.

    Test sessions that run at the same time share it, by a lock.
    """
    if os.getuid() != 0:
        pytest.skip("needs root: to make an ordinary user and to act as one")
    with _USER_LOCK.open("a") as lock:
        _share_user(lock)
        who = pwd.getpwnam(_USER)
        yield User(who.pw_name, who.pw_uid, who.pw_gid, Path(who.pw_dir))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another session still uses it
        if _USER_MARK in who.pw_gecos:
            # Also where a job of a failed test still runs as this user: it ends with its sandbox, which may end later.
            run(["userdel", "--force", "--remove", _USER])
            run(["groupdel", _GROUP])


def _share_user(lock: IO[str]) -> None:
    """Make the user if absent; return with a shared lock held while it exists."""
    for _ in range(_USER_ATTEMPTS):
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _exists(_USER):
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _exists(_USER):
            run(["groupadd", "--force", _GROUP])
            run(
                ["useradd", "--create-home", "--comment", _USER_MARK, "--groups", _GROUP, "--shell", "/bin/bash", _USER]
            )
    raise AssertionError(f"user {_USER} vanished {_USER_ATTEMPTS} times while it was made")


def logs_of_living_sandboxes() -> Iterator[tuple[str, str]]:
    """Yield a heading and the end of each log that is not empty."""
    for box in _living:
        for pattern in _LOGS:
            # Path.glob fails where a directory goes while it is looked through, and would take the report with it.
            for found in sorted(glob.glob(pattern, root_dir=box.dir)):  # noqa: PTH207  # see above
                if text := _tail(box.dir / found):
                    yield f"sandbox {found}", text


def _end(box: Sandbox) -> None:
    if box in _living:
        _living.remove(box)
    box.down()


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _missing(arguments: dict[str, Any]) -> str:
    """Return why this machine cannot have such a sandbox, or an empty string."""
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if absent := [name for name in _PROGRAMS if shutil.which(name, path=search) is None]:
        return f"not installed: {', '.join(absent)}"
    if not arguments.get("guests", True):
        return ""
    if os.getuid() != 0:
        return "guests need root: carreld runs guests as other users"
    if not (paths.libexec() / "spank_carrel.so").exists():
        return f"{paths.libexec()}: no spank_carrel.so; see: make native"
    return ""


def let_enter(path: Path) -> None:
    """Let everybody enter a test's directory, and those above it as far as they are the tests' own."""
    for directory in takewhile(lambda above: above != Path(gettempdir()), (path, *path.parents)):
        directory.chmod(directory.stat().st_mode | 0o111)
