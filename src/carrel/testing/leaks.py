"""What is left of jobs that have ended: looked for in every place where Slurm or Carrel puts something.

::

    nothing_left(box)      # fails with a list after 60 s

Nothing is found by a pattern over the whole machine: processes are descendants of the sandbox's harness, everything
else lies in its directory or, as cgroups, under the names of its nodes.
"""

import glob
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from carrel.process import Pid, process_state
from carrel.sandbox import descendants, teardown
from carrel.sandbox.cluster import Sandbox

CLEAN_TIMEOUT_S = 60.0
"""The promise: after any crash, anywhere, nothing is left after this long."""
_POLL_S = 0.5
_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {
    "guest": "nodes/*/guests*/*",
    "what a job asked for": "nodes/*/jobs/*",
    "who is inside a guest": "nodes/*/inside/*",
    "job that is sampled": "nodes/*/sampled/*",
    "kept control groups": "nodes/*/held/*",
    "hint of a hook": "nodes/*/hints/*",
    "samples without tables": "metrics/*/*/*.seg",
    "map": "maps/*",
    "order of a guest that is a node": "nodes/*/guest-nodes/*",
    "directory of a guest that is a node": "nodes/*/is-guest",
    "socket of a step": "spool/*/*_[0-9]*.*[0-9]",
}


def nothing_left(box: Sandbox, *, within_s: float = CLEAN_TIMEOUT_S) -> None:
    """Return when nothing is left of any job.

    Raises:
        AssertionError: something still was after ``within_s``; the sentence lists it.
    """
    deadline = time.monotonic() + within_s
    while left := leaks(box):
        assert time.monotonic() < deadline, f"left after {within_s:g} s:\n" + "\n".join(left)
        time.sleep(_POLL_S)


def leaks(box: Sandbox) -> list[str]:
    """Return, in words, what is there that belongs to no daemon. Of a cluster with running jobs, that is theirs."""
    return [
        *_processes(box),
        *_files(box),
        *_mounts(box),
        *_cgroups((*box.facts().nodes, *box.facts().pool)),
        *_slots(box),
    ]


def guest_of(box: Sandbox, job_id: int) -> Path:
    """Return the directory of a job's only guest.

    Raises:
        AssertionError: it has none, or several.
    """
    found = _guests(box, job_id)
    assert len(found) == 1, f"guests of job {job_id}: {[path.name for path in found]}"
    return found[0]


def pid_of(box: Sandbox, job_id: int, name: str) -> Pid | None:
    """Return a process of a job's only guest: ``qemu``, ``guard``, ``enter`` or ``stepd``; None: not (yet) there."""
    guests = _guests(box, job_id)
    if len(guests) != 1:
        return None
    if name in {"qemu", "guard"}:
        return _written(guests[0] / "pids", name)
    node = guests[0].name.split(".")[3:4]  # a guest that is a node has a directory of its own
    home = box.layout.node(node[0]) if (guests[0].name.count(".") == 3 and node) else guests[0].parent.parent
    try:
        tasks = [int(name) for name in os.listdir(home / "inside" / guests[0].name)]  # noqa: PTH208  # of names alone
    except FileNotFoundError:  # nobody is inside yet, or the guest goes just now
        return None
    if not tasks:
        return None
    return _pid(tasks[0]) if name == "enter" else _stepd_of(tasks[0])


def _guests(box: Sandbox, job_id: int) -> list[Path]:
    # Path.glob fails where a directory goes while it is looked through: that of a node which is a guest.
    return [box.dir / found for found in glob.glob(f"nodes/*/guests/{job_id}.*", root_dir=box.dir)]  # noqa: PTH207  # see above


def _written(path: Path, name: str) -> Pid | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}="):
            number, _, start = line.partition("=")[2].partition(" ")
            return Pid(int(number), int(start))
    return None


def _pid(number: int) -> Pid | None:
    state = process_state(number)
    return Pid(number, state[1]) if state else None


def _stepd_of(task: int) -> Pid | None:
    """Return a task's slurmstepd; None where the task, or it, is gone: then the task is another's child."""
    try:
        parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        is_stepd = Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")
    except OSError:
        return None
    return _pid(parent) if is_stepd else None


_OF_DAEMONS = ("slurmscriptd", "-m carrel.daemons.sinks")
"""Second processes of daemons: of slurmctld, and of a carreld that has sinks."""
_ASKS = {"squeue", "scontrol", "sinfo", "sacct", "sacctmgr"}
"""What daemons ask Slurm with, again and again: on a busy machine there is one at each look, and never the same."""


def _processes(box: Sandbox) -> Iterator[str]:
    facts = box.facts()
    known = {daemon.pid for daemon in facts.daemons}
    for pid in descendants.living(facts.pid) - known:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            name, _, fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
        except OSError:
            continue
        if name.partition("(")[2] in _ASKS and int(fields.split()[1]) in known:
            continue
        if words and not any(part in words for part in _OF_DAEMONS):
            yield f"process {pid}: {words[:120]}"


def _files(box: Sandbox) -> Iterator[str]:
    for what, pattern in _FILES.items():
        # Path.glob fails where a directory goes while it is looked through.
        for path in glob.glob(pattern, root_dir=box.dir, include_hidden=True):  # noqa: PTH207  # see above
            yield f"{what}: {path}"


def _mounts(box: Sandbox) -> Iterator[str]:
    for point in teardown.mounts_below(box.dir):
        yield f"mount: {point}"


def _cgroups(nodes: Sequence[str]) -> Iterator[str]:
    for node in nodes:
        for user in glob.glob(f"*/slurm_{node}/uid_*", root_dir=_CGROUPS):  # noqa: PTH207  # as above
            yield from (f"cgroup: {directory}" for directory, _, _ in os.walk(_CGROUPS / user))


def _slots(box: Sandbox) -> Iterator[str]:
    """Guests that a daemon still lists, and with them their slots."""
    done = box.run(["carrel", "guest", "list", "--json"])
    if done.returncode != 0:
        yield f"guest list: {done.stderr.strip()}"
    for line in done.stdout.splitlines():
        guest = json.loads(line)
        yield f"listed: guest {guest['name']} on {guest['node']}, slot {guest.get('slot', 0)}"
