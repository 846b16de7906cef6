"""``carrel bank prices`` where no Slurm is needed. With one: tests/slurm/test_quote_on_slurm.py."""

import json
from pathlib import Path

import pytest

from carrel.cli import main

BOOK = """
[[version]]
name = "old"
valid_from = 2020-01-01
[version.default]
rates = { cpu = 1 }
[[version]]
name = "new"
valid_from = 2021-01-01
qos = { premium = 2.5 }
[version.partition.gpu]
mode = "max_tres"
rates = { mem = "0.25G" }
[version.partition.free]
[[version]]
name = "next"
valid_from = 9000-01-01
"""
MYBRC = """
[Enable]
enable_job_submit_plugin = true
[PartitionPrice]
savio = 0.75
[API]
token = "Token secret"
"""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the price book of a machine without Slurm."""
    settings = tmp_path / "carrel.toml"
    settings.write_text(f'[slurm]\nbin_dir = "{tmp_path}"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(settings))
    path = tmp_path / "prices.toml"
    path.write_text(BOOK)
    return path


def test_every_version_is_shown_and_the_one_in_force_is_marked(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bank", "prices", "show"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["old", "2020-01-01T00:00:00Z", "(any", "other)", "sum", "cpu", "1"],
        ["new*", "2021-01-01T00:00:00Z", "gpu", "max_tres", "mem", "0.25G"],
        ["new*", "2021-01-01T00:00:00Z", "gpu", "QOS", "premium", "x", "2.5"],
        ["new*", "2021-01-01T00:00:00Z", "free", "sum", "(nothing:", "free)", "0"],
        ["new*", "2021-01-01T00:00:00Z", "free", "QOS", "premium", "x", "2.5"],
    ]


def test_json_has_whole_micro_su(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bank", "prices", "show", "--json"]) == 0
    versions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert versions[0]["default"]["rates"] == {"cpu": {"micro_su": 1_000_000, "units": 1}}


def test_a_book_is_checked_where_slurm_does_not_answer(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bank", "prices", "check"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{book}: ok\n"
    assert "only the file was checked" in said.err


def test_a_wrong_book_is_named_with_the_place_in_it(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book.write_text(BOOK.replace("0.25G", "cheap"))
    assert main.run(["bank", "prices", "check"]) == 1
    assert f"{book}: version 2: partition gpu: mem: 'cheap' is no number" in capsys.readouterr().err


def test_the_configuration_may_name_another_book(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = book.with_name("other.toml")
    book.rename(other)
    settings = book.with_name("carrel.toml")
    settings.write_text(settings.read_text() + f'[bank.prices]\nbook = "{other}"\n')
    assert main.run(["bank", "prices", "check"]) == 0
    assert str(other) in capsys.readouterr().out


def test_a_bank_config_becomes_a_book_and_its_token_is_not_shown(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = book.with_name("bank-config.toml")
    config.write_text(MYBRC)
    assert main.run(["bank", "prices", "import-mybrc", str(config), "--valid-from", "2026-02-03"]) == 0
    said = capsys.readouterr()
    assert "the plug-ins are enabled at: submit; their bank: http://localhost:8080" in said.err
    assert "secret" not in said.out + said.err
    book.write_text(said.out)
    assert main.run(["bank", "prices", "show", "--json"]) == 0
    (version,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (version["valid_from"], version["default"]) == ("2026-02-03T00:00:00Z", None)
    assert version["partitions"]["savio"]["rates"] == {"cpu": {"micro_su": 750_000, "units": 1}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--valid-from", "soon"], "not a day like 2026-01-01"), (["--unlisted", "maybe"], "maybe")],
)
def test_a_wrong_option_of_an_import_is_a_usage_error(
    book: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = book.with_name("bank-config.toml")
    config.write_text(MYBRC)
    assert main.run(["bank", "prices", "import-mybrc", str(config), *words]) == 2
    assert sentence in capsys.readouterr().err
