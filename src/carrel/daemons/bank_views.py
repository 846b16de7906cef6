"""What people and programs see of the bank: the structs of REST and of ``--json``. Amounts are whole micro-SU.

What an account has is shown in four columns side by side, since jobs that wait or run are what its users look for:
*settled* (charged), *running* (set aside for runs that started), *committed* (for those that wait), *available*.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from carrel.model.access import Scope, Token
from carrel.model.ledger import Balance, Break, Budget, HistoryLine, LienView, MoneyState, StatementLine, Why

AllocationState = Literal["valid", "future", "ended"]


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Money by what became of it."""

    settled_micro_su: int = 0
    running_micro_su: int = 0
    committed_micro_su: int = 0
    available_micro_su: int = 0


class AllocationView(Sums, frozen=True, kw_only=True):
    """Money with a time in which it may be spent."""

    name: str
    account: str
    state: AllocationState
    starts: datetime | None
    ends: datetime | None
    """Exclusive; null: never."""
    priority: int
    """The highest is drawn on first."""
    credit_micro_su: int
    """How far liens may take it below zero."""
    expired_micro_su: int


class UserView(msgspec.Struct, frozen=True, kw_only=True):
    """A user in an account."""

    user: str
    cap_micro_su: int | None
    counted_micro_su: int
    """Charged and set aside."""


class AccountView(Sums, frozen=True, kw_only=True):
    """Who pays. The sums are those of its valid allocations; what it settled is of all of them."""

    name: str
    parent: str
    cap_micro_su: int | None
    counted_micro_su: int
    """Charged and set aside, by it and all below it: what its cap counts."""
    allocations: list[AllocationView]
    users: list[UserView]
    """As far as the caller may see them."""


class ChargeView(msgspec.Struct, frozen=True, kw_only=True):
    """The money of one run."""

    id: int
    cluster: str
    run: str
    job_id: int
    account: str
    user: str
    state: MoneyState
    tasks: int
    lien_micro_su: int
    charged_micro_su: int
    refunded_micro_su: int
    expires: datetime | None
    flags: tuple[str, ...]


class ChargeEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done to a lien or charge."""

    seq: int
    time: datetime
    what: str
    amount_micro_su: int
    actor: str
    reason: str
    price_version: int
    inputs: dict[str, Any]
    """What it was priced by."""
    flags: tuple[str, ...]


class ChargeDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A charge and how it came about."""

    charge: ChargeView
    events: list[ChargeEvent]


class StatementRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one transaction did to one allocation."""

    seq: int
    time: datetime
    what: str
    allocation: str
    available_micro_su: int
    """Change of what is available; the others likewise."""
    lien_micro_su: int
    settled_micro_su: int
    expired_micro_su: int
    balance_micro_su: int | None
    """What was available then; null: not changed."""
    run: str
    user: str
    actor: str
    reason: str
    flags: tuple[str, ...]


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """A page."""

    rows: list[StatementRow]
    next_after: int | None
    """``after`` of the next page; null: this is the last one."""


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """A token, without its secret."""

    name: str
    user: str
    scope: Scope
    note: str
    created: datetime
    expires: datetime
    revoked: datetime | None
    good: bool


class TokenMade(msgspec.Struct, frozen=True, kw_only=True):
    """A new token. The secret is told once."""

    token: TokenView
    secret: str


class BankView(msgspec.Struct, frozen=True, kw_only=True):
    """The bank as a whole."""

    cluster: str
    database: str
    """``sqlite`` or ``postgresql``."""
    offline: str
    """What a submission meets while the bank is silent."""
    prices: str
    """The version in force; empty: none."""
    accounts: int
    allocations: int
    transactions: int
    open_liens: int
    unknown_ends: int
    parked: list[str]
    """What could not be charged or set aside, and is tried again; a person may be needed."""
    last_hash: str
    totals: Sums


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a check of the whole ledger found."""

    transactions: int
    breaks: list[Break]


class Synced(msgspec.Struct, frozen=True, kw_only=True):
    """What came over from Slurm's accounting."""

    opened: list[str]
    known: int


class RefusalView(msgspec.Struct, frozen=True, kw_only=True):
    """Why not, with the figures."""

    error: str
    why: Why
    needed_micro_su: int
    available_micro_su: int


def moment(time_s: int) -> datetime:
    """Return a time of the ledger; one beyond the calendar is its last day."""
    return datetime.fromtimestamp(min(time_s, 253402300799), UTC)


