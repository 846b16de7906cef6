"""What each database must be told apart for: who writes past the lock, what is not there, what is too new."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from carrel.bank.ledger import Ledger
from carrel.bank.postgres import PostgresStore
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.core import liens
from carrel.errors import CarrelError, UnreachableError
from carrel.model.ledger import Place, Receipt, Refusal
from carrel.ports import Reading, Store, Writing
from carrel.testing.ledger import Clock, Teller


class Meddled:
    """A store in which somebody changes a row between what a batch reads and what it writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.meddle: list[Callable[[], None]] = []

    def migrate(self) -> int:
        return self._store.migrate()

    @contextmanager
    def writing(self) -> Iterator[Writing]:
        with self._store.writing() as session:
            yield MeddledSession(session, self.meddle)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        with self._store.reading() as session:
            yield session

    def close(self) -> None:
        self._store.close()


class MeddledSession:
    def __init__(self, session: Writing, meddle: list[Callable[[], None]]) -> None:
        self._session = session
        self._meddle = meddle

    def rows(self, sql: str, *values: Any) -> Iterator[Sequence[Any]]:
        return self._session.rows(sql, *values)

    def unguarded(self) -> set[str]:
        return self._session.unguarded()

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        self._session.insert(table, rows)

    def update(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        if table == "account" and self._meddle:
            self._meddle.pop()()
        self._session.update(table, rows)


@pytest.mark.postgres
def test_a_row_that_is_changed_past_the_lock_makes_the_batch_begin_again(postgres: str) -> None:
    store = Meddled(PostgresStore(postgres))

    def spend() -> None:
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute("UPDATE account SET balance = 50, version = version + 1 WHERE id = 4")

    with Ledger(store, clock=Clock()) as ledger:
        teller = Teller(ledger, Clock())
        teller.open(100)
        store.meddle = [spend]
        answer = teller.ask(Place, token="t", amount_micro_su=80)
        assert isinstance(answer, Refusal)
        assert answer.available_micro_su == 50
        store.meddle = [spend] * 5
        with pytest.raises(UnreachableError, match="past its lock"):
            teller.ask(Place, token="u", amount_micro_su=10)


def test_a_ledger_in_a_place_that_is_not_there_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="unable to open database file"):
        Ledger(SqliteStore(tmp_path / "nowhere" / "bank.db"))


@pytest.mark.postgres
def test_a_postgres_that_is_not_there_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="did not answer"):
        Ledger(PostgresStore(f"host={tmp_path} dbname=none"))


def test_a_ledger_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "bank.db")
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(CarrelError, match="version 999, this program knows 4; upgrade carrel"):
        Ledger(SqliteStore(tmp_path / "bank.db"))


def test_a_command_that_the_rules_choke_on_is_done_by_itself_and_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = liens.place

    def choke(book: Any, command: Place, request: str) -> Receipt:
        answer = place(book, command, request)
        if command.token == "poison":  # noqa: S105  # no password
            raise ZeroDivisionError("a mistake of ours, after the book was changed")
        return answer

    monkeypatch.setattr(liens, "place", choke)
    with Ledger(SqliteStore(tmp_path / "bank.db"), clock=Clock()) as ledger:
        teller = Teller(ledger, Clock())
        teller.open(100)
        futures = [
            ledger.submit([teller.make(Place, token=token, amount_micro_su=10)]) for token in ("a", "poison", "b")
        ]
        assert isinstance(futures[0].result()[0], Receipt)
        with pytest.raises(CarrelError, match="ZeroDivisionError"):
            futures[1].result()
        assert isinstance(futures[2].result()[0], Receipt)
        assert teller.amounts() == (80, 20, 0, 0)
        assert verify(ledger.store) == []
