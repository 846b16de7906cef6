"""The pure part: when to sample, what to leave out, what was used, what to keep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.core import schedule
from carrel.core.retention import Kept, doomed
from carrel.core.usage import Usage, wanted
from carrel.model.job import Job, JobKey
from carrel.model.sample import NodeSummary, Note

SECOND_US = 1_000_000
TIMES = st.integers(0, 2**52)
INTERVALS = st.integers(50_000, 3_600_000_000)


@given(now=TIMES, interval=INTERVALS)
def test_a_sample_is_due_at_the_next_multiple_of_the_interval(now: int, interval: int) -> None:
    due = schedule.next_due_us(now, interval)
    assert due % interval == 0
    assert now < due <= now + interval


@given(now=TIMES, late=st.integers(0, 10**9), interval=INTERVALS)
def test_missed_samples_are_those_that_would_have_fitted(now: int, late: int, interval: int) -> None:
    assert schedule.missed(now, now + late, interval) == late // interval


@given(now=TIMES, old=INTERVALS, new=INTERVALS)
def test_after_a_change_the_next_sample_is_late_by_neither_interval(now: int, old: int, new: int) -> None:
    due = schedule.due_after_change_us(schedule.next_due_us(now, old), now, new)
    assert now < due <= now + min(old, new)


def test_the_interval_of_a_job_is_what_its_user_chose_as_far_as_the_site_allows() -> None:
    chosen = (None, 0.1, 1.0, 5.0, 60.0, 61.0)
    assert [schedule.allowed_s(each, 1.0, 60.0) for each in chosen] == [None, 1.0, 1.0, 5.0, 60.0, 60.0]


def test_a_source_takes_its_cost_over_the_time_between_two_readings() -> None:
    costs = {"each": 1e6, "second": 1e6, "slow": 1e6}
    taken = schedule.load(costs, {"second": 2, "slow": 2}, interval_s=0.5, periods_s={"slow": 4.0})
    assert taken == {"each": 2.0, "second": 1.0, "slow": 0.25}


def test_within_the_budget_nothing_is_left_out() -> None:
    assert schedule.stretched({"a": 100}, {}, interval_s=1, periods_s={}, budget=0.01) == {}
    assert schedule.stretched({"a": 10_000}, {}, interval_s=1, periods_s={}, budget=0.01) == {}
    assert schedule.stretched({"a": 100}, {"a": 1}, interval_s=1, periods_s={}, budget=0.01) == {}


def test_beyond_the_budget_the_dearest_is_read_half_as_often() -> None:
    found = schedule.stretched({"a": 9_000, "b": 2_000}, {}, interval_s=1, periods_s={}, budget=0.01)
    assert found == {"a": 2}
    assert schedule.stretched({"a": 10**6}, {}, interval_s=0.25, periods_s={}, budget=0.01) == {"a": 2}


def test_a_source_with_a_long_period_is_dear_only_by_what_it_takes_in_it() -> None:
    costs = {"slow": 100_000, "fast": 9_000}
    found = schedule.stretched(costs, {}, interval_s=1, periods_s={"slow": 60}, budget=0.01)
    assert found == {"fast": 2}


def test_a_stretch_begins_where_it_saves_something() -> None:
    found = schedule.stretched({"slow": 10**6}, {}, interval_s=1, periods_s={"slow": 10}, budget=0.01)
    assert found == {"slow": 16}
    assert schedule.stretched({"slow": 10**6}, {}, interval_s=1, periods_s={"slow": 8}, budget=0.01) == {"slow": 16}
    assert schedule.stretched({"slow": 10**9}, {}, interval_s=1, periods_s={"slow": 99}, budget=0.01) == {"slow": 64}


def test_a_stretch_has_an_end() -> None:
    found = schedule.stretched({"a": 10**9}, {"a": 64}, interval_s=1, periods_s={}, budget=0.01)
    assert found == {"a": 64}
    found = schedule.stretched({"a": 10**9, "b": 10**6}, {"a": 64}, interval_s=1, periods_s={}, budget=0.01)
    assert found == {"a": 64, "b": 2}


def test_well_within_the_budget_it_is_read_more_often_again() -> None:
    assert schedule.stretched({"a": 100}, {"a": 4}, interval_s=1, periods_s={}, budget=0.01) == {"a": 2}
    assert schedule.stretched({"a": 100}, {"a": 2}, interval_s=1, periods_s={}, budget=0.01) == {}


def test_what_would_exceed_the_budget_again_stays_stretched() -> None:
    for cost_us in (9_000, 5_000):
        assert schedule.stretched({"a": cost_us}, {"a": 2}, interval_s=1, periods_s={}, budget=0.01) == {"a": 2}


def test_the_source_that_was_stretched_most_is_read_more_often_first() -> None:
    for stretches in ({"a": 2, "b": 8}, {"b": 8, "a": 2}):
        found = schedule.stretched({"a": 100, "b": 100}, stretches, interval_s=1, periods_s={}, budget=0.01)
        assert found == {"a": 2, "b": 4}


@given(
    costs=st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), min_size=1),
    interval_s=st.floats(0.05, 60),
    budget=st.floats(0.001, 0.5),
)
def test_the_governor_comes_to_rest(costs: dict[str, float], interval_s: float, budget: float) -> None:
    stretches: dict[str, int] = {}
    for _ in range(100):
        stretches = schedule.stretched(costs, stretches, interval_s=interval_s, periods_s={}, budget=budget)
    again = schedule.stretched(costs, stretches, interval_s=interval_s, periods_s={}, budget=budget)
    assert again == stretches
    taken = sum(schedule.load(costs, stretches, interval_s=interval_s, periods_s={}).values())
    assert taken <= budget or all(stretches.get(name, 1) == schedule.STRETCH_MAX for name in costs)


JOB = Job(key=JobKey(cluster="k", job_id=7, submit_s=1), state="running", cpus=4, memory_bytes=2**30)


def used(*rows: tuple[float, dict[str, float]], notes: tuple[Note, ...] = ()) -> NodeSummary:
    usage = Usage("c1", "host")
    usage.note(Note(time_us=1, what="start", text="", job=JOB))
    for note in notes:
        usage.note(note)
    for second, values in rows:
        usage.row(round(second * SECOND_US), values)
    found = usage.summary()
    assert found is not None
    return found


def test_without_a_row_there_is_no_summary() -> None:
    assert Usage("c1", "host").summary() is None


def test_cpu_time_is_the_counter_and_its_peak_the_steepest_rise() -> None:
    found = used((10, {"job.cpu_ns": 0}), (11, {"job.cpu_ns": 5e8}), (12, {"job.cpu_ns": 25e8}))
    assert (found.cpu_s, found.cpu_peak, found.samples) == (2.5, 2.0, 3)


def test_two_samples_that_almost_coincide_make_no_peak() -> None:
    found = used((10, {"job.cpu_ns": 0}), (11, {"job.cpu_ns": 1e9}), (11.001, {"job.cpu_ns": 1.1e9}))
    assert found.cpu_peak == pytest.approx(1.0)


def test_memory_peaks_include_shared_memory_and_the_mean_is_over_time() -> None:
    found = used(
        (10, {"job.memory_used_bytes": 0}), (11, {"job.memory_used_bytes": 100}), (14, {"job.memory_used_bytes": 100})
    )
    assert (found.memory_peak_bytes, found.memory_mean_bytes) == (100, 88)


def test_a_limit_of_the_group_is_better_known_than_slurms() -> None:
    assert used((1, {})).memory_limit_bytes == 2**30
    assert used((1, {"job.memory_limit_bytes": 5})).memory_limit_bytes == 5


def test_what_was_not_measured_is_absent_and_not_zero() -> None:
    found = used((10, {}))
    absent = (
        found.cpu_s,
        found.cpu_peak,
        found.memory_peak_bytes,
        found.read_bytes,
        found.oom_kills,
        found.throttled_s,
    )
    assert absent == (None,) * 6


def test_without_groups_the_processes_count() -> None:
    found = used((10, {"processes.cpu_ns": 0, "processes.resident_bytes": 7}), (11, {"processes.cpu_ns": 3e9}))
    assert (found.cpu_s, found.memory_peak_bytes) == (3.0, 7)


def test_of_two_accounts_of_what_was_written_the_larger_counts() -> None:
    found = used((10, {"processes.written_bytes": 100, "job.device_write_bytes": 30}))
    assert found.written_bytes == 100


def test_what_a_guest_used_before_its_job_began_is_not_the_jobs_also_after_a_restart_of_the_sampler() -> None:
    older = Note(time_us=1, what="older", text="")
    rows = ((10, {"job.cpu_ns": 5e9}), (11, {"job.cpu_ns": 6e9}), (12, {"job.cpu_ns": 8e9}))
    assert used(*rows, notes=(older, older)).cpu_s == 3.0
    assert used(*rows).cpu_s == 8.0


def test_a_job_that_has_a_group_is_summed_up_by_it_and_the_rest_by_its_processes() -> None:
    rows = (
        ("job.cpu_ns", 1e9, 3e9),
        ("job.cpu_system_ns", 1e8, 4e8),
        ("job.throttled_ns", 0, 5e8),
        ("job.oom_kills", 0, 2),
        ("job.device_read_bytes", 10, 30),
        ("job.device_write_bytes", 20, 40),
        ("processes.cpu_ns", 7e9, 8e9),
        ("processes.system_ns", 7e9, 8e9),
        ("processes.io_wait_ns", 1e9, 2e9),
        ("processes.read_bytes", 5, 50),
        ("processes.written_bytes", 6, 60),
        ("job.memory_used_bytes", 100, 50),
        ("job.memory_peak_bytes", 900, 950),
        ("job.memory_limit_bytes", 1000, 1000),
        ("processes.processes", 9, 4),
        ("processes.resident_bytes", 7000, 1),
    )
    first, second = {name: was for name, was, _ in rows}, {name: then for name, _, then in rows}
    assert used((10, first), (12, second)) == NodeSummary(
        node="c1",
        view="host",
        first_s=10,
        last_s=12,
        samples=2,
        cpus=4,
        memory_limit_bytes=1000,
        cpu_s=3,
        cpu_system_s=0.4,
        cpu_peak=1,
        memory_peak_bytes=100,
        memory_mean_bytes=75,
        memory_cached_peak_bytes=950,
        read_bytes=50,
        written_bytes=60,
        io_wait_s=2,
        throttled_s=0.5,
        oom_kills=2,
        processes_peak=9,
    )
    assert all(wanted(name) for name in (*first, "gpu.0.busy_percent"))
    assert not wanted("job.unheard_of")


def test_without_a_group_all_is_of_the_processes() -> None:
    found = used((10, {"processes.system_ns": 5e8, "processes.read_bytes": 3}))
    assert (found.cpu_system_s, found.read_bytes, found.written_bytes) == (0.5, 3, None)


def test_the_mean_of_memory_leaves_out_the_time_in_which_nobody_looked() -> None:
    some, none = {"job.memory_used_bytes": 100.0}, dict[str, float]()
    found = used((1, some), (2, some), (3, none), (100, {"job.memory_used_bytes": 0.0}), (101, some))
    assert found.memory_mean_bytes == 75


def test_a_counter_that_began_anew_takes_nothing_back() -> None:
    found = used((10, {"job.cpu_ns": 5e9}), (11, {"job.cpu_ns": 1e9}), (12, {"job.cpu_ns": 2e9}))
    assert (found.cpu_s, found.cpu_peak) == (5.0, 1.0)


def test_a_peak_is_over_a_tenth_of_a_second_at_least() -> None:
    found = used((10, {"job.cpu_ns": 0}), (10.1, {"job.cpu_ns": 2e8}))
    assert found.cpu_peak == pytest.approx(2.0)


def test_each_gpu_is_busy_for_its_own_time_and_the_fullest_one_is_named() -> None:
    def gpus(*words: tuple[str, float]) -> dict[str, float]:
        return {f"gpu.{name}": value for name, value in words}

    same = (("0.memory_bytes", 80.0), ("1.memory_bytes", 40.0), ("1.busy_percent", 0.0))
    found = used(
        (0, gpus(*same, ("0.busy_percent", 100.0), ("0.memory_used_bytes", 30.0), ("0.energy_mj", 1000.0))),
        (1, gpus(*same, ("0.busy_percent", 50.0), ("0.memory_used_bytes", 20.0), ("0.energy_mj", 3000.0))),
        (3, gpus(*same, ("0.busy_percent", 0.0), ("1.memory_used_bytes", 25.0), ("1.energy_mj", 5.0))),
    )
    assert (found.gpus, found.gpus_idle) == (2, 1)
    assert found.gpu_part == pytest.approx((0.75 * 1 + 0.25 * 2) / 3 / 2, abs=1e-6)
    assert (found.gpu_memory_peak_bytes, found.gpu_memory_bytes, found.gpu_energy_j) == (30, 80, 2.0)


def test_of_gpus_that_say_little_little_is_known() -> None:
    found = used((1, {"gpu.0.energy_mj": 1.0, "gpu.1.memory_used_bytes": 0.0}), (2, {"gpu.0.energy_mj": 3001.0}))
    assert (found.gpus, found.gpus_idle, found.gpu_part) == (2, 0, None)
    assert (found.gpu_memory_peak_bytes, found.gpu_memory_bytes, found.gpu_energy_j) == (None, None, None)
    assert used((1, {})).gpus == 0


def test_what_nobody_said_of_a_job_is_not_known() -> None:
    usage = Usage("c1", "guest")
    usage.row(SECOND_US, {})
    found = usage.summary()
    assert found is not None
    assert (found.view, found.cpus, found.memory_limit_bytes, found.gap_s) == ("guest", 0, 0, 0)


def test_gaps_are_summed() -> None:
    gap = Note(time_us=5 * SECOND_US, what="gap", text="", from_us=2 * SECOND_US)
    assert used((1, {}), notes=(gap, gap)).gap_s == 6.0
    other = (Note(time_us=9, what="gap", text=""), Note(time_us=9, what="interval", text="", from_us=1))
    assert used((1, {}), notes=other).gap_s == 0.0


def test_a_job_that_began_again_has_not_ended() -> None:
    usage = Usage("c1", "host")
    usage.note(Note(time_us=1, what="end", text=""))
    usage.note(Note(time_us=1, what="gap", text=""))
    assert usage.ended
    usage.note(Note(time_us=2, what="start", text=""))
    assert not usage.ended


def kept(name: str, ended_s: float, size: int = 10, *, user: str = "ann", finished: bool = True) -> Kept:
    return Kept(user=user, name=name, ended_s=ended_s, size_bytes=size, finished=finished)


def names(found: tuple[Kept, ...]) -> list[str]:
    return [one.name for one in found]


def test_what_is_too_old_goes_and_the_rest_stays() -> None:
    all_ = [kept("old", 0), kept("edge", 100), kept("new", 199)]
    assert names(doomed(all_, now_s=200, keep_s=100, user_bytes_max=0)) == ["old"]


def test_beyond_a_users_room_the_oldest_go_until_it_fits() -> None:
    all_ = [kept("3", 3), kept("1", 1), kept("2", 2), kept("other", 0, 1000, user="bob")]
    assert names(doomed(all_, now_s=9, keep_s=0, user_bytes_max=1000)) == []
    assert names(doomed(all_[:3], now_s=9, keep_s=0, user_bytes_max=20)) == ["1"]
    assert names(doomed(all_[:3], now_s=9, keep_s=0, user_bytes_max=19)) == ["1", "2"]


def test_what_goes_goes_oldest_first_whoever_owns_it_and_by_name_where_it_is_equally_old() -> None:
    all_ = [kept("a", 3), kept("c", 1), kept("b", 1), kept("z", 2, user="bob"), kept("b", 1, user="bob")]
    found = doomed(all_, now_s=9, keep_s=1, user_bytes_max=0)
    assert [(one.user, one.name) for one in found] == [
        ("ann", "b"),
        ("ann", "c"),
        ("bob", "b"),
        ("bob", "z"),
        ("ann", "a"),
    ]
    assert names(doomed(all_[:3], now_s=9, keep_s=0, user_bytes_max=20)) == ["b"]
    assert names(doomed(all_[:3], now_s=9, keep_s=0, user_bytes_max=1)) == ["b", "c", "a"]


def test_what_is_being_sampled_stays_however_large() -> None:
    assert doomed([kept("runs", 0, 10**9, finished=False)], now_s=10**9, keep_s=1, user_bytes_max=1) == ()


def test_without_limits_nothing_goes() -> None:
    assert doomed([kept("old", 0, 10**12)], now_s=10**9, keep_s=0, user_bytes_max=0) == ()
