"""The daemons for tests of what asks them: a real carrelctld, and a carreld that only answers what it was given."""

import contextlib
import os
import socket
import subprocess  # a daemon outlives the call that started it
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from carrel import wire
from carrel.model.guest import Guest
from carrel.model.job import JobKey
from carrel.model.report import Event, NodeFacts, NodeReport

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


def wait_for(fact: Callable[[], bool], what: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return when ``fact`` holds; fail with ``what`` when it does not in time."""
    until_s = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > until_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def a_guest(node: str = "c1", **changes: object) -> Guest:
    """Return a guest of job 7 of uid 1001, ready on ``node``."""
    guest = Guest(
        name="7.1795220388.0",
        node=node,
        driver="fake",
        state="ready",
        run=JobKey(cluster="k", job_id=7, submit_s=1795220388),
        image_name="debian12",
        cpus=2,
        memory_bytes=512 * 2**20,
        uid=1001,
        user="ada",
        accelerator="tcg",
        accelerator_why="chosen in the configuration",
        started_s=1795220389.0,
        ready_s=1795220391.5,
    )
    return msgspec.structs.replace(guest, **changes)


def a_report(
    *guests: Guest, node: str = "c1", sent_s: float = 1.0, events: tuple[Event, ...] = (), faults: tuple[str, ...] = ()
) -> NodeReport:
    """Return what a node reports that has ``guests``."""
    facts = NodeFacts(node=node, version="0.1.0", started_s=1795220000.0, faults=faults)
    return NodeReport(facts=facts, guests=guests, events=events, sent_s=sent_s)


class ControllerProcess:
    """A real ``carrel serve controller`` in ``directory``, which it listens in and writes its maps to."""

    def __init__(self, directory: Path, *, listen: str = "", extra: str = "") -> None:
        """Write its configuration; ``start`` starts it."""
        self.directory = directory
        self.socket = directory / "ctl.sock"
        self.maps = directory / "maps"
        self.config = directory / "carrel.toml"
        self.listen = listen or f"unix:{self.socket}"
        self.config.write_text(
            f'[controller]\nlisten = "{self.listen}"\n{extra}\n'
            f'[guests]\nmap_dir = "{self.maps}"\n'
            f'[placement]\ntable = "{directory}/hosts.db"\n'
            f'[node]\ndir = "{directory}/nodes/{{node}}"\nreport_period_s = 0.3\n'
            # Nodes keep their names where no Slurm is: its commands are looked for in vain.
            f'[slurm]\nbin_dir = "{directory}/no-slurm"\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "carrel.cli.main", "serve", "controller"]
        self._process = subprocess.Popen(
            command, env={**os.environ, "CARREL_CONFIG": str(self.config)}, stdin=subprocess.DEVNULL
        )
        wait_for(self._answers, "carrelctld answers")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status; it has ``STOP_TIMEOUT_S``."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it with SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "carrelctld ended while it started"
        kind, _, rest = self.listen.partition(":")
        host, _, port = rest.rpartition(":")
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(rest if kind == "unix" else (host, int(port)))
            except OSError:
                return False
        return True


@contextlib.contextmanager
def fake_carreld(directory: Path, answers: Mapping[str, object]) -> Iterator[list[wire.Message]]:
    """Listen as the carreld whose node directory this is; yield the messages that came in.

    Args:
        directory: The node's directory.
        answers: By verb: a JSON value, or an exception whose sentence refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    asked: list[wire.Message] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "carreld.sock"))
        listener.listen()
        thread = threading.Thread(target=_answer, args=(listener, answers, asked))
        thread.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(STOP_TIMEOUT_S)


def _answer(listener: socket.socket, answers: Mapping[str, object], asked: list[wire.Message]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as stream:
            length = int.from_bytes(stream.read(4), "little")
            message = wire.decode(stream.read(length))
            asked.append(message)
            answer = answers.get(message.get("verb"))
            if isinstance(answer, Exception):
                connection.sendall(wire.encode({"status": "refused", "text": str(answer)}))
            else:
                connection.sendall(wire.encode({"status": "ok", "json": msgspec.json.encode(answer).decode()}))
