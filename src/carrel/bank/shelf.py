"""Between the tables and the book: load what a batch needs, write what it changed. A handful of statements each way."""

import functools
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import msgspec

from carrel.bank.tables import ACCOUNT, ALLOCATION, APPENDED, KEY, LEG, LIEN, MEMBER, PROJECT, ROWS, TABLES, Table
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
_DUE = (
    f"SELECT {columns(LIEN)} FROM lien WHERE expires_s <= %s "  # noqa: S608  # our own names
    "AND state IN ('quoted', 'unbound', 'bound') ORDER BY expires_s, id LIMIT %s"
)
_ENDED = (
    f"SELECT {columns(ALLOCATION, 'a.')} FROM allocation AS a "  # noqa: S608  # our own names
    "JOIN account AS c ON c.id = a.id * 4 WHERE a.end_s <= %s AND c.balance > 0 ORDER BY a.id LIMIT %s"
)
_LAST = (
    "SELECT seq, hash, coalesce((SELECT max(id) FROM lien), 0), coalesce((SELECT max(id) FROM allocation), 0) "
    "FROM txn ORDER BY seq DESC LIMIT 1"
)


def load(session: Reading, wants: Wants, now_s: int) -> Book:
    """Return a book with all that the commands name and all that follows from it.

    Here and below, what can be asked is asked before the first answer is read: so PostgreSQL gets it in one round trip.
    """
    last = session.rows(_LAST)
    keys = _members(session, KEY, "key", wants.keys)
    liens = [_members(session, LIEN, "token_ref", wants.tokens), _members(session, LIEN, "run_ref", wants.runs)]
    if wants.sweep:
        liens.append(session.rows(_DUE, now_s, wants.sweep))
    seq, last_hash, lien, allocation = next(last, (0, GENESIS, 0, 0))
    book = Book(now_s=now_s, seq=seq, last_hash=bytes(last_hash), last_lien=lien, last_allocation=allocation)
    for key, request_hash, answer, at_s in keys:
        book.keys[key] = Key(key, bytes(request_hash), answer, at_s)
    for row in chain.from_iterable(liens):
        if row[0] not in book.liens:
            book.add_lien(Lien(*row))
    _load_payers(session, book, wants)
    for ref in wants.resolved_runs:
        if (found := book.by_run.get(ref)) is not None:
            book.resolved[found.id] = resolved(session, found.id)
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


def resolved(session: Reading, lien: int) -> dict[int, int]:
    """Return what the settlements and refunds of a lien, less their reversals, did to each account."""
    rows = session.rows(
        "SELECT account, sum(amount) FROM entry JOIN txn ON txn.seq = entry.seq "
        "WHERE txn.lien = %s AND txn.kind IN ({texts}) GROUP BY account",
        lien,
        list(RESOLVING),
    )
    return {number: int(amount) for number, amount in rows}


def _load_payers(session: Reading, book: Book, wants: Wants) -> None:
    """Load who pays for the liens and commands: legs, accounts, and the caps above them."""
    pairs = wants.members | {(lien.project, lien.user) for lien in book.liens.values()}
    # Only what liens and charges draw on: a project is named by many commands that move no money of its own.
    drawn = {project for project, _ in pairs}
    users = {user for _, user in pairs if user}
    legs = _members(session, LEG, "lien", book.liens)
    projects = _members(session, PROJECT, "name", wants.projects | drawn)
    members = session.rows(_MEMBERS, sorted(drawn), sorted(users)) if users else ()
    allocations = [
        _members(session, ALLOCATION, "name", wants.allocations - {""}),
        _members(session, ALLOCATION, "project", drawn),
    ]
    if wants.sweep:
        allocations.append(session.rows(_ENDED, book.now_s, wants.sweep))
    for leg in sorted((Leg(*row) for row in legs), key=lambda leg: leg.position):
        book.legs[leg.lien].append(leg)
    for row in members:
        book.members[row[0], row[1]] = Member(*row)
    _load_projects(session, book, projects)
    _load_accounts(session, book, wants, chain.from_iterable(allocations))


def _load_projects(session: Reading, book: Book, rows: Iterable[Sequence[Any]]) -> None:
    """Take in projects, and all above them: most have nothing above."""
    while found := [Project(*row) for row in rows]:
        for project in found:
            book.add_project(project)
        rows = _members(session, PROJECT, "name", {project.parent for project in found} - {"", *book.projects})


def _load_accounts(session: Reading, book: Book, wants: Wants, rows: Iterable[Sequence[Any]]) -> None:
    """Take in allocations, those that legs are on, and the accounts of all of them."""
    for row in rows:
        if row[0] not in book.allocations_by_id:
            book.add_allocation(Allocation(*row))
    elsewhere = {leg.allocation for legs in book.legs.values() for leg in legs} - book.allocations_by_id.keys()
    for row in _members(session, ALLOCATION, "id", elsewhere):
        book.add_allocation(Allocation(*row))
    numbers = [ISSUED, ADJUST] if wants.allocations else []
    numbers += [number * ACCOUNTS_EACH + kind for number in book.allocations_by_id for kind in range(ACCOUNTS_EACH)]
    for row in _members(session, ACCOUNT, "id", numbers):
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
