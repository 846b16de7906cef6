"""The bank over REST: who may do what, what is refused and how, and that a refusal writes nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.daemons import callers
from carrel.model.access import Associations
from carrel.testing.desk import ROOT, RestBank, rest_bank

SU = 1_000_000
MEMBER, STRANGER, COORDINATOR, ADMINISTRATOR = 1, 2, 3, 4
"""Uids that every Debian has: daemon, bin, sys, sync."""
PEOPLE = Associations(
    accounts={"physics": "", "lasers": "physics", "biology": ""},
    users={"physics": frozenset({"daemon"}), "lasers": frozenset(), "biology": frozenset({"bin"})},
    coordinators={"physics": frozenset({"sys"})},
    administrators=frozenset({"sync"}),
)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[RestBank]:
    with rest_bank(tmp_path) as found:
        found.slurm.known = PEOPLE
        yield found


@pytest.fixture
def physics(desk: RestBank) -> RestBank:
    """An account with 100 SU of which a run of ``daemon`` was charged 10, and an account of somebody else's."""
    return filled(desk)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestBank]:
    """The same, for all tests that change nothing in it."""
    with rest_bank(tmp_path_factory.mktemp("unchanged")) as found:
        found.slurm.known = PEOPLE
        yield filled(found)


def filled(desk: RestBank) -> RestBank:
    desk.account("physics", 100 * SU)
    desk.account("biology", 7 * SU)
    for do, words in (
        ("place", {"token": "t", "project": "physics", "user": "daemon", "amount_micro_su": 20 * SU}),
        ("bind", {"token": "t", "user": "daemon", "job_id": 7, "run": "r7"}),
        ("settle", {"run": "r7", "amount_micro_su": 10 * SU, "inputs": {"cpu": 4}}),
        ("place", {"token": "u", "project": "biology", "user": "bin", "amount_micro_su": 1 * SU}),
    ):
        command = {"do": do, "key": f"{do}/{words.get('token', '')}", "cluster": "c", **words}
        (answer,) = desk.done("POST", "/v1/commands", [command])
        assert answer["type"] == "receipt", answer
    return desk


def gift(amount: Any = 5 * SU, **more: Any) -> dict[str, Any]:
    return {"amount_micro_su": amount, "reason": "spring", **more}


def test_an_account_shows_what_became_of_its_money_side_by_side(physics: RestBank) -> None:
    (start,) = physics.done(
        "POST", "/v1/commands", [{"do": "place", "key": "w", "cluster": "c", "token": "w", "project": "physics",
                                  "user": "daemon", "amount_micro_su": 3 * SU}]
    )  # fmt: skip
    assert start["type"] == "receipt"
    shown = physics.done("GET", "/v1/accounts/physics")
    figures = {name: shown[f"{name}_micro_su"] for name in ("settled", "running", "committed", "available")}
    assert figures == {"settled": 10 * SU, "running": 0, "committed": 3 * SU, "available": 87 * SU}
    assert [one["user"] for one in shown["users"]] == ["daemon"]


def test_the_same_request_under_the_same_key_is_done_once_and_answered_alike(physics: RestBank) -> None:
    first = physics.ask("POST", "/v1/accounts/physics/deposits", gift(), key="d1")
    written = physics.written()
    again = physics.ask("POST", "/v1/accounts/physics/deposits", gift(), key="d1")
    assert (again.status, again.json) == (first.status, first.json) == (201, first.json)
    assert physics.written() == written


def test_another_request_under_the_same_key_is_a_conflict(physics: RestBank) -> None:
    physics.ask("POST", "/v1/accounts/physics/deposits", gift(), key="d1")
    answer = physics.ask("POST", "/v1/accounts/physics/deposits", gift(6 * SU), key="d1")
    assert (answer.status, answer.json["why"]) == (409, "conflict")


def test_what_changes_money_needs_a_key(unchanged: RestBank) -> None:
    written = unchanged.written()
    answer = unchanged.ask("POST", "/v1/accounts/physics/deposits", gift())
    assert answer.status == 400
    assert "idempotency-key" in answer.text
    assert unchanged.written() == written


