"""A task in a guest ends as it would without one: exit code, signal, sentence, and what that means for its step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, Outcome, allocation, await_end, outcome, same_as_bare
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(300)]


_AT_ONCE = "--overlap"
"""Else srun says that it waits for the step before, where that one is still ending."""


@pytest.fixture(scope="module")
def job(sandbox: Sandbox, user: User) -> Iterator[int]:
    """Have a job of two tasks on one node: its bare steps and its steps in the guest are of the same job."""
    with allocation(sandbox, "--nodes=1", "--ntasks=2", "--nodelist=c1", user=user.name) as job_id:
        yield job_id


def one_task(box: Sandbox, user: User, job: int, *words: str | Path) -> Outcome:
    return same_as_bare(box, words, options=[f"--jobid={job}", "-n1", _AT_ONCE], user=user.name)


def two_tasks(box: Sandbox, user: User, job: int, script: str, *options: str) -> Outcome:
    """Compare a step of two tasks; in which order they are told of is a matter of microseconds, also when bare."""
    words = [f"--jobid={job}", "-n2", _AT_ONCE, *options, "sh", "-c", script]
    bare = outcome(box, ["srun", *words], user=user.name)
    guest = outcome(box, ["srun", f"--guest={IMAGE}", *words], user=user.name)
    assert (guest.status, guest.stdout) == (bare.status, bare.stdout)
    assert sorted(guest.stderr.splitlines()) == sorted(bare.stderr.splitlines())
    return guest


@pytest.mark.parametrize("code", [0, 1, 37, 255])
def test_an_exit_code_stays_what_it_is(sandbox: Sandbox, user: User, job: int, code: int) -> None:
    seen = one_task(sandbox, user, job, "sh", "-c", f"exit {code}")
    assert seen.status == code


@pytest.mark.parametrize(("signal", "number"), [("SEGV", 11), ("ABRT", 6), ("KILL", 9), ("TERM", 15), ("USR1", 10)])
def test_a_command_that_a_signal_ended_is_told_of_as_such(
    sandbox: Sandbox, user: User, job: int, signal: str, number: int
) -> None:
    # A core would be in the guest, and is not srun's to tell of.
    seen = one_task(sandbox, user, job, "sh", "-c", f"ulimit -c 0; kill -{signal} $$")
    assert seen.status == 128 + number


@pytest.mark.parametrize(
    "command", ["no-such-command", "/no/such/command", "/etc/passwd", "/tmp", "./relative", "/proc/self/maps"]
)
def test_what_cannot_be_executed_ends_with_the_words_of_slurmstepd(
    sandbox: Sandbox, user: User, job: int, command: str
) -> None:
    seen = one_task(sandbox, user, job, command, "argument")
    assert seen.status in {2, 13}
    assert "slurmstepd: error: execve(): " in seen.stderr


def test_a_script_without_its_interpreter_ends_with_the_words_of_slurmstepd(
    sandbox: Sandbox, user: User, job: int
) -> None:
    script = user.home / "no-interpreter"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    seen = one_task(sandbox, user, job, script)
    assert seen.status == 2
    assert "bad interpreter" in seen.stderr


def test_what_a_failing_command_said_is_not_lost(sandbox: Sandbox, user: User, job: int) -> None:
    seen = one_task(sandbox, user, job, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (seen.status, seen.stdout) == (3, "out\n")
    assert "err\n" in seen.stderr


_OTHER_FAILS = "if [ $SLURM_PROCID = 1 ]; then {end}; fi; {other}"
_LIVES_ON = "sleep 1; echo survived"
_STAYS = "exec sleep 60"


def test_a_failing_task_leaves_the_others_alone(sandbox: Sandbox, user: User, job: int) -> None:
    seen = two_tasks(sandbox, user, job, _OTHER_FAILS.format(end="exit 5", other=_LIVES_ON))
    assert (seen.status, seen.stdout) == (5, "survived\n")


def test_a_failing_task_ends_its_step_where_that_is_asked_for(sandbox: Sandbox, user: User, job: int) -> None:
    seen = two_tasks(sandbox, user, job, _OTHER_FAILS.format(end="exit 5", other=_STAYS), "--kill-on-bad-exit=1")
    assert (seen.status, seen.stdout) == (143, "")
    assert "Exited with exit code 5" in seen.stderr


def test_a_task_that_a_signal_ended_ends_its_step_where_that_is_asked_for(
    sandbox: Sandbox, user: User, job: int
) -> None:
    seen = two_tasks(sandbox, user, job, _OTHER_FAILS.format(end="kill -KILL $$", other=_STAYS), "-K")
    assert "task 0: Terminated" in seen.stderr


def test_a_task_that_ended_long_ago_ends_its_step_where_that_is_asked_for(
    sandbox: Sandbox, user: User, job: int
) -> None:
    words = [f"--jobid={job}", "-n2", _AT_ONCE, "--wait=1", "sh", "-c", _OTHER_FAILS.format(end="exit 0", other=_STAYS)]
    seen = [outcome(sandbox, ["srun", *options, *words], user=user.name) for options in ([], [f"--guest={IMAGE}"])]
    # Two of srun's threads tell of it, and which of them is first to end the step decides what else is said.
    assert [(one.status, one.stdout, "First task exited 1s ago" in one.stderr) for one in seen] == [(137, "", True)] * 2


def _batch(box: Sandbox, user: User, script: str, *options: str) -> tuple[str, str, str]:
    """Return state, exit code and output of a batch job."""
    name = f"{box.dir.name}.{{}}.out"
    words = ["sbatch", "--parsable", f"--output={name.format('%j')}", *options, "--wrap", script]
    done = box.run(words, user=user.name, cwd=user.home)
    assert done.returncode == 0, done.stderr
    job_id = int(done.stdout)
    await_end(box, job_id)
    shown = dict(
        word.partition("=")[::2]
        for word in box.run(["scontrol", "--oneliner", "show", "job", str(job_id)]).stdout.split()
    )
    return shown["JobState"], shown["ExitCode"], (user.home / name.format(job_id)).read_text()


@pytest.mark.parametrize(
    ("script", "state", "code"),
    [
        ("echo said; exit 37", "FAILED", "37:0"),
        ("echo said; ulimit -c 0; kill -SEGV $$", "FAILED", "0:11"),
        ("echo said", "COMPLETED", "0:0"),
    ],
)
def test_a_batch_job_ends_as_its_script(sandbox: Sandbox, user: User, script: str, state: str, code: str) -> None:
    bare = _batch(sandbox, user, script)
    guest = _batch(sandbox, user, script, f"--guest={IMAGE}")
    assert guest == bare == (state, code, "said\n")
