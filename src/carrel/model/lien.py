"""A lien is the money set aside for one run, so that nobody spends the same units twice.

The bank owns it. It is placed once and resolved once, by a charge.
"""

from typing import Literal

import msgspec

LienState = Literal["none", "open", "resolved", "waived"]
"""``waived``: this site runs no bank, so the run counts as paid for and nothing is ever settled."""


class Lien(msgspec.Struct, frozen=True, kw_only=True):
    """What the bank says about one run; no answer from the bank is not a state."""

    state: LienState
    amount_micro_su: int = 0
    """Set aside while ``open``, charged once ``resolved``."""

    @property
    def paid(self) -> bool:
        return self.state in {"open", "waived"}


NONE = Lien(state="none")
WAIVED = Lien(state="waived")
