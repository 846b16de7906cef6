"""A real Slurm whose bank is a myBRC: refused in its words, held while it is away, and it counts what sacct says."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from carrel.core.mybrc import decimal_text
from carrel.testing.banked import ACCOUNT, OPEN, Banked
from carrel.testing.daemons import wait_for
from carrel.testing.mybrc import UsageBank
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm

RATE = "3600"
"""SU of a CPU-hour: a second is one SU, so that two decimals hide nothing."""


@pytest.fixture(scope="module")
def other() -> Iterator[UsageBank]:
    found = UsageBank("1000000")
    yield found
    found.close()


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox, other: UsageBank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Banked]:
    config: Path = tmp_path_factory.mktemp("mybrc") / "bank-config.toml"
    config.write_text(other.config(prices=f"main = {RATE}"))
    config.chmod(0o600)
    conf = f'[bank]\nprovider = "mybrc"\noffline = "hold"\n[bank.remote]\nconfig = "{config}"\nreport_period_s = 0.2\n'
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True, deposit_su=0, carrel_conf=conf)
    yield Banked(box, rates={"main": RATE})
    box.down()


def test_a_job_is_refused_in_the_banks_words_and_one_that_runs_is_told_and_counted(
    bank: Banked, other: UsageBank
) -> None:
    status, said = bank.try_sbatch("-n1", "-t300", "--wrap=true")  # five hours: 18,000 SU, and the bank has more
    assert status == 0, said
    bank.box.run(["scancel", said])
    status, said = bank.try_sbatch("-n2", "-t10000", "--wrap=true")
    assert status != 0
    assert "would exceed account allocation 1000000" in said
    job_id = bank.sbatch("-n1", "-t1", "--wrap=sleep 2")
    wait_for(lambda: str(job_id) in other.jobs, "its start is told", timeout_s=60)
    wait_for(lambda: bool(other.jobs[str(job_id)]["enddate"]), "its end is told", timeout_s=60)
    bank.wait_settled()
    wait_for(lambda: other.used == counted(bank) > 0, "it counts what sacct says")
    assert other.jobs[str(job_id)]["accountid"] == ACCOUNT


def test_while_the_bank_is_away_jobs_are_held_and_no_end_is_lost_though_carrelctld_is_killed(
    bank: Banked, other: UsageBank
) -> None:
    before = [bank.sbatch("-n1", "-t1", "--wrap=sleep 1") for _ in range(4)]
    other.away = True
    held = bank.sbatch("-n1", "-t1", "--wrap=sleep 1")
    for each in before:
        bank.wait_state(each, "COMPLETED")
    bank.box.kill("carrelctld")
    bank.box.start("carrelctld")
    bank.box.run(["true"])
    assert bank.state(held) == "PENDING"
    other.away = False
    bank.wait_state(held, "COMPLETED")
    bank.wait_settled()
    wait_for(lambda: all(job["enddate"] for job in other.jobs.values()), "every end is told", timeout_s=60)
    wait_for(lambda: other.used == counted(bank), "it counts what sacct says", timeout_s=60)
    assert {str(each) for each in (*before, held)} <= other.jobs.keys()
    assert bank.wrong() == []
    assert bank.broken() == []


def counted(bank: Banked) -> Decimal:
    """Return what the other bank should count, by sacct alone."""
    return sum((Decimal(decimal_text(bank.price(run))) for run in bank.records()), Decimal(0))


def test_every_lien_of_the_ledger_is_resolved(bank: Banked) -> None:
    bank.wait_settled()
    assert bank.liens(*OPEN) == []
