"""The rules of the ledger: one command and a book of loaded rows in, an answer and changed rows out. Pure.

A decision is remembered under its key, a refusal too, so that who asks again hears the same. The rules of liens and
charges are in modules of their own; here are those of accounts, and the way to all of them.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import assert_never

import msgspec

from carrel.core import charges, liens
from carrel.core.book import (
    ACCOUNTS_EACH,
    ADJUST,
    ISSUED,
    KINDS,
    Account,
    Allocation,
    Book,
    Key,
    Posting,
    Project,
    joined,
    run_ref,
    token_ref,
)
from carrel.core.funds import Refused, allocation_of, check_size, project_of, refuse
from carrel.model.ledger import (
    Adjust,
    Answer,
    AnyCommand,
    Backfill,
    Bind,
    CarryOver,
    Correct,
    Deposit,
    MarkUnknown,
    OpenAllocation,
    OpenProject,
    Place,
    Quote,
    Receipt,
    Refund,
    Refusal,
    Reprice,
    Requeue,
    SetCap,
    SetTerms,
    Settle,
    Start,
    Sweep,
    Transfer,
    Void,
)
from carrel.model.money import HELD_MICRO_SU, format_su

_encoder = msgspec.json.Encoder()
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Receipt | Refusal)


class Asked(msgspec.Struct, frozen=True):
    """A command as it came in."""

    command: AnyCommand
    request: str
    """The command as JSON, in one form only."""
    request_hash: bytes


class Wants(msgspec.Struct):
    """What a batch needs to be loaded."""

    keys: set[str] = msgspec.field(default_factory=set)
    tokens: set[str] = msgspec.field(default_factory=set)
    runs: set[str] = msgspec.field(default_factory=set)
    resolved_runs: set[str] = msgspec.field(default_factory=set)
    projects: set[str] = msgspec.field(default_factory=set)
    members: set[tuple[str, str]] = msgspec.field(default_factory=set)
    allocations: set[str] = msgspec.field(default_factory=set)
    sweep: int = 0


def wants(batch: Iterable[Asked]) -> Wants:
    """Return what must be in the book before ``apply``; more does no harm."""
    found = Wants()
    for asked in batch:
        command = asked.command
        found.keys.add(command.key)
        match command:
            case OpenProject():
                found.projects |= {command.project, command.parent}
            case OpenAllocation():
                found.projects.add(command.project)
                found.allocations.add(command.allocation)
            case SetTerms() | Deposit() | Adjust():
                found.allocations.add(command.allocation)
            case Transfer() | CarryOver():
                found.allocations |= {command.source, command.target}
            case Sweep():
                found.sweep = max(found.sweep, command.limit)
            case SetCap():
                found.projects.add(command.project)
                found.members.add((command.project, command.user))
            case _:
                _wants_of_run(found, command)
    found.projects.discard("")
    found.allocations.discard("")
    return found


def _wants_of_run(
    found: Wants,
    command: Quote
    | Place
    | Bind
    | Reprice
    | Start
    | Settle
    | Requeue
    | Backfill
    | Void
    | MarkUnknown
    | Refund
    | Correct,
) -> None:
    if isinstance(command, Quote | Place | Backfill):
        found.projects.add(command.project)
        found.members.add((command.project, command.user))
    if isinstance(command, Quote | Place | Bind | Reprice | Start | Void) and command.token:
        found.tokens.add(token_ref(command.cluster, command.token, command.het_offset))
    if not isinstance(command, Quote | Place) and command.run:
        found.runs.add(run_ref(command.cluster, command.run))
    if isinstance(command, Requeue):
        found.runs.add(run_ref(command.cluster, command.next_run))
    if isinstance(command, Refund):
        found.allocations.add(command.successor)
    if isinstance(command, Correct):
        found.resolved_runs.add(run_ref(command.cluster, command.run))


def apply(book: Book, asked: Asked) -> Answer:
    """Do one command, or answer it as before; the answer is in the book under its key, to be written with the rest."""
    key = asked.command.key
    if (known := book.keys.get(key)) is not None:
        if known.request_hash != asked.request_hash:
            return Refusal(why="conflict", sentence=f"key '{key}' was used for another request; take a new one")
        return _answers.decode(known.answer)
    try:
        answer: Answer = _do(book, asked.command, asked.request)
    except Refused as refused:
        answer = refused.refusal
    new = Key(key, asked.request_hash, _encoder.encode(answer).decode(), book.now_s)
    book.keys[key] = new
    book.new_keys.append(new)
    return answer


def _do(book: Book, command: AnyCommand, request: str) -> Receipt:  # noqa: C901, PLR0912  # a flat table of all commands
    match command:
        case Place():
            return liens.place(book, command, request)
        case Bind():
            return liens.bind(book, command, request)
        case Start():
            return liens.start(book, command, request)
        case Reprice():
            return liens.reprice(book, command, request)
        case Settle():
            return charges.settle(book, command, request)
        case Void():
            return liens.void(book, command, request)
        case Quote():
            return liens.quote(book, command, request)
        case MarkUnknown():
            return liens.mark_unknown(book, command, request)
        case Requeue():
            return charges.requeue(book, command, request)
        case Backfill():
            return charges.backfill(book, command, request)
        case Refund():
            return charges.refund(book, command, request)
        case Correct():
            return charges.correct(book, command, request)
        case OpenProject():
            return _open_project(book, command, request)
        case SetCap():
            return _set_cap(book, command, request)
        case OpenAllocation():
            return _open_allocation(book, command, request)
        case SetTerms():
            return _set_terms(book, command, request)
        case Deposit():
            return _deposit(book, command, request)
        case Transfer():
            return _transfer(book, command, request)
        case Adjust():
            return _adjust(book, command, request)
        case CarryOver():
            return _carry_over(book, command, request)
        case Sweep():
            return _sweep(book, command, request)
        case _:
            assert_never(command)


def _done(book: Book, amount: int = 0, flags: str = "") -> Receipt:
    return Receipt(seq=book.seq, amount_micro_su=amount, flags=tuple(flags.split()))


def _open_project(book: Book, command: OpenProject, request: str) -> Receipt:
    if command.project in book.projects:
        refuse("exists", f"account '{command.project}' is there already; see: carrel account show {command.project}")
    if command.parent:
        project_of(book, command.parent)
    project = Project(name=command.project, parent=command.parent, cap=command.cap_micro_su)
    book.add_project(project)
    book.touch(project)
    book.post(Posting("open_project", command.key, request), {})
    return _done(book)


def _set_cap(book: Book, command: SetCap, request: str) -> Receipt:
    project = project_of(book, command.project)
    node = book.member(command.project, command.user) if command.user else project
    node.cap = command.cap_micro_su
    book.touch(node)
    book.post(Posting("set_cap", command.key, request), {})
    return _done(book)


def _check_dates(start_s: int, end_s: int | None) -> None:
    if end_s is not None and end_s <= start_s:
        refuse("invalid", f"an allocation cannot end at {_day(end_s)}, before it starts at {_day(start_s)}; swap them?")


def _day(at_s: int) -> str:
    """Return a moment as people write it; the ledger takes later ones than a calendar has."""
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
    except OverflowError:
        return f"second {at_s}"
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ").removesuffix("T00:00:00Z")


def _open_allocation(book: Book, command: OpenAllocation, request: str) -> Receipt:
    project_of(book, command.project)
    if command.allocation in book.allocations:
        refuse("exists", f"allocation '{command.allocation}' is there already; deposit into it")
    _check_dates(command.start_s, command.end_s)
    book.last_allocation += 1
    allocation = Allocation(
        id=book.last_allocation,
        name=command.allocation,
        project=command.project,
        start_s=command.start_s,
        end_s=command.end_s,
        priority=command.priority,
        credit=command.credit_micro_su,
    )
    book.add_allocation(allocation)
    book.touch(allocation)
    for offset, kind in enumerate(KINDS):
        floor = -command.credit_micro_su if kind == "available" else 0
        number = allocation.id * ACCOUNTS_EACH + offset
        account = Account(id=number, allocation=allocation.id, kind=kind, balance=0, floor=floor)
        book.accounts[account.id] = account
        book.touch(account)
    book.post(Posting("open_allocation", command.key, request), {})
    return _done(book)


def _set_terms(book: Book, command: SetTerms, request: str) -> Receipt:
    allocation = allocation_of(book, command.allocation)
    _check_dates(command.start_s, command.end_s)
    allocation.start_s = command.start_s
    allocation.end_s = command.end_s
    allocation.priority = command.priority
    allocation.credit = command.credit_micro_su
    book.touch(allocation)
    account = book.available(allocation)
    account.floor = -command.credit_micro_su
    account.overdrawn = account.balance < account.floor
    book.touch(account)
    book.reorder()
    flags = "overdrawn" if account.overdrawn else ""
    book.post(Posting("set_terms", command.key, request), {}, flags=flags)
    return _done(book, flags=flags)


def _deposit(book: Book, command: Deposit, request: str) -> Receipt:
    account = book.available(allocation_of(book, command.allocation))
    check_size(book, command.amount_micro_su, [account, book.accounts[ISSUED]], [], most=HELD_MICRO_SU // 4)
    moves = {ISSUED: -command.amount_micro_su, account.id: command.amount_micro_su}
    book.post(Posting("deposit", command.key, request), moves)
    return _done(book, command.amount_micro_su)


def _transfer(book: Book, command: Transfer, request: str) -> Receipt:
    source = book.available(allocation_of(book, command.source))
    target = book.available(allocation_of(book, command.target))
    if source is target:
        refuse("invalid", f"allocation '{command.source}' cannot be transferred to itself")
    _covered(command.source, "available", source, command.amount_micro_su)
    check_size(book, command.amount_micro_su, [target], [])
    moves = {source.id: -command.amount_micro_su, target.id: command.amount_micro_su}
    book.post(Posting("transfer", command.key, request), moves)
    return _done(book, command.amount_micro_su)


def _adjust(book: Book, command: Adjust, request: str) -> Receipt:
    account = book.available(allocation_of(book, command.allocation))
    check_size(book, abs(command.amount_micro_su), [account, book.accounts[ADJUST]], [], most=HELD_MICRO_SU // 4)
    moves = {ADJUST: -command.amount_micro_su, account.id: command.amount_micro_su}
    flags = book.post(Posting("adjust", command.key, request, may_overdraw=True), moves)
    return _done(book, command.amount_micro_su, flags)


def _carry_over(book: Book, command: CarryOver, request: str) -> Receipt:
    source = book.account(allocation_of(book, command.source).id, "expired")
    target = book.available(allocation_of(book, command.target))
    _covered(command.source, "expired", source, command.amount_micro_su)
    check_size(book, command.amount_micro_su, [target], [])
    moves = {source.id: -command.amount_micro_su, target.id: command.amount_micro_su}
    book.post(Posting("carry_over", command.key, request), moves)
    return _done(book, command.amount_micro_su)


def _covered(name: str, what: str, account: Account, amount: int) -> None:
    if amount > account.balance:
        refuse(
            "funds",
            f"allocation '{name}' has {format_su(account.balance)} SU {what}, not {format_su(amount)}",
            needed=amount,
            available=max(0, account.balance),
        )


def _sweep(book: Book, command: Sweep, request: str) -> Receipt:
    """Do what time did. Idempotent beyond its key: what is swept is not found again."""
    due = [lien for lien in book.liens.values() if _past(book, lien.expires_s, lien.state)][: command.limit]
    for lien in due:
        kind = "lapse" if lien.state == "quoted" else "expire_lien"
        liens.release(book, lien, Posting(kind, command.key, request, lien.id))
    ended = [a for a in book.allocations_by_id.values() if a.ended(book.now_s) and book.available(a).balance > 0]
    swept = 0
    for allocation in ended[: command.limit]:
        available = book.available(allocation)
        swept += available.balance
        moves = {available.id: -available.balance, book.account(allocation.id, "expired").id: available.balance}
        book.post(Posting("expire", command.key, request), moves)
    flags = joined("", "more") if command.limit in {len(due), len(ended[: command.limit])} else ""
    return _done(book, swept, flags)


def _past(book: Book, expires_s: int | None, state: str) -> bool:
    return expires_s is not None and expires_s <= book.now_s and state in {"quoted", "unbound", "bound"}
