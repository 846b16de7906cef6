"""The rows of the table in ``carrel.core.guestnodes``, each by itself."""

import msgspec
import pytest

from carrel.core import guestdeeds as deeds
from carrel.core import guestnodes as decide
from carrel.core.guesthosts import orders
from carrel.core.guestworld import World
from carrel.model.guestnode import GuestNode, GuestNodeState
from carrel.model.host import Demand
from carrel.model.job import JobKey
from carrel.model.pool import reservation_name
from carrel.testing.guestworlds import (
    CLOSED,
    MIB,
    NEXT_RUN,
    NOW_S,
    OPEN,
    PINNED,
    RELEASED,
    RUN,
    WISH,
    guest,
    job,
    kinds,
    node,
    place,
    ready,
    world,
)

# -- before a run ----------------------------------------------------------------------------------------------------


def test_a_job_that_its_owner_could_release_is_held_by_us() -> None:
    assert kinds(world(job(reason="JobHeldUser"))) == ["Hold"]


def test_a_job_that_was_released_before_its_guests_are_there_is_held_again() -> None:
    assert decide.plan(world(job(reason="Priority"))) == (deeds.Hold(RUN, "its guests are not there yet"),)


def test_a_job_that_its_owner_wants_held_waits_for_its_owner() -> None:
    wish = msgspec.structs.replace(WISH, held_by_user=True)
    assert kinds(world(job(reason="JobHeldUser", wish=wish))) == []
    assert kinds(world(job(reason="None", wish=wish))) == ["Hold"]


def test_a_held_job_looks_for_room_for_all_of_its_guests() -> None:
    (action,) = decide.plan(world(job(nodes=2)))
    assert action == deeds.FindRoom(RUN, Demand(cpus=1, memory_bytes=320 * MIB, count=2), 0, "it waits for guests")


def test_a_job_that_depends_on_others_takes_no_room() -> None:
    assert kinds(world(job(waits_for_others=True))) == ["Watch"]


def test_slurm_watches_the_dependency_of_a_job_that_is_held_again_when_it_is_fulfilled() -> None:
    depends = msgspec.structs.replace(RELEASED, reservation="", reason="Dependency", waits_for_others=True)
    assert kinds(world(depends)) == ["Rest"]
    assert kinds(world(msgspec.structs.replace(depends, waits_for_others=False))) == ["Hold"]


def test_no_name_is_in_no_reservation_while_a_job_could_start_on_it() -> None:
    gone = {"places": (place(),), "reserved": {RUN: ("v1",)}, "guests": {"h1": (guest(),)}}
    assert kinds(world(nodes=(OPEN,), **gone)) == ["Close"]  # type: ignore[arg-type]
    assert kinds(world(nodes=(CLOSED,), **gone)) == ["Unreserve"]  # type: ignore[arg-type]


def test_a_job_that_begins_later_takes_no_room_but_a_requeued_one_does_not_wait() -> None:
    assert kinds(world(job(begins_s=NOW_S + 60))) == ["Rest"]
    assert kinds(world(job(key=NEXT_RUN, begins_s=NOW_S + 60))) == ["FindRoom"]


def test_a_job_that_came_past_the_submit_script_is_cancelled_and_never_runs_bare() -> None:
    (action,) = decide.plan(world(job(wish=None)))
    assert isinstance(action, deeds.Cancel)
    assert "--guest=IMAGE" in action.reason


def test_a_job_of_no_known_memory_is_cancelled_and_one_without_an_image_too() -> None:
    (action,) = decide.plan(world(job(memory_bytes=0)))
    assert isinstance(action, deeds.Cancel)
    assert "say --mem=" in action.reason
    bare = msgspec.structs.replace(WISH, request=msgspec.structs.replace(WISH.request, image=""))
    assert kinds(world(job(wish=bare))) == ["Cancel"]


