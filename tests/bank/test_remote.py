"""carrelctld at a site whose bank is a myBRC: asked at submit, told what the ledger's journal says, over real HTTP."""

import asyncio
import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from carrel.bank import queries
from carrel.bank.verify import verify
from carrel.config import Bank as BankSettings
from carrel.config import Config, MybrcClient, Prices
from carrel.core.mybrc import decimal_text
from carrel.daemons.banking import Bank
from carrel.daemons.counter import SEPARATOR, Counter, Reply
from carrel.errors import CarrelError
from carrel.model.cluster import ClusterFacts, NodeFacts, PartitionFacts
from carrel.model.ledger import AnyCommand, Bind, Correct, Receipt, Refund, Settle, Start
from carrel.testing.mybrc import TOKEN, UsageBank

NODE = NodeFacts(name="c1", cpus=4, for_jobs=4, memory_mib=1000)
CLUSTER = ClusterFacts(partitions={"main": PartitionFacts(name="main", nodes=(NODE,))}, default_partition="main")
TEN_MINUTES = Decimal("0.19")
"""What a job of one CPU and ten minutes is asked for: with the minute that Slurm may be late, rounded up."""
BEGAN_S = 1_750_000_100
SUBMITTED_S = 1_750_000_000


@pytest.fixture
def other() -> Iterator[UsageBank]:
    found = UsageBank("2.00")
    yield found
    found.close()


def opened(directory: Path, bank: UsageBank, *, deadline_ms: int = 5000, off: str = "", **remote: object) -> Bank:
    """Return a bank as carrelctld has one; whatever is in the directory already is adopted."""
    config = directory / "bank-config.toml"
    config.write_text(bank.config(off=off))
    config.chmod(0o600)
    settings = BankSettings(
        enabled=True,
        provider="mybrc",
        database=str(directory / "ledger.db"),
        dir=str(directory),
        deadline_ms=deadline_ms,
        default_account="physics",
        remote=MybrcClient(config=str(config), **remote),  # type: ignore[arg-type]  # of one test
    )
    found = Bank(Config(bank=settings))
    found.learn(CLUSTER, {"ClusterName": "k"})
    return found


@pytest.fixture
def bank(tmp_path: Path, other: UsageBank) -> Iterator[Bank]:
    found = opened(tmp_path, other)
    yield found
    asyncio.run(found.close())


def ask(bank: Bank, *words: str, verb: str = "submit") -> Reply:
    counter = Counter(bank)
    token = [] if verb == "modify" else [f"token={secrets.token_hex(16)}"]
    return asyncio.run(counter.answer(SEPARATOR.join([verb, *token, "uid=0", *words]), uid=0))


def lien_of(bank: Bank, token: str) -> int:
    (found,) = [lien for lien in queries.liens(bank.ledger.store) if lien.token == token]
    return found.lien_micro_su


def do(bank: Bank, command: AnyCommand) -> None:
    answer = bank.ledger.call(command)
    assert isinstance(answer, Receipt), answer


def begin(bank: Bank, token: str, job: int, run: str) -> None:
    do(bank, Bind(key=f"b/{token}/{run}", cluster="k", token=token, user="root", job_id=job, run=run))
    inputs = {"resources": {"cpu": 1, "node": 1}, "partition": "main", "qos": "", "moment_s": BEGAN_S, "seconds": 660}
    do(bank, Start(key=f"s/{run}", cluster="k", run=run, amount_micro_su=183_334, inputs=inputs))


def end(bank: Bank, run: str, amount: int, began_s: int = BEGAN_S) -> None:
    inputs = {"resources": {"cpu": 1, "node": 1}, "partition": "main", "moment_s": began_s, "seconds": 360}
    inputs |= {"qos": "", "state": "COMPLETED"}
    do(bank, Settle(key=f"e/{run}", cluster="k", run=run, amount_micro_su=amount, inputs=inputs))


def begun(bank: Bank, job: int) -> str:
    """Submit a job, have it start, and return its run."""
    reply = ask(bank, "time_limit=10")
    assert reply.word == "ok", reply
    run = f"{job}.{SUBMITTED_S}.0"
    begin(bank, reply.text, job, run)
    return run


def test_f1_a_bank_that_sets_nothing_aside_is_asked_for_what_waits_too(bank: Bank, other: UsageBank) -> None:
    replies = [ask(bank, "time_limit=10") for _ in range(15)]
    # Sums are rounded, not each of them: ten times 0.1834 and no eleventh.
    assert [reply.word for reply in replies] == ["ok"] * 10 + ["refuse"] * 5
    assert replies[-1].text == (
        "Adding job_cost 2.02 to account balance 0 would exceed account allocation 2.00. "
        "(this job may need 0.183334 SU, with 1.83334 SU for jobs that wait)"
    )
    assert len(queries.liens(bank.ledger.store)) == 10
    assert other.used == 0