def allocation_view(one: Balance, now_s: int) -> AllocationView:
    state: AllocationState = "valid"
    if one.end_s is not None and one.end_s <= now_s:
        state = "ended"
    elif one.start_s > now_s:
        state = "future"
    return AllocationView(
        name=one.allocation,
        account=one.project,
        state=state,
        starts=moment(one.start_s) if one.start_s else None,
        ends=None if one.end_s is None else moment(one.end_s),
        priority=one.priority,
        credit_micro_su=one.credit_micro_su,
        settled_micro_su=one.spent_micro_su,
        running_micro_su=one.running_micro_su,
        committed_micro_su=one.lien_micro_su - one.running_micro_su,
        available_micro_su=one.available_micro_su,
        expired_micro_su=one.expired_micro_su,
    )


def account_views(budgets: Sequence[Budget], balances: Sequence[Balance], now_s: int) -> list[AccountView]:
    """Return every account, by name, with its allocations and the users that it knows."""
    allocations = [allocation_view(one, now_s) for one in balances]
    users: dict[str, list[UserView]] = {}
    for budget in budgets:
        if budget.user:
            users.setdefault(budget.project, []).append(
                UserView(user=budget.user, cap_micro_su=budget.cap_micro_su, counted_micro_su=budget.committed_micro_su)
            )
    return [
        _account(budget, [one for one in allocations if one.account == budget.project], users.get(budget.project, []))
        for budget in budgets
        if not budget.user
    ]


def _account(budget: Budget, allocations: list[AllocationView], users: list[UserView]) -> AccountView:
    total = sums(allocations)
    return AccountView(
        name=budget.project,
        parent=budget.parent,
        cap_micro_su=budget.cap_micro_su,
        counted_micro_su=budget.committed_micro_su,
        allocations=allocations,
        users=users,
        settled_micro_su=total.settled_micro_su,
        running_micro_su=total.running_micro_su,
        committed_micro_su=total.committed_micro_su,
        available_micro_su=total.available_micro_su,
    )


def sums(allocations: Iterable[AllocationView]) -> Sums:
    """Return what the allocations have together; of those that are not valid now nothing is available."""
    found = list(allocations)
    return Sums(
        settled_micro_su=sum(one.settled_micro_su for one in found),
        running_micro_su=sum(one.running_micro_su for one in found),
        committed_micro_su=sum(one.committed_micro_su for one in found),
        available_micro_su=sum(one.available_micro_su for one in found if one.state == "valid"),
    )


def charge_view(lien: LienView) -> ChargeView:
    return ChargeView(
        id=lien.id,
        cluster=lien.cluster,
        run=lien.run,
        job_id=lien.job_id,
        account=lien.project,
        user=lien.user,
        state=lien.state,
        tasks=lien.units,
        lien_micro_su=lien.lien_micro_su,
        charged_micro_su=lien.charged_micro_su,
        refunded_micro_su=lien.refunded_micro_su,
        expires=None if lien.expires_s is None else moment(lien.expires_s),
        flags=lien.flags,
    )


def charge_event(line: HistoryLine) -> ChargeEvent:
    return ChargeEvent(
        seq=line.seq,
        time=moment(line.at_s),
        what=line.kind,
        amount_micro_su=line.amount_micro_su,
        actor=line.actor,
        reason=line.reason,
        price_version=line.price_version,
        inputs=line.inputs,
        flags=line.flags,
    )


def statement_rows(lines: Iterable[StatementLine]) -> list[StatementRow]:
    """Return one row for each transaction and allocation, of the entries of its four accounts."""
    rows: dict[tuple[int, str], dict[str, StatementLine]] = {}
    for line in lines:
        rows.setdefault((line.seq, line.allocation), {})[line.account] = line
    return [_statement_row(entries) for entries in rows.values()]


def _statement_row(entries: dict[str, StatementLine]) -> StatementRow:
    first = next(iter(entries.values()))
    change = {kind: line.amount_micro_su for kind, line in entries.items()}
    return StatementRow(
        seq=first.seq,
        time=moment(first.at_s),
        what=first.kind,
        allocation=first.allocation,
        available_micro_su=change.get("available", 0),
        lien_micro_su=change.get("lien", 0),
        settled_micro_su=change.get("spent", 0),
        expired_micro_su=change.get("expired", 0),
        balance_micro_su=entries["available"].balance_micro_su if "available" in entries else None,
        run=first.run,
        user=first.user,
        actor=first.actor,
        reason=first.reason,
        flags=first.flags,
    )


def token_view(token: Token, now_s: int) -> TokenView:
    return TokenView(
        name=token.name,
        user=token.user,
        scope=token.scope,
        note=token.note,
        created=moment(token.created_s),
        expires=moment(token.expires_s),
        revoked=moment(token.revoked_s) if token.revoked_s else None,
        good=token.good(now_s),
    )
