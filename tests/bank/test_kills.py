"""A writer dies at any instant: nothing that it was told is lost, nothing is done twice.

``CARREL_KILLS`` asks for more kills than ``make check`` has time for.
"""

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.verify import verify
from carrel.errors import UnreachableError
from carrel.model.ledger import Answer, Deposit, OpenAllocation, OpenProject, Receipt, Refusal
from carrel.testing.ledger_writer import IN_FLIGHT, commands, open_store
from carrel.testing.postgres import Postgres

KILLS = int(os.environ.get("CARREL_KILLS", "2"))
FUNDS = 10**15
answers_of = msgspec.json.Decoder(list[Receipt | Refusal])


def open_account(ledger: Ledger) -> None:
    ledger.call(OpenProject(key="a", project="physics"))
    ledger.call(OpenAllocation(key="b", allocation="grant", project="physics"))
    ledger.call(Deposit(key="c", allocation="grant", amount_micro_su=FUNDS, reason="a test"))


def write_and_die(url: str, first: int, after_lines: int) -> dict[int, list[Answer]]:
    """Run a writer, kill it when it has told of so many runs, and return all that it was told."""
    process = subprocess.Popen(
        [sys.executable, "-m", "carrel.testing.ledger_writer", url, str(first)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(lines) == after_lines:
            process.kill()
    process.wait()
    process.stdout.close()
    whole = [line for line in lines if line.endswith("\n")]
    return {int(line.split(" ", 1)[0]): answers_of.decode(line.split(" ", 1)[1]) for line in whole}


def assert_exact(ledger: Ledger, told: dict[int, list[Answer]], runs: int) -> None:
    """Ask everything again: what was told is told again, and in all each run happened once."""
    futures = {n: ledger.submit(commands(n)) for n in range(runs)}
    for n, future in futures.items():
        answers = future.result(60)
        assert all(isinstance(answer, Receipt) for answer in answers)
        assert answers == told.get(n, answers), f"run {n} was told otherwise before"
    assert verify(ledger.store) == []
    spent = sum(50 + n % 11 - 1 - n % 3 for n in range(runs))
    (balance,) = queries.balances(ledger.store)
    assert (balance.spent_micro_su, balance.lien_micro_su) == (spent, 0)
    assert balance.available_micro_su == FUNDS - spent


def kill_in_a_loop(url: str) -> None:
    chance = random.Random(KILLS)  # noqa: S311  # no secret
    with Ledger(open_store(url)) as ledger:
        open_account(ledger)
    told: dict[int, list[Answer]] = {}
    for _ in range(KILLS):
        # The next one begins with what the one before may have left half said.
        told |= write_and_die(url, max(told, default=-1) + 1, chance.randint(1, 60))
        with Ledger(open_store(url)) as ledger:
            assert verify(ledger.store) == []
    with Ledger(open_store(url)) as ledger:
        # What the last writer had under way may have been done without its telling of it.
        assert_exact(ledger, told, max(told) + 1 + IN_FLIGHT)


@pytest.mark.timeout(0)
def test_a_writer_that_is_killed_lost_nothing_it_was_told_and_did_nothing_twice(tmp_path: Path) -> None:
    kill_in_a_loop(f"sqlite:{tmp_path / 'bank.db'}")


@pytest.mark.postgres
@pytest.mark.timeout(0)
def test_a_writer_to_postgres_that_is_killed_lost_nothing_it_was_told(postgres: str) -> None:
    kill_in_a_loop(f"postgresql:{postgres}")


@pytest.mark.postgres
def test_a_postgres_that_is_killed_lost_nothing_it_had_answered(postgres: str, postgres_server: Postgres) -> None:
    told: dict[int, list[Answer]] = {}
    with Ledger(open_store(f"postgresql:{postgres}")) as ledger:
        open_account(ledger)
        enough = threading.Event()

        def write(n: int) -> None:
            try:
                told[n] = ledger.submit(commands(n)).result(60)
            except UnreachableError:
                return  # nobody can tell; asking again does
            if len(told) > 40:
                enough.set()

        with ThreadPoolExecutor(8) as pool:
            for n in range(200):
                pool.submit(write, n)
            assert enough.wait(60)
            postgres_server.kill()
    with Ledger(open_store(f"postgresql:{postgres}")) as ledger:
        assert_exact(ledger, told, 200)


def test_processes_that_write_at_once_leave_one_sound_ledger_and_each_keeps_its_answers(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'bank.db'}"
    with Ledger(open_store(url)) as ledger:
        open_account(ledger)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda first: write_and_die(url, first, 40), [0, 10_000, 20_000]))
    assert all(parts)
    with Ledger(open_store(url)) as ledger:
        assert verify(ledger.store) == []
        told = {n: answers for part in parts for n, answers in part.items()}
        for n, answers in told.items():
            assert ledger.submit(commands(n)).result(60) == answers
