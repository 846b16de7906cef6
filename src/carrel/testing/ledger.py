"""The contract of a ledger's database, as tests: inherit it, say how to open your store, and run pytest.

::

    class TestMyDatabase(carrel.testing.LedgerContract):
        @pytest.fixture
        def open_store(self) -> Callable[[], Store]:
            return lambda: MyStore("somewhere")

        @pytest.fixture
        def tamper(self) -> Callable[[str], None]:
            return run_this_sql_past_everything

        @pytest.fixture
        def unguard(self) -> Callable[[str], str]:
            return lambda table: f"ALTER TABLE {table} DISABLE TRIGGER ALL"

Each test begins with an empty ledger and ends with ``verify``. ``LedgerFailureModes``, beside
``LedgerContract``, has the known ways in which banks of job schedulers lose money, named by their numbers.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.model.ledger import (
    Answer,
    AnyCommand,
    Balance,
    Bind,
    Deposit,
    LienView,
    OpenAllocation,
    OpenProject,
    Place,
    Receipt,
    Refusal,
    Start,
)
from carrel.ports import Store

CLUSTER = "c"
NOW_S = 1_000_000


class Clock:
    """The bank's time, moved by hand."""

    def __init__(self) -> None:
        """Begin somewhere."""
        self.now_s = NOW_S

    def __call__(self) -> float:
        return float(self.now_s)


class Teller:
    """A ledger with short words for the commands of tests: each takes a new key, unless it is given one."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        """Use this ledger."""
        self.ledger = ledger
        self.clock = clock
        self._keys = count(1)

    def ask(self, kind: type[Any], **fields: Any) -> Answer:
        return self.ledger.call(self.make(kind, **fields))

    def make(self, kind: type[Any], **fields: Any) -> AnyCommand:
        fields.setdefault("key", f"k{next(self._keys)}")
        known = kind.__struct_fields__
        for name, value in {"cluster": CLUSTER, "reason": "a test", "user": "ada", "project": "physics"}.items():
            if name in known and not (kind.__name__ == "SetCap" and name == "user"):
                fields.setdefault(name, value)
        command: AnyCommand = kind(**fields)
        return command

    def do(self, kind: type[Any], **fields: Any) -> Receipt:
        """Ask, and be sure that it is done."""
        answer = self.ask(kind, **fields)
        assert isinstance(answer, Receipt), answer
        return answer

    def refused(self, kind: type[Any], **fields: Any) -> Refusal:
        """Ask, and be sure that it is refused and nothing changed."""
        before = self.picture()
        answer = self.ask(kind, **fields)
        assert isinstance(answer, Refusal), answer
        assert self.picture() == before, "a refusal changed something"
        assert answer.sentence[-1] != "."
        return answer

    def open(self, amount: int = 0, *, name: str = "grant", project: str = "physics", **terms: Any) -> None:
        """Open an allocation with this much in it; its account too, where it is new."""
        if not any(budget.project == project for budget in queries.budgets(self.ledger.store)):
            self.do(OpenProject, project=project)
        self.do(OpenAllocation, allocation=name, project=project, **terms)
        if amount:
            self.do(Deposit, allocation=name, amount_micro_su=amount)

    def running(self, run: str, amount: int, **more: Any) -> Receipt:
        """Place, bind and start a run."""
        self.do(Place, token=f"t-{run}", amount_micro_su=amount, **more)
        self.do(Bind, token=f"t-{run}", job_id=1, run=run)
        return self.do(Start, run=run, amount_micro_su=amount)

    def balance(self, name: str = "grant") -> Balance:
        (found,) = [one for one in queries.balances(self.ledger.store) if one.allocation == name]
        return found

    def amounts(self, name: str = "grant") -> tuple[int, int, int, int]:
        """Return available, set aside, spent, expired."""
        found = self.balance(name)
        return found.available_micro_su, found.lien_micro_su, found.spent_micro_su, found.expired_micro_su

    def lien(self, *, run: str = "", token: str = "") -> LienView:
        found = queries.lien(self.ledger.store, cluster=CLUSTER, run=run, token=token)
        assert found is not None
        return found

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.ledger.store.reading() as session:
            return [tuple(row) for row in session.rows(sql, *values)]

    def legs(self, run: str) -> list[tuple[Any, ...]]:
        """Return allocation, open, charged, refunded of each leg of a run's lien, in order."""
        return self.rows(
            "SELECT a.name, g.open, g.charged, g.refunded FROM leg AS g JOIN allocation AS a ON a.id = g.allocation "
            "JOIN lien AS l ON l.id = g.lien WHERE l.run_ref = %s ORDER BY g.position",
            f"{CLUSTER}/{run}",
        )

    def journal(self) -> list[tuple[Any, ...]]:
        """Return kind, lien and flags of each transaction."""
        return self.rows("SELECT kind, lien, flags FROM txn ORDER BY seq")

    def moves(self) -> list[tuple[Any, ...]]:
        """Return account and amount of each entry of the last transaction."""
        return self.rows("SELECT account, amount FROM entry WHERE seq = (SELECT max(seq) FROM txn) ORDER BY account")

    def picture(self) -> list[Any]:
        store = self.ledger.store
        views = [queries.balances(store), queries.budgets(store), queries.liens(store), queries.statement(store)]
        return [*views, self.journal()]


class LedgerSuite:
    """What a suite needs: a store to open, again and again, and a way past it."""

    @pytest.fixture
    def open_store(self) -> Callable[[], Store]:
        """Return what opens the same database each time; empty at first."""
        raise NotImplementedError

    @pytest.fixture
    def tamper(self) -> Callable[[str], None]:
        """Return what runs SQL in the database past the store."""
        raise NotImplementedError

    @pytest.fixture
    def unguard(self) -> Callable[[str], str]:
        """Return what makes the SQL that takes the triggers off a table."""
        raise NotImplementedError

    @pytest.fixture
    def teller(self, open_store: Callable[[], Store]) -> Iterator[Teller]:
        """A ledger; what a test left is sound."""
        clock = Clock()
        with Ledger(open_store(), clock=clock) as ledger:
            yield Teller(ledger, clock)
            assert verify(ledger.store) == []


class SqliteSuite(LedgerSuite):
    """For rules that no database has a part in: one is enough."""

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: SqliteStore(tmp_path / "bank.db")
