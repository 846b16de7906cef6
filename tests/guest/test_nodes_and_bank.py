"""Guests and the bank: what is charged for them, and what is given back where we could not start them.

Of a guest that is a node, each of the two has its part of the job's ``admin_comment``, and keeps the other's.
"""

import signal
from collections.abc import Iterator

import pytest

from carrel.model.ledger import LienView
from carrel.testing.asnodes import OPTIONS, await_running
from carrel.testing.banked import Banked
from carrel.testing.guests import IMAGE, allocation, await_end, job_state, wait_for
from carrel.testing.leaks import pid_of
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

FAILS = (f"--guest={IMAGE}", "--guest-clone=full", "--guest-boot-timeout=1")
"""A copy of the image that boots takes longer than a second."""
CONF = "PartitionName=dear Nodes=ALL DefaultTime=60 MaxTime=120 State=UP\n"
CARREL = '[bank]\noffline = "hold"\n[placement.launches]\nattempts = 2\nbackoff_s = 0.2\n'


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox, user: User) -> Iterator[Banked]:
    """One host for guests, whose partition has a price of its own, as have guests on the node of ``dear``."""
    box = sandbox_factory(
        nodes=1, hosts=1, slurmdbd=True, bank=True, users=(user.name,), extra_conf=CONF, carrel_conf=CARREL
    )
    found = Banked(box, {"main": "1", "guests": "3", "dear": "2"})
    book = box.layout.etc / "prices.toml"
    book.write_text(book.read_text().replace("cpu = 2 }", "cpu = 2, guest = 5 }"))
    yield found
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


def test_a_run_whose_guest_did_not_start_is_given_back_and_one_on_the_bare_node_is_not(bank: Banked) -> None:
    with allocation(bank.box, "-t5", "-n1", "--mem=600") as bare:
        assert bank.box.run(["srun", f"--jobid={bare}", "true"]).returncode == 0
        assert bank.box.run(["srun", f"--jobid={bare}", *FAILS, "true"], timeout_s=120).returncode != 0
    wait_for(lambda: [each.state for each in charges(bank, bare)] == ["settled"])
    with allocation(bank.box, "-t5", "-n1", "--mem=600", *FAILS) as guests:
        assert bank.box.run(["srun", f"--jobid={guests}", "true"], timeout_s=120).returncode != 0
    wait_for(lambda: [each.state for each in charges(bank, guests)] == ["refunded"])
    (free,), (paid,) = charges(bank, guests), charges(bank, bare)
    assert free.refunded_micro_su == free.charged_micro_su > 0
    assert (paid.state, paid.refunded_micro_su) == ("settled", 0)
    assert paid.charged_micro_su > 0
    assert bank.wrong() == []
    assert bank.broken() == []


def test_a_guest_of_its_own_that_never_starts_costs_nothing(bank: Banked, user: User) -> None:
    before = bank.balance()
    job_id = bank.sbatch(*OPTIONS, *FAILS[1:], "-t10", "--wrap=true", user=user.name)
    said = ["squeue", "-h", "-a", "-j", str(job_id), "-o", "%k"]
    wait_for(lambda: "no guest after 2 attempts" in bank.box.run(said).stdout)
    assert [each.state for each in charges(bank, job_id)] == ["bound"]
    assert bank.balance().spent_micro_su == before.spent_micro_su
    bank.box.run(["scancel", str(job_id)])
    wait_for(lambda: [each.state for each in charges(bank, job_id)] == ["void"])
    assert bank.balance() == before


def test_a_guest_of_its_own_that_dies_is_a_failure_of_its_node_and_given_back(bank: Banked, user: User) -> None:
    job_id = bank.sbatch(*OPTIONS, "-t10", "--no-requeue", "--wrap=sleep 60", user=user.name)
    wait_for(lambda: [each.state for each in charges(bank, job_id)] == ["active"])
    events = ["carrel", "job", "events", str(job_id)]
    wait_for(lambda: "task-entered" in bank.box.run(events).stdout and ran(bank, job_id))
    qemu = pid_of(bank.box, job_id, "qemu")
    assert qemu
    qemu.kill(signal.SIGKILL)
    assert await_end(bank.box, job_id) == "NODE_FAIL"
    wait_for(lambda: [each.state for each in charges(bank, job_id)] == ["refunded"])
    (found,) = charges(bank, job_id)
    assert found.refunded_micro_su == found.charged_micro_su > 0
    assert bank.wrong() == []
    assert bank.broken() == []


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


def test_a_job_that_is_taken_in_silence_pays_for_its_guests(bank: Banked) -> None:
    # The last of its module: ``Banked.wrong`` knows no surcharge.
    guest = (f"--guest={IMAGE}", "-pdear", "--mem=320")
    bank.box.kill("carrelctld")
    try:
        runs = bank.sbatch(*guest, "-n1", "-t10", "--wrap=sleep 1")
        waits = bank.sbatch(*guest, "--guest-per=task", "-n3", "-t10", "--begin=now+1hour", "--wrap=true")
        assert [job_state(bank.box, each) for each in (runs, waits)] == ["PENDING"] * 2
    finally:
        bank.box.start("carrelctld")
    assert bank.lien(waits).lien_micro_su == (3 * 2 + 3 * 5) * 1_000_000 * (10 * 60 + 60) // 3600
    bank.box.run(["scancel", str(waits)])
    assert await_end(bank.box, runs) == "COMPLETED"
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == runs]
    (charge,) = charges(bank, runs)
    assert charge.charged_micro_su == round((2 + 5) * 1_000_000 * run.elapsed_s / 3600)
    assert bank.broken() == []


def charges(bank: Banked, job_id: int) -> list[LienView]:
    return [lien for lien in bank.liens() if lien.job_id == job_id]


def ran(bank: Banked, job_id: int) -> bool:
    """Tell whether a job has used something."""
    return bank.box.run(["squeue", "-h", "-a", "-j", str(job_id), "-o", "%M"]).stdout.strip() not in {"", "0:00"}
