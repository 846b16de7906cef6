"""The ledger in PostgreSQL, for a site with several clusters.

READ COMMITTED. Writers queue up at one advisory lock, so that batches never meet: several that each lock accounts
in their own order would deadlock, and SERIALIZABLE would retry most of what an append-heavy table sees. Every change
is conditional on the row's version all the same, so that one who writes past the lock is found out, not obeyed.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from carrel.bank import migrations
from carrel.bank.pool import Pool
from carrel.bank.tables import TABLES
from carrel.errors import LostRaceError, UnreachableError

LOCK = 0x0CA77E1
"""The advisory lock of the writers, one for each database."""
_TAKE_LOCK = f"SELECT pg_advisory_xact_lock({LOCK})".encode()
LOCK_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 10
_TRIGGERS = {
    "txn_no_change",
    "entry_no_change",
    "idempotency_no_change",
    "account_no_delete",
    "lien_no_delete",
    "lien_final",
}


@functools.cache
def _dialect(sql: str) -> str:
    return sql.replace("{ints}", "SELECT unnest(%s::bigint[])").replace("{texts}", "SELECT unnest(%s::text[])")


def _unnest(name: str) -> str:
    types = TABLES[name].columns.values()
    return f"unnest({', '.join(f'%s::{kind}[]' for kind in types)})"


@functools.cache
def _insert(name: str) -> str:
    return f"INSERT INTO {name} SELECT * FROM {_unnest(name)}"  # noqa: S608  # our own names


@functools.cache
def _update(name: str) -> str:
    table = TABLES[name]
    sets = [f"{column} = new.{column}" for column in table.changing]
    found = [f"old.{column} = new.{column}" for column in (*table.key, "version")]
    return (
        f"UPDATE {name} AS old SET {', '.join(sets)}, version = old.version + 1 "  # noqa: S608  # our own names
        f"FROM {_unnest(name)} AS new ({', '.join(table.columns)}) WHERE {' AND '.join(found)}"
    )


class _Session:
    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        self.connection = connection
        self._updates: list[tuple[str, psycopg.Cursor[tuple[Any, ...]], int]] = []

    def rows(self, sql: str, *values: Any) -> Iterator[Sequence[Any]]:
        return iter(self.connection.execute(_dialect(sql), values, prepare=True))

    def unguarded(self) -> set[str]:
        on = self.rows(
            "SELECT tgname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid "
            "WHERE relnamespace = current_schema()::regnamespace AND tgenabled IN ('O', 'A')"
        )
        return _TRIGGERS - {name for (name,) in on}

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        self.connection.execute(_insert(table), _columns(rows), prepare=True)

    def update(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        cursor = self.connection.execute(_update(table), _columns(rows), prepare=True)
        self._updates.append((table, cursor, len(rows)))

    def check(self) -> None:
        """Look at the counts of all updates, which are on their way until now."""
        for table, cursor, expected in self._updates:
            if cursor.rowcount != expected:
                raise LostRaceError(f"a row of {table} was changed past the ledger's lock")


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


class PostgresStore(Pool[psycopg.Connection[tuple[Any, ...]]]):
    """A ``Store`` in the database that a connection string of libpq names."""

    def __init__(self, conninfo: str) -> None:
        """Remember where; the first use connects."""
        super().__init__()
        self._conninfo = conninfo

    def migrate(self) -> int:
        with self._lock, self._errors():
            connection = self._connect()
            with connection, connection.transaction():
                connection.execute(_TAKE_LOCK)
                connection.execute("CREATE TABLE IF NOT EXISTS carrel_version (version bigint NOT NULL)")
                rows = connection.execute("SELECT version FROM carrel_version").fetchall()
                version = max((int(row[0]) for row in rows), default=0)
                for number, script in migrations.after(version, "postgresql"):
                    connection.execute(script.encode(), prepare=False)
                    connection.execute("INSERT INTO carrel_version VALUES (%s)", (number,))
                    version = number
                return version

    @contextmanager
    def writing(self) -> Iterator[_Session]:
        """Begin a transaction. Statements go out without waiting for each other where nobody reads their result."""
        with self._lock, self._errors():
            if self._writer is None or self._writer.broken:
                self._writer = self._connect()
            connection = self._writer
            session = _Session(connection)
            with connection.pipeline() as pipeline, connection.transaction():
                connection.execute(_TAKE_LOCK, prepare=True)
                yield session
                pipeline.sync()
                session.check()

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        with self._errors():
            connection = self._take()
            with connection.transaction():
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                yield _Session(connection)
            self._give(connection)

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = psycopg.connect(
            self._conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name="carrel bank"
        )
        # Whatever the server's default is: an answer is given after its rows are on the disk.
        connection.execute("SET synchronous_commit = on")
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UnreachableError(f"the ledger's PostgreSQL did not answer: {said}; is it running?") from error
