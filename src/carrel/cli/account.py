"""``carrel account``: who pays, what is left, and what was done to it."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

from cyclopts import App, Parameter

from carrel.cli import desk, output
from carrel.cli.desk import Csv, Key, MicroSu, Reason, Su
from carrel.cli.guest import Json
from carrel.daemons.bank_views import AccountView, AllocationView, Statement, StatementRow, Sums, UserView
from carrel.errors import NotFoundError, UsageError
from carrel.model.ledger import Receipt
from carrel.model.money import MOST_MICRO_SU, format_su

Name = Annotated[str, Parameter(show_default=False, help="Name of the account.")]
Allocation = Annotated[
    str,
    Parameter(show_default=False, help="Which allocation of the account; by default the only one that is valid now."),
]
Starts = Annotated[str, Parameter(show_default=False, help="First moment, as 2026-01-01 or 2026-01-01T00:00:00Z.")]
Ends = Annotated[str, Parameter(show_default=False, help="First moment after its end; never by default.")]
Credit = Annotated[
    str, Parameter(name="--credit-su", show_default=False, help="How far liens may take it below zero, in SU.")
]
Priority = Annotated[
    int, Parameter(show_default=False, help="The highest is drawn on first; among equals the one that ends first.")
]
Cap = Annotated[
    str, Parameter(name="--cap-su", show_default=False, help="Most that may be charged and set aside, in SU.")
]

Expired = Annotated[
    bool, Parameter(negative="", show_default=False, help="Carry over what expired in --from-allocation.")
]

FOUR = ("SETTLED", "RUNNING", "COMMITTED", "AVAILABLE")

app = App(name="account", help="Accounts: who pays, and what is left.")


@app.command(name="list")
def list_(*, json: Json = False, csv: Csv = False) -> None:
    """List the accounts that you may use or manage: settled, running, committed and available, in SU."""
    found = desk.ask("accounts", list[AccountView])
    if json:
        output.objects(found)
    elif csv:
        output.csv(found, AccountView)
    else:
        names, ordered = zip(*_tree(found), strict=True) if found else ((), ())
        caps = desk.rounded(one.cap_micro_su for one in ordered)
        rows = zip(names, *_four(ordered), caps, strict=True)
        output.table(("ACCOUNT", *FOUR, "CAP"), list(rows), right=(*FOUR, "CAP"))


@app.command
def show(name: Name, /, *, json: Json = False) -> None:
    """Show an account: its allocations, its caps, and what is left of each."""
    account = desk.ask(f"accounts/{desk.part(name)}", AccountView)
    if json:
        output.objects([account])
        return
    cap = account.cap_micro_su
    output.fields(
        [
            ("account", account.name),
            ("below", account.parent),
            ("cap", "" if cap is None else f"{format_su(cap)} SU"),
            ("counted", f"{format_su(account.counted_micro_su)} SU charged and set aside, with all accounts below it"),
        ]
    )
    print()
    _allocations(account.allocations)
    if account.users:
        print()
        _users(account.users)
    print()
    print(f"next: carrel account statement {account.name}")


@app.command
def add(
    name: Name,
    /,
    *,
    parent: Annotated[
        str, Parameter(show_default=False, help="Account above it, whose cap counts its money too.")
    ] = "",
    cap: Cap = "",
    allocation: Annotated[
        str, Parameter(show_default=False, help="Name of its first allocation, or of another one; as the account.")
    ] = "",
    starts: Starts = "",
    ends: Ends = "",
    priority: Priority = 0,
    credit: Credit = "0",
    key: Key = "",
) -> None:
    """Open an account with an allocation, or another allocation in an account that is there (--allocation)."""
    terms = {"starts": _moment(starts), "ends": _moment(ends), "priority": priority}
    terms["credit_micro_su"] = desk.amount(credit)
    if starts and ends and datetime.fromisoformat(str(terms["ends"])) <= datetime.fromisoformat(str(terms["starts"])):
        # Before the account is opened: a wrong line leaves nothing behind.
        raise UsageError(f"an allocation cannot end at {ends}, before it starts at {starts}; swap the dates?")
    there = any(one.name == name for one in desk.ask("accounts", list[AccountView]))
    if there and not allocation:
        raise UsageError(f"account '{name}' is there already; name a further allocation: --allocation NAME")
    if not there:
        body = {"account": name, "parent": parent, "cap_micro_su": desk.amount(cap) if cap else None}
        desk.change("accounts", Receipt, body, key=f"{key}/account" if key else "")
        print(f"account {name} is open")
    chosen = allocation or name
    desk.change(f"accounts/{desk.part(name)}/allocations", Receipt, {"allocation": chosen, **terms}, key=key)
    print(f"allocation {chosen} is open; next: carrel account deposit {name} --su AMOUNT --reason TEXT")


@app.command
def cap(
    name: Name,
    /,
    *,
    su: Annotated[str, Parameter(name="--su", show_default=False, help="Most in SU, or 'none'.")],
    reason: Reason,
    user: Annotated[
        str, Parameter(show_default=False, help="Of this user in the account; by default of the account.")
    ] = "",
    key: Key = "",
) -> None:
    """Cap what an account and all below it, or one user in it, may have charged and set aside."""
    most = None if su == "none" else desk.amount(su)
    body = {"user": user, "cap_micro_su": most, "reason": reason}
    desk.change(f"accounts/{desk.part(name)}/cap", Receipt, body, key=key)
    whose = f"user {user} in account {name}" if user else f"account {name}"
    print(f"{whose} has no cap" if most is None else f"{whose} has a cap of {format_su(most)} SU")


@app.command(name="set")
def set_(
    allocation: Annotated[str, Parameter(show_default=False, help="Name of the allocation.")],
    /,
    *,
    reason: Reason,
    starts: Starts = "",
    ends: Annotated[
        str, Parameter(show_default=False, help="First moment after its end, or 'never'; as it is by default.")
    ] = "",
    priority: Annotated[int | None, Parameter(show_default=False, help="The highest is drawn on first.")] = None,
    credit: Credit = "",
    key: Key = "",
) -> None:
    """Change an allocation's dates, priority or credit limit; what is not given stays as it is."""
    found = [each for one in desk.ask("accounts", list[AccountView]) for each in one.allocations]
    now = next((each for each in found if each.name == allocation), None)
    if now is None:
        raise NotFoundError(f"there is no allocation '{allocation}'; see: carrel account show ACCOUNT")
    body = {
        "starts": _moment(starts) or now.starts,
        "ends": None if ends == "never" else _moment(ends) or now.ends,
        "priority": now.priority if priority is None else priority,
        "credit_micro_su": desk.amount(credit) if credit else now.credit_micro_su,
        "reason": reason,
    }
    desk.change(f"allocations/{desk.part(allocation)}/terms", Receipt, body, key=key)
    print(f"allocation {allocation} is changed; next: carrel account show {now.account}")


