"""The rules of the ledger in their corners: who pays, what is refused in which words, what is too much.

What every database must do is the contract's business; here one is enough.
"""

from typing import Any

import pytest

from carrel.model.ledger import (
    Adjust,
    Backfill,
    Bind,
    CarryOver,
    Correct,
    Deposit,
    MarkUnknown,
    OpenAllocation,
    OpenProject,
    Place,
    Quote,
    Receipt,
    Refund,
    Refusal,
    Reprice,
    SetCap,
    SetTerms,
    Settle,
    Start,
    Transfer,
    Void,
)
from carrel.testing.ledger import NOW_S, SqliteSuite, Teller

BIG = 10**18
"""The most that one command may name."""
ROOM = 2**63 - 1


class TestWhoPays(SqliteSuite):
    def test_an_allocation_that_pays_nothing_has_no_part_in_a_lien(self, teller: Teller) -> None:
        teller.open(0, name="empty", priority=2, credit_micro_su=5)
        teller.open(1, name="one", priority=1)
        teller.open(10)
        teller.running("r", 4)
        assert teller.legs("r") == [("one", 1, 0, 0), ("grant", 3, 0, 0)]

    def test_the_last_micro_su_of_one_allocation_and_of_a_credit_are_drawn_on(self, teller: Teller) -> None:
        teller.open(1, name="one", priority=1)
        teller.open(0, name="credit", credit_micro_su=1)
        teller.running("r", 2)
        assert (teller.amounts("one"), teller.amounts("credit")) == ((0, 1, 0, 0), (-1, 1, 0, 0))

    def test_what_nobody_covers_is_owed_by_the_last_that_carried_the_lien(self, teller: Teller) -> None:
        for name, priority in (("first", 3), ("second", 2), ("third", 1)):
            teller.open(10, name=name, priority=priority)
        teller.running("r", 15)
        assert teller.do(Settle, run="r", amount_micro_su=40).flags == ("overrun", "overdrawn")
        assert [teller.amounts(name)[0] for name in ("first", "second", "third")] == [0, -10, 0]

    def test_what_nobody_set_aside_or_covers_is_owed_by_the_valid_allocation_drawn_on_last(
        self, teller: Teller
    ) -> None:
        teller.open(0, name="first", priority=1)
        teller.open(0, name="last", end_s=NOW_S + 10)
        teller.open(0, name="other", end_s=NOW_S + 5)
        teller.do(SetTerms, allocation="other", start_s=NOW_S + 1)
        teller.do(Backfill, run="r", amount_micro_su=3)
        assert [teller.amounts(name)[0] for name in ("first", "last", "other")] == [0, -3, 0]

    def test_what_a_run_without_a_lien_used_is_owed_by_the_last_that_is_valid_also_beside_other_projects(
        self, teller: Teller
    ) -> None:
        teller.open(50, name="foreign", project="biology")
        teller.open(0)
        teller.running("r", 0)
        assert teller.do(Settle, run="r", amount_micro_su=7).flags == ("overdrawn",)
        assert (teller.amounts("foreign")[0], teller.amounts()[0]) == (50, -7)

    @pytest.mark.parametrize(
        ("ends", "debtor"),
        [((-9, -5, -7), "b"), ((-9, None, -7), "b"), ((-5, -5, -7), "b"), ((-5, -9, -9), "a"), ((-9, -9, -5), "c")],
    )
    def test_where_none_is_valid_any_more_the_one_that_ended_last_owes(
        self, teller: Teller, ends: tuple[int | None, ...], debtor: str
    ) -> None:
        for name, end in zip("abc", ends, strict=True):
            start_s = NOW_S + 100 if end is None else 0
            teller.open(0, name=name, start_s=start_s, end_s=None if end is None else NOW_S + end)
        teller.do(Backfill, run="r", amount_micro_su=3)
        assert {name: teller.amounts(name)[0] for name in "abc"} == dict.fromkeys("abc", 0) | {debtor: -3}

    def test_an_account_without_any_allocation_cannot_owe(self, teller: Teller) -> None:
        teller.open(5, name="foreign", project="biology")
        teller.do(OpenProject, project="physics")
        refusal = teller.refused(Backfill, run="r", amount_micro_su=3)
        assert (refusal.why, refusal.sentence) == (
            "unknown",
            "account 'physics' has no allocation that could owe 0.000003 SU; open one",
        )
        teller.do(Backfill, run="r", amount_micro_su=0)
        assert teller.refused(Correct, run="r", amount_micro_su=3).why == "unknown"

    def test_an_allocation_is_valid_from_its_first_second_to_the_one_before_its_end(self, teller: Teller) -> None:
        teller.open(10, start_s=NOW_S + 5, end_s=NOW_S + 7)
        covered = []
        for n in range(9):
            answer = teller.ask(Place, token=f"t{n}", amount_micro_su=1)
            covered.append(isinstance(answer, Receipt))
            teller.clock.now_s += 1
        assert [n for n, done in enumerate(covered) if done] == [5, 6]

    def test_new_terms_count_at_once_for_the_rest_of_a_batch(self, teller: Teller) -> None:
        teller.open(10, name="a", priority=1)
        teller.open(10, name="b")
        commands = [
            teller.make(Place, token="t", amount_micro_su=1),
            teller.make(SetTerms, allocation="b", priority=2),
            teller.make(Place, token="u", amount_micro_su=1),
        ]
        teller.ledger.submit(commands).result()
        assert (teller.amounts("a")[1], teller.amounts("b")[1]) == (1, 1)

    def test_among_equals_the_one_that_was_opened_first_pays_whatever_else_a_batch_is_about(
        self, teller: Teller
    ) -> None:
        for name in "ab":
            teller.open(10, name=name)
        commands = [
            teller.make(Deposit, allocation="b", amount_micro_su=1),
            teller.make(Place, token="t", amount_micro_su=1),
        ]
        teller.ledger.submit(commands).result()
        assert (teller.amounts("a")[1], teller.amounts("b")[1]) == (1, 0)

    def test_an_allocation_that_opens_in_a_batch_pays_in_it(self, teller: Teller) -> None:
        teller.open(1)
        commands = [
            teller.make(Place, token="t", amount_micro_su=1),
            teller.make(OpenAllocation, allocation="more", project="physics", credit_micro_su=1),
            teller.make(Place, token="u", amount_micro_su=1),
        ]
        assert all(isinstance(answer, Receipt) for answer in teller.ledger.submit(commands).result())