BAD_AMOUNTS = ["-1", "0", "NaN", "Infinity", "1e400", '"12.5"', "12.5", "9223372036854775808", "1000000000000000001",
               "null", "true", "[]", "1" * 5000]  # fmt: skip


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_an_amount_that_is_none_is_refused_and_nothing_is_written(unchanged: RestBank, amount: str) -> None:
    written = unchanged.written()
    for path in ("accounts/physics/deposits", "charges/c/r7/refunds"):
        key = f"bad/{amount[:20]}"
        answer = unchanged.ask("POST", f"/v1/{path}", f'{{"amount_micro_su": {amount}, "reason": "x"}}', key=key)
        assert answer.status == 400, answer.text
        assert answer.json["error"]
    assert unchanged.written() == written


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("accounts/nobody/deposits", gift()),
        ("accounts/physics/deposits", gift(allocation="nothing")),
        ("accounts/physics/deposits", gift(allocation="biology")),
        ("transfers", gift(source="physics", target="nobody")),
        ("charges/c/none/refunds", gift()),
        ("charges/other/r7/refunds", gift()),
        ("accounts/nobody/cap", {"cap_micro_su": 1, "reason": "x"}),
        ("allocations/nothing/terms", {"reason": "x"}),
        ("accounts/nobody/allocations", {"allocation": "x"}),
        ("accounts", {"account": "x", "parent": "nobody"}),
        ("liens", {"cluster": "c", "token": "n", "account": "nobody", "user": "daemon", "amount_micro_su": 1}),
    ],
)
def test_what_is_not_there_is_not_found_and_nothing_is_written(unchanged: RestBank, path: str, body: Any) -> None:
    written = unchanged.written()
    answer = unchanged.ask("POST", f"/v1/{path}", body, key=f"unknown/{path}/{hash(str(body))}")
    assert answer.status == 404, answer.text
    assert unchanged.written() == written


@pytest.mark.parametrize(
    "terms",
    [
        {"starts": "2026-02-01T00:00:00Z", "ends": "2026-01-01T00:00:00Z"},
        {"starts": "2026-02-01T00:00:00Z", "ends": "2026-02-01T00:00:00Z"},
        {"starts": "1960-01-01T00:00:00Z"},
        {"starts": "2026-02-01T00:00:00"},
        {"ends": "2026-02-30T00:00:00Z"},
        {"ends": "soon"},
        {"priority": 1001},
        {"credit_micro_su": -1},
        {"unheard": 1},
    ],
)
def test_dates_out_of_order_and_terms_that_are_none_are_refused(unchanged: RestBank, terms: dict[str, Any]) -> None:
    written = unchanged.written()
    key = f"x/{terms}".replace(" ", "")[:200]
    answer = unchanged.ask("POST", "/v1/accounts/physics/allocations", {"allocation": "x", **terms}, key=key)
    assert answer.status == 400, answer.text
    assert unchanged.written() == written


def test_a_refusal_carries_the_figures_and_the_next_step(unchanged: RestBank) -> None:
    body = {"cluster": "c", "token": "n", "account": "physics", "user": "daemon", "amount_micro_su": 91 * SU}
    answer = unchanged.ask("POST", "/v1/liens", body, key="n")
    assert answer.status == 402
    assert answer.json == {
        "error": "account 'physics' has 90.00 SU left, this job may need 91.00 SU; see: carrel account show physics",
        "why": "funds",
        "needed_micro_su": 91 * SU,
        "available_micro_su": 90 * SU,
    }


WRITES = [
    ("POST", "/v1/accounts", {"account": "x"}),
    ("POST", "/v1/accounts/physics/cap", {"cap_micro_su": 1, "reason": "x"}),
    ("POST", "/v1/accounts/physics/allocations", {"allocation": "x"}),
    ("POST", "/v1/allocations/physics/terms", {"reason": "x"}),
    ("POST", "/v1/accounts/physics/deposits", gift()),
    ("POST", "/v1/accounts/physics/adjustments", gift()),
    ("POST", "/v1/transfers", gift(source="physics", target="biology")),
    ("POST", "/v1/carry-overs", gift(source="physics", target="biology", source_allocation="physics")),
    ("POST", "/v1/charges/c/r7/refunds", gift()),
    ("POST", "/v1/charges/c/r7/corrections", gift()),
    ("POST", "/v1/liens", {"cluster": "c", "token": "n", "account": "physics", "user": "daemon", "amount_micro_su": 1}),
    ("POST", "/v1/liens/c/r7/release", {"reason": "x"}),
    ("POST", "/v1/commands", [{"do": "sweep", "key": "s"}]),
    ("POST", "/v1/bank/sync", None),
]


@pytest.mark.parametrize("uid", [MEMBER, STRANGER, COORDINATOR])
@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_only_administrators_change_anything(unchanged: RestBank, method: str, path: str, body: Any, uid: int) -> None:
    written = unchanged.written()
    answer = unchanged.ask(method, path, body, key="forbidden", uid=uid)
    assert answer.status == 403, answer.text
    assert unchanged.written() == written


