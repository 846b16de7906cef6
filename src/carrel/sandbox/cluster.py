"""``Sandbox``: a real Slurm for the length of a ``with``, and ``Remote``: one that is up already.

::

    with Sandbox(nodes=3) as box:
        done = box.run(["srun", "-N3", "hostname"])
"""

import contextlib
import glob
import os
import pwd
import secrets
import select
import shutil
import signal as signals
import socket
import subprocess  # carrel.process raises on a status other than 0; a test wants to see it
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import msgspec

from carrel.errors import CarrelError, NotFoundError
from carrel.sandbox import netns as network
from carrel.sandbox.layout import Layout
from carrel.sandbox.spec import Ask, Facts, Spec, Tell
from carrel.sandbox.sweep import sweep

_ASK_TIMEOUT_S = 90.0
"""Longer than the harness waits for a daemon, or its sentence would not be heard."""
STOP_TIMEOUT_S = 90.0


class Remote:
    """A sandbox that is up, reached through its directory; another process may have started it."""

    def __init__(self, root: Path) -> None:
        """Take its directory; see ``facts`` for whether it lives."""
        self.dir = root
        self.layout = Layout(root)

    @property
    def env(self) -> dict[str, str]:
        """Variables, to be added to the environment of whoever wants to use the cluster."""
        return self.layout.environment()

    def facts(self) -> Facts:
        """Return what the sandbox is now.

        Raises:
            NotFoundError: there is none in this directory.
        """
        return self.ask(Ask(do="status"))

    def ask(self, ask: Ask) -> Facts:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ASK_TIMEOUT_S)
            try:
                sock.connect(str(self.layout.harness_socket))
            except OSError as error:
                raise NotFoundError(f"no sandbox in {self.dir}; see: carrel sandbox up --dir {self.dir}") from error
            sock.sendall(msgspec.json.encode(ask) + b"\n")
            answer = msgspec.json.decode(sock.makefile("rb").readline(), type=Tell)
        if answer.facts is None:
            raise _error(answer.error, answer.exit_code)
        return answer.facts

    def pid(self, name: str) -> int:
        """Return the process of a daemon; 0: it does not run."""
        for daemon in self.facts().daemons:
            if daemon.name == name:
                return daemon.pid
        raise NotFoundError(f"no daemon {name} in {self.dir}")

    def kill(self, name: str, signal: int = signals.SIGKILL) -> None:
        """Send a signal; after SIGKILL and SIGTERM return only when the daemon is gone."""
        self.ask(Ask(do="kill", name=name, signal=signal))

    def start(self, name: str) -> None:
        """Start a daemon again and wait until it serves; one that runs is left alone."""
        self.ask(Ask(do="start", name=name))

    def restart(self, name: str, signal: int = signals.SIGTERM) -> None:
        """End a daemon with ``signal`` and start it again."""
        self.kill(name, signal)
        self.start(name)

    def down(self) -> None:
        """End everything and delete the directory, also when the harness was killed; return when it is gone.

        Raises:
            NotFoundError: there is no sandbox in this directory.
        """
        try:
            handle = os.pidfd_open(self.facts().pid)
        except NotFoundError:
            sweep(self.dir)
            return
        try:
            self.ask(Ask(do="stop"))
            if not select.select([handle], [], [], STOP_TIMEOUT_S)[0]:
                raise CarrelError(f"sandbox in {self.dir} not gone after {STOP_TIMEOUT_S:g} s; see {self.layout.log}")
        finally:
            os.close(handle)

    def command(self, words: Sequence[str | Path], *, netns: str, user: str | None = None) -> list[str]:
        """Return ``words`` as they must be started to run as ``user`` in the cluster's network."""
        found = [str(word) for word in words]
        if user is not None and user != pwd.getpwuid(os.getuid()).pw_name:
            who = pwd.getpwnam(user)
            found = ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--init-groups", "--", *found]
        return list(network.enter(netns, found)) if netns else found


