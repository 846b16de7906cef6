"""What takes minutes of waiting on a real Slurm: an array of a thousand, a limit that nobody enforces, a silent slurmd.

``make chaos-bank`` runs these; ``make test`` leaves them out.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from carrel.bank import queries
from carrel.daemons.banking import open_store
from carrel.testing.banked import Banked
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

TASKS = 1000
FEW = 200
ENDED_WITHIN_S = 900.0


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox) -> Iterator[Banked]:
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True)
    yield Banked(box)
    box.down()


@pytest.fixture(autouse=True)
def _everything_is_charged_as_accounted(bank: Banked) -> Iterator[None]:
    yield
    bank.box.run(["scancel", "--user=root"])
    bank.wait_settled()
    assert bank.wrong() == []
    assert bank.broken() == []


def test_f9_each_task_of_an_array_of_a_thousand_is_charged_once_and_none_costs_more_than_one_of_few(
    bank: Banked,
) -> None:
    few_s, many_s = _array(bank, FEW), _array(bank, TASKS)
    _say(f"CPU time of carrelctld for each task: {few_s * 1000:.1f} ms of {FEW}, {many_s * 1000:.1f} ms of {TASKS}")
    assert many_s < 2 * few_s


def _array(bank: Banked, tasks: int) -> float:
    """Run an array, see that each task is charged, and return carrelctld's CPU seconds for each of them."""
    before_s, began_s = _cpu_s(bank), time.monotonic()
    job_id = bank.sbatch(f"--array=0-{tasks - 1}", "-n1", "-t1", "--wrap=true")
    submitted_s = time.monotonic()
    wait_for(lambda: not bank.box.run(["squeue", "-h"]).stdout.strip(), "all have ended", timeout_s=ENDED_WITHIN_S)
    ended_s = time.monotonic()
    bank.wait_settled()
    settled_s = time.monotonic()
    used_s = _cpu_s(bank) - before_s
    _say(f"{tasks} tasks: submitted in {submitted_s - began_s:.2f} s, ended after {ended_s - began_s:.1f} s")
    _say(f"all charged {settled_s - ended_s:.1f} s later; carrelctld used {used_s:.1f} s of CPU time")
    charges = [lien for lien in bank.liens("settled") if lien.job_id == job_id]
    assert len({lien.run for lien in charges}) == len(charges) == tasks
    return used_s / tasks


def _say(text: str) -> None:
    print(text)  # noqa: T201  # a figure, which make chaos-bank shows


def _cpu_s(bank: Banked) -> float:
    words = Path(f"/proc/{bank.box.pid('carrelctld')}/stat").read_text().rpartition(")")[2].split()
    return sum(int(word) for word in words[11:15]) / 100  # its own and its children's, squeue and sacct among them


def test_f29_a_run_past_its_limit_is_owed_beyond_its_lien_and_flagged(bank: Banked) -> None:
    job_id = bank.sbatch("-n1", "-t1", "--wrap=trap '' TERM; sleep 150")
    wait_for(lambda: [lien.state for lien in bank.liens() if lien.job_id == job_id] == ["active"], "the run is active")
    lien = bank.lien(job_id)
    until_s = time.monotonic() + 60 + 60 + 10  # its limit, what the lien has beyond it, and some more
    bank.box.kill("slurmctld", signal.SIGSTOP)
    try:
        wait_for(lambda: time.monotonic() > until_s, "nobody looks at its limit", timeout_s=180)
    finally:
        bank.box.kill("slurmctld", signal.SIGCONT)
    bank.wait_state(job_id, "TIMEOUT")
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    charge = bank.lien(job_id)
    assert charge.charged_micro_su == bank.price(run) > lien.lien_micro_su
    with closing(open_store(bank.settings.bank)) as store:
        (settled,) = [line for line in queries.history(store, lien_id=charge.id) if line.kind == "settle"]
    assert "overrun" in settled.flags


def test_a_run_whose_slurmd_died_is_a_failure_of_its_node_and_given_back(bank: Banked) -> None:
    job_id = bank.sbatch("-t5", "-wc2", "--no-requeue", "--wrap=sleep 200")
    wait_for(lambda: [lien.state for lien in bank.liens() if lien.job_id == job_id] == ["active"], "the run is active")
    bank.box.kill("slurmd@c2")
    try:
        bank.wait_state(job_id, "NODE_FAIL")
        wait_for(lambda: bank.lien(job_id).state == "refunded", "it is given back", timeout_s=60)
        charge = bank.lien(job_id)
        assert charge.refunded_micro_su == charge.charged_micro_su > 0
    finally:
        bank.box.start("slurmd@c2")
