"""A guest's clock is its host's, however it came to be: a template's stood still since it was made."""

import subprocess  # a dialogue with a running task
import time

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.clones("instant", "linked", "full")]

ASKED = 40
BOUND_S = 0.05
TELL_THE_TIME = "while read -r line; do echo $EPOCHREALTIME; done"


def test_a_guests_clock_is_right_within_50_ms(sandbox: Sandbox) -> None:
    words = ["srun", "-Q", "-n1", f"--guest={IMAGE}", "bash", "-c", TELL_THE_TIME]
    with subprocess.Popen(
        sandbox.command(words, netns=sandbox.netns),
        env=sandbox.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as task:
        assert task.stdin
        assert task.stdout
        looks = []
        for _ in range(ASKED):
            before_s = time.time()
            print(file=task.stdin, flush=True)
            told_s = float(task.stdout.readline())
            took_s = time.time() - before_s
            looks.append((took_s, told_s - before_s - took_s / 2))
        task.stdin.close()
    took_s, off_s = min(looks)  # the quickest answer tells the most exactly
    assert abs(off_s) < BOUND_S + took_s / 2
