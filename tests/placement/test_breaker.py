"""Who rests after failures: a host, an image, and not whoever happened to be with them."""

import pytest

from carrel.core.breaker import Breakers


@pytest.fixture
def breakers() -> Breakers:
    return Breakers(failures=3, rest_s=60.0, rest_max_s=200.0)


def fail(breakers: Breakers, *pairs: tuple[str, str], now_s: float = 0.0) -> None:
    for host, image in pairs:
        breakers.failed(host, image, fault="unknown", now_s=now_s)


def test_two_failures_in_a_row_are_no_reason_to_rest_and_three_are(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"))
    assert breakers.resting_hosts(0.0) == frozenset()
    fail(breakers, ("h", "c"))
    assert breakers.resting_hosts(0.0) == {"h"}
    assert breakers.resting_hosts(59.9) == {"h"}
    assert breakers.resting_hosts(60.0) == frozenset()


def test_a_success_between_failures_begins_the_count_anew(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"))
    assert breakers.succeeded(("h",), "z")
    assert not breakers.succeeded(("h",), "z")
    fail(breakers, ("h", "c"), ("h", "d"))
    assert breakers.resting_hosts(0.0) == frozenset()


def test_an_image_that_failed_on_one_host_alone_is_not_blamed(breakers: Breakers) -> None:
    fail(breakers, *[("h", "i")] * 9)
    assert not breakers.image_rests("i", 0.0)
    assert breakers.resting_hosts(0.0) == {"h"}


def test_an_image_that_failed_on_two_hosts_is_blamed_and_they_are_not(breakers: Breakers) -> None:
    fail(breakers, ("h", "i"), ("h", "i"), ("h", "i"))
    assert breakers.resting_hosts(0.0) == {"h"}
    fail(breakers, ("g", "i"))
    assert breakers.image_rests("i", 0.0)
    assert breakers.resting_hosts(0.0) == frozenset()
    fail(breakers, ("g", "i"), ("g", "i"), ("g", "i"))
    assert breakers.resting_hosts(0.0) == frozenset()


def test_a_host_with_enough_failures_of_other_images_rests_on_when_one_image_is_blamed(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"), ("h", "c"))
    fail(breakers, ("g", "i"), ("g", "i"), ("f", "i"))
    assert breakers.image_rests("i", 0.0)
    assert breakers.resting_hosts(0.0) == {"h"}


def test_a_failure_whose_fault_is_known_counts_against_nobody_else(breakers: Breakers) -> None:
    for _ in range(3):
        breakers.failed("h", "i", fault="host", now_s=0.0)
    assert breakers.resting_hosts(0.0) == {"h"}
    assert not breakers.image_rests("i", 0.0)
    for _ in range(3):
        breakers.failed("g", "j", fault="image", now_s=0.0)
    assert breakers.image_rests("j", 0.0)
    fail(breakers, ("g", "k"), ("g", "l"))
    assert breakers.resting_hosts(0.0) == {"h"}


def test_a_host_whose_failures_were_a_blamed_images_rests_no_longer_and_keeps_those_of_others(
    breakers: Breakers,
) -> None:
    fail(breakers, ("h", "i"), ("h", "i"), ("h", "a"))
    assert breakers.resting_hosts(0.0) == {"h"}
    fail(breakers, ("g", "i"))
    assert breakers.resting_hosts(0.0) == frozenset()
    fail(breakers, ("h", "b"), ("h", "c"))
    assert breakers.resting_hosts(0.0) == {"h"}


def test_an_image_gets_one_trial_at_a_time_too(breakers: Breakers) -> None:
    fail(breakers, ("h", "i"), ("g", "i"), ("f", "i"))
    assert breakers.image_rests("i", 59.9)
    assert not breakers.image_rests("i", 60.0)
    breakers.tried(("h",), "i")
    assert breakers.image_rests("i", 60.0)
    breakers.gave_up(("h",), "i")
    assert not breakers.image_rests("i", 60.0)


def test_what_has_rested_gets_one_trial_and_rests_twice_as_long_after_each_that_fails(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"), ("h", "c"))
    now_s, rests = 60.0, []
    for _ in range(3):
        breakers.tried(("h",), "z")
        assert breakers.resting_hosts(now_s) == {"h"}
        assert breakers.next_s(now_s) is None
        fail(breakers, ("h", "z"), now_s=now_s)
        until_s = breakers.next_s(now_s)
        assert until_s is not None
        rests.append(until_s - now_s)
        now_s = until_s
    assert rests == [120.0, 200.0, 200.0]


def test_a_trial_that_tells_nothing_is_followed_by_another(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"), ("h", "c"))
    breakers.tried(("h",), "z")
    breakers.gave_up(("h",), "z")
    assert breakers.resting_hosts(60.0) == frozenset()
    assert breakers.next_s(60.0) is None


def test_a_launch_where_nothing_is_suspected_is_no_trial(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"))
    breakers.tried(("h",), "a")
    assert breakers.resting_hosts(0.0) == frozenset()
    assert not breakers.image_rests("a", 0.0)


def test_late_failures_of_what_rests_already_do_not_lengthen_its_rest(breakers: Breakers) -> None:
    fail(breakers, ("h", "a"), ("h", "b"), ("h", "c"))
    fail(breakers, ("h", "d"), ("h", "e"), now_s=30.0)
    assert breakers.next_s(30.0) == 60.0
