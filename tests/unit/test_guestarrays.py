"""Arrays whose tasks have guests that are nodes."""

import msgspec

from carrel.core import guestdeeds as deeds
from carrel.core import guestnodes as decide
from carrel.core.guestarrays import IN_LINE_MAX
from carrel.model.job import JobKey
from carrel.model.pool import PoolJob
from carrel.testing.guestworlds import RUN, job, kinds, place, world


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
