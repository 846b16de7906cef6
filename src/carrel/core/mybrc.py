"""The words of the myBRC API: what its clients send, what is wrong with it, and the texts that they may grep for.

Amounts are decimals of at most eleven digits, two of them behind the point; times are RFC 3339.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, ROUND_UP, Context, Decimal, DecimalException
from typing import Any

import msgspec

from carrel.model.money import MICRO_SU_PER_SU

DIGITS_MAX = 11
PLACES_MAX = 2
AMOUNT_MAX = Decimal(100_000_000)
CENT = Decimal("0.01")
_EXACT = Context(prec=60)
TERMINAL = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
"""Words of a state after which a run uses nothing more; ``COMPLETING`` comes with the end, alone or as a flag."""

ACCEPTED = "A job with job_cost {cost} can be submitted."
NOT_A_MEMBER = "User {user} is not a member of account {account}."
NO_ALLOCATION = "Account {account} has no active compute allocation."
NOT_ACTIVE = "User {user} is not an active member of the compute allocation for account {account}."
OVER_ACCOUNT = "Adding job_cost {cost} to account balance {used} would exceed account allocation {most}."
OVER_USER = "Adding job_cost {cost} to user balance {used} would exceed user allocation {most}."
NO_USER = "No user exists with user_id {user_id}."
NO_ACCOUNT = "No account exists with account_id {account}."
SERVER_ERROR = "Unexpected server error."
UNSUPPORTED = "This method is not supported."


class BadCostError(Exception):
    """The cost of a job is none; the sentence is the API's own."""


class BadJobError(Exception):
    """A job object that is none: field to sentences."""

    def __init__(self, errors: Mapping[str, list[str]]) -> None:
        """Carry them."""
        super().__init__(str(errors))
        self.errors = dict(errors)


class MybrcJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job as a client told it."""

    jobslurmid: str
    userid: str
    accountid: str
    amount: Decimal | None = None
    """None: not said."""
    submitdate: datetime | None = None
    startdate: datetime | None = None
    enddate: datetime | None = None
    jobstatus: str | None = None
    partition: str | None = None
    qos: str | None = None
    nodes: tuple[str, ...] = ()
    num_cpus: int | None = None
    num_req_nodes: int | None = None
    num_alloc_nodes: int | None = None
    raw_time: float | None = None
    cpu_time: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the run uses nothing more."""
        words = re.split(r"[^A-Z_]+", (self.jobstatus or "").upper())
        return self.enddate is not None or any(word in TERMINAL for word in words)

    @property
    def run(self) -> str:
        """Return the run's key: the id comes back with every requeue, its start does not."""
        return f"{self.jobslurmid}@{int(self.startdate.timestamp())}" if self.startdate else self.jobslurmid


def cost(text: str) -> int:
    """Read ``job_cost``, in micro-SU.

    Raises:
        BadCostError: it is no amount that the API takes.

    >>> cost("12.5")
    12500000
    """
    if not text.strip():
        raise BadCostError(f"job_cost {text.strip()} is not a nonempty string.")
    try:
        value = Decimal(text)
        whole, places = _digits(value)
    except (DecimalException, ValueError) as error:
        kind = "[<class 'decimal.ConversionSyntax'>]"
        raise BadCostError(f"Encountered exception {kind} when converting job_cost {text} to a decimal.") from error
    if value < 0:
        raise BadCostError(f"job_cost {text} is not nonnegative.")
    if whole + places > DIGITS_MAX:
        raise BadCostError(f"job_cost {text} has greater than {DIGITS_MAX} digits.")
    if places > PLACES_MAX:
        raise BadCostError(f"job_cost {text} has greater than {PLACES_MAX} decimal places.")
    return int(value * MICRO_SU_PER_SU)


def micro_su(amount: Decimal) -> int:
    return int(_EXACT.multiply(amount, Decimal(MICRO_SU_PER_SU)))


def decimal_text(amount_micro_su: int, *, up: bool = False) -> str:
    """Return an amount with two decimals: up for what is checked, half up for what was charged.

    >>> decimal_text(5_000), decimal_text(4_999), decimal_text(1, up=True)
    ('0.01', '0.00', '0.01')
    """
    exact = _EXACT.divide(Decimal(amount_micro_su), Decimal(MICRO_SU_PER_SU))
    return str(exact.quantize(CENT, rounding=ROUND_UP if up else ROUND_HALF_UP, context=_EXACT))


def fits(text: str) -> bool:
    """Tell whether the API takes an amount: eleven digits with the two behind the point."""
    return len(text.lstrip("-").replace(".", "")) <= DIGITS_MAX


