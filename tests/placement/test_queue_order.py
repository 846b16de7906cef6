"""Who of the waiting is asked about, how often, in which order, and when to ask again."""

from collections.abc import Callable

import pytest

from carrel.config import Launches, Rate
from carrel.core.breaker import Breakers
from carrel.core.pacing import Pace, backoff_s
from carrel.core.queue import AGAIN_S, Launch, Outcome, Queue, Release, Retry, Waiting
from carrel.model.guest import Clone
from carrel.model.host import Answer, Demand, Here, NotNow

FAST = Launches(rate=Rate(instant=1000, linked=1000, full=1000))
ONE = Demand(cpus=1, memory_bytes=1)
TWO = Demand(cpus=2, memory_bytes=1)
PAIR = Demand(cpus=1, memory_bytes=1, count=2)


def job(
    key: str,
    *,
    since_s: float = 0.0,
    demand: Demand = ONE,
    clone: Clone = "instant",
    image: str = "i",
    driver: str = "",
) -> Waiting:
    return Waiting(key=key, clone=clone, image=image, demand=demand, driver=driver, since_s=since_s)


def queue_of(*jobs: Waiting, settings: Launches = FAST) -> Queue:
    queue = Queue(settings)
    for one in jobs:
        queue.add(one)
    return queue


class Site:
    """Hosts in their order, of which ``room`` says who finds room there; remembers what it was asked."""

    def __init__(self, *hosts: str, room: Callable[[Waiting], bool] = lambda _: True, frees: bool = False) -> None:
        """Remember them."""
        self.hosts = hosts
        self.room = room
        self.frees = frees
        self.asked: list[str] = []

    def admit(self, waiting: Waiting, without: frozenset[str]) -> Answer:
        self.asked.append(waiting.key)
        able = [host for host in self.hosts if host not in without]
        if not able or not self.room(waiting):
            return NotNow("no room", frees=self.frees)
        return Here(tuple(able[at % len(able)] for at in range(waiting.demand.count)))


ROOMY = Site("h0")


def begun(queue: Queue, site: Site = ROOMY, now_s: float = 0.0) -> list[str]:
    return [one.waiting.key for one in queue.launches(now_s, site.admit) if isinstance(one, Launch)]


def launched(queue: Queue, site: Site, now_s: float) -> list[tuple[str, tuple[str, ...]]]:
    """Which jobs went where."""
    found = list(queue.launches(now_s, site.admit))
    return [(one.waiting.key, one.here.hosts) for one in found if isinstance(one, Launch)]


def failed(queue: Queue, key: str, now_s: float, *, host: str = "") -> None:
    assert isinstance(queue.result(key, Outcome(result="failed", reason="broken", host=host), now_s), Retry)


def test_whoever_came_first_is_launched_first_whenever_the_controller_heard_of_it() -> None:
    queue = queue_of(*(job(f"j{at}", since_s=at) for at in (3, 1, 5, 2, 4, 0)))
    assert begun(queue) == ["j0", "j1", "j2", "j3", "j4", "j5"]


def test_of_those_that_came_at_once_the_first_that_was_heard_of_is_launched_first() -> None:
    assert begun(queue_of(*(job(key) for key in "abc"))) == ["a", "b", "c"]
    assert begun(queue_of(*(job(key, image=key) for key in "cab"))) == ["c", "a", "b"]


def test_of_those_that_may_be_tried_again_at_once_the_first_that_failed_is() -> None:
    queue = queue_of(*(job(key, image=key) for key in "ab"))
    assert begun(queue) == ["a", "b"]
    for key in "ba":
        failed(queue, key, 0.0)
    assert begun(queue, now_s=2.0) == ["b", "a"]


def test_a_job_does_not_inherit_the_place_of_one_before_it_that_left() -> None:
    queue = queue_of(job("a", since_s=1, image="x"), job("c", since_s=9, image="x"), job("b", since_s=5, image="y"))
    queue.remove("a")
    assert begun(queue) == ["b", "c"]


