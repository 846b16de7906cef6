"""Who would pay for a submission, and whether they could now: what ``carrel quote`` adds to the amount."""

import asyncio
import os
import pwd

import msgspec

from carrel.cli import desk
from carrel.config import Config
from carrel.daemons.bank_views import AccountView
from carrel.errors import CarrelError
from carrel.model.money import format_su
from carrel.slurm import facts


class Payer(msgspec.Struct, frozen=True, kw_only=True):
    """An account, seen before a job is submitted. Another job may be there first, so this is no promise."""

    account: str
    available_micro_su: int | None = None
    """What the user may have set aside in it now; null: not known."""
    why: str = ""
    """Why it is not known."""

    def told(self, amount_micro_su: int) -> str:
        """Return what it means for a job that may cost so much; empty: nobody can say who would pay."""
        if self.available_micro_su is None:
            return self.why and f"what is left for it is not known: {self.why}"
        left = f"account '{self.account}' has {format_su(self.available_micro_su)} SU left"
        if amount_micro_su <= self.available_micro_su:
            return left
        return f"{left}, so it would be refused; see: carrel account show {self.account}"


def payer(settings: Config, account: str) -> Payer | None:
    """Return who would pay, and what they have; None: no bank of ours decides here.

    Args:
        settings: The site's.
        account: What the submission names; empty: the user's default one.
    """
    if not settings.bank.enabled or settings.bank.provider != "carrel":
        return None
    chosen = account
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
        chosen = account or asyncio.run(facts.default_account(settings.slurm, user)) or settings.bank.default_account
        if not chosen:
            return Payer(account="")
        return Payer(account=chosen, available_micro_su=_left(chosen, user))
    except (CarrelError, KeyError) as error:
        return Payer(account=chosen, why=str(error))


def _left(account: str, user: str) -> int:
    """Return what a lien could take: of each allocation that is valid, below the caps that the caller may see."""
    seen = desk.ask(f"accounts/{desk.part(account)}", AccountView)
    valid = (each for each in seen.allocations if each.state == "valid")
    left = sum(max(0, each.available_micro_su + each.credit_micro_su) for each in valid)
    caps = [(seen.cap_micro_su, seen.counted_micro_su)]
    caps += [(each.cap_micro_su, each.counted_micro_su) for each in seen.users if each.user == user]
    return min([left, *(max(0, cap - counted) for cap, counted in caps if cap is not None)])
