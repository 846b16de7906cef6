"""The process that a sandbox lives in: parent, or adopted parent, of all that runs there.

It is a process of its own, so that "kill every descendant" never meets the test or the shell that asked for
the sandbox. Its standard input carries the request and is its lifeline: at end of file it tears everything down,
so that nothing outlives whoever started it, not even after SIGKILL. Start it with ``python -m carrel.sandbox.harness``.
"""

import os
import select
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import msgspec

from carrel.errors import CarrelError
from carrel.sandbox import children, descendants, teardown
from carrel.sandbox.assembly import Assembly
from carrel.sandbox.spec import Ask, Facts, Spec, Tell
from carrel.sandbox.sweep import HARNESS_VARIABLE

_STOP_TIMEOUT_S = 2.0
"""Whoever does not end in this time is killed: nothing that it could still save outlives the directory."""
_READY_TIMEOUT_S = 60.0
_READ_BYTES = 65536


class _NoLongerWantedError(CarrelError):
    """Whoever asked for the sandbox is gone, or a signal said stop."""


class Harness:
    """Starts a sandbox, answers on its socket, and leaves nothing."""

    def __init__(self, spec: Spec) -> None:
        """Take the request; nothing is started."""
        self._spec = spec
        self._root = Path(spec.dir)
        self._existed = self._root.exists()
        self._stopping = False
        self._children = children.Children(self._interrupted)
        self._assembly: Assembly | None = None

    def start(self) -> None:
        """Bring everything up; progress goes to standard output."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        children.become_subreaper()
        os.environ["CARREL_SANDBOX"] = os.environ[HARNESS_VARIABLE] = str(self._root)
        self._assembly = Assembly(self._spec, self._children, say=lambda text: tell(Tell(progress=text)))
        self._assembly.start(timeout_s=_READY_TIMEOUT_S)

    def serve(self) -> None:
        """Answer until told to stop."""
        path = self._need().layout.harness_socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(path))
            path.chmod(0o600)
            listening.listen(8)
            self._need().layout.facts.write_bytes(msgspec.json.encode(self._facts()))
            tell(Tell(facts=self._facts()))
            self._release_output()
            waker, wakened = socket.socketpair()
            waker.setblocking(False)
            signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGCHLD, lambda *_: None)
            watched: list[int | socket.socket] = [listening, wakened]
            if not self._spec.detached:
                watched.append(0)
            while not self._stopping:
                ready, _, _ = select.select(watched, [], [])
                self._children.reap()
                if wakened in ready:
                    wakened.recv(_READ_BYTES)
                if 0 in ready and not os.read(0, _READ_BYTES):
                    return
                if listening in ready:
                    self._answer(listening.accept()[0])

    def stop(self) -> None:
        """End and remove everything, also after a start that failed half-way. Raises only when something stays."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number != signal.SIGCHLD else signal.SIG_DFL)
        names = [daemon.name for daemon in self._children.daemons()]
        # A slurmd whose epilog still runs asks carreld, then tells slurmctld: without them it tries for ten seconds.
        for prefix in ("slurmd@", "slurmctld", "carrel"):
            self._children.terminate([name for name in names if name.startswith(prefix)], timeout_s=_STOP_TIMEOUT_S)
        if self._assembly is not None:
            self._assembly.thaw()
        self._children.kill_descendants(spare=["munged"])
        self._children.terminate(["munged"], timeout_s=_STOP_TIMEOUT_S)
        self._end_clients()
        if self._assembly is not None:
            self._assembly.remove()
            complaint = teardown.unmount_or_say(self._root)
            if complaint:
                raise CarrelError(f"{self._root}: kept, not all could be unmounted: {complaint}")
            teardown.remove_directory(self._root, keep_itself=self._existed)

    def _end_clients(self) -> None:
        """Kill what was started with this sandbox's environment: the command of a ``run`` that was itself killed.

        Never for ``up``: there, that may be the shell of a person.
        """
        if self._spec.detached:
            return
        for pid in descendants.with_variable("CARREL_SANDBOX", str(self._root)):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

    def _need(self) -> Assembly:
        assert self._assembly is not None  # noqa: S101  # start() comes first, by construction of main()
        return self._assembly

    def _facts(self) -> Facts:
        return self._need().facts(self._children.daemons())

    def _release_output(self) -> None:
        """Let go of the pipe to whoever started us: later words go to a log."""
        log = os.open(self._need().layout.log / "harness.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)

    def _answer(self, client: socket.socket) -> None:
        with client:
            client.settimeout(5.0)
            try:
                line = client.makefile("rb").readline(_READ_BYTES)
                try:
                    reply = self._obey(msgspec.json.decode(line, type=Ask))
                except CarrelError as error:
                    reply = Tell(error=str(error), exit_code=error.exit_code)
                except msgspec.DecodeError as error:
                    reply = Tell(error=str(error))
                client.sendall(msgspec.json.encode(reply) + b"\n")
            except OSError as error:
                print(f"a client went away: {error}", file=sys.stderr, flush=True)  # noqa: T201  # this is the log

    def _obey(self, ask: Ask) -> Tell:
        match ask.do:
            case "stop":
                self._stopping = True
            case "kill":
                self._children.kill(ask.name, ask.signal)
            case "start":
                self._need().start_one(ask.name, timeout_s=_READY_TIMEOUT_S)
            case "status":
                pass
        return Tell(facts=self._facts())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stopping = True

    def _interrupted(self) -> None:
        """Give up a wait when nobody wants the sandbox any more."""
        if self._stopping:
            raise _NoLongerWantedError("stopped by a signal while starting")
        if not self._spec.detached and select.select([0], [], [], 0)[0] and not os.read(0, _READ_BYTES):
            raise _NoLongerWantedError("whoever asked for the sandbox is gone")


def tell(what: Tell) -> None:
    """Say one line to whoever started us; a closed pipe is no reason to leave things behind."""
    try:
        os.write(1, msgspec.json.encode(what) + b"\n")
    except BrokenPipeError:
        return


def _request() -> Spec:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            raise CarrelError("no request on standard input")
        line += part
    return msgspec.json.decode(line, type=Spec)


def main() -> int:
    """Run one sandbox from request to removal; 0: it was up, and nothing is left."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    harness = Harness(_request())
    status = 0
    try:
        harness.start()
        harness.serve()
    except CarrelError as error:
        tell(Tell(error=str(error), exit_code=error.exit_code))
        status = 1
    finally:
        try:
            harness.stop()
        except CarrelError as error:
            tell(Tell(error=str(error), exit_code=error.exit_code))
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
