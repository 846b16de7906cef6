"""What hosts of guests that are nodes are told, and what is made of what they say."""

from collections.abc import Collection

import msgspec
import pytest

from carrel.core import guestdeeds as deeds
from carrel.core import guestnodes as decide
from carrel.core.guesthosts import Attempt, failed, foreseen, judged, orders
from carrel.core.guestworld import World
from carrel.model.guestnode import GuestNode
from carrel.model.job import JobState
from carrel.model.pool import PoolJob, reservation_name
from carrel.testing.guestworlds import (
    NEXT_RUN,
    NOW_S,
    OPEN,
    PINNED,
    RELEASED,
    RUN,
    guest,
    job,
    kinds,
    node,
    place,
    ready,
    world,
)


def test_a_host_begins_with_guest_and_slurmd_as_soon_as_slurm_has_taken_the_names() -> None:
    placed = world(job(), places=(place(),))
    (action,) = decide.plan(placed)
    assert isinstance(action, deeds.Assign)
    then = foreseen(placed, action)
    assert [(order.node, order.join) for order in orders(then)["h1"]] == [("v1", True)]
    assert decide.plan(then) == ()
    assert "v1" not in then.free


def test_a_name_whose_slurmd_renamed_its_host_is_where_its_runs_guest_is_carried() -> None:
    renamed = node("v1", "IDLE+CLOUD", on="h9")
    assert kinds(ready(nodes=(renamed,))) == ["Release"]
    assert [order.node for order in orders(ready(nodes=(renamed,)))["h1"]] == ["v1"]
    assert orders(ready(nodes=(renamed,)))["h2"] == ()
    assert kinds(ready(nodes=(renamed,), guests={"h1": (guest(run=NEXT_RUN),)})) == ["Pin", "Close"]
    assert kinds(ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h9"),))) == ["Pin", "Close"]


def test_a_name_that_slurm_looks_for_elsewhere_than_on_its_host_begins_anew() -> None:
    elsewhere = msgspec.structs.replace(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1"), address="10.0.0.77")
    assert kinds(ready(nodes=(elsewhere,))) == ["Pin", "Close"]


def test_no_host_is_told_of_a_name_that_is_on_none_or_of_a_job_that_asked_for_no_guest_or_is_over() -> None:
    nowhere = ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h9"),))
    bare = ready(msgspec.structs.replace(PINNED, wish=None))
    over = ready(msgspec.structs.replace(job("COMPLETED"), reservation=reservation_name(RUN)))
    assert [orders(of)["h1"] for of in (nowhere, bare, over)] == [(), (), ()]


def test_no_slurmd_joins_under_a_name_that_parts_and_one_that_joined_stays_when_its_name_is_closed() -> None:
    def joins(state: str) -> list[bool]:
        return [order.join for order in orders(ready(nodes=(node("v1", state, on="h1"),)))["h1"]]

    assert joins("IDLE+CLOUD+POWER_DOWN") == [False]
    assert joins("MIXED+CLOUD+DRAIN") == [True]


# -- a slurmd inside its guest ---------------------------------------------------------------------------------------


def far(of: World, *, address: str = "10.9.0.7") -> World:
    """Return the same world, with a slurmd inside each guest; the guests have this address."""
    hosts = {
        name: msgspec.structs.replace(
            report,
            address="",
            slurmd="guest",
            guests=tuple(msgspec.structs.replace(guest, joined=False, address=address) for guest in report.guests),
        )
        for name, report in of.hosts.items()
    }
    return msgspec.structs.replace(of, hosts=hosts)


INSIDE = msgspec.structs.replace(OPEN, address="10.9.0.7", port=7001)


def test_a_guest_with_its_slurmd_inside_is_ordered_when_its_name_is_open() -> None:
    closed = node("v1", on="h1")
    assert orders(far(ready(nodes=(closed,), guests={})))["h1"] == ()
    (order,) = orders(far(ready(nodes=(INSIDE,), guests={})))["h1"]
    assert (order.node, order.port, order.join, order.started) == ("v1", 7001, True, False)
    assert orders(far(ready(nodes=(INSIDE,), guests={})))["h2"] == ()


def test_it_is_told_the_address_of_the_pool_and_the_ports_of_its_jobs_other_nodes() -> None:
    pinned = msgspec.structs.replace(PINNED, nodes=2)
    places = tuple(msgspec.structs.replace(place(), address=address) for address in ("10.9.0.1", "10.9.0.2"))
    names = (INSIDE, msgspec.structs.replace(INSIDE, name="v2", port=7002))
    of = far(world(pinned, nodes=names, places=places, reserved={RUN: ("v1", "v2")}))
    first, second = orders(of)["h1"]
    assert (first.address, first.peers) == ("10.9.0.1", (("v2", 7002),))
    assert (second.address, second.peers) == ("10.9.0.2", (("v1", 7001),))


def test_its_name_is_pointed_at_the_address_that_it_got_and_the_job_is_not_released_before() -> None:
    elsewhere = msgspec.structs.replace(INSIDE, address="10.9.0.99")
    (action,) = decide.plan(far(ready(nodes=(elsewhere,))))
    assert action == deeds.Point("v1", "10.9.0.7", "its guest has this address")
    assert kinds(far(ready(nodes=(elsewhere,)), address="")) == []
    assert kinds(far(ready(nodes=(INSIDE,)))) == ["Release"]


def test_once_its_job_has_its_nodes_a_guest_is_ordered_as_one_that_is_there_or_lost() -> None:
    def started(state: JobState, slurm_state: str) -> bool:
        known = msgspec.structs.replace(job().job, state=state, slurm_state=slurm_state)
        of = msgspec.structs.replace(PINNED, job=known)
        (order,) = orders(far(world(of, nodes=(INSIDE,), places=(place(),), reserved={RUN: ("v1",)})))["h1"]
        return order.started

    assert started("running", "RUNNING")
    assert started("suspended", "SUSPENDED")
    assert started("ended", "COMPLETING")
    assert not started("pending", "PENDING")


# -- a slurmd that does not come -------------------------------------------------------------------------------------


def judge(of: World, guest: GuestNode, *, counted: Collection[Attempt] = ()) -> GuestNode:
    report = msgspec.structs.replace(of.hosts["h1"], guests=(guest,))
    (found,) = judged(of.look, {"h1": report}, counted=counted, now_s=NOW_S, limits=of.limits)["h1"].guests
    return found


def test_a_guest_whose_slurmd_does_not_come_in_time_has_failed() -> None:
    asleep = node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1")
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    found = judge(ready(nodes=(asleep,)), late)
    assert (found.state, found.reason) == (
        "failed",
        "guest v1: its slurmd did not come within 60 s (guest_nodes.join_max_s) after it was ready",
    )
    assert judge(ready(RELEASED, nodes=(asleep,)), late) == found
    in_time = msgspec.structs.replace(guest(), ready_s=NOW_S - 60)
    assert judge(ready(nodes=(asleep,)), in_time) == in_time


def test_a_guest_has_not_failed_whose_slurmd_came_or_could_not_come_yet_or_whose_job_runs() -> None:
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    running = world(job("RUNNING", on=("v1",)), nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1"),))
    for of in (ready(), ready(nodes=(node("v1", on="h1"),)), running):
        assert judge(of, late) == late
    asleep = ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1"),))
    unknown_name, not_ready = msgspec.structs.replace(late, node="v9"), guest()
    died = msgspec.structs.replace(late, state="failed", reason="killed")
    for other in (unknown_name, not_ready, died):
        assert judge(asleep, other) == other


def test_a_guest_that_was_said_to_have_failed_stays_so_when_its_name_is_closed() -> None:
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    closed = ready(nodes=(node("v1", on="h1"),))
    assert judge(closed, late, counted={(late.run, late.node, late.started_s)}).state == "failed"


@pytest.mark.parametrize("waiting", [PINNED, RELEASED])
def test_a_guest_that_failed_is_told_of_as_long_as_its_job_has_not_started(waiting: PoolJob) -> None:
    lost = guest(state="failed", reason="killed")
    of = ready(waiting, guests={"h1": (lost, guest("v2"))})
    assert failed(of.look, of.hosts) == ((RUN, "h1", lost),)
    running = msgspec.structs.replace(of.look, jobs=(job("RUNNING"),))
    assert failed(running, of.hosts) == ()
