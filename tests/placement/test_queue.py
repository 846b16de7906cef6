"""Which waiting job is launched next, and what each result leads to."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.config import Launches, Rate
from carrel.core.pacing import Pace
from carrel.core.placement import Hosts
from carrel.core.queue import Cancel, Hold, Launch, Outcome, Queue, Release, Result, Retry, Wait, Waiting
from carrel.errors import UnreachableError
from carrel.model.guest import Clone
from carrel.model.host import Answer, Demand, Here, Host

ONE = Demand(cpus=1, memory_bytes=1)
FAST = Launches(rate=Rate(instant=1000, linked=1000, full=1000))


def job(key: str, *, since_s: float = 0.0, demand: Demand = ONE, clone: Clone = "instant", image: str = "i") -> Waiting:
    return Waiting(key=key, clone=clone, image=image, demand=demand, since_s=since_s)


def site(*sizes: int) -> Hosts:
    return Hosts([Host(name=f"h{number}", cpus=cpus, memory_bytes=100) for number, cpus in enumerate(sizes)])


def into(hosts: Hosts) -> Callable[[Waiting, frozenset[str]], Answer]:
    return lambda waiting, without: hosts.admit(waiting.demand, without=without)


def begun(queue: Queue, hosts: Hosts, now_s: float = 0.0) -> list[str]:
    found = list(queue.launches(now_s, into(hosts)))
    assert all(isinstance(one, Launch) for one in found)
    return [one.waiting.key for one in found if isinstance(one, Launch)]


def queue_of(*jobs: Waiting, settings: Launches = FAST) -> Queue:
    queue = Queue(settings)
    for one in jobs:
        queue.add(one)
    return queue


def end(hosts: Hosts, launch_hosts: tuple[str, ...], demand: Demand = ONE) -> None:
    hosts.give_back(Here(launch_hosts), demand)


def test_jobs_are_launched_in_the_order_in_which_they_came() -> None:
    queue = queue_of(job("c", since_s=3), job("a", since_s=1), job("b", since_s=2, image="other"))
    assert begun(queue, site(9)) == ["a", "b", "c"]


def test_a_job_that_finds_no_room_is_passed_by_a_smaller_one_and_says_why_it_waits() -> None:
    queue = queue_of(job("big", since_s=1, demand=Demand(cpus=4, memory_bytes=1)), job("small", since_s=2))
    hosts = site(4)
    hosts.take("h0", cpus=2, memory_bytes=1)
    assert begun(queue, hosts) == ["small"]
    assert queue.reason("big") == "no room for 4 CPUs and 0 MiB on the hosts now"
    assert queue.reason("small") == ""


def test_a_question_that_found_no_answer_costs_no_job_its_place() -> None:
    queue = queue_of(job("a", since_s=1), job("b", since_s=2, image="other"))

    def locked(_waiting: Waiting, _without: frozenset[str]) -> Answer:
        raise UnreachableError("the table is locked")

    for _ in range(2):
        with pytest.raises(UnreachableError):
            list(queue.launches(0.0, locked))
    assert begun(queue, site(9)) == ["a", "b"]


def test_a_job_whose_patience_ended_is_not_passed_any_more() -> None:
    queue = queue_of(job("big", demand=Demand(cpus=4, memory_bytes=1)), job("small", since_s=1))
    hosts = site(4)
    hosts.take("h0", cpus=2, memory_bytes=1)
    assert begun(queue, hosts, now_s=FAST.patience_s) == []
    queue.add(job("other", since_s=2, image="other"))
    assert begun(queue, hosts, now_s=FAST.patience_s) == []
    hosts.take("h0", cpus=-2, memory_bytes=-1)
    queue.freed()
    assert begun(queue, hosts, now_s=FAST.patience_s) == ["big"]


def test_an_impatient_job_that_leaves_keeps_nobody_waiting() -> None:
    queue = queue_of(job("big", demand=Demand(cpus=4, memory_bytes=1)), job("small", since_s=1))
    hosts = site(4)
    hosts.take("h0", cpus=2, memory_bytes=1)
    assert begun(queue, hosts, now_s=FAST.patience_s) == []
    queue.remove("big")
    assert begun(queue, hosts, now_s=FAST.patience_s) == ["small"]


def test_a_job_that_waits_for_a_host_to_come_back_stops_nobody() -> None:
    queue = queue_of(job("big", demand=Demand(cpus=4, memory_bytes=1)), job("small", since_s=1))
    hosts = site(4, 2)
    hosts.set_state("h0", "drained", "new disks")
    assert begun(queue, hosts, now_s=FAST.patience_s) == ["small"]


def test_a_job_larger_than_any_host_is_cancelled_with_a_sentence() -> None:
    queue = queue_of(job("a", demand=Demand(cpus=5, memory_bytes=1)))
    assert list(queue.launches(0.0, into(site(4)))) == [
        Cancel("a", "5 CPUs and 0 MiB fit no host; the largest gives a guest 4 CPUs and 0 MiB")
    ]
    assert "a" not in queue


def test_thirty_jobs_and_a_limit_of_ten_a_minute_are_ten_launches_in_each_of_three_minutes() -> None:
    queue = queue_of(
        *(job(f"j{number}", since_s=number, clone="full") for number in range(30)),
        job("quick", since_s=99, clone="instant"),
        settings=Launches(rate=Rate(full=10)),
    )
    hosts, now_s, counts = site(99), 0.0, []
    while len(queue):
        counts.append((now_s, len(begun(queue, hosts, now_s))))
        wake_s = queue.wake_s()
        now_s = now_s if wake_s is None else wake_s
    assert counts == [(0.0, 11), (60.0, 10), (120.0, 10)]


def test_a_job_of_more_guests_than_the_limit_waits_for_a_quiet_window_and_not_for_ever() -> None:
    wide = job("wide", since_s=1, demand=Demand(cpus=1, memory_bytes=1, count=5), clone="full")
    queue = queue_of(job("a", clone="full"), wide, settings=Launches(rate=Rate(full=2)))
    hosts = site(9)
    assert begun(queue, hosts, 0.0) == ["a"]
    assert queue.reason("wide") == "as many full clones were begun as the site allows in 60 s"
    assert queue.wake_s() == 60.0
    assert begun(queue, hosts, 60.0) == ["wide"]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 4)), max_size=40), st.integers(1, 6))
def test_no_window_anywhere_sees_more_launches_than_the_limit(arrivals: list[tuple[float, int]], most: int) -> None:
    limits = Launches(rate=Rate(full=most), window_s=10.0)
    queue, hosts = Queue(limits), site(1000)
    launched: list[tuple[float, int]] = []
    for number, (at_s, count) in enumerate(sorted(arrivals)):
        demand = Demand(cpus=1, memory_bytes=0, count=min(count, most))
        queue.add(job(f"j{number}", since_s=at_s, demand=demand, clone="full"))
        for one in queue.launches(at_s, into(hosts)):
            assert isinstance(one, Launch)
            launched.append((at_s, one.waiting.demand.count))
    for began_s, _ in launched:
        assert sum(count for at_s, count in launched if began_s <= at_s < began_s + 10.0) <= most


def test_a_ready_job_is_released_and_leaves_the_queue() -> None:
    queue = queue_of(job("a"))
    begun(queue, site(1))
    assert queue.result("a", Outcome(result="ready"), 1.0) == Release("a")
    assert "a" not in queue


def test_not_now_from_the_host_is_no_failure_but_is_not_asked_again_at_once() -> None:
    queue, hosts = queue_of(job("a")), site(1)
    for attempt in range(9):
        now_s = 100.0 * attempt
        assert begun(queue, hosts, now_s) == ["a"]
        end(hosts, ("h0",))
        assert queue.result("a", Outcome(result="not-now", reason="full"), now_s) == Wait("a", "full")
        assert begun(queue, hosts, now_s) == []
        assert queue.wake_s() == now_s + FAST.backoff_s


def test_a_failed_job_is_tried_elsewhere_after_a_while() -> None:
    queue, hosts = queue_of(job("a")), site(1, 1)
    begun(queue, hosts)
    end(hosts, ("h0",))
    assert queue.result("a", Outcome(result="failed", reason="no disk"), 10.0) == Retry("a", 12.0, "no disk")
    assert queue.reason("a") == "no disk"
    assert begun(queue, hosts, 11.9) == []
    (launch,) = queue.launches(12.0, into(hosts))
    assert isinstance(launch, Launch)
    assert launch.here == Here(("h1",))


def test_a_job_that_failed_on_the_only_host_is_tried_there_again() -> None:
    queue, hosts = queue_of(job("a")), site(1)
    begun(queue, hosts)
    end(hosts, ("h0",))
    queue.result("a", Outcome(result="failed"), 0.0)
    assert begun(queue, hosts, 2.0) == ["a"]


def test_each_failure_doubles_the_wait_and_the_last_leaves_the_job_held_with_its_reason() -> None:
    settings = Launches(attempts=4, failures=99, backoff_s=2.0, backoff_max_s=5.0)
    queue, hosts, now_s = queue_of(job("a"), settings=settings), site(1), 0.0
    waits = []
    while True:
        begun(queue, hosts, now_s)
        end(hosts, ("h0",))
        action = queue.result("a", Outcome(result="failed", reason="no disk"), now_s)
        if not isinstance(action, Retry):
            break
        waits.append(action.at_s - now_s)
        now_s = action.at_s
    assert waits == [2.0, 4.0, 5.0]
    assert action == Hold("a", "no guest after 4 attempts; the last: no disk")
    assert "a" not in queue


@pytest.mark.parametrize("result", ["never", "no-address"])
def test_what_cannot_be_or_has_no_address_is_cancelled_with_the_sentence(result: Result) -> None:
    queue = queue_of(job("a"))
    begun(queue, site(1))
    assert queue.result("a", Outcome(result=result, reason="no address in the pool"), 0.0) == Cancel(
        "a", "no address in the pool"
    )
    assert "a" not in queue


def test_a_result_of_a_job_that_left_while_it_was_launched_asks_for_nothing() -> None:
    queue = queue_of(job("a"))
    begun(queue, site(1))
    assert queue.remove("a") == Launch(job("a"), Here(("h0",)))
    assert queue.result("a", Outcome(result="ready"), 0.0) is None
    assert queue.remove("a") is None


def test_a_job_that_leaves_the_line_is_not_launched_and_one_that_comes_again_is() -> None:
    queue = queue_of(job("a"), job("b"))
    queue.remove("a")
    queue.add(job("a", since_s=5))
    queue.add(job("a", since_s=6))
    assert begun(queue, site(9)) == ["b", "a"]
    assert len(queue) == 0


def test_a_launch_from_before_a_restart_is_adopted_and_not_begun_again() -> None:
    queue = Queue(FAST)
    queue.adopt(job("a"), Here(("h0",)))
    queue.add(job("a"))
    assert begun(queue, site(9)) == []
    assert queue.result("a", Outcome(result="ready"), 0.0) == Release("a")


def fail(queue: Queue, hosts: Hosts, *, bad: Callable[[Launch], bool], now_s: float) -> list[tuple[str, str]]:
    """Launch all that go, let them succeed or fail, and return which host each went to."""
    went = []
    for launch in list(queue.launches(now_s, into(hosts))):
        assert isinstance(launch, Launch)
        went.append((launch.waiting.key, launch.here.hosts[0]))
        end(hosts, launch.here.hosts)
        result: Result = "failed" if bad(launch) else "ready"
        queue.result(launch.waiting.key, Outcome(result=result, reason="broken"), now_s)
    return went


def test_a_host_that_fails_three_times_in_a_row_rests_and_then_gets_one_trial() -> None:
    queue, hosts = queue_of(*(job(f"j{number}", since_s=number, image=f"i{number}") for number in range(3))), site(9)
    fail(queue, hosts, bad=lambda _: True, now_s=0.0)
    assert begun(queue, hosts, 30.0) == []
    assert queue.reason("j0").endswith("; h0 must rest after failures")
    assert len(begun(queue, hosts, 60.0)) == 1
    assert queue.result("j0", Outcome(result="failed", reason="broken"), 61.0) == Retry("j0", 65.0, "broken")
    assert begun(queue, hosts, 61.0 + 119.0) == []
    (again,) = begun(queue, hosts, 61.0 + 120.0)
    assert queue.result(again, Outcome(result="ready"), 200.0) == Release(again)
    assert len(begun(queue, hosts, 200.0)) == 2


def test_a_broken_host_among_good_ones_gets_a_few_jobs_and_then_one_trial_at_a_time_and_all_jobs_run() -> None:
    queue, hosts = queue_of(*(job(f"j{number}", since_s=number) for number in range(30))), site(2, 2, 2)
    now_s, worked = 0.0, set()
    failures: dict[float, int] = {}
    while len(queue):
        for key, host in fail(queue, hosts, bad=lambda launch: launch.here.hosts == ("h0",), now_s=now_s):
            if host == "h0":
                failures[now_s] = failures.get(now_s, 0) + 1
            else:
                worked.add(key)
        queue.freed()
        wake_s = queue.wake_s()
        now_s = max(now_s, wake_s if wake_s is not None else now_s)
    assert worked == {f"j{number}" for number in range(30)}
    assert failures == {0.0: 2, 2.0: 2, 62.0: 1, 182.0: 1, 422.0: 1}


def test_a_broken_image_rests_and_the_hosts_it_failed_on_do_not() -> None:
    queue, hosts = Queue(FAST), site(9, 9)
    for number in range(4):
        queue.add(job(f"bad{number}", image="bad"))
    for at_s in (0.0, 2.0):
        fail(queue, hosts, bad=lambda launch: launch.waiting.image == "bad", now_s=at_s)
    queue.add(job("good", image="good", since_s=9))
    assert fail(queue, hosts, bad=lambda launch: launch.waiting.image == "bad", now_s=30.0) == [("good", "h0")]
    assert queue.reason("bad0") == "image 'bad' rests after failures on several hosts"


def test_an_image_whose_trial_works_is_trusted_again() -> None:
    queue, hosts = Queue(FAST), site(9)
    for number in range(3):
        queue.add(job(f"j{number}"))
        (key,) = begun(queue, hosts, 0.0)
        end(hosts, ("h0",))
        queue.result(key, Outcome(result="failed", fault="image"), 0.0)
    assert begun(queue, hosts, 59.0) == []
    (trial,) = begun(queue, hosts, 60.0)
    assert queue.result(trial, Outcome(result="ready"), 61.0) == Release(trial)
    assert len(begun(queue, hosts, 61.0)) == 2


def test_a_trial_whose_job_is_cancelled_is_followed_by_another() -> None:
    queue, hosts = queue_of(*(job(f"j{number}", since_s=number, image=f"i{number}") for number in range(3))), site(9)
    fail(queue, hosts, bad=lambda _: True, now_s=0.0)
    (trial,) = begun(queue, hosts, 60.0)
    queue.remove(trial)
    queue.freed()
    assert len(begun(queue, hosts, 60.0)) == 1


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.integers(1, 2),
            st.sampled_from(["instant", "full"]),
            st.sampled_from(["ready", "failed", "not-now", "no-address"]),
        ),
        max_size=25,
    ),
)
def test_every_job_ends_or_is_held_and_every_place_comes_back_whatever_happens_to_the_launches(
    jobs: list[tuple[int, int, Clone, Result]],
) -> None:
    queue, hosts = Queue(Launches(rate=Rate(full=3))), site(3, 4)
    before, now_s, ended = list(hosts), 0.0, set()
    fates: dict[str, Result] = {}
    for number, (cpus, count, clone, fate) in enumerate(jobs):
        demand = Demand(cpus=cpus, memory_bytes=1, count=count)
        queue.add(job(f"j{number}", since_s=number, demand=demand, clone=clone))
        fates[f"j{number}"] = fate
    for _ in range(40 * len(jobs) + 1):
        for one in list(queue.launches(now_s, into(hosts))):
            assert isinstance(one, Launch)
            key = one.waiting.key
            hosts.give_back(one.here, one.waiting.demand)
            if not isinstance(queue.result(key, Outcome(result=fates[key], host="h0"), now_s), (Retry, Wait)):
                ended.add(key)
            if fates[key] == "not-now":
                fates[key] = "ready"
        queue.freed()
        wake_s = queue.wake_s()
        now_s = now_s if wake_s is None else max(wake_s, now_s)
        if not len(queue):
            break
    assert ended == set(fates)
    assert list(hosts) == before


def test_a_launch_counts_until_its_window_has_passed_and_not_at_its_end() -> None:
    pace = Pace(2, window_s=10.0)
    pace.note(2, now_s=0.0)
    assert pace.wait_s(1, now_s=9.0) == 1.0
    assert pace.wait_s(1, now_s=10.0) == 0.0
    pace.note(1, now_s=10.0)
    assert pace.wait_s(1, now_s=11.0) == 0.0, "one more is within the limit"
    assert pace.wait_s(2, now_s=11.0) == 9.0