def test_a_job_that_begins_now_does_not_wait() -> None:
    assert kinds(world(job(begins_s=NOW_S))) == ["FindRoom"]


def test_a_job_of_more_nodes_than_there_are_names_is_cancelled_and_takes_no_room() -> None:
    (cancelled,) = decide.plan(world(job(nodes=4)))
    assert isinstance(cancelled, deeds.Cancel)
    assert cancelled.reason == "4 nodes are more than the 3 names that this cluster has for guests; ask for fewer"
    assert kinds(world(job(nodes=3))) == ["FindRoom"]


def test_while_there_is_no_name_at_all_a_job_waits_and_is_told() -> None:
    of = world(job())
    nothing = msgspec.structs.replace(of, look=msgspec.structs.replace(of.look, nodes={}))
    (told,) = decide.plan(nothing)
    assert isinstance(told, deeds.Tell)
    assert "adds their names to slurm.conf" in told.reason


def test_with_room_names_at_rest_are_assigned_and_no_name_twice() -> None:
    other = JobKey(cluster="k", job_id=8, submit_s=100)
    jobs = (job(nodes=2), job(key=other))
    places = (place("h1"), place("h2"), place("h1", run=other))
    first, second = decide.plan(world(*jobs, places=places))
    assert isinstance(first, deeds.Assign)
    assert isinstance(second, deeds.Assign)
    assert first.hosts == (("v1", "h1"), ("v2", "h2"))
    assert second.hosts == (("v3", "h1"),)


@pytest.mark.parametrize(
    "state",
    ["IDLE+CLOUD+POWERING_DOWN", "IDLE+CLOUD+POWERED_DOWN", "DOWN+CLOUD", "IDLE+CLOUD+DRAIN+POWERED_DOWN+POWER_DOWN"],
)
def test_a_name_that_is_not_at_rest_and_closed_is_not_assigned(state: str) -> None:
    names = tuple(node(name, state) for name in ("v1", "v2", "v3"))
    assert "Assign" not in kinds(world(job(), nodes=names, places=(place(),)))


def test_a_name_under_which_a_host_still_carries_a_guest_is_not_assigned() -> None:
    left = guest("v1", run=JobKey(cluster="k", job_id=3, submit_s=1))
    (action,) = decide.plan(world(job(), places=(place(),), guests={"h2": (left,)}))
    assert isinstance(action, deeds.Assign)
    assert action.hosts == (("v2", "h1"),)


def test_a_name_that_a_host_carried_when_it_was_last_heard_is_not_assigned() -> None:
    (action,) = decide.plan(msgspec.structs.replace(world(job(), places=(place(),)), lost=("v1",)))
    assert isinstance(action, deeds.Assign)
    assert action.hosts == (("v2", "h1"),)


def test_a_job_waits_while_the_pool_has_too_few_names() -> None:
    taken = JobKey(cluster="k", job_id=3, submit_s=1)
    tell, *_ = decide.plan(world(job(nodes=2), places=(place(), place("h2")), reserved={taken: ("v1", "v2")}))
    assert tell == deeds.Tell(RUN, "waits for a node name of the pool to become free")


def test_no_second_guest_is_begun_while_a_host_carries_one_of_an_earlier_attempt() -> None:
    assert kinds(world(job(), places=(place(),), guests={"h1": (guest("v9", "failed"),)})) == []


