"""What the money of a run needs next: each row of the table of ``carrel.core.billing``, and which lien is whose."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from carrel.config import RefundPercent
from carrel.core import billing
from carrel.core.billing import Due
from carrel.core.folio import Folio, name_of
from carrel.model.cluster import ClusterFacts, PartitionFacts
from carrel.model.job import JobKey
from carrel.model.ledger import Backfill, Bind, LienView, MarkUnknown, Refund, Reprice, Settle, Start, Void
from carrel.model.price import NoPrice, PriceBook, PriceList, Rate, Version
from carrel.model.run import Seen, Used, guests_of, mark_of, token_of

BOOK = PriceBook(
    (
        Version(
            name="v",
            valid_from=datetime(2026, 1, 1, tzinfo=UTC),
            partitions={"main": PriceList(rates={"cpu": Rate(1_000_000), "guest": Rate(500_000)})},
        ),
    )
)
CLUSTER = ClusterFacts(partitions={"main": PartitionFacts(name="main")}, default_partition="main")
DUE = Due(700, 3, {"seconds": 1})
TOKEN = "0123456789abcdef" * 2
START_S = 1_795_000_000


def seen(state: str = "running", **changes: Any) -> Seen:
    run = Seen(
        key=JobKey(cluster="k", job_id=7, submit_s=100),
        state="running",
        slurm_state="RUNNING",
        user="ada",
        account="physics",
        partitions=("main",),
        qos="normal",
        resources={"cpu": 4, "mem": 400, "node": 2},
        limit_s=3600,
        start_s=START_S,
        placed=True,
        mark=mark_of(TOKEN),
    )
    return msgspec.structs.replace(run, state=state, **changes)


def used(**changes: Any) -> Used:
    run = Used(
        job_id=7,
        submit_s=100,
        state="COMPLETED",
        user="ada",
        account="physics",
        partition="main",
        qos="normal",
        resources={"cpu": 4},
        start_s=START_S,
        end_s=START_S + 9,
        elapsed_s=9,
        mark=mark_of(TOKEN),
    )
    return msgspec.structs.replace(run, **changes)


def lien(state: str = "bound", **changes: Any) -> LienView:
    found = LienView(
        id=5,
        cluster="k",
        token=TOKEN,
        run="" if state == "unbound" else "7.100.0",
        job_id=0 if state == "unbound" else 7,
        project="physics",
        user="ada",
        state="bound",
        units=1,
        lien_micro_su=1000,
        charged_micro_su=0,
        refunded_micro_su=0,
        expires_s=None,
        flags=(),
    )
    return msgspec.structs.replace(found, state=state, **changes)


def go_on(run: Seen, given: LienView, due: Due | None = DUE) -> list[type]:
    return [type(command) for command in billing.go_on(run, given, due, ref="7.100.0", stamp="x")]


def end(run: Used, given: LienView | None, due: Due = DUE) -> tuple[Any, ...]:
    return billing.end(run, given, due, RefundPercent(preempted=50), cluster="k", ref="7.100.0")


def test_a_waiting_run_is_bound_to_the_lien_of_its_token() -> None:
    (bind,) = billing.go_on(seen("pending"), lien("unbound"), None, ref="7.100.0", stamp="x")
    assert isinstance(bind, Bind)
    assert (bind.token, bind.job_id, bind.run) == (TOKEN, 7, "7.100.0")


def test_an_array_is_bound_without_a_run_since_each_task_brings_its_own() -> None:
    run = seen("pending", array_job_id=7, waiting_tasks=3)
    (bind,) = billing.go_on(run, lien("unbound", units=3), None, ref="7.100.0", stamp="x")
    assert isinstance(bind, Bind)
    assert bind.run == ""
    again = seen("pending", array_job_id=7, key=JobKey(cluster="k", job_id=9, submit_s=300, restart=1))
    (bind,) = billing.go_on(again, lien("unbound"), None, ref="9.300.1", stamp="x")
    assert isinstance(bind, Bind)
    assert (bind.job_id, bind.run) == (7, "9.300.1")


def test_a_waiting_run_is_priced_anew_when_its_price_changed_and_only_then() -> None:
    assert go_on(seen("pending"), lien()) == [Reprice]
    assert go_on(seen("pending"), lien(), Due(1000, 3, {})) == []
    assert go_on(seen("held"), lien(), None) == []
    assert go_on(seen("pending"), lien(units=3, lien_micro_su=2100)) == []


def test_a_price_that_the_account_does_not_cover_stops_nobody_who_was_let_in() -> None:
    for run, given in ((seen("pending"), lien()), (seen(), lien())):
        (command,) = billing.go_on(run, given, DUE, ref="7.100.0", stamp="x")
        assert isinstance(command, Reprice | Start)
        assert (command.if_short, command.run, command.token) == ("keep", "7.100.0", "")


def test_a_lien_that_is_placed_late_is_of_one_unit_where_its_job_is_no_array() -> None:
    placed = billing.place(seen(), DUE, token="again/1", project="physics")
    assert (placed.key, placed.units, placed.user, placed.project) == ("l/k/again/1/0", 1, "ada", "physics")


def test_a_run_that_starts_is_priced_by_what_it_was_given() -> None:
    assert go_on(seen(), lien("unbound")) == [Bind, Start]
    assert go_on(seen("suspended"), lien()) == [Start]


def test_a_run_without_a_limit_starts_at_the_price_that_it_has() -> None:
    (start,) = billing.go_on(seen(limit_s=None), lien(lien_micro_su=900), None, ref="r", stamp="x")
    assert isinstance(start, Start)
    assert (start.amount_micro_su, start.price_version) == (900, 0)
    task = seen(limit_s=None, array_job_id=7)
    (start,) = billing.go_on(task, lien(run="", units=3, lien_micro_su=900), None, ref="r", stamp="x")
    assert isinstance(start, Start)
    assert (start.amount_micro_su, start.token) == (300, TOKEN)


def test_a_running_run_is_only_priced_anew() -> None:
    assert go_on(seen(), lien("active")) == [Reprice]
    assert go_on(seen(), lien("active"), None) == []


def test_a_run_that_was_not_gone_is_started_under_a_key_of_its_own() -> None:
    (start,) = billing.go_on(seen(), lien("unknown_end"), DUE, ref="7.100.0", stamp="x")
    assert start.key == "s/k/7.100.0/x"


def test_what_a_person_has_settled_while_it_runs_is_left_alone() -> None:
    assert go_on(seen(), lien("settled")) == []


def test_an_ended_run_is_charged_whatever_was_seen_of_it_before() -> None:
    assert [type(each) for each in end(used(), lien("active"))] == [Settle]
    assert [type(each) for each in end(used(), lien("bound"))] == [Settle]
    assert [type(each) for each in end(used(), lien("unbound"))] == [Bind, Settle]
    assert [type(each) for each in end(used(), lien("unknown_end"))] == [Settle]


def test_a_task_that_nobody_saw_run_takes_its_unit_and_is_charged() -> None:
    array = lien("bound", run="", units=3, lien_micro_su=3000)
    start, settle = end(used(array_job_id=1), array)
    assert isinstance(start, Start)
    assert (start.token, start.amount_micro_su, start.price_version) == (TOKEN, 1000, 0)
    assert isinstance(settle, Settle)
    bind, *_ = end(used(array_job_id=1), lien("unbound", units=3))
    assert isinstance(bind, Bind)
    assert (bind.job_id, bind.run) == (1, "")
    (settle,) = end(used(array_job_id=1), lien("active"))
    assert isinstance(settle, Settle)


def test_a_run_without_a_lien_is_charged_all_the_same() -> None:
    (backfill,) = end(used(), None)
    assert isinstance(backfill, Backfill)
    assert (backfill.project, backfill.user, backfill.key) == ("physics", "ada", "e/k/7.100.0")


def test_what_was_cancelled_before_it_began_gives_its_lien_back() -> None:
    cancelled = used(state="CANCELLED", elapsed_s=0)
    assert [type(each) for each in end(cancelled, lien())] == [Void]
    assert [type(each) for each in end(cancelled, lien("unbound"))] == [Bind, Void]
    assert end(msgspec.structs.replace(cancelled, array_job_id=7), lien(run="", units=2)) == ()
    assert [type(each) for each in end(used(state="CANCELLED", elapsed_s=1), lien())] == [Settle]
    assert [type(each) for each in end(used(state="FAILED", elapsed_s=0), lien())] == [Settle]
    assert [type(each) for each in end(cancelled, lien("active"))] == [Settle]


def test_a_node_that_fails_costs_the_user_nothing_and_a_preemption_what_the_site_says() -> None:
    settle, refund = end(used(state="NODE_FAIL"), lien("active"))
    assert isinstance(refund, Refund)
    assert refund.amount_micro_su == settle.amount_micro_su
    *_, half = end(used(state="PREEMPTED"), lien("active"))
    assert half.amount_micro_su == 350
    *_, whole = end(used(state="BOOT_FAIL"), lien("active"))
    assert (whole.amount_micro_su, whole.key) == (700, "r/k/7.100.0/BOOT_FAIL/rule")
    assert len(end(used(state="NODE_FAIL"), lien("active"), Due(0, 3, {}))) == 1


def test_the_leftover_of_an_array_is_freed_by_its_token() -> None:
    (void,) = billing.never_began(lien(run="", units=2), cluster="k")
    assert isinstance(void, Void)
    assert void.token == TOKEN
    (void,) = billing.never_began(lien("unbound"), cluster="k")
    assert isinstance(void, Void)
    (void,) = billing.never_began(lien(), cluster="k")
    assert isinstance(void, Void)
    assert (void.run, void.token) == ("7.100.0", "")
    assert billing.never_began(lien("active"), cluster="k") == ()


def gone(given: LienView, last: Due | None, unknown_for_s: float) -> list[type]:
    return [type(each) for each in billing.gone(given, last, cluster="k", unknown_for_s=unknown_for_s)]


def test_a_run_that_nobody_knows_is_marked_and_settled_an_hour_later_by_what_was_last_seen() -> None:
    assert gone(lien("active"), DUE, 60) == []
    assert gone(lien("active"), DUE, 61) == [MarkUnknown]
    assert gone(lien("unknown_end"), DUE, 3600) == []
    assert gone(lien("unknown_end"), DUE, 3601) == [Settle]


def test_f31_a_runaway_is_never_settled_by_itself() -> None:
    assert gone(lien("unknown_end"), None, 10**6) == []


def test_f27_a_job_that_nobody_saw_run_gives_its_lien_back_after_an_hour() -> None:
    assert gone(lien("bound"), None, 3600) == []
    assert gone(lien("bound"), None, 3601) == [Void]


def test_what_must_be_set_aside_covers_the_limit_and_what_slurm_adds_to_it() -> None:
    due = billing.needed(seen(), book=BOOK, cluster=CLUSTER, now_s=0)
    assert isinstance(due, Due)
    assert due.amount_micro_su == -(-4_000_000 * 3660 // 3600)


@pytest.mark.parametrize("over", [0, 120])
def test_the_partitions_own_lateness_goes_before_the_clusters(over: int) -> None:
    part = PartitionFacts(name="main", over_time_s=over)
    cluster = ClusterFacts(partitions={"main": part}, over_time_s=600)
    due = billing.needed(seen(), book=BOOK, cluster=cluster, now_s=0)
    assert isinstance(due, Due)
    assert due.inputs["seconds"] == 3660 + over


def test_a_run_that_may_go_on_for_ever_has_no_such_amount() -> None:
    assert billing.needed(seen(limit_s=None), book=BOOK, cluster=CLUSTER, now_s=0) is None
    cluster = ClusterFacts(partitions={}, over_time_s="unlimited")
    assert billing.needed(seen(), book=BOOK, cluster=cluster, now_s=0) is None


def test_guests_are_counted_by_the_token_since_slurm_does_not_count_them() -> None:
    charged = billing.charge(used(mark=mark_of(f"{TOKEN}.t3")), book=BOOK)
    assert isinstance(charged, Due)
    assert charged.amount_micro_su == (4_000_000 + 3 * 500_000) * 9 // 3600
    charged = billing.charge(used(mark=mark_of(f"{TOKEN}.g")), book=BOOK)
    assert isinstance(charged, Due)
    assert charged.inputs["resources"] == {"cpu": 4, "guest": 1}
    assert guests_of(TOKEN, nodes=2) == 0
    assert token_of("of a person") == ""


def test_a_charge_is_computed_again_from_what_the_ledger_keeps_of_it() -> None:
    due = billing.charge(used(), book=BOOK)
    assert isinstance(due, Due)
    again = billing.recompute(BOOK)
    assert again(due.version, due.inputs) == due.amount_micro_su
    assert again(due.version + 1, due.inputs) is None
    assert again(due.version, {"what": "else"}) is None
    for key in ("resources", "partition", "qos", "seconds", "moment_s", "source"):
        assert again(due.version, {name: value for name, value in due.inputs.items() if name != key}) is None
    assert again(due.version, due.inputs | {"partition": "other"}) is None
    assert isinstance(billing.charge(used(partition="other"), book=BOOK), NoPrice)


def test_a_charge_says_of_what_end_it_is_and_is_priced_by_when_the_run_began() -> None:
    due = billing.charge(used(), book=BOOK)
    assert isinstance(due, Due)
    assert (due.inputs["state"], due.inputs["source"], due.inputs["moment_s"]) == ("COMPLETED", "slurmdbd", START_S)
    never = billing.charge(used(start_s=0, elapsed_s=0), book=BOOK)
    assert isinstance(never, Due)
    assert (never.amount_micro_su, never.inputs["moment_s"]) == (0, START_S + 9)


def test_what_the_queue_does_not_show_of_a_waiting_job_is_one_task_on_one_node_without_gpus() -> None:
    request = billing.asked(seen("pending", resources={}, qos="", mark="", waiting_tasks=0))
    assert (request.min_nodes, request.max_nodes, request.tasks, request.memory_per_node_mib) == (1, 1, 1, 0)
    assert (request.qos, request.gpus.per_job, request.array_tasks) == ((), {}, 1)
    assert (request.guest, request.guest_per_task, request.time_limit) == (False, False, 3600)
    typed = billing.asked(seen("pending", resources={"gres/gpu": 1, "gres/gpu:a100": 1}, waiting_tasks=5))
    assert (typed.gpus.per_job, typed.array_tasks, typed.qos) == ({"a100": 1}, 5, ("normal",))
    per_task = billing.asked(seen("pending", mark=mark_of(f"{TOKEN}.t8")))
    assert (per_task.guest, per_task.guest_per_task) == (True, True)
    per_node = billing.asked(seen("pending", mark=mark_of(f"{TOKEN}.g")))
    assert (per_node.guest, per_node.guest_per_task) == (True, False)


def test_what_a_waiting_job_asks_for_is_read_off_the_queue() -> None:
    resources = {"cpu": 4, "mem": 401, "node": 2, "gres/gpu": 3, "gres/gpu:a100": 1, "license/matlab": 2}
    request = billing.asked(seen("pending", resources=resources, limit_s=None, mark=mark_of(f"{TOKEN}.g")))
    assert (request.min_nodes, request.tasks, request.memory_per_node_mib) == (2, 4, 201)
    assert request.gpus.per_job == {"a100": 1, "": 2}
    assert (request.licences, request.guest, request.time_limit) == ({"matlab": 2}, True, "unlimited")


def test_a_run_is_found_by_itself_before_its_token() -> None:
    folio = Folio([lien("settled"), lien("unbound", id=6)])
    found = folio.of(seen())
    assert found is not None
    assert found.state == "settled"
    other = folio.of(seen(key=JobKey(cluster="k", job_id=8, submit_s=1)))
    assert other is not None
    assert other.id == 6


def test_f15_a_requeued_run_does_not_take_the_lien_of_its_array() -> None:
    array = lien("bound", run="", units=2)
    folio = Folio([array])
    task = seen(array_job_id=7, key=JobKey(cluster="k", job_id=9, submit_s=200))
    assert folio.of(task) is array
    assert folio.of(msgspec.structs.replace(task, key=JobKey(cluster="k", job_id=9, submit_s=300, restart=1))) is None
    assert folio.arrays() == {7: array}


def test_a_run_whose_lien_came_to_nothing_has_another_key() -> None:
    folio = Folio([lien("void")])
    assert folio.of(seen(mark="")) is None
    assert folio.ref(seen()) == "7.100.0+1"
    assert Folio([]).ref(used(restart=2)) == "7.100.2"


def test_a_lien_that_was_just_placed_is_its_runs_at_once() -> None:
    folio = Folio([lien("settled", run="somebody's")])
    fresh = lien("unbound", token="again/1")
    folio.give(seen(), fresh)
    assert folio.of(seen()) is fresh
    assert folio.open == {5: fresh}


@pytest.mark.parametrize("state", ["unbound", "bound", "active", "unknown_end"])
def test_the_open_liens_of_a_cluster_are_known_by_their_number(state: str) -> None:
    found = lien(state)
    assert Folio([found, lien("void", id=6)]).open == {5: found}


@pytest.mark.parametrize("state", ["settled", "part_refunded", "refunded"])
def test_a_run_that_was_charged_keeps_its_lien_whatever_was_given_back(state: str) -> None:
    charged = lien(state)
    assert Folio([charged]).of(seen(mark="")) is charged
    assert Folio([charged]).open == {}


def test_of_several_liens_of_a_run_the_open_one_counts_and_else_the_latest_that_was_charged() -> None:
    def of(liens: Sequence[LienView]) -> LienView | None:
        return Folio(liens).of(seen(mark=""))

    first, second, opened = lien("refunded", id=1), lien("settled", id=2), lien("active", id=3)
    assert of([opened, first, second]) is opened
    assert of([first, second]) is second
    assert of([lien("void")]) is None


def test_a_token_whose_lien_was_used_up_finds_nothing() -> None:
    assert Folio([lien("void", run="")]).of(seen()) is None
    assert Folio([lien("unbound", token="")]).of(seen(mark="")) is None


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("7.100.0", (7, 100)),
        ("7.100.0+2", (7, 100)),
        ("7.100", None),
        ("7.100.0.1", None),
        ("x.100.0", None),
        ("7.x.0", None),
    ],
)
def test_a_key_of_the_ledger_names_a_run_where_it_is_one_of_ours(ref: str, name: tuple[int, int] | None) -> None:
    assert name_of(ref) == name
