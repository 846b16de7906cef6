"""The rows of the table in ``carrel.core.guestnodes``, each by itself."""

from collections.abc import Collection

import msgspec
import pytest

from carrel.core import guestdeeds as deeds
from carrel.core import guestnodes as decide
from carrel.core.guestarrays import IN_LINE_MAX
from carrel.core.guestnodes import Limits, World
from carrel.model.guest import GuestRequest
from carrel.model.guestnode import GuestNode, GuestNodeState, HostReport
from carrel.model.host import Demand
from carrel.model.job import Job, JobKey
from carrel.model.pool import Look, Place, PoolJob, PoolNode, Reservation, Wish, reservation_name

MIB = 2**20
RUN = JobKey(cluster="k", job_id=7, submit_s=100)
NEXT_RUN = JobKey(cluster="k", job_id=7, submit_s=103, restart=1)
NOW_S = 1000.0
RESTING = "IDLE+CLOUD+DRAIN+POWERED_DOWN"
WISH = Wish(request=GuestRequest(image="debian12", per="node"), cwd="/home/ada")


def job(state: str = "PENDING", *, key: JobKey = RUN, reason: str = "JobHeldAdmin", **more: object) -> PoolJob:
    """Return a job of one CPU and 320 MiB that we hold, unless told otherwise."""
    words = {"PENDING": "held" if "Held" in reason else "pending", "RUNNING": "running", "CONFIGURING": "running"}
    nodes = more.pop("on", ())
    known = Job(key=key, state=words.get(state, "ended"), slurm_state=state, user="ada", uid=7, gid=8, nodes=nodes)  # type: ignore[arg-type]
    found = PoolJob(job=known, nodes=1, cpus=1, memory_bytes=320 * MIB, reason=reason, wish=WISH)
    return msgspec.structs.replace(found, **more)


def place(host: str = "h1", *, run: JobKey = RUN, attempt: int = 0, cpus: int = 1) -> Place:
    return Place(run=run, attempt=attempt, host=host, cpus=cpus, memory_bytes=320 * MIB)


def node(name: str, state: str = RESTING, *, on: str = "") -> PoolNode:
    return PoolNode(
        name=name, state=frozenset(state.split("+")), address=f"10.0.0.{on[1:]}" if on else name, host_name=on
    )


def guest(name: str = "v1", state: GuestNodeState = "ready", *, run: JobKey = RUN, reason: str = "") -> GuestNode:
    return GuestNode(node=name, run=run, state=state, joined=True, reason=reason)


def world(
    *jobs: PoolJob,
    nodes: tuple[PoolNode, ...] = (),
    places: tuple[Place, ...] = (),
    reserved: dict[JobKey, tuple[str, ...]] | None = None,
    guests: dict[str, tuple[GuestNode, ...]] | None = None,
    begun: tuple[JobKey, ...] | None = None,
    given_up: dict[JobKey, str] | None = None,
    settled: tuple[str, ...] | None = None,
    resting: dict[JobKey, str] | None = None,
    ready_since_s: float = NOW_S,
    partition_state: str = "UP",
) -> World:
    """Return a world with names v1 to v3 at rest and hosts h1 and h2, but for what is told otherwise."""
    known = {name: node(name) for name in ("v1", "v2", "v3")} | {each.name: each for each in nodes}
    carried = {"h1": (), "h2": ()} | (guests or {})
    names = [(reservation_name(run), its) for run, its in (reserved or {}).items()]
    return World(
        look=Look(
            cluster="k",
            jobs=jobs,
            nodes=known,
            reservations={name: Reservation(name=name, nodes=its, users="ada") for name, its in names},
            partition_state=partition_state,
        ),
        places=places,
        hosts={name: HostReport(host=name, address=f"10.0.0.{name[1:]}", guests=its) for name, its in carried.items()},
        settled=settled if settled is not None else tuple(carried),
        begun=begun if begun is not None else {place.run for place in places},
        given_up=given_up or {},
        resting=resting or {},
        ready_since_s={each.key: ready_since_s for each in jobs},
        now_s=NOW_S,
        limits=Limits(configuring_max_s=30.0, start_max_s=120.0),
    )


