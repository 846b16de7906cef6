"""When an account has used so much that somebody should know.

What counts is what was *charged*, of all that the account ever had in allocations that are valid: liens come and go
with every job, and an alert that comes and goes with them is soon not read.
"""

from collections.abc import Iterable, Sequence

import msgspec

from carrel.model.ledger import Balance

THRESHOLDS = (50, 75, 90, 100)


class Usage(msgspec.Struct, frozen=True):
    """What an account was given and what of it is used up."""

    given_micro_su: int
    spent_micro_su: int

    @property
    def percent(self) -> int:
        """Return whole percent, rounded down; 100 only when nothing is left. Nothing given and something spent: 100."""
        if self.given_micro_su <= 0:
            return 100 if self.spent_micro_su > 0 else 0
        return self.spent_micro_su * 100 // self.given_micro_su


def usage(balances: Iterable[Balance], now_s: int) -> dict[str, Usage]:
    """Return the usage of each account with an allocation that is valid now."""
    found: dict[str, Usage] = {}
    for one in balances:
        if one.start_s <= now_s and (one.end_s is None or now_s < one.end_s):
            before = found.get(one.project, Usage(0, 0))
            given = one.available_micro_su + one.lien_micro_su + one.spent_micro_su
            found[one.project] = Usage(before.given_micro_su + given, before.spent_micro_su + one.spent_micro_su)
    return found


def reached(use: Usage, thresholds: Sequence[int] = THRESHOLDS) -> int:
    """Return the highest threshold that is reached; 0: none.

    >>> reached(Usage(100, 89)), reached(Usage(100, 90)), reached(Usage(100, 120))
    (75, 90, 100)
    """
    return max((threshold for threshold in thresholds if use.percent >= threshold), default=0)
