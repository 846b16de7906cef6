"""Where a guest is counted and limited: below its job, beside the job's steps.

Inside a step, QEMU would die at the first SIGTERM of ``scancel``, before the script's own trap has run. Beside the
steps it is counted with the job and limited with it, and not signalled. It is never put into the freezer: ``scontrol
suspend`` is seen in the tasks, and the guest is stopped through its monitor.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

REMOVE_TIMEOUT_S = 2.0
RETRY_S = 0.01


def make(job_cgroups: tuple[str, ...], name: str) -> list[Path]:
    """Make the guest's directory in each of the job's; a second call changes nothing."""
    made = []
    for job in job_cgroups:
        directory = Path(job) / name
        directory.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: a new cpuset is empty, and takes no process
            if (directory / file).exists():
                (directory / file).write_text((Path(job) / file).read_text())
        made.append(directory)
    return made


def remove(job_cgroups: tuple[str, ...], name: str) -> None:
    """Remove the guest's directories, and the job's where nothing else is left in it.

    Bounded by ``REMOVE_TIMEOUT_S``. An empty directory that stays does less harm than one that slurmstepd misses.
    """
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    for job in map(Path, job_cgroups):
        _remove_own(job / name, deadline)
        lock = _locked_like_slurmstepd(job, deadline) if job.exists() else None
        if lock is None:
            continue
        try:
            for directory in (job, job.parent):
                if directory.name.startswith(("job_", "uid_")):
                    directory.rmdir()
        except OSError:
            continue  # somebody is in it, so it is theirs
        finally:
            os.close(lock)


def _remove_own(directory: Path, deadline: float) -> None:
    """The kernel lets go of a cgroup shortly after its last process was reaped."""
    while True:
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return
            time.sleep(RETRY_S)
        else:
            return


def _locked_like_slurmstepd(job: Path, deadline: float) -> int | None:
    """Return a descriptor that holds slurmstepd's lock, as carrel-guard does; None: not had in time.

    slurmstepd makes ``uid_U``, ``job_J`` and ``step_S`` under a lock of the controller's mount point. Without it
    ``uid_U`` could be removed between two of its mkdir, and a job would fail.
    """
    top = next((path for path in job.parents if path.is_mount()), None)
    if top is None:
        return None
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(RETRY_S)
        else:
            return descriptor
