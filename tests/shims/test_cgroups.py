"""The guest's own cgroup below its job's: made, and removed with what Slurm could not remove because of it."""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.drivers.qemu import cgroups

pytestmark = pytest.mark.root

MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def job() -> Iterator[Path]:
    """Make a job's directory as slurmstepd does."""
    if not (MEMORY / "cgroup.procs").exists():
        pytest.skip(f"{MEMORY}: no cgroup v1 memory controller on this machine")
    top = MEMORY / f"carreltest_{secrets.token_hex(4)}"
    path = top / "uid_7" / "job_7"
    path.mkdir(parents=True)
    yield path
    for left in (*sorted(top.rglob("*/"), reverse=True), top):
        left.rmdir()


def test_the_jobs_empty_directories_go_with_the_guests(job: Path) -> None:
    cgroups.make((str(job),), "carrel")
    cgroups.remove((str(job),), "carrel")
    assert not job.parent.exists()
    assert job.parent.parent.exists()


def test_a_directory_that_slurm_still_uses_stays(job: Path) -> None:
    cgroups.make((str(job),), "carrel")
    (job / "step_0").mkdir()
    cgroups.remove((str(job),), "carrel")
    assert [path.name for path in job.iterdir() if path.is_dir()] == ["step_0"]


def test_the_jobs_directories_wait_for_slurmstepds_lock(job: Path) -> None:
    cgroups.make((str(job),), "carrel")
    lock = os.open(MEMORY, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    removing = threading.Thread(target=cgroups.remove, args=((str(job),), "carrel"))
    removing.start()
    deadline = time.monotonic() + 60
    while (job / "carrel").exists():
        assert time.monotonic() < deadline
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        assert job.exists(), "slurmstepd may be between two of its mkdir"
    os.close(lock)
    removing.join()
    assert not job.exists()
