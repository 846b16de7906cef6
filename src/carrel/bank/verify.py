"""Read the whole ledger once and name every invariant that does not hold.

The journal is replayed from its first transaction: hashes, sums, floors and the money of every lien are computed
anew, and then compared with what the tables say. What is checked here is checked by nothing that wrote it: this
module shares no rule with ``carrel.core``, only the form of the rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from carrel.core.book import ACCOUNTS_EACH, GENESIS, chained
from carrel.model.ledger import AnyCommand, Backfill, Break, Correct, OpenAllocation, Requeue, SetTerms, Settle
from carrel.ports import Reading, Store

CHARGED = frozenset({"settled", "part_refunded", "refunded"})
OPEN = frozenset({"unbound", "bound", "active", "unknown_end"})
FREE_BELOW_FLOOR = frozenset({"settle", "reversal", "adjust"})
"""Kinds of transaction that may leave an account below its floor; others only by a privileged ``overdraw``."""
Price = Callable[[int, dict[str, Any]], int | None]
"""What a run costs by (price version, inputs); None: these inputs are none of ours."""

_Request = msgspec.json.Decoder(AnyCommand)


def verify(store: Store, *, price: Price | None = None) -> list[Break]:
    """Return all breaks; none: the ledger is sound.

    Args:
        store: The ledger, which may be in use meanwhile.
        price: The function that charges were computed by; without it I11 is not checked.
    """
    with store.reading() as session:
        replay = _Replay(session, price)
        found = list(replay.run())
        found += _accounts(session, replay)
        found += _liens(session, replay)
        found += _budgets(session)
        found += _triggers(session)
        return found + list(_keys(session))


class _Replay:
    """The journal, from its beginning."""

    def __init__(self, session: Reading, price: Price | None) -> None:
        self._session = session
        self._price = price
        self.balance: dict[int, int] = defaultdict(int)
        self.credit: dict[int, int] = {}
        self._allocation_of: dict[str, int] = {
            name: number for number, name in session.rows("SELECT id, name FROM allocation")
        }
        self.open: dict[tuple[int, int], int] = defaultdict(int)
        """(lien, allocation) to what is set aside."""
        self.spent: dict[tuple[int, int], int] = defaultdict(int)
        self._settled: set[int] = set()
        """Liens with a settlement in force."""

    def run(self) -> Iterator[Break]:
        entries = self._entries()
        waiting = next(entries, None)
        previous, expected = GENESIS, 1
        for txn in self._session.rows("SELECT seq, at_s, kind, lien, key, flags, request, hash FROM txn ORDER BY seq"):
            seq = txn[0]
            if seq != expected:
                yield Break(invariant="I9", sentence=f"transaction {expected} is missing before {seq}")
            mine: list[Sequence[Any]] = []
            while waiting is not None and waiting[0] <= seq:
                if waiting[0] == seq:
                    mine.append(waiting)
                else:
                    yield Break(
                        invariant="I9", sentence=f"an entry belongs to transaction {waiting[0]}, which is missing"
                    )
                waiting = next(entries, None)
            # The entries are hashed in the order of the accounts, the one that the database can give back.
            digest = chained(previous, txn[:7], [(entry[1], entry[2]) for entry in mine])
            if digest != bytes(txn[7]):
                yield Break(invariant="I9", sentence=f"the hash of transaction {seq} does not follow from what it says")
            previous, expected = bytes(txn[7]), seq + 1
            yield from self._transaction(txn, mine)
        if waiting is not None:
            yield Break(invariant="I9", sentence=f"an entry belongs to transaction {waiting[0]}, which is missing")
        if sum(self.balance.values()):
            yield Break(
                invariant="I1", sentence=f"all accounts together hold {sum(self.balance.values())} micro-SU, not 0"
            )

    def _entries(self) -> Iterator[Sequence[Any]]:
        return iter(self._session.rows("SELECT seq, account, amount, balance FROM entry ORDER BY seq, account"))

    def _transaction(self, txn: Sequence[Any], entries: Sequence[Sequence[Any]]) -> Iterator[Break]:
        seq, _, _, lien, _, _, request, _ = txn
        if left := sum(entry[2] for entry in entries):
            yield Break(invariant="I1", sentence=f"the entries of transaction {seq} sum to {left} micro-SU, not to 0")
        command = _Request.decode(request)
        if isinstance(command, OpenAllocation | SetTerms) and command.allocation in self._allocation_of:
            self.credit[self._allocation_of[command.allocation]] = command.credit_micro_su
        for _, account, amount, balance in entries:
            self.balance[account] += amount
            if self.balance[account] != balance:
                yield Break(
                    invariant="I2",
                    sentence=f"transaction {seq} left {balance} micro-SU on account {account} by its own words, "
                    f"{self.balance[account]} by the sum of entries",
                )
            yield from self._floor(txn, command, account, amount)
            if lien and account % ACCOUNTS_EACH == 1:
                self.open[lien, account // ACCOUNTS_EACH] += amount
            if account > 1 and account % ACCOUNTS_EACH == 2:
                self.spent[lien, account // ACCOUNTS_EACH] += amount
        yield from self._charge(txn, entries, command)

    def _floor(self, txn: Sequence[Any], command: AnyCommand, account: int, amount: int) -> Iterator[Break]:
        allocation, kind = divmod(account, ACCOUNTS_EACH)
        if not allocation:
            return
        balance = self.balance[account]
        if kind and balance < 0:
            name = "I4" if kind == 1 else "I5"
            yield Break(invariant=name, sentence=f"transaction {txn[0]} leaves account {account} at {balance} micro-SU")
        floor = -self.credit.get(allocation, 0)
        if kind == 0 and amount < 0 and balance < floor:
            privileged = txn[2] in FREE_BELOW_FLOOR or getattr(command, "if_short", "") == "overdraw"
            if not privileged or "overdrawn" not in txn[5].split():
                yield Break(
                    invariant="I3",
                    sentence=f"transaction {txn[0]} ({txn[2]}) leaves {balance} micro-SU on account {account}, "
                    f"whose floor is {floor}, and does not say so or may not",
                )

    def _charge(self, txn: Sequence[Any], entries: Sequence[Sequence[Any]], command: AnyCommand) -> Iterator[Break]:
        seq, _, kind, lien = txn[:4]
        spent = sum(entry[2] for entry in entries if entry[1] > 1 and entry[1] % ACCOUNTS_EACH == 2)
        if kind == "settle":
            if lien in self._settled:
                yield Break(invariant="I5", sentence=f"transaction {seq} settles lien {lien}, which is settled already")
            self._settled.add(lien)
            amount = getattr(command, "amount_micro_su", None)
            if amount != spent:
                yield Break(invariant="I5", sentence=f"transaction {seq} charges {spent} micro-SU, asked were {amount}")
            if self._price is not None and isinstance(command, Settle | Requeue | Backfill | Correct):
                due = self._price(command.price_version, command.inputs)
                if due is not None and due != spent:
                    yield Break(invariant="I11", sentence=f"transaction {seq} charges {spent}, its inputs cost {due}")
        elif kind == "reversal":
            self._settled.discard(lien)


def _accounts(session: Reading, replay: _Replay) -> Iterator[Break]:
    seen = set()
    for number, balance, floor, kind, overdrawn in session.rows(
        "SELECT id, balance, floor, kind, overdrawn FROM account"
    ):
        seen.add(number)
        if balance != replay.balance.get(number, 0):
            yield Break(
                invariant="I2",
                sentence=f"account {number} says {balance} micro-SU, its entries sum to "
                f"{replay.balance.get(number, 0)}",
            )
        if kind == "available":
            credit = replay.credit.get(number // ACCOUNTS_EACH, 0)
            if floor != -credit or bool(overdrawn) != (balance < floor):
                yield Break(
                    invariant="I3",
                    sentence=f"account {number} has {balance} micro-SU, a floor of {floor} with a credit of {credit}, "
                    f"and {'is' if overdrawn else 'is not'} flagged as overdrawn",
                )
    for number in sorted(replay.balance.keys() - seen):
        yield Break(invariant="I2", sentence=f"entries name account {number}, which is missing")


def _liens(session: Reading, replay: _Replay) -> Iterator[Break]:
    yield from _legs(session, replay)
    sums = (
        "SELECT lien.id, lien.state, lien.open, lien.charged, lien.refunded, lien.units, lien.unit, lien.expires_s, "
        "lien.run_ref, coalesce(l.open, 0), coalesce(l.charged, 0), coalesce(l.refunded, 0) FROM lien LEFT JOIN "
        "(SELECT lien, sum(open) AS open, sum(charged) AS charged, sum(refunded) AS refunded FROM leg GROUP BY lien) "
        "AS l ON l.lien = lien.id"
    )
    for row in session.rows(sums):
        number, state, opened, charged, refunded, units, unit, expires_s, run_ref = row[:9]
        legs = tuple(int(amount) for amount in row[9:])
        if (opened, charged, refunded) != legs:
            yield Break(invariant="I4", sentence=f"lien {number} says {(opened, charged, refunded)}, its legs {legs}")
        if (state in OPEN and opened != units * unit) or (state not in OPEN and opened):
            yield Break(invariant="I6", sentence=f"lien {number} is {state} and has {opened} micro-SU set aside")
        if refunded > charged or (charged and state not in CHARGED):
            yield Break(invariant="I5", sentence=f"lien {number} is {state}, charged {charged}, refunded {refunded}")
        if state in {"quoted", "unbound", "bound"} and expires_s is None:
            yield Break(invariant="I7", sentence=f"lien {number} is {state} and never expires")
        if state in {"active", "unknown_end"} and run_ref is None:
            yield Break(invariant="I7", sentence=f"lien {number} is {state} and names no run")


def _legs(session: Reading, replay: _Replay) -> Iterator[Break]:
    """A unit split off an array takes money along without a posting, so an array is summed with its parts."""
    for row in session.rows("SELECT lien, allocation, charged - refunded FROM leg"):
        if row[2] != replay.spent.get((row[0], row[1]), 0):
            spent = replay.spent.get((row[0], row[1]), 0)
            sentence = f"lien {row[0]} cost allocation {row[1]} {row[2]} micro-SU by its leg, {spent} by its entries"
            yield Break(invariant="I5", sentence=sentence)
    root = {number: parent or number for number, parent in session.rows("SELECT id, parent FROM lien")}
    said: dict[tuple[int, int], int] = defaultdict(int)
    for lien, allocation, opened in session.rows("SELECT lien, allocation, open FROM leg WHERE open > 0"):
        said[root.get(lien, lien), allocation] += opened
    booked: dict[tuple[int, int], int] = defaultdict(int)
    for (lien, allocation), amount in replay.open.items():
        booked[root.get(lien, lien), allocation] += amount
    for key in sorted(said.keys() | booked.keys()):
        if said.get(key, 0) != booked.get(key, 0):
            lien, allocation = key
            yield Break(
                invariant="I4",
                sentence=f"lien {lien} has {booked.get(key, 0)} micro-SU set aside in allocation {allocation} by its "
                f"entries, {said.get(key, 0)} by its legs",
            )


def _budgets(session: Reading) -> Iterator[Break]:
    parent = {name: above for name, above in session.rows("SELECT name, parent FROM project")}  # noqa: C416  # typed
    due: dict[tuple[str, str], int] = defaultdict(int)
    for project, user, amount in session.rows(
        "SELECT project, username, sum(open + charged - refunded) FROM lien GROUP BY project, username"
    ):
        due[project, user] += int(amount)
        name = project
        while name:
            due[name, ""] += int(amount)
            name = parent.get(name, "")
    said = {
        (project, user): committed
        for project, user, committed in session.rows(
            "SELECT name, '', committed FROM project UNION ALL SELECT project, username, committed FROM member"
        )
    }
    for key in sorted(due.keys() | said.keys()):
        if due.get(key, 0) != said.get(key, 0):
            who = f"user '{key[1]}' in account '{key[0]}'" if key[1] else f"account '{key[0]}'"
            yield Break(
                invariant="I8", sentence=f"{who} counts {said.get(key, 0)} micro-SU, its liens make {due.get(key, 0)}"
            )


def _triggers(session: Reading) -> Iterator[Break]:
    """The database is what refuses a change; look that it still does."""
    for name in sorted(session.unguarded()):
        yield Break(
            invariant="I9", sentence=f"the trigger {name} is missing or off, so rows could be changed; restore it"
        )


def _keys(session: Reading) -> Iterator[Break]:
    lost = "SELECT DISTINCT key FROM txn WHERE NOT EXISTS (SELECT 1 FROM idempotency AS i WHERE i.key = txn.key)"
    for (key,) in session.rows(lost):
        yield Break(invariant="I10", sentence=f"a transaction was written for key '{key}', whose answer is missing")
