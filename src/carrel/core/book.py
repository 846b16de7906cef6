"""The rows that a batch of commands works on, in memory: the rules change them here, a store writes them afterwards.

So the rules are the same for every database, and a batch costs a handful of statements whatever it holds. A row knows
its ``version``: the store updates it only where the database still has that one, so that two writers cannot both have
their way.

An allocation is four accounts: what is *available*, what is set aside (*lien*), what is *spent* and what *expired*.
The site has two, which money comes from: *issued* and *adjust*. The sum over all of them is always nil.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from carrel.model.ledger import MoneyState

KINDS = ("available", "lien", "spent", "expired")
ISSUED, ADJUST = 0, 1
"""The site's accounts."""
ACCOUNTS_EACH = 4
RESOLVING = ("settle", "refund", "reversal")
"""Kinds of transaction that a correction undoes."""
GENESIS = bytes(32)


class Row(msgspec.Struct, gc=False):
    """A row that changes. Fields are in the order of the columns; the last, ``version``, is 0 before it is there."""


class Project(Row, gc=False):
    name: str
    parent: str = ""
    cap: int | None = None
    committed: int = 0
    """Spent and set aside by it and all below it."""
    version: int = 0


class Member(Row, gc=False):
    """What one user has spent and set aside in a project."""

    project: str
    user: str
    cap: int | None = None
    committed: int = 0
    version: int = 0


class Allocation(Row, gc=False):
    id: int
    name: str
    project: str
    start_s: int
    end_s: int | None
    priority: int
    credit: int
    version: int = 0

    def usable(self, now_s: int) -> bool:
        return self.start_s <= now_s and not self.ended(now_s)

    def ended(self, now_s: int) -> bool:
        return self.end_s is not None and self.end_s <= now_s

    @property
    def order(self) -> tuple[int, float, int]:
        """Which is drawn on first."""
        return (-self.priority, float("inf") if self.end_s is None else self.end_s, self.id)


class Account(Row, gc=False):
    id: int
    allocation: int
    """0: the site's."""
    kind: str
    balance: int
    floor: int
    overdrawn: bool = False
    """Below its floor, which the database takes only where this says so."""
    version: int = 0


class Lien(Row, gc=False):
    id: int
    cluster: str
    token_ref: str | None
    run_ref: str | None
    job_id: int
    project: str
    user: str
    state: MoneyState
    units: int
    unit: int
    """Price of one unit, quoted or set aside."""
    open: int = 0
    charged: int = 0
    refunded: int = 0
    expires_s: int | None = None
    flags: str = ""
    parent: int = 0
    """The array's lien that it was split off from."""
    version: int = 0

    @property
    def weight(self) -> int:
        """What it counts for against caps."""
        return self.open + self.charged - self.refunded


class Leg(Row, gc=False):
    """The part of a lien that one allocation carries."""

    lien: int
    position: int
    allocation: int
    open: int = 0
    charged: int = 0
    refunded: int = 0
    version: int = 0


class Txn(msgspec.Struct, frozen=True, gc=False):
    """One transaction of the journal; its hash covers its entries and the transaction before it."""

    seq: int
    at_s: int
    kind: str
    lien: int
    key: str
    flags: str
    request: str
    """The command, as JSON: who, why, and from which inputs."""
    hash: bytes


class Entry(msgspec.Struct, frozen=True, gc=False):
    seq: int
    account: int
    amount: int
    balance: int
    """What it left on the account."""


class Key(msgspec.Struct, frozen=True, gc=False):
    key: str
    request_hash: bytes
    answer: str
    at_s: int


def token_ref(cluster: str, token: str, het_offset: int) -> str:
    return f"{cluster}/{token}/{het_offset}"


def run_ref(cluster: str, run: str) -> str:
    return f"{cluster}/{run}"


_encoder = msgspec.json.Encoder()


def chained(previous: bytes, fields: Iterable[Any], entries: Iterable[tuple[int, int]]) -> bytes:
    """Return the hash of a transaction: its fields but the hash, and (account, amount) of its entries in order."""
    return hashlib.sha256(previous + _encoder.encode((*fields, *entries))).digest()


