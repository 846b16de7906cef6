"""What Slurm sends reaches a job in a guest as it reaches one without: cancel, signals, time limit, suspension."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, allocation, await_end, job_state, normal, same_as_bare, wait_for
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

IDLE = "while :; do sleep 0.2; done"
TRAPPED = f"trap 'echo got TERM; sleep 0.3; echo saved; exit 7' TERM; echo begun; {IDLE}"


class Batch:
    """A batch job of the user's that has begun to run its script."""

    def __init__(self, box: Sandbox, user: User, script: str, *options: str) -> None:
        """Submit it; see ``begun``."""
        # Job ids begin anew with each sandbox, and what another one left in this home must not be taken for ours.
        name = f"{box.dir.name}.{{}}.out"
        words = ["sbatch", "--parsable", "--nodelist=c1", f"--output={name.format('%j')}", *options]
        done = box.run(words, user=user.name, cwd=user.home, stdin=f"#!/bin/bash\n{script}\n")
        assert done.returncode == 0, done.stderr
        self._box = box
        self.id = int(done.stdout)
        self._out = user.home / name.format(self.id)

    def begun(self) -> None:
        wait_for(lambda: "begun\n" in self.output())

    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def told(self) -> str:
        """Return the output as it is compared. What bash says of its own ``sleep`` depends on the millisecond."""
        return "".join(line for line in normal(self.output()).splitlines(keepends=True) if "Terminated" not in line)

    @property
    def state(self) -> str:
        return job_state(self._box, self.id)

    def end(self) -> tuple[str, str, str]:
        """Wait for its end and return what there is to compare: state, exit code, output."""
        state = await_end(self._box, self.id)
        shown = self._box.run(["scontrol", "--oneliner", "show", "job", str(self.id)]).stdout.split()
        exit_code = next(word.partition("=")[2] for word in shown if word.startswith("ExitCode="))
        return state, exit_code, self.told()


def two_jobs(box: Sandbox, user: User, script: str, *options: str) -> tuple[Batch, Batch]:
    """Return the same job bare and in a guest, both begun."""
    jobs = Batch(box, user, script, *options), Batch(box, user, script, f"--guest={IMAGE}", *options)
    for job in jobs:
        job.begun()
    return jobs


