"""Who may ask the bank what: people as Slurm knows them, and tokens for programs."""

from collections.abc import Mapping
from typing import Literal

import msgspec

Scope = Literal["read", "admin"]
"""``read``: what its user may read. ``admin``: all that an administrator may do."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a token: not the secret itself."""

    name: str
    user: str
    scope: Scope
    note: str
    created_s: int
    expires_s: int
    revoked_s: int
    """0: in force until it expires."""

    def good(self, now_s: int) -> bool:
        return not self.revoked_s and now_s < self.expires_s


class Associations(msgspec.Struct, frozen=True, kw_only=True):
    """What Slurm's accounting says of people."""

    accounts: Mapping[str, str] = {}
    """Account to the account above it; empty: none but ``root``."""
    users: Mapping[str, frozenset[str]] = {}
    """Account to its users."""
    coordinators: Mapping[str, frozenset[str]] = {}
    """Account to those who may manage it, and so all below it."""
    administrators: frozenset[str] = frozenset()

    def knows(self, user: str) -> bool:
        """Tell whether the user may use or manage anything."""
        listed = (*self.users.values(), *self.coordinators.values(), self.administrators)
        return any(user in names for names in listed)

    def coordinates(self, user: str, account: str) -> bool:
        """Tell whether the user coordinates the account or one above it."""
        seen: set[str] = set()
        while account and account not in seen:
            if user in self.coordinators.get(account, frozenset()):
                return True
            seen.add(account)
            account = self.accounts.get(account, "")
        return False


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """A caller, and what they may."""

    user: str
    writes: bool
    """May change what an administrator may change."""
    sees_all: bool
    associations: Associations | None = None
    """None: Slurm keeps no accounting, or has not answered yet."""

    token: str = ""
    """Name of the token that they came with; empty: they came themselves."""

    @property
    def actor(self) -> str:
        """What the journal says of them."""
        return f"{self.user}+{self.token}" if self.token else self.user

    def belongs(self, account: str) -> bool:
        """Tell whether the account is theirs to use, as Slurm says."""
        return self.associations is not None and self.user in self.associations.users.get(account, frozenset())

    def reads(self, account: str) -> bool:
        """Tell whether all of the account is theirs to read: statement, users, charges."""
        return self.sees_all or (self.associations is not None and self.associations.coordinates(self.user, account))
