"""What the bank keeps to when things go wrong at once: many submitters, kills, silence."""

import re
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from carrel.testing.banked import OPEN, Banked
from carrel.testing.daemons import wait_for
from carrel.testing.postgres import Postgres
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm

SUBMITTERS = 100
AFFORDABLE = 37
TOGETHER = 20
JOB_MICRO_SU = -(-1_000_000 * 3660 // 3600)
"""One CPU for an hour, and the minute that Slurm may be late."""


BOTH = pytest.mark.parametrize("bank", ["sqlite", "postgres"], indirect=True)


@pytest.fixture(scope="module")
def on_sqlite(sandbox_factory: MakeSandbox) -> Iterator[Banked]:
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True, deposit_su=0)
    yield Banked(box)
    box.down()


@pytest.fixture(scope="module")
def on_postgres(sandbox_factory: MakeSandbox, postgres_server: Postgres) -> Iterator[Banked]:
    where = f'[bank]\ndatabase = "{postgres_server.schema()}"\n'
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True, deposit_su=0, carrel_conf=where)
    yield Banked(box)
    box.down()


@pytest.fixture(params=["sqlite"])
def bank(request: pytest.FixtureRequest) -> Banked:
    found: Banked = request.getfixturevalue(f"on_{request.param}")
    return found


@BOTH
def test_f1_of_a_hundred_submitters_at_once_as_many_are_accepted_as_the_account_covers(bank: Banked) -> None:
    bank.deposit(AFFORDABLE * JOB_MICRO_SU, "row-2")
    with ThreadPoolExecutor(SUBMITTERS) as pool:
        options = ("--hold", "-n1", "-t60", "--wrap=true")
        done = list(pool.map(lambda _: bank.try_sbatch(*options), range(SUBMITTERS)))
    accepted = [said for status, said in done if status == 0]
    refused = {re.sub(r"\n.*", "", said) for status, said in done if status != 0}
    assert len(accepted) == AFFORDABLE, refused
    sentence = "account 'demo' has 0.00 SU left, this job may need 1.016667 SU; see: carrel account show demo"
    assert refused == {f"sbatch: error: {sentence}"}
    assert bank.balance().available_micro_su == 0
    bank.box.run(["scancel", "--user=root"])
    wait_for(lambda: bank.balance().available_micro_su == AFFORDABLE * JOB_MICRO_SU, "all is free", timeout_s=60)
    assert bank.broken() == []


@BOTH
def test_f12_what_ends_while_the_bank_is_away_is_charged_once_when_it_is_back(bank: Banked) -> None:
    bank.deposit(10**12, "row-4")
    job_id = bank.sbatch("--array=0-299", "-n1", "-t1", "--wrap=true")
    long = bank.sbatch("-n1", "-t1", "--wrap=sleep 2")
    bank.box.kill("carrelctld")
    wait_for(lambda: set(bank.state(job_id).split()) == {"COMPLETED"}, "all tasks have ended", timeout_s=200)
    bank.wait_state(long, "COMPLETED")
    bank.box.start("carrelctld")
    bank.wait_settled()
    assert len([lien for lien in bank.liens("settled") if lien.job_id == job_id]) == 300
    assert bank.wrong() == []
    assert bank.broken() == []


@pytest.mark.parametrize("victim", ["carrelctld", "slurmdbd"])
def test_f12_whoever_is_killed_no_run_is_charged_twice_or_never(bank: Banked, victim: str) -> None:
    bank.deposit(10**9, f"kill-{victim}")
    for seconds in (0, 1):
        for at in range(4):
            _submitted(bank, f"--wrap=sleep {seconds + at % 2}")
        bank.box.kill(victim)
        bank.box.start(victim)
    wait_for(lambda: not bank.liens(*OPEN), "every lien is resolved", timeout_s=120)
    assert bank.wrong() == []
    assert bank.broken() == []


