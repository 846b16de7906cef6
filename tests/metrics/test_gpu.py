"""GPUs, on a machine without any: a library of our own answers in place of NVIDIA's (``nvml.c``), and no driver does.

What this shows is that we ask NVML rightly and take its failures well. It shows nothing of a real GPU.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from carrel.config import Guests
from carrel.core.report import report
from carrel.model.job import Job, JobKey
from carrel.model.sample import JobSummary, NodeSummary
from carrel.sampling import gpu
from carrel.sampling.cgroup import JobGroups
from carrel.sampling.tables import Survey

SAMPLED = """
import os, sys, threading, time
from carrel.config import Metrics
from carrel.model.job import Job, JobKey
from carrel.sampling import gpu
from carrel.sampling.loop import Sampler

root, gpus, seconds = sys.argv[1], tuple(map(int, sys.argv[2].split(","))) if sys.argv[2] else None, float(sys.argv[3])
sampler = Sampler(Metrics(root=root, period_s=0.05), "c1", sources=[])
sampler._gpus = watcher = gpu.Watcher(period_s=0.05)
thread = threading.Thread(target=sampler.run)
thread.start()
key = JobKey(cluster="k", job_id=1, submit_s=1)
job = Job(key=key, state="running", user="ann", uid=os.geteuid(), gid=os.getegid(), cpus=1, gpus=gpus)
sampler.add(job, pid=os.getpid()).result(timeout=30)
deadline_s = time.monotonic() + 60
while not watcher.look and not watcher.fault and not os.environ.get("STUB_HANGS") and time.monotonic() < deadline_s:
    time.sleep(0.01)
time.sleep(seconds)
folder = sampler.remove(key).result(timeout=30)
print(folder.path)
print(watcher.fault)
folder.close()
sampler.stop()
thread.join()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("nvml")
    words = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    source = Path(__file__).with_name("nvml.c")
    subprocess.run([*words, "-o", where / "libnvidia-ml.so.1", source], check=True, timeout=60)
    return where


def sampled(
    root: Path, library: Path | None, *, gpus: str = "3,2", seconds: float = 0.2, env: Mapping[str, str] | None = None
) -> tuple[Survey, str]:
    """Return what a sampler of another process recorded, and why it knew nothing of GPUs."""
    more = {"LD_LIBRARY_PATH": str(library)} if library else {}
    words = [sys.executable, "-c", SAMPLED, str(root), gpus, str(seconds)]
    clean = {"PATH": "/usr/bin:/bin", **more, **(env or {})}
    done = subprocess.run(words, env=clean, check=True, capture_output=True, text=True, timeout=60)
    folder, fault, *_ = [*done.stdout.split("\n"), ""]
    return Survey(Path(folder) / "samples.c1.seg", node="c1", view="host"), fault


def test_what_the_gpus_of_a_job_did_is_recorded_and_summed_up(tmp_path: Path, library: Path) -> None:
    survey, fault = sampled(tmp_path, library)
    assert fault == ""
    found = {name: value for name, (_, value) in survey.constants.items()}
    assert found["gpu.3.busy_percent"] == 50
    assert found["gpu.3.memory_used_bytes"] == 20 * 2**30
    assert found["gpu.2.memory_bytes"] == 80 * 2**30
    assert (found["gpu.3.power_mw"], found["gpu.2.power_mw"]) == (250_000, 60_000)
    assert found["gpu.3.sm_mhz"] == 1980
    # One that does not count its energy has no such metric; it is not 0.
    assert [one.name for one in survey.varying if one.name.startswith("gpu.")] == ["gpu.3.energy_mj"]
    assert "gpu.2.sm_mhz" not in found
    summary = survey.summary
    assert summary is not None
    assert (summary.gpus, summary.gpus_idle, summary.gpu_part) == (2, 1, 0.25)
    assert (summary.gpu_memory_peak_bytes, summary.gpu_memory_bytes) == (20 * 2**30, 80 * 2**30)
    assert summary.gpu_energy_j is None


def test_a_job_sees_its_own_gpus_alone(tmp_path: Path, library: Path) -> None:
    survey, _ = sampled(tmp_path, library, gpus="3")
    names = {name for name in (*survey.constants, *survey.units) if name.startswith("gpu.")}
    assert {name.split(".")[1] for name in names} == {"3"}
    summary = survey.summary
    assert summary is not None
    assert summary.gpu_energy_j is not None
    assert 0 < summary.gpu_energy_j <= 250 * (summary.last_s - summary.first_s + 0.2)


def test_where_slurm_was_not_asked_the_jobs_environment_tells(tmp_path: Path, library: Path) -> None:
    survey, _ = sampled(tmp_path, library, gpus="", env={"CUDA_VISIBLE_DEVICES": "GPU-10000000"})
    assert "gpu.2.busy_percent" in survey.constants
    assert "gpu.3.busy_percent" not in survey.constants


