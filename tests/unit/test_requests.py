"""What anybody may say on carreld's socket becomes a noun, or one sentence; never a path of the sayer's choice."""

import pytest

from carrel import wire
from carrel.core.guests import guest_name
from carrel.daemons import requests
from carrel.errors import UsageError
from carrel.model.job import JobKey


def said(**records: str) -> wire.Message:
    return wire.Message(list(records.items()))


@pytest.mark.parametrize("step", ["batch", "interactive", "0", "4711"])
def test_a_step_of_slurm_is_taken(step: str) -> None:
    assert requests.task(said(step=step, task="3")).step == step


@pytest.mark.parametrize(
    "step", ["/../../../home/ada", "..", "0/..", "0\n", "-1", "extern", "\u0663", "\udcff", "9" * 11]
)
def test_a_step_that_slurm_could_not_have_named_is_refused_since_it_becomes_a_path(step: str) -> None:
    with pytest.raises(UsageError, match="must be batch, interactive or a step's number"):
        requests.task(said(step=step))


def test_the_name_of_a_guest_per_task_is_one_part_of_a_path() -> None:
    task = requests.task(said(step="12", task=str(2**32 - 1)))
    assert guest_name(JobKey(cluster="k", job_id=7, submit_s=9), per="task", task=task) == f"7.9.0.12.{2**32 - 1}"


@pytest.mark.parametrize("number", ["-1", "1e3", " 1", "\u0663", "9" * 5000, str(2**32)])
def test_a_number_that_slurm_could_not_have_given_is_refused(number: str) -> None:
    with pytest.raises(UsageError, match="must be a whole number, at most 4294967295"):
        requests.number(said(job=number), "job")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300", "soon"])
def test_a_boot_timeout_that_nobody_could_wait_for_is_refused(seconds: str) -> None:
    with pytest.raises(UsageError, match="must be seconds above 0, at most 86400"):
        requests.guest_request(said(boot_timeout_s=seconds))
