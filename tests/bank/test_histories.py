"""Random histories of the whole ledger against a model of a page: per account three sums, per run one state.

``verify`` runs after every step, and any command may come again, at once or later. ``CARREL_MODEL_EXAMPLES`` asks
for more histories than ``make check`` has time for.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.model.ledger import (
    Adjust,
    Answer,
    AnyCommand,
    Backfill,
    Balance,
    Bind,
    CarryOver,
    Correct,
    Deposit,
    MarkUnknown,
    OpenAllocation,
    OpenProject,
    Place,
    Receipt,
    Refund,
    Reprice,
    Requeue,
    SetCap,
    SetTerms,
    Settle,
    Start,
    Sweep,
    Transfer,
    Void,
)
from carrel.testing.ledger import CLUSTER, Clock, Teller

OPEN = {"unbound", "bound", "active", "unknown_end"}
CHARGED = {"settled", "part_refunded", "refunded"}
PARENT = {"physics": "faculty", "biology": "faculty", "faculty": ""}
amounts = st.one_of(st.integers(0, 60), st.sampled_from([0, 1, 100, 1000]))
positive = st.integers(1, 80)
users = st.sampled_from(["ada", "bob"])
projects = st.sampled_from(["physics", "biology"])


class Run(msgspec.Struct, kw_only=True):
    """The money of one run, or of an array's tasks that have not started."""

    project: str
    user: str
    unit: int
    units: int = 1
    state: str = "unbound"
    run: str = ""
    charged: int = 0
    refunded: int = 0
    expires_s: int | None = None

    @property
    def open(self) -> int:
        return self.unit * self.units if self.state in OPEN else 0

    @property
    def weight(self) -> int:
        return self.open + self.charged - self.refunded


