"""carreld and carrelctld come and go while jobs run, and no job notices."""

import json
import secrets
import signal
import subprocess
import threading

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, await_end, submit, wait_for
from carrel.testing.leaks import nothing_left, pid_of
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

GUEST = (f"--guest={IMAGE}", "--mem=400")


class Streaming:
    """A step that says a number every twentieth of a second, until a file appears in its directory."""

    def __init__(self, box: Sandbox, user: User, job_id: int) -> None:
        self.stop = user.home / f"stop-{secrets.token_hex(4)}"
        script = f"n=0; while [ ! -e {self.stop} ]; do n=$((n+1)); echo $n; sleep 0.05; done; echo last $n"
        self._words = ["srun", f"--jobid={job_id}", "--overlap", "sh", "-c", script]
        self._box, self._user = box, user
        self.done: subprocess.CompletedProcess[str] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> list[str]:
        """Tell it to stop and return its lines."""
        self.stop.touch()
        self._thread.join(GUEST_TIMEOUT_S)
        assert self.done is not None
        assert self.done.returncode == 0, self.done.stderr
        return self.done.stdout.splitlines()

    def _run(self) -> None:
        self.done = self._box.run(self._words, user=self._user.name, timeout_s=GUEST_TIMEOUT_S)


def guests(box: Sandbox) -> dict[str, int]:
    """Return tasks inside by name of guest, as ``carrel guest list`` says."""
    done = box.run(["carrel", "guest", "list", "--json"])
    assert done.returncode == 0, done.stderr
    return {guest["name"]: guest["tasks"] for guest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_job_notices_that_the_daemons_were_ended_and_started_again(
    sandbox: Sandbox, user: User, how: signal.Signals
) -> None:
    idle, place = submit(sandbox, "#!/bin/sh\nwhile [ ! -e go ]; do sleep 0.2; done; echo went\n", *GUEST, user=user)
    with allocation(sandbox, *GUEST, user=user.name) as job_id:
        step = ["srun", f"--jobid={job_id}", "--overlap"]
        boot_id = sandbox.run([*step, "cat", "/proc/sys/kernel/random/boot_id"], user=user.name, timeout_s=180).stdout
        streaming = Streaming(sandbox, user, job_id)
        wait_for(lambda: all(pid_of(sandbox, job, "enter") for job in (idle, job_id)))
        wait_for(lambda: sorted(guests(sandbox).values()) == [1, 1])
        before = guests(sandbox)

        for daemon in ("carrelctld", *(f"carreld@{node}" for node in sandbox.nodes)):
            sandbox.kill(daemon, how)
        for daemon in (*(f"carreld@{node}" for node in sandbox.nodes), "carrelctld"):
            sandbox.start(daemon)

        wait_for(lambda: guests(sandbox) == before)
        after = sandbox.run([*step, "cat", "/proc/sys/kernel/random/boot_id"], user=user.name, timeout_s=180)
        assert after.stdout == boot_id, f"a new task enters the same guest: {after.stderr}"
        lines = streaming.end()
    assert lines == [*(str(number) for number in range(1, len(lines))), f"last {len(lines) - 1}"]
    (place / "go").touch()
    assert await_end(sandbox, idle) == "COMPLETED"
    assert (place / "out").read_text() == "went\n"
    nothing_left(sandbox)


def test_a_task_that_comes_while_carreld_is_away_waits_for_it_or_says_so(sandbox: Sandbox, user: User) -> None:
    sandbox.kill("carreld@c1")
    done = sandbox.run(["srun", "--nodelist=c1", *GUEST, "uname", "-r"], user=user.name, timeout_s=180)
    sandbox.start("carreld@c1")
    assert done.returncode != 0
    assert done.stdout == "", "never on the bare host"
    assert "carreld" in done.stderr
    nothing_left(sandbox)
