"""Tokens: a program may do what its token says and no more, until it expires or is revoked."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.bank.tokens import KNOWN_S, Tokens
from carrel.errors import UsageError
from carrel.model.access import Associations
from carrel.testing.desk import Answer, RestBank, rest_bank

SU = 1_000_000
DAY_S = 86400
MEMBER = 1  # the user daemon
PEOPLE = Associations(users={"physics": frozenset({"daemon"}), "biology": frozenset({"bin"})})


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[RestBank]:
    with rest_bank(tmp_path) as found:
        found.slurm.known = PEOPLE
        found.account("physics", 100 * SU)
        found.account("biology", 7 * SU)
        yield found


def make(desk: RestBank, **words: Any) -> tuple[str, str]:
    """Return the name and the secret of a new token."""
    made = desk.done("POST", "/v1/tokens", words)
    return made["token"]["name"], made["secret"]


def ask(desk: RestBank, secret: str, path: str, body: Any = None, key: str = "") -> Answer:
    """Ask over TCP with a token alone."""
    method = "GET" if body is None else "POST"
    return desk.ask(method, path, body, uid=None, key=key, headers={"Authorization": f"Bearer {secret}"})


def test_a_token_that_reads_sees_what_its_user_sees_and_changes_nothing(desk: RestBank) -> None:
    _, secret = make(desk, user="daemon")
    assert [one["name"] for one in ask(desk, secret, "/v1/accounts").json] == ["physics"]
    written = desk.written()
    gift = {"amount_micro_su": 1, "reason": "x"}
    assert ask(desk, secret, "/v1/accounts/physics/deposits", gift, key="k").status == 403
    assert desk.written() == written


def test_a_token_that_reads_for_an_administrator_sees_all_and_changes_nothing(desk: RestBank) -> None:
    _, secret = make(desk, user="root")
    assert len(ask(desk, secret, "/v1/accounts").json) == 2
    assert ask(desk, secret, "/v1/accounts", {"account": "x"}, key="k").status == 403


def test_a_token_that_administers_deposits_and_the_journal_names_it(desk: RestBank) -> None:
    name, secret = make(desk, user="daemon", scope="admin")
    gift = {"amount_micro_su": SU, "reason": "by program"}
    assert ask(desk, secret, "/v1/accounts/physics/deposits", gift, key="k").status == 201
    rows = desk.done("GET", "/v1/accounts/physics/statement")["rows"]
    assert [row["actor"] for row in rows if row["reason"] == "by program"] == [f"daemon+{name}"]


def refused(desk: RestBank, authorization: str) -> Answer:
    answer = desk.ask("GET", "/v1/accounts", uid=None, headers={"Authorization": authorization})
    assert answer.status == 401
    for known in ("physics", "biology", "daemon"):
        assert known not in answer.text
    return answer


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer ",
        "Bearer 0",
        f"Bearer {'0' * 40}",
        f"Bearer {'a' * 100_000}",
        "bearer x",
        "Basic cm9vdDpyb290",
        "Token x",
        "Munge x",
        "",
    ],
)
def test_a_wrong_credential_is_refused_and_told_nothing(desk: RestBank, authorization: str) -> None:
    answer = desk.ask("GET", "/v1/accounts", uid=None, headers={"Authorization": authorization})
    # Where munge itself does not answer, nobody can tell who it is.
    assert answer.status == (503 if authorization.startswith("Munge") else 401)
    assert "physics" not in answer.text


def test_an_unknown_an_expired_and_a_revoked_token_are_refused_in_the_same_words(desk: RestBank) -> None:
    _, expiring = make(desk, user="daemon", ttl_s=DAY_S)
    name, revoked = make(desk, user="daemon")
    unknown = refused(desk, f"Bearer {'0' * 40}").text
    desk.done("DELETE", f"/v1/tokens/{name}")
    assert refused(desk, f"Bearer {revoked}").text == unknown
    assert ask(desk, expiring, "/v1/accounts").status == 200
    assert desk.desk is not None
    desk.desk.callers.tokens._clock = lambda: time.time() + DAY_S
    assert refused(desk, f"Bearer {expiring}").text == unknown


def test_a_token_counts_also_where_the_kernel_would_say_more(desk: RestBank) -> None:
    _, secret = make(desk, user="daemon")
    answer = desk.ask("GET", "/v1/accounts", uid=0, headers={"Authorization": f"Bearer {secret}"})
    assert [one["name"] for one in answer.json] == ["physics"]


def test_another_users_account_is_not_there_for_a_token(desk: RestBank) -> None:
    _, secret = make(desk, user="daemon")
    hidden, absent = (ask(desk, secret, f"/v1/accounts/{name}") for name in ("biology", "ghostly"))
    assert (hidden.status, absent.status) == (404, 404)
    assert hidden.text.replace("biology", "#") == absent.text.replace("ghostly", "#")


def test_anybody_makes_a_token_that_reads_for_themselves_and_no_other(desk: RestBank) -> None:
    made = desk.ask("POST", "/v1/tokens", {}, uid=MEMBER)
    assert made.status == 201
    assert made.json["token"]["user"] == "daemon"
    for more in ({"scope": "admin"}, {"user": "bin"}):
        assert desk.ask("POST", "/v1/tokens", more, uid=MEMBER).status == 403
    # A token that was stolen must not make itself a longer life.
    assert ask(desk, made.json["secret"], "/v1/tokens", {}).status == 403


def test_each_lists_and_revokes_their_own_tokens(desk: RestBank) -> None:
    own, _ = make(desk, user="daemon", note="mine")
    other, _ = make(desk, user="bin")
    assert [one["name"] for one in desk.ask("GET", "/v1/tokens", uid=MEMBER).json] == [own]
    assert len(desk.done("GET", "/v1/tokens")) == 2
    assert desk.ask("DELETE", f"/v1/tokens/{other}", uid=MEMBER).status == 404
    assert desk.ask("DELETE", f"/v1/tokens/{own}", uid=MEMBER).json["good"] is False
    again = desk.ask("DELETE", f"/v1/tokens/{own}", uid=MEMBER)
    assert (again.status, again.json["good"]) == (200, False)


@pytest.mark.parametrize("ttl_s", ["0", "-1", "157680001", "true", "null", '"soon"'])
def test_a_life_that_is_none_makes_no_token(desk: RestBank, ttl_s: str) -> None:
    assert desk.ask("POST", "/v1/tokens", f'{{"ttl_s": {ttl_s}}}').status == 400
    assert desk.done("GET", "/v1/tokens") == []


def test_the_secret_is_kept_nowhere(desk: RestBank, tmp_path: Path) -> None:
    _, secret = make(desk, user="daemon", note="x")
    connection = sqlite3.connect(tmp_path / "ledger.db")
    dumped = "\n".join(connection.iterdump())
    connection.close()
    assert "daemon" in dumped
    assert secret not in dumped
    assert secret not in str(desk.done("GET", "/v1/tokens"))


def test_what_another_process_revoked_is_known_here_soon(desk: RestBank) -> None:
    store = desk.bank.ledger.store
    now_s = [1000.0]
    here, there = (Tokens(store, clock=lambda: now_s[0]) for _ in range(2))
    token, secret = here.add(user="ada", scope="read", ttl_s=DAY_S)
    assert here.find(secret) == token
    there.revoke(token.name)
    now_s[0] += KNOWN_S
    assert here.find(secret) is None


def test_a_note_is_one_line(desk: RestBank) -> None:
    with pytest.raises(UsageError, match="one line"):
        Tokens(desk.bank.ledger.store).add(user="ada", scope="read", ttl_s=1, note="a\nb")