def test_reserved_names_are_pinned_then_opened_and_only_then_joined() -> None:
    pointed = node("v1", on="h1")
    reserved = world(job(), nodes=(pointed,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(reserved) == ["Pin"]
    assert [order.join for order in orders(reserved)["h1"]] == [False]
    pinned = world(PINNED, nodes=(pointed,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(pinned) == ["Open"]
    opened = msgspec.structs.replace(pointed, state=frozenset({"IDLE", "CLOUD", "POWERED_DOWN"}))
    joining = world(PINNED, nodes=(opened,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(joining) == []
    assert [order.join for order in orders(joining)["h1"]] == [True]
    assert orders(joining)["h2"] == ()


def test_a_job_is_released_when_every_guest_is_ready_and_every_slurmd_has_registered() -> None:
    assert kinds(ready()) == ["Release"]
    assert kinds(ready(guests={"h1": (guest(state="starting"),)})) == []
    assert kinds(ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN+NOT_RESPONDING", on="h1"),))) == []


def test_a_released_job_that_waits_for_the_scheduler_is_left_alone() -> None:
    waiting = job(reason="None", reservation=reservation_name(RUN))
    found = world(waiting, nodes=(OPEN,), places=(place(),), reserved={RUN: ("v1",)}, guests={"h1": (guest(),)})
    assert kinds(found) == []


def test_what_its_owner_enlarged_is_not_released_but_begins_anew() -> None:
    larger = msgspec.structs.replace(PINNED, cpus=4)
    found = world(larger, nodes=(OPEN,), places=(place(),), reserved={RUN: ("v1",)}, guests={"h1": (guest(),)})
    assert kinds(found) == ["Pin", "Close"]


def test_names_that_a_killed_controller_was_giving_back_are_given_back() -> None:
    assert kinds(ready(nodes=(CLOSED,))) == ["Pin", "Unreserve"]
    assert kinds(ready(job(), nodes=(CLOSED,))) == ["Unreserve"]


def test_room_of_another_size_is_given_back_first() -> None:
    assert kinds(world(job(cpus=4), places=(place(),))) == ["GiveBackRoom"]


def test_a_guest_that_failed_gives_its_names_back() -> None:
    for state in ("failed", "ended"):
        (_, action) = decide.plan(ready(guests={"h1": (guest(state=state, reason="no"),)}))
        assert action == deeds.Close("v1", "no")


def test_room_of_an_attempt_that_failed_is_given_back_so_that_the_queue_may_choose_again() -> None:
    assert kinds(world(job(), places=(place(),), begun=())) == ["GiveBackRoom"]


def test_a_job_that_the_queue_has_given_up_stays_held_with_the_last_reason() -> None:
    (action,) = decide.plan(world(job(), given_up={RUN: "no guest after 5 attempts; the last: disk full"}))
    assert action == deeds.Tell(RUN, "no guest after 5 attempts; the last: disk full")


def test_what_can_be_had_nowhere_cancels_the_job_at_once() -> None:
    (action,) = decide.plan(ready(guests={"h1": (guest(state="refused", reason="no image 'x'"),)}))
    assert action == deeds.Cancel(RUN, "no image 'x'")


# -- what Slurm does not start ---------------------------------------------------------------------------------------


def test_a_released_job_that_slurm_does_not_start_is_held_again_after_the_bound_and_no_sooner() -> None:
    assert kinds(ready(RELEASED, ready_since_s=NOW_S - 120)) == []
    (action,) = decide.plan(ready(RELEASED, ready_since_s=NOW_S - 121))
    assert action == deeds.Recall(RUN, "slurm did not start it within 120 s: Licenses")


def test_a_job_that_rests_gives_back_its_names_then_its_room_and_stands_in_no_line() -> None:
    resting = {RUN: "tried again in 120 s"}
    assert kinds(ready(resting=resting)) == ["Pin", "Close"]
    assert kinds(ready(nodes=(CLOSED,), resting=resting)) == ["Pin", "Unreserve"]
    assert kinds(world(job(), places=(place(),), guests={"h1": (guest(),)}, resting=resting)) == ["Rest"]
    assert kinds(world(job(), places=(place(),), settled=("h2",), resting=resting)) == ["Rest"]
    assert kinds(world(job(), places=(place(),), resting=resting)) == ["GiveBackRoom"]
    assert decide.plan(world(job(), resting=resting)) == (deeds.Rest(RUN, "tried again in 120 s"),)


def test_a_job_that_rests_keeps_no_room_on_a_host_that_answers_though_it_has_some_on_a_silent_one() -> None:
    resting = {RUN: "tried again in 120 s"}
    found = decide.plan(world(job(), places=(place("h3"), place("h1", attempt=1)), resting=resting))
    assert found == (deeds.GiveBackRoom(RUN, 1, "tried again in 120 s"),)
    assert kinds(world(job(), places=(place("h3"),), resting=resting)) == ["Rest"]
    both = (place("h1"), place("h3"))
    assert kinds(world(job(), places=both, resting=resting)) == ["Rest"]


@pytest.mark.parametrize("state", ["DOWN", "INACTIVE"])
def test_while_no_job_of_the_partition_starts_none_has_guests(state: str) -> None:
    why = f"waits for its partition, which is {state}"
    assert decide.plan(ready(RELEASED, partition_state=state)) == (deeds.Hold(RUN, why),)
    assert kinds(ready(partition_state=state)) == ["Pin", "Close"]
    (action,) = decide.plan(world(job(), partition_state=state))
    assert action == deeds.Rest(RUN, why)
    assert kinds(world(job(), partition_state="DRAIN")) == ["FindRoom"]


def test_a_job_whose_owner_lets_it_wait_for_others_when_it_has_its_guests_gives_them_back() -> None:
    for of in (RELEASED, PINNED):
        assert kinds(ready(msgspec.structs.replace(of, waits_for_others=True))) == ["Pin", "Close"]


def test_when_slurm_expects_to_start_a_released_job_is_no_wish_of_its_owner() -> None:
    assert kinds(ready(msgspec.structs.replace(RELEASED, begins_s=NOW_S + 60))) == []


def test_only_a_job_that_slurm_may_start_and_that_has_all_it_needs_is_released() -> None:
    assert decide.released(ready(RELEASED)) == {RUN}
    assert decide.released(ready(PINNED)) == set()
    assert decide.released(ready(RELEASED, guests={})) == set()


# -- while it runs ---------------------------------------------------------------------------------------------------


RUNNING = job("RUNNING", reason="None", on=("v1",), reservation=reservation_name(RUN))


def running(state: str, *guests: GuestNode) -> World:
    return world(
        RUNNING,
        nodes=(node("v1", state, on="h1"),),
        places=(place(),),
        reserved={RUN: ("v1",)},
        guests={"h1": guests},
    )


def test_a_name_is_closed_as_soon_as_its_job_runs() -> None:
    assert kinds(running("MIXED+CLOUD", guest())) == ["Close"]
    assert kinds(running("MIXED+CLOUD+DRAIN", guest())) == []


def test_the_name_of_a_suspended_job_is_closed_as_that_of_one_that_runs() -> None:
    of = running("MIXED+CLOUD", guest())
    suspended = msgspec.structs.replace(RUNNING, job=msgspec.structs.replace(RUNNING.job, state="suspended"))
    assert kinds(msgspec.structs.replace(of, look=msgspec.structs.replace(of.look, jobs=(suspended,)))) == ["Close"]


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_slurm_is_told_once_of_a_guest_that_died(state: GuestNodeState) -> None:
    (action,) = decide.plan(running("MIXED+CLOUD+DRAIN", guest(state=state, reason="killed")))
    assert action == deeds.Down("v1", RUN, "killed")
    assert kinds(running("DOWN+CLOUD", guest(state=state, reason="killed"))) == []


def test_a_guest_that_its_owner_shut_down_is_no_node_that_is_down() -> None:
    assert kinds(running("MIXED+CLOUD+DRAIN", guest(state="ended"))) == []


def test_a_guest_stays_until_slurm_is_done_with_its_node() -> None:
    completing = msgspec.structs.replace(
        running("IDLE+CLOUD+COMPLETING+DRAIN", guest()).look.jobs[0],
        job=msgspec.structs.replace(RUNNING.job, state="ended", slurm_state="COMPLETING"),
    )
    found = running("IDLE+CLOUD+COMPLETING+DRAIN", guest())
    found = msgspec.structs.replace(found, look=msgspec.structs.replace(found.look, jobs=(completing,)))
    assert kinds(found) == []
    assert len(orders(found)["h1"]) == 1


def test_no_job_is_configuring_beyond_the_bound() -> None:
    def since(began_s: float | None) -> World:
        late = job("CONFIGURING", reason="None", on=("v1",), started_s=began_s)
        return world(late, nodes=(node("v1", "MIXED+CLOUD", on="h1"),), places=(place(),), reserved={RUN: ("v1",)})

    assert decide.plan(since(NOW_S - 31)) == (deeds.GiveBackJob(RUN, "its nodes do not answer"),)
    assert kinds(since(NOW_S - 30)) == ["Close"]
    assert kinds(since(None)) == ["Close"]


def test_a_job_whose_prolog_does_not_begin_is_not_running_whatever_slurm_calls_it() -> None:
    late = job("RUNNING", reason="Prolog", on=("v1",), started_s=NOW_S - 31)
    found = world(late, nodes=(node("v1", "MIXED+CLOUD", on="h1"),), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(found) == ["GiveBackJob"]


def test_slurm_does_not_wait_for_a_slurmd_that_does_not_answer_when_its_job_is_over() -> None:
    over = job("COMPLETING", reason="Prolog", on=("v1",), reservation=reservation_name(RUN))
    silent = node("v1", "IDLE+CLOUD+COMPLETING+NOT_RESPONDING+DRAIN", on="h1")
    words = {"places": (place(),), "reserved": {RUN: ("v1",)}, "guests": {"h1": (guest(),)}}
    (action,) = decide.plan(world(over, nodes=(silent,), **words))  # type: ignore[arg-type]
    assert action == deeds.Down("v1", RUN, "its slurmd does not answer")
    told = node("v1", "DOWN+CLOUD+COMPLETING+NOT_RESPONDING", on="h1")
    assert kinds(world(over, nodes=(told,), **words)) == []  # type: ignore[arg-type]


def test_a_job_that_landed_on_another_name_is_given_back_at_once() -> None:
    stray = job("CONFIGURING", reason="None", on=("v2",), started_s=NOW_S)
    given_back = deeds.GiveBackJob(RUN, "it was given another job's node")
    assert given_back in decide.plan(world(stray, nodes=(node("v2", "MIXED+CLOUD+POWERING_UP"),)))


# -- afterwards ------------------------------------------------------------------------------------------------------


def test_of_a_run_that_is_over_the_reservation_goes_first_and_the_host_is_told_nothing_of_it() -> None:
    found = world(
        nodes=(node("v1", "IDLE+CLOUD+DRAIN", on="h1"),),
        places=(place(),),
        reserved={RUN: ("v1",)},
        guests={"h1": (guest(),)},
    )
    assert kinds(found) == ["Unreserve"]
    assert orders(found)["h1"] == ()


def test_a_requeued_job_is_unpinned_before_its_old_reservation_goes() -> None:
    again = job(key=NEXT_RUN, reservation=reservation_name(RUN), waits_for_others=True)
    found = world(again, nodes=(node("v1", "IDLE+CLOUD", on="h1"),), reserved={RUN: ("v1",)})
    assert kinds(found) == ["Watch", "Pin"]
    pending = msgspec.structs.replace(again, job=msgspec.structs.replace(again.job, state="pending"))
    look = msgspec.structs.replace(found.look, jobs=(pending,))
    assert "Pin" in kinds(msgspec.structs.replace(found, look=look))


def test_a_name_that_nobody_uses_is_powered_down_and_then_closed() -> None:
    assert kinds(world(nodes=(node("v1", "IDLE+CLOUD+DRAIN"),))) == ["PowerDown"]
    assert kinds(world(nodes=(node("v1", "IDLE+CLOUD+DRAIN+POWER_DOWN"),))) == []
    assert kinds(world(nodes=(node("v1", "IDLE+CLOUD+POWERING_DOWN"),))) == ["Close"]
    assert kinds(world(nodes=(node("v1", "IDLE+CLOUD+DRAIN+POWERING_DOWN"),))) == []
    assert kinds(world(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN"),))) == ["Close"]
    assert kinds(world()) == []


def test_room_is_given_back_only_when_its_host_says_that_nothing_is_left() -> None:
    assert kinds(world(places=(place(),), guests={"h1": (guest(),)})) == []
    assert kinds(world(places=(place(),))) == ["GiveBackRoom"]
    assert kinds(world(places=(place(),), settled=("h1",))) == ["GiveBackRoom"]


def test_room_is_kept_while_its_host_may_still_make_the_guest_that_it_was_told_of() -> None:
    assert kinds(world(places=(place(),), settled=("h2",))) == []


def test_no_names_are_assigned_on_a_host_that_may_still_make_a_guest_of_an_earlier_attempt() -> None:
    assert kinds(world(job(), places=(place(),), settled=("h2",))) == []
    assert kinds(world(job(), places=(place(),), begun=(), settled=("h2",))) == []


def test_what_is_over_is_what_ended_and_is_carried_by_nobody() -> None:
    other = JobKey(cluster="k", job_id=8, submit_s=100)
    assert decide.over(world(job(), places=(place(), place("h2", run=other)))) == {(other, 0)}
    assert decide.over(world(places=(place("h2", run=other),), guests={"h2": (guest(run=other),)})) == set()
    assert decide.over(world(places=(place("h9", run=other),))) == set()


def test_room_on_a_host_that_is_silent_is_kept_and_the_guest_begins_elsewhere() -> None:
    lost = place("h3")
    assert kinds(world(places=(lost,))) == []
    (action,) = decide.plan(world(job(), places=(lost,)))
    assert isinstance(action, deeds.FindRoom)
    assert action.attempt == 1


def test_room_of_an_attempt_that_was_given_up_is_given_back_when_its_host_speaks_and_has_nothing() -> None:
    places = (place("h1"), place("h2", attempt=1))
    assert kinds(world(job(), places=places, guests={"h1": (guest("v3"),)})) == []
    waiting = world(job(), places=places)
    assert [type(action) for action in decide.plan(waiting)] == [deeds.Assign, deeds.GiveBackRoom]
    assert decide.plan(waiting)[1] == deeds.GiveBackRoom(RUN, 0, "its guests are elsewhere")


def test_names_on_a_host_that_fell_silent_are_given_back_before_the_guest_begins_elsewhere() -> None:
    pointed = node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h3")
    found = world(PINNED, nodes=(pointed,), places=(place("h3"),), reserved={RUN: ("v1",)})
    assert kinds(found) == ["Pin", "Close"]


def test_before_every_host_has_spoken_a_job_is_held_at_most_and_keeps_its_names() -> None:
    unheard = msgspec.structs.replace(ready(), hosts={}, settled=(), complete=False)
    assert kinds(unheard) == []
    pending = msgspec.structs.replace(unheard.look.jobs[0], reason="None")
    look = msgspec.structs.replace(unheard.look, jobs=(pending,))
    assert kinds(msgspec.structs.replace(unheard, look=look)) == ["Hold"]


def test_names_of_a_run_whose_guests_failed_are_given_back_though_no_host_carries_them_any_more() -> None:
    pinned = msgspec.structs.replace(PINNED, reservation="")
    closed = node("v1", on="h1")
    found = world(pinned, nodes=(closed,), places=(place(),), reserved={RUN: ("v1",)}, begun=())
    assert kinds(found) == ["Unreserve"]
