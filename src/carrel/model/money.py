"""Money is an integer number of micro-SU from end to end; a decimal point appears only in front of a person.

A float cannot hold a tenth, and sums of such numbers drift. So text is read digit by digit, and what does not fit
exactly is refused rather than rounded.
"""

import re
from collections.abc import Iterable

from carrel.errors import UsageError

MICRO_SU_PER_SU = 1_000_000
MOST_MICRO_SU = 10**18
"""What one command may carry: a million million SU, a million times what a large cluster uses in a year."""
HELD_MICRO_SU = 2**63 - 1
"""What an account of the ledger can hold."""

_SU = re.compile(r"([+-]?)([0-9]{1,13})(?:\.([0-9]{1,6}))?")


def parse_su(text: str) -> int:
    """Return an amount of SU, as a person writes it, in micro-SU.

    Raises:
        UsageError: it is no decimal number, has more than six decimals, or is larger than the ledger takes.

    >>> parse_su("12.5")
    12500000
    """
    if not (found := _SU.fullmatch(text.strip())):
        raise UsageError(f"'{text[:40]}' is no amount of SU; write digits with at most six decimals, like 12.5")
    sign, whole, fraction = found.groups(default="")
    amount = int(whole) * MICRO_SU_PER_SU + int(fraction.ljust(6, "0"))
    if amount > MOST_MICRO_SU:
        raise UsageError(
            f"{text.strip()} SU is more than the ledger takes at once; the most is {MOST_MICRO_SU // 10**6}"
        )
    return -amount if sign == "-" else amount


def format_su(amount_micro_su: int) -> str:
    """Return the amount in SU, exactly, with two decimals or as many as it needs.

    >>> format_su(-12_500_000)
    '-12.50'
    >>> format_su(1)
    '0.000001'
    """
    whole, fraction = divmod(abs(amount_micro_su), MICRO_SU_PER_SU)
    digits = f"{fraction:06}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount_micro_su < 0 else ''}{whole}.{digits}"


def total(amounts_micro_su: Iterable[int]) -> int:
    """Return the sum.

    Raises:
        UsageError: an account could not hold it.
    """
    amount = sum(amounts_micro_su)
    if abs(amount) > HELD_MICRO_SU:
        raise UsageError(f"{amount} micro-SU is more than an account can hold; the most is {HELD_MICRO_SU}")
    return amount
