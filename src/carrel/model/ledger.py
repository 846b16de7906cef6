"""What may be asked of the ledger, and what it answers: a closed union of commands, and two kinds of answer.

Each command carries the idempotency key of whoever asks. The same command under the same key is answered as the first
time and changes nothing; another command under it is refused. Times are the bank's own: a command carries none but
the dates of an allocation, so that a clock that is off elsewhere moves no money.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from carrel.model.money import MOST_MICRO_SU

Amount = Annotated[int, Meta(ge=0, le=MOST_MICRO_SU)]
Positive = Annotated[int, Meta(ge=1, le=MOST_MICRO_SU)]
Signed = Annotated[int, Meta(ge=-MOST_MICRO_SU, le=MOST_MICRO_SU)]
Seconds = Annotated[int, Meta(ge=0, le=2**40)]
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[!-~]+\Z")]
NewName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[!-.0-~]+\Z")]
"""Of what people open: it becomes a part of an address, so it has no slash."""
OptionalName = Annotated[str, Meta(max_length=200, pattern=r"^[!-~]*\Z")]
Reason = Annotated[str, Meta(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
JobId = Annotated[int, Meta(ge=0, le=2**32)]
Units = Annotated[int, Meta(ge=1, le=10_000_000)]
Offset = Annotated[int, Meta(ge=0, le=1000)]

MoneyState = Literal[
    "quoted", "lapsed", "unbound", "bound", "active", "unknown_end", "void", "settled", "part_refunded", "refunded"
]
"""Of one run's money. ``quoted`` set nothing aside; ``lapsed`` and ``void`` are final; after ``settled`` nothing is
open again, except within the one command that corrects it."""

IfShort = Literal["refuse", "keep", "overdraw"]
"""What a raise does that the account does not cover: nothing; leave the lien as it is, flagged ``short``; or, for a
person who may, go below the floor, flagged ``overdrawn``."""

Why = Literal["funds", "project_cap", "user_cap", "unknown", "exists", "state", "conflict", "invalid"]

UNBOUND_TTL_S = 120
BOUND_TTL_S = 84 * 86400


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """What every command carries."""

    key: Name
    actor: OptionalName = ""
    """Who asked, for the journal."""


class OpenProject(Command, frozen=True, kw_only=True, tag="open_project"):
    project: Name
    parent: OptionalName = ""
    cap_micro_su: Amount | None = None
    """Most that the project and all below it may have used and set aside together; None: no cap."""


class SetCap(Command, frozen=True, kw_only=True, tag="set_cap"):
    """Change a project's cap, or that of one user in it. A cap below what is used stops what is new."""

    project: Name
    user: OptionalName = ""
    cap_micro_su: Amount | None = None
    reason: Reason


class OpenAllocation(Command, frozen=True, kw_only=True, tag="open_allocation"):
    allocation: Name
    project: Name
    start_s: Seconds = 0
    end_s: Seconds | None = None
    """Exclusive; None: never ends."""
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    """The highest is drawn on first; among equals the one that ends first."""
    credit_micro_su: Amount = 0
    """How far liens may take it below zero."""


class SetTerms(Command, frozen=True, kw_only=True, tag="set_terms"):
    """Change an allocation's dates, priority and credit limit."""

    allocation: Name
    start_s: Seconds = 0
    end_s: Seconds | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    credit_micro_su: Amount = 0
    reason: Reason


class Deposit(Command, frozen=True, kw_only=True, tag="deposit"):
    allocation: Name
    amount_micro_su: Positive
    reason: Reason


class Transfer(Command, frozen=True, kw_only=True, tag="transfer"):
    """Move what is available, above zero: nobody transfers credit."""

    source: Name
    target: Name
    amount_micro_su: Positive
    reason: Reason


class Adjust(Command, frozen=True, kw_only=True, tag="adjust"):
    """Add or take by a person's decision; may go below the floor, and is flagged then."""

    allocation: Name
    amount_micro_su: Signed
    reason: Reason


class CarryOver(Command, frozen=True, kw_only=True, tag="carry_over"):
    """Give what expired in one allocation to another."""

    source: Name
    target: Name
    amount_micro_su: Positive
    reason: Reason


class Sweep(Command, frozen=True, kw_only=True, tag="sweep"):
    """Release liens past their time and expire what is left of ended allocations, at most ``limit`` of each."""

    limit: Annotated[int, Meta(ge=1, le=10_000)] = 1000


class Quote(Command, frozen=True, kw_only=True, tag="quote"):
    """Promise a price for a while. Nothing is set aside."""

    cluster: Name
    token: Name
    het_offset: Offset = 0
    project: Name
    user: Name
    amount_micro_su: Amount
    units: Units = 1
    ttl_s: Seconds = 86400
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Place(Command, frozen=True, kw_only=True, tag="place"):
    """Set money aside at submit: ``units`` times the amount, for an array. The token names it until a job is seen."""

    cluster: Name
    token: Name
    het_offset: Offset = 0
    project: Name
    user: Name
    amount_micro_su: Amount
    units: Units = 1
    ttl_s: Seconds = UNBOUND_TTL_S
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Bind(Command, frozen=True, kw_only=True, tag="bind"):
    """Say which job a token became. An array is bound without ``run``: each task brings its own when it starts."""

    cluster: Name
    token: Name
    het_offset: Offset = 0
    user: Name
    job_id: JobId
    run: OptionalName = ""
    ttl_s: Seconds = BOUND_TTL_S


class ByRun(Command, frozen=True, kw_only=True):
    """A command about the money of one run: ``run`` is its SLUID, or another key that never comes back."""

    cluster: Name
    run: Name


