"""Guests that are Slurm nodes, on hosts that Slurm does not schedule: real Slurm, real guests."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.config import Slurm
from carrel.daemons.guestlogs import PHASES
from carrel.sandbox.cluster import Sandbox
from carrel.slurm.beside import Beside
from carrel.testing.asnodes import (
    AT_REST,
    CLEAN_TIMEOUT_S,
    OPTIONS,
    await_running,
    events,
    names_rest,
    nothing_of_nodes_is_left,
    of_job,
    reservations,
    rooms,
    slurmd,
    states,
)
from carrel.testing.guests import await_end, job_state, submit, wait_for
from carrel.testing.leaks import pid_of
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]


@pytest.fixture(scope="module")
def box(sandbox_factory: Callable[..., Sandbox]) -> Iterator[Sandbox]:
    """One ordinary node, and two hosts for guests; at the end every name is at rest, under the same slurmctld."""
    made = sandbox_factory(nodes=1, hosts=2, carrel_conf="[placement.launches]\nattempts = 2\nbackoff_s = 0.2\n")
    controller = made.pid("slurmctld")
    yield made
    names_rest(made)
    assert made.pid("slurmctld") == controller, "slurmctld was restarted"
    made.down()


@pytest.fixture(autouse=True)
def _nothing_is_left(box: Sandbox) -> Iterator[None]:
    """See after each test that guests, reservations and rooms are gone."""
    yield
    nothing_of_nodes_is_left(box)


def test_a_job_gets_a_guest_that_is_its_own_node_and_both_are_gone_afterwards(box: Sandbox, user: User) -> None:
    done = box.run(["srun", "-Q", *OPTIONS, "sh", "-c", "hostname; id -un; cat /proc/cmdline"], user=user.name)
    assert done.returncode == 0, done.stderr
    name, who, kernel = done.stdout.splitlines()
    assert name in box.facts().pool
    assert who == user.name
    assert "carrel" in kernel, "the task ran on the host"


def test_a_host_that_is_asked_anew_has_what_it_had(box: Sandbox) -> None:
    def hosts() -> list[dict[str, Any]]:
        return [json.loads(line) for line in box.run(["carrel", "host", "list", "--json"]).stdout.splitlines()]

    def sizes() -> list[tuple[str, int, int]]:
        return [(host["name"], host["cpus"], host["memory_bytes"]) for host in hosts()]

    wait_for(lambda: {host["state"] for host in hosts()} == {"up"})  # all have reported
    assert sizes() == [(host, 4, 8000 * 2**20) for host in box.facts().hosts]
    assert box.run(["carrel", "host", "refresh"]).returncode == 0
    assert sizes() == [(host, 4, 8000 * 2**20) for host in box.facts().hosts]


def test_a_batch_script_runs_in_the_guest_too(box: Sandbox, user: User) -> None:
    script = "#!/bin/sh\nhostname\nsrun hostname\nexit 7\n"
    job_id, place = submit(box, script, *OPTIONS, user=user)
    assert await_end(box, job_id) == "FAILED"
    first, second = (place / "out").read_text().split()
    assert first == second
    assert first in box.facts().pool


def test_a_guests_logs_are_its_users_to_read_when_it_is_gone(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, "#!/bin/sh\nhostname\n", *OPTIONS, user=user)
    assert await_end(box, job_id) == "COMPLETED"
    found: dict[str, Path] = {}

    def all_there() -> bool:
        files = (box.dir / "guest-logs" / user.name).glob(f"{job_id}.*/*")
        found.update({path.name.partition(".")[2]: path for path in files})
        return set(found) == {"spawn.log", "timings", "slurmd.log", "console.log"}

    wait_for(all_there, CLEAN_TIMEOUT_S)
    wait_for(lambda: "destroyed" in found["timings"].read_text(), CLEAN_TIMEOUT_S)
    times = dict(line.split() for line in found["timings"].read_text().splitlines())
    assert set(times) == set(PHASES)
    # Its slurmd stands beside it and does not wait for it.
    for way in (("clone_start", "clone_end", "customised", "first_task", "destroyed"), ("registered", "first_task")):
        assert [float(times[phase]) for phase in way] == sorted(float(times[phase]) for phase in way)
    assert "guest-ready: " in found["spawn.log"].read_text()
    assert "slurmd version" in found["slurmd.log"].read_text()
    assert any(
        line.startswith("guest-gone") and line.endswith(f"its logs are in {found['timings'].parent} on {host}")
        for line in events(box, job_id)
        for host in box.facts().hosts
    )
    for path in found.values():
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (user.uid, 0o400)


def test_the_tasks_of_one_job_are_in_guests_on_several_hosts(box: Sandbox) -> None:
    words = ["srun", "-Q", *OPTIONS, "--mem=320", "--nodes=2", "--ntasks=2", "--cpus-per-task=3", "hostname"]
    done = box.run(words)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 2
    placed = [path for path in box.dir.glob("log/carreld.h*.log") if "guest-starting" in path.read_text()]
    assert len(placed) == 2, "three CPUs of four are taken, so the second guest is on the other host"


def test_a_job_for_which_there_is_no_room_says_so_and_runs_when_there_is(box: Sandbox, user: User) -> None:
    script = "#!/bin/sh\nuntil [ -e go ]; do sleep 0.2; done\n"
    first = [submit(box, script, *OPTIONS, "--cpus-per-task=4", user=user) for _ in range(2)]
    wait_for(lambda: rooms(box) == 2)
    waiting, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, "--cpus-per-task=4", user=user)
    wait_for(lambda: of_job(box, waiting, "%k").startswith("carrel: no room for 4 CPUs"))
    assert of_job(box, waiting, "%r") == "JobHeldAdmin"
    assert "no room for 4 CPUs" in box.run(["carrel", "job", "show", str(waiting)]).stdout
    for _, place in first:
        (place / "go").touch()
    assert [await_end(box, job_id) for job_id in (*(each for each, _ in first), waiting)] == ["COMPLETED"] * 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--cpus-per-task=40",), "40 CPUs and 320 MiB fit no host"),
        (("--guest=nosuch",), "no image 'nosuch'"),
    ],
    ids=["larger than any host", "no such image"],
)
def test_a_job_that_can_have_no_guest_is_cancelled_with_a_sentence(
    box: Sandbox, user: User, options: tuple[str, ...], sentence: str
) -> None:
    job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, *options, user=user)
    assert await_end(box, job_id) == "CANCELLED"
    assert sentence in of_job(box, job_id, "%k")
    assert any(line.startswith("job-cancelled") and sentence in line for line in events(box, job_id))
    assert sentence in box.run(["carrel", "job", "show", str(job_id)]).stdout


@pytest.mark.parametrize("command", ["srun", "salloc"])
def test_who_waits_at_a_terminal_reads_there_why_there_is_no_guest(box: Sandbox, user: User, command: str) -> None:
    done = box.run([command, *OPTIONS, "--cpus-per-task=40", "true"], user=user.name)
    assert done.returncode != 0
    assert f"{command}: carrel: cancelled: 40 CPUs and 320 MiB fit no host" in done.stderr


def test_a_job_whose_guest_fails_each_time_is_held_with_the_reason_after_some_attempts(
    box: Sandbox, user: User
) -> None:
    # A copy of the image that boots takes longer than a second, on whichever host.
    options = (*OPTIONS, "--guest-clone=full", "--guest-boot-timeout=1")
    job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *options, user=user)
    wait_for(lambda: "no guest after 2 attempts; the last: guest not ready after 1 s" in of_job(box, job_id, "%k"))
    assert of_job(box, job_id, "%r") == "JobHeldAdmin"
    # The journal of a host comes with its next report.
    wait_for(lambda: sum(line.startswith("guest-failed") for line in events(box, job_id)) == 2)
    box.run(["scancel", str(job_id)])


def test_a_job_that_is_cancelled_while_its_guest_is_made_leaves_nothing(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, "#!/bin/sh\nsleep 60\n", *OPTIONS, "--guest-clone=full", user=user)
    wait_for(lambda: pid_of(box, job_id, "qemu") is not None)
    box.run(["scancel", str(job_id)])
    assert await_end(box, job_id) == "CANCELLED"


def test_a_job_whose_guest_dies_is_seen_as_a_node_failure_and_runs_again_in_another(box: Sandbox, user: User) -> None:
    script = '#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] || sleep 60\n'
    job_id, _ = submit(box, script, *OPTIONS, "--requeue", user=user)
    first = await_running(box, job_id)
    qemu = pid_of(box, job_id, "qemu")
    assert qemu
    qemu.kill(signal.SIGKILL)
    assert await_end(box, job_id) == "COMPLETED"
    wait_for(lambda: f"node-down: node {first}: its guest is gone: qemu was killed by signal 9" in events(box, job_id))
    wait_for(lambda: sum(line.startswith("guest-ready") for line in events(box, job_id)) == 2)


def test_a_guest_that_its_owner_ends_ends_the_job_and_is_not_begun_again(box: Sandbox, user: User) -> None:
    options = (*OPTIONS, "--guest-root", "--requeue")
    job_id, place = submit(box, "#!/bin/sh\necho o > /proc/sysrq-trigger\nsleep 60\n", *options, user=user)
    assert await_end(box, job_id) == "FAILED"
    assert "the guest is gone" in (place / "out").read_text()
    assert sum(line.startswith("guest-ready") for line in events(box, job_id)) == 1


def test_neither_release_nor_change_takes_a_waiting_job_past_what_was_admitted(box: Sandbox, user: User) -> None:
    box.kill("carrelctld")  # so that it waits, and nobody but job_submit.lua watches
    try:
        job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, user=user)
        for change in ("Priority=1", "NumCPUs=4", "MinMemoryNode=4000", "Partition=main", "NumNodes=2", "Features=x"):
            done = box.run(["scontrol", "update", f"JobId={job_id}", change], user=user.name)
            assert done.returncode != 0, change
        assert box.run(["scontrol", "release", str(job_id)], user=user.name).returncode != 0
        assert of_job(box, job_id, "%C %D %P %r") == "1 1 guests JobHeldUser"
    finally:
        box.start("carrelctld")
    assert await_end(box, job_id) == "COMPLETED"


def test_nobody_else_gets_onto_a_guest_that_was_made_for_a_job(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, "#!/bin/sh\nsleep 300\n", *OPTIONS, user=user)
    name = await_running(box, job_id)
    (reservation,) = reservations(box)
    box.run(["scontrol", "create", "PartitionName=all", "Nodes=ALL"])  # as careless sites have it
    try:
        # Not root, to whom 24.11 refuses no reservation.
        words = ["srun", "-pall", f"--reservation={reservation}", "--mem=10", "true"]
        refused = box.run(words, user="nobody", cwd=Path("/"))
        assert "Access denied to requested reservation" in refused.stderr
        # Another user's, and the owner's own: whatever Slurm makes of them, nothing runs on the host, or in the guest.
        for who, more in ((None, ()), (user.name, (f"--reservation={reservation}",))):
            words = ["sbatch", "--parsable", "-pall", "-w", name, *more, "--mem=10", "-D/tmp", "--wrap=touch /tmp/x"]
            other = int(box.run([*words, "-o/dev/null"], user=who).stdout)
            wait_for(lambda other=other: job_state(box, other) in {"PENDING", "FAILED"})  # type: ignore[misc]
            box.run(["scancel", str(other)])
            assert job_state(box, other) in {"CANCELLED", "FAILED"}
    finally:
        box.run(["scancel", str(job_id)])
        await_end(box, job_id)
        box.run(["scontrol", "delete", "PartitionName=all"])


def test_a_slurmd_that_registers_late_under_a_name_at_rest_gets_no_job(box: Sandbox, user: User) -> None:
    name = box.facts().pool[-1]
    wait_for(lambda: states(box)[name] == AT_REST)
    with slurmd(box, name):
        wait_for(lambda: "POWER" in states(box)[name] and states(box)[name] != AT_REST)
        job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, user=user)
        assert await_end(box, job_id) == "COMPLETED"
        assert of_job(box, job_id, "%N") != name


@pytest.mark.parametrize("victim", ["carrelctld", "carreld", "slurmd"])
def test_whatever_is_killed_while_jobs_come_and_go_all_of_them_end_and_none_has_two_guests(
    box: Sandbox, user: User, victim: str
) -> None:
    jobs = [submit(box, "#!/bin/sh\nsleep 1\n", *OPTIONS, user=user)[0] for _ in range(4)]
    for _ in range(6):
        if victim == "slurmd":
            for note in box.dir.glob("nodes/*/slurmd"):
                if pid := Beside(Slurm(), note.parent.name, note.parent).pid():
                    pid.kill(signal.SIGKILL)
        else:
            for name in [f"carreld@{host}" for host in box.facts().hosts] if victim == "carreld" else [victim]:
                box.restart(name, signal.SIGKILL)
        living = [path.name.rpartition(".")[0] for path in box.dir.glob("nodes/h*/guests/*")]
        assert len(living) == len(set(living)), f"two guests of one run: {living}"
    assert {await_end(box, job_id) for job_id in jobs} == {"COMPLETED"}
