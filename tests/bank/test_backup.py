"""A copy of the ledger is a ledger, also while others write, and the copy before it stays until it is whole."""

import threading
from pathlib import Path

import pytest

from carrel.bank import queries
from carrel.bank.backup import LEDGER, MARKS, backup
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.cli import main
from carrel.errors import CarrelError
from carrel.model.ledger import Deposit, OpenAllocation, OpenProject


def _ledger(path: Path) -> Ledger:
    found = Ledger(SqliteStore(path))
    found.call(OpenProject(key="p", project="physics"))
    found.call(OpenAllocation(key="a", allocation="physics", project="physics"))
    return found


def _deposit(ledger: Ledger, number: int) -> None:
    ledger.call(Deposit(key=f"d{number}", allocation="physics", amount_micro_su=1, reason="test"))


def test_a_copy_made_while_others_write_is_a_ledger_in_which_every_invariant_holds(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "here.db")
    (tmp_path / "marks").write_text("{}")
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            _deposit(ledger, number)
            number += 1

    writing = threading.Thread(target=write)
    writing.start()
    try:
        counts = [backup(tmp_path / "here.db", tmp_path / "marks", tmp_path / "copy") for _ in range(3)]
    finally:
        ended.set()
        writing.join()
    copied = SqliteStore(tmp_path / "copy" / LEDGER)
    assert counts == sorted(counts)
    assert queries.totals(copied).transactions == counts[-1]
    assert verify(copied, price=None) == []
    assert (tmp_path / "copy" / MARKS).read_text() == "{}"
    assert (tmp_path / "copy" / LEDGER).stat().st_mode & 0o077 == 0
    copied.close()
    ledger.close()


def test_a_copy_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "here.db")
    count = backup(tmp_path / "here.db", tmp_path / "none", tmp_path / "copy")
    (tmp_path / "torn.db").write_bytes(b"no ledger at all" * 100)
    for name in ("torn.db", "absent.db"):
        with pytest.raises(CarrelError, match=name):
            backup(tmp_path / name, tmp_path / "none", tmp_path / "copy")
    copied = SqliteStore(tmp_path / "copy" / LEDGER)
    assert queries.totals(copied).transactions == count
    copied.close()
    ledger.close()


def test_the_command_copies_a_file_and_says_how_a_postgresql_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ledger(tmp_path / "here.db").close()
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "carrel.toml"))
    (tmp_path / "carrel.toml").write_text(f'[bank]\ndatabase = "{tmp_path}/here.db"\ndir = "{tmp_path}"\n')
    assert main.run(["bank", "backup", str(tmp_path / "copy")]) == 0
    assert "ledger.db with 2 transactions" in capsys.readouterr().out
    (tmp_path / "carrel.toml").write_text('[bank]\ndatabase = "host=db dbname=carrel"\n')
    assert main.run(["bank", "backup", str(tmp_path / "copy")]) == 4
    assert "pg_dump" in capsys.readouterr().err
