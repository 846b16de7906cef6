"""The rules of liens: place, bind, re-price, start, void. Each refuses before it changes anything.

::

    quoted ──place──▶ unbound ──bind──▶ bound ──start──▶ active ──▶ (charges)
       │ sweep          │ sweep, void     │ sweep, void    ├─▶ active        re-priced
       ▼                ▼                 ▼                └─▶ unknown_end   ──▶ (charges), void, active
    lapsed             void              void

A lien of an array has many units: each task that starts splits one off, which then lives a life of its own.
"""

from carrel.core.book import ACCOUNTS_EACH, Book, Leg, Lien, Posting, joined, run_ref, token_ref
from carrel.core.funds import Refused, demand, lien_of, lien_of_run, lien_of_token, owed, project_of, refuse
from carrel.model.ledger import Bind, IfShort, MarkUnknown, Place, Quote, Receipt, Reprice, Start, Void
from carrel.model.money import MOST_MICRO_SU, format_su

OPEN = frozenset({"unbound", "bound", "active", "unknown_end"})
"""States in which a lien may set money aside."""


def receipt(book: Book, lien: Lien, amount: int, *, flags: str = "") -> Receipt:
    return Receipt(
        seq=book.seq, lien=lien.id, state=lien.state, amount_micro_su=amount, flags=tuple((flags or lien.flags).split())
    )


def quote(book: Book, command: Quote, request: str) -> Receipt:
    project_of(book, command.project)
    _unused(book, command)
    _whole(command.amount_micro_su, command.units)
    lien = _new(book, command, "quoted")
    book.post(Posting("quote", command.key, request, lien.id), {})
    return receipt(book, lien, command.amount_micro_su * command.units)


def place(book: Book, command: Place, request: str) -> Receipt:
    """Set money aside; under a quote that still stands, at its price and no other."""
    project_of(book, command.project)
    whole = _whole(command.amount_micro_su, command.units)
    quoted = book.by_token.get(token_ref(command.cluster, command.token, command.het_offset))
    if quoted is None or quoted.state != "quoted":
        _unused(book, command)
    elif not _honours(quoted, command, book.now_s):
        refuse("state", f"token '{command.token}' was quoted otherwise, or the quote ran out; ask for a new quote")
    parts = demand(book, command.project, command.user, whole)
    lien = quoted if quoted is not None else _new(book, command, "unbound")
    lien.state = "unbound"
    lien.expires_s = book.now_s + command.ttl_s
    set_aside(book, lien, parts, Posting("place", command.key, request, lien.id))
    return receipt(book, lien, whole)


def bind(book: Book, command: Bind, request: str) -> Receipt:
    lien = lien_of_token(book, command)
    if lien.user != command.user:
        refuse("state", f"token '{command.token}' belongs to user '{lien.user}', not to '{command.user}'")
    ref = run_ref(command.cluster, command.run) if command.run else None
    if lien.state == "bound" and lien.job_id == command.job_id and lien.run_ref == ref:
        return receipt(book, lien, lien.open)
    if lien.state != "unbound":
        refuse("state", f"token '{command.token}' is {lien.state} and cannot be bound to job {command.job_id}")
    if ref and lien.units > 1:
        refuse("state", f"token '{command.token}' is an array of {lien.units}; bind it without a run")
    if ref and ref in book.by_run:
        refuse("exists", f"run '{command.run}' has a lien already; see: carrel charge show {command.run}")
    lien.state = "bound"
    lien.job_id = command.job_id
    lien.expires_s = book.now_s + command.ttl_s
    _name(book, lien, ref)
    book.touch(lien)
    book.post(Posting("bind", command.key, request, lien.id), {})
    return receipt(book, lien, lien.open)


def reprice(book: Book, command: Reprice, request: str) -> Receipt:
    lien = lien_of(book, command)
    if lien.state not in OPEN:
        refuse("state", f"the lien of {command.run or command.token} is {lien.state} and has no price to change")
    _whole(command.amount_micro_su, lien.units)
    parts, flags = _raise_parts(book, lien, command.amount_micro_su, command.if_short)
    return _to_price(book, lien, command, request, parts=parts, flags=flags, kind="reprice")


def start(book: Book, command: Start, request: str) -> Receipt:
    """Make a run active at the price of what it got; the second time it is only re-priced."""
    lien = lien_of(book, command)
    ref = run_ref(command.cluster, command.run)
    if lien.state not in OPEN:
        refuse("state", f"run '{command.run}' cannot start: its lien is {lien.state}")
    if lien.run_ref not in {None, ref}:
        refuse("state", f"token '{command.token}' belongs to another run than '{command.run}'; requeue that one")
    parts, flags = _raise_parts(book, lien, command.amount_micro_su, command.if_short, units=1)
    if lien.units > 1:
        lien = _split(book, lien)
    _name(book, lien, ref)
    lien.state = "active"
    lien.expires_s = None
    return _to_price(book, lien, command, request, parts=parts, flags=flags, kind="start")


def void(book: Book, command: Void, request: str) -> Receipt:
    lien = lien_of(book, command)
    if lien.state == "void":
        return receipt(book, lien, 0)
    if lien.state not in {"quoted", "unbound", "bound", "unknown_end"}:
        refuse("state", f"the lien of {command.run or command.token} is {lien.state}; what ran is settled, not voided")
    freed = release(book, lien, Posting("void", command.key, request, lien.id))
    return receipt(book, lien, freed)


