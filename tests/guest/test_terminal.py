"""Row 4: ``srun --pty`` in a real terminal. Two terminals lie behind one another, and a person must not notice."""

import re
from collections.abc import Iterator

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, allocation, outcome, wait_for
from carrel.testing.sandbox import User
from carrel.testing.terminal import Terminal

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

GUEST = [f"--guest={IMAGE}"]
PROMPT = r"P> $"
SHELL = ["bash", "--norc", "--noprofile", "-i"]

CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH, BACKSPACE = "\x03", "\x04", "\x1a", "\x1c", "\x7f"


@pytest.fixture(scope="module")
def job(sandbox: Sandbox) -> Iterator[list[str]]:
    """``srun`` of a terminal in a job without a guest of its own, so that bare and guest can be compared."""
    with allocation(sandbox, "-N1", "-n1", "--mem=1024") as job_id:
        yield ["srun", f"--jobid={job_id}", "--overlap"]


def terminal(
    box: Sandbox, words: list[str], *, rows: int = 33, columns: int = 101, user: str | None = None
) -> Terminal:
    # A dumb terminal: readline then decorates nothing.
    env = {**box.env, "TERM": "dumb", "PS1": "P> "}
    return Terminal(box.command(words, netns=box.netns, user=user), rows=rows, columns=columns, env=env)


def shell(box: Sandbox, job: list[str], *options: str) -> Terminal:
    return terminal(box, [*job, *options, "--pty", *SHELL])


def dialogue(box: Sandbox, job: list[str], options: list[str], *turns: tuple[str, str]) -> tuple[list[str], int]:
    """Type each turn's keys into a shell and wait for its pattern; return what was shown, and how it ended."""
    with shell(box, job, *options) as screen:
        shown = [screen.wait_for(PROMPT)]
        for keys, pattern in turns:
            screen.type(keys)
            shown.append(screen.wait_for(pattern))
        screen.type("exit 9\n")
        status = screen.status()
        return [*shown, without_what_srun_says(screen.screen[len("".join(shown)) :])], status


def without_what_srun_says(text: str) -> str:
    """Return text without srun's own lines: they come when they come, also in the middle of the task's."""
    return re.sub(r"srun: [^\r]*\r\n", "", text)


def same_dialogue(box: Sandbox, job: list[str], *turns: tuple[str, str]) -> list[str]:
    bare = dialogue(box, job, [], *turns)
    guest = dialogue(box, job, GUEST, *turns)
    assert guest == bare
    assert guest[1] == 9
    return guest[0]


def test_what_is_compared_here_did_run_in_a_guest(sandbox: Sandbox, job: list[str]) -> None:
    kernels = []
    for options in ([], GUEST):
        with shell(sandbox, job, *options) as screen:
            screen.wait_for(PROMPT)
            screen.type("uname -r\n")
            kernels.append(screen.wait_for(PROMPT))
            screen.type("exit\n")
            assert screen.status() == 0
    assert kernels[0] != kernels[1]


def test_prompt_echo_editing_and_exit_status_are_as_bare(sandbox: Sandbox, job: list[str]) -> None:
    shown = same_dialogue(
        sandbox,
        job,
        (f"echo one twx{BACKSPACE}o\n", r"\none two\s+P> $"),
        ("false; echo $?\n", r"\n1\s+P> $"),
        ("test -t 0 -a -t 1 -a -t 2; echo $?\n", r"\n0\s+P> $"),
        ("grüß\n", r"not found\s+P> $"),
    )
    assert shown[-1] == "exit 9\r\nexit\r\n"


def test_the_terminals_settings_are_as_bare(sandbox: Sandbox, job: list[str]) -> None:
    same_dialogue(sandbox, job, ("stty -a\n", PROMPT))


def test_ctrl_c_interrupts_the_command_and_not_the_shell(sandbox: Sandbox, job: list[str]) -> None:
    # The command itself says that it has begun: the shell's echo would come before its child is there.
    begin = "sh -c 'echo begun; exec sleep 300'\n"
    same_dialogue(
        sandbox,
        job,
        (begin, r"\nbegun\r\n"),
        (CTRL_C, PROMPT),
        ("echo $?\n", r"\n130\s+P> $"),
        (begin, r"\nbegun\r\n"),
        (CTRL_BACKSLASH, PROMPT),
        ("echo $?\n", r"\n131\s+P> $"),
    )


def test_jobs_are_stopped_listed_and_continued(sandbox: Sandbox, job: list[str]) -> None:
    same_dialogue(
        sandbox,
        job,
        ("cat\n", "cat\r\n"),
        ("hello\n", "hello\r\nhello\r\n"),
        (CTRL_Z, r"Stopped +cat\s+P> $"),
        ("jobs\n", r"Stopped +cat\s+P> $"),
        ("fg\n", "\ncat\r\n"),
        ("again\n", "again\r\nagain\r\n"),
        (CTRL_D, PROMPT),
        ("jobs\n", PROMPT),
    )