def test_slurms_administrators_may_what_root_may(physics: RestBank) -> None:
    answer = physics.ask("POST", "/v1/accounts/physics/deposits", gift(), key="d", uid=ADMINISTRATOR)
    assert answer.status == 201
    (row,) = [r for r in physics.done("GET", "/v1/accounts/physics/statement")["rows"] if r["reason"] == "spring"]
    assert row["actor"] == "sync"


def test_the_owner_of_slurm_may_what_root_may(physics: RestBank) -> None:
    physics.bank.slurm_settings = {"SlurmUser": f"bin({STRANGER})"}
    assert physics.ask("POST", "/v1/bank/verify", uid=STRANGER).status == 200


@pytest.mark.parametrize(
    ("uid", "seen"),
    [
        (ROOT, ["biology", "physics"]),
        (ADMINISTRATOR, ["biology", "physics"]),
        (MEMBER, ["physics"]),
        (COORDINATOR, ["physics"]),
        (STRANGER, ["biology"]),
        (65534, []),
    ],
)
def test_each_sees_the_accounts_that_are_theirs(unchanged: RestBank, uid: int, seen: list[str]) -> None:
    assert [one["name"] for one in unchanged.ask("GET", "/v1/accounts", uid=uid).json] == seen


@pytest.mark.parametrize(
    ("hidden", "absent"),
    [
        ("/v1/accounts/physics", "/v1/accounts/ghostly"),
        ("/v1/accounts/physics/statement", "/v1/accounts/ghostly/statement"),
        ("/v1/charges/c/r7", "/v1/charges/c/r8"),
    ],
)
def test_what_is_somebody_elses_is_answered_like_what_is_not_there(
    unchanged: RestBank, hidden: str, absent: str
) -> None:
    theirs = unchanged.ask("GET", hidden, uid=STRANGER)
    nothing = unchanged.ask("GET", absent, uid=STRANGER)
    assert (theirs.status, nothing.status) == (404, 404)
    assert theirs.text.replace("physics", "#").replace("r7", "#") == nothing.text.replace("ghostly", "#").replace(
        "r8", "#"
    )


def test_charges_of_others_are_seen_by_those_who_may_read_the_account(unchanged: RestBank) -> None:
    def runs(uid: int, query: str = "") -> list[str]:
        return [one["run"] for one in unchanged.ask("GET", f"/v1/charges{query}", uid=uid).json]

    assert runs(MEMBER) == ["r7"]
    assert runs(COORDINATOR) == []
    assert runs(COORDINATOR, "?account=physics") == ["r7"]
    assert runs(STRANGER, "?account=physics") == []
    assert runs(STRANGER, "?user=daemon") == []
    assert runs(ROOT, "?state=settled&job=7") == ["r7"]


def test_a_member_reads_no_statement_of_all_and_no_other_user(physics: RestBank) -> None:
    answer = physics.ask("GET", "/v1/accounts/physics/statement", uid=MEMBER)
    assert answer.status == 403
    assert "carrel charge list" in answer.text
    physics.done("POST", "/v1/accounts/physics/cap", {"user": "sys", "cap_micro_su": 1, "reason": "x"}, key="cap")
    shown = physics.ask("GET", "/v1/accounts/physics", uid=MEMBER).json
    assert [one["user"] for one in shown["users"]] == ["daemon"]
    assert len(physics.ask("GET", "/v1/accounts/physics", uid=COORDINATOR).json["users"]) == 2


def test_a_charge_shows_how_it_came_about(unchanged: RestBank) -> None:
    detail = unchanged.ask("GET", "/v1/charges/c/r7", uid=MEMBER).json
    assert [event["what"] for event in detail["events"]] == ["place", "bind", "settle"]
    assert detail["events"][-1]["inputs"] == {"cpu": 4}
    assert detail["charge"]["charged_micro_su"] == 10 * SU


def test_where_slurm_keeps_no_accounting_who_used_an_account_belongs_to_it(physics: RestBank) -> None:
    physics.slurm.known = None
    assert physics.desk is not None
    physics.desk.callers._asked_at_s = float("-inf")
    assert [one["name"] for one in physics.ask("GET", "/v1/accounts", uid=MEMBER).json] == ["physics"]


def test_a_slurmdbd_that_is_away_makes_nobody_more_than_they_were(physics: RestBank) -> None:
    assert physics.ask("GET", "/v1/bank", uid=ADMINISTRATOR).status == 200
    physics.slurm.away = True
    assert physics.desk is not None
    physics.desk.callers._asked_at_s = float("-inf")
    assert physics.ask("GET", "/v1/bank", uid=ADMINISTRATOR).status == 200
    assert physics.ask("GET", "/v1/bank", uid=MEMBER).status == 403


