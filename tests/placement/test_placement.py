# ruff: noqa: S311  # chance here keeps no secret
"""Placement against a look at all hosts, and what must hold of every answer."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.core.placement import Hosts, place
from carrel.model.host import Answer, Demand, Here, Host, HostState, Never, NotNow, Overcommit, Policy

POLICIES: tuple[Policy, ...] = ("first", "random", "best-fit", "least-loaded")
GIB = 2**30

overcommits = st.builds(Overcommit, cpus=st.sampled_from([0.5, 1.0, 1.5, 2.0]), memory=st.sampled_from([1.0, 1.25]))
demands = st.builds(
    Demand,
    cpus=st.integers(1, 9),
    memory_bytes=st.integers(0, 9),
    count=st.integers(1, 4),
    apart=st.booleans(),
)
states: st.SearchStrategy[HostState] = st.sampled_from(["up", "up", "up", "drained", "down"])


@st.composite
def some_hosts(draw: st.DrawFn, *, min_size: int = 0) -> list[Host]:
    sizes = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=min_size, max_size=9))
    return [
        Host(
            name=f"h{number}",
            cpus=cpus,
            memory_bytes=memory,
            cpus_used=draw(st.integers(0, cpus + 2)),
            memory_used_bytes=draw(st.integers(0, memory + 2)),
            state=draw(states),
        )
        for number, (cpus, memory) in enumerate(sizes)
    ]


def room(host: Host, overcommit: Overcommit) -> tuple[int, int]:
    cpus, memory = overcommit.capacity(host)
    return cpus - host.cpus_used, memory - host.memory_used_bytes


def fitting(hosts: Sequence[Host], demand: Demand, overcommit: Overcommit) -> list[Host]:
    return [
        host
        for host in hosts
        if host.state == "up"
        and room(host, overcommit)[0] >= demand.cpus
        and room(host, overcommit)[1] >= demand.memory_bytes
    ]


def load(host: Host, overcommit: Overcommit) -> float:
    cpus, memory = overcommit.capacity(host)
    return max(host.cpus_used / (cpus or 1), host.memory_used_bytes / (memory or 1))


def chosen_by_a_look_at_all(hosts: Sequence[Host], demand: Demand, policy: Policy, overcommit: Overcommit) -> set[str]:
    """The hosts that the policy may take for one guest: one, or for ``random`` any that has room."""
    able = fitting(hosts, demand, overcommit)
    match policy:
        case "random":
            return {host.name for host in able}
        case "first":
            return {host.name for host in able[:1]}
        case "best-fit":
            return {host.name for host in sorted(able, key=lambda host: room(host, overcommit))[:1]}
        case "least-loaded":
            return {host.name for host in sorted(able, key=lambda host: load(host, overcommit))[:1]}


def with_one_more(host: Host, demand: Demand) -> Host:
    return Host(
        name=host.name,
        cpus=host.cpus,
        memory_bytes=host.memory_bytes,
        state=host.state,
        cpus_used=host.cpus_used + demand.cpus,
        memory_used_bytes=host.memory_used_bytes + demand.memory_bytes,
    )


@settings(max_examples=40)
@given(some_hosts(), demands, st.sampled_from(POLICIES), overcommits, st.integers())
def test_each_guest_goes_where_a_look_at_all_hosts_would_send_it(
    hosts: list[Host], demand: Demand, policy: Policy, overcommit: Overcommit, seed: int
) -> None:
    answer = place(hosts, demand, policy=policy, overcommit=overcommit, random=Random(seed))
    chosen = answer.hosts if isinstance(answer, Here) else ()
    left = list(hosts)
    for name in chosen:
        assert name in chosen_by_a_look_at_all(left, demand, policy, overcommit)
        left = [with_one_more(host, demand) if host.name == name else host for host in left]
        if demand.apart:
            left = [host for host in left if host.name != name]
    if not chosen:
        places = 0
        while able := fitting(left, demand, overcommit):
            places += 1
            left = [with_one_more(host, demand) if host is able[0] else host for host in left]
            if demand.apart:
                left = [host for host in left if host.name != able[0].name]
        assert places < demand.count


@settings(max_examples=40)
@given(some_hosts(), st.lists(st.tuples(demands, st.booleans()), max_size=12), st.sampled_from(POLICIES), overcommits)
def test_the_index_answers_as_new_hosts_would_whatever_was_taken_and_given_back(
    hosts: list[Host], history: list[tuple[Demand, bool]], policy: Policy, overcommit: Overcommit
) -> None:
    index = Hosts(hosts, policy=policy, overcommit=overcommit, random=Random(1))
    for demand, returned in history:
        asked = place(list(index), demand, policy=policy, overcommit=overcommit, random=Random(1))
        before = list(index)
        answer = index.admit(demand)
        assert type(answer) is type(asked)
        if policy != "random":
            assert answer == asked
        if isinstance(answer, Here) and returned:
            index.give_back(answer, demand)
            assert list(index) == before
        if not isinstance(answer, Here):
            assert list(index) == before


@settings(max_examples=40)
@given(some_hosts(), st.lists(demands, max_size=20), st.sampled_from(POLICIES), overcommits)
def test_no_host_is_filled_above_its_capacity_times_overcommit(
    hosts: list[Host], queue: list[Demand], policy: Policy, overcommit: Overcommit
) -> None:
    index = Hosts(hosts, policy=policy, overcommit=overcommit)
    taken: Counter[str] = Counter()
    for demand in queue:
        answer = index.admit(demand)
        taken.update(answer.hosts if isinstance(answer, Here) else ())
    for host in index:
        free_cpus, free_memory = room(host, overcommit)
        assert not taken[host.name] or (free_cpus >= 0 and free_memory >= 0 and host.state == "up")


@settings(max_examples=40)
@given(some_hosts(min_size=1), demands, st.sampled_from(POLICIES), overcommits)
def test_never_is_said_of_exactly_what_does_not_fit_when_all_hosts_are_up_and_empty(
    hosts: list[Host], demand: Demand, policy: Policy, overcommit: Overcommit
) -> None:
    empty = [Host(name=host.name, cpus=host.cpus, memory_bytes=host.memory_bytes) for host in hosts]
    fits_empty = isinstance(place(empty, demand, policy=policy, overcommit=overcommit), Here)
    assert isinstance(place(hosts, demand, policy=policy, overcommit=overcommit), Never) is not fits_empty


@settings(max_examples=40)
@given(some_hosts(), demands, overcommits)
def test_best_fit_leaves_no_other_host_with_fewer_free_cpus_that_would_have_had_room(
    hosts: list[Host], demand: Demand, overcommit: Overcommit
) -> None:
    one = Demand(cpus=demand.cpus, memory_bytes=demand.memory_bytes)
    answer = place(hosts, one, policy="best-fit", overcommit=overcommit)
    able = fitting(hosts, one, overcommit)
    assert isinstance(answer, Here) is bool(able)
    if isinstance(answer, Here):
        (mine,) = [room(host, overcommit) for host in able if host.name == answer.hosts[0]]
        assert mine == min(room(host, overcommit) for host in able)


@settings(max_examples=40)
@given(some_hosts(min_size=2), demands, st.sampled_from(POLICIES))
def test_a_host_that_is_left_out_gets_nothing_and_is_as_before_afterwards(
    hosts: list[Host], demand: Demand, policy: Policy
) -> None:
    index = Hosts(hosts, policy=policy)
    before = list(index)
    answer = index.place(demand, without={"h0", "no such host"})
    assert list(index) == before
    assert not (isinstance(answer, Here) and "h0" in answer.hosts)
    everywhere = index.place(demand)
    assert isinstance(answer, Never) is isinstance(everywhere, Never)


def test_random_takes_each_of_four_equal_hosts_about_as_often() -> None:
    hosts = [Host(name=f"h{number}", cpus=4, memory_bytes=GIB) for number in range(4)]
    random = Random(7)
    picks = Counter(
        answer.hosts[0]
        for _ in range(1000)
        if isinstance(answer := place(hosts, Demand(cpus=1, memory_bytes=1), policy="random", random=random), Here)
    )
    assert all(200 <= picks[host.name] <= 300 for host in hosts)


def test_random_repeats_itself_with_the_same_seed() -> None:
    hosts = [Host(name=f"h{number}", cpus=4, memory_bytes=GIB) for number in range(9)]

    def picks(seed: int) -> list[Answer]:
        index = Hosts(hosts, policy="random", random=Random(seed))
        return [index.place(Demand(cpus=1, memory_bytes=1)) for _ in range(20)]

    assert picks(3) == picks(3)
    assert picks(3) != picks(4)


def test_overcommit_of_two_admits_exactly_twice_the_cpus() -> None:
    index = Hosts([Host(name="h", cpus=5, memory_bytes=GIB)], overcommit=Overcommit(cpus=2.0))
    answers = [index.admit(Demand(cpus=1, memory_bytes=1)) for _ in range(11)]
    assert [isinstance(answer, Here) for answer in answers] == [True] * 10 + [False]


def test_a_host_may_be_called_node_no1() -> None:
    assert place([Host(name="node-no1", cpus=1, memory_bytes=1)], Demand(cpus=1, memory_bytes=1)) == Here(("node-no1",))


def test_a_table_without_hosts_is_a_reason_to_wait() -> None:
    assert place([], Demand(cpus=1, memory_bytes=1)) == NotNow("there is no host; see: carrel host add")


def test_what_is_larger_than_any_host_is_told_the_largest() -> None:
    hosts = [Host(name="a", cpus=8, memory_bytes=GIB), Host(name="b", cpus=4, memory_bytes=9 * GIB)]
    assert place(hosts, Demand(cpus=4, memory_bytes=10 * GIB)) == Never(
        "4 CPUs and 10 GiB fit no host; the largest gives a guest 8 CPUs and 1 GiB"
    )


def test_what_is_given_back_must_have_been_taken() -> None:
    index = Hosts([Host(name="h", cpus=4, memory_bytes=GIB)])
    with pytest.raises(ValueError, match="less taken"):
        index.give_back(Here(("h",)), Demand(cpus=1, memory_bytes=1))


def test_a_host_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no host 'x' among 0"):
        Hosts([]).take("x", cpus=1, memory_bytes=1)


def test_what_others_use_of_a_host_does_not_come_back_when_guests_end() -> None:
    half = Host(name="h", cpus=4, memory_bytes=GIB, cpus_used=3, cpus_others=2)
    assert place([half], Demand(cpus=2, memory_bytes=1)) == NotNow(
        "no room for 2 CPUs and 0 MiB on the hosts now", True
    )
    assert place([half], Demand(cpus=3, memory_bytes=1)) == NotNow("no room for 3 CPUs and 0 MiB on the hosts now")


def test_a_host_that_is_closed_gets_nothing_until_it_is_opened() -> None:
    index = Hosts([Host(name="h", cpus=4, memory_bytes=GIB)])
    one = Demand(cpus=1, memory_bytes=1)
    index.set_state("h", "down", "it does not answer")
    index.take("h", cpus=1, memory_bytes=1)
    assert index.place(one) == NotNow("no room for 1 CPU and 0 MiB on the hosts now, and 1 of 1 hosts take no guests")
    index.set_state("h", "up")
    assert index.place(one) == Here(("h",))
    assert index["h"].cpus_used == 1


def test_two_hosts_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'h' is there 2 times"):
        Hosts([Host(name="h", cpus=4, memory_bytes=1), Host(name="h", cpus=8, memory_bytes=1)])


@pytest.mark.parametrize(("cpus", "memory_bytes", "count"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_demand_for_nothing_is_refused(cpus: int, memory_bytes: int, count: int) -> None:
    with pytest.raises(ValueError, match="asks for no guest"):
        Demand(cpus=cpus, memory_bytes=memory_bytes, count=count)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_an_overcommit_that_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Overcommit(cpus=factor)