def test_a_program_that_takes_the_raw_terminal_gets_every_key(sandbox: Sandbox, job: list[str]) -> None:
    raw = "stty raw -echo; echo ready; head -c 5 | od -An -tx1; stty sane"
    same_dialogue(sandbox, job, (f"{raw}\n", "ready\n"), (f"a{CTRL_C}{CTRL_Z}{CTRL_D}\r", r"61 03 1a 04 0d[^P]*P> $"))


def test_end_of_file_at_the_prompt_ends_the_shell(sandbox: Sandbox, job: list[str]) -> None:
    for options in ([], GUEST):
        with shell(sandbox, job, *options) as screen:
            screen.wait_for(PROMPT)
            screen.type(CTRL_D)
            assert screen.status() == 0


def test_a_shell_that_is_killed_ends_as_bare(sandbox: Sandbox, job: list[str]) -> None:
    seen = []
    for options in ([], GUEST):
        with shell(sandbox, job, *options) as screen:
            screen.wait_for(PROMPT)
            screen.type("kill -KILL $$\n")
            # srun may lose the echo's own line end, which is under way when the shell dies; bare as well.
            seen.append((screen.status(), without_what_srun_says(screen.screen).rstrip(), "Killed" in screen.screen))
    assert seen[1] == seen[0]


def test_the_window_has_its_size_from_the_start_and_after_a_change(sandbox: Sandbox, job: list[str]) -> None:
    # Not a shell: bash forgets a signal that comes while it runs the trap of the one before.
    program = 'sub now { print "now ", `stty size` } $SIG{WINCH} = \\&now; $| = 1; now; sleep 1 while 1'
    for options in ([], GUEST):
        with terminal(sandbox, [*job, *options, "--pty", "perl", "-e", program]) as screen:
            screen.wait_for("now 33 101\r\n")
            for rows, columns in ((50, 120), (20, 64), (24, 80)):
                screen.resize(rows, columns)
                screen.wait_for(f"now {rows} {columns}\r\n")
            screen.type(CTRL_C)
            assert screen.status() == 130


def test_a_terminal_without_a_size_stays_without_one(sandbox: Sandbox, job: list[str]) -> None:
    for options in ([], GUEST):
        with terminal(sandbox, [*job, *options, "--pty", "stty", "size"], rows=0, columns=0) as screen:
            screen.wait_for(r"^0 0\r\n")
            assert screen.status() == 0


def test_a_long_output_arrives_whole_although_the_command_ends_at_once(sandbox: Sandbox, job: list[str]) -> None:
    with terminal(sandbox, [*job, *GUEST, "--pty", "seq", "50000"]) as screen:
        assert screen.status() == 0
        assert screen.screen == "".join(f"{number}\r\n" for number in range(1, 50001))


def test_a_long_paste_arrives_whole(sandbox: Sandbox, job: list[str]) -> None:
    text = "".join(f"line {number}\n" for number in range(2000))
    with terminal(sandbox, [*job, *GUEST, "--pty", "sh", "-c", "stty -echo; echo ready; cat"]) as screen:
        screen.wait_for("ready\r\n")
        for start in range(0, len(text), 1000):
            screen.type(text[start : start + 1000])
        screen.type(CTRL_D)
        assert screen.status() == 0
        assert screen.screen == "ready\r\n" + text.replace("\n", "\r\n")


def test_what_was_typed_while_the_guest_booted_is_not_lost(sandbox: Sandbox) -> None:
    with terminal(sandbox, ["srun", "-Q", "-N1", "-n1", "--mem=1024", *GUEST, "--pty", *SHELL]) as screen:
        screen.type("echo typed $((20 + 1)) early\n")
        screen.wait_for(r"typed 21 early\r\n")
        screen.type("exit 4\n")
        assert screen.status() == 4


def test_ctrl_c_while_the_guest_boots_ends_the_task(sandbox: Sandbox) -> None:
    with terminal(sandbox, ["srun", "-N1", "-n1", "--mem=1024", *GUEST, "--pty", "sleep", "300"]) as screen:
        wait_for(lambda: screen.is_raw)
        screen.type(CTRL_C)
        assert screen.status() == 130


def test_a_closed_window_ends_what_ran_in_it(sandbox: Sandbox, job: list[str]) -> None:
    with shell(sandbox, job, *GUEST) as screen:
        screen.wait_for(PROMPT)
        screen.type("sleep 4711 & setsid sleep 4711 & sleep 4711\n")
        screen.wait_for("sleep 4711\r\n")
        wait_for(lambda: _sleepers(sandbox, job) > 0)
    wait_for(lambda: _sleepers(sandbox, job) == 0)


def _sleepers(box: Sandbox, job: list[str]) -> int:
    script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 471[1]'"
    return int(outcome(box, [*job, *GUEST, "sh", "-c", script]).stdout.strip() or 0)


def test_a_user_owns_the_terminal_and_can_open_it_by_name(sandbox: Sandbox, user: User) -> None:
    words = [
        "srun",
        "-Q",
        "-N1",
        "-n1",
        "--mem=1024",
        *GUEST,
        "--pty",
        "sh",
        "-c",
        "echo hi > $(tty); stat -c %U $(tty)",
    ]
    with terminal(sandbox, words, user=user.name) as screen:
        assert screen.status() == 0
        assert screen.screen == f"hi\r\n{user.name}\r\n"