class TestCaps(SqliteSuite):
    def test_a_cap_below_what_is_used_stops_what_is_new_and_nothing_that_costs_no_more(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=50)
        teller.do(SetCap, user="ada", cap_micro_su=20)
        refusal = teller.refused(Place, token="u", amount_micro_su=1)
        assert (refusal.why, refusal.needed_micro_su, refusal.available_micro_su) == ("user_cap", 1, 0)
        assert refusal.sentence == (
            "user 'ada' in account 'physics' has 0.00 SU left below the cap of 0.00002 SU, "
            "this job may need 0.000001 SU; see: carrel account show physics"
        )
        teller.do(Place, token="v", amount_micro_su=0)
        teller.do(Reprice, token="t", amount_micro_su=50)
        teller.do(Reprice, token="t", amount_micro_su=40)
        assert teller.refused(Reprice, token="t", amount_micro_su=41).needed_micro_su == 1

    def test_a_cap_of_an_account_is_no_cap_of_a_user_and_can_be_taken_away(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(SetCap, user="", cap_micro_su=20)
        refusal = teller.refused(Place, token="t", amount_micro_su=21)
        assert (refusal.why, refusal.available_micro_su) == ("project_cap", 20)
        assert refusal.sentence.startswith("account 'physics' has 0.00002 SU left below the cap of 0.00002 SU")
        teller.do(SetCap, user="", cap_micro_su=None)
        teller.do(Place, token="t", amount_micro_su=21)

    def test_what_was_given_back_may_be_used_again(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(SetCap, user="ada", cap_micro_su=30)
        teller.running("r", 30)
        teller.do(Settle, run="r", amount_micro_su=20)
        assert teller.refused(Place, token="t", amount_micro_su=11).available_micro_su == 10
        teller.do(Refund, run="r", amount_micro_su=5)
        assert teller.refused(Place, token="t", amount_micro_su=16).available_micro_su == 15
        teller.do(Correct, run="r", amount_micro_su=29)
        assert teller.refused(Place, token="t", amount_micro_su=7).available_micro_su == 6


class TestWords(SqliteSuite):
    def test_a_refusal_that_is_about_no_figures_has_none(self, teller: Teller) -> None:
        teller.open(10)
        for kind, fields, sentence in (
            (Place, {"token": "t", "project": "x", "amount_micro_su": 1}, "no account 'x'; see: carrel account list"),
            (Deposit, {"allocation": "x", "amount_micro_su": 1}, "no allocation 'x'; see: carrel account list"),
        ):
            assert teller.refused(kind, **fields) == Refusal(why="unknown", sentence=f"there is {sentence}")

    @pytest.mark.parametrize(
        ("kind", "fields", "named"),
        [
            (Bind, {"token": "x", "job_id": 1, "run": "y"}, "token 'x'"),
            (Void, {"token": "x"}, "token 'x'"),
            (Void, {"run": "y"}, "run 'y'"),
            (Reprice, {"run": "y", "amount_micro_su": 1}, "run 'y'"),
            (Start, {"run": "y", "amount_micro_su": 1}, "run 'y'"),
            (Settle, {"run": "y", "amount_micro_su": 1}, "run 'y'"),
            (MarkUnknown, {"run": "y"}, "run 'y'"),
        ],
    )
    def test_what_has_no_lien_is_named(self, teller: Teller, kind: type, fields: dict[str, Any], named: str) -> None:
        teller.open(10)
        assert teller.refused(kind, **fields) == Refusal(
            why="unknown", sentence=f"{named} of cluster 'c' has no lien; see: carrel charge list"
        )

    def test_what_is_there_already_is_not_opened_again(self, teller: Teller) -> None:
        teller.open(10)
        assert teller.refused(OpenProject, project="physics").why == "exists"
        assert teller.refused(OpenAllocation, allocation="grant", project="physics").why == "exists"
        assert teller.refused(OpenProject, project="p", parent="nobody").why == "unknown"
        assert teller.refused(OpenAllocation, allocation="a", project="nobody").why == "unknown"

    def test_a_move_that_is_not_covered_names_what_there_is(self, teller: Teller) -> None:
        teller.open(10)
        teller.open(0, name="other")
        assert teller.refused(Transfer, source="grant", target="other", amount_micro_su=11) == Refusal(
            why="funds",
            sentence="allocation 'grant' has 0.00001 SU available, not 0.000011",
            needed_micro_su=11,
            available_micro_su=10,
        )
        refusal = teller.refused(CarryOver, source="grant", target="other", amount_micro_su=1)
        assert refusal.sentence == "allocation 'grant' has 0.00 SU expired, not 0.000001"
        teller.do(Adjust, allocation="grant", amount_micro_su=-30)
        assert teller.refused(Transfer, source="grant", target="other", amount_micro_su=1).available_micro_su == 0

    def test_dates_and_shares_that_make_no_sense_are_refused(self, teller: Teller) -> None:
        teller.open(10)
        assert teller.refused(SetTerms, allocation="grant", start_s=10, end_s=10).why == "invalid"
        assert teller.do(SetTerms, allocation="grant", start_s=10, end_s=11).flags == ()

    def test_an_allocation_at_its_floor_is_not_overdrawn(self, teller: Teller) -> None:
        teller.open(10)
        teller.do(Adjust, allocation="grant", amount_micro_su=-15)
        assert teller.do(SetTerms, allocation="grant", credit_micro_su=5).flags == ()
        assert teller.do(SetTerms, allocation="grant", credit_micro_su=4).flags == ("overdrawn",)
        assert teller.do(Adjust, allocation="grant", amount_micro_su=1).flags == ()
        assert teller.do(Adjust, allocation="grant", amount_micro_su=-1).flags == ("overdrawn",)


class TestSizes(SqliteSuite):
    def test_an_account_takes_a_quarter_of_what_64_bits_hold_by_deposits_to_the_last_micro_su(
        self, teller: Teller
    ) -> None:
        teller.open(BIG)
        teller.do(Deposit, allocation="grant", amount_micro_su=BIG)
        rest = ROOM // 4 - 2 * BIG
        assert teller.refused(Deposit, allocation="grant", amount_micro_su=rest + 1).why == "invalid"
        teller.do(Deposit, allocation="grant", amount_micro_su=rest)
        assert teller.refused(Deposit, allocation="grant", amount_micro_su=1).why == "invalid"

    def test_the_site_gives_no_more_than_that_in_all(self, teller: Teller) -> None:
        teller.open(BIG)
        teller.open(BIG, name="b")
        rest = ROOM // 4 - 2 * BIG
        teller.open(0, name="c")
        assert teller.refused(Deposit, allocation="c", amount_micro_su=rest + 1).why == "invalid"

    def test_adjustments_end_at_the_same_bound(self, teller: Teller) -> None:
        teller.open(0)
        for _ in range(2):
            teller.do(Adjust, allocation="grant", amount_micro_su=-BIG)
        rest = ROOM // 4 - 2 * BIG
        refusal = teller.refused(Adjust, allocation="grant", amount_micro_su=-rest - 1)
        assert refusal.why == "invalid"
        assert refusal.sentence.endswith("SU more is beyond what an account can hold at transaction 4")
        teller.do(Adjust, allocation="grant", amount_micro_su=-rest)

    def test_what_is_owed_ends_at_half_of_what_64_bits_hold(self, teller: Teller) -> None:
        teller.open(0)
        for n in range(4):
            teller.do(Backfill, run=f"r{n}", amount_micro_su=BIG)
        rest = ROOM // 2 - 4 * BIG
        assert teller.refused(Backfill, run="r", amount_micro_su=rest + 1).why == "invalid"
        teller.running("s", 0)
        assert teller.refused(Settle, run="s", amount_micro_su=rest + 1).why == "invalid"
        teller.do(Settle, run="s", amount_micro_su=0)
        assert teller.refused(Correct, run="s", amount_micro_su=rest + 1).why == "invalid"
        teller.do(Backfill, run="r", amount_micro_su=rest)

    def test_all_units_of_an_array_together_are_one_amount(self, teller: Teller) -> None:
        teller.open(10)
        assert teller.refused(Quote, token="q", amount_micro_su=BIG // 2, units=3).why == "invalid"
        assert teller.do(Quote, token="q", amount_micro_su=BIG // 2, units=2).amount_micro_su == BIG
        teller.do(Place, token="t", amount_micro_su=1, units=4)
        assert teller.refused(Reprice, token="t", amount_micro_su=BIG // 4 + 1).why == "invalid"
        assert teller.refused(Reprice, token="t", amount_micro_su=BIG // 4).why == "funds"