@pytest.fixture(scope="module")
def patient(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Have a node where a script has a minute for its trap: three seconds are few for an emulated guest."""
    box = sandbox_factory(nodes=1, extra_conf="KillWait=60")
    yield box
    box.down()


def test_scancel_lets_the_scripts_term_trap_run_to_its_end(patient: Sandbox, user: User) -> None:
    bare, guest = two_jobs(patient, user, TRAPPED)
    patient.run(["scancel", str(bare.id), str(guest.id)])
    assert guest.end() == bare.end()
    assert "got TERM\nsaved\n" in guest.told()


def test_scancel_ends_a_script_that_ignores_it_after_kill_wait(sandbox: Sandbox, user: User) -> None:
    bare, guest = two_jobs(sandbox, user, f"trap '' TERM; echo begun; {IDLE}")
    sandbox.run(["scancel", str(bare.id), str(guest.id)])
    assert guest.end() == bare.end()
    assert guest.state == "CANCELLED"


def test_scancel_of_a_batch_script_signals_the_script_and_not_its_children(sandbox: Sandbox, user: User) -> None:
    script = """
    trap 'kill -0 $child && echo got USR1 and the child lives; kill $child; exit 0' USR1
    sleep 600 & child=$!
    echo begun
    while :; do sleep 0.2; done
    """
    bare, guest = two_jobs(sandbox, user, script)
    sandbox.run(["scancel", "--batch", "--signal=USR1", str(bare.id), str(guest.id)])
    assert guest.end() == bare.end()
    assert "got USR1 and the child lives\n" in guest.output()


def test_a_time_limit_is_sigterm_first_and_then_timeout(patient: Sandbox, user: User) -> None:
    bare, guest = two_jobs(patient, user, TRAPPED, "--time=60")
    for job in (bare, guest):  # what is left of the hour would be the same wait
        patient.run(["scontrol", "update", f"JobId={job.id}", "EndTime=now"])
    assert guest.end() == bare.end()
    assert guest.state == "TIMEOUT"
    assert "got TERM\nsaved\n" in guest.told()


@pytest.fixture(scope="module")
def job(sandbox: Sandbox, user: User) -> Iterator[int]:
    """Have a job without a guest, whose steps bring one."""
    with allocation(sandbox, "--nodes=1", "--ntasks=1", "--nodelist=c2", user=user.name) as job_id:
        yield job_id


@pytest.mark.parametrize("signal", ["USR1", "INT", "HUP", "RTMIN+3"])
def test_a_signal_to_a_step_reaches_its_command(sandbox: Sandbox, user: User, job: int, signal: str) -> None:
    # The step asks for its own signal: so it cannot come before the trap is set.
    # An orphan sends it: bash says of a child of its own that the signal ended it, where it ended before it was done.
    send = f"(scancel --signal=$(kill -l {signal}) $SLURM_JOB_ID.$SLURM_STEP_ID &)"
    script = f"trap 'echo got {signal}; exit 9' {signal}; {send}; {IDLE}"
    seen = same_as_bare(sandbox, ["bash", "-c", script], options=[f"--jobid={job}", "-n1", "--overlap"], user=user.name)
    assert (seen.status, seen.stdout) == (9, f"got {signal}\n")


# -- suspension --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["linuxproc", "cgroup"])
def tracked(request: pytest.FixtureRequest, sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Have a node where Slurm suspends by signals, and one where it freezes a cgroup."""
    box = sandbox_factory(nodes=1, proctrack=request.param)
    yield box
    box.down()


class Ticker:
    """A job in a guest that writes the time of its guest, again and again."""

    def __init__(self, box: Sandbox, user: User) -> None:
        """Start it."""
        self._box = box
        self._out = user.home / f"{box.dir.name}.ticks"
        script = "while :; do date +%s.%N; sleep 0.1; done"
        words = ["sbatch", "--parsable", f"--guest={IMAGE}", f"--output={self._out}", "--wrap", script]
        self.id = int(box.run(words, user=user.name, cwd=user.home).stdout)

    @property
    def guest(self) -> dict[str, object]:
        lines = self._box.run(["carrel", "guest", "list", "--json"]).stdout.splitlines()
        guests: list[dict[str, object]] = [json.loads(line) for line in lines]
        return next((guest for guest in guests if str(guest["name"]).startswith(f"{self.id}.")), {})

    @property
    def times(self) -> list[float]:
        text = self._out.read_text() if self._out.exists() else ""
        return [float(line) for line in text.splitlines() if line and line[0].isdigit()]

    @property
    def lag_s(self) -> float:
        """Return how far the guest's clock was behind the host's when the last line was written."""
        return self._out.stat().st_mtime - self.times[-1]

    @property
    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.guest['pid']}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def ticks_on(self) -> None:
        count = len(self.times)
        wait_for(lambda: len(self.times) > count + 2)

    def stands_still(self) -> None:
        """Return when no line came for a second; a line that was under way may come first."""
        seen = [len(self.times), time.monotonic()]

        def still() -> bool:
            now = [len(self.times), time.monotonic()]
            if now[0] != seen[0]:
                seen[:] = now
            return now[1] - seen[1] > 1.0

        wait_for(still)


@pytest.fixture(scope="module")
def ticker(tracked: Sandbox, user: User) -> Ticker:
    """Have such a job on each of them."""
    return Ticker(tracked, user)


def test_a_job_stopped_by_a_signal_goes_on_by_a_signal(tracked: Sandbox, ticker: Ticker) -> None:
    ticker.ticks_on()
    tracked.run(["scancel", "--full", "--signal=TSTP", str(ticker.id)])
    ticker.stands_still()
    assert ticker.guest["state"] == "ready"  # it is the command that stopped, not the guest
    tracked.run(["scancel", "--full", "--signal=CONT", str(ticker.id)])
    ticker.ticks_on()


def test_a_suspended_job_stands_still_and_goes_on_with_the_right_time(tracked: Sandbox, ticker: Ticker) -> None:
    ticker.ticks_on()
    done = tracked.run(["scontrol", "suspend", str(ticker.id)])
    assert done.returncode == 0, done.stderr
    wait_for(lambda: ticker.guest["state"] == "suspended")
    ticker.stands_still()
    before, used = len(ticker.times), ticker.cpu_ticks
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        assert len(ticker.times) == before
        time.sleep(0.2)
    assert ticker.cpu_ticks - used < 20  # a stopped guest's emulator still answers questions

    done = tracked.run(["scontrol", "resume", str(ticker.id)])
    assert done.returncode == 0, done.stderr
    ticker.ticks_on()
    wait_for(lambda: abs(ticker.lag_s) < 1.0)
    wait_for(lambda: ticker.guest["state"] == "ready")


def test_a_suspended_job_can_be_cancelled(tracked: Sandbox, ticker: Ticker) -> None:
    tracked.run(["scontrol", "suspend", str(ticker.id)])
    wait_for(lambda: ticker.guest["state"] == "suspended")
    tracked.run(["scancel", str(ticker.id)])
    wait_for(lambda: job_state(tracked, ticker.id) == "CANCELLED" and not ticker.guest)