def test_jobs_that_ask_for_the_same_are_asked_about_once_until_something_changes() -> None:
    queue = queue_of(*(job(f"j{at}", since_s=at) for at in (9, 8, 7)), job("wide", since_s=3, demand=TWO))
    site = Site("h0", room=lambda _: False)
    assert begun(queue, site) == []
    assert site.asked == ["wide", "j7"]
    queue.add(job("j6", since_s=6))
    assert begun(queue, site) == []
    assert site.asked == ["wide", "j7"]
    queue.freed()
    assert begun(queue, site) == []
    assert site.asked == ["wide", "j7", "wide", "j6"]


@pytest.mark.parametrize(
    "other",
    [
        job("other", since_s=1, image="other"),
        job("other", since_s=1, clone="full"),
        job("other", since_s=1, driver="other"),
        job("other", since_s=1, demand=TWO),
    ],
)
def test_a_job_that_finds_no_room_keeps_none_waiting_that_asks_for_something_else(other: Waiting) -> None:
    site = Site("h0", room=lambda waiting: waiting.key == "other")
    assert begun(queue_of(job("a"), other), site) == ["other"]


def test_a_job_that_failed_somewhere_stands_in_line_with_those_that_ask_for_the_same() -> None:
    site = Site("h0", "h1")
    queue = queue_of(job("a"))
    assert begun(queue, site) == ["a"]
    failed(queue, "a", 0.0)
    queue.add(job("b", since_s=1))
    site = Site("h0", "h1", room=lambda _: False)
    assert begun(queue, site, now_s=2.0) == []
    assert site.asked == ["a", "a"], "without the host where it failed, and with it"


def test_a_job_says_why_it_waits_from_the_first_moment_until_it_is_launched() -> None:
    queue = queue_of(job("a"))
    assert queue.reason("a") == "waits for its turn"
    assert begun(queue, Site("h0", room=lambda _: False)) == []
    assert queue.reason("a") == "no room"
    queue.freed()
    assert begun(queue) == ["a"]
    assert queue.reason("a") == ""
    failed(queue, "a", 0.0)
    assert queue.reason("a") == "broken"
    assert queue.reason("nobody") == ""


def test_a_job_that_comes_again_does_not_say_what_failed_before() -> None:
    queue = queue_of(job("a"))
    assert begun(queue) == ["a"]
    failed(queue, "a", 0.0)
    queue.remove("a")
    queue.add(job("a"))
    assert queue.reason("a") == "waits for its turn"


def test_a_job_that_left_while_it_was_to_be_tried_again_and_came_back_is_launched_once() -> None:
    queue = queue_of(job("a"))
    assert begun(queue) == ["a"]
    failed(queue, "a", 0.0)
    queue.remove("a")
    queue.add(job("a"))
    assert begun(queue, now_s=1.0) == ["a"]
    assert begun(queue, now_s=2.0) == []
    assert queue.result("a", Outcome(result="ready"), 2.0) == Release("a")
    assert begun(queue, now_s=3.0) == []
    assert len(queue) == 0


def test_launched_jobs_are_known_and_do_not_wait() -> None:
    queue = queue_of(job("a"), job("b", demand=TWO))
    assert begun(queue, Site("h0", room=lambda waiting: waiting.key == "a")) == ["a"]
    assert (len(queue), "a" in queue, "b" in queue) == (1, True, True)


def test_a_launch_that_was_adopted_is_handed_over_when_its_job_leaves() -> None:
    queue = Queue(FAST)
    queue.adopt(job("a"), Here(("h0",)))
    assert (len(queue), queue.reason("a")) == (0, "")
    assert queue.remove("a") == Launch(job("a"), Here(("h0",)))
    assert "a" not in queue


def test_there_is_nothing_to_wake_for_where_nothing_was_put_off() -> None:
    queue = queue_of(job("a"), job("b"))
    assert queue.wake_s() is None
    assert begun(queue, Site("h0", room=lambda _: False, frees=True)) == []
    assert queue.wake_s() is None


