"""Progress is for whoever watches, and no part of the answer."""

import os
import pty
import subprocess  # a terminal for one stream and a pipe for the other
import sys

SCRIPT = """
from carrel.cli.progress import progress
with progress("template") as tell:
    tell("first")
    print("answer")
    tell("second")
"""


def test_an_answer_goes_to_the_program_that_reads_it_although_somebody_watches() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(theirs)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b"answer\n"
    assert "second" in seen
    assert "answer" not in seen


def test_without_a_terminal_each_phase_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"answer\n", b"template: first\ntemplate: second\n")
