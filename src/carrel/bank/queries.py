"""What the ledger says, read from one unchanging view: balances, budgets, liens, statements."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import msgspec

from carrel.bank.shelf import columns
from carrel.bank.tables import LIEN
from carrel.core.book import ACCOUNTS_EACH, KINDS, run_ref
from carrel.model.ledger import (
    AnyCommand,
    Balance,
    Budget,
    HistoryLine,
    LienView,
    MoneyState,
    StatementLine,
    Totals,
)
from carrel.ports import Reading, Store

PAGE = 1000
"""Rows of one answer, at most; the next page begins after the last one's ``seq`` or ``id``."""

_Request = msgspec.json.Decoder(AnyCommand)


def balances(store: Store, *, project: str = "") -> list[Balance]:
    """Return every allocation, of one project or of all, with what is in it."""
    with store.reading() as session:
        return list(_balances(session, project))


def _balances(session: Reading, project: str) -> Iterator[Balance]:
    wide = ", ".join(
        f"(SELECT balance FROM account AS c WHERE c.id = a.id * {ACCOUNTS_EACH} + {offset})"  # noqa: S608  # numbers
        for offset in range(len(KINDS))
    )
    running = (
        "(SELECT coalesce(sum(l.open), 0) FROM leg AS l JOIN lien ON lien.id = l.lien "
        "WHERE l.allocation = a.id AND l.open > 0 AND lien.state IN ('active', 'unknown_end'))"
    )
    sql = (
        f"SELECT a.name, a.project, a.start_s, a.end_s, a.priority, a.credit, {wide}, {running} "  # noqa: S608  # numbers
        "FROM allocation AS a WHERE a.project = %s OR %s = '' ORDER BY a.project, a.id"
    )
    for row in session.rows(sql, project, project):
        yield Balance(
            allocation=row[0],
            project=row[1],
            start_s=row[2],
            end_s=row[3],
            priority=row[4],
            credit_micro_su=row[5],
            available_micro_su=row[6],
            lien_micro_su=row[7],
            spent_micro_su=row[8],
            expired_micro_su=row[9],
            running_micro_su=int(row[10]),
        )


def budgets(store: Store, *, project: str = "") -> list[Budget]:
    """Return the caps of projects and of users in them, with what counts against each."""
    sql = (
        "SELECT name, '', parent, cap, committed FROM project WHERE name = %s OR %s = '' "
        "UNION ALL SELECT project, username, '', cap, committed FROM member WHERE project = %s OR %s = '' ORDER BY 1, 2"
    )
    with store.reading() as session:
        return [
            Budget(project=row[0], user=row[1], parent=row[2], cap_micro_su=row[3], committed_micro_su=row[4])
            for row in session.rows(sql, project, project, project, project)
        ]


def liens(
    store: Store, *, project: str = "", states: Sequence[MoneyState] = (), after: int = 0, limit: int = PAGE
) -> list[LienView]:
    """Return a page of liens and charges, the oldest first."""
    sql = (
        f"SELECT {columns(LIEN)} FROM lien WHERE (project = %s OR %s = '') "  # noqa: S608  # our own names
        "AND state IN ({texts}) AND id > %s ORDER BY id LIMIT %s"
    )
    with store.reading() as session:
        wanted = list(states or get_args(MoneyState))
        return [lien_view(row) for row in session.rows(sql, project, project, wanted, after, min(limit, PAGE))]


def latest(
    store: Store,
    *,
    project: str = "",
    user: str = "",
    job_id: int = 0,
    cluster: str = "",
    run: str = "",
    states: Sequence[MoneyState] = (),
    before: int = 0,
    limit: int = PAGE,
) -> list[LienView]:
    """Return a page of liens and charges, the newest first; each filter that is not empty must hold.

    Args:
        store: Where to read.
        project: Only this project's.
        user: Only this user's.
        job_id: Only those of this job: one for each of its runs.
        cluster: Of ``run``.
        run: Only this run of that cluster.
        states: Only in these states.
        before: Begin before the lien of this number.
        limit: Most rows.
    """
    filters: list[tuple[str, object]] = [
        ("project = %s", project),
        ("username = %s", user),
        ("job_id = %s", job_id),
        ("run_ref = %s", run_ref(cluster, run) if run else ""),
        ("state IN ({texts})", list(states)),
        ("id < %s", before),
    ]
    kept = [(text, value) for text, value in filters if value]
    where = " AND ".join(["id > 0", *(text for text, _ in kept)])
    sql = f"SELECT {columns(LIEN)} FROM lien WHERE {where} ORDER BY id DESC LIMIT %s"  # noqa: S608  # our own names
    with store.reading() as session:
        values = [value for _, value in kept]
        return [lien_view(row) for row in session.rows(sql, *values, max(1, min(limit, PAGE)))]


def history(store: Store, lien_id: int) -> list[HistoryLine]:
    """Return what was done to one lien, the oldest first, with the requests: who, why, and from which inputs."""
    sql = "SELECT seq, at_s, kind, flags, request FROM txn WHERE lien = %s ORDER BY seq"
    with store.reading() as session:
        return [_history(row) for row in session.rows(sql, lien_id)]


