"""The ledger in one SQLite file: the default, for one bank on one host.

WAL, and ``synchronous=FULL``: an answer is given after its rows are on the disk. ``BEGIN IMMEDIATE`` lets one writer
in at a time, whichever process it is of; readers see the last commit and wait for nobody.
"""

import functools
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from carrel.bank import migrations
from carrel.bank.pool import Pool
from carrel.bank.tables import TABLES
from carrel.errors import LostRaceError, UnreachableError

BUSY_TIMEOUT_S = 10.0
"""How long to wait for a writer in another process; a batch takes milliseconds."""
ROWS_AT_ONCE = 1024
"""In one statement; SQLite takes 32,766 values."""

_TRIGGERS = {
    *(f"{table}_no_{change}" for table in ("txn", "entry", "idempotency") for change in ("update", "delete")),
    *("account_no_delete", "lien_no_delete", "lien_final"),
}


_json = msgspec.json.Encoder()


@functools.cache
def _dialect(sql: str) -> str:
    members = "SELECT value FROM json_each(?)"
    return sql.replace("%s", "?").replace("{ints}", members).replace("{texts}", members)


@functools.cache
def _insert(table: str, count: int) -> str:
    row = f"({', '.join('?' * len(TABLES[table].columns))})"
    return f"INSERT INTO {table} VALUES {', '.join([row] * count)}"  # noqa: S608  # our own names


@functools.cache
def _update(name: str) -> str:
    """The parameters are numbered in the order of the columns, so that a row is passed as it is."""
    table = TABLES[name]
    number = {column: place for place, column in enumerate(table.columns, 1)}
    sets = [f"{column} = ?{number[column]}" for column in table.changing]
    found = [f"{column} = ?{number[column]}" for column in table.key]
    version = number["version"]
    return (
        f"UPDATE {name} SET {', '.join(sets)}, version = version + 1 "  # noqa: S608  # our own names
        f"WHERE {' AND '.join(found)} AND version = ?{version}"
    )


class _Session:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *values: Any) -> Iterator[Sequence[Any]]:
        given = [_json.encode(value).decode() if isinstance(value, list) else value for value in values]
        return iter(self._connection.execute(_dialect(sql), given))

    def unguarded(self) -> set[str]:
        return _TRIGGERS - {name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")}

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        # One statement for many rows takes half the time of one for each. In powers of two there are few statements,
        # which all stay prepared.
        at = 0
        while left := len(rows) - at:
            count = min(ROWS_AT_ONCE, 1 << (left.bit_length() - 1))
            self._connection.execute(_insert(table, count), [*chain.from_iterable(rows[at : at + count])])
            at += count

    def update(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        if self._connection.executemany(_update(table), rows).rowcount != len(rows):
            raise LostRaceError(f"a row of {table} was changed past the ledger's lock")


class SqliteStore(Pool[sqlite3.Connection]):
    """A ``Store`` in a file."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; ``migrate`` makes its tables."""
        super().__init__()
        self._path = path

    def migrate(self) -> int:
        with self._errors():
            connection = self._connect()
            try:
                return self._migrate(connection)
            finally:
                connection.close()

    @staticmethod
    def _migrate(connection: sqlite3.Connection) -> int:
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            for number, script in migrations.after(version, "sqlite"):
                for statement in _statements(script):
                    connection.execute(statement)
                version = number
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        return version

    @contextmanager
    def writing(self) -> Iterator[_Session]:
        with self._lock, self._errors():
            if self._writer is None:
                self._writer = self._connect()
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield _Session(connection)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        with self._errors():
            connection = self._take()
            connection.execute("BEGIN")
            try:
                yield _Session(connection)
            finally:
                connection.execute("ROLLBACK")
                self._give(connection)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        # Before a file is in WAL mode, changing to it may meet another process that does the same; the timeout waits.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
            raise UnreachableError(f"{self._path}: {error}; is the disk full, or the file not writable?") from error


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script one by one; a trigger's body holds semicolons of its own."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