class Reprice(Command, frozen=True, kw_only=True, tag="reprice"):
    """Raise or lower a lien *to* this amount for each unit. Named by its run, or by its token before it has one."""

    cluster: Name
    run: OptionalName = ""
    token: OptionalName = ""
    het_offset: Offset = 0
    amount_micro_su: Amount
    if_short: IfShort = "refuse"
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Start(ByRun, frozen=True, kw_only=True, tag="start"):
    """The run started and was priced by what it got. ``token`` finds the lien of an array, and splits one unit off."""

    token: OptionalName = ""
    het_offset: Offset = 0
    amount_micro_su: Amount
    if_short: IfShort = "refuse"
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Settle(ByRun, frozen=True, kw_only=True, tag="settle"):
    """Charge what the run used and free the rest; beyond the lien too, flagged ``overrun``: what was used is owed."""

    amount_micro_su: Amount
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Requeue(ByRun, frozen=True, kw_only=True, tag="requeue"):
    """Charge this run and set money aside for the next one, which is the same job, in one go.

    The charge stands also where the next lien is not covered; the answer then carries the flag ``next_refused``.
    """

    amount_micro_su: Amount
    next_run: Name
    next_amount_micro_su: Amount
    ttl_s: Seconds = BOUND_TTL_S
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Backfill(ByRun, frozen=True, kw_only=True, tag="backfill"):
    """Charge a run that nobody set money aside for, as after an outage. May overdraw, and is flagged."""

    project: Name
    user: Name
    job_id: JobId = 0
    amount_micro_su: Amount
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


class Void(Command, frozen=True, kw_only=True, tag="void"):
    """Release the lien of a job that never started."""

    cluster: Name
    run: OptionalName = ""
    token: OptionalName = ""
    het_offset: Offset = 0
    reason: Reason


class MarkUnknown(ByRun, frozen=True, kw_only=True, tag="mark_unknown"):
    """Nobody knows how the run ended. The lien stays, for the reconciler or a person."""


class Refund(ByRun, frozen=True, kw_only=True, tag="refund"):
    """Give back part of a charge, at most what is left of it."""

    amount_micro_su: Positive
    reason: Reason
    successor: OptionalName = ""
    """Allocation that gets it where the one that paid has ended."""


class Correct(ByRun, frozen=True, kw_only=True, tag="correct"):
    """Reverse a settlement and charge this instead. Earlier refunds stay, up to the new charge."""

    amount_micro_su: Amount
    reason: Reason
    price_version: Seconds = 0
    inputs: dict[str, Any] = {}


AnyCommand = (
    OpenProject
    | SetCap
    | OpenAllocation
    | SetTerms
    | Deposit
    | Transfer
    | Adjust
    | CarryOver
    | Sweep
    | Quote
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
    | Correct
)


class Receipt(msgspec.Struct, frozen=True, kw_only=True, tag="receipt", omit_defaults=True):
    """It was done."""

    seq: int
    """Of the last transaction it wrote; that of the one before where nothing had to change."""
    lien: int = 0
    state: MoneyState | Literal[""] = ""
    amount_micro_su: int = 0
    """What is set aside, was charged, was moved."""
    flags: tuple[str, ...] = ()
    """``overrun``, ``overdrawn``, ``short``, ``next_refused``: a person should look. ``more``: sweep again."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal", omit_defaults=True):
    """It was understood and not done; nothing changed."""

    why: Why
    sentence: str
    needed_micro_su: int = 0
    available_micro_su: int = 0
    """What was left of the account, or below the cap, that stood in the way."""


Answer = Receipt | Refusal


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """An allocation as it stands."""

    allocation: str
    project: str
    start_s: int
    end_s: int | None
    priority: int
    credit_micro_su: int
    available_micro_su: int
    lien_micro_su: int
    """Set aside; of which ``running_micro_su`` for runs that started."""
    running_micro_su: int
    spent_micro_su: int
    expired_micro_su: int


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A project's cap, or that of one user in it, and what counts against it."""

    project: str
    user: str
    parent: str
    cap_micro_su: int | None
    committed_micro_su: int
    """Spent and set aside; with that of all projects below."""


class LienView(msgspec.Struct, frozen=True, kw_only=True):
    """The money of one run."""

    id: int
    cluster: str
    token: str
    run: str
    job_id: int
    project: str
    user: str
    state: MoneyState
    units: int
    lien_micro_su: int
    charged_micro_su: int
    refunded_micro_su: int
    expires_s: int | None
    flags: tuple[str, ...]


class StatementLine(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of one account, with what it left there."""

    seq: int
    at_s: int
    kind: str
    allocation: str
    account: str
    amount_micro_su: int
    balance_micro_su: int
    run: str
    user: str
    actor: str
    reason: str
    flags: tuple[str, ...]


class HistoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done to a lien, and by whom."""

    seq: int
    at_s: int
    kind: str
    amount_micro_su: int
    actor: str
    reason: str
    price_version: int
    inputs: dict[str, Any]
    flags: tuple[str, ...]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """How much the ledger holds."""

    transactions: int
    projects: int
    allocations: int
    open_liens: int
    unknown_ends: int
    """Liens of runs whose end nobody knows: a person should look."""
    last_hash: str
    """Of the last transaction; kept elsewhere, it proves that no end was cut off."""


class Break(msgspec.Struct, frozen=True, kw_only=True):
    """An invariant that does not hold, and where."""

    invariant: str
    """``I1`` … as in ``docs/reference/bank-ledger.md``."""
    sentence: str