def test_f13_with_a_hung_bank_sbatch_is_answered_by_the_policy_within_the_deadline(bank: Banked) -> None:
    bank.deposit(10**9, "hung")
    deadline_s = bank.settings.bank.deadline_ms / 1000
    longer_s = []
    for _ in range(5):
        bare_s = _took_s(bank, accepted=True)
        with _hung(bank):
            longer_s.append(_took_s(bank, accepted=False) - bare_s)
            assert bank.scontrol("ping")[0] == 0
    # In pairs, and the median of them: whatever else the machine does falls on both of a pair.
    assert 0.5 * deadline_s < statistics.median(longer_s) < 4 * deadline_s, longer_s


def test_f13_many_submitters_do_not_wait_for_a_hung_bank_one_after_the_other(bank: Banked) -> None:
    bank.deposit(10**9, "hung/many")
    deadline_s = bank.settings.bank.deadline_ms / 1000
    bare_s = _together_s(bank, accepted=True)
    with _hung(bank):
        longer_s = _together_s(bank, accepted=False) - bare_s
    assert longer_s < TOGETHER / 2 * deadline_s
    wait_for(lambda: not bank.liens("active", "bound"), "all is charged", timeout_s=60)
    assert bank.broken() == []


@pytest.mark.timeout(600)
def test_f31_a_slurmctld_that_forgets_and_runs_jobs_again_has_each_run_charged_as_slurmdbd_says(bank: Banked) -> None:
    bank.deposit(10**9, "forgets")
    wait_for(lambda: not _living(bank), "what ran before has ended", timeout_s=80)
    bank.box.restart("slurmctld")  # which saves its state as it ends: what ran before is not forgotten
    ids = [_submitted(bank, f"--wrap=sleep {at % 2}") for at in range(4)]
    wait_for(lambda: all(bank.state(each) == "COMPLETED" for each in ids), "they have ended", timeout_s=60)
    bank.box.restart("slurmctld", signal.SIGKILL)
    # Some live again, some ids come back, and of some slurmdbd never learns the end: those stay open, for a person.
    after = _submitted(bank, "--wrap=sleep 1")
    bank.wait_state(after, "COMPLETED")
    # One that slurmctld takes for running ends at its limit of two minutes at the latest.
    wait_for(lambda: not _living(bank), "all has ended again", timeout_s=200)
    wait_for(lambda: bank.wrong() == [], "each run is charged once", timeout_s=60)
    assert bank.broken() == []


@contextmanager
def _hung(bank: Banked) -> Iterator[None]:
    bank.box.kill("carrelctld", signal.SIGSTOP)
    try:
        yield
    finally:
        bank.box.kill("carrelctld", signal.SIGCONT)
        wait_for(lambda: bank.try_sbatch("-n1", "-t1", "--wrap=true")[0] == 0, "it answers again", timeout_s=60)


def _took_s(bank: Banked, *, accepted: bool) -> float:
    began_s = time.monotonic()
    status, said = bank.try_sbatch("-n1", "-t1", "--wrap=true")
    took_s = time.monotonic() - began_s
    assert (status == 0) == accepted, said
    assert accepted or "carrelctld does not answer" in said
    return took_s


def _together_s(bank: Banked, *, accepted: bool) -> float:
    """Return how long many submissions took that came at once."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(lambda _: _took_s(bank, accepted=accepted), range(TOGETHER)))
    return time.monotonic() - began_s


def _living(bank: Banked) -> str:
    return bank.box.run(["squeue", "-h"]).stdout.strip()


def _submitted(bank: Banked, script: str) -> int:
    """Submit as soon as everybody is back."""
    ids: list[int] = []

    def accepted() -> bool:
        status, said = bank.try_sbatch("-n1", "-t2", script)
        ids.extend([int(said)] if status == 0 else [])
        return bool(ids)

    wait_for(accepted, "a job is accepted", timeout_s=60)
    return ids[0]
