"""``carrel guest templates``: what a person and a program see of a template file."""

import json
from pathlib import Path

import pytest

from carrel.cli import main

FILE = """
[base]
template = "node"
cluster = "C0"

[large]
inherit = ["base"]
cpus = 16
memory_mib = 2048
trusted = true

[guests."vm{1:2}"]
inherit = ["large"]
host = "esx-{1:2}"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "guests.toml"
    path.write_text(FILE)
    return path


def test_a_person_sees_what_each_section_and_each_guest_comes_to(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "templates", str(file)]) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    assert [row[0] for row in rows] == ["NAME", "base", "large", "vm1", "vm2"]
    assert rows[3][:7] == ["vm1", "guest", "node", "full", "16", "2G", "esx-1"]
    assert said.err == f"carrel: {file}: ok, 2 sections and 2 guests\n"


def test_one_section_is_shown_with_every_key(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "templates", str(file), "--section", "large"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["section"], shown["cluster"], shown["cpus"], shown["trusted"]) == ("large", "C0", "16", "true")


def test_a_program_reads_an_object_for_each(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "templates", str(file), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["name"], one["kind"], one["template"]["host"]) for one in found] == [
        ("base", "section", ""),
        ("large", "section", ""),
        ("vm1", "guest", "esx-1"),
        ("vm2", "guest", "esx-2"),
    ]


def test_what_is_wrong_is_one_sentence_and_a_status(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "templates", str(file), "--section", "lrge"]) == 3
    assert "no guest template 'lrge'" in capsys.readouterr().err
    file.write_text(FILE.replace("cpus", "cpu"))
    assert main.run(["guest", "templates", str(file)]) == 1
    assert "unknown key large.cpu (write cpus)" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named_and_where_to_read_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "templates", str(tmp_path / "absent")]) == 3
    assert "absent: No such file or directory; see docs/reference/template-file.md" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["slurm_conf", "user_data"])
def test_a_file_that_a_section_names_and_that_is_not_there_is_named(
    file: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE.replace("trusted = true", f'{key} = "/no/such"'))
    assert main.run(["guest", "templates", str(file)]) == 1
    assert f"{file}: large.{key}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("NodeName=x", "the template of slurm.conf has no $node_line"), ("$node_line $clutser", "has $clutser; known: ")],
)
def test_a_slurm_conf_from_which_no_node_could_be_made_is_refused(
    file: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = file.with_name("slurm.conf")
    conf.write_text(text)
    file.write_text(FILE.replace("trusted = true", f'slurm_conf = "{conf}"'))
    assert main.run(["guest", "templates", str(file)]) == 1
    assert sentence in capsys.readouterr().err
    conf.write_text("ClusterName=$cluster\n$node_line\n")
    assert main.run(["guest", "templates", str(file)]) == 0