def test_where_a_yes_sets_aside_the_bank_is_asked_for_the_job_alone(tmp_path: Path, other: UsageBank) -> None:
    bank = opened(tmp_path, other, count_waiting=False)
    assert [ask(bank, "time_limit=10").word for _ in range(3)] == ["ok"] * 3
    assert {Decimal(cost) for cost in other.asked} == {TEN_MINUTES}
    asyncio.run(bank.close())


def test_prices_are_those_of_the_banks_own_file_and_what_has_none_is_refused(bank: Bank) -> None:
    assert lien_of(bank, ask(bank, "time_limit=10").text) == -(-660 * 1_000_000 // 3600)
    assert ask(bank, "time_limit=10", "partition=dear").word == "refuse"


def test_a_dearer_change_asks_the_bank_for_the_difference(bank: Bank, other: UsageBank) -> None:
    token = ask(bank, "time_limit=10").text
    assert ask(bank, f"token={token}", "job=1", "time_limit=20", verb="modify").word == "ok"
    assert lien_of(bank, token) == -(-1260 * 1_000_000 // 3600)
    refused = ask(bank, f"token={token}", "job=1", "time_limit=600", verb="modify")
    assert (refused.word, "would exceed" in refused.text) == ("refuse", True)
    assert len(other.asked) == 3


@pytest.mark.parametrize("what", ["silent", "failing", "gone"])
def test_a_bank_that_does_not_answer_in_time_is_silence_and_the_policy_decides(
    tmp_path: Path, other: UsageBank, what: str
) -> None:
    bank = opened(tmp_path, other, deadline_ms=100)
    if what == "silent":
        other.awake.clear()
    other.away = what == "failing"
    if what == "gone":
        other.close()
        other.close = lambda: None  # type: ignore[method-assign]  # it is closed
    for _ in range(10):
        # Not a measure: the old plug-ins waited five seconds, inside slurmctld.
        began_s = time.monotonic()
        assert ask(bank, "time_limit=10").word == "away"
        assert time.monotonic() - began_s < 5
    if what != "gone":
        other.away = False
        other.awake.set()
        deadline_s = time.monotonic() + 60
        while ask(bank, "time_limit=10").word != "ok":
            assert time.monotonic() < deadline_s, "the bank is back and nobody asks it"
    asyncio.run(bank.close())


def test_a_token_that_the_bank_does_not_take_refuses_and_does_not_open_the_door(
    tmp_path: Path, other: UsageBank
) -> None:
    (tmp_path / "token").write_text("f" * 40)
    (tmp_path / "token").chmod(0o600)
    bank = opened(tmp_path, other, token_file=str(tmp_path / "token"))
    reply = ask(bank, "time_limit=10")
    assert (reply.word, "does not take our token" in reply.text) == ("refuse", True)
    assert queries.liens(bank.ledger.store) == []
    asyncio.run(bank.close())


def test_a_token_that_others_can_read_is_not_used(tmp_path: Path, other: UsageBank) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o640)
    with pytest.raises(CarrelError, match="with mode 640, so others have the token"):
        opened(tmp_path, other, token_file=str(token))


def test_a_lease_needs_our_own_ledger(tmp_path: Path, other: UsageBank) -> None:
    (tmp_path / "bank-config.toml").write_text(other.config())
    remote = MybrcClient(config=str(tmp_path / "bank-config.toml"))
    where = {"database": str(tmp_path / "l.db"), "dir": str(tmp_path)}
    settings = BankSettings(enabled=True, provider="mybrc", offline="open", remote=remote, **where)  # type: ignore[arg-type]
    with pytest.raises(CarrelError, match=r'bank\.offline = "open"'):
        Bank(Config(bank=settings))


def tell(bank: Bank) -> tuple[int, int]:
    assert bank.remote is not None
    flushed = bank.remote.tell("k")
    return flushed.sent, flushed.left


def test_the_bank_hears_of_a_start_and_of_an_end_and_counts_what_was_charged(bank: Bank, other: UsageBank) -> None:
    run = begun(bank, 7)
    assert tell(bank) == (1, 0)
    assert (other.jobs["7"]["jobstatus"], other.used) == ("RUNNING", Decimal("0.18"))
    end(bank, run, 100_000)
    assert tell(bank) == (1, 0)
    assert tell(bank) == (0, 0)
    told = other.jobs["7"]
    assert (told["jobstatus"], told["enddate"], told["cpu_time"]) == ("COMPLETED", "2025-06-15T15:14:20Z", 0.1)
    assert (told["userid"], told["accountid"], told["partition"], told["num_cpus"]) == ("0", "physics", "main", 1)
    assert other.used == Decimal("0.10")


@pytest.mark.parametrize(
    ("off", "heard"),
    [
        ("enable_job_submit_plugin", (False, "RUNNING", "COMPLETED")),
        ("enable_spank_plugin", (True, None, "COMPLETED")),
        ("enable_job_complete_plugin", (True, "RUNNING", "RUNNING")),
    ],
)
def test_what_a_switch_of_the_banks_file_turns_off_the_bank_is_not_asked_or_told(
    tmp_path: Path, other: UsageBank, off: str, heard: tuple[bool, str | None, str]
) -> None:
    bank = opened(tmp_path, other, off=off)
    run = begun(bank, 7)
    tell(bank)
    asked, started = bool(other.asked), other.jobs.get("7", {}).get("jobstatus")
    end(bank, run, 100_000)
    tell(bank)
    assert (asked, started, other.jobs["7"]["jobstatus"]) == heard
    asyncio.run(bank.close())


def test_f15_runs_of_a_requeued_job_add_up_and_a_refund_is_told(bank: Bank, other: UsageBank) -> None:
    run = begun(bank, 7)
    tell(bank)
    end(bank, run, 100_000)
    tell(bank)
    token = ask(bank, "time_limit=10").text
    again = f"7.{SUBMITTED_S + 500}.1"
    begin(bank, token, 7, again)
    assert tell(bank) == (0, 0)  # a PUT without an end would spoil what it counts
    end(bank, again, 50_000, BEGAN_S + 600)
    tell(bank)
    assert other.used == Decimal("0.15")
    do(bank, Refund(key="r", cluster="k", run=run, amount_micro_su=40_000, reason="x"))
    do(bank, Correct(key="c", cluster="k", run=again, amount_micro_su=60_000, reason="x"))
    tell(bank)
    assert other.used == Decimal("0.12")
    assert list(verify(bank.ledger.store)) == []


def test_f12_an_outage_and_a_kill_at_every_point_lose_no_report_and_count_none_twice(
    tmp_path: Path, other: UsageBank
) -> None:
    bank = opened(tmp_path, other)
    runs = [begun(bank, job) for job in range(1, 4)]
    other.away = True
    assert tell(bank) == (0, 3)
    for at, run in enumerate(runs):
        end(bank, run, (at + 1) * 10_000)
        bank = _killed(bank, tmp_path, other)
        assert tell(bank)[0] == 0
    bank = _killed(bank, tmp_path, other)
    assert bank.remote is not None
    bank.remote.bank.mark_at(0)  # killed after the reports were made and before that was noted
    other.away = False
    assert tell(bank) == (3, 0)
    assert other.used == Decimal("0.06")
    bank.remote.bank.mark_at(0)  # killed after all were sent: they are sent once more, and change nothing
    tell(bank)
    assert (other.used, len(other.jobs)) == (Decimal("0.06"), 3)
    asyncio.run(bank.close())


def _killed(bank: Bank, directory: Path, other: UsageBank) -> Bank:
    """Go on with a copy of what is on the disk, as after a kill: nothing is closed, nothing is flushed."""
    copy = Path(tempfile.mkdtemp(dir=directory))
    for file in directory.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    with contextlib.suppress(CarrelError):
        asyncio.run(bank.close())
    for file in copy.iterdir():
        shutil.move(str(file), directory / file.name)
    return opened(directory, other)


def test_what_our_ledger_did_before_the_bank_was_elsewhere_is_not_told(tmp_path: Path, other: UsageBank) -> None:
    first = opened(tmp_path, other)
    end(first, begun(first, 7), 10_000)
    asyncio.run(first.close())
    for file in tmp_path.glob("mybrc.db*"):
        file.unlink()
    second = opened(tmp_path, other)
    assert tell(second) == (0, 0)
    asyncio.run(second.close())


def test_an_own_price_book_goes_before_the_banks(tmp_path: Path, other: UsageBank) -> None:
    book = tmp_path / "prices.toml"
    book.write_text('[[version]]\nname = "v"\nvalid_from = 2020-01-01\n[version.default]\nrates = { cpu = 2 }\n')
    first = opened(tmp_path, other)
    settings = first.settings
    asyncio.run(first.close())
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    second = Bank(Config(bank=BankSettings(**(fields | {"prices": Prices(book=str(book))}))))
    second.learn(CLUSTER, {"ClusterName": "k"})
    assert decimal_text(lien_of(second, ask(second, "time_limit=10").text)) == "0.37"
    asyncio.run(second.close())
