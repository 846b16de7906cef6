"""A guest has what its job has, and no more: CPUs, memory, and an end with the job whatever else is dead."""

import json
import os
import re
import secrets
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from carrel import config
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import (
    IMAGE,
    Outcome,
    allocation,
    await_end,
    job_state,
    outcome,
    submit,
    wait_for,
)
from carrel.testing.leaks import guest_of, nothing_left, pid_of
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

MakeSandbox = Callable[..., Sandbox]
MIB = 2**20
JOB_MIB = 400
MEMORY = Path("/sys/fs/cgroup/memory")
HOG = ["tail", "/dev/zero"]  # looks for the end of a line that never ends


# An instant clone's memory is plugged into it, a linked one's is there from the start.
@pytest.fixture(scope="module", params=[("linuxproc", "linked"), ("cgroup", "instant")], ids="-".join)
def box(request: pytest.FixtureRequest, sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    proctrack, clone = request.param
    made = sandbox_factory(nodes=1, proctrack=proctrack, carrel_conf=f'[guests]\nclone = "{clone}"\n')
    yield made
    made.down()


@pytest.fixture(scope="module")
def confined(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Where Slurm limits a job's memory, and QEMU is given next to none of it."""
    made = sandbox_factory(nodes=1, proctrack="cgroup", carrel_conf="[guests]\nmemory_reserve_bytes = 1048576\n")
    yield made
    made.down()


@pytest.fixture(scope="module")
def narrow(sandbox_factory: MakeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Where a guest has two ways in: a device of four ports keeps two for itself, and nobody samples."""
    conf = '[drivers.qemu]\nports_max = 4\n[metrics]\nenabled = false\n[guests]\nclone = "linked"\n'
    # A node removes the templates of guests with other ports.
    conf += f'[guests.templates]\ndir = "{tmp_path_factory.mktemp("templates")}"\n'
    made = sandbox_factory(nodes=1, carrel_conf=conf)
    yield made
    made.down()


def guest(box: Sandbox) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(box.run(["carrel", "guest", "list", "--json"]).stdout.splitlines()[0])
    return found


def cgroups_of(pid: int) -> dict[str, str]:
    """Return a process's directory in each v1 hierarchy."""
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return {name: path for _, names, path in lines for name in names.split(",")}


def job_memory(node: str, uid: int, job_id: int, name: str) -> int:
    return int((MEMORY / f"slurm_{node}/uid_{uid}/job_{job_id}" / name).read_text())


def test_a_guest_has_the_jobs_cpus_and_its_memory_less_the_reserve_and_a_hog_gets_no_more(
    box: Sandbox, user: User
) -> None:
    options = [f"--guest={IMAGE}", "--cpus-per-task=2", f"--mem={JOB_MIB}"]
    with allocation(box, *options, user=user.name) as job_id:
        step = ["srun", f"--jobid={job_id}", "--cpus-per-task=2", "--overlap"]
        seen = box.run([*step, "sh", "-c", "nproc; grep MemTotal /proc/meminfo"], user=user.name, timeout_s=180)
        assert seen.returncode == 0, seen.stderr
        cpus, total_kib = int(seen.stdout.split()[0]), int(seen.stdout.split()[2])
        has_mib = JOB_MIB - config.Guests().memory_reserve_bytes // MIB
        assert cpus == 2
        assert guest(box)["memory_bytes"] == has_mib * MIB
        assert has_mib - 64 < total_kib / 1024 <= has_mib, "less what the guest's own kernel takes"

        hog = box.run([*step, *HOG], user=user.name, timeout_s=180)
        assert f"carrel: out of memory: in the guest ({has_mib} MiB), 1 process was killed" in hog.stderr
        assert "guest is gone" not in hog.stderr
        assert hog.returncode == 128 + signal.SIGKILL
        again = box.run([*step, "sh", "-c", f"{' '.join(HOG)}; echo went on after $?"], user=user.name, timeout_s=180)
        assert again.stdout == "went on after 137\n"
        assert "carrel: out of memory: in the guest" in again.stderr
        if box.facts().cgroups:
            limit, peak = (
                job_memory(box.nodes[0], user.uid, job_id, f"memory.{name}_in_bytes") for name in ("limit", "max_usage")
            )
            assert limit == JOB_MIB * MIB
            assert peak <= limit
            qemu = pid_of(box, job_id, "qemu")
            assert qemu is not None
            assert qemu.alive, "the guest's kernel ended the hog, not the host's the guest"


def test_qemu_is_the_jobs_user_confined_and_counted_beside_the_steps(box: Sandbox, user: User) -> None:
    with allocation(box, f"--guest={IMAGE}", f"--mem={JOB_MIB}", user=user.name) as job_id:
        box.run(["srun", f"--jobid={job_id}", "true"], user=user.name, timeout_s=180)
        qemu = pid_of(box, job_id, "qemu")
        assert qemu is not None
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{qemu.number}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == [str(user.uid)] * 4
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["CapEff"], 16) == 0
        blocked = int(status["SigBlk"], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCONT, signal.SIGTSTP):
            assert blocked >> (number - 1) & 1, f"{number.name} of a job would reach QEMU"
        if box.facts().cgroups:
            own = f"/slurm_{box.nodes[0]}/uid_{user.uid}/job_{job_id}/carrel"
            found = cgroups_of(qemu.number)
            assert {name: found[name] for name in ("memory", "cpuset", "cpuacct")} == dict.fromkeys(
                ("memory", "cpuset", "cpuacct"), own
            )
            assert "job_" not in found["freezer"], "suspend would freeze it with its monitor"


def test_a_user_whose_qemu_the_host_kills_for_memory_reads_out_of_memory(confined: Sandbox, user: User) -> None:
    words = ["srun", f"--guest={IMAGE}", f"--mem={JOB_MIB}", *HOG]
    done = confined.run(words, user=user.name, timeout_s=180)
    assert done.returncode == 128 + signal.SIGKILL
    sentence = f"carrel: out of memory: the guest needed more memory than the job has ({JOB_MIB} MiB)"
    assert sentence in done.stderr, done.stderr
    assert "ask for more with --mem" in done.stderr
    assert "guest is gone" not in done.stderr
    nothing_left(confined)


def test_qemu_dies_with_its_job_also_when_carreld_is_dead(box: Sandbox, user: User) -> None:
    job_id, _ = submit(box, "#!/bin/sh\nsleep 600\n", f"--guest={IMAGE}", f"--mem={JOB_MIB}", user=user)
    wait_for(lambda: pid_of(box, job_id, "enter") is not None)
    qemu = pid_of(box, job_id, "qemu")
    assert qemu is not None
    node = guest_of(box, job_id).parent.parent.name
    box.kill(f"carreld@{node}")
    assert qemu.alive
    assert job_state(box, job_id) == "RUNNING"
    box.run(["scancel", str(job_id)])
    wait_for(lambda: not qemu.alive)
    box.start(f"carreld@{node}")
    await_end(box, job_id)
    assert re.fullmatch(r"(idle|mixed)", box.run(["sinfo", "-hN", "-o", "%T"]).stdout.strip())
    nothing_left(box)


NO_WAY_IN = (
    "carrel: the guest takes no further task: all 2 ways in are taken; start fewer at once, or ask for more memory "
    "(--mem), see: drivers.qemu.ports_max"
)
STAYS = 'touch "$0/in.$SLURM_STEP_ID"; for i in $(seq 900); do [ -e "$0/out" ] && exit; sleep 0.1; done; exit 9'


def test_more_tasks_and_calls_than_a_guest_has_ways_in_are_told_so_and_harm_nobody(narrow: Sandbox, user: User) -> None:
    place = user.home / f"narrow-{secrets.token_hex(4)}"
    place.mkdir()
    os.chown(place, user.uid, user.gid)
    with allocation(narrow, f"--guest={IMAGE}", user=user.name) as job_id, ThreadPoolExecutor() as threads:

        def step(*words: str | Path) -> Outcome:
            return outcome(narrow, ["srun", f"--jobid={job_id}", "--overlap", *words], user=user.name, cwd=place)

        def stay(number: int) -> Future[Outcome]:
            stays = threads.submit(step, "sh", "-c", STAYS, place)
            wait_for(lambda: len(list(place.glob("in.*"))) == number or stays.done())
            return stays

        try:
            first = stay(1)
            alone = step("true")
            # The task is the second inside; what it asks of Slurm would be the third.
            calls = step("sh", "-c", "squeue; echo $?")
            second = stay(2)
            refused = step("true")
        finally:
            (place / "out").touch()
        assert (alone.status, alone.stderr) == (0, "")
        assert calls == Outcome(0, "1\n", f"squeue: error: {NO_WAY_IN}\n")
        assert refused == Outcome(1, "", f"{NO_WAY_IN}\nsrun: error: c1: task 0: Exited with exit code 1\n")
        assert [first.result().status, second.result().status] == [0, 0]
        assert step("sh", "-c", "squeue --noheader --format=%A").stdout == f"{job_id}\n"