@app.command
def deposit(
    name: Name,
    /,
    *,
    su: Su = "",
    micro_su: MicroSu = "",
    reason: Reason,
    allocation: Allocation = "",
    key: Key = "",
) -> None:
    """Put SU into an account."""
    body = {"amount_micro_su": desk.amount(su, micro_su, least=1), "reason": reason, "allocation": allocation}
    _say(name, desk.change(f"accounts/{desk.part(name)}/deposits", Receipt, body, key=key), "deposited")


@app.command
def adjust(
    name: Name,
    /,
    *,
    su: Su = "",
    micro_su: MicroSu = "",
    reason: Reason,
    allocation: Allocation = "",
    key: Key = "",
) -> None:
    """Add SU to an account, or take some (a negative amount): also more than it has."""
    body = {
        "amount_micro_su": desk.amount(su, micro_su, least=-MOST_MICRO_SU),
        "reason": reason,
        "allocation": allocation,
    }
    _say(name, desk.change(f"accounts/{desk.part(name)}/adjustments", Receipt, body, key=key), "adjusted by")


@app.command
def transfer(
    source: Annotated[str, Parameter(show_default=False, help="Account that gives.")],
    target: Annotated[str, Parameter(show_default=False, help="Account that gets.")],
    /,
    *,
    su: Su = "",
    micro_su: MicroSu = "",
    reason: Reason,
    from_allocation: Allocation = "",
    to_allocation: Allocation = "",
    expired: Expired = False,
    key: Key = "",
) -> None:
    """Move SU from one account to another, at most what is available; or carry over what expired."""
    body = {
        "source": source,
        "target": target,
        "amount_micro_su": desk.amount(su, micro_su, least=1),
        "reason": reason,
        "source_allocation": from_allocation,
        "target_allocation": to_allocation,
    }
    _say(target, desk.change("carry-overs" if expired else "transfers", Receipt, body, key=key), "transferred")