class Book:
    """What was loaded, what changed, and what is new; a rule refuses before it changes anything."""

    def __init__(self, *, now_s: int, seq: int, last_hash: bytes, last_lien: int, last_allocation: int) -> None:
        """Begin after the last transaction."""
        self.now_s = now_s
        self.seq = seq
        self.last_hash = last_hash
        self.last_lien = last_lien
        self.last_allocation = last_allocation
        self.keys: dict[str, Key] = {}
        self.projects: dict[str, Project] = {}
        self.members: dict[tuple[str, str], Member] = {}
        self.allocations: dict[str, Allocation] = {}
        self.allocations_by_id: dict[int, Allocation] = {}
        self.accounts: dict[int, Account] = {}
        self.liens: dict[int, Lien] = {}
        self.by_token: dict[str, Lien] = {}
        self.by_run: dict[str, Lien] = {}
        self.legs: dict[int, list[Leg]] = {}
        self.resolved: dict[int, dict[int, int]] = {}
        """For liens that a command corrects: what their settlements and refunds did to each account, in all."""
        self.new_keys: list[Key] = []
        self.txns: list[Txn] = []
        self.entries: list[Entry] = []
        self.changed: dict[type[Row], dict[int, Row]] = {
            kind: {} for kind in (Project, Member, Allocation, Account, Lien, Leg)
        }
        self._ordered: dict[str, list[Allocation]] = {}
        self._budgets: dict[tuple[str, str], list[Project | Member]] = {}

    def touch(self, row: Row) -> None:
        """Have the row written with the batch."""
        self.changed[type(row)][id(row)] = row

    def add_project(self, project: Project) -> None:
        self.projects[project.name] = project

    def add_allocation(self, allocation: Allocation) -> None:
        self.allocations[allocation.name] = allocation
        self.allocations_by_id[allocation.id] = allocation
        self._ordered.clear()

    def add_lien(self, lien: Lien) -> None:
        self.liens[lien.id] = lien
        self.legs.setdefault(lien.id, [])
        if lien.token_ref:
            self.by_token[lien.token_ref] = lien
        if lien.run_ref:
            self.by_run[lien.run_ref] = lien

    def new_lien(self, **fields: Any) -> Lien:
        self.last_lien += 1
        lien = Lien(id=self.last_lien, **fields)
        self.add_lien(lien)
        self.touch(lien)
        return lien

    def leg(self, lien: Lien, allocation: int) -> Leg:
        """Return the lien's leg on an allocation; a new last one where it has none."""
        legs = self.legs[lien.id]
        for leg in legs:
            if leg.allocation == allocation:
                self.touch(leg)
                return leg
        leg = Leg(lien=lien.id, position=len(legs), allocation=allocation)
        legs.append(leg)
        self.touch(leg)
        return leg

    def usable(self, project: str) -> list[Allocation]:
        """Return the project's allocations that are valid now, the one to draw on first first."""
        found = self._ordered.get(project)
        if found is None:
            mine = (a for a in self.allocations_by_id.values() if a.project == project and a.usable(self.now_s))
            found = self._ordered[project] = sorted(mine, key=lambda a: a.order)
        return found

    def latest(self, project: str) -> Allocation | None:
        """Return the allocation that owes what no valid one covers: the project's last."""
        mine = [a for a in self.allocations_by_id.values() if a.project == project]
        return max(mine, key=lambda a: (float("inf") if a.end_s is None else a.end_s, a.id), default=None)

    def reorder(self) -> None:
        """Forget in which order allocations are drawn on, after their terms changed."""
        self._ordered.clear()

    def account(self, allocation: int, kind: str) -> Account:
        return self.accounts[allocation * ACCOUNTS_EACH + KINDS.index(kind)]

    def available(self, allocation: Allocation) -> Account:
        return self.accounts[allocation.id * ACCOUNTS_EACH]

    def nodes(self, lien: Lien) -> list[Project | Member]:
        """Return what the lien counts against: its user in its project, the project, and all above it."""
        return self.budget(lien.project, lien.user)

    def budget(self, project: str, user: str) -> list[Project | Member]:
        known = self._budgets.get((project, user))
        if known is not None:
            return known
        found: list[Project | Member] = [self.member(project, user)]
        self._budgets[project, user] = found
        name = project
        while name:
            node = self.projects[name]
            found.append(node)
            name = node.parent
        return found

    def member(self, project: str, user: str) -> Member:
        member = self.members.get((project, user))
        if member is None:
            member = self.members[project, user] = Member(project=project, user=user)
        return member

    def weigh(self, lien: Lien, before: int) -> None:
        """Count a lien's change against its caps."""
        if (delta := lien.weight - before) != 0:
            for node in self.nodes(lien):
                node.committed += delta
                self.touch(node)

    def post(self, command: "Posting", moves: Mapping[int, int], *, flags: str = "") -> str:
        """Write one transaction and return its flags, with ``overdrawn`` where it left an account below its floor.

        Args:
            command: What it is written for.
            moves: What each account gains; the sum is nil.
            flags: Flags to begin with.
        """
        if sum(moves.values()):
            raise RuntimeError(f"a transaction of kind {command.kind} sums to {sum(moves.values())}, not to nil")
        # In the order in which the database gives them back, so that the hash can be computed again.
        kept = sorted((number, amount) for number, amount in moves.items() if amount)
        self.seq += 1
        for number, amount in kept:
            account = self.accounts[number]
            account.balance += amount
            below = account.kind == "available" and account.balance < account.floor
            if below and amount < 0:
                if not command.may_overdraw:
                    raise RuntimeError(f"a transaction of kind {command.kind} would overdraw account {number}")
                flags = joined(flags, "overdrawn")
            account.overdrawn = below
            self.touch(account)
            self.entries.append(Entry(self.seq, number, amount, account.balance))
        fields = (self.seq, self.now_s, command.kind, command.lien, command.key, flags, command.request)
        self.last_hash = chained(self.last_hash, fields, kept)
        self.txns.append(Txn(*fields, self.last_hash))
        if command.lien in self.resolved and command.kind in RESOLVING:
            net = self.resolved[command.lien]
            for number, amount in kept:
                net[number] = net.get(number, 0) + amount
        return flags


class Posting(msgspec.Struct, frozen=True):
    """Why a transaction is written."""

    kind: str
    key: str
    request: str
    lien: int = 0
    may_overdraw: bool = False


def joined(flags: str, flag: str) -> str:
    """Return the flags, separated by spaces, with one more."""
    return flags if flag in flags.split() else f"{flags} {flag}".strip()
