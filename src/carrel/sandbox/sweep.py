"""The end of a sandbox whose harness was itself killed: found by what the harness wrote down, not by guessing.

Daemons carry ``CARREL_HARNESS``; tasks of jobs carry ``CARREL_SANDBOX`` beside Slurm's own ``SLURM_JOB_ID``. A
person's shell in the sandbox has neither mark, and is left alone.
"""

import os
import signal
import time
from pathlib import Path

import msgspec

from carrel.errors import CarrelError, NotFoundError
from carrel.sandbox import descendants, teardown
from carrel.sandbox.layout import Layout
from carrel.sandbox.netns import Network
from carrel.sandbox.spec import Facts

HARNESS_VARIABLE = "CARREL_HARNESS"
_TIMEOUT_S = 10.0
_ROUND_S = 0.02


def sweep(root: Path) -> None:
    """End all that a dead harness left in ``root``, and delete it.

    Raises:
        NotFoundError: no harness ever finished starting a sandbox there.
        CarrelError: something could not be ended or unmounted; the rest is gone.
    """
    facts = _facts(root)
    if facts.cgroups:
        teardown.thaw((*facts.nodes, *facts.pool))
    deadline = time.monotonic() + _TIMEOUT_S
    while left := _processes(root):
        if time.monotonic() > deadline:
            raise CarrelError(f"{root}: processes {sorted(left)} do not end; may you kill them?")
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(_ROUND_S)
    if facts.netns:
        Network(facts.netns.removesuffix("-ctl"), (*facts.nodes, *facts.hosts)).remove()
    if facts.cgroups:
        teardown.remove_cgroups((*facts.nodes, *facts.pool))
    teardown.unmount(root)
    teardown.remove_directory(root, keep_itself=False)


def _facts(root: Path) -> Facts:
    path = Layout(root).facts
    try:
        if path.stat().st_uid != os.getuid():
            raise NotFoundError(f"{root}: the sandbox of uid {path.stat().st_uid}, not yours")
        return msgspec.json.decode(path.read_bytes(), type=Facts)
    except (OSError, msgspec.DecodeError) as error:
        raise NotFoundError(f"no sandbox in {root}; see: carrel sandbox up --dir {root}") from error


def _processes(root: Path) -> set[int]:
    daemons = descendants.with_variable(HARNESS_VARIABLE, str(root))
    clients = descendants.with_variable("CARREL_SANDBOX", str(root))
    tasks = {pid for pid in clients if descendants.has_variable(pid, "SLURM_JOB_ID")}
    # slurmstepd writes its title over its environment, so it is known by the log that slurmd gave it.
    found = daemons | tasks | descendants.with_open_file("slurmstepd", root / "log")
    return found.union(*(descendants.living(pid) for pid in found)) - {os.getpid()}
