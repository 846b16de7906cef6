"""Under a real Slurm: the job's groups are found, kept until they were read, and not left behind."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from carrel.config import Metrics
from carrel.model.job import Job, JobKey
from carrel.sampling import cgroup
from carrel.sampling.loop import Sampler
from carrel.sampling.tables import Survey
from carrel.sandbox.cluster import Sandbox

pytestmark = [pytest.mark.root, pytest.mark.slurm]

TASK = """
import os, sys, time
with open(sys.argv[1] + ".draft", "w") as file: file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".draft", sys.argv[1])
own = bytearray(b"x") * (60 << 20)
while time.process_time() < 0.5: pass
print(time.process_time())
"""


def test_the_totals_of_a_short_job_are_right_though_it_was_over_before_the_last_sample(tmp_path: Path) -> None:
    if not Path("/sys/fs/cgroup/cpuacct/cgroup.procs").exists():
        pytest.skip("no cgroup v1 cpuacct controller on this machine")
    sampler = Sampler(Metrics(root=str(tmp_path / "m"), period_s=0.1), "c1")
    thread = threading.Thread(target=sampler.run)
    thread.start()
    key = JobKey(cluster="k", job_id=1, submit_s=1)
    try:
        with Sandbox(nodes=1, guests=False, proctrack="cgroup") as box:
            words = ["srun", "--mem=200", sys.executable, "-c", TASK, str(tmp_path / "pid")]
            child = subprocess.Popen(words, env={**os.environ, **box.env}, stdout=subprocess.PIPE, text=True)
            pid = pid_of(tmp_path / "pid")
            groups = cgroup.of_process(pid)
            sampler.add(Job(key=key, state="running", user="root", uid=0, gid=0, cpus=1), pid=pid).result(timeout=30)
            out, _ = child.communicate(timeout=60)
            wait_for(lambda: not Path(groups.v1["freezer"]).exists())  # those that count are kept
            folder = sampler.remove(key).result(timeout=30)
            wait_for(lambda: not [where for where in groups.v1.values() if Path(where).exists()])
            assert box.run(["srun", "--mem=200", "true"]).returncode == 0
        found = Survey(folder.path / "samples.c1.seg", node="c1", view="host").summary
        folder.close()
    finally:
        sampler.stop()
        thread.join(timeout=30)
    assert found is not None
    assert found.cpu_s == pytest.approx(float(out), rel=0.05, abs=0.05)
    assert found.memory_limit_bytes == 200 * 2**20


def pid_of(path: Path) -> int:
    wait_for(path.exists)
    return int(path.read_text())


def wait_for(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.02)  # the fact is in another process
