"""Known ways in which banks of job schedulers lose money, as tests named by their numbers in bank-ledger.md.

Those that are missing here are no matter of the ledger: prices (F3, F4, F6-F8, F17, F21), the plug-ins and the wire
(F13, F23, F25) and Slurm's own accounting (F30).
"""

from carrel.bank import queries
from carrel.model.ledger import (
    Adjust,
    Backfill,
    Bind,
    Deposit,
    MarkUnknown,
    Place,
    Receipt,
    Refund,
    Refusal,
    Reprice,
    Requeue,
    SetCap,
    Settle,
    Start,
    Sweep,
)
from carrel.testing.ledger import NOW_S, LedgerSuite, Teller


class LedgerFailureModes(LedgerSuite):
    """Ways in which known banks lose money, by the numbers of ``docs/reference/bank-ledger.md``."""

    def test_f1_jobs_submitted_one_after_the_other_cannot_spend_the_same_units(self, teller: Teller) -> None:
        teller.open(100)
        answers = [teller.ask(Place, token=f"t{n}", amount_micro_su=40) for n in range(5)]
        assert [isinstance(answer, Receipt) for answer in answers] == [True, True, False, False, False]
        assert teller.amounts() == (20, 80, 0, 0)

    def test_f2_a_start_that_costs_more_than_is_left_can_be_refused_and_the_lien_stays(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=80)
        refusal = teller.refused(Start, run="r", token="t", amount_micro_su=101)
        assert (refusal.why, refusal.needed_micro_su, refusal.available_micro_su) == ("funds", 21, 20)
        assert teller.lien(token="t").state == "unbound"

    def test_f2_by_policy_it_runs_on_with_the_lien_it_has_and_is_flagged(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=80)
        assert teller.do(Start, run="r", token="t", amount_micro_su=101, if_short="keep").flags == ("short",)
        assert teller.amounts() == (20, 80, 0, 0)
        assert teller.lien(run="r").state == "active"

    def test_f5_an_amount_of_any_length_is_weighed_and_never_accepted_for_its_size(self, teller: Teller) -> None:
        teller.open(100)
        assert teller.refused(Place, token="t", amount_micro_su=10**18).why == "funds"
        assert teller.refused(Place, token="t", amount_micro_su=10**18, units=14).why == "invalid"

    def test_f9_an_array_sets_aside_for_all_its_tasks_and_each_settles_its_own(self, teller: Teller) -> None:
        teller.open(1000)
        assert teller.refused(Place, token="a", amount_micro_su=1, units=1001).needed_micro_su == 1001
        teller.do(Place, token="b", amount_micro_su=10, units=100)
        teller.do(Bind, token="b", job_id=7)
        for n in range(100):
            teller.do(Start, run=f"7_{n}", token="b", amount_micro_su=10)
            teller.do(Settle, run=f"7_{n}", amount_micro_su=n % 11)
        assert sum(n % 11 for n in range(100)) == teller.amounts()[2]
        assert teller.amounts()[1] == 0

    def test_f10_components_of_a_het_job_do_not_each_see_the_whole_balance(self, teller: Teller) -> None:
        teller.open(100)
        for offset in (0, 1):
            teller.do(Place, token="h", het_offset=offset, amount_micro_su=40)
        assert teller.refused(Place, token="h", het_offset=2, amount_micro_su=40).available_micro_su == 20
        teller.clock.now_s += 121
        teller.do(Sweep)
        assert teller.amounts() == (100, 0, 0, 0)

    def test_f11_an_unknown_account_is_a_refusal_and_not_an_error(self, teller: Teller) -> None:
        teller.open(100)
        refusal = teller.refused(Place, token="t", project="nobody", amount_micro_su=1)
        assert refusal.why == "unknown"
        assert "'nobody'" in refusal.sentence

    def test_f12_a_run_whose_end_was_never_reported_stays_listed_and_is_charged_late(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 60)
        teller.clock.now_s += 400 * 86400
        teller.do(Sweep)
        (left,) = queries.liens(teller.ledger.store, states=["active"])
        assert (left.run, left.lien_micro_su) == ("r", 60)
        teller.do(Settle, run="r", amount_micro_su=50)
        assert teller.amounts() == (50, 0, 50, 0)

    def test_f14_a_start_told_by_every_node_and_step_is_one_start(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=50)
        for n in range(20):
            teller.do(Start, run="r", token="t", amount_micro_su=60, key=f"node{n}")
        assert teller.amounts() == (40, 60, 0, 0)

    def test_f15_each_run_of_a_requeued_job_is_charged(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("4711.0", 30)
        for n in range(3):
            answer = teller.do(
                Requeue, run=f"4711.{n}", amount_micro_su=7, next_run=f"4711.{n + 1}", next_amount_micro_su=30
            )
            assert answer.flags == ()
            teller.do(Start, run=f"4711.{n + 1}", amount_micro_su=30)
        teller.do(Settle, run="4711.3", amount_micro_su=30)
        assert teller.amounts() == (100 - 21 - 30, 0, 51, 0)

    def test_f16_a_task_that_is_reported_by_two_callers_is_charged_once(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("sluid", 50)
        teller.do(Settle, run="sluid", amount_micro_su=20, key="from-the-hook")
        teller.do(Settle, run="sluid", amount_micro_su=20, key="from-sacct")
        assert teller.refused(Backfill, run="sluid", amount_micro_su=20).why == "exists"
        assert teller.amounts()[2] == 20

    def test_f18_a_user_who_left_is_still_settled(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 50)
        teller.do(SetCap, user="ada", cap_micro_su=0)
        teller.do(Settle, run="r", amount_micro_su=20)
        assert teller.amounts() == (80, 0, 20, 0)

    def test_f19_a_run_that_ends_after_its_allocation_is_settled_and_what_it_left_expires(self, teller: Teller) -> None:
        teller.open(100, end_s=NOW_S + 10)
        teller.running("r", 60)
        teller.clock.now_s += 10
        teller.do(Sweep)
        assert teller.amounts() == (0, 60, 0, 40)
        teller.do(Settle, run="r", amount_micro_su=50)
        teller.do(Sweep)
        assert teller.amounts() == (0, 0, 50, 50)

    def test_f20_nothing_is_clamped_at_zero(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Adjust, allocation="grant", amount_micro_su=-150)
        assert teller.amounts()[0] == -50
        teller.running("r", 0)
        teller.do(Settle, run="r", amount_micro_su=0)
        assert teller.refused(Refund, run="r", amount_micro_su=1).available_micro_su == 0

    def test_f22_a_changed_limit_is_repriced_and_refused_where_it_is_not_covered(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=50)
        teller.do(Bind, token="t", job_id=1, run="r")
        assert teller.refused(Reprice, run="r", amount_micro_su=101).needed_micro_su == 51
        teller.do(Reprice, run="r", amount_micro_su=100)
        assert teller.amounts() == (0, 100, 0, 0)
        teller.do(Reprice, run="r", amount_micro_su=30)
        assert teller.amounts() == (70, 30, 0, 0)

    def test_f24_no_sum_overflows(self, teller: Teller) -> None:
        teller.open(10**18)
        teller.do(Deposit, allocation="grant", amount_micro_su=10**18)
        assert teller.refused(Deposit, allocation="grant", amount_micro_su=10**18).why == "invalid"
        answers = [teller.ask(Backfill, run=f"r{n}", amount_micro_su=10**18) for n in range(9)]
        assert isinstance(answers[0], Receipt)
        assert isinstance(answers[-1], Refusal)
        assert answers[-1].why == "invalid"

    def test_f26_a_lien_that_became_no_job_lapses_by_itself(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="test-only", amount_micro_su=60)
        teller.clock.now_s += 119
        teller.do(Sweep)
        assert teller.amounts() == (40, 60, 0, 0)
        teller.clock.now_s += 1
        teller.do(Sweep)
        assert teller.amounts() == (100, 0, 0, 0)
        assert teller.lien(token="test-only").state == "void"
        assert teller.refused(Bind, token="test-only", job_id=1, run="r").why == "state"

    def test_f27_a_job_that_never_starts_does_not_keep_its_lien_for_ever(self, teller: Teller) -> None:
        teller.open(100)
        teller.do(Place, token="t", amount_micro_su=60)
        teller.do(Bind, token="t", job_id=1, run="r")
        teller.clock.now_s += 84 * 86400
        teller.do(Sweep)
        assert teller.amounts() == (100, 0, 0, 0)

    def test_f28_only_the_banks_clock_counts_and_it_may_step_back(self, teller: Teller) -> None:
        teller.open(100, start_s=NOW_S, end_s=NOW_S + 100)
        teller.do(Place, token="t", amount_micro_su=60)
        teller.clock.now_s -= 1
        assert teller.refused(Place, token="u", amount_micro_su=1).available_micro_su == 0
        teller.clock.now_s += 1
        teller.do(Place, token="v", amount_micro_su=1)

    def test_f29_what_ran_past_its_limit_is_owed_and_flagged(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 90)
        assert teller.do(Settle, run="r", amount_micro_su=130).flags == ("overrun", "overdrawn")
        assert teller.amounts() == (-30, 0, 130, 0)
        assert teller.refused(Place, token="u", amount_micro_su=1).why == "funds"

    def test_f31_an_unknown_end_keeps_its_lien_until_somebody_decides(self, teller: Teller) -> None:
        teller.open(100)
        teller.running("r", 60)
        teller.do(MarkUnknown, run="r")
        teller.clock.now_s += 1000 * 86400
        teller.do(Sweep)
        assert teller.amounts() == (40, 60, 0, 0)
        teller.do(Settle, run="r", amount_micro_su=60)

    def test_f32_one_bad_record_of_a_batch_stops_none_of_the_others(self, teller: Teller) -> None:
        teller.open(100)
        for run in "abc":
            teller.running(run, 10)
        commands = [teller.make(Settle, run=run, amount_micro_su=10) for run in ("a", "nobody", "b", "c")]
        answers = teller.ledger.submit(commands).result()
        assert [isinstance(answer, Receipt) for answer in answers] == [True, False, True, True]
        assert teller.amounts() == (70, 0, 30, 0)