class Histories(RuleBasedStateMachine):
    """Users, Slurm, people of the bank, and time."""

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a place: what a power cut leaves is another test's business.
        self.where = Path(tempfile.mkdtemp(prefix="bank.", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.clock = Clock()
        self.ledger = Ledger(SqliteStore(self.where / "bank.db"), clock=self.clock)
        self.teller = Teller(self.ledger, self.clock)
        self.tokens: dict[str, Run] = {}
        self.runs: dict[str, Run] = {}
        self.every: list[Run] = []
        self.caps: dict[tuple[str, str], int | None] = {}
        self.said: list[tuple[AnyCommand, Answer]] = []
        self.income = 0
        """All that came in: deposits and adjustments."""
        self.number = 0
        for name in ("faculty", "physics", "biology"):
            self.teller.do(OpenProject, project=name, parent=PARENT[name])
        self.ends: dict[str, int | None] = {}
        for name, project, end_s, credit, priority in (
            ("p1", "physics", None, 0, 0),
            ("p2", "physics", self.clock.now_s + 200, 30, 1),
            ("b1", "biology", None, 5, 0),
        ):
            self.teller.do(
                OpenAllocation, allocation=name, project=project, end_s=end_s, credit_micro_su=credit, priority=priority
            )
            self.ends[name] = end_s

    # What the model knows

    def ask(self, kind: type[Any], **fields: Any) -> Receipt | None:
        command = self.teller.make(kind, **fields)
        answer = self.ledger.call(command)
        self.said.append((command, answer))
        return answer if isinstance(answer, Receipt) else None

    def balances(self, project: str = "") -> list[Balance]:
        return queries.balances(self.ledger.store, project=project)

    def left(self, project: str) -> int:
        usable = [one for one in self.balances(project) if self.usable(one)]
        return sum(max(0, one.available_micro_su + one.credit_micro_su) for one in usable)

    def usable(self, one: Balance) -> bool:
        end_s = self.ends[one.allocation]
        return end_s is None or self.clock.now_s < end_s

    def committed(self, project: str, user: str = "") -> int:
        def counts(run: Run) -> bool:
            if user:
                return run.project == project and run.user == user
            return run.project == project or PARENT[run.project] == project

        return sum(run.weight for run in self.every if counts(run))

    def affords(self, project: str, user: str, need: int) -> bool:
        if need <= 0:
            return True
        nodes = [(project, user), (project, ""), (PARENT[project], "")]
        fits = all(
            cap is None or self.committed(*node) + need <= cap for node in nodes for cap in [self.caps.get(node)]
        )
        return fits and self.left(project) >= need

    def add(self, run: Run) -> Run:
        self.every.append(run)
        return run

    def pick(self, data: st.DataObject, *states: str) -> str | None:
        names = sorted(name for name, run in self.runs.items() if run.state in states)
        return data.draw(st.sampled_from(names)) if names else None

    # Jobs

    @rule(project=projects, user=users, unit=amounts, units=st.sampled_from([1, 1, 3]))
    def a_job_is_submitted(self, project: str, user: str, unit: int, units: int) -> None:
        self.number += 1
        token = f"t{self.number}"
        fits = self.affords(project, user, unit * units)
        done = self.ask(Place, token=token, project=project, user=user, amount_micro_su=unit, units=units)
        assert (done is not None) == fits, "a lien is placed exactly where it is covered"
        if done:
            self.tokens[token] = self.add(
                Run(project=project, user=user, unit=unit, units=units, expires_s=self.clock.now_s + 120)
            )

    @rule(project=projects, more=st.integers(0, 1))
    def a_job_asks_for_the_exact_balance_or_one_more(self, project: str, more: int) -> None:
        self.a_job_is_submitted(project=project, user="ada", unit=self.left(project) + more, units=1)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), user=users)
    def a_job_is_seen(self, data: st.DataObject, user: str) -> None:
        token = data.draw(st.sampled_from(sorted(self.tokens)))
        lien = self.tokens[token]
        run = f"r-{token}" if lien.units == 1 and not lien.run else ""
        was = lien.state
        done = self.ask(Bind, token=token, user=user, job_id=7, run=run)
        if was == "unbound":
            assert (done is not None) == (user == lien.user)
            if done:
                lien.state, lien.run, lien.expires_s = "bound", run, self.clock.now_s + 84 * 86400
                if run:
                    self.runs[run] = lien

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), unit=amounts, short=st.sampled_from(["refuse", "keep", "overdraw"]))
    def a_task_starts(self, data: st.DataObject, unit: int, short: str) -> None:
        token = data.draw(st.sampled_from(sorted(self.tokens)))
        lien = self.tokens[token]
        self.number += 1
        name = lien.run or f"s{self.number}"
        fits = self.affords(lien.project, lien.user, unit - lien.unit)
        expected = lien.state in OPEN and (fits or short != "refuse")
        done = self.ask(Start, run=name, token=token, amount_micro_su=unit, if_short=short)
        assert (done is not None) == expected
        if not done:
            return
        if lien.units > 1:
            lien.units -= 1
            lien = self.add(Run(project=lien.project, user=lien.user, unit=lien.unit))
        if fits or short == "overdraw":
            lien.unit = unit
        lien.state, lien.run, lien.expires_s = "active", name, None
        self.runs[name] = lien

    @rule(data=st.data(), unit=amounts)
    def a_limit_is_changed(self, data: st.DataObject, unit: int) -> None:
        if name := self.pick(data, "bound", "active", "unknown_end", "settled"):
            lien = self.runs[name]
            fits = self.affords(lien.project, lien.user, (unit - lien.unit) * lien.units)
            done = self.ask(Reprice, run=name, amount_micro_su=unit)
            assert (done is not None) == (lien.state in OPEN and fits)
            if done:
                lien.unit = unit

    @rule(data=st.data(), amount=amounts)
    def a_run_ends(self, data: st.DataObject, amount: int) -> None:
        if name := self.pick(data, "bound", "active", "unknown_end", *CHARGED):
            lien = self.runs[name]
            again = lien.state in CHARGED
            done = self.ask(Settle, run=name, amount_micro_su=amount)
            assert (done is not None) == (not again or lien.charged == amount)
            if not again:
                lien.state, lien.charged, lien.expires_s = "settled", amount, None

    @rule(data=st.data(), amount=amounts, following=amounts)
    def a_run_is_requeued(self, data: st.DataObject, amount: int, following: int) -> None:
        if name := self.pick(data, "active"):
            lien = self.runs[name]
            self.number += 1
            done = self.ask(
                Requeue, run=name, amount_micro_su=amount, next_run=f"q{self.number}", next_amount_micro_su=following
            )
            assert done is not None
            lien.state, lien.charged = "settled", amount
            if "next_refused" not in done.flags:
                self.runs[f"q{self.number}"] = self.add(
                    Run(
                        project=lien.project,
                        user=lien.user,
                        unit=following,
                        state="bound",
                        run=f"q{self.number}",
                        expires_s=self.clock.now_s + 84 * 86400,
                    )
                )

    @rule(project=projects, user=users, amount=amounts)
    def a_run_is_found_afterwards(self, project: str, user: str, amount: int) -> None:
        self.number += 1
        name = f"f{self.number}"
        assert self.ask(Backfill, run=name, project=project, user=user, amount_micro_su=amount)
        self.runs[name] = self.add(Run(project=project, user=user, unit=0, state="settled", run=name, charged=amount))

    @rule(data=st.data())
    def a_run_is_lost_from_sight(self, data: st.DataObject) -> None:
        if name := self.pick(data, "bound", "active"):
            assert self.ask(MarkUnknown, run=name)
            self.runs[name].state, self.runs[name].expires_s = "unknown_end", None

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def a_job_is_cancelled(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.tokens)))
        lien = self.tokens[token]
        done = self.ask(Void, token=token)
        assert (done is not None) == (lien.state in {"unbound", "bound", "unknown_end", "void"})
        if done:
            lien.state, lien.expires_s = "void", None

    # People of the bank

    @rule(data=st.data(), amount=positive)
    def a_charge_is_refunded(self, data: st.DataObject, amount: int) -> None:
        if name := self.pick(data, *CHARGED):
            lien = self.runs[name]
            done = self.ask(Refund, run=name, amount_micro_su=amount, successor="p1")
            assert (done is not None) == (amount <= lien.charged - lien.refunded)
            if done:
                lien.refunded += amount
                lien.state = "refunded" if lien.refunded == lien.charged else "part_refunded"

    @rule(data=st.data(), amount=amounts)
    def a_charge_is_corrected(self, data: st.DataObject, amount: int) -> None:
        if name := self.pick(data, *CHARGED):
            lien = self.runs[name]
            assert self.ask(Correct, run=name, amount_micro_su=amount)
            if lien.charged != amount:
                lien.charged, lien.refunded = amount, min(lien.refunded, amount)
                full = "refunded" if lien.refunded == lien.charged else "part_refunded"
                lien.state = full if lien.refunded else "settled"

    @rule(name=st.sampled_from(["p1", "p2", "b1"]), amount=positive)
    def money_comes(self, name: str, amount: int) -> None:
        assert self.ask(Deposit, allocation=name, amount_micro_su=amount)
        self.income += amount

    @rule(name=st.sampled_from(["p1", "p2", "b1"]), amount=st.integers(-50, 50))
    def somebody_adjusts(self, name: str, amount: int) -> None:
        assert self.ask(Adjust, allocation=name, amount_micro_su=amount)
        self.income += amount

    @rule(kind=st.sampled_from([Transfer, CarryOver]), names=st.permutations(["p1", "p2", "b1"]), amount=positive)
    def money_moves(self, kind: type[Any], names: list[str], amount: int) -> None:
        (source,) = [one for one in self.balances() if one.allocation == names[0]]
        has = source.available_micro_su if kind is Transfer else source.expired_micro_su
        done = self.ask(kind, source=names[0], target=names[1], amount_micro_su=amount)
        assert (done is not None) == (amount <= has)

    @rule(project=st.sampled_from(["physics", "biology", "faculty"]), user=st.sampled_from(["", "ada"]), cap=amounts)
    def a_cap_is_set(self, project: str, user: str, cap: int) -> None:
        value = None if cap == 0 else cap
        assert self.ask(SetCap, project=project, user=user, cap_micro_su=value)
        self.caps[project, user] = value

    @rule(credit=amounts, later=st.integers(0, 200))
    def terms_change(self, credit: int, later: int) -> None:
        end_s = self.clock.now_s + later
        assert self.ask(SetTerms, allocation="p2", end_s=end_s, credit_micro_su=credit, priority=later % 3)
        self.ends["p2"] = end_s

    @rule(seconds=st.sampled_from([1, 119, 120, 200, 84 * 86400]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @rule()
    def the_bank_sweeps(self) -> None:
        assert self.ask(Sweep)
        for lien in self.every:
            if lien.state in {"unbound", "bound"} and lien.expires_s is not None and lien.expires_s <= self.clock.now_s:
                lien.state, lien.expires_s = "void", None
        ended = [one for one in self.balances() if not self.usable(one)]
        assert all(one.available_micro_su <= 0 for one in ended), "what an ended allocation had left is expired"

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def a_command_comes_again(self, data: st.DataObject) -> None:
        command, answer = data.draw(st.sampled_from(self.said))
        before = self.teller.picture()
        assert self.ledger.call(command) == answer
        assert self.teller.picture() == before

    @rule()
    def the_bank_restarts(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(SqliteStore(self.where / "bank.db"), clock=self.clock)
        self.teller.ledger = self.ledger

    # What is always so

    @invariant()
    def the_ledger_is_sound(self) -> None:
        assert verify(self.ledger.store) == []

    @invariant()
    def every_sum_is_the_models(self) -> None:
        found = self.balances()
        whole = sum(
            one.available_micro_su + one.lien_micro_su + one.spent_micro_su + one.expired_micro_su for one in found
        )
        assert whole == self.income
        assert sum(one.lien_micro_su for one in found) == sum(run.open for run in self.every)
        assert sum(one.spent_micro_su for one in found) == sum(run.charged - run.refunded for run in self.every)
        for budget in queries.budgets(self.ledger.store):
            assert budget.committed_micro_su == self.committed(budget.project, budget.user)

    @invariant()
    def every_run_is_in_the_models_state(self) -> None:
        for name, run in self.runs.items():
            view = queries.lien(self.ledger.store, cluster=CLUSTER, run=name)
            assert view is not None
            assert (view.state, view.charged_micro_su, view.refunded_micro_su) == (run.state, run.charged, run.refunded)

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.where)


EXAMPLES = os.environ.get("CARREL_MODEL_EXAMPLES", "")

LONG = settings(
    max_examples=int(EXAMPLES or 8),
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate] if EXAMPLES else list(Phase),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class ManyHistories(Histories):
    """The same in many histories that are as long as a run's life and a quarrel about its charge."""


TestHistories = pytest.mark.timeout(0 if EXAMPLES else 120)(Histories.TestCase)
TestHistories.settings = LONG
TestManyHistories = pytest.mark.fuzz(pytest.mark.timeout(900)(ManyHistories.TestCase))
TestManyHistories.settings = settings(LONG, max_examples=1000, stateful_step_count=12)
