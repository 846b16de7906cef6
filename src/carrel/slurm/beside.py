"""slurmd beside a guest: on the host that carries it, under the name that the guest has to Slurm.

The guest needs no Slurm and sees no secret. One such slurmd costs 2.5 MB and answers 0.1 s after its start; it outlives
carreld, as the guest does, and is found again by what it wrote itself before it became slurmd.
"""

import asyncio
import os
import shutil
import signal
import subprocess  # it outlives this process on purpose, which carrel.process does not offer
from pathlib import Path

from carrel.config import Slurm
from carrel.errors import NodeFaultError
from carrel.process import Pid, process_state

STOP_TIMEOUT_S = 5.0
_STOP_POLL_S = 0.02
_SBIN = "/usr/sbin:/sbin"

# Written by the process itself: whoever started it may be killed before it could write anything down.
_NOTE_AND_BECOME = 'read -r stat < /proc/$$/stat && echo "$stat" > "$0.new" && mv "$0.new" "$0" && exec "$@"'


class _Slurmd(subprocess.Popen[bytes]):
    """A child that outlives this process on purpose, so there is nothing to warn of when the object goes."""

    def __del__(self) -> None:
        """Say nothing."""


class Beside:
    """The slurmd of one guest."""

    def __init__(self, slurm: Slurm, node: str, directory: Path) -> None:
        """Speak of the slurmd of ``node``, which is noted in ``directory``."""
        self._slurm = slurm
        self._node = node
        self._note = directory / "slurmd"
        self.log = directory / "slurmd.stderr"
        self._child: _Slurmd | None = None

    def pid(self) -> Pid | None:
        """Return the process; None: it does not run."""
        if self._child is not None:
            self._child.poll()  # reaps it
        try:
            stat = self._note.read_text(errors="replace")
        except FileNotFoundError:
            return None
        number, started = int(stat.split()[0]), int(stat.rpartition(")")[2].split()[19])
        pid = Pid(number, started)
        return pid if pid.alive else None

    def start(self) -> None:
        """Start it, unless it runs. One that slurmd's own pid file names is ended by the new one.

        Raises:
            NodeFaultError: this host has no slurmd.
        """
        if self.pid():
            return
        program = shutil.which("slurmd", path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
        if program is None:
            raise NodeFaultError("this host has no slurmd; is Slurm's package for compute nodes installed?")
        env = {**os.environ, **({"SLURM_CONF": self._slurm.conf} if self._slurm.conf else {})}
        with self.log.open("ab") as log:
            self._child = _Slurmd(
                ["/bin/sh", "-c", _NOTE_AND_BECOME, str(self._note), program, "-D", "-N", self._node],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd="/",
                start_new_session=True,
            )

    async def stop(self) -> None:
        """End it, and return when it is gone. Absent before is fine."""
        pid = self.pid()
        if pid is None:
            self._note.unlink(missing_ok=True)
            return
        pid.kill(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                while self.pid():  # noqa: ASYNC110  # a process that may be no child of ours tells nobody of its end
                    await asyncio.sleep(_STOP_POLL_S)
        except TimeoutError:
            pid.kill(signal.SIGKILL)
        self._note.unlink(missing_ok=True)


def steps_of(tasks: list[Pid]) -> list[Pid]:
    """Return the slurmstepds whose tasks these are."""
    found = {}
    for task in tasks:
        try:
            fields = Path(f"/proc/{task.number}/stat").read_text(errors="replace").rpartition(")")[2].split()
            parent = int(fields[1])
            if Path(f"/proc/{parent}/exe").readlink().name.startswith("slurmstepd") and (
                state := process_state(parent)
            ):
                found[parent] = Pid(parent, state[1])
        except OSError:
            continue
    return list(found.values())
