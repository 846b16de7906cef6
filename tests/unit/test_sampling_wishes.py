"""What users ask of nodes elsewhere: bounded, and nobody pushes out the wishes of others."""

import pytest

from carrel.daemons.wishes import KEPT_S, WISHES_MAX, WISHES_PER_USER_MAX, Wishes
from carrel.errors import RefusedError


def test_one_user_cannot_push_out_the_wishes_of_others() -> None:
    wishes = Wishes()
    wishes.add(job_id=1, every_s=1.0, uid=1001, now_s=0.0)
    for job_id in range(WISHES_PER_USER_MAX):
        wishes.add(job_id=job_id, every_s=1.0, uid=1002, now_s=1.0)
    with pytest.raises(RefusedError, match="uid 1002 has asked for 100 jobs"):
        wishes.add(job_id=WISHES_MAX, every_s=1.0, uid=1002, now_s=1.0)
    assert len(wishes.all(1.0)) == WISHES_PER_USER_MAX + 1
    wishes.add(job_id=WISHES_MAX, every_s=1.0, uid=1002, now_s=KEPT_S + 2)  # those have been granted


def test_of_two_wishes_for_a_job_the_later_counts() -> None:
    wishes = Wishes()
    for every_s in (1.0, 2.0):
        wishes.add(job_id=1, every_s=every_s, uid=1001, now_s=every_s)
    (left,) = wishes.all(2.0)
    assert (left.every_s, left.asked_s) == (2.0, 2.0)


def test_there_are_never_more_than_a_report_can_carry() -> None:
    wishes = Wishes()
    for job_id in range(WISHES_MAX + 5):
        wishes.add(job_id=job_id, every_s=1.0, uid=0, now_s=0.0)
    assert [wish.job_id for wish in wishes.all(0.0)][:1] == [5]
