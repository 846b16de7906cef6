"""The rules of liens in their corners; what every database must do is the contract's business."""

from typing import Any

import pytest

from carrel.model.ledger import (
    Bind,
    MarkUnknown,
    OpenProject,
    Place,
    Quote,
    Receipt,
    Reprice,
    Requeue,
    SetCap,
    Settle,
    Start,
    Void,
)
from carrel.testing.ledger import NOW_S, SqliteSuite, Teller

BIG = 10**18
"""The most that one command may name."""
ROOM = 2**63 - 1


class TestLiens(SqliteSuite):
    def test_a_lien_tells_whose_it_is_and_until_when(self, teller: Teller) -> None:
        teller.open(100)
        receipt = teller.do(Place, token="t", amount_micro_su=7, units=3, ttl_s=60)
        assert receipt == Receipt(seq=4, lien=1, state="unbound", amount_micro_su=21)
        found = teller.lien(token="t")
        assert (found.cluster, found.token, found.run, found.job_id) == ("c", "t", "", 0)
        assert (found.project, found.user, found.units, found.lien_micro_su) == ("physics", "ada", 3, 21)
        assert found.expires_s == NOW_S + 60

    def test_a_quote_sets_nothing_aside_until_its_lien_is_placed(self, teller: Teller) -> None:
        teller.open(100)
        quoted = teller.do(Quote, token="t", amount_micro_su=7, units=3, ttl_s=60)
        assert (quoted.state, quoted.amount_micro_su) == ("quoted", 21)
        assert teller.amounts() == (100, 0, 0, 0)
        assert teller.lien(token="t").expires_s == NOW_S + 60
        assert teller.refused(Bind, token="t", job_id=1, run="r").why == "state"
        assert teller.refused(Quote, token="t", amount_micro_su=7, units=3).why == "exists"
        placed = teller.do(Place, token="t", amount_micro_su=7, units=3)
        assert (placed.lien, placed.state, placed.amount_micro_su) == (quoted.lien, "unbound", 21)
        assert teller.lien(token="t").expires_s == NOW_S + 120
        assert teller.refused(Place, token="t", amount_micro_su=7, units=3).why == "exists"

    def test_the_first_two_liens_of_a_person_may_come_together_and_both_count(self, teller: Teller) -> None:
        teller.open(100)
        places = [teller.make(Place, token=token, amount_micro_su=7, units=1) for token in ("one", "two")]
        assert all(isinstance(answer, Receipt) for answer in teller.ledger.submit(places).result())
        assert teller.amounts() == (86, 14, 0, 0)
        assert teller.rows("SELECT committed FROM member WHERE project = 'physics'") == [(14,)]

    def test_a_cap_that_comes_with_the_first_lien_of_a_person_knows_of_it(self, teller: Teller) -> None:
        teller.open(100)
        place = teller.make(Place, token="one", amount_micro_su=7, units=1)
        cap = teller.make(SetCap, project="physics", user="ada", cap_micro_su=10)
        assert all(isinstance(answer, Receipt) for answer in teller.ledger.submit([place, cap]).result())
        assert teller.rows("SELECT committed, cap FROM member WHERE project = 'physics'") == [(7, 10)]
        assert teller.refused(Place, token="two", amount_micro_su=7, units=1).why == "user_cap"

    @pytest.mark.parametrize(
        "other", [{"amount_micro_su": 8}, {"units": 2}, {"user": "bob"}, {"project": "biology"}, {"later_s": 60}]
    )
    def test_a_quote_is_kept_only_to_the_letter(self, teller: Teller, other: dict[str, Any]) -> None:
        teller.open(100)
        teller.do(OpenProject, project="biology")
        teller.do(Quote, token="t", amount_micro_su=7, ttl_s=60)
        changed = dict(other)
        teller.clock.now_s += changed.pop("later_s", 59)
        assert teller.refused(Place, **{"token": "t", "amount_micro_su": 7} | changed).why == "state"

    def test_a_quote_may_be_given_up(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Quote, token="t", amount_micro_su=7)
        assert teller.do(Void, token="t").state == "lapsed"
        assert teller.refused(Place, token="t", amount_micro_su=7).why == "exists"

    def test_a_lien_is_bound_by_its_user_to_one_job_and_one_run(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=7)
        refusal = teller.refused(Bind, token="t", job_id=5, run="r", user="bob")
        assert (refusal.why, refusal.sentence) == ("state", "token 't' belongs to user 'ada', not to 'bob'")
        bound = teller.do(Bind, token="t", job_id=5, run="r")
        assert (bound.state, bound.amount_micro_su) == ("bound", 7)
        found = teller.lien(token="t")
        assert (found.job_id, found.run, found.expires_s) == (5, "r", NOW_S + 84 * 86400)
        assert teller.do(Bind, token="t", job_id=5, run="r") == bound
        assert teller.refused(Bind, token="t", job_id=6, run="r").why == "state"
        assert teller.refused(Bind, token="t", job_id=5, run="s").why == "state"
        teller.do(Place, token="u", amount_micro_su=7)
        assert teller.refused(Bind, token="u", job_id=5, run="r").why == "exists"

    def test_an_array_is_bound_without_a_run(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=7, units=2)
        assert teller.refused(Bind, token="t", job_id=5, run="r").why == "state"
        bound = teller.do(Bind, token="t", job_id=5)
        assert (bound.state, bound.amount_micro_su) == ("bound", 14)
        assert teller.do(Bind, token="t", job_id=5) == bound
        assert teller.lien(token="t").run == ""

    def test_a_task_that_is_told_to_start_twice_is_one_start(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=10, units=3)
        teller.do(Bind, token="t", job_id=5)
        first = teller.do(Start, run="5_0", token="t", amount_micro_su=8)
        assert teller.do(Start, run="5_0", token="t", amount_micro_su=8).lien == first.lien
        assert (first.state, first.amount_micro_su) == ("active", 8)
        task, rest = teller.lien(run="5_0"), teller.lien(token="t")
        assert (task.units, task.lien_micro_su, task.token, task.job_id, task.user) == (1, 8, "", 5, "ada")
        assert (rest.units, rest.lien_micro_su, rest.state) == (2, 20, "bound")
        assert (task.expires_s, rest.expires_s) == (None, NOW_S + 84 * 86400)
        assert teller.rows("SELECT id, parent FROM lien ORDER BY id") == [(1, 0), (2, 1)]

    def test_a_task_takes_its_unit_from_the_allocations_in_their_order(self, teller: Teller) -> None:
        teller.open(15, name="first", priority=1)
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=10, units=3)
        for n in range(3):
            teller.do(Start, run=f"r{n}", token="t", amount_micro_su=10)
        assert teller.legs("r0") == [("first", 10, 0, 0)]
        assert teller.legs("r1") == [("first", 5, 0, 0), ("grant", 5, 0, 0)]
        # The last of an array is no child: the lien itself becomes the run's.
        assert teller.legs("r2") == [("first", 0, 0, 0), ("grant", 10, 0, 0)]
        assert teller.lien(token="t").run == "r2"

    def test_a_task_that_costs_more_than_its_unit_is_weighed_by_itself(self, teller: Teller) -> None:
        teller.open(35)
        teller.do(Place, token="t", amount_micro_su=10, units=3)
        refusal = teller.refused(Start, run="r", token="t", amount_micro_su=16)
        assert (refusal.needed_micro_su, refusal.available_micro_su) == (6, 5)
        assert teller.do(Start, run="r", token="t", amount_micro_su=15).amount_micro_su == 15
        assert teller.amounts() == (0, 35, 0, 0)

    def test_a_run_that_started_belongs_to_its_lien_alone(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 10)
        assert teller.refused(Start, run="s", token="t-r", amount_micro_su=10).why == "state"
        assert teller.lien(run="r").expires_s is None

    def test_a_lien_is_lowered_from_its_last_allocation_on(self, teller: Teller) -> None:
        teller.open(10, name="first", priority=3)
        teller.open(10, name="second", priority=2)
        teller.open(10, name="third", priority=1)
        teller.running("r", 25)
        assert teller.do(Reprice, run="r", amount_micro_su=12).amount_micro_su == 12
        assert teller.legs("r") == [("first", 10, 0, 0), ("second", 2, 0, 0), ("third", 0, 0, 0)]
        assert [teller.amounts(name)[0] for name in ("first", "second", "third")] == [0, 8, 10]
        teller.do(Reprice, run="r", amount_micro_su=11)
        assert teller.legs("r") == [("first", 10, 0, 0), ("second", 1, 0, 0), ("third", 0, 0, 0)]

    def test_an_array_is_lowered_by_all_its_units(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=10, units=3)
        assert teller.do(Reprice, token="t", amount_micro_su=4).amount_micro_su == 12
        assert teller.amounts() == (88, 12, 0, 0)

    def test_a_raise_that_is_not_covered_is_left_or_owed_as_was_asked_and_flagged(self, teller: Teller) -> None:
        teller.open(10)
        teller.do(Place, token="t", amount_micro_su=4, units=2)
        kept = teller.do(Reprice, token="t", amount_micro_su=6, if_short="keep")
        assert (kept.amount_micro_su, kept.flags) == (8, ("short",))
        owing = teller.do(Reprice, token="t", amount_micro_su=6, if_short="overdraw")
        assert (owing.amount_micro_su, owing.flags) == (12, ("short", "overdrawn"))
        assert teller.amounts() == (-2, 12, 0, 0)
        assert teller.journal()[-2:] == [("reprice", 1, "short"), ("reprice", 1, "overdrawn")]
        assert teller.lien(token="t").flags == ("short", "overdrawn")

    def test_a_price_that_does_not_change_leaves_the_lien_as_it_is(self, teller: Teller) -> None:
        teller.open(10)
        teller.do(Place, token="t", amount_micro_su=4)
        assert teller.do(Reprice, token="t", amount_micro_su=4).amount_micro_su == 4
        assert (teller.amounts(), teller.moves()) == ((6, 4, 0, 0), [])

    def test_void_gives_back_what_was_set_aside_once(self, teller: Teller) -> None:
        teller.open(10, name="first", priority=1)
        teller.open(10)
        teller.do(Place, token="t", amount_micro_su=12)
        assert teller.do(Void, token="t") == Receipt(seq=7, lien=1, state="void", amount_micro_su=12)
        assert teller.do(Void, token="t") == Receipt(seq=7, lien=1, state="void")
        assert (teller.amounts("first"), teller.amounts()) == ((10, 0, 0, 0), (10, 0, 0, 0))
        assert teller.lien(token="t").expires_s is None

    def test_a_lien_of_nothing_is_voided_too(self, teller: Teller) -> None:
        teller.open(10)
        teller.do(Place, token="t", amount_micro_su=0)
        assert teller.do(Void, token="t").state == "void"
        assert (teller.lien(token="t").state, teller.moves()) == ("void", [])

    def test_a_run_whose_end_is_unknown_keeps_its_lien_until_it_is_decided(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=7)
        teller.do(Bind, token="t", job_id=1, run="r")
        marked = teller.do(MarkUnknown, run="r")
        assert (marked.state, marked.amount_micro_su) == ("unknown_end", 7)
        assert teller.do(MarkUnknown, run="r") == marked
        assert teller.lien(run="r").expires_s is None
        assert teller.do(Start, run="r", amount_micro_su=7).state == "active"
        teller.do(MarkUnknown, run="r")
        assert teller.do(Reprice, run="r", amount_micro_su=5).amount_micro_su == 5
        assert teller.do(Void, run="r").amount_micro_su == 5
        assert teller.refused(MarkUnknown, run="r").why == "state"

    @pytest.mark.parametrize("kind", [Reprice, Start, Settle, Requeue, MarkUnknown, Void])
    def test_what_is_charged_is_no_lien_any_more(self, teller: Teller, kind: type) -> None:
        teller.open(100)
        teller.running("r", 7)
        teller.do(Settle, run="r", amount_micro_su=5)
        fields = {"amount_micro_su": 6, "next_run": "s", "next_amount_micro_su": 1}
        known = {name: value for name, value in fields.items() if name in kind.__struct_fields__}  # type: ignore[attr-defined]
        assert teller.refused(kind, run="r", **known).why == "state"

    @pytest.mark.parametrize("kind", [Settle, Requeue])
    def test_what_no_job_took_is_not_charged(self, teller: Teller, kind: type) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=7)
        teller.do(Bind, token="t", job_id=1, run="r")
        teller.do(Void, token="t")
        following = {"next_run": "s", "next_amount_micro_su": 1} if kind is Requeue else {}
        refusal = teller.refused(kind, run="r", amount_micro_su=5, **following)
        assert (refusal.why, refusal.sentence) == ("state", "run 'r' cannot be settled: its lien is void")
