"""The bank on a real Slurm with slurmdbd: what is refused, and that each run is charged price times what sacct says."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from carrel.model.ledger import Void
from carrel.model.money import format_su
from carrel.testing.banked import Banked
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = pytest.mark.slurm

CONF = "PartitionName=dear Nodes=ALL DefaultTime=60 MaxTime=120 State=UP\n"
RATES = {"main": "1", "dear": "7.000001"}


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox, user: User) -> Iterator[Banked]:
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True, users=(user.name,), extra_conf=CONF)
    yield Banked(box, RATES)
    box.down()


@pytest.fixture(autouse=True)
def _everything_is_charged_as_accounted(bank: Banked) -> Iterator[None]:
    """After each test: no lien is left, each run is charged once, to the micro-SU, and every invariant holds."""
    yield
    bank.box.run(["scancel", "--account=demo"])
    bank.wait_settled()
    assert bank.wrong() == []
    assert bank.broken() == []


def test_a_job_is_set_aside_at_submit_and_charged_at_its_end(bank: Banked) -> None:
    before = bank.balance()
    job_id = bank.sbatch("-n2", "-t10", "--wrap=sleep 2")
    assert bank.balance().lien_micro_su > 0
    bank.wait_settled()
    spent = bank.balance().spent_micro_su - before.spent_micro_su
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert spent == bank.price(run) > 0


@pytest.mark.parametrize(
    "options",
    [
        "-n1 -c4",
        "-n3 -c2",
        "-N2 --ntasks-per-node=2",
        "-n2 --mincpus=3",
        "--exclusive -N2",
        "--array=0-6%2 -c2 --mem=2G",
    ],
)
def test_f17_what_is_set_aside_at_submit_is_what_carrel_quote_says(bank: Banked, options: str) -> None:
    words = [*options.split(), "-t10"]
    quoted = bank.box.run(["carrel", "quote", "--json", *words, "--wrap", "true"])
    assert quoted.returncode == 0, quoted.stderr
    job_id = bank.sbatch("--hold", *words, "--wrap=true")
    assert bank.lien(job_id).lien_micro_su == json.loads(quoted.stdout)["amount_micro_su"]
    bank.box.run(["scancel", str(job_id)])


def test_a_quote_says_what_the_account_has_and_whether_the_job_would_be_refused(bank: Banked) -> None:
    def quoted(*words: str) -> tuple[str, dict[str, Any]]:
        said = bank.box.run(["carrel", "quote", *words, "--wrap", "true"])
        told = bank.box.run(["carrel", "quote", "--json", *words, "--wrap", "true"])
        return said.stdout.splitlines()[-1], json.loads(told.stdout)["payer"]

    left = bank.balance().available_micro_su
    line, payer = quoted("-n1", "-t10")
    assert payer == {"account": "demo", "available_micro_su": left, "why": ""}
    assert line == f"account 'demo' has {format_su(left)} SU left"
    line, _ = quoted("-n4", "-t60000")
    assert line.endswith("SU left, so it would be refused; see: carrel account show demo")
    line, payer = quoted("-n1", "-t10", "-A", "ghostly")
    assert line == "what is left for it is not known: there is no account 'ghostly'; see: carrel account list"
    assert payer["available_micro_su"] is None


def test_a_refusal_says_what_is_needed_what_is_left_and_where_to_see_more(bank: Banked) -> None:
    status, said = bank.try_sbatch("-n4", "-t60000", "--wrap=true")
    assert status != 0
    assert "account 'demo' has 9" in said
    assert "this job may need 4000.0" in said
    assert "see: carrel account show demo" in said


@pytest.mark.parametrize("options", [("-t0",), ("-tUNLIMITED",)])
def test_f5_f6_a_job_without_an_end_is_refused_and_says_so(bank: Banked, options: tuple[str, ...]) -> None:
    status, said = bank.try_sbatch(*options, "--wrap=true")
    assert status != 0
    assert "an unlimited time has no price; give --time" in said


def test_f3_f5_a_job_that_names_neither_tasks_nor_time_has_the_defaults_price(bank: Banked) -> None:
    bank.sbatch("--hold", "--wrap=true")
    (lien,) = bank.liens("unbound", "bound")
    assert lien.lien_micro_su == -(-1_000_000 * (3600 + 60) // 3600)


def test_f7_of_several_partitions_the_dearest_is_set_aside(bank: Banked) -> None:
    bank.sbatch("--hold", "-pmain,dear", "-t60", "--wrap=true")
    (lien,) = bank.liens("unbound", "bound")
    assert lien.lien_micro_su == -(-7_000_001 * 3660 // 3600)


def test_f8_a_user_who_names_no_account_pays_from_his_default_one(bank: Banked, user: User) -> None:
    bank.sbatch("-t1", "--wrap=true", user=user.name)
    wait_for(lambda: any(lien.user == user.name for lien in bank.liens("settled")), "charged")
    assert {lien.project for lien in bank.liens() if lien.user == user.name} == {"demo"}


def test_f11_an_account_that_the_bank_does_not_know_is_refused(bank: Banked) -> None:
    status, said = bank.try_sbatch("-Aroot", "-t1", "--wrap=true")
    assert status != 0
    assert "there is no account 'root'; see: carrel account list" in said


def test_f11_a_stranger_to_an_account_is_refused_before_anything_is_set_aside(bank: Banked, user: User) -> None:
    before = len(bank.liens())
    status, said = bank.try_sbatch("-Aroot", "-t1", "--wrap=true", user=user.name)
    assert status != 0
    assert f"user '{user.name}' may not charge account 'root'" in said
    assert len(bank.liens()) == before


def test_f9_f16_every_task_of_an_array_is_set_aside_and_charged_under_one_name(bank: Banked) -> None:
    job_id = bank.sbatch("--hold", "--array=0-99", "-t1", "--wrap=true")
    (lien,) = [lien for lien in bank.liens() if lien.state in {"unbound", "bound"}]
    assert lien.units == 100
    assert bank.scontrol("release", str(job_id))[0] == 0
    bank.wait_settled()
    runs = [lien for lien in bank.liens("settled") if lien.job_id == job_id]
    assert len({lien.run for lien in runs}) == len(runs) == 100


def test_f9_what_is_left_of_an_array_comes_back_when_its_waiting_tasks_are_cancelled(bank: Banked) -> None:
    before = bank.balance().lien_micro_su
    job_id = bank.sbatch("--array=0-9%1", "-t10", "--wrap=sleep 300")
    bank.wait_state(job_id, "PENDING\nRUNNING", "RUNNING\nPENDING")
    wait_for(lambda: len(bank.liens("active")) == 1, "one task runs")
    bank.box.run(["scancel", "-t", "PENDING", str(job_id)])
    wait_for(lambda: not bank.liens("bound", "unbound"), "the rest is free", timeout_s=60)
    assert bank.balance().lien_micro_su - before == bank.liens("active")[0].lien_micro_su


def test_f10_each_component_of_a_het_job_is_set_aside_and_charged(bank: Banked) -> None:
    script, go = bank.gate()
    bank.sbatch("-n1", "-t2", f"--wrap={script}", ":", "-n2", ":", "-n1", "-pdear")
    amounts = sorted(lien.lien_micro_su for lien in bank.liens("unbound", "bound", "active"))
    assert len(amounts) == 3
    go.touch()
    bank.wait_settled()


def test_f15_a_requeued_job_is_charged_for_each_of_its_runs(bank: Banked) -> None:
    job_id = bank.sbatch("-n1", "-t10", "--requeue", "--wrap=sleep 300")
    for _ in range(3):
        bank.wait_state(job_id, "RUNNING")
        wait_for(lambda: bool(bank.liens("active")), "the run is active")
        wait_for(lambda: _elapsed(bank, job_id) >= 2, "it ran for two seconds", timeout_s=60)
        assert bank.scontrol("requeue", str(job_id))[0] == 0
        wait_for(lambda: bank.state(job_id) != "RUNNING", "it stopped", timeout_s=60)
        _run_again(bank, job_id)
    wait_for(lambda: bool(bank.liens("active")), "the last run is active")  # one that used nothing is void
    bank.box.run(["scancel", str(job_id)])
    wait_for(lambda: len(_charges(bank, job_id)) == 4, "four runs are charged", timeout_s=120)
    assert sum(1 for amount in _charges(bank, job_id) if amount) >= 3


def test_f21_the_time_of_a_suspension_is_not_charged(bank: Banked) -> None:
    script, go = bank.gate()
    job_id = bank.sbatch("-n1", "-t5", f"--wrap={script}")
    bank.wait_state(job_id, "RUNNING")
    assert bank.scontrol("suspend", str(job_id))[0] == 0
    bank.wait_state(job_id, "SUSPENDED")
    until_s = time.monotonic() + 3
    wait_for(lambda: time.monotonic() > until_s, "three seconds passed", timeout_s=60)
    assert bank.scontrol("resume", str(job_id))[0] == 0
    go.touch()
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert run.end_s - run.start_s >= run.elapsed_s + 2


def test_f22_a_user_who_raises_a_waiting_jobs_limit_is_refused_where_it_is_not_covered(
    bank: Banked, user: User
) -> None:
    job_id = bank.sbatch("--hold", "-n4", "-t10", "--wrap=true", user=user.name)
    assert bank.lien(job_id).state == "bound"
    status, _ = bank.scontrol("update", f"jobid={job_id}", "timelimit=60000", user=user.name)
    assert status != 0
    assert bank.scontrol("update", f"jobid={job_id}", "timelimit=20", user=user.name)[0] == 0
    assert bank.lien(job_id).lien_micro_su == -(-4_000_000 * (20 * 60 + 60) // 3600)
    assert bank.scontrol("update", f"jobid={job_id}", "timelimit=5", user=user.name)[0] == 0
    wait_for(lambda: bank.lien(job_id).lien_micro_su == -(-4_000_000 * 360 // 3600), "it is lowered")
    bank.box.run(["scancel", str(job_id)])


def test_f22_the_limit_of_a_running_job_is_followed_up_and_down(bank: Banked) -> None:
    job_id = bank.sbatch("-n2", "-t10", "--wrap=sleep 300")
    for minutes in (10, 30, 5):
        bank.scontrol("update", f"jobid={job_id}", f"timelimit={minutes}")
        due = -(-2_000_000 * (minutes * 60 + 60) // 3600)
        wait_for(lambda due=due: bank.lien(job_id).lien_micro_su == due, f"{minutes} min are set aside")  # type: ignore[misc]


def test_f22_a_waiting_job_that_moves_to_another_partition_is_priced_there(bank: Banked) -> None:
    job_id = bank.sbatch("--hold", "-n1", "-t10", "--wrap=sleep 1")
    assert bank.scontrol("update", f"jobid={job_id}", "partition=dear")[0] == 0
    wait_for(lambda: bank.lien(job_id).lien_micro_su == -(-7_000_001 * 660 // 3600), "it has the dear price")
    assert bank.scontrol("release", str(job_id))[0] == 0
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert run.partition == "dear"


def test_f4_an_exclusive_job_pays_for_whole_nodes(bank: Banked) -> None:
    job_id = bank.sbatch("--exclusive", "-n1", "-t10", "--wrap=sleep 1")
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert run.cpus == 4


def test_f26_what_is_only_tried_or_refused_by_slurm_lapses(bank: Banked) -> None:
    before = {lien.id for lien in bank.liens()}
    assert bank.try_sbatch("--test-only", "-t1", "--wrap=true")[0] == 0
    assert bank.try_sbatch("-t1", "--reservation=nosuch", "--wrap=true")[0] != 0
    tried = [lien for lien in bank.liens() if lien.id not in before]
    assert {lien.state for lien in tried} == {"unbound"}
    assert all(lien.expires_s for lien in tried)
    # Two minutes early, so that no test has to wait for them.
    for lien in tried:
        bank.tell(Void(key=f"v/{lien.id}", cluster=lien.cluster, token=lien.token, reason="lapses in a test"))


def test_a_job_that_is_cancelled_while_it_waits_costs_nothing(bank: Banked) -> None:
    job_id = bank.sbatch("--hold", "-t10", "--wrap=true")
    assert bank.lien(job_id).state == "bound"
    bank.box.run(["scancel", str(job_id)])
    wait_for(lambda: bank.lien(job_id).state == "void", "void")


def _run_again(bank: Banked, job_id: int) -> None:
    """Slurm lets a requeued job wait for two minutes; too soon its node still has the old run's credential revoked."""
    asked_s = time.monotonic()

    def runs() -> bool:
        nonlocal asked_s
        if time.monotonic() - asked_s > 5:
            asked_s = time.monotonic()
            bank.scontrol("update", f"jobid={job_id}", "starttime=now")
        return bank.state(job_id) == "RUNNING"

    wait_for(runs, "it runs again", timeout_s=60)


def _charges(bank: Banked, job_id: int) -> list[int]:
    return [lien.charged_micro_su for lien in bank.liens("settled") if lien.run.startswith(f"{job_id}.")]


def _elapsed(bank: Banked, job_id: int) -> int:
    text = bank.box.run(["squeue", "-h", "-j", str(job_id), "-O", "TimeUsed:|"]).stdout.strip().rstrip("|")
    parts = text.split(":")
    return int(parts[-1]) + 60 * int(parts[-2]) if len(parts) > 1 else 0