def mark_unknown(book: Book, command: MarkUnknown, request: str) -> Receipt:
    lien = lien_of_run(book, command.cluster, command.run)
    if lien.state == "unknown_end":
        return receipt(book, lien, lien.open)
    if lien.state not in {"bound", "active"}:
        refuse("state", f"run '{command.run}' is {lien.state}; only one that is not yet settled can be unknown")
    lien.state = "unknown_end"
    lien.expires_s = None
    book.touch(lien)
    book.post(Posting("mark_unknown", command.key, request, lien.id), {})
    return receipt(book, lien, lien.open)


def release(book: Book, lien: Lien, posting: Posting) -> int:
    """Give all back that a lien set aside, and end it. Returns how much that was."""
    before, freed = lien.weight, lien.open
    moves: dict[int, int] = {}
    for leg in book.legs[lien.id]:
        _move_lien(moves, leg.allocation, -leg.open)
        leg.open = 0
        book.touch(leg)
    book.post(posting, moves)
    lien.open = 0
    lien.state = "lapsed" if lien.state == "quoted" else "void"
    lien.expires_s = None
    book.touch(lien)
    book.weigh(lien, before)
    return freed


def set_aside(book: Book, lien: Lien, parts: dict[int, int], posting: Posting) -> str:
    """Move the parts from what is available to the lien; return the transaction's flags."""
    before = lien.weight
    moves: dict[int, int] = {}
    for allocation, amount in parts.items():
        _move_lien(moves, allocation, amount)
        book.leg(lien, allocation).open += amount
        lien.open += amount
    book.touch(lien)
    book.weigh(lien, before)
    return book.post(posting, moves)


def _move_lien(moves: dict[int, int], allocation: int, amount: int) -> None:
    number = allocation * ACCOUNTS_EACH
    moves[number] = moves.get(number, 0) - amount
    moves[number + 1] = moves.get(number + 1, 0) + amount


def _raise_parts(
    book: Book, lien: Lien, unit: int, if_short: IfShort, *, units: int | None = None
) -> tuple[dict[int, int] | None, str]:
    """Return who pays a raise and its flags; None for the parts: the lien stays as it is."""
    need = (unit - lien.unit) * (units or lien.units)
    try:
        return demand(book, lien.project, lien.user, need), ""
    except Refused:
        if if_short == "refuse":
            raise
    if if_short == "keep":
        return None, "short"
    return owed(book, lien.project, need), ""


def _to_price(
    book: Book,
    lien: Lien,
    command: Reprice | Start,
    request: str,
    *,
    parts: dict[int, int] | None,
    flags: str,
    kind: str,
) -> Receipt:
    posting = Posting(kind, command.key, request, lien.id, may_overdraw=command.if_short == "overdraw")
    if parts is None:
        book.post(posting, {}, flags=flags)
    else:
        less = (lien.unit - command.amount_micro_su) * lien.units
        lien.unit = command.amount_micro_su
        if less > 0:
            parts = _from_the_tail(book, lien, less)
        flags = set_aside(book, lien, parts, posting)
    for flag in flags.split():
        lien.flags = joined(lien.flags, flag)
    book.touch(lien)
    return receipt(book, lien, lien.open)


def _from_the_tail(book: Book, lien: Lien, less: int) -> dict[int, int]:
    """Return the parts, negative, by which a lien is lowered: the leg that would be charged last is freed first."""
    parts: dict[int, int] = {}
    for leg in reversed(book.legs[lien.id]):
        freed = min(less, leg.open)
        if freed:
            parts[leg.allocation] = -freed
            less -= freed
    return parts


def _split(book: Book, lien: Lien) -> Lien:
    """Take one unit off an array's lien. No money moves: both liens are in the same accounts."""
    child = book.new_lien(
        cluster=lien.cluster,
        token_ref=None,
        run_ref=None,
        job_id=lien.job_id,
        project=lien.project,
        user=lien.user,
        state="bound",
        units=1,
        unit=lien.unit,
        parent=lien.id,
    )
    left = lien.unit
    for leg in book.legs[lien.id]:
        taken = min(left, leg.open)
        if taken:
            leg.open -= taken
            book.touch(leg)
            book.legs[child.id].append(
                Leg(lien=child.id, position=len(book.legs[child.id]), allocation=leg.allocation, open=taken)
            )
            book.touch(book.legs[child.id][-1])
            left -= taken
    child.open = lien.unit
    lien.open -= lien.unit
    lien.units -= 1
    book.touch(lien)
    return child


def _new(book: Book, command: Quote | Place, state: str) -> Lien:
    return book.new_lien(
        cluster=command.cluster,
        token_ref=token_ref(command.cluster, command.token, command.het_offset),
        run_ref=None,
        job_id=0,
        project=command.project,
        user=command.user,
        state=state,
        units=command.units,
        unit=command.amount_micro_su,
        expires_s=book.now_s + command.ttl_s,
    )


def _name(book: Book, lien: Lien, ref: str | None) -> None:
    if ref:
        lien.run_ref = ref
        book.by_run[ref] = lien
        book.touch(lien)


def _unused(book: Book, command: Quote | Place) -> None:
    if token_ref(command.cluster, command.token, command.het_offset) in book.by_token:
        refuse("exists", f"token '{command.token}' has a lien already; a token is used once")


def _honours(lien: Lien, command: Place, now_s: int) -> bool:
    fresh = lien.expires_s is not None and now_s < lien.expires_s
    asked = (command.project, command.user, command.amount_micro_su, command.units)
    return fresh and asked == (lien.project, lien.user, lien.unit, lien.units)


def _whole(amount: int, units: int) -> int:
    if amount * units > MOST_MICRO_SU:
        refuse("invalid", f"{units} times {format_su(amount)} SU is more than the ledger takes at once")
    return amount * units
