"""The rules of charges and of time in their corners, and what the journal says of each command."""

import hashlib
import json

import msgspec
import pytest

from carrel.core.book import KINDS, Account, Book, Posting
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
from carrel.testing.ledger import NOW_S, SqliteSuite, Teller


class TestCharges(SqliteSuite):
    def test_a_settlement_that_is_told_again_is_done_once_also_after_refunds(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 50)
        first = teller.do(Settle, run="r", amount_micro_su=30)
        assert first == Receipt(seq=7, lien=1, state="settled", amount_micro_su=30)
        for refunded, state in ((0, "settled"), (10, "part_refunded"), (20, "refunded")):
            if refunded:
                assert teller.do(Refund, run="r", amount_micro_su=refunded).amount_micro_su == refunded
            again = teller.do(Settle, run="r", amount_micro_su=30)
            assert (again.state, again.amount_micro_su) == (state, 30)
            assert teller.refused(Settle, run="r", amount_micro_su=31).why == "state"
        assert [kind for kind, _, _ in teller.journal()][-3:] == ["settle", "refund", "refund"]
        assert teller.lien(run="r").expires_s is None

    def test_a_run_that_was_bound_and_never_seen_to_start_is_charged(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=7)
        teller.do(Bind, token="t", job_id=1, run="r")
        teller.do(Settle, run="r", amount_micro_su=7)
        assert teller.amounts() == (93, 0, 7, 0)
        assert teller.lien(run="r").expires_s is None

    def test_what_a_run_used_to_the_last_micro_su_is_no_overrun(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("r", 9)
        assert teller.do(Settle, run="r", amount_micro_su=9).flags == ()
        teller.running("s", 0)
        assert teller.do(Settle, run="s", amount_micro_su=1).flags == ()
        assert teller.amounts() == (0, 0, 10, 0)

    def test_an_overrun_that_is_covered_is_flagged_as_such_alone(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("r", 8)
        assert teller.do(Settle, run="r", amount_micro_su=9).flags == ("overrun",)
        assert teller.lien(run="r").flags == ("overrun",)

    def test_the_lien_of_the_next_run_is_like_that_of_the_last(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=30)
        teller.do(Bind, token="t", job_id=9, run="a")
        teller.do(Start, run="a", amount_micro_su=30)
        answer = teller.do(Requeue, run="a", amount_micro_su=12, next_run="b", next_amount_micro_su=40)
        assert (answer.state, answer.amount_micro_su, answer.lien) == ("settled", 12, 1)
        found = teller.lien(run="b")
        assert (found.state, found.job_id, found.user, found.project, found.token) == ("bound", 9, "ada", "physics", "")
        assert (found.units, found.lien_micro_su, found.expires_s) == (1, 40, NOW_S + 84 * 86400)
        assert teller.amounts() == (48, 40, 12, 0)
        assert [kind for kind, _, _ in teller.journal()][-2:] == ["settle", "place"]
        assert teller.do(Reprice, run="b", amount_micro_su=41).amount_micro_su == 41
        teller.do(Start, run="b", amount_micro_su=41)
        refusal = teller.refused(Requeue, run="b", amount_micro_su=1, next_run="a", next_amount_micro_su=1)
        assert refusal.why == "exists"

    def test_a_requeue_that_is_not_covered_keeps_the_flags_of_the_charge(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("a", 10)
        answer = teller.do(Requeue, run="a", amount_micro_su=11, next_run="b", next_amount_micro_su=1)
        assert answer.flags == ("overrun", "overdrawn", "next_refused")
        assert teller.refused(Settle, run="b", amount_micro_su=1).why == "unknown"

    def test_a_run_without_a_lien_is_charged_to_the_letter(self, teller: Teller) -> None:
        teller.open(10)
        answer = teller.do(Backfill, run="r", job_id=9, amount_micro_su=4)
        assert (answer.state, answer.amount_micro_su, answer.flags) == ("settled", 4, ("backfill",))
        found = teller.lien(run="r")
        assert (found.job_id, found.user, found.units, found.charged_micro_su) == (9, "ada", 1, 4)
        assert (found.lien_micro_su, found.flags, found.token) == (0, ("backfill",), "")
        assert teller.rows("SELECT unit FROM lien") == [(0,)]
        assert teller.journal()[-1] == ("settle", 1, "")
        assert teller.do(Backfill, run="s", amount_micro_su=7).flags == ("overdrawn", "backfill")
        assert teller.refused(Backfill, run="s", amount_micro_su=7).why == "exists"

    def test_a_refund_goes_from_the_last_leg_to_the_first_and_is_never_more_than_the_charge(
        self, teller: Teller
    ) -> None:
        teller.open(10, name="first", priority=1)
        teller.open(10, name="second")
        teller.running("r", 20)
        teller.do(Settle, run="r", amount_micro_su=16)
        for amount in (4, 4, 3):
            teller.do(Refund, run="r", amount_micro_su=amount)
        assert teller.legs("r") == [("first", 0, 10, 5), ("second", 0, 6, 6)]
        refusal = teller.refused(Refund, run="r", amount_micro_su=6)
        assert (refusal.why, refusal.needed_micro_su, refusal.available_micro_su) == ("state", 6, 5)
        assert teller.do(Refund, run="r", amount_micro_su=5).state == "refunded"
        assert teller.refused(Refund, run="r", amount_micro_su=1).available_micro_su == 0

    def test_a_refund_goes_to_the_successor_only_where_the_payer_has_ended(self, teller: Teller) -> None:
        teller.open(0, name="bystander")
        teller.open(10, name="old", priority=2, end_s=NOW_S + 10)
        teller.open(10, name="going-on", priority=1)
        teller.open(0, name="new")
        teller.running("r", 20)
        teller.do(Settle, run="r", amount_micro_su=20)
        teller.clock.now_s += 10
        teller.do(Refund, run="r", amount_micro_su=15, successor="new")
        assert [teller.amounts(name)[0] for name in ("old", "going-on", "new")] == [0, 10, 5]
        teller.do(Refund, run="r", amount_micro_su=1)
        assert [teller.amounts(name)[0] for name in ("old", "bystander")] == [1, 0]
        assert teller.refused(Refund, run="r", amount_micro_su=1, successor="nobody").why == "unknown"

    def test_a_successor_may_be_of_another_account(self, teller: Teller) -> None:
        teller.open(10, name="old", end_s=NOW_S + 10)
        teller.open(0, name="foreign", project="biology")
        teller.running("r", 10)
        teller.do(Settle, run="r", amount_micro_su=10)
        teller.clock.now_s += 10
        teller.do(Refund, run="r", amount_micro_su=4, successor="foreign")
        assert (teller.amounts("old"), teller.amounts("foreign")) == ((0, 0, 6, 0), (4, 0, 0, 0))

    def test_what_a_correction_refunds_again_stays_with_the_one_that_paid_also_where_it_has_ended(
        self, teller: Teller
    ) -> None:
        teller.open(0, name="bystander")
        teller.open(10, end_s=NOW_S + 10)
        teller.running("r", 10)
        teller.do(Settle, run="r", amount_micro_su=10)
        teller.clock.now_s += 10
        teller.do(Refund, run="r", amount_micro_su=4)
        teller.do(Correct, run="r", amount_micro_su=7)
        assert (teller.amounts("bystander"), teller.amounts()) == ((0, 0, 0, 0), (7, 0, 3, 0))

    def test_only_what_was_charged_is_refunded_or_corrected(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("r", 5)
        for kind in (Refund, Correct):
            refusal = teller.refused(kind, run="r", amount_micro_su=1)
            assert refusal.why == "state"
            assert "run 'r' is active; only" in refusal.sentence

    def test_a_correction_to_what_it_is_already_changes_nothing(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("r", 5)
        settled = teller.do(Settle, run="r", amount_micro_su=4)
        assert teller.do(Correct, run="r", amount_micro_su=4) == settled
        corrected = teller.do(Correct, run="r", amount_micro_su=3)
        assert (corrected.state, corrected.amount_micro_su, corrected.flags) == ("settled", 3, ("corrected",))
        assert [kind for kind, _, _ in teller.journal()][-3:] == ["settle", "reversal", "settle"]

    def test_a_correction_of_an_overrun_begins_with_what_was_set_aside(self, teller: Teller) -> None:
        teller.open(10, name="first", priority=1)
        teller.open(10, name="second")
        teller.running("r", 8)
        teller.do(Settle, run="r", amount_micro_su=15)
        assert teller.legs("r") == [("first", 0, 10, 0), ("second", 0, 5, 0)]
        teller.do(Refund, run="r", amount_micro_su=6)
        teller.do(Correct, run="r", amount_micro_su=9)
        assert teller.legs("r") == [("first", 0, 9, 6), ("second", 0, 0, 0)]
        assert (teller.amounts("first"), teller.amounts("second")) == ((7, 0, 3, 0), (10, 0, 0, 0))
        assert teller.lien(run="r").state == "part_refunded"
        teller.do(Correct, run="r", amount_micro_su=12)
        assert teller.amounts("first") == (4, 0, 6, 0)

    def test_a_charge_may_be_corrected_again_and_again_in_one_batch(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 50)
        commands = [
            teller.make(Settle, run="r", amount_micro_su=30),
            teller.make(Correct, run="r", amount_micro_su=20),
            teller.make(Refund, run="r", amount_micro_su=5),
            teller.make(Correct, run="r", amount_micro_su=40),
            teller.make(Correct, run="r", amount_micro_su=10),
        ]
        assert all(isinstance(answer, Receipt) for answer in teller.ledger.submit(commands).result())
        assert teller.amounts() == (95, 0, 5, 0)

    def test_a_correction_beyond_all_there_is_is_owed_and_flagged(self, teller: Teller) -> None:
        teller.open(10)
        teller.running("r", 5)
        teller.do(Settle, run="r", amount_micro_su=5)
        assert teller.do(Correct, run="r", amount_micro_su=11).flags == ("overrun", "overdrawn", "corrected")
        assert teller.amounts() == (-1, 0, 11, 0)


class TestTime(SqliteSuite):
    def test_a_sweep_ends_what_is_past_its_time_and_nothing_else(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Quote, token="quoted", amount_micro_su=1, ttl_s=10)
        teller.do(Place, token="unbound", amount_micro_su=1, ttl_s=10)
        teller.do(Place, token="bound", amount_micro_su=1)
        teller.do(Bind, token="bound", job_id=1, run="b", ttl_s=10)
        teller.do(Place, token="later", amount_micro_su=1, ttl_s=11)
        teller.running("active", 1)
        teller.clock.now_s += 10
        swept = teller.do(Sweep)
        assert swept == Receipt(seq=swept.seq)
        states = {
            token: teller.lien(token=token).state for token in ("quoted", "unbound", "bound", "later", "t-active")
        }
        assert states == {
            "quoted": "lapsed",
            "unbound": "void",
            "bound": "void",
            "later": "unbound",
            "t-active": "active",
        }
        kinds = [kind for kind, _, _ in teller.journal()][-3:]
        assert sorted(kinds) == ["expire_lien", "expire_lien", "lapse"]
        assert teller.do(Sweep).seq == swept.seq, "a second sweep finds nothing"

    def test_what_an_ended_allocation_has_left_expires_once(self, teller: Teller) -> None:
        teller.open(100, end_s=NOW_S + 10)
        teller.open(7, name="one", end_s=NOW_S + 11)
        teller.open(1, name="last", end_s=NOW_S + 10)
        teller.clock.now_s += 10
        swept = teller.do(Sweep)
        assert (swept.amount_micro_su, swept.flags) == (101, ())
        assert [teller.amounts(name)[3] for name in ("grant", "one", "last")] == [100, 0, 1]
        assert [kind for kind, _, _ in teller.journal()][-2:] == ["expire", "expire"]
        assert teller.do(Sweep).seq == swept.seq
        assert teller.do(CarryOver, source="grant", target="one", amount_micro_su=100).amount_micro_su == 100
        assert teller.amounts("one")[0] == 107
        assert teller.journal()[-1] == ("carry_over", 0, "")

    def test_a_sweep_leaves_what_was_placed_in_its_own_batch(self, teller: Teller) -> None:
        teller.open(100)
        commands = [teller.make(Place, token="t", amount_micro_su=1), teller.make(Sweep)]
        teller.ledger.submit(commands).result()
        assert teller.lien(token="t").state == "unbound"

    @pytest.mark.parametrize(("liens", "ended", "more"), [(2, 0, True), (0, 2, True), (1, 1, False)])
    def test_a_sweep_that_reached_its_limit_says_so(
        self, teller: Teller, liens: int, ended: int, *, more: bool
    ) -> None:
        teller.open(100)
        for n in range(liens):
            teller.do(Place, token=f"t{n}", amount_micro_su=1, ttl_s=10)
        for n in range(ended):
            teller.open(5, name=f"e{n}", end_s=NOW_S + 10)
        teller.clock.now_s += 10
        assert teller.do(Sweep, limit=2).flags == (("more",) if more else ())

    def test_a_sweep_does_no_more_than_its_limit_of_each(self, teller: Teller) -> None:
        teller.open(100)
        for n in range(2):
            teller.do(Place, token=f"t{n}", amount_micro_su=1, ttl_s=10)
            teller.open(5, name=f"e{n}", end_s=NOW_S + 10)
        teller.clock.now_s += 10
        teller.do(Sweep, limit=1)
        assert [teller.lien(token=f"t{n}").state for n in range(2)] == ["void", "unbound"]
        assert [teller.amounts(f"e{n}")[0] for n in range(2)] == [0, 5]


class TestJournal(SqliteSuite):
    def test_what_only_a_bug_of_ours_would_write_is_not_written(self) -> None:
        book = Book(now_s=NOW_S, seq=0, last_hash=bytes(32), last_lien=0, last_allocation=1)
        book.accounts = {
            number: Account(id=number, allocation=1, kind=kind, balance=0, floor=0)
            for number, kind in enumerate(KINDS, 4)
        }
        with pytest.raises(RuntimeError, match="of kind place sums to 1, not to nil"):
            book.post(Posting("place", "k", "{}"), {4: 2, 5: -1})
        with pytest.raises(RuntimeError, match="of kind place would overdraw account 4"):
            book.post(Posting("place", "k", "{}"), {4: -1, 5: 1})
        assert (book.txns, book.changed[Account]) == ([], {})

    def test_each_command_is_written_under_its_own_name(self, teller: Teller) -> None:
        for kind, fields in (
            (OpenProject, {"project": "physics"}),
            (OpenAllocation, {"allocation": "grant"}),
            (OpenAllocation, {"allocation": "other"}),
            (Deposit, {"allocation": "grant", "amount_micro_su": 100}),
            (Transfer, {"source": "grant", "target": "other", "amount_micro_su": 1}),
            (Adjust, {"allocation": "grant", "amount_micro_su": 1}),
            (SetTerms, {"allocation": "grant"}),
            (SetCap, {"user": "ada", "cap_micro_su": 1000}),
            (Quote, {"token": "t", "amount_micro_su": 5}),
            (Place, {"token": "t", "amount_micro_su": 5}),
            (Bind, {"token": "t", "job_id": 1, "run": "r"}),
            (Reprice, {"run": "r", "amount_micro_su": 6}),
            (Start, {"run": "r", "amount_micro_su": 6}),
            (MarkUnknown, {"run": "r"}),
            (Settle, {"run": "r", "amount_micro_su": 4}),
            (Refund, {"run": "r", "amount_micro_su": 1}),
            (Place, {"token": "u", "amount_micro_su": 5}),
            (Void, {"token": "u"}),
        ):
            teller.do(kind, **fields)
        kinds = [
            *("open_project", "open_allocation", "open_allocation", "deposit", "transfer", "adjust", "set_terms"),
            *("set_cap", "quote", "place", "bind", "reprice", "start", "mark_unknown", "settle", "refund"),
            *("place", "void"),
        ]
        liens = [0] * 8 + [1] * 8 + [2] * 2
        assert teller.journal() == [(kind, lien, "") for kind, lien in zip(kinds, liens, strict=True)]

    def test_what_moves_money_says_how_much_and_what_does_not_says_nothing(self, teller: Teller) -> None:
        assert teller.do(OpenProject, project="physics") == Receipt(seq=1)
        assert teller.do(OpenAllocation, allocation="grant") == Receipt(seq=2)
        assert teller.do(Deposit, allocation="grant", amount_micro_su=9) == Receipt(seq=3, amount_micro_su=9)
        assert teller.do(Adjust, allocation="grant", amount_micro_su=-2) == Receipt(seq=4, amount_micro_su=-2)
        teller.open(0, name="other")
        moved = teller.do(Transfer, source="grant", target="other", amount_micro_su=3)
        assert moved == Receipt(seq=6, amount_micro_su=3)

    def test_anybody_can_compute_the_hashes_anew(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=30)
        before = bytes(32)
        found = teller.rows("SELECT seq, at_s, kind, lien, key, flags, request, hash FROM txn ORDER BY seq")
        for seq, *fields, digest in found:
            entries = teller.rows("SELECT account, amount FROM entry WHERE seq = %s ORDER BY account", seq)
            text = json.dumps([seq, *fields, *entries], separators=(",", ":"), ensure_ascii=False)
            before = hashlib.sha256(before + text.encode()).digest()
            assert digest == before
        assert len(found) == 4

    def test_entries_name_the_accounts_by_their_numbers(self, teller: Teller) -> None:
        teller.open(100)
        assert teller.moves() == [(0, -100), (4, 100)]
        teller.do(Adjust, allocation="grant", amount_micro_su=-1)
        assert teller.moves() == [(1, 1), (4, -1)]
        teller.running("r", 30)
        teller.do(Settle, run="r", amount_micro_su=20)
        assert teller.moves() == [(4, 10), (5, -30), (6, 20)]

    def test_an_answer_is_kept_as_json(self, teller: Teller) -> None:
        answer = teller.do(OpenProject, key="k", project="physics")
        ((kept, at_s),) = teller.rows("SELECT answer, at_s FROM idempotency WHERE key = 'k'")
        assert (msgspec.json.decode(kept, type=Receipt), at_s) == (answer, NOW_S)
