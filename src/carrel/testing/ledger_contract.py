"""What every database of the ledger promises: one store, one law, whatever happens at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from carrel.bank import queries
from carrel.bank.ledger import Ledger
from carrel.bank.tables import TABLES
from carrel.bank.verify import verify
from carrel.errors import UnreachableError, UsageError
from carrel.model.ledger import (
    Adjust,
    Bind,
    CarryOver,
    Correct,
    Deposit,
    OpenAllocation,
    OpenProject,
    Place,
    Quote,
    Receipt,
    Refund,
    Requeue,
    SetCap,
    SetTerms,
    Settle,
    Start,
    StatementLine,
    Sweep,
    Transfer,
    Void,
)
from carrel.ports import Store
from carrel.testing.ledger import NOW_S, Clock, LedgerSuite, Teller

TAMPERING = {
    "I1": ("entry", "UPDATE entry SET amount = amount + 1 WHERE account = 4"),
    "I2": ("", "UPDATE account SET balance = balance + 1 WHERE id = 4"),
    "I3": ("", "UPDATE account SET floor = -1000 WHERE id = 4"),
    "I4": ("", "UPDATE leg SET open = open + 1"),
    "I5": ("", "UPDATE leg SET charged = 3"),
    "I6": ("", "UPDATE lien SET units = 2"),
    "I7": ("", "UPDATE lien SET expires_s = NULL, run_ref = 'c/r'"),
    "I8": ("", "UPDATE project SET committed = committed + 1"),
    "I9": ("txn", "UPDATE txn SET at_s = at_s + 1 WHERE seq = 2"),
    "I10": ("idempotency", "DELETE FROM idempotency WHERE key = 'k1'"),
}
"""Invariant to the table whose triggers must go first, and the damage."""


class LedgerContract(LedgerSuite):
    """The promises of a store, and of the ledger on top of it."""

    def test_a_lien_may_take_the_last_micro_su_but_not_one_more(self, teller: Teller) -> None:
        teller.open(100)
        refusal = teller.refused(Place, token="t", amount_micro_su=101)
        assert (refusal.why, refusal.needed_micro_su, refusal.available_micro_su) == ("funds", 101, 100)
        assert refusal.sentence.startswith("account 'physics' has 0.0001 SU left, this job may need 0.000101 SU; see: ")
        teller.do(Place, token="t", amount_micro_su=100)
        assert teller.amounts() == (0, 100, 0, 0)

    def test_the_same_request_again_is_answered_as_the_first_time_and_changes_nothing(self, teller: Teller) -> None:
        teller.open(100)
        first = teller.do(Place, key="once", token="t", amount_micro_su=60)
        before = teller.picture()
        assert teller.ask(Place, key="once", token="t", amount_micro_su=60) == first
        assert teller.ask(Place, key="once", token="t", amount_micro_su=61).why == "conflict"  # type: ignore[union-attr]
        assert teller.picture() == before

    def test_a_refusal_is_remembered_under_its_key_and_another_key_asks_anew(self, teller: Teller) -> None:
        teller.open(10)
        first = teller.refused(Place, key="a", token="t", amount_micro_su=11)
        teller.do(Deposit, allocation="grant", amount_micro_su=100)
        assert teller.ask(Place, key="a", token="t", amount_micro_su=11) == first
        teller.do(Place, key="b", token="t", amount_micro_su=11)

    def test_the_same_key_twice_in_one_batch_is_one_command(self, teller: Teller) -> None:
        teller.open(100)
        command = teller.make(Deposit, allocation="grant", amount_micro_su=5)
        first, second = teller.ledger.submit([command, command]).result()
        assert first == second
        assert teller.amounts()[0] == 105

    def test_what_was_answered_is_there_after_a_restart(self, open_store: Callable[[], Store], teller: Teller) -> None:
        teller.open(100)
        answer = teller.do(Place, key="k", token="t", amount_micro_su=60)
        with Ledger(open_store(), clock=Clock()) as other:
            assert Teller(other, Clock()).ask(Place, key="k", token="t", amount_micro_su=60) == answer

    def test_settling_frees_what_was_not_used(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 90)
        assert teller.do(Settle, run="r", amount_micro_su=40).flags == ()
        assert teller.amounts() == (60, 0, 40, 0)
        assert "charged 0.00004 SU" in teller.refused(Settle, run="r", amount_micro_su=41).sentence

    def test_the_highest_priority_pays_first_then_what_ends_first_and_credit_last(self, teller: Teller) -> None:
        teller.open(10, name="late", credit_micro_su=5)
        teller.open(10, name="early", end_s=NOW_S + 50)
        teller.open(10, name="first", priority=1)
        teller.open(10, name="tomorrow", priority=9, start_s=NOW_S + 1)
        teller.do(Place, token="a", amount_micro_su=12)
        assert [teller.amounts(name)[1] for name in ("first", "early", "late")] == [10, 2, 0]
        teller.do(Place, token="b", amount_micro_su=23)
        assert teller.amounts("late") == (-5, 15, 0, 0)
        assert teller.refused(Place, token="c", amount_micro_su=1).available_micro_su == 0

    def test_credit_is_drawn_on_only_when_the_money_of_all_is_gone_and_then_in_the_same_order(
        self, teller: Teller
    ) -> None:
        teller.open(10, name="first", priority=2, credit_micro_su=5)
        teller.open(10, name="second", priority=1)
        teller.open(0, name="third", credit_micro_su=2)
        names = ("first", "second", "third")
        for token, amount, left in (
            ("a", 15, (0, 5, 0)),
            ("b", 8, (-3, 0, 0)),
            ("c", 3, (-5, 0, -1)),
            ("d", 1, (-5, 0, -2)),
        ):
            teller.do(Place, token=token, amount_micro_su=amount)
            assert tuple(teller.amounts(name)[0] for name in names) == left
        assert teller.refused(Place, token="e", amount_micro_su=1).available_micro_su == 0

    def test_an_overdrawn_allocation_takes_nothing_from_the_others(self, teller: Teller) -> None:
        teller.open(0, name="deep", priority=1)
        teller.open(10)
        teller.do(Adjust, allocation="deep", amount_micro_su=-30)
        assert teller.refused(Place, token="t", amount_micro_su=11).available_micro_su == 10
        teller.do(Place, token="t", amount_micro_su=10)
        assert (teller.amounts("deep"), teller.amounts()) == ((-30, 0, 0, 0), (0, 10, 0, 0))

    def test_a_charge_uses_the_legs_in_order_and_a_refund_comes_from_the_last(self, teller: Teller) -> None:
        teller.open(10, name="first", priority=1)
        teller.open(10, name="second")
        teller.running("r", 20)
        teller.do(Settle, run="r", amount_micro_su=14)
        assert (teller.amounts("first"), teller.amounts("second")) == ((0, 0, 10, 0), (6, 0, 4, 0))
        teller.do(Refund, run="r", amount_micro_su=5)
        assert (teller.amounts("first"), teller.amounts("second")) == ((1, 0, 9, 0), (10, 0, 0, 0))

    def test_an_overrun_takes_what_other_allocations_have_before_it_overdraws(self, teller: Teller) -> None:
        teller.open(10, name="first", priority=1)
        teller.open(10, name="second")
        teller.running("r", 10)
        teller.do(Settle, run="r", amount_micro_su=25)
        assert (teller.amounts("first"), teller.amounts("second")) == ((-5, 0, 15, 0), (0, 0, 10, 0))

    def test_a_refund_of_an_ended_allocation_goes_to_the_named_successor(self, teller: Teller) -> None:
        teller.open(100, name="old", end_s=NOW_S + 10)
        teller.running("r", 50)
        teller.do(Settle, run="r", amount_micro_su=50)
        teller.open(0, name="new")
        teller.clock.now_s += 10
        teller.do(Sweep)
        teller.do(Refund, run="r", amount_micro_su=20, successor="new")
        assert (teller.amounts("old"), teller.amounts("new")) == ((0, 0, 30, 50), (20, 0, 0, 0))
        assert teller.lien(run="r").state == "part_refunded"
        teller.do(CarryOver, source="old", target="new", amount_micro_su=50)
        assert teller.refused(CarryOver, source="old", target="new", amount_micro_su=1).why == "funds"
        assert teller.amounts("new") == (70, 0, 0, 0)

    def test_caps_bind_a_user_a_project_and_all_above_it(self, teller: Teller) -> None:
        teller.do(OpenProject, project="faculty", cap_micro_su=50)
        teller.do(OpenProject, project="physics", parent="faculty")
        teller.do(OpenProject, project="biology", parent="faculty")
        teller.open(1000)
        teller.open(1000, name="other", project="biology")
        teller.do(SetCap, user="ada", cap_micro_su=30)
        refusal = teller.refused(Place, token="a", amount_micro_su=31)
        assert (refusal.why, refusal.available_micro_su) == ("user_cap", 30)
        teller.do(Place, token="a", amount_micro_su=30)
        refusal = teller.refused(Place, token="b", user="bob", project="biology", amount_micro_su=21)
        assert (refusal.why, refusal.available_micro_su) == ("project_cap", 20)
        teller.do(Place, token="c", user="bob", project="biology", amount_micro_su=20)
        teller.do(Void, token="a")
        teller.do(Place, token="d", user="bob", amount_micro_su=30)

    def test_a_correction_reverses_a_charge_and_keeps_what_was_refunded(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 50)
        teller.do(Settle, run="r", amount_micro_su=30)
        teller.do(Refund, run="r", amount_micro_su=10)
        for amount, refunded in ((45, 10), (4, 4), (0, 0), (60, 0)):
            teller.do(Correct, run="r", amount_micro_su=amount)
            assert teller.amounts() == (100 - amount + refunded, 0, amount - refunded, 0)
        kinds = {line.kind for line in queries.statement(teller.ledger.store)}
        assert kinds == {"deposit", "place", "settle", "refund", "reversal"}

    def test_a_quote_keeps_its_price_until_it_runs_out(self, teller: Teller) -> None:
        teller.open(100)
        for token in ("a", "b", "c"):
            teller.do(Quote, token=token, amount_micro_su=40, ttl_s=60)
        assert teller.refused(Place, token="a", amount_micro_su=39).why == "state"
        teller.do(Place, token="a", amount_micro_su=40)
        teller.clock.now_s += 60
        assert teller.refused(Place, token="b", amount_micro_su=40).why == "state"
        teller.do(Sweep)
        assert teller.lien(token="c").state == "lapsed"

    def test_money_moves_between_allocations_but_never_on_credit(self, teller: Teller) -> None:
        teller.open(100, credit_micro_su=50)
        teller.open(0, name="other")
        assert teller.refused(Transfer, source="grant", target="other", amount_micro_su=101).why == "funds"
        assert teller.refused(Transfer, source="grant", target="grant", amount_micro_su=1).why == "invalid"
        teller.do(Transfer, source="grant", target="other", amount_micro_su=100)
        assert (teller.amounts()[0], teller.amounts("other")[0]) == (0, 100)

    def test_a_person_may_go_below_the_floor_and_it_is_flagged(self, teller: Teller) -> None:
        teller.open(10)
        assert teller.do(Adjust, allocation="grant", amount_micro_su=-30).flags == ("overdrawn",)
        assert teller.do(SetTerms, allocation="grant", credit_micro_su=5).flags == ("overdrawn",)
        assert teller.do(Adjust, allocation="grant", amount_micro_su=100).flags == ()
        line = queries.statement(teller.ledger.store)[-1]
        assert (line.kind, line.reason, line.balance_micro_su) == ("adjust", "a test", 80)

    @pytest.mark.parametrize(
        ("before", "refused"),
        [
            ("place", [Settle, Refund, Correct]),
            ("bind", [Refund, Correct]),
            ("start", [Refund, Correct, Void, Bind]),
            ("settle", [Start, Void, Bind]),
            ("void", [Start, Settle, Refund, Correct, Bind]),
        ],
    )
    def test_a_state_allows_only_its_own_steps(self, teller: Teller, before: str, refused: list[type]) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=10)
        steps = {
            "bind": (Bind, {"token": "t", "job_id": 1, "run": "r"}),
            "start": (Start, {"run": "r", "amount_micro_su": 10}),
        }
        if before != "place":
            for step in ("bind", *(["start"] if before in {"start", "settle"} else [])):
                teller.do(steps[step][0], **steps[step][1])
        if before == "settle":
            teller.do(Settle, run="r", amount_micro_su=10)
        if before == "void":
            teller.do(Void, run="r")
        for kind in refused:
            fields: dict[str, Any] = {"token": "t", "job_id": 2, "run": "q"} if kind is Bind else {"run": "r"}
            if "amount_micro_su" in kind.__struct_fields__:  # type: ignore[attr-defined]
                fields["amount_micro_su"] = 5
            assert teller.refused(kind, **fields).why in {"state", "unknown"}

    def test_a_requeue_that_is_not_covered_is_charged_and_says_so(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r.0", 90)
        answer = teller.do(Requeue, run="r.0", amount_micro_su=80, next_run="r.1", next_amount_micro_su=90)
        assert answer.flags == ("next_refused",)
        assert teller.amounts() == (20, 0, 80, 0)

    @pytest.mark.parametrize(
        "bad",
        [
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":-1,"reason":"r"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":1.5,"reason":"r"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":NaN,"reason":"r"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":99999999999999999999,"reason":"r"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":1,"reason":""}',
            b'{"do":"deposit","key":"k","allocation":"a\\u0000","amount_micro_su":1,"reason":"r"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":1,"reason":"r\\n"}',
            b'{"do":"deposit","key":"k","allocation":"a","amount_micro_su":1,"reason":"r","more":1}',
            b'{"do":"steal","key":"k"}',
            b"[]",
            b"\xff",
        ],
    )
    def test_a_malformed_command_is_told_in_one_sentence_and_nothing_is_written(
        self, teller: Teller, bad: bytes
    ) -> None:
        with pytest.raises(UsageError, match=r"^not a command of the ledger: "):
            teller.ledger.call(bad)
        assert teller.picture() == [[], [], [], [], []]

    def test_dates_out_of_order_are_refused(self, teller: Teller) -> None:
        teller.do(OpenProject, project="physics")
        assert teller.refused(OpenAllocation, allocation="a", start_s=10, end_s=10).why == "invalid"

    def test_a_hundred_submitters_at_once_get_exactly_what_there_is(
        self, teller: Teller, open_store: Callable[[], Store]
    ) -> None:
        """Through two ledgers on one database, as two processes have them."""
        teller.open(37 * 11)
        go = threading.Barrier(100)
        with Ledger(open_store(), clock=teller.clock) as other:
            ledgers = (teller.ledger, other)
            commands = [teller.make(Place, token=f"t{n}", amount_micro_su=11) for n in range(100)]

            def submit(n: int) -> bool:
                go.wait(30)
                return isinstance(ledgers[n % 2].call(commands[n]), Receipt)

            with ThreadPoolExecutor(100) as pool:
                accepted = sum(pool.map(submit, range(100)))
        assert accepted == 37
        assert teller.amounts() == (0, 37 * 11, 0, 0)

    @pytest.mark.parametrize("table", ["txn", "entry", "idempotency"])
    @pytest.mark.parametrize("change", ["UPDATE {} SET {} = {}", "DELETE FROM {}"])
    def test_the_database_itself_refuses_to_change_what_was_written(
        self, teller: Teller, tamper: Callable[[str], None], table: str, change: str
    ) -> None:
        teller.open(100)
        column = next(iter(TABLES[table].columns))
        with pytest.raises(Exception, match=f"{table} is append-only"):
            tamper(change.format(table, column, column))

    def test_a_final_state_is_final_for_the_database_too(self, teller: Teller, tamper: Callable[[str], None]) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=10)
        teller.do(Void, token="t")
        with pytest.raises(Exception, match="a final state is final"):
            tamper("UPDATE lien SET state = 'bound', expires_s = 1")

    @pytest.mark.parametrize("broken", TAMPERING)
    def test_verify_names_what_was_changed_past_the_ledger(
        self, open_store: Callable[[], Store], tamper: Callable[[str], None], unguard: Callable[[str], str], broken: str
    ) -> None:
        table, damage = TAMPERING[broken]
        with Ledger(open_store(), clock=Clock()) as ledger:
            teller = Teller(ledger, Clock())
            teller.open(100)
            teller.do(Place, token="t", amount_micro_su=10)
            assert verify(ledger.store) == []
            if table:
                tamper(unguard(table))
                assert {found.invariant for found in verify(ledger.store)} == {"I9"}, "a missing trigger is named"
            tamper(damage)
            assert broken in {found.invariant for found in verify(ledger.store)}

    def test_a_closed_ledger_says_so(self, open_store: Callable[[], Store]) -> None:
        ledger = Ledger(open_store())
        ledger.close()
        ledger.close()
        with pytest.raises(UnreachableError, match="closed"):
            ledger.submit([])

    def test_pages_of_a_statement_add_up(self, teller: Teller) -> None:
        teller.open(100)
        for n in range(7):
            teller.do(Place, token=f"t{n}", amount_micro_su=1)
        store = teller.ledger.store
        whole = queries.statement(store)
        paged: list[StatementLine] = []
        while page := queries.statement(store, after=paged[-1].seq if paged else 0, limit=3):
            paged += page
        assert paged == whole
