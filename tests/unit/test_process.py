"""Commands are started in one way; when they fail, one sentence says how and how to repeat them."""

import os
import shutil
import subprocess  # a process with an odd name
import threading
from pathlib import Path

import pytest

from carrel.process import CommandError, Pid, children, process_state, run


def test_a_command_for_administrators_is_found_with_an_ordinary_users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run(["sh", "-c", "command -v mke2fs"]).strip() in {"/usr/sbin/mke2fs", "/sbin/mke2fs"}


def test_a_path_that_names_the_administrators_directories_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/sbin:/usr/bin:/usr/sbin:/bin")
    assert run(["sh", "-c", 'echo "$PATH"']).strip() == "/sbin:/usr/bin:/usr/sbin:/bin"


def test_a_failure_names_the_command_its_status_its_last_line_and_how_to_repeat_it() -> None:
    with pytest.raises(CommandError) as failure:
        run(["sh", "-c", "echo first >&2; echo last >&2; exit 3"])
    assert str(failure.value) == ("sh exited with 3: last; to repeat: sh -c 'echo first >&2; echo last >&2; exit 3'")
    assert failure.value.status == 3


def test_a_command_that_is_not_there_fails_as_a_shell_counts_it() -> None:
    with pytest.raises(CommandError, match="no-such-command: not found; is it installed") as failure:
        run(["no-such-command"])
    assert failure.value.status == 127


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(CommandError, match=r"not done after 0\.1 s"):
        run(["sleep", "60"], timeout_s=0.1)


def test_a_process_may_call_itself_by_any_bytes(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff) R"
    shutil.copy(b"/bin/sleep", odd)
    child = subprocess.Popen([odd, "60"])
    try:
        state = process_state(child.pid)
        assert state is not None
        assert Pid(child.pid, state[1]).alive
    finally:
        child.kill()
        child.wait()


def test_the_children_of_a_process_are_those_of_all_its_threads() -> None:
    def start_one() -> None:
        with subprocess.Popen(["sleep", "60"]) as child:
            found.append((child.pid, children(os.getpid())))
            child.kill()

    found: list[tuple[int, list[int]]] = []
    thread = threading.Thread(target=start_one)
    thread.start()
    thread.join()
    [(pid, seen)] = found
    assert pid in seen


def test_a_process_that_ends_while_it_is_looked_at_has_no_children_and_is_no_error() -> None:
    for _ in range(200):  # a look that minds fails at one end in thirty
        with subprocess.Popen(["true"]) as process:
            reaper = threading.Thread(target=process.wait)
            reaper.start()
            while reaper.is_alive():
                assert children(process.pid) == []
            reaper.join()