def test_who_waits_for_what_no_end_of_a_guest_brings_is_asked_about_again_after_a_while() -> None:
    queue = queue_of(job("a"))
    site = Site("h0", room=lambda _: False)  # a rack that is too hot, says the site's own command
    assert begun(queue, site, now_s=100.0) == []
    assert queue.wake_s() == 100.0 + AGAIN_S
    site.room = lambda _: True
    assert begun(queue, site, now_s=99.0 + AGAIN_S) == []
    assert begun(queue, site, now_s=100.0 + AGAIN_S) == ["a"]
    assert site.asked == ["a", "a"]


def test_the_first_that_may_be_tried_again_wakes_the_queue_and_then_the_next() -> None:
    queue = queue_of(job("a", image="x"), job("b", image="y"))
    assert begun(queue) == ["a", "b"]
    failed(queue, "b", 5.0)
    failed(queue, "a", 1.0)
    assert queue.wake_s() == 3.0
    assert begun(queue, now_s=3.0) == ["a"]
    assert queue.wake_s() == 7.0
    assert begun(queue, now_s=6.9) == []
    assert begun(queue, now_s=7.0) == ["b"]
    assert queue.wake_s() is None


def test_the_end_of_a_pause_wakes_the_queue_and_no_moment_before() -> None:
    queue = queue_of(*(job(key, clone="full") for key in "ab"), settings=Launches(rate=Rate(full=1)))
    assert begun(queue) == ["a"]
    assert queue.wake_s() == 60.0
    assert begun(queue, now_s=59.5) == []
    assert queue.wake_s() == 60.0
    assert begun(queue, now_s=60.0) == ["b"]
    assert queue.wake_s() is None


def test_whichever_comes_first_wakes_the_queue_the_end_of_a_pause_or_of_a_wait() -> None:
    queue = queue_of(
        job("a", clone="full"), job("b", clone="full"), job("c"), settings=Launches(rate=Rate(full=1, instant=9))
    )
    assert begun(queue) == ["a", "c"]
    failed(queue, "c", 1.0)
    assert queue.wake_s() == 3.0
    assert begun(queue, now_s=3.0) == ["c"]
    assert queue.wake_s() == 60.0
    failed(queue, "c", 59.0)
    assert queue.wake_s() == 60.0


def test_the_end_of_a_hosts_rest_wakes_the_queue() -> None:
    queue = queue_of(*(job(key, image=key) for key in "abc"))
    assert begun(queue) == ["a", "b", "c"]
    for key in "abc":
        failed(queue, key, 0.0)
    assert begun(queue, now_s=10.0) == []
    assert queue.reason("a") == "no room; h0 must rest after failures"
    assert queue.wake_s() == 60.0
    assert len(begun(queue, now_s=60.0)) == 1


def test_the_end_of_an_images_rest_wakes_the_queue() -> None:
    queue = queue_of(*(job(key, since_s=at) for at, key in enumerate("abc")))
    assert begun(queue) == ["a", "b", "c"]
    for key in "abc":
        queue.result(key, Outcome(result="failed", fault="image"), 0.0)
    assert begun(queue, now_s=10.0) == []
    assert queue.wake_s() == 60.0
    assert begun(queue, now_s=60.0) == ["a"]


def test_a_host_that_rests_is_left_out_where_others_have_room() -> None:
    queue, site = queue_of(*(job(key, image=key) for key in "abc")), Site("h0", "h1")
    assert begun(queue, site) == ["a", "b", "c"]
    for key in "abc":
        failed(queue, key, 0.0)
    queue.add(job("new", image="new"))
    assert launched(queue, site, 1.0) == [("new", ("h1",))]


def test_a_job_is_passed_until_its_patience_ends_and_not_a_moment_longer() -> None:
    def site() -> Site:
        return Site("h0", room=lambda waiting: waiting.key != "big", frees=True)

    jobs = (job("big", since_s=10, demand=TWO), job("small", since_s=11))
    assert begun(queue_of(*jobs), site(), now_s=FAST.patience_s + 9.9) == ["small"]
    assert begun(queue_of(*jobs), site(), now_s=FAST.patience_s + 10.0) == []


