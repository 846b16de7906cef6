# ruff: noqa: S311  # chance here keeps no secret
"""The four policies, corner by corner: exact fits, ties, and hosts whose room comes and goes."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import get_args

import pytest

from carrel.core.picking import CLOSED, Picker, Room, picker
from carrel.model.host import Policy

POLICIES: tuple[Policy, ...] = get_args(Policy)
ORDERLY: tuple[Policy, ...] = ("first", "best-fit", "least-loaded")
"""Those with one answer."""


def over(policy: Policy, rooms: Sequence[Room]) -> Picker:
    return picker(policy, list(rooms), Random(1))


def chosen_by_a_look_at_all(policy: Policy, rooms: Sequence[Room], cpus: int, memory_bytes: int) -> int | None:
    able = [at for at, room in enumerate(rooms) if room.cpus >= cpus and room.memory_bytes >= memory_bytes]
    match policy:
        case "best-fit":
            return min(able, key=lambda at: (rooms[at].cpus, rooms[at].memory_bytes, at), default=None)
        case "least-loaded":
            return min(able, key=lambda at: (rooms[at].load, at), default=None)
        case _:
            return min(able, default=None)


@pytest.mark.parametrize("policy", ORDERLY)
def test_after_every_change_a_policy_chooses_as_a_look_at_all_hosts_would(policy: Policy) -> None:
    chance = Random(7)
    rooms = [CLOSED] * 37
    policys = over(policy, rooms)
    for _ in range(600):
        at = chance.randrange(len(rooms))
        load = chance.choice((0.0, 0.25, 0.5, 0.75))
        rooms[at] = chance.choice((CLOSED, Room(chance.randint(-1, 6), chance.randint(-1, 6), load)))
        policys.moved(at, rooms[at])
        cpus, memory_bytes = chance.randint(1, 6), chance.randint(0, 6)
        wanted = chosen_by_a_look_at_all(policy, rooms, cpus, memory_bytes)
        assert policys.pick(cpus, memory_bytes) == wanted
        assert over(policy, rooms).pick(cpus, memory_bytes) == wanted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", range(1, 10))
def test_the_only_host_with_room_is_found_wherever_it_stands_when_it_has_exactly_what_is_asked(
    policy: Policy, count: int
) -> None:
    for at in range(count):
        rooms = [CLOSED] * count
        moved = over(policy, rooms)
        rooms[at] = Room(2, 3, 0.5)
        moved.moved(at, rooms[at])
        for hosts in (moved, over(policy, rooms)):
            assert [hosts.pick(2, 3), hosts.pick(3, 3), hosts.pick(2, 4)] == [at, None, None]
        moved.moved(at, CLOSED)
        assert moved.pick(1, 0) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cpus_of_one_host_and_the_memory_of_another_are_no_place(policy: Policy) -> None:
    assert over(policy, [Room(4, 1, 0.0), Room(1, 4, 0.0)]).pick(2, 2) is None
    assert over(policy, []).pick(1, 0) is None


def test_first_takes_the_first_with_room_though_later_ones_are_emptier() -> None:
    assert over("first", [Room(1, 9, 0.9), Room(2, 2, 0.9), Room(9, 9, 0.0)]).pick(2, 2) == 1


def test_best_fit_takes_fewest_cpus_and_then_fewest_bytes_and_then_the_first() -> None:
    rooms = [Room(4, 4, 0.0), Room(3, 9, 0.0), Room(3, 5, 0.0), Room(3, 5, 0.0), Room(2, 9, 0.0)]
    assert over("best-fit", rooms).pick(3, 4) == 2
    assert over("best-fit", rooms).pick(3, 6) == 1
    assert over("best-fit", rooms[:1] + rooms[4:]).pick(2, 4) == 1
    assert over("best-fit", [Room(2, 3, 0.0), Room(4, 4, 0.0)]).pick(2, 4) == 1


def test_of_equally_loaded_hosts_the_first_is_taken() -> None:
    assert over("least-loaded", [Room(4, 4, 0.5)] * 5).pick(1, 1) == 0


def test_of_equally_loaded_hosts_the_first_is_taken_though_a_less_loaded_one_that_is_too_small_stands_behind_it() -> (
    None
):
    rooms = [Room(4, 4, 0.5), Room(4, 4, 0.9), Room(1, 1, 0.1), Room(4, 4, 0.5)]
    assert over("least-loaded", rooms).pick(2, 2) == 0


def test_a_host_that_is_relieved_is_the_least_loaded_though_another_beside_it_has_more_room() -> None:
    rooms = [Room(1, 9, 0.7), *[Room(4, 9, 0.6)] * 3, *[Room(4, 9, 0.5)] * 4]
    hosts = over("least-loaded", rooms)
    assert hosts.pick(1, 1) == 4
    hosts.moved(0, Room(3, 9, 0.2))
    assert hosts.pick(1, 1) == 0


def test_room_on_a_loaded_host_is_found_though_an_idle_small_one_stands_beside_it() -> None:
    hosts = over("least-loaded", [Room(1, 9, 0.0), *[Room(0, 0, 1.0)] * 7])
    hosts.moved(1, Room(4, 9, 0.5))
    assert hosts.pick(4, 1) == 1


def test_random_takes_hosts_that_this_guest_fills_as_often_as_others_and_none_that_are_too_small() -> None:
    rooms = [Room(1, 9, 0.0), Room(0, 9, 0.0), Room(9, 1, 0.0), Room(9, 0, 0.0), Room(1, 1, 0.0), Room(9, 9, 0.0)]
    hosts = over("random", rooms)
    picks = Counter(hosts.pick(1, 1) for _ in range(1000))
    assert sorted(at for at in picks if at is not None) == [0, 2, 4, 5]
    assert all(200 <= count <= 300 for count in picks.values())


def test_random_finds_the_few_hosts_with_room_among_many_full_ones_and_takes_each_about_as_often() -> None:
    hosts = over("random", [Room(4, 4, 0.0) if at % 250 == 0 else CLOSED for at in range(1000)])
    picks = Counter(hosts.pick(1, 1) for _ in range(1000))
    assert sorted(at for at in picks if at is not None) == [0, 250, 500, 750]
    assert all(200 <= count <= 300 for count in picks.values())
