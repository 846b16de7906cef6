"""Who shares a guest with whom: steps of one job on one node, and nobody else, ever."""

import json
import os
import secrets
import xml.etree.ElementTree as ET  # our own files
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, await_end, job_state, submit, wait_for
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

HOST_BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
BOOT = "$(cat /proc/sys/kernel/random/boot_id)"


def carrel(box: Sandbox, *words: str) -> list[Any]:
    """Return what ``carrel … --json`` prints, line by line."""
    done = box.run(["carrel", *words, "--json"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def directory(user: User) -> Path:
    """Return a new directory in the user's home."""
    place = user.home / f"shared-{secrets.token_hex(4)}"
    place.mkdir()
    os.chown(place, user.uid, user.gid)
    return place


def map_items(path: Path) -> list[dict[str, str]]:
    root = ET.fromstring(path.read_text())  # noqa: S314  # our own file
    assert root.tag == "VM_LIST"
    return [item.attrib for item in root.findall("VM/item")]


def test_each_task_of_an_array_has_a_guest_of_its_own(sandbox: Sandbox, user: User) -> None:
    script = (
        f'#!/bin/sh\necho "$SLURM_ARRAY_TASK_ID {BOOT}" > "boot.$SLURM_ARRAY_TASK_ID"\nexit "$SLURM_ARRAY_TASK_ID"\n'
    )
    options = ["--array=0-2", "--nodes=1", "--ntasks=1", "--nodelist=c1"]
    job_id, place = submit(sandbox, script, f"--guest={IMAGE}", *options, user=user)
    await_end(sandbox, job_id)
    boots = [(place / f"boot.{index}").read_text().split() for index in range(3)]
    assert [index for index, _ in boots] == ["0", "1", "2"]
    assert len({boot for _, boot in boots} | {HOST_BOOT_ID}) == 4
    ended = sandbox.run(["squeue", "-h", "--states=all", "-r", "-j", str(job_id), "-O", "ArrayTaskID:|,exit_code:|"])
    assert sorted(ended.stdout.split()) == ["0|0|", "1|256|", "2|512|"]


def test_two_steps_at_once_are_in_one_guest_and_see_each_other(sandbox: Sandbox, user: User) -> None:
    step = f"""\
        echo "$0 {BOOT} $(readlink /proc/self/ns/pid)"; touch "/tmp/$0"
        for i in $(seq 600); do [ -e /tmp/first ] && [ -e /tmp/second ] && break; sleep 0.1; done
        pgrep -f "a-mark-of-[a-z]*" | wc -l; touch "/tmp/$0.done"
        for i in $(seq 600); do [ -e /tmp/first.done ] && [ -e /tmp/second.done ] && break; sleep 0.1; done
        """
    script = f"""\
#!/bin/sh
srun --overlap -n1 sh -c '{step}' first a-mark-of-one > first &
srun --overlap -n1 sh -c '{step}' second a-mark-of-two > second &
wait
"""
    job_id, place = submit(sandbox, script, f"--guest={IMAGE}", "--nodes=1", "--ntasks=1", user=user)
    assert await_end(sandbox, job_id) == "COMPLETED", (place / "out").read_text()
    first, second = ((place / name).read_text().split() for name in ("first", "second"))
    assert first[1:3] == second[1:3]
    assert first[1] != HOST_BOOT_ID
    # The shell of each step at least, in both lists.
    assert int(first[3]) >= 2
    assert int(second[3]) >= 2


MAP_STEP = f"""\
echo "{BOOT} $(nproc)"; touch "$0/ready.$SLURM_PROCID"
for i in $(seq 900); do [ -e "$0/done" ] && break; sleep 0.2; done
"""


def test_four_tasks_of_one_node_have_four_guests_with_slots_of_their_own(sandbox: Sandbox, user: User) -> None:
    place = directory(user)
    words = ["srun", f"--guest={IMAGE}", "--guest-per=task", "-N1", "-n4", "--mem-per-cpu=500M", "sh", "-c", MAP_STEP]
    with ThreadPoolExecutor() as threads:
        srun = threads.submit(sandbox.run, [*words, place], user=user.name, cwd=place, timeout_s=GUEST_TIMEOUT_S)
        try:
            wait_for(lambda: len(list(place.glob("ready.*"))) == 4 or srun.done())
            job_id = int(sandbox.run(["squeue", "-h", "-u", user.name, "-o", "%A"]).stdout)
            wait_for(lambda: len(carrel(sandbox, "guest", "list")) == 4)  # carrelctld hears of them a moment later
            slots = carrel(sandbox, "guest", "map", str(job_id))
            files = [sandbox.dir / "maps" / f"vm_map{job_id}{step}.conf" for step in ("", ".0")]
            wait_for(lambda: all(path.exists() and len(map_items(path)) == 4 for path in files))
            latest, by_step = (map_items(path) for path in files)
        finally:
            (place / "done").touch()
        lines = [line.split() for line in srun.result().stdout.splitlines()]

    assert len({boot for boot, _ in lines} | {HOST_BOOT_ID}) == 5
    assert {cpus for _, cpus in lines} == {"1"}
    assert sorted(slot["id"] for slot in slots) == [0, 1, 2, 3]
    assert sorted(slot["task"] for slot in slots) == [0, 1, 2, 3]
    assert len({slot["guest"] for slot in slots}) == 4
    assert latest == by_step
    assert [set(item) for item in latest] == [{"id", "hm", "mem_mb", "cores", "arch"}] * 4
    assert sorted(item["id"] for item in latest) == ["0", "1", "2", "3"]
    assert {(item["hm"], item["cores"], item["arch"]) for item in latest} == {("127.0.0.1", "1", "x86_64")}
    # What --mem-per-cpu gives a task, less the reserve: no flag bit of Slurm's field, and not the whole job's.
    assert all(160 <= int(item["mem_mb"]) < 500 for item in latest)
    wait_for(lambda: not any(path.exists() for path in files))
    wait_for(lambda: carrel(sandbox, "guest", "list") == [])


def test_a_requeued_job_begins_anew_in_another_guest(sandbox: Sandbox, user: User) -> None:
    script = f"""\
#!/bin/sh
echo "$SLURM_RESTART_COUNT {BOOT} $(ls /tmp/left /var/tmp/left 2>/dev/null)" >> runs
touch /tmp/left /var/tmp/left
[ "$SLURM_RESTART_COUNT" ] && exit 0
touch running
sleep 600
"""
    job_id, place = submit(sandbox, script, f"--guest={IMAGE}", "--ntasks=1", "--requeue", user=user)
    wait_for((place / "running").exists)
    assert sandbox.run(["scontrol", "requeue", str(job_id)], user=user.name).returncode == 0
    wait_for(lambda: job_state(sandbox, job_id) == "PENDING")
    # Slurm lets two minutes pass before it starts a requeued job; and slurmd takes what is started within the second in
    # which the run before it ended for that run, and refuses it (22.05: "already killed, do not launch batch job").
    assert sandbox.run(["scontrol", "update", f"job={job_id}", "StartTime=now+2"]).returncode == 0
    wait_for(lambda: len((place / "runs").read_text().splitlines()) == 2)
    assert await_end(sandbox, job_id) == "COMPLETED"
    first, second = (line.split(" ") for line in (place / "runs").read_text().splitlines())
    assert (first[0], second[0]) == ("", "1")
    assert second[1] not in {first[1], HOST_BOOT_ID}
    assert second[2:] == [""]


def test_two_jobs_of_one_user_on_one_node_never_share_a_guest(sandbox: Sandbox, user: User) -> None:
    options = (f"--guest={IMAGE}", "--nodes=1", "--ntasks=1", "--nodelist=c1")
    with allocation(sandbox, *options, user=user.name) as one, allocation(sandbox, *options, user=user.name) as other:
        words = ["sh", "-c", f'echo "{BOOT}"; ls /tmp; touch "/tmp/job-$SLURM_JOB_ID"']
        first, second, again = (
            sandbox.run(["srun", f"--jobid={job}", *words], user=user.name, timeout_s=GUEST_TIMEOUT_S).stdout.split()
            for job in (one, other, one)
        )
        assert len({first[0], second[0], HOST_BOOT_ID}) == 3
        assert f"job-{one}" not in second
        assert again == [first[0], f"job-{one}"]
