"""Whether a process is a task of a job: started by slurmd, and counted with the job that it names.

carreld's socket is open to all. Without this look a login by ssh, or another job of the same user, could have a
guest that no job counts and nothing limits, and anybody could make carreld ask Slurm about any number of jobs.
"""

import re
from pathlib import Path

from carrel.errors import RefusedError

_JOB = re.compile(r"/job_(\d+)(?:/|$)")


def require_task(pid: int, job_id: int, *, proc: Path = Path("/proc")) -> None:
    """Return where ``pid`` is a task of ``job_id``.

    Under proctrack/linuxproc a process says nothing of its job; there nothing is limited either.

    Raises:
        RefusedError: slurmstepd did not start it, or it is counted with another job.
    """
    try:
        inside = set(_JOB.findall((proc / str(pid) / "cgroup").read_text(errors="replace")))
        started_by_slurm = _is_slurmstepd(proc / str(_parent(proc / str(pid))))
    except OSError as error:
        raise RefusedError(f"process {pid}, which asked for a guest of job {job_id}, is gone") from error
    if inside - {str(job_id)}:
        raise RefusedError(f"process {pid} is in job {', '.join(sorted(inside))}, not in job {job_id}")
    if not started_by_slurm:
        raise RefusedError(f"process {pid} is no task of job {job_id}; see: srun --jobid={job_id} --overlap")


def _parent(process: Path) -> int:
    fields = (
        (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    )  # a command's name may itself hold a parenthesis
    return int(fields[1])


def _is_slurmstepd(process: Path) -> bool:
    """Look at the program and the real user, which a process cannot claim; its name it could."""
    real_uid = re.search(r"^Uid:\s+(\d+)", (process / "status").read_text(errors="replace"), re.MULTILINE)
    # Debian calls it slurmstepd-wlm; one that was upgraded under its feet ends in " (deleted)".
    program = (process / "exe").readlink().name
    return program.startswith("slurmstepd") and real_uid is not None and real_uid[1] == "0"
