"""After any end of a job, and any crash of a part, nothing is left: each batch of faults is followed by one audit."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from carrel.process import Pid
from carrel.sandbox import descendants
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, await_end, job_state, submit, wait_for
from carrel.testing.leaks import CLEAN_TIMEOUT_S, guest_of, leaks, nothing_left, pid_of
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(600)]

MakeSandbox = Callable[..., Sandbox]
GUEST = (f"--guest={IMAGE}", "--mem=400")
SLEEP = "#!/bin/sh\nsleep 600\n"


# A boot that is cancelled, or whose carreld dies, differs by the clone; which way Slurm tracks processes does not.
@pytest.fixture(scope="module", params=[("linuxproc", "linked"), ("cgroup", "instant")], ids="-".join)
def box(request: pytest.FixtureRequest, sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    proctrack, clone = request.param
    made = sandbox_factory(proctrack=proctrack, carrel_conf=f'[guests]\nclone = "{clone}"\n')
    yield made
    made.down()


def process(box: Sandbox, job_id: int, name: str) -> Pid:
    """Return a process of a job, once its first task is in the guest."""
    found: list[Pid] = []

    def is_there() -> bool:
        pid = pid_of(box, job_id, name) if pid_of(box, job_id, "enter") else None
        found.extend([pid] if pid else [])
        return pid is not None

    wait_for(is_there)
    return found[0]


def node_of(box: Sandbox, job_id: int) -> str:
    return guest_of(box, job_id).parent.parent.name


def test_a_job_leaves_nothing_however_it_ends(box: Sandbox, user: User) -> None:
    def job(script: str, *options: str) -> int:
        return submit(box, script, *options, user=user)[0]

    trap = "#!/bin/sh\ntrap 'sleep 2; exit 3' TERM\nsleep 600 & wait\n"
    ends = [
        job("#!/bin/sh\ntrue\n", *GUEST),
        job("#!/bin/sh\nexit 5\n", *GUEST, "--guest-clone=full"),
        job("#!/bin/sh\nsrun true\n", *GUEST, "--guest-per=task", "--ntasks=2", "--cpus-per-task=1"),
        job(f"#!/bin/sh\nsrun {GUEST[0]} true\nsleep 1\n", "--mem=400"),  # its Epilog hears of no guest
        job("#!/bin/sh\nsleep 1\n", *GUEST, "--guest-boot-timeout=1"),
    ]
    queued = job(SLEEP, *GUEST, "--begin=now+1hour")
    booting = job(SLEEP, *GUEST)
    running = job(SLEEP, *GUEST)
    ending = job(trap, *GUEST)
    box.run(["scancel", str(queued)])
    wait_for(lambda: bool(list(box.dir.glob(f"nodes/*/guests/{booting}.*/pids"))))
    box.run(["scancel", str(booting)])
    process(box, running, "enter")
    process(box, ending, "enter")
    box.run(["scancel", str(running), str(ending)])
    wait_for(lambda: job_state(box, ending) != "RUNNING")
    box.run(["scancel", "--signal=KILL", str(ending)])
    for job_id in (*ends, queued, booting, running, ending):
        await_end(box, job_id)
    nothing_left(box)


def test_jobs_whose_processes_are_killed_or_whose_guest_panics_end_and_leave_nothing(box: Sandbox, user: User) -> None:
    panic = "#!/bin/sh\necho 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 600\n"
    panicking, panicked = submit(box, panic, *GUEST, "--guest-root", user=user)
    victims = ("qemu", "guard", "enter")
    jobs = {victim: submit(box, SLEEP, *GUEST, "--no-requeue", user=user) for victim in victims}
    for victim, (job_id, _) in jobs.items():
        process(box, job_id, victim).kill(signal.SIGKILL)
    states = {victim: await_end(box, job_id) for victim, (job_id, _) in jobs.items()}
    assert await_end(box, panicking) == "FAILED"
    nothing_left(box)
    assert states == dict.fromkeys(victims, "FAILED")
    for place in (panicked, jobs["qemu"][1], jobs["guard"][1]):
        assert "carrel: the guest is gone: " in (place / "out").read_text()


def test_what_ends_while_carreld_is_dead_is_gone_soon_after(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, SLEEP, *GUEST, user=user)
    qemu = process(box, job_id, "qemu")
    node = node_of(box, job_id)
    box.kill(f"carreld@{node}")
    box.run(["scancel", str(job_id)])
    wait_for(lambda: not qemu.alive)
    box.start(f"carreld@{node}")
    await_end(box, job_id)
    nothing_left(box)


def test_a_job_whose_carreld_dies_while_its_guest_boots_runs_all_the_same_and_leaves_nothing(
    box: Sandbox, user: User
) -> None:
    job_id, place = submit(box, "#!/bin/sh\necho ran on $(uname -r)\n", *GUEST, user=user)
    wait_for(lambda: bool(list(box.dir.glob(f"nodes/*/guests/{job_id}.*"))))
    box.restart(f"carreld@{node_of(box, job_id)}", signal.SIGKILL)
    state = await_end(box, job_id)
    nothing_left(box)
    assert state == "COMPLETED"
    assert (place / "out").read_text().splitlines()[-1].startswith("ran on ")


def test_a_job_that_is_cancelled_while_its_slurmd_is_dead_leaves_nothing(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, SLEEP, *GUEST, user=user)
    process(box, job_id, "qemu")
    node = node_of(box, job_id)
    box.kill(f"slurmd@{node}")
    box.run(["scancel", str(job_id)])
    box.start(f"slurmd@{node}")
    await_end(box, job_id)
    nothing_left(box)


def test_the_audit_finds_a_running_job_in_every_place(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, SLEEP, *GUEST, user=user)
    process(box, job_id, "qemu")
    wait_for(lambda: bool(list((box.dir / "maps").glob("*"))))
    found = {line.partition(":")[0].split()[0] for line in leaks(box)}
    assert found >= {"process", "guest", "what", "who", "map", "socket", "listed"}
    box.run(["scancel", str(job_id)])
    await_end(box, job_id)
    nothing_left(box)


@pytest.mark.parametrize("proctrack", ["linuxproc", "cgroup"])
def test_a_killed_slurmstepd_leaves_no_more_than_without_a_guest(
    sandbox_factory: MakeSandbox, user: User, proctrack: str
) -> None:
    box = sandbox_factory(nodes=1, proctrack=proctrack)

    def kill_slurmstepd(*options: str) -> int:
        job_id, place = submit(
            box, "#!/bin/sh\ntouch started\nexec sleep 600\n", "--mem=400", *options, "--no-requeue", user=user
        )
        wait_for((place / "started").exists)
        (stepd,) = (pid for pid in stepds(box) if f"[{job_id}.batch]" in title(pid))
        os.kill(stepd, signal.SIGKILL)
        # Slurm itself learns of it only when slurmd next registers, some minutes later.
        box.run(["scancel", str(job_id)])
        await_end(box, job_id)
        return job_id

    bare_id = kill_slurmstepd()
    bare = {line.replace(f"job_{bare_id}", "job_J").replace(f"_{bare_id}.", "_J.") for line in leaks(box)}
    guest_id = kill_slurmstepd(GUEST[0])
    wait_for(
        lambda: (
            {line.replace(f"job_{guest_id}", "job_J").replace(f"_{guest_id}.", "_J.") for line in leaks(box)}
            <= bare | {line for line in leaks(box) if f"job_{bare_id}" in line or f"_{bare_id}." in line}
        ),
        CLEAN_TIMEOUT_S,
    )
    box.down()


def stepds(box: Sandbox) -> set[int]:
    return descendants.with_open_file("slurmstepd", box.dir / "log")


def title(pid: int) -> str:
    with suppress(OSError):  # it may end just now
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""
