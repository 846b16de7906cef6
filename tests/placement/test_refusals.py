"""Where guests of several hosts go together, and what is said when they cannot: not now, never, and what would help."""

from collections.abc import Sequence

import pytest

from carrel.core.placement import Hosts, place
from carrel.model.host import Demand, Here, Host, HostState, Never, NotNow

ONE = Demand(cpus=1, memory_bytes=1)
WHOLE = Demand(cpus=4, memory_bytes=4)


def empty(name: str) -> Host:
    return Host(name=name, cpus=4, memory_bytes=4)


def full(name: str, *, state: HostState = "up") -> Host:
    return Host(name=name, cpus=4, memory_bytes=4, cpus_used=4, memory_used_bytes=4, state=state)


def guests(count: int, *, cpus: int = 1, memory_bytes: int = 1, apart: bool = False) -> Demand:
    return Demand(cpus=cpus, memory_bytes=memory_bytes, count=count, apart=apart)


def frees(hosts: Sequence[Host], demand: Demand) -> bool:
    """Whether the end of our guests would make room, of what has to wait."""
    answer = place(hosts, demand)
    assert isinstance(answer, NotNow)
    return answer.frees


def test_guests_that_must_be_apart_go_to_hosts_of_their_own_and_others_may_share_one() -> None:
    hosts = [empty("h0"), empty("h1"), empty("h2")]
    assert place(hosts, guests(2, apart=True)) == Here(("h0", "h1"))
    assert place(hosts, guests(2)) == Here(("h0", "h0"))


def test_hosts_with_guests_that_are_apart_take_further_ones_afterwards() -> None:
    index = Hosts([empty("h0"), empty("h1")])
    for demand in (guests(2, apart=True), guests(1, apart=True), guests(1, apart=True)):
        assert index.admit(demand) == Here(("h0", "h1")[: demand.count])
    assert index.admit(guests(1)) == Here(("h0",))
    assert [host.cpus_used for host in index] == [4, 1]


def test_guests_that_must_be_apart_wait_for_a_host_each_and_never_fit_fewer_hosts_than_they_are() -> None:
    hosts = [empty("h0"), full("h1")]
    assert place(hosts, guests(2, apart=True)) == NotNow(
        "no room for 2 guests of 1 CPU and 0 MiB each, each on a host of its own on the hosts now", frees=True
    )
    assert place(hosts, guests(3, apart=True)) == Never(
        "all 2 hosts of this site together cannot carry 3 guests of 1 CPU and 0 MiB each, each on a host of its own; "
        "the largest gives a guest 4 CPUs and 0 MiB"
    )


def test_what_finds_room_for_some_of_its_guests_alone_takes_nothing() -> None:
    index = Hosts([empty("h0"), full("h1")])
    assert isinstance(index.admit(guests(5)), NotNow)
    assert index["h0"] == empty("h0")
    assert index.admit(WHOLE) == Here(("h0",))


@pytest.mark.parametrize(
    ("demand", "most"),
    [(guests(1, cpus=2), 5), (guests(1, cpus=3), 2), (guests(1, memory_bytes=2), 6), (guests(1, memory_bytes=0), 10)],
)
def test_as_many_guests_as_all_hosts_could_hold_wait_and_one_more_never_fits(demand: Demand, most: int) -> None:
    hosts = [full("h0"), full("h1"), Host(name="h2", cpus=2, memory_bytes=5, cpus_used=2)]
    assert isinstance(place(hosts, guests(most, cpus=demand.cpus, memory_bytes=demand.memory_bytes)), NotNow)
    assert isinstance(place(hosts, guests(most + 1, cpus=demand.cpus, memory_bytes=demand.memory_bytes)), Never)


def test_room_comes_as_guests_end_where_the_open_hosts_would_do() -> None:
    assert frees([full("h0"), full("h1")], guests(2, cpus=4, memory_bytes=4))
    hosts = [full("h0"), full("h1", state="drained")]
    assert frees(hosts, WHOLE)
    assert not frees(hosts, guests(2, cpus=4, memory_bytes=4))


