"""Both databases keep the same promises."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from carrel.bank.postgres import PostgresStore
from carrel.bank.sqlite import SqliteStore
from carrel.ports import Store
from carrel.testing import LedgerContract, LedgerFailureModes


class OnSqlite:
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: SqliteStore(tmp_path / "bank.db")

    @pytest.fixture
    def tamper(self, tmp_path: Path) -> Callable[[str], None]:
        def run(sql: str) -> None:
            connection = sqlite3.connect(tmp_path / "bank.db", isolation_level=None)
            try:
                connection.executescript(sql)
            finally:
                connection.close()

        return run

    @pytest.fixture
    def unguard(self) -> Callable[[str], str]:
        return lambda table: "".join(f"DROP TRIGGER {table}_no_{change};" for change in ("update", "delete"))


class OnPostgres:
    @pytest.fixture
    def open_store(self, postgres: str) -> Callable[[], Store]:
        return lambda: PostgresStore(postgres)

    @pytest.fixture
    def tamper(self, postgres: str) -> Callable[[str], None]:
        def run(sql: str) -> None:
            with psycopg.connect(postgres, autocommit=True) as connection:
                connection.execute(sql.encode())

        return run

    @pytest.fixture
    def unguard(self) -> Callable[[str], str]:
        return lambda table: f"ALTER TABLE {table} DISABLE TRIGGER USER"


class TestFailureModesOnSqlite(OnSqlite, LedgerFailureModes):
    pass


@pytest.mark.postgres
class TestFailureModesOnPostgres(OnPostgres, LedgerFailureModes):
    pass


class TestPromisesOnSqlite(OnSqlite, LedgerContract):
    pass


@pytest.mark.postgres
class TestPromisesOnPostgres(OnPostgres, LedgerContract):
    pass
