"""Who may ask at the counter, and what it says to whoever may not or asks nonsense."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.bank import queries
from carrel.config import Bank as BankSettings
from carrel.config import Config, Prices
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.daemons.counter import SEPARATOR, Counter
from carrel.daemons.starts import Starts
from carrel.model.cluster import ClusterFacts, NodeFacts, PartitionFacts
from carrel.model.ledger import (
    AnyCommand,
    Backfill,
    Bind,
    Deposit,
    OpenAllocation,
    OpenProject,
    Place,
    Receipt,
    Settle,
    Start,
)
from carrel.model.report import Event
from carrel.testing.daemons import a_report
from carrel.testing.sandbox import let_enter

BOOK = '[[version]]\nname = "v"\nvalid_from = 2020-01-01\n[version.default]\nrates = { cpu = 1 }\n'
NODE = NodeFacts(name="c1", cpus=4, for_jobs=4, memory_mib=1000)
CLUSTER = ClusterFacts(partitions={"main": PartitionFacts(name="main", nodes=(NODE,))}, default_partition="main")


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    book = tmp_path / "prices.toml"
    book.write_text(BOOK)
    settings = BankSettings(
        enabled=True,
        database=str(tmp_path / "ledger.db"),
        dir=str(tmp_path),
        deadline_ms=500,
        default_account="physics",
        prices=Prices(book=str(book)),
    )
    found = Bank(Config(bank=settings))
    found.learn(CLUSTER, {"ClusterName": "k", "SlurmUser": "slurm(64030)"})
    for command in (
        OpenProject(key="p", project="physics"),
        OpenAllocation(key="a", allocation="physics", project="physics"),
        Deposit(key="d", allocation="physics", amount_micro_su=1_000_000, reason="test"),
    ):
        found.ledger.call(command)
    yield found
    found.ledger.close()


def ask(bank: Bank, verb: str, *words: str, uid: int = 0) -> tuple[str, str]:
    reply = asyncio.run(Counter(bank).answer(SEPARATOR.join([verb, *words]), uid=uid))
    return reply.word, reply.text


def submit(bank: Bank, *words: str, uid: int = 0) -> tuple[str, str]:
    return ask(bank, "submit", f"token={secrets.token_hex(16)}", "uid=0", *words, uid=uid)


def test_f25_only_root_and_slurms_user_are_answered(bank: Bank) -> None:
    assert submit(bank, "time_limit=10")[0] == "ok"
    assert submit(bank, "time_limit=10", uid=64030)[0] == "ok"
    assert submit(bank, "time_limit=10", uid=1001) == ("refuse", "uid 1001 may not ask here, only slurmctld may")


def test_what_is_not_covered_is_refused_with_figures(bank: Bank) -> None:
    word, text = submit(bank, "time_limit=60")
    assert word == "refuse"
    assert text == "account 'physics' has 1.00 SU left, this job may need 1.016667 SU; see: carrel account show physics"


@pytest.mark.parametrize(
    "words", [("time_limit=x",), ("time_limit=10", "array_inx=9-1"), ("partition=none",), ("token=x",)]
)
def test_nonsense_is_refused_and_sets_nothing_aside(bank: Bank, words: tuple[str, ...]) -> None:
    assert submit(bank, "time_limit=10", *words)[0] == "refuse"
    assert queries.liens(bank.ledger.store) == []


def test_a_question_that_nobody_knows_is_refused(bank: Bank) -> None:
    assert ask(bank, "give", "all")[0] == "refuse"


def test_the_same_token_asked_twice_sets_aside_once(bank: Bank) -> None:
    words = (f"token={secrets.token_hex(16)}", "uid=0", "time_limit=10")
    assert ask(bank, "submit", *words)[0] == ask(bank, "submit", *words)[0] == "ok"
    assert len(queries.liens(bank.ledger.store)) == 1


def test_before_slurm_has_answered_there_is_silence(bank: Bank, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(bank.settings, database=str(tmp_path / "other.db"))
    other = Bank(Config(bank=settings))
    try:
        assert ask(other, "ready")[0] == "away"
        assert submit(other, "time_limit=10")[0] == "away"
    finally:
        other.ledger.close()


def test_f22_a_dearer_change_is_covered_first_and_a_cheaper_one_is_not_believed_yet(bank: Bank) -> None:
    _, token = submit(bank, "time_limit=10")
    (before,) = queries.liens(bank.ledger.store)
    assert ask(bank, "modify", f"token={token}", "uid=0", "job=1", "time_limit=5")[0] == "ok"
    assert queries.liens(bank.ledger.store) == [before]
    assert ask(bank, "modify", f"token={token}", "uid=0", "job=1", "time_limit=20")[0] == "ok"
    (after,) = queries.liens(bank.ledger.store)
    assert after.lien_micro_su > before.lien_micro_su
    assert ask(bank, "modify", f"token={token}", "uid=0", "job=1", "time_limit=600")[0] == "refuse"


def test_f22_another_account_is_taken_where_it_covers_the_job(bank: Bank) -> None:
    _, token = submit(bank, "time_limit=10")
    (before,) = queries.liens(bank.ledger.store)
    move = ("modify", f"token={token}", "uid=0", "job=1", "account=chemistry")
    bank.ledger.call(OpenProject(key="p2", project="chemistry"))
    bank.ledger.call(OpenAllocation(key="a2", allocation="chemistry", project="chemistry"))
    word, text = ask(bank, *move)
    assert word == "refuse"
    assert text.startswith("account 'chemistry' has 0.00 SU left, this job may need ")
    bank.ledger.call(Deposit(key="d2", allocation="chemistry", amount_micro_su=before.lien_micro_su, reason="test"))
    assert ask(bank, *move)[0] == "ok"
    assert queries.liens(bank.ledger.store) == [before], "it moves when the queue shows it there"


def test_a_user_cannot_release_a_job_that_the_bank_has_not_priced(bank: Bank) -> None:
    word, text = ask(bank, "modify", "token=abc", "uid=0", "job=1", "release=1")
    assert (word, text) == ("refuse", "the bank has not priced this job yet; it is released when it has")


def test_a_guest_is_in_the_token_since_slurm_does_not_count_guests(bank: Bank) -> None:
    assert submit(bank, "time_limit=10", "guest=1")[1].endswith(".g")
    assert submit(bank, "time_limit=10", "guest=1", "guest_per=task", "num_tasks=3")[1].endswith(".t3")


def board_of(*events: tuple[float, str], job_id: int = 7) -> Board:
    board = Board()
    told = tuple(Event(time_s=at_s, node="c1", what=what, text="", job_id=job_id, uid=0) for at_s, what in events)
    board.take(a_report(events=told), now_s=1.0)
    return board


def charged(bank: Bank, *, moment_s: int, guests: int = 1) -> None:
    resources = {"cpu": 1} | ({"guest": guests} if guests else {})
    bank.ledger.call(
        Backfill(
            key="e",
            cluster="k",
            run="7.1.0",
            project="physics",
            user="ada",
            job_id=7,
            amount_micro_su=900,
            inputs={"moment_s": moment_s, "seconds": 60, "resources": resources},
        )
    )


def refunded(bank: Bank, board: Board) -> list[int]:
    return [refund.amount_micro_su for refund in asyncio.run(Starts(bank, board, since_s=0).refunds())]


def test_a_run_whose_guest_we_could_not_start_costs_nothing(bank: Bank) -> None:
    charged(bank, moment_s=1000)
    assert refunded(bank, board_of((1010.0, "guest-failed"))) == [900]


def test_a_run_whose_node_could_carry_no_guest_costs_nothing(bank: Bank) -> None:
    charged(bank, moment_s=1000)
    assert refunded(bank, board_of((1010.0, "node-fault"))) == [900]


def test_a_job_that_runs_on_its_nodes_is_paid_for_even_if_a_steps_guest_failed(bank: Bank) -> None:
    charged(bank, moment_s=1000, guests=0)
    assert refunded(bank, board_of((1010.0, "guest-failed"))) == []


def test_a_run_that_entered_a_guest_is_paid_for_even_if_another_guest_failed(bank: Bank) -> None:
    charged(bank, moment_s=1000)
    assert refunded(bank, board_of((1010.0, "task-entered"), (1020.0, "guest-failed"))) == []


def test_the_failure_of_an_earlier_job_of_the_same_number_refunds_nothing(bank: Bank) -> None:
    charged(bank, moment_s=9000)
    assert refunded(bank, board_of((1010.0, "guest-failed"))) == []


def test_of_a_run_that_began_before_us_the_nodes_have_a_minute_to_tell_whether_a_task_entered(bank: Bank) -> None:
    charged(bank, moment_s=1000)
    board = board_of((1010.0, "guest-failed"))
    assert asyncio.run(Starts(bank, board, since_s=time.time()).refunds()) == []
    assert len(asyncio.run(Starts(bank, board, since_s=time.time() - 61).refunds())) == 1


def test_what_was_refunded_is_not_refunded_again(bank: Bank) -> None:
    charged(bank, moment_s=1000)
    board = board_of((1010.0, "guest-failed"))
    for refund in asyncio.run(Starts(bank, board, since_s=0).refunds()):
        assert isinstance(bank.ledger.call(refund), Receipt)
    assert refunded(bank, board) == []


def test_of_an_array_the_task_whose_guest_failed_costs_nothing_and_the_others_are_paid_for(bank: Bank) -> None:
    inputs = {"moment_s": 1000, "seconds": 60, "resources": {"cpu": 1, "guest": 1}}
    terms: dict[str, Any] = {"cluster": "k", "amount_micro_su": 900}
    commands: tuple[AnyCommand, ...] = (
        Place(key="l", token="t", project="physics", user="ada", units=3, **terms),
        Bind(key="b", cluster="k", token="t", user="ada", job_id=7),
        *(Start(key=f"s{job}", token="t", run=f"{job}.1.0", **terms) for job in (8, 9, 7)),
        *(Settle(key=f"e{job}", run=f"{job}.1.0", inputs=inputs, **terms) for job in (8, 9, 7)),
    )
    assert all(isinstance(bank.ledger.call(command), Receipt) for command in commands)
    # The last task has the array's own number.
    for failed in (8, 7):
        board = board_of((1010.0, "guest-failed"), job_id=failed)
        (refund,) = asyncio.run(Starts(bank, board, since_s=0).refunds())
        assert (refund.run, refund.amount_micro_su) == (f"{failed}.1.0", 900)


@pytest.mark.root
def test_a_stranger_is_shown_out_before_he_has_asked(bank: Bank, tmp_path: Path) -> None:
    """Or connections that never ask would take the descriptors of those that do."""
    script = (
        "import socket; "
        f"sock = socket.socket(socket.AF_UNIX); sock.connect({str(tmp_path / 'submit.sock')!r}); "
        "print(sock.makefile().read(), end='')"
    )

    async def said() -> bytes:
        server = await asyncio.start_unix_server(Counter(bank).connected, str(tmp_path / "submit.sock"))
        (tmp_path / "submit.sock").chmod(0o666)
        words = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "/usr/bin/python3", "-c", script]
        async with server, asyncio.timeout(60):
            child = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
            return (await child.communicate())[0]

    let_enter(tmp_path)
    assert asyncio.run(said()) == b"refuse\tuid 12345 may not ask here, only slurmctld may\n"
