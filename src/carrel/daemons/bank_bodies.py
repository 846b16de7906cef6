"""What requests to the bank carry. An unknown field is refused, as is an amount that is no integer."""

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from carrel.bank.tokens import MOST_S, NOTE_MAX
from carrel.model.access import Scope
from carrel.model.ledger import Amount, Name, NewName, Offset, OptionalName, Positive, Reason, Signed, Units

Moment = Annotated[datetime, Meta(tz=True)]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]
LIEN_TTL_MAX_S = 7 * 86400


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request carries."""


class NewAccount(Body, frozen=True, kw_only=True):
    account: NewName
    parent: OptionalName = ""
    cap_micro_su: Amount | None = None


class NewCap(Body, frozen=True, kw_only=True):
    user: OptionalName = ""
    """Empty: the cap of the account itself."""
    cap_micro_su: Amount | None
    """null: no cap."""
    reason: Reason


class Terms(Body, frozen=True, kw_only=True):
    starts: Moment | None = None
    """null: at once."""
    ends: Moment | None = None
    """Exclusive; null: never."""
    priority: Priority = 0
    credit_micro_su: Amount = 0


class NewAllocation(Terms, frozen=True, kw_only=True):
    allocation: NewName


class NewTerms(Terms, frozen=True, kw_only=True):
    reason: Reason


class Gift(Body, frozen=True, kw_only=True):
    amount_micro_su: Positive
    reason: Reason
    allocation: OptionalName = ""
    """Empty: the account's only valid one."""


class Adjustment(Body, frozen=True, kw_only=True):
    amount_micro_su: Signed
    reason: Reason
    allocation: OptionalName = ""


class Move(Body, frozen=True, kw_only=True):
    source: Name
    """Account that gives."""
    target: Name
    amount_micro_su: Positive
    reason: Reason
    source_allocation: OptionalName = ""
    target_allocation: OptionalName = ""


class NewLien(Body, frozen=True, kw_only=True):
    cluster: Name
    token: Name
    het_offset: Offset = 0
    account: Name
    user: Name
    amount_micro_su: Amount
    units: Units = 1
    ttl_s: Annotated[int, Meta(ge=1, le=LIEN_TTL_MAX_S)] = 120
    inputs: dict[str, Any] = {}


class Release(Body, frozen=True, kw_only=True):
    reason: Reason


class GiveBack(Body, frozen=True, kw_only=True):
    amount_micro_su: Positive
    reason: Reason
    successor: OptionalName = ""
    """Allocation that gets it where the one that paid has ended."""


class Correction(Body, frozen=True, kw_only=True):
    amount_micro_su: Amount
    """What the run shall have cost."""
    reason: Reason


class NewToken(Body, frozen=True, kw_only=True):
    user: OptionalName = ""
    """Empty: the caller."""
    scope: Scope = "read"
    ttl_s: Annotated[int, Meta(ge=1, le=MOST_S)] = 30 * 86400
    note: Annotated[str, Meta(max_length=NOTE_MAX)] = ""
