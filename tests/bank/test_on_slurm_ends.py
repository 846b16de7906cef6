"""How runs end on a real Slurm that did not end as their users meant, and what becomes of their money."""

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing

import pytest

from carrel.bank import queries
from carrel.daemons.banking import open_store
from carrel.model.ledger import (
    Adjust,
    Balance,
    Bind,
    Deposit,
    LienView,
    OpenAllocation,
    OpenProject,
    Place,
    SetTerms,
    Void,
)
from carrel.testing.banked import Banked, Record
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = pytest.mark.slurm

CONF = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL DefaultTime=60 MaxTime=120 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=lower Nodes=ALL DefaultTime=60 MaxTime=120 PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes=ALL DefaultTime=60 MaxTime=120 PriorityTier=9 State=UP
PartitionName=bare Nodes=ALL DefaultTime=60 MaxTime=120 State=UP
"""
RATES = {"main": "1", "low": "0.5", "lower": "0.5", "urgent": "3.000001"}
HALF = "[bank.refund_percent]\npreempted = 50\n"


@pytest.fixture(scope="module")
def bank(sandbox_factory: MakeSandbox, user: User) -> Iterator[Banked]:
    box = sandbox_factory(guests=False, slurmdbd=True, bank=True, users=(user.name,), extra_conf=CONF, carrel_conf=HALF)
    yield Banked(box, RATES)
    box.down()


@pytest.fixture(autouse=True)
def _everything_is_charged_as_accounted(bank: Banked) -> Iterator[None]:
    yield
    bank.box.run(["scancel", "--user=root"])
    bank.wait_settled()
    assert bank.wrong() == []
    assert bank.broken() == []


@pytest.mark.parametrize(("option", "then"), [("--requeue", "PENDING"), ("--no-requeue", "NODE_FAIL")])
def test_a_run_that_its_node_failed_is_charged_and_given_back_in_full(bank: Banked, option: str, then: str) -> None:
    job_id = _running(bank, "-wc1", option)
    assert bank.scontrol("update", "nodename=c1", "state=down", "reason=a test")[0] == 0
    bank.wait_state(job_id, then)
    charge = _charge(bank, job_id, "NODE_FAIL")
    assert (charge.state, charge.refunded_micro_su) == ("refunded", charge.charged_micro_su)
    _back(bank, "c1")


@pytest.mark.parametrize(("partition", "then"), [("low", "PENDING"), ("lower", "PREEMPTED")])
def test_a_run_that_another_displaced_is_charged_and_given_back_by_the_rule(
    bank: Banked, partition: str, then: str
) -> None:
    job_id = _running(bank, f"-p{partition}", "--requeue", "-N3", "--exclusive")
    urgent = bank.sbatch("-purgent", "-N3", "--exclusive", "-t1", "--wrap=sleep 1")
    bank.wait_state(job_id, then)
    charge = _charge(bank, job_id, "PREEMPTED")
    assert (charge.state, charge.refunded_micro_su) == ("part_refunded", charge.charged_micro_su // 2)
    bank.wait_state(urgent, "COMPLETED")
    wait_for(
        lambda: [lien.state for lien in _liens(bank, urgent)] == ["settled"], "who displaced it pays", timeout_s=60
    )


def test_f14_a_run_of_many_nodes_and_steps_starts_once_and_is_charged_once(bank: Banked) -> None:
    script, go = bank.gate()
    job_id = bank.sbatch("-N3", "-n6", "-t5", f"--wrap=for step in 1 2 3; do srun true; done; {script}")
    wait_for(lambda: bool(bank.liens("active")), "the run is active")
    bank.box.restart("carrelctld", signal.SIGKILL)
    go.touch()
    bank.wait_settled()
    (lien,) = _liens(bank, job_id)
    with closing(open_store(bank.settings.bank)) as store:
        kinds = [line.kind for line in queries.history(store, lien_id=lien.id)]
    assert [kinds.count(kind) for kind in ("place", "bind", "start", "settle")] == [1, 1, 1, 1], kinds


def test_f18_the_run_of_a_user_who_left_the_account_meanwhile_is_charged_to_it(bank: Banked, user: User) -> None:
    script, go = bank.gate()
    job_id = bank.sbatch("-n1", "-t5", f"--wrap={script}", user=user.name)
    wait_for(lambda: bool(bank.liens("active")), "the run is active")
    wait_for(lambda: _used_s(bank, job_id) >= 1, "it has used something")
    bank.box.kill("carrelctld")
    go.touch()
    bank.wait_state(job_id, "COMPLETED")
    left = bank.box.run(["sacctmgr", "-i", "delete", "user", f"name={user.name}", "account=demo"])
    assert left.returncode == 0, left.stdout + left.stderr
    bank.box.start("carrelctld")
    try:
        bank.wait_settled()
        (charge,) = _liens(bank, job_id)
        assert (charge.state, charge.project, charge.user) == ("settled", "demo", user.name)
        assert charge.charged_micro_su > 0
        status, said = bank.try_sbatch("-t1", "-Ademo", "--wrap=true", user=user.name)
        assert status != 0, said
    finally:
        bank.box.run(["sacctmgr", "-i", "add", "user", f"name={user.name}", "account=demo"])


def test_f19_a_run_that_ends_after_its_allocation_is_charged_to_it_and_the_rest_expires(bank: Banked) -> None:
    _open(bank, "grant", 10**9)
    script, go = bank.gate()
    job_id = _accepted(bank, "-Agrant", "-n2", "-t5", f"--wrap={script}")
    wait_for(lambda: bool(bank.liens("active")), "the run is active")
    bank.tell(SetTerms(key="ends", allocation="grant", end_s=int(time.time()), reason="it ends now"))
    wait_for(lambda: _of(bank, "grant").expired_micro_su > 0, "what is free expires", timeout_s=60)
    assert _of(bank, "grant").lien_micro_su > 0
    go.touch()
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    wait_for(lambda: _of(bank, "grant").available_micro_su == 0, "what the run left expires", timeout_s=60)
    found = _of(bank, "grant")
    assert (found.spent_micro_su, found.expired_micro_su) == (bank.price(run), 10**9 - bank.price(run))
    assert bank.try_sbatch("-Agrant", "-t1", "--wrap=true")[0] != 0


def test_f20_an_account_below_zero_stays_there_and_what_runs_is_charged_all_the_same(bank: Banked) -> None:
    _open(bank, "debt", 10**9)
    script, go = bank.gate()
    job_id = _accepted(bank, "-Adebt", "-n1", "-t5", f"--wrap={script}")
    wait_for(lambda: bool(bank.liens("active")), "the run is active")
    bank.tell(Adjust(key="debt/less", allocation="debt", amount_micro_su=-3 * 10**9, reason="an error of before"))
    status, said = bank.try_sbatch("-Adebt", "-t1", "--wrap=true")
    assert status != 0
    assert "account 'debt' has 0.00 SU left" in said
    shown = json.loads(bank.box.run(["carrel", "account", "show", "debt", "--json"]).stdout)
    assert shown["available_micro_su"] < -(10**9)
    go.touch()
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert _of(bank, "debt").available_micro_su == -2 * 10**9 - bank.price(run)
    bank.tell(Deposit(key="debt/more", allocation="debt", amount_micro_su=2 * 10**9, reason="paid"))
    assert _of(bank, "debt").available_micro_su == -bank.price(run)


def test_f22_a_waiting_job_that_moves_to_another_account_is_set_aside_and_charged_there(
    bank: Banked, user: User
) -> None:
    _open(bank, "poor", 1, user=user.name)
    _open(bank, "elsewhere", 10**9, user=user.name)
    job_id = bank.sbatch("--hold", "-n1", "-t10", "--wrap=sleep 1", user=user.name)
    assert bank.lien(job_id).project == "demo"

    def moves(account: str) -> bool:
        return bank.scontrol("update", f"jobid={job_id}", f"account={account}", user=user.name)[0] == 0

    wait_for(lambda: moves("elsewhere"), "it has moved", timeout_s=60)
    moved = [("demo", "void"), ("elsewhere", "bound")]
    wait_for(lambda: [(one.project, one.state) for one in _liens(bank, job_id)] == moved, "so has its lien")
    assert not moves("poor")
    assert bank.scontrol("release", str(job_id), user=user.name)[0] == 0
    bank.wait_settled()
    (run,) = [run for run in bank.records() if run.job_id == job_id]
    assert _of(bank, "elsewhere").spent_micro_su == bank.price(run) > 0


def test_f27_liens_of_jobs_that_never_come_are_free_after_their_time(bank: Banked) -> None:
    before = bank.balance()
    cluster, never, lost = bank.box.cluster, "a" * 32, "b" * 32
    for token in (never, lost):
        bank.tell(
            Place(
                key=f"l/{token}",
                cluster=cluster,
                token=token,
                project="demo",
                user="root",
                amount_micro_su=5,
                ttl_s=3,
            )
        )
    run = "4000000.1.0"
    bank.tell(Bind(key="b", cluster=cluster, token=lost, user="root", job_id=4_000_000, run=run, ttl_s=3))
    assert bank.balance().lien_micro_su == before.lien_micro_su + 10
    wait_for(lambda: bank.balance() == before, "both are free", timeout_s=60)


def test_f27_a_job_that_still_waits_when_its_lien_is_gone_has_another(bank: Banked) -> None:
    job_id = bank.sbatch("--hold", "-n1", "-t10", "--wrap=true")
    first = bank.lien(job_id)
    bank.tell(Void(key=f"v/{first.id}", cluster=first.cluster, run=first.run, reason="its time is over"))
    wait_for(lambda: [lien.state for lien in _liens(bank, job_id)] == ["void", "bound"], "it is covered", timeout_s=60)
    assert _liens(bank, job_id)[1].lien_micro_su == first.lien_micro_su
    bank.box.run(["scancel", str(job_id)])
    wait_for(lambda: {lien.state for lien in _liens(bank, job_id)} == {"void"}, "all is free", timeout_s=60)


def test_what_has_no_price_is_listed_after_a_kill_and_charged_once_when_it_has_one(bank: Banked) -> None:
    job_id = bank.sbatch("--hold", "-n1", "-t10", "--wrap=sleep 1")
    assert bank.lien(job_id).state == "bound"
    assert bank.scontrol("update", f"jobid={job_id}", "partition=bare")[0] == 0
    assert bank.scontrol("release", str(job_id))[0] == 0
    bank.wait_state(job_id, "COMPLETED")
    for _ in range(2):
        wait_for(lambda: any(f"run {job_id}." in line for line in _parked(bank)), "it is listed", timeout_s=60)
        bank.box.restart("carrelctld", signal.SIGKILL)
    assert [lien.state for lien in _liens(bank, job_id)] == ["active"]
    Banked(bank.box, RATES | {"bare": "2"})
    bank.rates["bare"] = "2"
    bank.wait_settled()
    assert [lien.state for lien in _liens(bank, job_id)] == ["settled"]
    wait_for(lambda: _parked(bank) == [], "nothing is listed any more", timeout_s=60)


def _running(bank: Banked, *options: str) -> int:
    """Submit a job and return its id when the bank knows that it runs, and it has used something."""
    job_id = bank.sbatch("-t10", *options, "--wrap=sleep 300")
    bank.wait_state(job_id, "RUNNING")
    wait_for(lambda: any(lien.state == "active" for lien in _liens(bank, job_id)), "the run is active", timeout_s=60)
    wait_for(lambda: _used_s(bank, job_id) >= 2, "it has run for two seconds", timeout_s=60)
    return job_id


def _accepted(bank: Banked, *options: str) -> int:
    """Submit as soon as the bank has heard of an account that was just made."""
    ids: list[int] = []

    def accepted() -> bool:
        status, said = bank.try_sbatch(*options)
        ids.extend([int(said)] if status == 0 else [])
        return bool(ids)

    wait_for(accepted, "the account is known", timeout_s=60)
    return ids[0]


def _back(bank: Banked, node: str) -> None:
    """Return when a node is idle again: by itself (ReturnToService), or since it is told to be."""

    def idle() -> bool:
        bank.scontrol("update", f"nodename={node}", "state=resume")
        return bank.box.run(["sinfo", "-h", "-n", node, "-o", "%T"]).stdout.split()[:1] == ["idle"]

    wait_for(idle, f"{node} is idle", timeout_s=60)


def _used_s(bank: Banked, job_id: int) -> int:
    minutes, _, seconds = bank.box.run(["squeue", "-h", "-j", str(job_id), "-o", "%M"]).stdout.strip().rpartition(":")
    return int(seconds or 0) + 60 * int(minutes or 0)


def _charge(bank: Banked, job_id: int, state: str) -> LienView:
    """Return what a job's run that ended so was charged, once that was given back as well."""

    def runs() -> list[Record]:
        return [run for run in bank.records() if run.job_id == job_id and run.state == state]

    def back() -> list[LienView]:
        return [lien for lien in _liens(bank, job_id) if lien.state in {"part_refunded", "refunded"}]

    wait_for(lambda: len(runs()) == len(back()) == 1, f"its {state} is charged and given back", timeout_s=60)
    (run,), (charge,) = runs(), back()
    assert charge.charged_micro_su == bank.price(run) > 0
    return charge


def _liens(bank: Banked, job_id: int) -> list[LienView]:
    return [lien for lien in bank.liens() if lien.job_id == job_id]


def _parked(bank: Banked) -> list[str]:
    done = bank.box.run(["carrel", "bank", "status", "--json"])
    status: Mapping[str, list[str]] = json.loads(done.stdout) if done.returncode == 0 else {}
    return status.get("parked", [])


def _open(bank: Banked, account: str, micro_su: int, *, user: str = "root") -> None:
    """Have another account, in Slurm and in the ledger, that this user may charge."""
    for words in (["account", account], ["user", user, f"account={account}"]):
        done = bank.box.run(["sacctmgr", "-i", "add", *words])
        assert done.returncode == 0, done.stdout + done.stderr
    bank.tell(
        OpenProject(key=f"{account}/p", project=account),
        OpenAllocation(key=f"{account}/a", allocation=account, project=account),
        Deposit(key=f"{account}/d", allocation=account, amount_micro_su=micro_su, reason="for a test"),
    )


def _of(bank: Banked, account: str) -> Balance:
    with closing(open_store(bank.settings.bank)) as store:
        (found,) = queries.balances(store, project=account)
        return found
