"""`srun --pty`: two terminals, the caller's raw and one in the guest, that feel like one."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess  # the task is a long-lived child
import termios
import time
from collections.abc import Iterator

import pytest

from carrel.testing.relay import RelayNode


class Terminal:
    """A person at a terminal whose shell is a task."""

    def __init__(self, node: RelayNode, *argv: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = b""
        self.task = subprocess.Popen(
            node.command(argv),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=node.environment(argv[0], {"TERM": "dumb", "PS1": "$ "}),
            start_new_session=True,
        )

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until ``pattern`` shows, bounded; what was read up to it is forgotten."""
        until = time.monotonic() + 30
        while (found := re.search(pattern.encode(), self.seen)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{pattern!r} did not show; seen: {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen[found.end() :]
        return found.group().decode()

    def close(self) -> None:
        self.task.kill()
        self.task.wait(30)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def shell(node: RelayNode) -> Iterator[Terminal]:
    """An interactive shell in the guest, at its first prompt."""
    terminal = Terminal(node, "sh", "-i")
    terminal.expect(r"\$ ")
    yield terminal
    terminal.close()


def test_the_terminal_inside_has_the_size_of_the_one_outside_and_follows_it(shell: Terminal) -> None:
    shell.type("stty size\n")
    shell.expect("24 80")
    shell.resize(50, 132)
    shell.task.send_signal(signal.SIGWINCH)
    shell.type("until stty size | grep '^50 132$'; do sleep 0.1; done\n")
    shell.expect("50 132\r\n")


def test_a_shell_hears_of_a_new_size_also_while_its_command_has_the_terminal(node: RelayNode) -> None:
    terminal = Terminal(node, "bash", "--norc", "--noprofile", "-i")
    terminal.type("trap 'echo now $(stty size)' WINCH; echo ar''med; while :; do sleep 0.1; done\n")
    terminal.expect("armed\r\n")
    terminal.resize(50, 132)
    terminal.task.send_signal(signal.SIGWINCH)  # as slurmstepd does
    terminal.expect("now 50 132\r\n")
    terminal.close()


def test_control_c_interrupts_the_command_and_not_the_task(shell: Terminal) -> None:
    # The command itself says that it has begun: a ^C before it is the shell's own and leaves the command to come.
    shell.type("sh -c 'echo begun; exec sleep 60'\n")
    shell.expect("begun\r\n")
    shell.type("\x03")
    shell.expect(r"\$ ")
    shell.type("echo rc=$?\n")
    shell.expect("rc=130")


def test_control_d_ends_a_reader_and_at_the_prompt_the_shell(shell: Terminal) -> None:
    shell.type("cat\n")
    shell.type("word\n")
    shell.expect("word\r\nword\r\n")
    shell.type("\x04")
    shell.expect(r"\$ ")
    shell.type("\x04")
    assert shell.task.wait(30) == 0


def test_a_shell_ends_its_task_with_its_own_status(shell: Terminal) -> None:
    shell.type("exit 9\n")
    assert shell.task.wait(30) == 9


def test_the_terminal_outside_is_as_before_when_the_task_has_ended(shell: Terminal) -> None:
    assert termios.tcgetattr(shell.slave) != shell.before
    shell.type("exit\n")
    shell.task.wait(30)
    assert termios.tcgetattr(shell.slave) == shell.before


def test_all_of_a_long_last_output_shows(node: RelayNode) -> None:
    terminal = Terminal(node, "seq", "20000")
    terminal.expect("\n20000\r\n")
    assert terminal.task.wait(30) == 0
    terminal.close()


def test_a_command_in_a_terminal_owns_it(node: RelayNode) -> None:
    terminal = Terminal(node, "sh", "-c", "echo hi > /dev/tty && tty")
    terminal.expect("hi\r\n/dev/pts/[0-9]+\r\n")
    terminal.close()
