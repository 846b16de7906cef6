"""The rules of charges: settle, requeue, backfill, refund, correct. What was used is owed, covered or not.

::

    bound | active | unknown_end ──settle──▶ settled ──refund──▶ part_refunded ──▶ refunded
                    no lien ──backfill──▶ settled                └── correct: reversed, and settled anew ──▶ settled …

A charge goes to the allocations that carried the lien, whatever became of them, of the user or of the membership
since. It consumes the legs in order and frees from the tail.
"""

from carrel.core.book import ACCOUNTS_EACH, KINDS, Book, Leg, Lien, Posting, joined, run_ref
from carrel.core.funds import Refused, allocation_of, check_size, demand, lien_of_run, owed, project_of, refuse
from carrel.core.liens import receipt, set_aside
from carrel.model.ledger import Backfill, Correct, Receipt, Refund, Requeue, Settle
from carrel.model.money import format_su

CHARGED = frozenset({"settled", "part_refunded", "refunded"})


def settle(book: Book, command: Settle, request: str) -> Receipt:
    """Charge a run; a second time with the same amount changes nothing, with another one is refused."""
    lien = lien_of_run(book, command.cluster, command.run)
    if lien.state in CHARGED and lien.charged == command.amount_micro_su:
        return receipt(book, lien, lien.charged)
    _chargeable(lien, command)
    parts = _beyond(book, lien, command.amount_micro_su)
    flags = _charge(book, lien, parts, command.amount_micro_su, _posting("settle", command.key, request, lien))
    return receipt(book, lien, lien.charged, flags=flags)


def requeue(book: Book, command: Requeue, request: str) -> Receipt:
    """Charge one run and place the lien of the next."""
    lien = lien_of_run(book, command.cluster, command.run)
    ref = run_ref(command.cluster, command.next_run)
    if ref in book.by_run:
        refuse("exists", f"run '{command.next_run}' has a lien already; see: carrel charge show {command.next_run}")
    _chargeable(lien, command)
    parts = _beyond(book, lien, command.amount_micro_su)
    flags = _charge(book, lien, parts, command.amount_micro_su, _posting("settle", command.key, request, lien))
    try:
        parts = demand(book, lien.project, lien.user, command.next_amount_micro_su)
    except Refused:
        return receipt(book, lien, lien.charged, flags=joined(flags, "next_refused"))
    following = book.new_lien(
        cluster=lien.cluster,
        token_ref=None,
        run_ref=ref,
        job_id=lien.job_id,
        project=lien.project,
        user=lien.user,
        state="bound",
        units=1,
        unit=command.next_amount_micro_su,
        expires_s=book.now_s + command.ttl_s,
    )
    set_aside(book, following, parts, Posting("place", command.key, request, following.id))
    return receipt(book, lien, lien.charged, flags=flags)


def backfill(book: Book, command: Backfill, request: str) -> Receipt:
    """Charge a run without a lien."""
    project_of(book, command.project)
    ref = run_ref(command.cluster, command.run)
    if ref in book.by_run:
        refuse("exists", f"run '{command.run}' has a lien already; settle it")
    parts = owed(book, command.project, command.amount_micro_su)
    accounts = [book.account(number, kind) for number in parts for kind in KINDS]
    check_size(book, command.amount_micro_su, accounts, book.budget(command.project, command.user))
    lien = book.new_lien(
        cluster=command.cluster,
        token_ref=None,
        run_ref=ref,
        job_id=command.job_id,
        project=command.project,
        user=command.user,
        state="active",
        units=1,
        unit=0,
        flags="backfill",
    )
    flags = _charge(book, lien, parts, command.amount_micro_su, _posting("settle", command.key, request, lien))
    return receipt(book, lien, lien.charged, flags=joined(flags, "backfill"))


def refund(book: Book, command: Refund, request: str) -> Receipt:
    lien = lien_of_run(book, command.cluster, command.run)
    if lien.state not in CHARGED:
        refuse("state", f"run '{command.run}' is {lien.state}; only what was charged is refunded")
    left = lien.charged - lien.refunded
    if command.amount_micro_su > left:
        refuse(
            "state",
            f"run '{command.run}' has {format_su(left)} SU of its charge left, "
            f"not {format_su(command.amount_micro_su)}; see: carrel charge show {command.run}",
            needed=command.amount_micro_su,
            available=left,
        )
    successor = allocation_of(book, command.successor).id if command.successor else 0
    _give_back(book, lien, command.amount_micro_su, _posting("refund", command.key, request, lien), successor)
    return receipt(book, lien, command.amount_micro_su)


