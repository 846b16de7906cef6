"""Arrays: how their tasks differ, which stand out, and advice that holds for all of them."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.cli import main
from carrel.cli.report import array_lines
from carrel.config import Guests
from carrel.core.arrays import ArrayReport, Spread, array_report
from carrel.model.job import Job, JobKey
from carrel.model.sample import JobSummary, NodeSummary
from carrel.sampling import finding
from carrel.testing import samples

MIB = 2**20
NODE = NodeSummary(
    node="c1",
    view="host",
    first_s=0,
    last_s=100,
    samples=101,
    cpus=2,
    cpu_s=190,
    cpu_peak=2.0,
    memory_limit_bytes=1024 * MIB,
    memory_peak_bytes=600 * MIB,
)
OWNER: dict[str, Any] = {"uid": os.geteuid(), "gid": os.getegid()}


def task(number: int, *, complete: bool = True, limit_s: int = 150, **changes: Any) -> JobSummary:
    key = JobKey(cluster="k", job_id=100 + number, submit_s=1)
    job = Job(key=key, state="ended", name="sweep", array_job_id=99, array_task_id=number, time_limit_s=limit_s)
    node = msgspec.structs.replace(NODE, **changes)
    return JobSummary(run=str(key), job=job, nodes=(node,), complete=complete)


def made(*tasks: JobSummary) -> ArrayReport:
    return array_report(99, tasks, Guests())


def told(found: ArrayReport) -> list[tuple[str, str]]:
    return [(advice.text, advice.directive) for advice in found.advice]


def test_figures_are_spread_over_the_tasks_for_which_they_are_known() -> None:
    found = made(*(task(n, memory_peak_bytes=n * 100 * MIB) for n in range(1, 6)), task(6, memory_peak_bytes=None))
    hundred = 100 * MIB
    assert found.memory_peak_bytes == Spread(
        least=hundred, quarter=2 * hundred, median=3 * hundred, three_quarters=4 * hundred, most=5 * hundred
    )
    assert (found.tasks, found.running, found.cpu_s) == (6, 0, 6 * 190)


def test_an_array_that_used_what_it_asked_for_gets_no_advice() -> None:
    assert told(made(*(task(n) for n in range(5)))) == []


def test_memory_and_time_follow_the_task_that_needed_most() -> None:
    found = made(*(task(n, memory_peak_bytes=100 * MIB) for n in range(5)), task(7, memory_peak_bytes=300 * MIB))
    assert told(found) == [("task 7: at most 29% of the memory of a node was used", "#SBATCH --mem=384M")]
    found = made(*(task(n, limit_s=7200) for n in range(5)), task(8, limit_s=7200, last_s=1000, cpu_s=1900))
    assert told(found) == [
        ("task 8: 14% of the time limit was used: a shorter job starts sooner", "#SBATCH --time=00:22:00")
    ]


def test_a_task_that_was_killed_asks_for_more_though_all_others_need_little() -> None:
    found = made(*(task(n, memory_peak_bytes=50 * MIB) for n in range(5)), task(3, oom_kills=2))
    assert ("task 3: 2 processes were killed for memory", "#SBATCH --mem=1536M") in told(found)
    assert found.worst[0].why == "2 processes killed for memory"


def test_cpus_that_no_task_needed_are_not_asked_for_again_and_one_that_did_keeps_them() -> None:
    idle = [task(n, cpus=4, cpu_s=100, cpu_peak=1.0 + n / 10) for n in range(5)]
    assert told(made(*idle)) == [("no task kept more than 2 of 4 CPUs busy", "#SBATCH --cpus-per-task=2")]
    assert told(made(*idle, task(6, cpus=4, cpu_s=390, cpu_peak=4.0))) == []


def test_tasks_that_stand_out_are_named_once_with_the_gravest_reason() -> None:
    found = made(
        *(task(n) for n in range(10)),
        task(20, memory_peak_bytes=1000 * MIB, last_s=250, cpu_s=475),
        task(21, cpu_s=2),
        task(22, cpu_s=4, complete=False),
    )
    assert [(one.task_id, one.why) for one in found.worst] == [
        (20, "2.5 times the time of the median task"),
        (21, "used 1% of its CPU time"),
    ]
    assert found.running == 1


def test_of_few_tasks_none_stands_out() -> None:
    assert made(task(1), task(2, memory_peak_bytes=MIB), task(3, last_s=900)).worst == ()


def test_many_tasks_of_seconds_are_better_put_together() -> None:
    found = made(*(task(n, last_s=4, cpu_s=7) for n in range(6)))
    assert told(found)[-1] == (
        "the median task takes 4 s: starting one costs Slurm as much; can each do the work of several?",
        "",
    )


def test_the_report_of_an_array_reads_like_this() -> None:
    few = [task(n, memory_peak_bytes=n * 10 * MIB) for n in range(1, 5)]
    found = made(*few, task(9, memory_peak_bytes=300 * MIB))
    assert "\n".join(array_lines(found)) == (
        "array 99 sweep: 5 tasks\n"
        "\n"
        "             least       25%    median       75%      most\n"
        "  CPU          95%       95%       95%       95%       95%\n"
        "  memory       10M       20M       30M       40M      300M\n"
        "  time    1:40 min  1:40 min  1:40 min  1:40 min  1:40 min\n"
        "\n"
        "  limits of a task: memory 1G, time 2:30 min\n"
        "\n"
        "  tasks that stand out:\n"
        "    99_9 (job 109): 10.0 times the memory of the median task (1:40 min, CPU 95%, 300M)\n"
        "\n"
        "next time: task 9: at most 29% of the memory of a node was used\n"
        "    #SBATCH --mem=384M"
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "carrel.toml").write_text(f'[metrics]\nroot = "{tmp_path}/m"\n[slurm]\nbin_dir = "{tmp_path}"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "carrel.toml"))
    return tmp_path / "m"


def record(root: Path, job_id: int, number: int, *, formats: tuple[str, ...] = ("csv",), restart: int = 0) -> Path:
    of = samples.job(job_id, array_job_id=99, array_task_id=number)
    of = msgspec.structs.replace(of, key=msgspec.structs.replace(of.key, restart=restart))
    return samples.record(root, of, samples.steady(), formats=formats, seconds=range(3), **OWNER)


def test_tasks_are_found_whether_they_run_or_have_ended_and_the_latest_run_of_each(root: Path) -> None:
    record(root, 99, 3)
    record(root, 100, 1)
    again = record(root, 100, 1, formats=(), restart=1)
    samples.record(root, samples.job(101), samples.steady(), **OWNER)
    assert {number: path.name for number, path in finding.tasks(root, 99).items()} == {1: again.name, 3: "99"}
    assert finding.task(root, 99, 1) == again


def test_an_array_whose_last_task_has_not_begun_is_found_by_its_others(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(root, 100, 1)
    assert main.run(["job", "report", "99"]) == 0
    assert capsys.readouterr().out.startswith("array 99 solve: 1 task\n")


def test_a_task_is_called_as_slurm_calls_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(root, 99, 3)
    assert main.run(["job", "report", "99_3"]) == 0
    assert capsys.readouterr().out.startswith("job 99 solve: ")
    assert main.run(["job", "report", "99_4"]) == 3
    assert capsys.readouterr().err == ("carrel: no samples of task 4 of job 99 that you may read; there are: 3\n")
    assert main.run(["job", "report", "99;x"]) == 2