def job(raw: object, *, jobslurmid: str = "") -> MybrcJob:
    """Read a job object; ``jobslurmid`` is that of the address, where there is one.

    Raises:
        BadJobError: with every field that is wrong.
    """
    if not isinstance(raw, dict):
        raise BadJobError({"non_field_errors": ["Invalid data. Expected a dictionary."]})
    given: dict[str, Any] = dict(raw) | ({"jobslurmid": jobslurmid} if jobslurmid else {})
    errors: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for name, read in _FIELDS.items():
        if name not in given:
            if name in _REQUIRED:
                errors[name] = ["This field is required."]
            continue
        try:
            values[name] = read(given[name])
        except _WrongError as wrong:
            errors[name] = [str(wrong)]
    if errors:
        raise BadJobError(errors)
    found = MybrcJob(**values)
    dates = [when for when in (found.submitdate, found.startdate, found.enddate) if when is not None]
    if dates != sorted(dates):
        raise BadJobError({"non_field_errors": ["The submit date, start date and end date must be in order."]})
    return found


def merged(before: MybrcJob, now: MybrcJob) -> MybrcJob:
    """Return what is known of a job: nodes are added and never removed, and what is not said stays.

    Raises:
        BadJobError: it would belong to somebody else.
    """
    errors = {
        name: [f"The {name} of a job cannot be changed."]
        for name in ("userid", "accountid")
        if getattr(before, name) != getattr(now, name)
    }
    if errors:
        raise BadJobError(errors)
    said = {name: getattr(now, name) for name in now.__struct_fields__ if getattr(now, name) not in (None, ())}
    said["nodes"] = tuple(dict.fromkeys((*before.nodes, *now.nodes)))
    return msgspec.structs.replace(before, **said)


def shown(found: MybrcJob, amount_micro_su: int) -> dict[str, Any]:
    """Return a job as the API answers it; the amount is that of all its runs."""
    plain: dict[str, Any] = msgspec.to_builtins(found)
    plain["amount"] = decimal_text(amount_micro_su)
    plain["nodes"] = [{"name": name} for name in found.nodes]
    return plain


class _WrongError(Exception):
    """A value that is none."""


def _digits(value: Decimal) -> tuple[int, int]:
    """Return how many digits stand before and behind the point; ValueError: it is no number."""
    if not value.is_finite():
        raise ValueError(value)
    places = max(0, -int(value.as_tuple().exponent))
    return max(0, value.adjusted() + 1) if value else 0, places


def _text(most: int, pattern: str = "") -> Any:
    def read(value: object) -> str:
        if not isinstance(value, str):
            raise _WrongError("Not a valid string.")
        if not value:
            raise _WrongError("This field may not be blank.")
        if len(value) > most:
            raise _WrongError(f"Ensure this field has no more than {most} characters.")
        if "\0" in value:
            raise _WrongError("Null characters are not allowed.")
        if pattern and not re.fullmatch(pattern, value):
            raise _WrongError("Enter a valid value.")
        return value

    return read


def _nullable(read: Any) -> Any:
    return lambda value: None if value is None else read(value)


def _amount(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _WrongError("A valid number is required.")
    try:
        amount = Decimal(str(value))
        whole, places = _digits(amount)
    except (DecimalException, ValueError):
        raise _WrongError("A valid number is required.") from None
    if whole + places > DIGITS_MAX:
        raise _WrongError(f"Ensure that there are no more than {DIGITS_MAX} digits in total.")
    if places > PLACES_MAX:
        raise _WrongError(f"Ensure that there are no more than {PLACES_MAX} decimal places.")
    if amount < 0:
        raise _WrongError("Ensure this value is greater than or equal to 0.")
    if amount > AMOUNT_MAX:
        raise _WrongError(f"Ensure this value is less than or equal to {AMOUNT_MAX}.")
    return amount.quantize(CENT)


def _date(value: object) -> datetime:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        moment = None
    if moment is None or not 1970 <= moment.year < 9999:  # what seconds since the epoch can say
        raise _WrongError("Datetime has wrong format. Use one of these formats instead: YYYY-MM-DDThh:mm[:ss]Z.")
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise _WrongError("A valid integer is required.")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**9:
        raise _WrongError("A valid number is required.")
    return float(value)


def _nodes(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _WrongError("Expected a list of items.")
    name = _text(30)
    return tuple(name(item.get("name")) if isinstance(item, dict) else name(None) for item in value)


_REQUIRED = ("jobslurmid", "userid", "accountid")
_FIELDS: dict[str, Any] = {
    "jobslurmid": _text(150, r"[!-~]+"),
    "userid": _text(150, r"[0-9]+"),
    "accountid": _text(200, r"[!-~]+"),
    "amount": _amount,
    **dict.fromkeys(("submitdate", "startdate", "enddate"), _nullable(_date)),
    **dict.fromkeys(("jobstatus", "partition", "qos"), _nullable(_text(50))),
    "nodes": _nodes,
    **dict.fromkeys(("num_cpus", "num_req_nodes", "num_alloc_nodes"), _nullable(_integer)),
    **dict.fromkeys(("raw_time", "cpu_time"), _nullable(_number)),
}