def test_an_impatient_job_keeps_others_waiting_though_some_of_them_leave() -> None:
    queue = queue_of(job("big", demand=TWO), job("small", since_s=1), job("other", since_s=2, image="other"))
    site = Site("h0", room=lambda waiting: waiting.key != "big", frees=True)
    assert begun(queue, site, now_s=FAST.patience_s) == []
    queue.remove("other")
    queue.remove("nobody")
    assert begun(queue, site, now_s=FAST.patience_s) == []


def test_a_failure_on_nobody_knows_which_of_several_hosts_is_held_against_none_of_them() -> None:
    breakers = Breakers(failures=1, rest_s=60.0, rest_max_s=200.0)
    breakers.failed("", "i", fault="unknown", now_s=0.0)
    assert breakers.resting_hosts(0.0) == frozenset()
    queue, site = queue_of(job("a", demand=PAIR)), Site("h0", "h1")
    for now_s in (0.0, 2.0, 6.0):
        assert launched(queue, site, now_s) == [("a", ("h0", "h1"))]
        failed(queue, "a", now_s)
    assert begun(queue, Site("h0", room=lambda _: False), now_s=14.0) == []
    assert queue.reason("a") == "no room"


STRICT = Launches(rate=Rate(instant=1000), failures=1)
"""One failure is too many."""


def test_a_failure_on_one_of_two_hosts_that_were_on_trial_leaves_the_other_to_a_trial_of_its_own() -> None:
    queue = queue_of(settings=STRICT)
    for host in ("h0", "h1"):
        queue.add(job(host, image=host))
        assert launched(queue, Site(host), 0.0) == [(host, (host,))]
        failed(queue, host, 0.0)
        queue.remove(host)
    queue.add(job("pair", demand=PAIR))
    assert launched(queue, Site("h0", "h1"), 60.0) == [("pair", ("h0", "h1"))]
    failed(queue, "pair", 61.0, host="h0")
    queue.add(job("next", image="next"))
    assert launched(queue, Site("h0", "h1"), 61.0) == [("next", ("h1",))]


def test_an_image_that_was_on_trial_on_a_host_that_is_at_fault_gets_another_trial() -> None:
    queue = queue_of(job("a"), settings=STRICT)
    assert begun(queue) == ["a"]
    queue.result("a", Outcome(result="failed", fault="image"), 0.0)
    queue.remove("a")
    queue.add(job("b"))
    assert begun(queue, now_s=59.9) == []
    assert begun(queue, now_s=60.0) == ["b"]
    queue.result("b", Outcome(result="failed", fault="host"), 61.0)
    queue.add(job("c"))
    assert launched(queue, Site("h0", "h1"), 61.0) == [("c", ("h1",))]


def test_guests_that_fail_together_on_one_host_are_tried_on_another() -> None:
    queue = queue_of(job("a", demand=PAIR))
    assert begun(queue, Site("h0")) == ["a"]
    failed(queue, "a", 0.0)
    assert launched(queue, Site("h0", "h1"), 2.0) == [("a", ("h1", "h1"))]


def test_the_host_that_is_named_is_the_one_to_be_avoided() -> None:
    queue, site = queue_of(job("a", demand=PAIR)), Site("h0", "h1", "h2")
    assert begun(queue, site) == ["a"]
    failed(queue, "a", 0.0, host="h1")
    assert launched(queue, site, 2.0) == [("a", ("h0", "h2"))]


def test_launches_wait_until_enough_of_those_before_them_are_out_of_the_window() -> None:
    pace = Pace(2, window_s=10.0)
    pace.note(1, now_s=0.0)
    pace.note(1, now_s=5.0)
    assert [pace.wait_s(count, now_s=6.0) for count in (1, 2, 5)] == [4.0, 9.0, 9.0]
    assert [pace.wait_s(count, now_s=10.0) for count in (1, 2, 5)] == [0.0, 5.0, 5.0]
    assert pace.wait_s(5, now_s=15.0) == 0.0


def test_the_wait_after_a_failure_doubles_up_to_its_bound() -> None:
    assert [backoff_s(attempts, first_s=2, most_s=10) for attempts in (1, 2, 3, 4, 5000)] == [2, 4, 8, 10, 10]