def _history(row: Sequence[Any]) -> HistoryLine:
    seq, at_s, kind, flags, request = row
    command = _Request.decode(request)
    return HistoryLine(
        seq=seq,
        at_s=at_s,
        kind=kind,
        amount_micro_su=getattr(command, "amount_micro_su", 0),
        actor=command.actor,
        reason=getattr(command, "reason", ""),
        price_version=getattr(command, "price_version", 0),
        inputs=getattr(command, "inputs", {}),
        flags=tuple(flags.split()),
    )


def members(store: Store, user: str) -> list[str]:
    """Return the projects in which the user has a cap or ever had a job."""
    with store.reading() as session:
        return [name for (name,) in session.rows("SELECT project FROM member WHERE username = %s", user)]


def totals(store: Store) -> Totals:
    """Return how much there is of everything."""
    with store.reading() as session:
        ((seq, projects, allocations, opened, unknown),) = session.rows(
            "SELECT (SELECT coalesce(max(seq), 0) FROM txn), (SELECT count(*) FROM project), "
            "(SELECT count(*) FROM allocation), (SELECT count(*) FROM lien WHERE open > 0), "
            "(SELECT count(*) FROM lien WHERE state = 'unknown_end')"
        )
        last = next(iter(session.rows("SELECT hash FROM txn ORDER BY seq DESC LIMIT 1")), (b"",))
        return Totals(
            transactions=seq,
            projects=projects,
            allocations=allocations,
            open_liens=opened,
            unknown_ends=unknown,
            last_hash=bytes(last[0]).hex(),
        )


def lien(store: Store, *, cluster: str, run: str = "", token: str = "", het_offset: int = 0) -> LienView | None:
    """Return the money of one run, or of one token; None: there is none."""
    where, ref = ("run_ref", f"{cluster}/{run}") if run else ("token_ref", f"{cluster}/{token}/{het_offset}")
    sql = f"SELECT {columns(LIEN)} FROM lien WHERE {where} = %s"  # noqa: S608  # our own names
    with store.reading() as session:
        return next((lien_view(row) for row in session.rows(sql, ref)), None)


def lien_view(row: Sequence[Any]) -> LienView:
    (number, cluster, token_ref, run_ref, job_id, project, user, state, units, _, opened, charged, refunded, *rest) = (
        row
    )
    expires_s, flags, _, _ = rest
    return LienView(
        id=number,
        cluster=cluster,
        token=token_ref.removeprefix(f"{cluster}/").rpartition("/")[0] if token_ref else "",
        run=run_ref.removeprefix(f"{cluster}/") if run_ref else "",
        job_id=job_id,
        project=project,
        user=user,
        state=state,
        units=units,
        lien_micro_su=opened,
        charged_micro_su=charged,
        refunded_micro_su=refunded,
        expires_s=expires_s,
        flags=tuple(flags.split()),
    )


def statement(
    store: Store,
    *,
    project: str = "",
    allocation: str = "",
    start_s: int = 0,
    end_s: int = 2**62,
    after: int = 0,
    limit: int = PAGE,
) -> list[StatementLine]:
    """Return a page of entries, the oldest first, each with the balance that it left.

    Args:
        store: Where to read.
        project: Only this project's.
        allocation: Only this allocation's.
        start_s: From this time of the bank on.
        end_s: Before this time.
        after: Begin after the transaction of this number.
        limit: Most lines; the lines of the last transaction are all there, even beyond it.
    """
    found = (
        "SELECT e.seq, t.at_s, t.kind, a.name, c.kind, e.amount, e.balance, coalesce(l.run_ref, ''), "
        "coalesce(l.cluster, ''), coalesce(l.username, ''), t.request, t.flags FROM entry AS e "
        "JOIN txn AS t ON t.seq = e.seq JOIN account AS c ON c.id = e.account "
        "JOIN allocation AS a ON a.id = c.allocation LEFT JOIN lien AS l ON l.id = t.lien "
        "WHERE (a.project = %s OR %s = '') AND (a.name = %s OR %s = '') "
        "AND t.at_s >= %s AND t.at_s < %s AND "
    )
    some = f"{found} e.seq > %s ORDER BY e.seq, e.account LIMIT %s"
    rest = f"{found} e.seq = %s ORDER BY e.account"
    given = (project, project, allocation, allocation, start_s, end_s)
    with store.reading() as session:
        rows = list(session.rows(some, *given, after, min(limit, PAGE)))
        if rows:
            last = rows[-1][0]
            rows = [row for row in rows if row[0] != last] + list(session.rows(rest, *given, last))
    return [_line(row) for row in rows]


def _line(row: Sequence[Any]) -> StatementLine:
    seq, at_s, kind, allocation, account, amount, balance, run_ref, cluster, user, request, flags = row
    command = _Request.decode(request)
    return StatementLine(
        seq=seq,
        at_s=at_s,
        kind=kind,
        allocation=allocation,
        account=account,
        amount_micro_su=amount,
        balance_micro_su=balance,
        run=run_ref.removeprefix(f"{cluster}/"),
        user=user,
        actor=command.actor,
        reason=getattr(command, "reason", ""),
        flags=tuple(flags.split()),
    )