def kinds(of: World) -> list[str]:
    return [type(action).__name__ for action in decide.plan(of)]


PINNED = job(reservation=reservation_name(RUN))
OPEN = node("v1", "IDLE+CLOUD", on="h1")
CLOSED = node("v1", "IDLE+CLOUD+DRAIN", on="h1")


def ready(of: PoolJob = PINNED, **more: object) -> World:
    """Return a world in which a job has all that it needs."""
    words = {"nodes": (OPEN,), "places": (place(),), "reserved": {RUN: ("v1",)}, "guests": {"h1": (guest(),)}}
    return world(of, **(words | more))  # type: ignore[arg-type]


# -- before a run ----------------------------------------------------------------------------------------------------


def test_a_job_that_its_owner_could_release_is_held_by_us() -> None:
    assert kinds(world(job(reason="JobHeldUser"))) == ["Hold"]


def test_a_job_that_was_released_before_its_guests_are_there_is_held_again() -> None:
    assert kinds(world(job(reason="Priority"))) == ["Hold"]


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


def test_with_room_names_at_rest_are_assigned_and_no_name_twice() -> None:
    other = JobKey(cluster="k", job_id=8, submit_s=100)
    jobs = (job(nodes=2), job(key=other))
    places = (place("h1"), place("h2"), place("h1", run=other))
    first, second = decide.plan(world(*jobs, places=places))
    assert isinstance(first, deeds.Assign)
    assert isinstance(second, deeds.Assign)
    assert first.hosts == (("v1", "h1"), ("v2", "h2"))
    assert second.hosts == (("v3", "h1"),)


@pytest.mark.parametrize("state", ["IDLE+CLOUD+POWERING_DOWN", "IDLE+CLOUD+POWERED_DOWN", "DOWN+CLOUD"])
def test_a_name_that_is_not_at_rest_and_closed_is_not_assigned(state: str) -> None:
    names = tuple(node(name, state) for name in ("v1", "v2", "v3"))
    assert "Assign" not in kinds(world(job(), nodes=names, places=(place(),)))


def test_a_name_under_which_a_host_still_carries_a_guest_is_not_assigned() -> None:
    left = guest("v1", run=JobKey(cluster="k", job_id=3, submit_s=1))
    (action,) = decide.plan(world(job(), places=(place(),), guests={"h2": (left,)}))
    assert isinstance(action, deeds.Assign)
    assert action.hosts == (("v2", "h1"),)


def test_no_second_guest_is_begun_while_a_host_carries_one_of_an_earlier_attempt() -> None:
    assert kinds(world(job(), places=(place(),), guests={"h1": (guest("v9", "failed"),)})) == []


