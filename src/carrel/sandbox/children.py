"""The daemons of a sandbox as children of its harness: started by name, waited for by fact, ended by pid."""

import ctypes
import os
import signal
import socket
import subprocess  # daemons outlive the call that starts them, carrel.process ends with its command
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from carrel.errors import CarrelError, NotFoundError
from carrel.sandbox import descendants
from carrel.sandbox.spec import Daemon

POLL_S = 0.01
KILL_TIMEOUT_S = 60.0
KILL_ROUNDS = 500
KILL_ROUND_S = 0.02
"""On a busy machine a killed guest takes seconds until it has given its memory back."""
_TAIL_LINES = 6
_PR_SET_CHILD_SUBREAPER = 36


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How a daemon is started."""

    name: str
    command: tuple[str, ...]
    log: Path
    """Takes its standard output and error, and is quoted when it fails."""
    ready: Callable[[], bool]
    env: Mapping[str, str] = msgspec.field(default_factory=dict)


def become_subreaper() -> None:
    """Adopt orphaned descendants: slurmstepd forks twice and would else be a stranger's child."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise CarrelError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


class Children:
    """Keeps daemons by name. Single-threaded: nobody else may wait for processes while it reaps."""

    def __init__(self, interrupted: Callable[[], None]) -> None:
        """``interrupted`` is called while waiting; it raises when the wait is no longer wanted."""
        self._interrupted = interrupted
        self._recipes: dict[str, Recipe] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, str] = {}

    def spawn(self, recipe: Recipe) -> None:
        """Start a daemon and do not wait for it. One that runs already is left alone."""
        self.reap()
        self._recipes[recipe.name] = recipe
        if recipe.name in self._running:
            return
        with recipe.log.open("ab") as log:
            self._running[recipe.name] = subprocess.Popen(
                recipe.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **recipe.env},
                cwd="/",
                start_new_session=True,
            )
        self._ended.pop(recipe.name, None)

    def wait_ready(self, name: str, *, timeout_s: float) -> None:
        """Wait until the daemon serves.

        Raises:
            CarrelError: it ended, or does not serve in time; the sentence quotes the end of its log.
        """
        recipe = self._recipe(name)
        deadline = time.monotonic() + timeout_s
        while not recipe.ready():
            self._interrupted()
            self.reap()
            if name not in self._running:
                raise CarrelError(f"{name} {self._ended.get(name, 'ended')} before it was ready; {self._tail(recipe)}")
            if time.monotonic() > deadline:
                raise CarrelError(f"{name} not ready after {timeout_s:g} s; {self._tail(recipe)}")
            time.sleep(POLL_S)

    def recipe(self, name: str) -> Recipe:
        return self._recipe(name)

    def kill(self, name: str, number: int) -> None:
        """Send a signal; when it is one that ends, return only after the daemon is gone.

        Raises:
            NotFoundError: no such daemon, or it does not run.
        """
        self._recipe(name)
        self.reap()
        if (child := self._running.get(name)) is None:
            raise NotFoundError(f"{name} does not run: {self._ended.get(name, 'never started')}")
        os.kill(child.pid, number)
        if number in {signal.SIGKILL, signal.SIGTERM}:
            self._wait_gone({name}, timeout_s=KILL_TIMEOUT_S)

    def terminate(self, names: Sequence[str], *, timeout_s: float) -> None:
        """End daemons as gently as they let us: SIGTERM, and SIGKILL for those that do not end in time."""
        self.reap()
        pids = {name: self._running[name].pid for name in names if name in self._running}
        for pid in pids.values():
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # a test may have stopped it
        self._wait_gone(pids, timeout_s=timeout_s)
        for name in pids:
            if name in self._running:
                os.kill(self._running[name].pid, signal.SIGKILL)
        self._wait_gone(pids, timeout_s=timeout_s)

    def kill_descendants(self, *, spare: Collection[str]) -> None:
        """Kill all that lives below this process, jobs and guests included, but for the daemons in ``spare``."""
        kept = {self._running[name].pid for name in spare if name in self._running}
        for _ in range(KILL_ROUNDS):
            self.reap()
            if not (left := descendants.living(os.getpid()) - kept):
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(KILL_ROUND_S)

    def reap(self) -> None:
        """Collect all that ended: ours, and orphans that we adopted."""
        names = {child.pid: name for name, child in self._running.items()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if name := names.get(pid):
                child = self._running.pop(name)
                child.returncode = os.waitstatus_to_exitcode(status)
                self._ended[name] = _how(child.returncode)

    def daemons(self) -> tuple[Daemon, ...]:
        self.reap()
        return tuple(
            Daemon(
                name=name,
                pid=self._running[name].pid if name in self._running else 0,
                ended=self._ended.get(name, ""),
            )
            for name in self._recipes
        )

    def _recipe(self, name: str) -> Recipe:
        if recipe := self._recipes.get(name):
            return recipe
        raise NotFoundError(f"no daemon {name} in this sandbox; known: {', '.join(self._recipes)}")

    def _wait_gone(self, names: Collection[str], *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._running.keys() & set(names) and time.monotonic() < deadline:
            self.reap()
            time.sleep(POLL_S / 2)

    @staticmethod
    def _tail(recipe: Recipe) -> str:
        lines = recipe.log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        said = " | ".join(line.strip() for line in lines) or "(it said nothing)"
        return f"it said: {said}"


def listens(path: Path) -> Callable[[], bool]:
    """Return a check that a unix socket accepts."""

    def check() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            return sock.connect_ex(str(path)) == 0

    return check


def accepts(address: str, port: int) -> Callable[[], bool]:
    """Return a check that a TCP port accepts."""

    def check() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(1.0)
            return sock.connect_ex((address, port)) == 0

    return check


def _how(status: int) -> str:
    return f"exited with {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
