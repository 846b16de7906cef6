"""The report: right sums over nodes, and advice that fits what was seen."""

from typing import Any

import msgspec
import pytest

from carrel.cli.report import lines
from carrel.config import Guests
from carrel.core.report import Report, report
from carrel.model.job import Job, JobKey
from carrel.model.sample import JobSummary, NodeSummary

GIB = 2**30
GUESTS = Guests(memory_reserve_bytes=160 * 2**20, memory_min_bytes=160 * 2**20)
NODE = NodeSummary(
    node="c1",
    view="host",
    first_s=1000,
    last_s=1100,
    samples=101,
    cpus=4,
    memory_limit_bytes=GIB,
    cpu_s=380,
    cpu_peak=4.0,
    memory_peak_bytes=700 * 2**20,
    read_bytes=0,
    written_bytes=200 * 2**20,
    io_wait_s=0,
)


def node(name: str = "c1", **changes: Any) -> NodeSummary:
    return msgspec.structs.replace(NODE, node=name, **changes)


def made(*nodes: NodeSummary, limit_s: int | None = 150, complete: bool = True) -> Report:
    key = JobKey(cluster="k", job_id=7, submit_s=1)
    job = Job(key=key, state="ended", user="ann", name="solve", time_limit_s=limit_s)
    return report(JobSummary(run=str(key), job=job, nodes=nodes or (NODE,), complete=complete), GUESTS)


def directives(found: Report) -> list[str]:
    return [advice.directive for advice in found.advice if advice.directive]


def test_a_job_that_used_what_it_asked_for_gets_no_advice() -> None:
    assert made().advice == ()


def test_efficiencies_are_over_all_nodes_and_memory_is_per_node() -> None:
    found = made(node("c1"), node("c2", cpu_s=300, memory_peak_bytes=900 * 2**20), node("c3", memory_peak_bytes=2**20))
    assert found.cpu_part == pytest.approx((380 + 300 + 380) / 1200)
    assert found.memory_peak_bytes == 900 * 2**20
    assert found.memory_part == pytest.approx((700 + 900 + 1) / 3072)
    assert found.written_bytes == 600 * 2**20
    assert found.cpus == 12


def test_a_sum_with_a_node_missing_is_unknown_and_not_too_small() -> None:
    found = made(node("c1"), node("c2", cpu_s=None, written_bytes=None))
    assert (found.cpu_s, found.cpu_part, found.written_bytes, found.imbalance) == (None, None, None, None)


def test_a_guest_seen_from_inside_is_not_counted_twice() -> None:
    found = made(node("c1"), node("c1", view="guest", cpu_s=100))
    assert (found.cpu_s, len(found.nodes)) == (380, 1)


def test_idle_cpus_are_not_asked_for_again() -> None:
    assert directives(made(node(cpu_s=100, cpu_peak=1.02))) == ["#SBATCH --cpus-per-task=1"]
    assert directives(made(node(cpu_s=150, cpu_peak=1.6))) == ["#SBATCH --cpus-per-task=2"]


def test_cpus_that_were_all_needed_for_a_moment_are_kept() -> None:
    found = made(node(cpu_s=100, cpu_peak=3.98))
    assert directives(found) == []
    assert "25% of the CPU time" in found.advice[0].text


def test_nodes_that_did_nothing_are_named() -> None:
    found = made(node("c1"), node("c2", cpu_s=1), node("c3"))
    assert directives(found) == ["#SBATCH --nodes=2"]
    assert "c2" in found.advice[0].text


def test_of_a_short_job_nothing_is_said_about_cpus() -> None:
    assert directives(made(node(last_s=1020, cpu_s=1, cpu_peak=1), limit_s=None)) == []


def test_memory_that_was_never_used_is_not_asked_for_again() -> None:
    assert directives(made(node(memory_peak_bytes=100 * 2**20))) == ["#SBATCH --mem=128M"]