def test_reserved_names_are_pinned_then_opened_and_only_then_joined() -> None:
    pointed = node("v1", on="h1")
    reserved = world(job(), nodes=(pointed,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(reserved) == ["Pin"]
    assert [order.join for order in decide.orders(reserved, "h1")] == [False]
    pinned = world(PINNED, nodes=(pointed,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(pinned) == ["Open"]
    opened = msgspec.structs.replace(pointed, state=frozenset({"IDLE", "CLOUD", "POWERED_DOWN"}))
    joining = world(PINNED, nodes=(opened,), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(joining) == []
    assert [order.join for order in decide.orders(joining, "h1")] == [True]
    assert decide.orders(joining, "h2") == ()


def test_a_host_begins_with_guest_and_slurmd_as_soon_as_slurm_has_taken_the_names() -> None:
    placed = world(job(), places=(place(),))
    (action,) = decide.plan(placed)
    assert isinstance(action, deeds.Assign)
    foreseen = decide.foreseen(placed, action)
    assert [(order.node, order.join) for order in decide.orders(foreseen, "h1")] == [("v1", True)]
    assert decide.plan(foreseen) == ()
    assert "v1" not in foreseen.free


def test_a_job_is_released_when_every_guest_is_ready_and_every_slurmd_has_registered() -> None:
    assert kinds(ready()) == ["Release"]
    assert kinds(ready(guests={"h1": (guest(state="starting"),)})) == []
    assert kinds(ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN+NOT_RESPONDING", on="h1"),))) == []


def test_a_name_whose_slurmd_renamed_its_host_is_where_its_runs_guest_is_carried() -> None:
    renamed = node("v1", "IDLE+CLOUD", on="h9")
    assert kinds(ready(nodes=(renamed,))) == ["Release"]
    assert [order.node for order in decide.orders(ready(nodes=(renamed,)), "h1")] == ["v1"]
    assert decide.orders(ready(nodes=(renamed,)), "h2") == ()
    assert kinds(ready(nodes=(renamed,), guests={"h1": (guest(run=NEXT_RUN),)})) == ["Pin", "Close"]
    assert kinds(ready(nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h9"),))) == ["Pin", "Close"]


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
    assert kinds(ready(guests={"h1": (guest(state="failed", reason="no"),)})) == ["Pin", "Close"]


def test_room_of_an_attempt_that_failed_is_given_back_so_that_the_queue_may_choose_again() -> None:
    assert kinds(world(job(), places=(place(),), begun=())) == ["GiveBackRoom"]


def test_a_job_that_the_queue_has_given_up_stays_held_with_the_last_reason() -> None:
    (action,) = decide.plan(world(job(), given_up={RUN: "no guest after 5 attempts; the last: disk full"}))
    assert action == deeds.Tell(RUN, "no guest after 5 attempts; the last: disk full")


def test_what_can_be_had_nowhere_cancels_the_job_at_once() -> None:
    (action,) = decide.plan(ready(guests={"h1": (guest(state="refused", reason="no image 'x'"),)}))
    assert action == deeds.Cancel(RUN, "no image 'x'")


# -- what Slurm does not start ---------------------------------------------------------------------------------------


RELEASED = msgspec.structs.replace(PINNED, reason="Licenses", job=msgspec.structs.replace(PINNED.job, state="pending"))


def test_a_released_job_that_slurm_does_not_start_is_held_again_after_the_bound_and_no_sooner() -> None:
    assert kinds(ready(RELEASED, ready_since_s=NOW_S - 119)) == []
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


@pytest.mark.parametrize("state", ["DOWN", "INACTIVE"])
def test_while_no_job_of_the_partition_starts_none_has_guests(state: str) -> None:
    assert kinds(ready(RELEASED, partition_state=state)) == ["Hold"]
    assert kinds(ready(partition_state=state)) == ["Pin", "Close"]
    (action,) = decide.plan(world(job(), partition_state=state))
    assert action == deeds.Rest(RUN, f"waits for its partition, which is {state}")
    assert kinds(world(job(), partition_state="DRAIN")) == ["FindRoom"]


def test_a_job_whose_owner_lets_it_wait_for_others_when_it_has_its_guests_gives_them_back() -> None:
    for of in (RELEASED, PINNED):
        assert kinds(ready(msgspec.structs.replace(of, waits_for_others=True))) == ["Pin", "Close"]


def test_when_slurm_expects_to_start_a_released_job_is_no_wish_of_its_owner() -> None:
    assert kinds(ready(msgspec.structs.replace(RELEASED, begins_s=NOW_S + 60))) == []


# -- arrays ----------------------------------------------------------------------------------------------------------


def task(number: int, *, key: int, state: str = "PENDING", reason: str = "JobHeldAdmin", **more: object) -> PoolJob:
    """Return a task of array 7, as a job of its own."""
    found = job(state, key=JobKey(cluster="k", job_id=key, submit_s=100), reason=reason, **more)
    return msgspec.structs.replace(found, job=msgspec.structs.replace(found.job, array_job_id=7, array_task_id=number))


def array(*tasks: int, **more: object) -> PoolJob:
    """Return what still waits of array 7 as one job."""
    return msgspec.structs.replace(task(tasks[0], key=7), tasks=tasks, **more)


def test_tasks_of_an_array_become_jobs_before_they_look_for_room_and_only_some_ahead() -> None:
    (action,) = decide.plan(world(array(0, 1, 2, 5)))
    assert action == deeds.Split(RUN, (0, 1, 2, 5), "each task has guests of its own")
    (action,) = decide.plan(world(array(*range(1000))))
    assert isinstance(action, deeds.Split)
    assert action.tasks == tuple(range(IN_LINE_MAX))


def test_no_further_task_becomes_a_job_while_enough_of_them_stand_in_line() -> None:
    in_line = [task(number, key=20 + number) for number in range(IN_LINE_MAX)]
    assert kinds(world(array(8, 9), *in_line)) == ["Tell", *["FindRoom"] * IN_LINE_MAX]
    begun = tuple(each.key for each in in_line[:3])
    (first, *_) = decide.plan(world(array(8, 9, 10, 11), *in_line, begun=begun))
    assert first == deeds.Split(RUN, (8, 9, 10), "each task has guests of its own")


def test_no_more_tasks_are_begun_than_their_owner_lets_run_at_once() -> None:
    running = task(0, key=20, state="RUNNING", reason="None", on=("v3",))
    (first, *_) = decide.plan(world(array(1, 2, 3, at_once=2), running))
    assert first == deeds.Split(RUN, (1,), "each task has guests of its own")
    (first, *_) = decide.plan(world(array(2, 3, at_once=2), running, task(1, key=21)))
    assert first == deeds.Tell(RUN, "waits for other tasks of its array, of which 2 run at a time")
    ended = task(0, key=20, state="COMPLETED", reason="None")
    (first, *_) = decide.plan(world(array(2, 3, at_once=2), ended, task(1, key=21)))
    assert isinstance(first, deeds.Split)


def test_a_task_that_was_given_up_keeps_no_other_from_running() -> None:
    lost = task(0, key=20)
    found = decide.plan(world(array(1, 2, at_once=1), lost, given_up={lost.key: "no guest after 5 attempts"}))
    assert found[0] == deeds.Split(RUN, (1,), "each task has guests of its own")


def test_the_last_task_of_an_array_is_a_job_already_and_waits_for_the_others_like_them() -> None:
    assert kinds(world(array(9))) == ["FindRoom"]
    assert kinds(world(array(9, at_once=1), task(8, key=20))) == ["Tell", "FindRoom"]
    assert kinds(world(array(9, at_once=1), task(8, key=20), places=(place(),))) == ["Assign", "FindRoom"]


def test_slurm_is_told_of_a_task_by_its_number_since_the_arrays_id_means_all_of_them() -> None:
    assert array(0, 1, 2, 5).name == "7_[0-2,5]"
    assert array(0, 1, 2, 5).one == "7_0"
    assert array(9).name == array(9).one == "7_9"
    assert task(3, key=20).name == "7_3"
    assert job().name == "7"


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


def test_slurm_is_told_of_a_guest_that_died() -> None:
    (action,) = decide.plan(running("MIXED+CLOUD+DRAIN", guest(state="failed", reason="killed")))
    assert action == deeds.Down("v1", RUN, "killed")


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
    assert len(decide.orders(found, "h1")) == 1


@pytest.mark.parametrize(("began_s", "expected"), [(NOW_S - 31, ["GiveBackJob"]), (NOW_S - 29, ["Close"])])
def test_no_job_is_configuring_beyond_the_bound(began_s: float, expected: list[str]) -> None:
    late = job("CONFIGURING", reason="None", on=("v1",), started_s=began_s)
    found = world(late, nodes=(node("v1", "MIXED+CLOUD", on="h1"),), places=(place(),), reserved={RUN: ("v1",)})
    assert kinds(found) == expected


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


def test_a_job_that_landed_on_another_name_is_given_back_at_once() -> None:
    stray = job("CONFIGURING", reason="None", on=("v2",), started_s=NOW_S)
    assert "GiveBackJob" in kinds(world(stray, nodes=(node("v2", "MIXED+CLOUD+POWERING_UP"),)))


# -- afterwards ------------------------------------------------------------------------------------------------------


def test_of_a_run_that_is_over_the_reservation_goes_first_and_the_host_is_told_nothing_of_it() -> None:
    found = world(
        nodes=(node("v1", "IDLE+CLOUD+DRAIN", on="h1"),),
        places=(place(),),
        reserved={RUN: ("v1",)},
        guests={"h1": (guest(),)},
    )
    assert kinds(found) == ["Unreserve"]
    assert decide.orders(found, "h1") == ()


def test_a_requeued_job_is_unpinned_before_its_old_reservation_goes() -> None:
    again = job(key=NEXT_RUN, reservation=reservation_name(RUN), waits_for_others=True)
    found = world(again, nodes=(node("v1", "IDLE+CLOUD", on="h1"),), reserved={RUN: ("v1",)})
    assert kinds(found) == ["Watch", "Pin"]


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
    assert decide.orders(far(ready(nodes=(closed,), guests={})), "h1") == ()
    (order,) = decide.orders(far(ready(nodes=(INSIDE,), guests={})), "h1")
    assert (order.node, order.port, order.join, order.started) == ("v1", 7001, True, False)
    assert decide.orders(far(ready(nodes=(INSIDE,), guests={})), "h2") == ()


def test_it_is_told_the_address_of_the_pool_and_the_ports_of_its_jobs_other_nodes() -> None:
    pinned = msgspec.structs.replace(PINNED, nodes=2)
    places = tuple(msgspec.structs.replace(place(), address=address) for address in ("10.9.0.1", "10.9.0.2"))
    names = (INSIDE, msgspec.structs.replace(INSIDE, name="v2", port=7002))
    of = far(world(pinned, nodes=names, places=places, reserved={RUN: ("v1", "v2")}))
    first, second = decide.orders(of, "h1")
    assert (first.address, first.peers) == ("10.9.0.1", (("v2", 7002),))
    assert (second.address, second.peers) == ("10.9.0.2", (("v1", 7001),))


def test_its_name_is_pointed_at_the_address_that_it_got_and_the_job_is_not_released_before() -> None:
    elsewhere = msgspec.structs.replace(INSIDE, address="10.9.0.99")
    (action,) = decide.plan(far(ready(nodes=(elsewhere,))))
    assert action == deeds.Point("v1", "10.9.0.7", "its guest has this address")
    assert kinds(far(ready(nodes=(elsewhere,)), address="")) == []
    assert kinds(far(ready(nodes=(INSIDE,)))) == ["Release"]


def test_once_its_job_has_its_nodes_a_guest_is_ordered_as_one_that_is_there_or_lost() -> None:
    running = msgspec.structs.replace(job("RUNNING", on=("v1",)), reservation=reservation_name(RUN))
    (order,) = decide.orders(far(world(running, nodes=(INSIDE,), places=(place(),), reserved={RUN: ("v1",)})), "h1")
    assert order.started


# -- a slurmd that does not come -------------------------------------------------------------------------------------


def judge(of: World, guest: GuestNode, *, counted: Collection[decide.Attempt] = ()) -> GuestNode:
    report = msgspec.structs.replace(of.hosts["h1"], guests=(guest,))
    (found,) = decide.judged(of.look, {"h1": report}, counted=counted, now_s=NOW_S, limits=Limits(join_max_s=60))[
        "h1"
    ].guests
    return found


def test_a_guest_whose_slurmd_does_not_come_in_time_has_failed() -> None:
    asleep = node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1")
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    found = judge(ready(nodes=(asleep,)), late)
    assert (found.state, found.reason) == (
        "failed",
        "guest v1: its slurmd did not come within 60 s (guest_nodes.join_max_s) after it was ready",
    )
    in_time = msgspec.structs.replace(guest(), ready_s=NOW_S - 59)
    assert judge(ready(nodes=(asleep,)), in_time) == in_time


def test_a_guest_has_not_failed_whose_slurmd_came_or_could_not_come_yet_or_whose_job_runs() -> None:
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    running = world(job("RUNNING", on=("v1",)), nodes=(node("v1", "IDLE+CLOUD+POWERED_DOWN", on="h1"),))
    for of in (ready(), ready(nodes=(node("v1", on="h1"),)), running):
        assert judge(of, late) == late


def test_a_guest_that_was_said_to_have_failed_stays_so_when_its_name_is_closed() -> None:
    late = msgspec.structs.replace(guest(), ready_s=NOW_S - 61)
    closed = ready(nodes=(node("v1", on="h1"),))
    assert judge(closed, late, counted={(late.run, late.node, late.started_s)}).state == "failed"


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
