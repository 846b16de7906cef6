"""A bank that does not answer: jobs that are held until it does, and jobs that are taken on the lease."""

from collections.abc import Iterator

import pytest

from carrel.testing.banked import Banked
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm


@pytest.fixture(params=["hold", "open"])
def bank(sandbox_factory: MakeSandbox, request: pytest.FixtureRequest) -> Iterator[Banked]:
    # Without slurmdbd: what slurmctld itself remembers of ended jobs is charged.
    box = sandbox_factory(guests=False, bank=True, carrel_conf=f'[bank]\noffline = "{request.param}"\n')
    yield Banked(box)
    box.down()


@pytest.mark.parametrize("bank", ["hold"], indirect=True)
def test_f11_a_job_that_is_taken_in_silence_is_held_and_starts_when_the_bank_is_back(bank: Banked) -> None:
    bank.box.kill("carrelctld")
    job_id = bank.sbatch("-n1", "-t1", "--wrap=sleep 1")
    assert "JobHeldUser" in bank.box.run(["squeue", "-h", "-o", "%r"]).stdout
    bank.box.start("carrelctld")
    bank.wait_state(job_id, "COMPLETED")
    # One second, or as many as a busy machine took; without slurmdbd, slurmctld alone knows.
    used = bank.box.run(["squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%M"]).stdout.strip()
    due = round(1_000_000 * int(used.removeprefix("0:")) / 3600)
    wait_for(lambda: [lien.charged_micro_su for lien in bank.liens("settled")] == [due], f"{used} is charged")
    assert bank.broken() == []


@pytest.mark.parametrize("bank", ["open"], indirect=True)
def test_f11_silence_is_bounded_by_the_lease_and_what_it_took_is_charged(bank: Banked) -> None:
    lease = bank.box.layout.bank / "lease"
    wait_for(lambda: lease.exists() and "account demo 12000000" in lease.read_text(), "there is a lease", timeout_s=60)
    assert {lien.user for lien in bank.liens("unbound")} == {"carrel-lease"}
    bank.box.kill("carrelctld")
    # Twelve cores for an hour, and a job counts as a node of four: two of these reach, the third is held.
    ids = [bank.sbatch("-n1", "-t60", "--wrap=sleep 1") for _ in range(3)]
    wait_for(lambda: {bank.state(each) for each in ids[:2]} == {"COMPLETED"}, "two have run", timeout_s=60)
    assert bank.state(ids[2]) == "PENDING"
    array = bank.sbatch("--array=0-1", "-t1", "--wrap=true")
    assert bank.state(array) == "PENDING"
    bank.box.start("carrelctld")
    for each in (*ids, array):
        wait_for(lambda each=each: set(bank.state(each).split()) == {"COMPLETED"}, f"{each} has run", timeout_s=90)  # type: ignore[misc]
    wait_for(lambda: len(bank.liens("settled")) == 5, "each is charged", timeout_s=60)
    wait_for(
        lambda: {lien.user for lien in bank.liens("unbound", "bound", "active")} == {"carrel-lease"}, "only a lease"
    )
    assert bank.broken() == []