class Sandbox(Remote):
    """A cluster that lives as long as this object, and no longer than this process."""

    def __init__(
        self,
        *,
        nodes: int = 3,
        node_memory_mb: int = 8000,
        dir: Path | None = None,  # noqa: A002  # the word of the command line
        hosts: int = 0,
        netns: bool = False,
        slurmdbd: bool = False,
        proctrack: Literal["linuxproc", "cgroup"] = "linuxproc",
        guests: bool = True,
        prefix: str = "",
        host_prefix: str = "h",
        users: Sequence[str] = (),
        enforce: str = "",
        bank: bool = False,
        deposit_su: int = 1000,
        extra_conf: str = "",
        carrel_conf: str = "",
        detached: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Describe it; ``up`` or ``with`` makes it. The arguments are the fields of ``Spec``.

        ``dir`` must be absent or empty; None is a new directory below /tmp. ``say`` is told what takes
        longer than two seconds.
        """
        # Not $TMPDIR: paths of unix sockets are short. The harness makes it, and refuses one that another user made.
        somewhere = f"/tmp/carrel-{secrets.token_hex(4)}"  # noqa: S108  # see above
        super().__init__((dir or Path(somewhere)).absolute())
        self._say = say
        self._harness: subprocess.Popen[bytes] | None = None
        self._facts: Facts | None = None
        self.spec = Spec(
            dir=str(self.dir),
            nodes=nodes,
            node_memory_mb=node_memory_mb,
            hosts=hosts,
            netns=netns,
            slurmdbd=slurmdbd,
            proctrack=proctrack,
            guests=guests,
            prefix=prefix,
            host_prefix=host_prefix,
            users=tuple(users),
            enforce=enforce,
            bank=bank,
            deposit_su=deposit_su,
            extra_conf=extra_conf,
            carrel_conf=carrel_conf,
            detached=detached,
        )

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._need().nodes

    @property
    def cluster(self) -> str:
        return self._need().cluster

    @property
    def netns(self) -> str:
        return self._need().netns

    def __enter__(self) -> Self:
        """Start it."""
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing."""
        self.down()

    def up(self) -> None:
        """Return when all nodes are idle.

        Raises:
            CarrelError: one sentence says why not; nothing is left.
        """
        self._harness = subprocess.Popen(
            [sys.executable, "-m", "carrel.sandbox.harness"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A sandbox within a sandbox: the outer one ends what carries its name, and must leave this one to itself.
            env={**os.environ, "CARREL_SANDBOX": str(self.dir)},
            start_new_session=True,  # Ctrl-C is for the command, not for the cluster under it
        )
        try:
            self._facts = self._await_ready(self._harness)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End everything and delete the directory. A second call changes nothing.

        Raises:
            CarrelError: something stayed; the sentence names it.
        """
        was_up = self._facts is not None
        harness, self._harness, self._facts = self._harness, None, None
        if harness is None:
            return
        if self.spec.detached and harness.poll() is None:
            harness.terminate()
        if harness.stdin is not None:
            harness.stdin.close()
        status = harness.wait(timeout=STOP_TIMEOUT_S)
        if harness.stdout is not None:
            harness.stdout.close()
        if status < 0 and was_up:
            sweep(self.dir)
        elif status != 0 and was_up:
            raise CarrelError(f"{self.dir}: not all could be removed; see {self.layout.log}/harness.log")

    def let_go(self) -> Facts:
        """Leave a detached sandbox to itself and return what it is."""
        facts = self._need()
        assert self._harness is not None  # noqa: S101  # it is up
        for pipe in (self._harness.stdin, self._harness.stdout):
            if pipe is not None:
                pipe.close()
        self._harness.returncode = 0  # it is not ours any more: init reaps it
        self._harness = None
        return facts

    def run(
        self,
        words: Sequence[str | Path],
        *,
        user: str | None = None,
        timeout_s: float = 60.0,
        stdin: str = "",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the cluster's environment; its status is the caller's to judge.

        Args:
            words: The command.
            user: Whom to run it as (only root can); it then starts in that user's home.
            timeout_s: It is killed after this long, and ``subprocess.TimeoutExpired`` raised.
            stdin: Text for its standard input.
            cwd: Directory to start in; by default this process's own, or the user's home.
            env: More variables.
        """
        who = pwd.getpwnam(user) if user else None
        personal = {"HOME": who.pw_dir, "USER": who.pw_name, "LOGNAME": who.pw_name} if who else {}
        return subprocess.run(
            self.command(words, netns=self.netns, user=user),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **self.env, **personal, **(env or {})},
            cwd=cwd or (Path(who.pw_dir) if who else None),
            check=False,
        )

    def keep_logs(self, where: Path) -> None:
        """Copy the logs, to read them after the sandbox is gone."""
        for pattern in ("log/*", "nodes/*/guests/*/console.log", "nodes/*/guests/*/guard.log", "etc/*.conf"):
            # Path.glob fails where a directory goes while it is looked through: that of a guest.
            for found in glob.glob(pattern, root_dir=self.dir):  # noqa: PTH207  # see above
                target = where / found
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(self.dir / found, target)

    def _await_ready(self, harness: "subprocess.Popen[bytes]") -> Facts:
        assert harness.stdin is not None  # noqa: S101  # both are pipes
        assert harness.stdout is not None  # noqa: S101
        harness.stdin.write(msgspec.json.encode(self.spec) + b"\n")
        harness.stdin.flush()
        for line in harness.stdout:
            told = msgspec.json.decode(line, type=Tell)
            if told.facts is not None:
                return told.facts
            if told.error:
                raise _error(f"sandbox: {told.error}", told.exit_code)
            self._say(told.progress)
        raise CarrelError(f"sandbox: its harness ended with {harness.wait()} and said nothing")

    def _need(self) -> Facts:
        if self._facts is None:
            raise CarrelError(f"sandbox in {self.dir}: not started")
        return self._facts


def _error(text: str, exit_code: int) -> CarrelError:
    """Return the harness's error as it was there: with its exit code."""
    error = CarrelError(text)
    error.exit_code = exit_code
    return error
