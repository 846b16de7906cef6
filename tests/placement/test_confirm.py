"""A choice of hosts that somebody else made: it counts where there is room for it, and refuses nothing for ever."""

import pytest

from carrel.core.placement import confirm
from carrel.model.host import Demand, Here, Host, HostState, NotNow, Overcommit

PAIR = Demand(cpus=1, memory_bytes=1, count=2)
APART = Demand(cpus=1, memory_bytes=1, count=2, apart=True)


def host(name: str = "h0", *, state: HostState = "up") -> Host:
    return Host(name=name, cpus=4, memory_bytes=4, cpus_used=2, memory_used_bytes=2, state=state)


@pytest.mark.parametrize(
    ("cpus", "memory_bytes", "count", "room"),
    [
        (2, 2, 1, True),
        (3, 2, 1, False),
        (2, 3, 1, False),
        (1, 1, 2, True),
        (2, 1, 2, False),
        (1, 2, 2, False),
        (1, 0, 2, True),
    ],
)
def test_a_choice_may_fill_a_host_to_its_last_cpu_and_byte_and_no_further(
    cpus: int, memory_bytes: int, count: int, room: bool
) -> None:
    demand, here = Demand(cpus=cpus, memory_bytes=memory_bytes, count=count), Here(("h0",) * count)
    none = NotNow(f"host 'h0' was chosen, which has no room for {demand} now")
    assert confirm([host()], demand, here) == (here if room else none)


def test_a_choice_may_use_what_the_site_promises_more_than_once() -> None:
    demand, here = Demand(cpus=6, memory_bytes=4), Here(("h0",))
    assert confirm([host()], demand, here, overcommit=Overcommit(cpus=2.0, memory=1.5)) == here
    assert isinstance(confirm([host()], demand, here, overcommit=Overcommit(cpus=2.0)), NotNow)


def test_guests_that_need_not_be_apart_may_share_a_host_or_not() -> None:
    hosts = [host("h0"), host("h1")]
    for here in (Here(("h0", "h0")), Here(("h0", "h1"))):
        assert confirm(hosts, PAIR, here) == here


def test_guests_that_must_be_apart_may_not_share_a_host() -> None:
    hosts = [host("h0"), host("h1")]
    assert confirm(hosts, APART, Here(("h0", "h1"))) == Here(("h0", "h1"))
    assert confirm(hosts, APART, Here(("h1", "h1"))) == NotNow(f"host 'h1' was chosen 2 times for {APART}")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_choice_has_one_host_for_each_guest(count: int) -> None:
    assert confirm([host()], PAIR, Here(("h0",) * count)) == NotNow(f"{count} hosts were chosen for {PAIR}")


def test_every_host_of_a_choice_is_looked_at() -> None:
    full = Host(name="h1", cpus=4, memory_bytes=4, cpus_used=4)
    assert confirm([host(), full], PAIR, Here(("h0", "h1"))) == NotNow(
        f"host 'h1' was chosen, which has no room for {PAIR} now"
    )


@pytest.mark.parametrize("state", ["drained", "down"])
def test_a_choice_of_a_host_that_takes_no_guests_now_does_not_count(state: HostState) -> None:
    refused = NotNow("host 'h0' was chosen, which takes no guests now")
    assert confirm([host(state=state)], PAIR, Here(("h0", "h0"))) == refused
    assert confirm([host()], PAIR, Here(("h0", "h0")), without={"h0"}) == refused
    assert confirm([host()], PAIR, Here(("h0", "h0")), without={"h1"}) == Here(("h0", "h0"))


def test_a_choice_of_a_host_that_nobody_knows_does_not_count() -> None:
    assert confirm([host()], PAIR, Here(("h0", "h9"))) == NotNow(
        "host 'h9' was chosen, which is not in the table; see: carrel host list"
    )
