"""A carreld of a few lines, for tests of the relay: it answers carrel-enter with a stream to an agent on this machine.

No guest and no Slurm: what can be seen this way is what every driver's guests share.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess  # the ends of the relay are long-lived children that carrel.process is not for
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from carrel import wire

TIMEOUT_S = 30.0

Reply = tuple[wire.Fields, socket.socket | None]
Answer = Callable[["RelayNode", wire.Message], Reply]
"""What to say to a question, and the stream to say it with; nothing to say ends the conversation."""


class Task:
    """A carrel-enter that runs; as a context it is gone at the end, whatever happened."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Take over ``process``; a stream that it does not have is empty."""
        self.process = process
        self.stdin = process.stdin or io.BytesIO()
        self.stdout = process.stdout or io.BytesIO()
        self.stderr = process.stderr or io.BytesIO()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return how it ended: its exit code, or minus the signal that killed it."""
        return self.process.wait(timeout_s)


class RelayNode:
    """Answers carrel-enter as carreld would: with a stream that a fresh agent serves."""

    def __init__(self, libexec: Path) -> None:
        """Listen in a new directory; ``close`` removes it."""
        self.directory = Path(mkdtemp(prefix="cr", dir="/tmp"))
        self.ends: list[socket.socket] = []
        self.libexec = libexec
        self.socket_path = self.directory / "carreld.sock"
        self.questions: list[wire.Message] = []
        self.agents: list[subprocess.Popen[bytes]] = []
        self.answer: Answer = RelayNode.with_an_agent
        self.extra: dict[str, str] = {}
        self.task_ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.socket_path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(TIMEOUT_S)
        for agent in self.agents:
            agent.kill()
            agent.wait(TIMEOUT_S)
        for end in self.ends:
            end.close()
        shutil.rmtree(self.directory)

    def with_an_open_end(self, _message: wire.Message) -> Reply:
        """Answer with a stream whose other end is the test's: the last of ``ends``."""
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        return self.ok(), ours

    def with_an_agent(self, _message: wire.Message) -> Reply:
        """Start an agent on one end of a pair and answer with the other."""
        ours, theirs = socket.socketpair()
        command: list[str | Path] = [self.libexec / "carrel-agent", "--session", str(theirs.fileno())]
        self.agents.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
        theirs.close()
        return self.ok(), ours

    def ok(self) -> dict[str, str | Sequence[str]]:
        return {
            "status": "ok",
            "guest": "g1",
            "uid": str(os.getuid()),
            "gid": str(os.getgid()),
            "group": [str(group) for group in os.getgroups()],
            "end_file": str(self.directory / "end"),
            "slurm_bin": str(self.directory / "bin"),
            **self.extra,
        }

    def enter(
        self,
        *argv: str,
        stdin: bytes | int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ``argv`` to its end through carrel-enter, as slurmstepd would start it."""
        return subprocess.run(
            self.command(argv),
            input=stdin if isinstance(stdin, bytes) else None,
            stdin=None if isinstance(stdin, bytes) else (subprocess.DEVNULL if stdin is None else stdin),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            cwd=cwd,
            env=self.environment(argv[0], env),
        )

    def spawn(self, *argv: str, stdin: int = subprocess.PIPE, env: Mapping[str, str] | None = None) -> Task:
        """Start ``argv`` through carrel-enter and return at once."""
        process = subprocess.Popen(
            self.command(argv),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(argv[0], env),
        )
        return Task(process)

    def command(self, argv: Sequence[str]) -> list[str | Path]:
        return [self.libexec / "carrel-enter", *argv[1:]]

    def environment(self, argv0: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "CARREL_ENTER_ARGV0": argv0,
            "CARREL_ENTER_SOCKET": str(self.socket_path),
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            **(more or {}),
        }

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            head = connection.recv(4, socket.MSG_WAITALL)
            body = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
            message = wire.decode(body)
            self.questions.append(message)
            fields, stream = self.answer(self, message)
            if not fields:
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died before it read our answer
                with stream or contextlib.nullcontext():
                    fds = [] if stream is None else [stream.fileno()]
                    socket.send_fds(connection, [wire.encode(fields)], fds)
                connection.recv(1)
            self.task_ended.set()
