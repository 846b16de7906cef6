"""Between the tables and the book: load what a batch needs, write what it changed. A handful of statements each way."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from carrel.bank.tables import APPENDED, KEY, LEG, LIEN, MEMBER, ROWS, TABLES, Table
from carrel.core.book import (
    ACCOUNTS_EACH,
    ADJUST,
    GENESIS,
    ISSUED,
    RESOLVING,
    Account,
    Allocation,
    Book,
    Entry,
    Key,
    Leg,
    Lien,
    Member,
    Project,
    Txn,
)
from carrel.core.ledger import Wants
from carrel.ports import Reading, Writing


def columns(table: Table, prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in table.columns)


_MEMBERS = (
    f"SELECT {columns(MEMBER)} FROM member "  # noqa: S608  # our own names
    "WHERE project IN ({texts}) AND username IN ({texts})"
)


def load(session: Reading, wants: Wants, now_s: int) -> Book:
    """Return a book with all that the commands name and all that follows from it."""
    seq, last_hash = next(iter(session.rows("SELECT seq, hash FROM txn ORDER BY seq DESC LIMIT 1")), (0, GENESIS))
    ((lien, allocation),) = session.rows(
        "SELECT coalesce((SELECT max(id) FROM lien), 0), coalesce((SELECT max(id) FROM allocation), 0)"
    )
    book = Book(now_s=now_s, seq=seq, last_hash=bytes(last_hash), last_lien=lien, last_allocation=allocation)
    for key, request_hash, answer, at_s in _members(session, KEY, "key", wants.keys):
        book.keys[key] = Key(key, bytes(request_hash), answer, at_s)
    _load_liens(session, book, wants)
    _load_budgets(session, book, wants)
    _load_allocations(session, book, wants)
    return book


def _members(session: Reading, table: Table, column: str, values: Iterable[Any]) -> Iterable[Sequence[Any]]:
    listed = list(values)
    if not listed:
        return ()
    return session.rows(_select(table.name, column), listed)


@functools.cache
def _select(name: str, column: str) -> str:
    table = TABLES[name]
    kind = "{ints}" if table.columns[column] == "bigint" else "{texts}"
    return f"SELECT {columns(table)} FROM {name} WHERE {column} IN ({kind})"  # noqa: S608  # our own names


def _load_liens(session: Reading, book: Book, wants: Wants) -> None:
    found = [*_members(session, LIEN, "token_ref", wants.tokens), *_members(session, LIEN, "run_ref", wants.runs)]
    if wants.sweep:
        due = (
            f"SELECT {columns(LIEN)} FROM lien WHERE expires_s <= %s "  # noqa: S608  # our own names
            "AND state IN ('quoted', 'unbound', 'bound') ORDER BY expires_s, id LIMIT %s"
        )
        found += session.rows(due, book.now_s, wants.sweep)
    for row in found:
        if row[0] not in book.liens:
            book.add_lien(Lien(*row))
    for leg in sorted((Leg(*row) for row in _members(session, LEG, "lien", book.liens)), key=lambda leg: leg.position):
        book.legs[leg.lien].append(leg)
    for ref in wants.resolved_runs:
        if (lien := book.by_run.get(ref)) is not None:
            book.resolved[lien.id] = resolved(session, lien.id)


def resolved(session: Reading, lien: int) -> dict[int, int]:
    """Return what the settlements and refunds of a lien, less their reversals, did to each account."""
    rows = session.rows(
        "SELECT account, sum(amount) FROM entry JOIN txn ON txn.seq = entry.seq "
        "WHERE txn.lien = %s AND txn.kind IN ({texts}) GROUP BY account",
        lien,
        list(RESOLVING),
    )
    return {number: int(amount) for number, amount in rows}


def _load_budgets(session: Reading, book: Book, wants: Wants) -> None:
    pairs = wants.members | {(lien.project, lien.user) for lien in book.liens.values()}
    names = wants.projects | {project for project, _ in pairs}
    if names:
        upwards = (
            "WITH RECURSIVE up (name) AS (SELECT name FROM project WHERE name IN ({texts}) "
            "UNION SELECT p.parent FROM project AS p JOIN up ON up.name = p.name WHERE p.parent <> '') "
            "SELECT name, parent, cap, committed, version FROM project WHERE name IN (SELECT name FROM up)"
        )
        for row in session.rows(upwards, list(names)):
            book.add_project(Project(*row))
    users = {user for _, user in pairs if user}
    if users:
        for row in session.rows(_MEMBERS, sorted({project for project, _ in pairs}), sorted(users)):
            book.members[row[0], row[1]] = Member(*row)


def _load_allocations(session: Reading, book: Book, wants: Wants) -> None:
    table = ROWS[Allocation]
    legs = {leg.allocation for legs in book.legs.values() for leg in legs}
    # Only what liens and charges draw on: a project is named by many commands that move no money of its own.
    drawn = {project for project, _ in wants.members} | {lien.project for lien in book.liens.values()}
    found = [
        *_members(session, table, "name", wants.allocations - {""}),
        *_members(session, table, "project", drawn),
        *_members(session, table, "id", legs),
    ]
    if wants.sweep:
        ended = (
            f"SELECT {columns(table, 'a.')} FROM allocation AS a "  # noqa: S608  # our own names
            "JOIN account AS c ON c.id = a.id * 4 WHERE a.end_s <= %s AND c.balance > 0 ORDER BY a.id LIMIT %s"
        )
        found += session.rows(ended, book.now_s, wants.sweep)
    for row in found:
        if row[0] not in book.allocations_by_id:
            book.add_allocation(Allocation(*row))
    numbers = [ISSUED, ADJUST] if wants.allocations else []
    numbers += [number * ACCOUNTS_EACH + kind for number in book.allocations_by_id for kind in range(ACCOUNTS_EACH)]
    for row in _members(session, ROWS[Account], "id", numbers):
        account = Account(*row)
        account.overdrawn = bool(account.overdrawn)
        book.accounts[account.id] = account


def write(session: Writing, book: Book) -> None:
    """Write what is new and what changed, where the database still has the versions that were loaded."""
    for kind, table in ROWS.items():
        rows = book.changed.get(kind)
        if not rows:
            continue
        new: list[tuple[Any, ...]] = []
        old: list[tuple[Any, ...]] = []
        for row in rows.values():
            fields = msgspec.structs.astuple(row)
            (old if fields[-1] else new).append(fields)
        if new:
            last = len(table.columns) - 1
            session.insert(table.name, [(*row[:last], 1) for row in new])
        if old:
            session.update(table.name, old)
    appended: dict[type[Txn | Entry | Key], Sequence[Txn | Entry | Key]] = {
        Txn: book.txns,
        Entry: book.entries,
        Key: book.new_keys,
    }
    for sort, items in appended.items():
        if items:
            session.insert(APPENDED[sort].name, [msgspec.structs.astuple(item) for item in items])