@pytest.mark.parametrize("env", [{"STUB_NO_DRIVER": "1"}, {}], ids=["no driver", "no library"])
def test_without_a_driver_there_are_no_such_metrics_and_no_error(
    tmp_path: Path, library: Path, env: dict[str, str]
) -> None:
    survey, fault = sampled(tmp_path, library if env else None, env=env)
    assert not [name for name in (*survey.constants, *survey.units) if name.startswith("gpu.")]
    assert survey.rows > 2
    assert "the NVIDIA driver does not answer" in fault


def test_a_driver_that_hangs_delays_no_sample(tmp_path: Path, library: Path) -> None:
    survey, _ = sampled(tmp_path, library, env={"STUB_HANGS": "1"})
    assert not [name for name in survey.constants if name.startswith("gpu.")]
    assert survey.rows > 2


def test_a_gpu_that_is_lost_is_absent_and_the_other_stays(tmp_path: Path, library: Path) -> None:
    survey, _ = sampled(tmp_path, library, env={"STUB_LOST": "1"})
    assert "gpu.2.busy_percent" in survey.constants
    assert "gpu.3.busy_percent" not in survey.constants


def test_slurms_word_counts_more_than_the_jobs(tmp_path: Path) -> None:
    proc = process(tmp_path, b"CUDA_VISIBLE_DEVICES=7\0")
    assert gpu.of_job((2, 3), JobGroups(), [1], proc=proc) == {2, 3}
    assert gpu.of_job((), JobGroups(), [1], proc=proc) == frozenset()


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (b"SLURM_JOB_GPUS=2,3\0CUDA_VISIBLE_DEVICES=0,1\0", {2, 3}),
        (b"SLURM_STEP_GPUS=3\0SLURM_JOB_GPUS=2,3\0", {3}),
        (b"CUDA_VISIBLE_DEVICES=GPU-12ab,GPU-34cd\0", {"GPU-12ab", "GPU-34cd"}),
        (b"CUDA_VISIBLE_DEVICES=NoDevFiles\0", set()),
        (b"CUDA_VISIBLE_DEVICES=\0HOME=/\xff\0", set()),
    ],
)
def test_an_environment_names_gpus(tmp_path: Path, environment: bytes, gpus: set[int | str]) -> None:
    assert gpu.of_job(None, JobGroups(), [1], proc=process(tmp_path, environment)) == gpus


@pytest.mark.parametrize(
    ("rules", "gpus"),
    [
        ("c 1:3 rwm\nc 195:0 rwm\nc 195:2 rw\nc 195:255 rwm\n", {0, 2}),
        ("a *:* rwm\n", {9}),
        ("c 195:* rwm\n", {9}),
        ("c 1:3 rwm\n", set()),
    ],
)
def test_a_control_group_that_lists_devices_tells_which_gpus(tmp_path: Path, rules: str, gpus: set[int]) -> None:
    """One that may open all tells nothing: then the environment does."""
    (tmp_path / "devices.list").write_text(rules)
    groups = JobGroups(v1={"devices": str(tmp_path)})
    proc = process(tmp_path, b"CUDA_VISIBLE_DEVICES=9\0")
    assert gpu.of_job(None, groups, [1], proc=proc) == gpus


def process(where: Path, environment: bytes) -> Path:
    (where / "proc" / "1").mkdir(parents=True)
    (where / "proc" / "1" / "environ").write_bytes(environment)
    return where / "proc"


NODE = NodeSummary(node="c1", view="host", first_s=0, last_s=100, samples=101, gpus=4, gpu_part=0.9)


def reported(**changes: object) -> tuple[tuple[str, str], ...]:
    node = msgspec.structs.replace(NODE, **changes)
    key = JobKey(cluster="k", job_id=1, submit_s=1)
    summary = JobSummary(run=str(key), job=Job(key=key, state="ended"), nodes=(node,), complete=True)
    return tuple((advice.text, advice.directive) for advice in report(summary, Guests()).advice)


def test_gpus_that_were_used_need_no_advice() -> None:
    assert reported() == ()


def test_gpus_that_were_never_busy_are_not_asked_for_again() -> None:
    ((text, line),) = reported(gpus_idle=1, gpu_part=0.6)
    assert (text, line) == ("1 of 4 GPUs was never busy", "#SBATCH --gpus-per-node=3")
    ((text, line),) = reported(gpus_idle=4, gpu_part=0.0)
    assert "leave out the line that asks for it" in text


def test_gpus_that_mostly_wait_are_told_without_a_line_that_would_not_help() -> None:
    ((text, line),) = reported(gpu_part=0.2)
    assert text.startswith("GPUs were busy 20% of the time")
    assert line == ""
