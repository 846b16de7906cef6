"""Each row of the decision table, plainly."""

import pytest

from carrel.core.lifecycle import (
    UNKNOWN_SETTLED_AFTER_S,
    DestroyGuest,
    EnsureGuest,
    PlaceLien,
    ReleaseJob,
    SettleLien,
    TopUpLien,
    next_actions,
)
from carrel.model.guest import Guest, GuestState
from carrel.model.job import Job, JobKey, JobState
from carrel.model.lien import NONE, WAIVED, Lien

RUN = JobKey(cluster="c", job_id=7, submit_s=9)
OPEN = Lien(state="open", amount_micro_su=100)
RESOLVED = Lien(state="resolved", amount_micro_su=80)
LIVING: tuple[JobState, ...] = ("held", "pending", "running", "suspended")
GONE: tuple[JobState, ...] = ("ended", "unknown")


def job(state: JobState, *, wants_guest: bool = True) -> Job:
    return Job(key=RUN, state=state, wants_guest=wants_guest)


def guest(state: GuestState, *, reason: str = "") -> Guest:
    return Guest(name="7.9.0", node="c1", driver="fake", state=state, run=RUN, reason=reason)


@pytest.mark.parametrize("state", LIVING)
def test_a_job_that_has_not_ended_and_has_no_lien_gets_one_and_nothing_else(state: JobState) -> None:
    plan = next_actions(job(state), NONE, None, required_micro_su=100)
    assert plan == (PlaceLien(RUN, 100, f"job is {state} and has no lien"),)


def test_a_held_job_with_a_lien_is_released() -> None:
    assert next_actions(job("held"), OPEN, None, required_micro_su=100) == (ReleaseJob(RUN, "lien is open"),)


def test_a_held_job_of_a_site_without_a_bank_is_released() -> None:
    assert next_actions(job("held"), WAIVED, None, required_micro_su=100) == (ReleaseJob(RUN, "lien is waived"),)


def test_a_held_job_whose_lien_is_resolved_stays_held() -> None:
    assert next_actions(job("held"), RESOLVED, None, required_micro_su=80) == ()


@pytest.mark.parametrize("state", ["pending", "suspended"])
def test_a_paid_job_that_does_not_run_is_left_alone(state: JobState) -> None:
    assert next_actions(job(state), OPEN, None, required_micro_su=100) == ()


@pytest.mark.parametrize("state", LIVING)
def test_a_lien_that_is_one_micro_su_too_small_is_topped_up(state: JobState) -> None:
    plan = next_actions(job(state), OPEN, guest("ready"), required_micro_su=101)
    assert plan == (TopUpLien(RUN, 101, "job may now need more than its lien"),)


def test_a_running_job_keeps_the_right_to_a_guest_while_its_lien_is_topped_up() -> None:
    plan = next_actions(job("running"), OPEN, None, required_micro_su=101)
    assert [type(action) for action in plan] == [TopUpLien, EnsureGuest]


def test_a_site_without_a_bank_never_tops_up() -> None:
    assert next_actions(job("running"), WAIVED, guest("ready"), required_micro_su=101) == ()


@pytest.mark.parametrize("lien", [OPEN, WAIVED])
def test_a_paid_running_job_that_wants_a_guest_gets_one(lien: Lien) -> None:
    plan = next_actions(job("running"), lien, None, required_micro_su=100)
    assert plan == (EnsureGuest(RUN, "job runs and has no guest"),)


def test_a_guest_that_is_down_under_a_running_job_is_made_anew_for_a_stated_reason() -> None:
    plan = next_actions(job("running"), OPEN, guest("down", reason="kernel panic"))
    assert plan == (EnsureGuest(RUN, "job runs and its guest is down: kernel panic"),)


def test_a_guest_that_is_down_for_no_known_reason_says_so() -> None:
    (action,) = next_actions(job("running"), OPEN, guest("down"))
    assert action.reason == "job runs and its guest is down: no reason known"


