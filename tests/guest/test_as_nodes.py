"""Guests that are Slurm nodes, on hosts that Slurm does not schedule: real Slurm, real guests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, await_end, job_state, submit, wait_for
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

OPTIONS = (f"--guest={IMAGE}", "--guest-per=node", "--mem=320")
"""A guest of 160 MiB: one of the shapes that a template is there for."""
CLEAN_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def box(sandbox_factory: Callable[..., Sandbox]) -> Sandbox:
    """One ordinary node, and two hosts for guests."""
    return sandbox_factory(nodes=1, hosts=2, carrel_conf="[guest_nodes]\nattempts_max = 2\n")


@pytest.fixture(autouse=True)
def _nothing_is_left(box: Sandbox) -> Iterator[None]:
    """See after each test that names, rooms, guests and slurmctld are as before it."""
    controller = box.pid("slurmctld")
    yield
    wait_for(lambda: not carried(box), CLEAN_TIMEOUT_S)
    wait_for(lambda: not reservations(box), CLEAN_TIMEOUT_S)
    wait_for(lambda: set(states(box).values()) == {"IDLE+CLOUD+DRAIN+POWERED_DOWN"}, CLEAN_TIMEOUT_S)
    assert box.pid("slurmctld") == controller, "slurmctld was restarted"


def carried(box: Sandbox) -> list[str]:
    """Return what hosts have of guests: notes, directories, guests."""
    patterns = ("nodes/h*/guest-nodes/*.json", "nodes/v*", "nodes/h*/guests/*")
    return [str(path.relative_to(box.dir)) for pattern in patterns for path in box.dir.glob(pattern)]


def reservations(box: Sandbox) -> list[str]:
    said = box.run(["scontrol", "-o", "show", "reservation"]).stdout
    return [line for line in said.splitlines() if "ReservationName" in line]


def states(box: Sandbox) -> dict[str, str]:
    """Return the state of each name of the pool."""
    lines = box.run(["scontrol", "-o", "-a", "show", "node", ",".join(box.facts().pool)]).stdout.splitlines()
    words = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return {each["NodeName"]: each["State"] for each in words}


def events(box: Sandbox, job_id: int) -> list[str]:
    """Return what ``carrel job events`` tells of a job."""
    lines = box.run(["carrel", "job", "events", str(job_id), "--json"]).stdout.splitlines()
    return [f"{each['what']}: {each['text']}" for each in map(json.loads, lines)]


def test_a_job_gets_a_guest_that_is_its_own_node_and_both_are_gone_afterwards(box: Sandbox, user: User) -> None:
    done = box.run(["srun", "-Q", *OPTIONS, "sh", "-c", "hostname; id -un; cat /proc/cmdline"], user=user.name)
    assert done.returncode == 0, done.stderr
    name, who, kernel = done.stdout.splitlines()
    assert name in box.facts().pool
    assert who == user.name
    assert "carrel" in kernel, "the task ran on the host"


def test_a_batch_script_runs_in_the_guest_too(box: Sandbox, user: User) -> None:
    script = "#!/bin/sh\nhostname\nsrun hostname\nexit 7\n"
    job_id, place = submit(box, script, *OPTIONS, user=user)
    assert await_end(box, job_id) == "FAILED"
    first, second = (place / "out").read_text().split()
    assert first == second
    assert first in box.facts().pool
