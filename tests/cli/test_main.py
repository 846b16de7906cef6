"""The front door: help, exit statuses, and one sentence when something is wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from carrel import __version__
from carrel.cli import main, output

CARREL = [sys.executable, "-m", "carrel.cli.main"]


@pytest.fixture(autouse=True)
def _nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon, no Slurm, no file of this machine."""
    path = tmp_path / "carrel.toml"
    path.write_text(
        f'[controller]\nlisten = "unix:{tmp_path}/none.sock"\n[slurm]\nbin_dir = "{tmp_path}"\n'
        f'[node]\ndir = "{tmp_path}/{{node}}"\n'
    )
    monkeypatch.setenv("CARREL_CONFIG", str(path))


def test_help_names_every_noun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for noun in ("job", "guest", "image", "node", "quote", "bank", "config", "sandbox", "serve", "completion"):
        assert re.search(rf"\b{noun}\b", shown)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"carrel {__version__}\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["frobnicate"], 2),
        (["guest", "lst"], 2),
        (["guest", "list", "--no-such-option"], 2),
        (["job", "show"], 2),
        (["job", "show", "seven"], 2),
        (["serve", "node", "--no-such-option"], 2),
        (["completion", "tcsh"], 2),
        (["config", "check", "/no/such/file"], 1),
        (["guest", "list"], 5),
        (["guest", "show", "x"], 5),
        (["guest", "map", "7"], 5),
        (["guest", "destroy", "x"], 5),
        (["node", "list"], 5),
        (["job", "events", "7"], 5),
        (["job", "list"], 5),
        (["job", "show", "7"], 5),
        (["job", "enter", "7"], 1),
        (["quote", "--wrap", "true"], 3),
        (["quote", "--frobnicate", "job.sh"], 2),
        (["quote", "/no/such/script"], 1),
        (["bank", "prices", "show"], 3),
        (["bank", "prices", "check", "/no/such/book"], 3),
        (["bank", "prices", "import-weights"], 5),
        (["bank", "prices", "import-mybrc", "/no/such/file"], 1),
    ],
)
def test_a_failure_is_one_sentence_and_the_exit_status_of_its_kind(
    words: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(words) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"carrel: \S.*[^.\n]\n", said.err)


def test_a_mistyped_setting_is_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[node]\nreport_perod_s = 1.0\n")
    assert main.run(["config", "check", str(path)]) == 1
    assert "did you mean node.report_period_s?" in capsys.readouterr().err


def test_an_address_that_is_none_is_found_by_config_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[controller]\nlisten = "somewhere"\n')
    assert main.run(["config", "check", str(path)]) == 1
    assert "controller.listen" in capsys.readouterr().err


def test_config_show_says_where_each_setting_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["config", "show"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["controller.listen"].endswith(f"{tmp_path}/carrel.toml")
    assert lines["guests.driver"].endswith("default")


def test_ctrl_c_ends_a_daemon_quietly() -> None:
    child = subprocess.Popen(
        [*CARREL, "serve", "controller"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # Interrupted while Python still starts, the interpreter itself would speak; our own first line comes later.
    assert child.stderr is not None
    assert b"listening" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=10)
    assert (child.returncode, out, err) == (0, b"", b"")


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_words: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    assert main.run(["guest", "list"]) == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CARREL, "config", "show"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_loads_neither_the_controllers_libraries_nor_the_nouns() -> None:
    code = (
        "import sys; from carrel.cli import main; main.run(['--help']);"
        "print([m for m in sys.modules if m.split('.')[0] in ('litestar', 'uvicorn', 'qemu')"
        " or m in ('carrel.cli.job', 'carrel.cli.doctor')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jboot\x1b[0m\r\nok\tyes\n", "boot\nok\tyes\n"),
        ("\x1b]0;title\x07x", "x"),
        ("a\x00b\x9bc", "abc"),
    ],
)
def test_what_a_guest_writes_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert output.printable(text) == shown


def test_a_table_in_a_pipe_is_aligned_and_a_cell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "NAME"), [(1, "two\nlines"), (100, None)])
    assert capsys.readouterr().out == "A    NAME\n1    two lines\n100\n"


def test_a_completion_script_knows_the_nouns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "console" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[guest_nodes]\nhosts = "h[1-"\n', "guest_nodes.hosts = 'h[1-' is no list of names like h[1-40],g7"),
        ('[guest_nodes]\nhosts = "h[a-b]"\n', "guest_nodes.hosts = 'h[a-b]' is no list of names"),
        ('[guest_nodes.remote]\nvsphere = "e1]"\n', "guest_nodes.remote.vsphere = 'e1]' is no list of names"),
        ('[placement.addresses]\nstatic = ["10.0.0.9-10.0.0.1"]\n', "'10.0.0.9-10.0.0.1' is no range of addresses"),
        ('[placement.addresses]\nstatic = ["10.0.0.1"]\nlist = "/x"\n', "static and list; leave one of them out"),
        (
            '[placement]\npolicy = "bestfit"\n',
            "placement.policy = 'bestfit'; give first, random, best-fit, least-loaded",
        ),
    ],
)
def test_hosts_and_addresses_of_guests_that_are_none_are_found_before_a_job_waits_for_them(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "carrel.toml"
    path.write_text(text)
    assert main.run(["config", "check", str(path)]) == 1
    assert sentence in capsys.readouterr().err
