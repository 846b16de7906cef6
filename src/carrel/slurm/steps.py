"""The steps that live on this node, from slurmd's own spool directory: no question to Slurm, and no hook.

slurmstepd listens on ``<spool>/<node>_<job>.<step>`` from before its first task until after its last. With
``PrologFlags=Contain`` a job has such a socket (the extern step's) from its first second to its last.
"""

import re
import socket
from pathlib import Path
from typing import NamedTuple

from carrel.process import Pid, children, process_state

MANAGER = "slurmstepd"
"""What a step's manager is called, and its child until that has become the task."""
_PID_BYTES = 12


class Step(NamedTuple):
    """A step that lives."""

    job_id: int
    name: str
    manager: Pid
    """Its slurmstepd."""


class Steps:
    """Looks again and again; a slurmstepd is connected to once, since it starts a thread for whoever connects."""

    def __init__(self, spool: Path, node: str) -> None:
        """Look nowhere yet.

        Args:
            spool: ``SlurmdSpoolDir`` of this node.
            node: The node's name.
        """
        self.spool = spool
        self._name = re.compile(re.escape(node) + r"_(\d+)\.(\d+(?:\.\d+)?)")
        self._known: dict[str, Step] = {}

    def living(self) -> list[Step]:
        """Return them.

        Raises:
            OSError: there is no spool directory, so nothing is known.
        """
        names = {path.name for path in self.spool.iterdir()}
        self._known = {name: step for name, step in self._known.items() if name in names and step.manager.alive}
        for name in names - self._known.keys():
            match = self._name.fullmatch(name)
            if match and (manager := _listener(self.spool / name)):
                self._known[name] = Step(int(match[1]), match[2], manager)
        return list(self._known.values())


def task_of(manager: Pid) -> int | None:
    """Return a task of a step, once it is in its control groups: slurmd puts it there before it is the program."""
    for pid in children(manager.number):
        try:
            if Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() != MANAGER:
                return pid
        except OSError:
            continue
    return None


def _listener(path: Path) -> Pid | None:
    """Return who listens on a socket; None: nobody does any more, or nobody can tell now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a slurmstepd that is stopped has a full queue some day
        try:
            sock.connect(str(path))
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PID_BYTES)
        except OSError:
            return None
    number = int.from_bytes(raw[:4], "little")
    state = process_state(number)
    return Pid(number, state[1]) if state else None