@pytest.mark.parametrize("state", ["starting", "ready", "suspended"])
def test_a_guest_that_is_there_is_left_alone(state: GuestState) -> None:
    assert next_actions(job("running"), OPEN, guest(state), required_micro_su=100) == ()


def test_a_running_job_that_wants_no_guest_gets_none() -> None:
    assert next_actions(job("running", wants_guest=False), OPEN, None) == ()


@pytest.mark.parametrize("there", [None, guest("ready"), guest("down")])
def test_a_running_job_whose_lien_is_resolved_is_left_to_the_person_who_was_told(there: Guest | None) -> None:
    assert next_actions(job("running"), RESOLVED, there, required_micro_su=100, used_micro_su=5) == ()


@pytest.mark.parametrize("lien", [NONE, OPEN, RESOLVED, WAIVED])
@pytest.mark.parametrize("state", ["starting", "ready", "suspended", "down"])
def test_the_guest_of_an_ended_run_is_destroyed_whoever_pays(lien: Lien, state: GuestState) -> None:
    assert next_actions(job("ended"), lien, guest(state)) == (DestroyGuest(RUN, "7.9.0", "job has ended"),)


@pytest.mark.parametrize("lien", [NONE, OPEN, RESOLVED, WAIVED])
def test_the_guest_of_an_unknown_run_is_destroyed_whoever_pays(lien: Lien) -> None:
    assert next_actions(job("unknown"), lien, guest("ready")) == (
        DestroyGuest(RUN, "7.9.0", "slurm knows no such run"),
    )


def test_an_ended_run_is_charged_what_it_used() -> None:
    plan = next_actions(job("ended"), OPEN, None, required_micro_su=100, used_micro_su=37)
    assert plan == (SettleLien(RUN, 37, "job has ended", flagged=False),)


def test_an_ended_run_that_used_nothing_is_settled_too() -> None:
    assert next_actions(job("ended"), OPEN, None, used_micro_su=0) == (SettleLien(RUN, 0, "job has ended"),)


def test_the_guest_goes_before_the_charge() -> None:
    plan = next_actions(job("ended"), OPEN, guest("ready"), used_micro_su=37)
    assert [type(action) for action in plan] == [DestroyGuest, SettleLien]


@pytest.mark.parametrize("state", GONE)
def test_nothing_is_charged_while_the_accounting_does_not_answer(state: JobState) -> None:
    assert next_actions(job(state), OPEN, None, used_micro_su=None, unknown_for_s=10 * UNKNOWN_SETTLED_AFTER_S) == ()


@pytest.mark.parametrize("lien", [NONE, RESOLVED, WAIVED])
@pytest.mark.parametrize("state", GONE)
def test_what_is_not_open_is_not_charged(state: JobState, lien: Lien) -> None:
    assert next_actions(job(state), lien, None, required_micro_su=200, used_micro_su=37, unknown_for_s=1e9) == ()


def test_a_run_unknown_for_an_hour_is_not_charged_yet() -> None:
    assert next_actions(job("unknown"), OPEN, None, used_micro_su=37, unknown_for_s=3600.0) == ()


def test_a_run_that_was_never_unknown_before_is_not_charged_yet() -> None:
    assert next_actions(job("unknown"), OPEN, None, used_micro_su=37) == ()


def test_a_run_unknown_for_more_than_an_hour_is_charged_as_last_seen_and_flagged() -> None:
    plan = next_actions(job("unknown"), OPEN, None, used_micro_su=37, unknown_for_s=3601.0)
    why = "slurm has not known the run for 3601 s; charged as last seen"
    assert plan == (SettleLien(RUN, 37, why, flagged=True),)


def test_a_lien_is_never_placed_or_topped_up_for_a_run_that_is_over() -> None:
    for state in GONE:
        assert next_actions(job(state), NONE, None, required_micro_su=100) == ()
        assert next_actions(job(state), OPEN, None, required_micro_su=101) == ()


def test_a_job_that_needs_nothing_still_gets_a_lien_of_nothing() -> None:
    (action,) = next_actions(job("held"), NONE, None)
    assert action == PlaceLien(RUN, 0, "job is held and has no lien")
