"""The tables, as far as the writer must know them: their columns in order, and which of them change.

The definitions are in the migrations; the contract suite compares the two.
"""

import msgspec

from carrel.core.book import Account, Allocation, Entry, Key, Leg, Lien, Member, Project, Row, Txn


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table; ``columns`` is in the order of its struct's fields."""

    name: str
    columns: dict[str, str]
    """Name to PostgreSQL type."""
    key: tuple[str, ...] = ()
    """What a row is found by when it changes; empty: its rows never change."""
    fixed: tuple[str, ...] = ()
    """What of a row never changes. SQLite writes anew the indexes of each column that an UPDATE names."""

    @property
    def changing(self) -> tuple[str, ...]:
        return tuple(name for name in self.columns if name not in {*self.key, *self.fixed, "version"})


_VERSION = {"version": "bigint"}
_SUMS = {"open": "bigint", "charged": "bigint", "refunded": "bigint"}

PROJECT = Table(
    name="project",
    columns={"name": "text", "parent": "text", "cap": "bigint", "committed": "bigint"} | _VERSION,
    key=("name",),
    fixed=("parent",),
)
MEMBER = Table(
    name="member",
    columns={"project": "text", "username": "text", "cap": "bigint", "committed": "bigint"} | _VERSION,
    key=("project", "username"),
)
ALLOCATION = Table(
    name="allocation",
    columns={
        "id": "bigint",
        "name": "text",
        "project": "text",
        "start_s": "bigint",
        "end_s": "bigint",
        "priority": "bigint",
        "credit": "bigint",
    }
    | _VERSION,
    key=("id",),
    fixed=("name", "project"),
)
ACCOUNT = Table(
    name="account",
    columns={
        "id": "bigint",
        "allocation": "bigint",
        "kind": "text",
        "balance": "bigint",
        "floor": "bigint",
        "overdrawn": "boolean",
    }
    | _VERSION,
    key=("id",),
    fixed=("allocation", "kind"),
)
LIEN = Table(
    name="lien",
    columns={
        "id": "bigint",
        "cluster": "text",
        "token_ref": "text",
        "run_ref": "text",
        "job_id": "bigint",
        "project": "text",
        "username": "text",
        "state": "text",
        "units": "bigint",
        "unit": "bigint",
    }
    | _SUMS
    | {"expires_s": "bigint", "flags": "text", "parent": "bigint"}
    | _VERSION,
    key=("id",),
    fixed=("cluster", "token_ref", "project", "username", "parent"),
)
LEG = Table(
    name="leg",
    columns={"lien": "bigint", "position": "bigint", "allocation": "bigint"} | _SUMS | _VERSION,
    key=("lien", "position"),
    fixed=("allocation",),
)
TXN = Table(
    name="txn",
    columns={
        "seq": "bigint",
        "at_s": "bigint",
        "kind": "text",
        "lien": "bigint",
        "key": "text",
        "flags": "text",
        "request": "text",
        "hash": "bytea",
    },
)
ENTRY = Table(name="entry", columns={"seq": "bigint", "account": "bigint", "amount": "bigint", "balance": "bigint"})
KEY = Table(name="idempotency", columns={"key": "text", "request_hash": "bytea", "answer": "text", "at_s": "bigint"})

TOKEN = Table(
    name="token",
    columns={
        "name": "text",
        "hash": "bytea",
        "username": "text",
        "scope": "text",
        "note": "text",
        "created_s": "bigint",
        "expires_s": "bigint",
        "revoked_s": "bigint",
    }
    | _VERSION,
    key=("name",),
)
ALERT = Table(
    name="alert",
    columns={"project": "text", "percent": "bigint", "told": "bigint", "number": "bigint"} | _VERSION,
    key=("project",),
)
MYBRC_JOB = Table(
    name="mybrc_job",
    columns={
        "id": "text",
        "username": "text",
        "project": "text",
        "status": "text",
        "part": "text",
        "amount": "bigint",
        "start_s": "bigint",
        "cpu_ms": "bigint",
        "body": "text",
    }
    | _VERSION,
    key=("id",),
)

TABLES = {
    table.name: table
    for table in (PROJECT, MEMBER, ALLOCATION, ACCOUNT, LIEN, LEG, TXN, ENTRY, KEY, TOKEN, ALERT, MYBRC_JOB)
}
ROWS: dict[type[Row], Table] = {
    Project: PROJECT,
    Member: MEMBER,
    Allocation: ALLOCATION,
    Account: ACCOUNT,
    Lien: LIEN,
    Leg: LEG,
}
"""In an order in which none refers to a later one."""
APPENDED: dict[type[Txn | Entry | Key], Table] = {Txn: TXN, Entry: ENTRY, Key: KEY}
