"""How the commands ask the bank: carrelctld's REST API, as who calls or with a token, and never twice by accident.

``CARREL_TOKEN_FILE`` names a file with a token, for a machine without munge.
"""

import asyncio
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from cyclopts import Parameter

from carrel import config
from carrel.daemons import transport
from carrel.errors import CarrelError, UnreachableError, UsageError
from carrel.model.money import MICRO_SU_PER_SU, MOST_MICRO_SU, format_su, parse_su

_T = TypeVar("_T")
TOKEN_FILE = "CARREL_TOKEN_FILE"  # noqa: S105  # the name of a variable
ANSWER_TIMEOUT_S = 60.0
"""Reading a whole ledger takes a while; all else is answered in milliseconds."""

Su = Annotated[str, Parameter(name="--su", show_default=False, help="Amount in SU, with at most six decimals.")]
MicroSu = Annotated[
    str, Parameter(name="--micro-su", show_default=False, help="Amount in micro-SU, in place of --su: a whole number.")
]
"""Text: cyclopts would round ``1.5`` to an integer."""
Reason = Annotated[str, Parameter(help="Why, for the statement.")]
Key = Annotated[
    str,
    Parameter(
        show_default=False,
        help="Idempotency key: the same command under the same key is done once. A new one by default.",
    ),
]
Csv = Annotated[bool, Parameter(name="--csv", negative="", show_default=False, help="Print CSV, amounts in micro-SU.")]


def ask(path: str, kind: type[_T], **query: object) -> _T:
    """Read something of the bank.

    Args:
        path: Below ``/v1``, each part quoted already.
        kind: What the answer is.
        query: What is empty is left out.
    """
    given = {name: value for name, value in query.items() if value not in ("", None, 0, ())}
    tail = f"?{urlencode(given, doseq=True)}" if given else ""
    return transport.converted(_exchange("GET", f"/v1/{path}{tail}"), kind)


def change(
    path: str, kind: type[_T], body: Mapping[str, Any] | None = None, *, key: str = "", method: str = "POST"
) -> _T:
    """Change something of the bank, under a key.

    Raises:
        UnreachableError: no answer; the sentence has the key under which asking again is safe.
    """
    name = key or str(uuid.uuid4())
    sent = b"" if body is None else msgspec.json.encode(body)
    try:
        answer = _exchange(method, f"/v1/{path}", sent, {"Idempotency-Key": name})
    except UnreachableError as error:
        raise UnreachableError(f"{error}; to ask again safely, repeat the command with --key {name}") from error
    return transport.converted(answer, kind)


def part(word: str) -> str:
    """Return a word as a part of a path."""
    return quote(word, safe="")


def amount(su: str, micro_su: str = "", *, least: int = 0) -> int:
    """Return the amount that was given in one of two ways.

    Raises:
        UsageError: none was, or both were, or it is no amount, or less than the least.
    """
    if bool(micro_su) == bool(su):
        raise UsageError("give an amount: --su 12.5, or --micro-su 12500000")
    if micro_su and not re.fullmatch(r"-?[0-9]{1,19}", micro_su):
        raise UsageError(f"--micro-su {micro_su[:40]}: write a whole number of micro-SU, like 12500000")
    found = parse_su(su) if su else int(micro_su)
    if not least <= found <= MOST_MICRO_SU:
        most = format_su(MOST_MICRO_SU)
        raise UsageError(f"{format_su(found)} SU is no amount for this; it takes {format_su(least)} to {most} SU")
    return found


def column(amounts: Iterable[int | None]) -> list[str]:
    """Return amounts in SU for one column, exact, all with as many decimals as the most exact needs.

    >>> column([12_500_000, None, -1])
    ['12.500000', '', '-0.000001']
    """
    found = list(amounts)
    decimals = max((_decimals(amount) for amount in found if amount is not None), default=2)
    return ["" if amount is None else _fixed(amount, decimals) for amount in found]


def rounded(amounts: Iterable[int | None]) -> list[str]:
    """Return amounts in SU for a column to look over: two decimals, and what is not nothing is not shown as 0.00.

    >>> rounded([12_345_678, None, 0, 4_999, -1])
    ['12.35', '', '0.00', '<0.01', '>-0.01']
    """
    return [_rounded(amount) for amount in amounts]


def _rounded(amount_micro_su: int | None) -> str:
    if amount_micro_su is None:
        return ""
    cents = (abs(amount_micro_su) + 5_000) // 10_000
    if amount_micro_su and not cents:
        return "<0.01" if amount_micro_su > 0 else ">-0.01"
    return f"{'-' if amount_micro_su < 0 else ''}{cents // 100}.{cents % 100:02}"


def _decimals(amount_micro_su: int) -> int:
    return max(2, len(f"{abs(amount_micro_su) % MICRO_SU_PER_SU:06}".rstrip("0")))


def _fixed(amount_micro_su: int, decimals: int) -> str:
    whole, fraction = divmod(abs(amount_micro_su), MICRO_SU_PER_SU)
    return f"{'-' if amount_micro_su < 0 else ''}{whole}.{f'{fraction:06}'[:decimals]}"


def _exchange(method: str, path: str, body: bytes = b"", more: Mapping[str, str] | None = None) -> object:
    settings = config.load()
    headers = dict(more or {}) | _token()
    answer = transport.request(settings.controller, method, path, body, timeout_s=ANSWER_TIMEOUT_S, more=headers)
    return transport.decoded(asyncio.run(answer))


def _token() -> dict[str, str]:
    name = os.environ.get(TOKEN_FILE)
    if not name:
        return {}
    try:
        return {"Authorization": f"Bearer {Path(name).read_text().strip()}"}
    except OSError as error:
        raise CarrelError(f"{TOKEN_FILE}={name}: {error.strerror}; is it readable by you?") from error
