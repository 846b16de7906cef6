"""Whatever is typed, and whoever answers: one sentence and an exit status, never a traceback."""

import functools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App

from carrel.cli import main

CARREL = [sys.executable, "-m", "carrel.cli.main"]
STARTS_SOMETHING = {
    *(("serve", "node"), ("serve", "sinks"), ("serve", "controller"), ("image", "build")),
    *(("sandbox", "run"), ("sandbox", "up"), ("sandbox", "shell"), ("job", "enter"), ("simulate",)),
}
"""With arguments that make sense these begin to work, or become another program: they have tests of their own."""
NONSENSE = ("", "-1", "99999999999999999999999", "\udcff\udcfe", "\x1b[2J\n" + "x" * 5000)
FILES = ("binary", "directory")


def _commands(app: App, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in app:
        if not name.startswith("-"):
            yield from _commands(app[name], (*path, name))
            if app[name].default_command is not None:
                yield (*path, name)


COMMANDS = sorted(set(_commands(main.app)) - STARTS_SOMETHING)
CHEAP = [path for path in COMMANDS if path != ("node", "check")]
"""The other one runs half a dozen programs."""


@functools.cache
def _shape(path: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Return how many words a command must be given, and by which names others."""
    app = main.app
    for name in path:
        app = app[name]
    taken = list(app.assemble_argument_collection())
    named = tuple(one.names[0] for one in taken if one.required and one.index is None)
    return sum(one.index is not None and "tuple" not in str(one.hint) for one in taken), named


def _with(path: tuple[str, ...], word: str) -> list[str]:
    """Return a command line with this word as all that the command must be given."""
    words, named = _shape(path)
    return [*path, *[word] * words, *(f"{name}={word}" for name in named)]


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "carrel.toml"
    path.write_text(
        f'[controller]\nlisten = "unix:{tmp_path}/ctld.sock"\n[slurm]\nbin_dir = "{tmp_path}"\n'
        f'[node]\ndir = "{tmp_path}/{{node}}"\n[images]\nstore = "{tmp_path}/images"\n'
        f'[metrics]\nroot = "{tmp_path}/metrics"\n[guests.templates]\ndir = "{tmp_path}/templates"\n'
    )
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    monkeypatch.setenv("CARREL_CONFIG", str(path))
    monkeypatch.chdir(tmp_path)


def _one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = main.run(words)
    said = capsys.readouterr()
    assert "a bug of ours" not in said.err
    assert "Traceback" not in said.err
    assert "\x1b" not in said.err + said.out
    assert status in range(6)
    if status and not said.out:  # node check says on stdout what is wrong
        assert re.fullmatch(r"(carrel: [^\n]{1,1100}[^.\n]\n)+", said.err), said.err
    if not status:
        assert "Error" not in said.err


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_nonsense_and_no_daemon_is_one_sentence(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for word in NONSENSE if _with(path, "x") != list(path) else ("",):
        _one_sentence(_with(path, word), capsys)


@pytest.mark.parametrize("path", CHEAP, ids=" ".join)
def test_a_file_that_is_none_of_ours_is_one_sentence(
    path: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES if _with(path, "x") != list(path) else ():
        _one_sentence(_with(path, str(tmp_path / name)), capsys)


@pytest.fixture
def _of_another_release(tmp_path: Path) -> Iterator[None]:
    """A carrelctld whose answers have another form."""
    answers = (b"{}", b"[{}]", b"not json")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "ctld.sock"))
        listener.listen()

        def serve() -> None:
            for at in range(1_000_000):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    body = answers[at % len(answers)]
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=60)


@pytest.mark.parametrize("path", CHEAP, ids=" ".join)
@pytest.mark.usefixtures("_of_another_release")
def test_a_daemon_of_another_release_is_one_sentence(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):  # each of its answers, for a command that asks once
        _one_sentence(_with(path, "7"), capsys)


def test_a_configuration_that_is_no_text_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["config", "check", str(tmp_path / "binary")]) == 1
    assert "binary: not TOML" in capsys.readouterr().err


def test_a_full_disk_below_the_answer_is_said_and_is_no_success() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*CARREL, "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"carrel: standard output: No space left on device[^\n]*\n", done.stderr)


def test_a_letter_that_the_terminal_lacks_costs_no_answer(tmp_path: Path) -> None:
    (tmp_path / "carrel.toml").write_text('[slurm]\nconf = "/é"\n')
    done = subprocess.run(
        [*CARREL, "config", "show"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"/\\xe9"' in done.stdout


def test_what_nobody_foresaw_is_a_sentence_with_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_words: object, **_options: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(main, "app", broken)
    assert main.run(["guest", "list"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"carrel: a bug of ours: RuntimeError at \w+\.py:\d+: odd; [^\n]*\n", said)
    assert main.run(["serve", "node"]) == 1  # a daemon's log has all of it
    assert "Traceback" in capsys.readouterr().err