@app.command
def statement(
    name: Name,
    /,
    *,
    allocation: Annotated[str, Parameter(show_default=False, help="Only of this allocation.")] = "",
    since: Annotated[str, Parameter(show_default=False, help="From this day or moment on.")] = "",
    until: Annotated[str, Parameter(show_default=False, help="Before this day or moment.")] = "",
    json: Json = False,
    csv: Csv = False,
) -> None:
    """Show what was done to an account, the oldest first: what each transaction changed, and what was left then.

    Amounts are rounded for reading; --json and --csv have them exactly.
    """
    rows: list[StatementRow] = []
    after: int | None = 0
    while after is not None:
        page = desk.ask(
            f"accounts/{desk.part(name)}/statement",
            Statement,
            allocation=allocation,
            since=_moment(since),
            until=_moment(until),
            after=after,
        )
        rows += page.rows
        after = page.next_after
    if json:
        output.objects(rows)
    elif csv:
        output.csv(rows, StatementRow)
    else:
        _statement(rows)


def _statement(rows: Sequence[StatementRow]) -> None:
    numbers = ("CHANGE", "SETTLED", "LEFT")
    several = len({row.allocation for row in rows}) > 1
    titles = ("TIME", "WHAT", *(("ALLOCATION",) if several else ()), *numbers, "RUN OR REASON")
    amounts = [
        desk.rounded(row.available_micro_su or None for row in rows),
        desk.rounded(row.settled_micro_su or None for row in rows),
        desk.rounded(row.balance_micro_su for row in rows),
    ]
    lines = [
        (
            output.clock(row.time)[:16].replace("T", " "),
            " ".join((row.what, *row.flags)),
            *((row.allocation,) if several else ()),
            *(column[at] for column in amounts),
            f"{row.run} {row.user}".strip() or " ".join((row.reason, *((f"({row.actor})",) if row.actor else ()))),
        )
        for at, row in enumerate(rows)
    ]
    output.table(titles, lines, right=numbers, whole=("TIME", "WHAT"))


def _allocations(found: Sequence[AllocationView]) -> None:
    total = _four(found)
    credit = desk.rounded(one.credit_micro_su or None for one in found)
    names = [one.name for one in found]
    titles = ("ALLOCATION", "VALID", *FOUR, *(("CREDIT",) if any(credit) else ()))
    rows = zip(names, map(_valid, found), *total, *([credit] if any(credit) else []), strict=True)
    output.table(titles, list(rows), right=titles[2:])


def _users(found: Sequence[UserView]) -> None:
    counted = desk.rounded(one.counted_micro_su for one in found)
    caps = desk.rounded(one.cap_micro_su for one in found)
    rows = zip((one.user for one in found), counted, caps, strict=True)
    output.table(("USER", "COUNTED", "CAP"), list(rows), right=("COUNTED", "CAP"))


def _four(found: Sequence[Sums]) -> list[list[str]]:
    """Return the four columns that everybody looks at."""
    return [
        desk.rounded(one.settled_micro_su for one in found),
        desk.rounded(one.running_micro_su for one in found),
        desk.rounded(one.committed_micro_su for one in found),
        desk.rounded(one.available_micro_su for one in found),
    ]


def _tree(found: Sequence[AccountView]) -> Iterator[tuple[str, AccountView]]:
    """Yield each account with its name, indented, behind the one above it."""
    seen = {one.name for one in found}

    def below(parent: str, depth: int) -> Iterator[tuple[str, AccountView]]:
        for one in found:
            if one.parent == parent or (not depth and one.parent not in seen):
                yield f"{'  ' * depth}{one.name}", one
                yield from below(one.name, depth + 1)

    yield from below("", 0)


def _valid(one: AllocationView) -> str:
    match one.state:
        case "ended":
            return f"ended {_day(one.ends)}"
        case "future":
            return f"from {_day(one.starts)}"
        case _:
            return f"until {_day(one.ends)}" if one.ends else "always"


def _day(moment: datetime | None) -> str:
    """Return the day, and the time where it is not midnight."""
    return output.clock(moment).removesuffix("T00:00:00Z")


def _moment(text: str) -> str | None:
    """Return a day or a time as RFC 3339; a day begins at 00:00 UTC."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is no day or time; write 2026-01-01 or 2026-01-01T00:00:00Z") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


def _say(account: str, receipt: Receipt, what: str) -> None:
    flags = f" ({', '.join(receipt.flags)})" if receipt.flags else ""
    print(f"{what} {format_su(receipt.amount_micro_su)} SU{flags}; next: carrel account show {account}")
