"""Where a guest is counted and limited: below its job, beside the job's steps.

Inside a step, QEMU would die at the first SIGTERM of ``scancel``, before the script's own trap has run. Beside the
steps it is counted with the job and limited with it, and not signalled. It is never put into the freezer: ``scontrol
suspend`` is seen in the tasks, and the guest is stopped through its monitor.
"""

import contextlib
from pathlib import Path


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
    """Remove the guest's directories, and the job's where nothing else is left in it."""
    for job in job_cgroups:
        for directory in (Path(job) / name, Path(job), Path(job).parent):
            if directory.name == name or directory.name.startswith(("job_", "uid_")):
                with contextlib.suppress(OSError):
                    directory.rmdir()
