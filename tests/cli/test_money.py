"""``carrel account``, ``charge`` and ``bank``, against a real carrelctld."""

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from carrel.cli import desk, main
from carrel.testing.daemons import ControllerProcess
from carrel.testing.desk import BOOK

SU = 1_000_000
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def controller() -> Iterator[ControllerProcess]:
    directory = Path(tempfile.mkdtemp(prefix="cmon"))
    (directory / "prices.toml").write_text(BOOK)
    bank = "\n".join(f'{name} = "{directory}/{file}"' for name, file in (
        ("database", "ledger.db"), ("dir", "bank"), ("socket", "submit.sock")))  # fmt: skip
    daemon = ControllerProcess(directory, extra=f"[bank]\nenabled = true\n{bank}")
    daemon.start()
    yield daemon
    daemon.kill()
    shutil.rmtree(directory)


@pytest.fixture
def carrel(controller: ControllerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its status and what it printed."""
    monkeypatch.setenv("CARREL_CONFIG", str(controller.config))

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main.run(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def physics(carrel: Run) -> Run:
    """Twelve and a half SU in the account physics, of which job 7 was charged 2.5."""
    if carrel("account", "show", "physics")[0]:
        assert carrel("account", "add", "physics")[0] == 0
        assert carrel("account", "deposit", "physics", "--su", "12.5", "--reason", "spring")[0] == 0
        names = {"cluster": "c", "token": "t"}
        place = {"do": "place", "key": "1", **names, "project": "physics", "user": "ada", "amount_micro_su": 3 * SU}
        bind = {"do": "bind", "key": "2", **names, "user": "ada", "job_id": 7, "run": "r7"}
        settle = {"do": "settle", "key": "3", "cluster": "c", "run": "r7", "amount_micro_su": 5 * SU // 2}
        desk._exchange("POST", "/v1/commands", json.dumps([place, bind, settle]).encode())
    return carrel


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_account_is_listed_with_the_four_figures_side_by_side(physics: Run) -> None:
    _, text, _ = physics("account", "list")
    titles, row = (line.split() for line in text.splitlines()[:2])
    assert titles == ["ACCOUNT", "SETTLED", "RUNNING", "COMMITTED", "AVAILABLE", "CAP"]
    assert row == ["physics", "2.50", "0.00", "0.00", "10.00"]


def test_json_and_csv_have_whole_micro_su(physics: Run) -> None:
    (account,) = objects(physics("account", "list", "--json")[1])
    assert account["available_micro_su"] == 10 * SU
    (row,) = csv.DictReader(io.StringIO(physics("account", "list", "--csv")[1]))
    assert (row["name"], row["available_micro_su"]) == ("physics", str(10 * SU))
    (charge,) = csv.DictReader(io.StringIO(physics("charge", "list", "--csv")[1]))
    assert (charge["run"], charge["charged_micro_su"]) == ("r7", "2500000")
    rows = list(csv.DictReader(io.StringIO(physics("account", "statement", "physics", "--csv")[1])))
    assert [row["what"] for row in rows] == ["deposit", "place", "settle"]


def test_a_statement_says_what_each_thing_changed_and_left(physics: Run) -> None:
    _, text, _ = physics("account", "statement", "physics")
    lines = [line.split()[2:] for line in text.splitlines()]
    assert lines[1] == ["deposit", "12.50", "12.50", "spring", "(root)"]
    assert lines[3] == ["settle", "0.50", "2.50", "10.00", "r7", "ada"]


def test_a_charge_is_found_by_its_job_and_by_its_run(physics: Run) -> None:
    by_job, by_run = physics("charge", "show", "7")[1], physics("charge", "show", "c/r7")[1]
    assert by_job == by_run
    assert "charged  2.50 SU" in by_job


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("account", "show", "ghostly"), 3, "there is no account 'ghostly'; see: carrel account list"),
        (("charge", "show", "99"), 3, "job 99 has no charge that you may see; see: carrel charge list"),
        (("account", "deposit", "physics", "--reason", "x"), 2, "give an amount: --su 12.5"),
        (("account", "deposit", "physics", "--su", "1", "--micro-su", "1", "--reason", "x"), 2, "give an amount"),
        (("account", "deposit", "physics", "--su", "-1", "--reason", "x"), 2, "-1.00 SU is no amount for this"),
        (("account", "deposit", "physics", "--su", "0", "--reason", "x"), 2, "0.00 SU is no amount for this"),
        (("account", "deposit", "physics", "--su", "NaN", "--reason", "x"), 2, "'NaN' is no amount of SU"),
        (("account", "deposit", "physics", "--su", "1e9", "--reason", "x"), 2, "'1e9' is no amount of SU"),
        (("account", "deposit", "physics", "--su", "1.1234567", "--reason", "x"), 2, "at most six decimals"),
        (("account", "deposit", "physics", "--su", "9" * 13, "--reason", "x"), 2, "more than the ledger takes"),
        (("account", "deposit", "physics", "--micro-su", str(2**63), "--reason", "x"), 2, "is no amount for this"),
        (("account", "deposit", "physics", "--micro-su", "1.5", "--reason", "x"), 2, "write a whole number"),
        (("account", "add", "other", "--ends", "soon"), 2, "'soon' is no day or time"),
        (
            ("account", "add", "other", "--starts", "2026-02-01", "--ends", "2026-01-01"),
            2,
            "before it starts at 2026-02-01",
        ),
        (
            ("account", "set", "physics", "--starts", "2026-02-01", "--ends", "2026-01-01", "--reason", "x"),
            2,
            "swap them?",
        ),
        (("account", "set", "nowhere", "--priority", "1", "--reason", "x"), 3, "there is no allocation 'nowhere'"),
        (
            ("account", "add", "x y"),
            2,
            "expected a name of visible ascii letters, without a space or a slash - at '$.account'",
        ),
        (("account", "add", "x/y"), 2, "without a space or a slash - at '$.account'"),
        (("account", "add", "physics", "--allocation", "x/y"), 2, "without a space or a slash - at '$.allocation'"),
        (
            ("account", "deposit", "physics", "--su", "1", "--reason", "a\nb"),
            2,
            "expected one line of text - at '$.reason'",
        ),
        (("account", "add", "physics"), 2, "account 'physics' is there already; name a further allocation"),
        (("charge", "refund", "7", "--su", "3", "--reason", "x"), 4, "has 2.50 SU of its charge left, not 3.00"),
        (("charge", "refund", "7", "--su", "1", "--all", "--reason", "x"), 2, "give an amount, or --all"),
        (("charge", "refund", "7"), 2, "--reason requires an argument; see: carrel charge refund --help"),
        (("bank", "token", "add", "--ttl", "soon"), 2, "write a number with s, m, h or d"),
        (("bank", "token", "revoke", "ffffffff"), 3, "there is no token 'ffffffff'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(
    physics: Run, words: tuple[str, ...], status: int, sentence: str
) -> None:
    before = physics("bank", "status", "--json")[1]
    seen, _, said = physics(*words)
    assert (seen, sentence in said) == (status, True), said
    assert physics("bank", "status", "--json")[1] == before


def test_dates_out_of_order_open_no_allocation(physics: Run) -> None:
    words = ("--allocation", "x", "--starts", "2026-02-01", "--ends", "2026-01-01")
    assert physics("account", "add", "physics", *words)[0] == 2
    (account,) = objects(physics("account", "show", "physics", "--json")[1])
    assert [one["name"] for one in account["allocations"]] == ["physics"]  # type: ignore[attr-defined]  # a list


def test_the_same_key_deposits_once(physics: Run) -> None:
    words = ("account", "deposit", "physics", "--micro-su", "1", "--reason", "x", "--key", "mine")
    first, again = physics(*words), physics(*words)
    assert first == again == (0, "deposited 0.000001 SU; next: carrel account show physics\n", "")
    assert physics("account", "adjust", "physics", "--micro-su", "-1", "--reason", "back")[0] == 0
    assert objects(physics("account", "list", "--json")[1])[0]["available_micro_su"] == 10 * SU


def test_a_refund_an_adjustment_and_a_transfer(physics: Run) -> None:
    assert physics("charge", "refund", "r7", "--su", "0.5", "--reason", "slow disk")[0] == 3, "no cluster is known here"
    assert physics("charge", "refund", "7", "--su", "0.5", "--reason", "slow disk")[0] == 0
    assert "part_refunded" in physics("charge", "show", "7")[1]
    status, text, _ = physics("charge", "adjust", "7", "--su", "2", "--reason", "was half the time")
    assert (status, text.split(";")[0]) == (0, "charged 2.00 SU instead of 2.50")
    assert physics("account", "add", "biology", "--parent", "physics", "--cap-su", "5")[0] == 0
    assert physics("account", "transfer", "physics", "biology", "--su", "1", "--reason", "loan")[0] == 0
    listed = [line.split()[0] for line in physics("account", "list")[1].splitlines()[1:]]
    assert listed == ["physics", "biology"]
    status, text, _ = physics("bank", "verify")
    assert (status, "every invariant holds" in text) == (0, True)
    # Back to what the other tests expect.
    assert physics("account", "transfer", "biology", "physics", "--su", "1", "--reason", "back")[0] == 0


def test_a_token_opens_the_bank_for_a_program(physics: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, secret, said = physics("bank", "token", "add", "--note", "for a test")
    assert (status, len(secret.strip())) == (0, 40)
    name = said.split()[2]
    file = tmp_path / "token"
    file.write_text(secret)
    monkeypatch.setenv(desk.TOKEN_FILE, str(file))
    assert physics("account", "list")[0] == 0
    assert physics("account", "deposit", "physics", "--su", "1", "--reason", "x")[0] == 4
    monkeypatch.delenv(desk.TOKEN_FILE)
    assert physics("bank", "token", "revoke", name)[0] == 0
    monkeypatch.setenv(desk.TOKEN_FILE, str(file))
    status, _, said = physics("account", "list")
    assert (status, "unknown, expired or revoked" in said) == (4, True)


def test_a_bank_that_is_away_leaves_the_key_to_ask_again(
    carrel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "carrel.toml"
    settings.write_text(f'[controller]\nlisten = "unix:{tmp_path}/none"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(settings))
    status, _, said = carrel("account", "deposit", "physics", "--su", "1", "--reason", "x", "--key", "mine")
    assert (status, "repeat the command with --key mine" in said) == (5, True)


def test_terms_of_an_allocation_that_are_not_given_stay_as_they_are(physics: Run) -> None:
    def terms(*words: str) -> tuple[object, ...]:
        assert physics("account", "set", "trial", *words, "--reason", "x")[0] == 0
        (account,) = objects(physics("account", "show", "chemistry", "--json")[1])
        (one,) = cast("list[dict[str, object]]", account["allocations"])
        return one["starts"], one["ends"], one["priority"], one["credit_micro_su"]

    words = ("--starts", "2026-01-01", "--ends", "2027-01-01", "--priority", "3", "--credit-su", "5")
    assert physics("account", "add", "chemistry", "--allocation", "trial", *words)[0] == 0
    starts, ends = "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"
    assert terms("--credit-su", "0") == (starts, ends, 3, 0)
    assert terms("--priority", "0") == (starts, ends, 0, 0)
    assert terms("--ends", "never", "--credit-su", "1") == (starts, None, 0, SU)


def test_a_charge_is_given_back_in_full_once(physics: Run) -> None:
    assert physics("account", "add", "geology")[0] == 0
    assert physics("account", "deposit", "geology", "--su", "1", "--reason", "x")[0] == 0
    names = {"cluster": "c", "token": "whole"}
    place = {"do": "place", "key": "w1", **names, "project": "geology", "user": "ada", "amount_micro_su": SU}
    bind = {"do": "bind", "key": "w2", **names, "user": "ada", "job_id": 8, "run": "r8"}
    settle = {"do": "settle", "key": "w3", "cluster": "c", "run": "r8", "amount_micro_su": SU}
    desk._exchange("POST", "/v1/commands", json.dumps([place, bind, settle]).encode())
    assert physics("charge", "refund", "8", "--all", "--reason", "x")[0] == 0
    status, _, said = physics("charge", "refund", "8", "--all", "--reason", "x")
    assert (status, said) == (4, "carrel: nothing is left of the charge of run 'r8'; see: carrel charge show r8\n")