def correct(book: Book, command: Correct, request: str) -> Receipt:
    """Reverse what was settled and refunded, settle anew, and refund again up to the new charge."""
    lien = lien_of_run(book, command.cluster, command.run)
    if lien.state not in CHARGED:
        refuse("state", f"run '{command.run}' is {lien.state}; only a settled charge is corrected")
    if lien.charged == command.amount_micro_su:
        return receipt(book, lien, lien.charged)
    legs = book.legs[lien.id]
    accounts = [book.account(leg.allocation, kind) for leg in legs for kind in KINDS]
    check_size(book, command.amount_micro_su, accounts, book.nodes(lien))
    if not legs:
        owed(book, lien.project, command.amount_micro_su)  # refuses where nobody could owe it
    refunded = min(lien.refunded, command.amount_micro_su)
    _reverse(book, lien, _posting("reversal", command.key, request, lien))
    parts = _beyond(book, lien, command.amount_micro_su)
    flags = _charge(book, lien, parts, command.amount_micro_su, _posting("settle", command.key, request, lien))
    if refunded:
        _give_back(book, lien, refunded, _posting("refund", command.key, request, lien), 0)
    return receipt(book, lien, lien.charged, flags=joined(flags, "corrected"))


def _posting(kind: str, key: str, request: str, lien: Lien) -> Posting:
    return Posting(kind, key, request, lien.id, may_overdraw=True)


def _chargeable(lien: Lien, command: Settle | Requeue) -> None:
    if lien.state in CHARGED:
        charged, asked = format_su(lien.charged), format_su(command.amount_micro_su)
        refuse("state", f"run '{command.run}' was charged {charged} SU, not {asked}; see: carrel charge correct")
    if lien.state not in {"bound", "active", "unknown_end"}:
        refuse("state", f"run '{command.run}' cannot be settled: its lien is {lien.state}")


def _beyond(book: Book, lien: Lien, amount: int) -> dict[int, int]:
    """Return who pays what the lien does not cover; refuses what does not fit before anything changes."""
    legs = book.legs[lien.id]
    accounts = [book.account(leg.allocation, kind) for leg in legs for kind in KINDS]
    check_size(book, amount, accounts, book.nodes(lien))
    return owed(book, lien.project, amount - lien.open, debtor=legs[-1].allocation if legs else 0)


def _charge(book: Book, lien: Lien, beyond: dict[int, int], amount: int, posting: Posting) -> str:
    """Charge and return the flags; the lien is resolved."""
    before = lien.weight
    legs = list(book.legs[lien.id])
    moves: dict[int, int] = {}
    left = amount
    for leg in legs:
        taken = min(leg.open, left)
        left -= taken
        _add(moves, leg.allocation, "lien", -leg.open)
        _add(moves, leg.allocation, "available", leg.open - taken)
        _spend(book, moves, leg, taken)
        leg.open = 0
    for allocation, part in beyond.items():
        _add(moves, allocation, "available", -part)
        _spend(book, moves, book.leg(lien, allocation), part)
    flags = book.post(posting, moves, flags="overrun" if beyond and lien.open else "")
    lien.open = 0
    lien.charged = amount
    lien.state = "settled"
    lien.expires_s = None
    for flag in flags.split():
        lien.flags = joined(lien.flags, flag)
    book.touch(lien)
    book.weigh(lien, before)
    return flags


def _spend(book: Book, moves: dict[int, int], leg: Leg, amount: int) -> None:
    _add(moves, leg.allocation, "spent", amount)
    leg.charged += amount
    book.touch(leg)


def _give_back(book: Book, lien: Lien, amount: int, posting: Posting, successor: int) -> None:
    """Refund from the tail of what was charged."""
    before = lien.weight
    moves: dict[int, int] = {}
    left = amount
    for leg in reversed(book.legs[lien.id]):
        part = min(left, leg.charged - leg.refunded)
        left -= part
        if part:
            ended = book.allocations_by_id[leg.allocation].ended(book.now_s)
            _add(moves, leg.allocation, "spent", -part)
            _add(moves, successor if successor and ended else leg.allocation, "available", part)
            leg.refunded += part
            book.touch(leg)
    book.post(posting, moves)
    lien.refunded += amount
    lien.state = "refunded" if lien.refunded == lien.charged else "part_refunded"
    book.touch(lien)
    book.weigh(lien, before)


def _reverse(book: Book, lien: Lien, posting: Posting) -> None:
    """Undo every settlement and refund of the lien: it is open again, within this command."""
    before = lien.weight
    moves = {number: -amount for number, amount in book.resolved[lien.id].items()}
    book.post(posting, moves)
    for leg in book.legs[lien.id]:
        leg.open = moves.get(leg.allocation * ACCOUNTS_EACH + KINDS.index("lien"), 0)
        leg.charged = leg.refunded = 0
        book.touch(leg)
    lien.open = sum(leg.open for leg in book.legs[lien.id])
    lien.charged = lien.refunded = 0
    book.weigh(lien, before)


def _add(moves: dict[int, int], allocation: int, kind: str, amount: int) -> None:
    number = allocation * ACCOUNTS_EACH + KINDS.index(kind)
    moves[number] = moves.get(number, 0) + amount
