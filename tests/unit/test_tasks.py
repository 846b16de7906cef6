"""Who is a task of a job, and who only says so."""

from pathlib import Path

import pytest

from carrel.errors import RefusedError
from carrel.slurm.tasks import require_task

V1 = "6:freezer:/slurm/uid_1001/job_{job}/step_0\n4:memory:/slurm/uid_1001/job_{job}/step_0/task_0\n"
V2 = "0::/system.slice/slurmstepd.scope/job_{job}/step_0/user/task_0\n"
NONE = "4:memory:/system.slice/ssh.service\n"


def a_machine(
    proc: Path, *, cgroup: str, program: str = "/usr/sbin/slurmstepd-wlm", uid: int = 0, name: str = "slurmstepd"
) -> Path:
    """Make a process 20 in ``cgroup`` whose parent, 10, runs ``program``."""
    for pid, parent in ((20, 10), (10, 1)):
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "stat").write_bytes(b"%d (odd ) \xff name) S %d 1 1\n" % (pid, parent))
    (proc / "20" / "cgroup").write_text(cgroup)
    (proc / "10" / "status").write_text(f"Name:\t{name}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    (proc / "10" / "exe").symlink_to(program)
    return proc


@pytest.mark.parametrize("cgroup", [V1, V2, NONE], ids=["v1", "v2", "linuxproc"])
def test_a_child_of_slurmstepd_is_a_task(tmp_path: Path, cgroup: str) -> None:
    require_task(20, 7, proc=a_machine(tmp_path, cgroup=cgroup.format(job=7)))


@pytest.mark.parametrize("cgroup", [V1, V2], ids=["v1", "v2"])
def test_a_task_of_another_job_has_no_guest_here_since_its_own_job_would_not_count_it(
    tmp_path: Path, cgroup: str
) -> None:
    proc = a_machine(tmp_path, cgroup=cgroup.format(job=77))
    with pytest.raises(RefusedError, match="process 20 is in job 77, not in job 7"):
        require_task(20, 7, proc=proc)


@pytest.mark.parametrize("cgroup", [V1.format(job=7), NONE], ids=["in-the-job", "elsewhere"])
@pytest.mark.parametrize(
    ("program", "uid"), [("/bin/bash", 0), ("/usr/sbin/slurmstepd", 1001), ("/home/ada/slurmstepd", 1001)]
)
def test_what_slurmstepd_did_not_start_is_no_task(tmp_path: Path, cgroup: str, program: str, uid: int) -> None:
    proc = a_machine(tmp_path, cgroup=cgroup, program=program, uid=uid)
    with pytest.raises(RefusedError, match="process 20 is no task of job 7; see: srun --jobid=7"):
        require_task(20, 7, proc=proc)


def test_a_process_that_is_gone_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="process 20, which asked for a guest of job 7, is gone"):
        require_task(20, 7, proc=tmp_path)