@pytest.mark.parametrize(
    ("used_mib", "guests", "line"),
    [(141, ("c1",), "384M"), (20, ("c1",), "320M"), (141, ("c1:0.0", "c1:0.1"), "640M")],
)
def test_a_job_in_a_guest_is_told_to_leave_room_for_its_emulator(
    used_mib: int, guests: tuple[str, ...], line: str
) -> None:
    inside = (node(name, view="guest") for name in guests)
    found = made(node(memory_peak_bytes=used_mib * 2**20), *inside)
    assert directives(found) == [f"#SBATCH --mem={line}"]


def test_a_job_whose_guest_would_not_boot_with_less_is_not_told_to_ask_for_less() -> None:
    small = node(memory_limit_bytes=320 * 2**20, memory_peak_bytes=100 * 2**20)
    assert made(small, node("c1", view="guest")).advice == ()


def test_a_small_limit_is_not_made_smaller_than_makes_sense() -> None:
    assert made(node(memory_limit_bytes=64 * 2**20, memory_peak_bytes=2**20)).advice == ()


def test_tight_memory_and_kills_ask_for_more() -> None:
    assert directives(made(node(memory_peak_bytes=1000 * 2**20))) == ["#SBATCH --mem=1280M"]
    assert directives(made(node(oom_kills=2, memory_peak_bytes=GIB))) == ["#SBATCH --mem=1536M"]


def test_the_time_limit_is_judged_when_the_job_has_ended() -> None:
    assert directives(made(limit_s=7200)) == ["#SBATCH --time=00:05:00"]
    assert directives(made(limit_s=7200, complete=False)) == []
    assert directives(made(node(last_s=1000 + 7000, cpu_s=4 * 7000), limit_s=7200)) == ["#SBATCH --time=02:32:00"]


def test_a_limit_of_days_is_written_as_slurm_reads_it() -> None:
    long = node(last_s=1000 + 90_000, cpu_s=4 * 90_000)
    assert directives(made(long, limit_s=90_100)) == ["#SBATCH --time=1-08:30:00"]


def test_uneven_work_and_waiting_are_told_without_a_line_that_would_not_help() -> None:
    uneven = made(node("c1", cpu_s=400), node("c2", cpu_s=100), node("c3", cpu_s=100))
    assert [a.text for a in uneven.advice if "node c1 used 2.0 times" in a.text]
    waiting = made(node(io_wait_s=50))
    assert "waited 50 s for disks" in waiting.advice[-1].text


def test_a_job_with_nothing_but_the_nodes_numbers_has_a_report() -> None:
    bare = NodeSummary(node="c1", view="host", first_s=1, last_s=3, samples=3)
    found = made(bare)
    assert (found.elapsed_s, found.cpu_part, found.memory_part, found.advice) == (2, None, None, ())
    assert "\n".join(lines(found)).startswith("job 7 solve: 2.0 s on 1 node")


def test_the_report_reads_like_this() -> None:
    shown = "\n".join(lines(made(node("c1", cpu_s=100, cpu_peak=1, gap_s=12), limit_s=7200)))
    assert shown == (
        "job 7 solve: 1:40 min on 1 node\n"
        "\n"
        "  CPU           25%  1:40 min of CPU time on 4 CPUs\n"
        "  memory        68%  700M of 1G at most\n"
        "  time limit     1%  1:40 min of 2:00 h\n"
        "  disk               0B read, 200M written\n"
        "  unseen             12.0 s without samples; see job.json\n"
        "\n"
        "next time: 25% of the CPU time was used, never more than 1 at once\n"
        "    #SBATCH --cpus-per-task=1\n"
        "\n"
        "next time: 1% of the time limit was used: a shorter job starts sooner\n"
        "    #SBATCH --time=00:05:00"
    )


def test_several_nodes_are_told_apart() -> None:
    shown = list(lines(made(node("c1"), node("c2", memory_peak_bytes=None))))
    assert [line.split() for line in shown if line.startswith("  c")] == [
        ["c1", "95%", "700M", "of", "1G", "200M"],
        ["c2", "95%", "?", "200M"],
    ]