def test_a_host_that_closes_and_opens_again_counts_as_before() -> None:
    index = Hosts([full("h0"), full("h1")])
    two = guests(2, cpus=4, memory_bytes=4)
    before = index.place(two)
    assert before == NotNow(f"no room for {two} on the hosts now", frees=True)
    for state in ("drained", "down"):
        index.set_state("h1", state, "new disks")
        assert index.place(two) == NotNow(f"no room for {two} on the hosts now, and 1 of 2 hosts take no guests")
        assert index.place(WHOLE) == NotNow(
            f"no room for {WHOLE} on the hosts now, and 1 of 2 hosts take no guests", True
        )
        assert index["h1"].reason == "new disks"
    index.set_state("h1", "up")
    index.set_state("h1", "up")
    assert index.place(two) == before


@pytest.mark.parametrize(("cpus", "memory_bytes"), [(4, 0), (5, 0), (0, 4), (0, 5)])
def test_no_end_of_a_guest_helps_on_a_host_that_others_fill(cpus: int, memory_bytes: int) -> None:
    theirs = Host(
        name="h0",
        cpus=4,
        memory_bytes=4,
        cpus_used=cpus,
        memory_used_bytes=memory_bytes,
        cpus_others=cpus,
        memory_others_bytes=memory_bytes,
    )
    assert not frees([theirs], ONE)
    assert frees([theirs, full("h1")], WHOLE), "what others have too much of one host is no loss of another"
    assert not frees([theirs, full("h1")], guests(2, cpus=4, memory_bytes=4))


def test_what_others_use_of_the_memory_of_a_host_does_not_come_back_when_guests_end() -> None:
    half = Host(name="h0", cpus=4, memory_bytes=4, memory_used_bytes=3, memory_others_bytes=2)
    assert frees([half], guests(1, memory_bytes=2))
    assert not frees([half], guests(1, memory_bytes=3))


def test_a_host_that_one_question_leaves_out_is_there_again_for_the_next() -> None:
    index = Hosts([empty("h0"), empty("h1")])
    assert index.place(ONE, without=["h0"]) == Here(("h1",))
    assert index.place(ONE, without=["h0", "h1", "h9"]) == NotNow(
        "no room for 1 CPU and 0 MiB on the hosts now, and 2 of 2 hosts take no guests"
    )
    assert index.admit(ONE) == Here(("h0",))
    assert index.place(guests(9)) == Never(
        "all 2 hosts of this site together cannot carry 9 guests of 1 CPU and 0 MiB each; "
        "the largest gives a guest 4 CPUs and 0 MiB"
    )
    assert index.place(guests(8)) == NotNow("no room for 8 guests of 1 CPU and 0 MiB each on the hosts now", frees=True)


def test_a_drained_host_that_one_question_leaves_out_stays_drained() -> None:
    index = Hosts([full("h0"), full("h1", state="drained")])
    index.place(ONE, without=["h1"])
    index.take("h1", cpus=-4, memory_bytes=-4)
    assert index.place(ONE) == NotNow(
        "no room for 1 CPU and 0 MiB on the hosts now, and 1 of 2 hosts take no guests", frees=True
    )


@pytest.mark.parametrize(("cpus", "memory_bytes"), [(3, 1), (1, 3)])
def test_no_more_is_given_back_than_was_taken_of_cpus_or_of_memory(cpus: int, memory_bytes: int) -> None:
    index = Hosts([empty("h0")])
    index.take("h0", cpus=2, memory_bytes=2)
    with pytest.raises(ValueError, match="has less taken than the"):
        index.give_back(Here(("h0",)), Demand(cpus=cpus, memory_bytes=memory_bytes))


def test_of_two_hosts_of_one_name_among_others_the_name_is_told() -> None:
    with pytest.raises(ValueError, match="'h1' is there 2 times"):
        Hosts([empty("h0"), empty("h1"), empty("h1")])


def test_the_least_loaded_host_is_the_one_whose_scarcer_resource_is_least_used() -> None:
    def used(name: str, cpus: int, memory_bytes: int, *, of: int = 4) -> Host:
        return Host(name=name, cpus=of, memory_bytes=of, cpus_used=cpus, memory_used_bytes=memory_bytes)

    def least(*hosts: Host) -> object:
        return place(hosts, ONE, policy="least-loaded")

    assert least(used("h0", 1, 3), used("h1", 2, 2), used("h2", 3, 1)) == Here(("h1",))
    assert least(used("h0", 2, 0), used("h1", 4, 0, of=16)) == Here(("h1",)), "a quarter is less than a half"
    assert least(used("h0", 0, 2), used("h1", 0, 4, of=16)) == Here(("h1",))