def test_a_user_who_has_just_got_an_account_does_not_wait_a_minute_to_see_it(desk: RestBank) -> None:
    now_s = 0.0
    desk.slurm.known = msgspec.structs.replace(PEOPLE, users={"physics": frozenset({"bin"})})
    filled(desk)
    assert desk.desk is not None
    desk.desk.callers._clock = lambda: now_s
    desk.desk.callers._asked_at_s = float("-inf")

    def seen() -> int:
        return desk.ask("GET", "/v1/accounts/physics", uid=MEMBER).status

    assert seen() == 404
    desk.slurm.known = PEOPLE
    now_s = callers.ASSOCIATIONS_RETRY_S / 2
    assert seen() == 404, "slurmdbd would be asked with each question of a stranger"
    now_s = callers.ASSOCIATIONS_RETRY_S
    assert seen() == 200


def test_the_pages_of_a_statement_add_up(unchanged: RestBank) -> None:
    whole = unchanged.done("GET", "/v1/accounts/physics/statement")
    assert whole["next_after"] is None
    rows, after = [], 0
    while True:
        page = unchanged.done("GET", f"/v1/accounts/physics/statement?limit=2&after={after}")
        rows += page["rows"]
        if page["next_after"] is None:
            break
        after = page["next_after"]
    assert rows == whole["rows"]
    assert sum(row["available_micro_su"] for row in rows) == 90 * SU
    assert sum(row["settled_micro_su"] for row in rows) == 10 * SU


def test_accounts_of_slurm_are_opened_once_with_what_is_above_them(desk: RestBank) -> None:
    assert desk.done("POST", "/v1/bank/sync")["opened"] == ["biology", "physics", "lasers"]
    assert desk.done("POST", "/v1/bank/sync") == {"opened": [], "known": 3}
    assert desk.done("GET", "/v1/accounts/lasers")["parent"] == "physics"


def test_a_coordinator_reads_the_accounts_below_too(desk: RestBank) -> None:
    desk.done("POST", "/v1/bank/sync")
    assert [one["name"] for one in desk.ask("GET", "/v1/accounts", uid=COORDINATOR).json] == ["lasers", "physics"]


def test_an_account_with_several_allocations_asks_which(physics: RestBank) -> None:
    physics.done("POST", "/v1/accounts/physics/allocations", {"allocation": "more"}, key="more")
    answer = physics.ask("POST", "/v1/accounts/physics/deposits", gift(), key="d")
    assert answer.status == 400
    assert "several allocations (physics, more)" in answer.json["error"]
    assert physics.ask("POST", "/v1/accounts/physics/deposits", gift(allocation="more"), key="d").status == 201


def test_a_site_without_a_bank_says_so(tmp_path: Path) -> None:
    with rest_bank(tmp_path) as found:
        found.desk = None
        answer = found.ask("GET", "/v1/accounts")
        assert answer.status == 404
        assert "bank.enabled" in answer.text


def test_the_status_and_the_check_of_the_ledger(unchanged: RestBank) -> None:
    shown = unchanged.done("GET", "/v1/bank")
    assert (shown["database"], shown["prices"], shown["open_liens"]) == ("sqlite", "v1", 1)
    assert shown["totals"]["settled_micro_su"] == 10 * SU
    assert unchanged.done("POST", "/v1/bank/verify")["breaks"] == []


@pytest.mark.parametrize(
    "query",
    [
        *("accounts/physics/statement?after=-1", "accounts/physics/statement?limit=0"),
        *("accounts/physics/statement?limit=-5", "accounts/physics/statement?after=99999999999999999999999"),
        *("accounts/physics/statement?since=soon", "charges?job=-1", "charges?job=99999999999999999999"),
        *("charges?user=%00",),
        *("charges?limit=1001", "charges?before=x", "charges?state=rich", "charges?account=" + "x" * 201),
    ],
)
def test_a_filter_that_is_none_is_refused(unchanged: RestBank, query: str) -> None:
    answer = unchanged.ask("GET", f"/v1/{query}")
    assert answer.status == 400, answer.text
    assert query.partition("?")[2].partition("=")[0] in answer.json["error"] or "NUL" in answer.json["error"]


def test_a_fault_of_ours_is_a_sentence_and_the_log_says_more(
    unchanged: RestBank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unchanged.desk, "accounts", None)
    answer = unchanged.ask("GET", "/v1/accounts")
    assert (answer.status, answer.json["error"]) == (500, "carrelctld failed at this; its log says how")
    assert "'NoneType' object is not callable" in caplog.text
