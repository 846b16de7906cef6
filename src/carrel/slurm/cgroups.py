"""Where Slurm counts and limits a job: read from a process of the job, so that no layout is assumed.

Under proctrack/linuxproc a process is in no ``job_<id>``, and there is nothing to join.
"""

import contextlib
from pathlib import Path

from carrel.process import process_state

COUNTING = ("memory", "cpuset", "cpuacct", "cpu")
_PERIOD_US = 100_000  # cpu.cfs_period_us, unless someone changed it


def of_process(pid: int, job_id: int) -> tuple[tuple[str, ...], str]:
    """Return the job's directories that count or limit it, and its freezer directory (or ``""``).

    Raises:
        OSError: the process is gone.
    """
    mounts = _mounts()
    counting, freezer = [], ""
    for line in Path(f"/proc/{pid}/cgroup").read_text(errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        job = _job_part(path, job_id)
        if job is None:
            continue
        for controller in controllers.split(",") if controllers else [""]:
            where = mounts.get(controller)
            if where is None:
                continue
            if controller == "freezer":
                freezer = f"{where}{job}"
            elif controller in COUNTING or controller == "":
                counting.append(f"{where}{job}")
    return tuple(dict.fromkeys(counting)), freezer


def of_guest_node(node: str, *, cpus: int, memory_bytes: int) -> tuple[str, ...]:
    """Return directories for the guest that is this node: where Slurm keeps the node's jobs, and limited as admitted.

    The guest is there before its job is, so it cannot be below it. Made here, ``carrel`` in each; a second call changes
    nothing. Empty where Slurm does not use cgroups v1 on this host: there nothing is limited either.
    """
    found = []
    for controller, where in _mounts().items():
        top = Path(where) / f"slurm_{node}"
        if controller not in COUNTING or str(top) in found:
            continue
        (top / "carrel").mkdir(parents=True, exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: a new cpuset is empty, and takes no process
            if (top / file).exists() and not (top / file).read_text().strip():
                (top / file).write_text((top.parent / file).read_text())
        limits = {"memory.limit_in_bytes": memory_bytes, "cpu.cfs_quota_us": cpus * _PERIOD_US}
        for file, limit in limits.items():
            if (top / "carrel" / file).exists():
                (top / "carrel" / file).write_text(str(limit))
        found.append(str(top))
    return tuple(found)


def remove_guest_node(node: str) -> None:
    """Remove what ``of_guest_node`` made, where nothing is left in it. Absent before is fine."""
    for where in _mounts().values():
        top = Path(where) / f"slurm_{node}"
        for directory in (top / "carrel", top):
            with contextlib.suppress(OSError):
                directory.rmdir()


def suspended(pid: int) -> bool:
    """Say whether ``scontrol suspend`` has stopped this process: by a signal, or in the v1 freezer."""
    state = process_state(pid)
    if state is None:
        return False
    if state[0] == "T":
        return True
    mounts = _mounts()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(errors="surrogateescape").splitlines()
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers == "freezer" and "freezer" in mounts:
                return (Path(mounts["freezer"] + path) / "freezer.state").read_text().strip() == "FROZEN"
    except OSError:
        return False
    return False


def _job_part(path: str, job_id: int) -> str | None:
    parts = path.split("/")
    wanted = f"job_{job_id}"
    return "/".join(parts[: parts.index(wanted) + 1]) if wanted in parts else None


def _mounts() -> dict[str, str]:
    """Return where each v1 controller is mounted, and the unified hierarchy under the name ``""``."""
    found: dict[str, str] = {}
    # Users may mount too (FUSE), on a directory whose name is no UTF-8.
    for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup":
            for controller in options.split(","):
                found.setdefault(controller, where)
        elif kind == "cgroup2":
            found.setdefault("", where)
    return found
