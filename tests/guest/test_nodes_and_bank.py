"""Guests that are nodes, and the bank: each has its part of a job's ``admin_comment``, and keeps the other's."""

from collections.abc import Iterator

import pytest

from carrel.testing.asnodes import OPTIONS, await_running
from carrel.testing.banked import Banked
from carrel.testing.guests import await_end
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox, user: User) -> Iterator[Banked]:
    """One host for guests, whose partition has a price of its own."""
    box = sandbox_factory(nodes=1, hosts=1, slurmdbd=True, bank=True, users=(user.name,))
    yield Banked(box, {"main": "1", "guests": "3"})
    box.down()


def test_a_job_on_a_guest_of_its_own_is_set_aside_at_submit_held_and_charged_once(bank: Banked, user: User) -> None:
    job_id = bank.sbatch(*OPTIONS, "-t10", "--wrap=sleep 2", user=user.name)
    assert [lien.lien_micro_su for lien in bank.liens("unbound", "bound", "active")] == [
        3_000_000 * (10 * 60 + 60) // 3600
    ]
    _, said = bank.scontrol("-o", "show", "job", str(job_id))
    assert " AdminComment=bank=" in said
    assert ";carrel:" in said
    assert await_end(bank.box, job_id) == "COMPLETED"
    assert bank.box.run(["squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%P %N"]).stdout.split()[0] == "guests"
    bank.wait_settled()
    assert bank.wrong() == []
    assert bank.broken() == []
    assert len([lien for lien in bank.liens("settled") if lien.job_id == job_id]) == 1
    assert bank.balance().spent_micro_su > 0


def test_a_job_that_its_account_does_not_cover_is_refused_before_a_guest_is_thought_of(
    bank: Banked, user: User
) -> None:
    status, said = bank.try_sbatch(*OPTIONS, "-c4", "-t60000", "--wrap=true", user=user.name)
    assert status != 0
    assert "SU left, this job may need " in said
    assert bank.box.run(["squeue", "-h", "-a", "-p", "guests", "-t", "PENDING", "-o", "%i"]).stdout == ""


def test_each_run_of_a_requeued_job_is_charged_for_what_it_used(bank: Banked, user: User) -> None:
    script = '[ "$SLURM_RESTART_COUNT" ] || sleep 300; sleep 2'
    job_id = bank.sbatch(*OPTIONS, "-t10", "--requeue", f"--wrap={script}", user=user.name)
    await_running(bank.box, job_id)
    assert bank.scontrol("requeue", str(job_id))[0] == 0
    assert await_end(bank.box, job_id) == "COMPLETED"
    bank.wait_settled()
    charged = [lien for lien in bank.liens("settled") if lien.job_id == job_id]
    assert len(charged) == len({lien.run for lien in charged}) == 2
    assert bank.wrong() == []
    assert bank.broken() == []
