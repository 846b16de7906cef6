"""``srun --guest`` runs elsewhere: each node's guest has a kernel, a name and identities of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from carrel import paths
from carrel.images.source import StoreImages
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, allocation, outcome
from carrel.testing.sandbox import User

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.clones("instant", "linked", "full"),
]

_LOOK = "uname -r; uname -n; cat /proc/sys/kernel/random/boot_id /etc/machine-id; echo $SLURMD_NODENAME"


class Place(msgspec.Struct, frozen=True):
    """Where a task found itself."""

    kernel: str
    host_name: str
    boot_id: str
    machine_id: str
    node: str


@pytest.fixture(scope="module")
def job(sandbox: Sandbox, user: User) -> Iterator[int]:
    """Have a job on all three nodes."""
    with allocation(sandbox, "--nodes=3", "--ntasks-per-node=1", user=user.name) as job_id:
        yield job_id


@pytest.fixture(scope="module")
def places(sandbox: Sandbox, user: User, job: int) -> list[Place]:
    """Ask one task in each of the three guests where it is."""
    words = ["srun", f"--jobid={job}", "-N3", "--label", f"--guest={IMAGE}", "sh", "-c", _LOOK]
    seen = outcome(sandbox, words, user=user.name)
    assert (seen.status, seen.stderr) == (0, "")
    said: dict[str, list[str]] = {}
    for line in seen.stdout.splitlines():
        task, _, text = line.partition(": ")
        said.setdefault(task, []).append(text)
    return [Place(*lines) for lines in said.values()]


def test_a_task_sees_the_kernel_of_the_store_and_never_the_hosts(sandbox: Sandbox, user: User, job: int) -> None:
    kernel = StoreImages(paths.image_store()).kernel().version
    assert kernel != os.uname().release
    seen = outcome(sandbox, ["srun", f"--jobid={job}", "-N1", f"--guest={IMAGE}", "uname", "-r"], user=user.name)
    assert (seen.status, seen.stdout, seen.stderr) == (0, f"{kernel}\n", "")


def test_three_nodes_are_three_different_guests(places: list[Place]) -> None:
    assert len(places) == 3
    for fact in ("host_name", "boot_id", "machine_id"):
        assert len({getattr(place, fact) for place in places}) == 3, fact
    assert {place.kernel for place in places} == {StoreImages(paths.image_store()).kernel().version}


def test_a_guest_has_the_name_of_its_node(places: list[Place]) -> None:
    assert {place.host_name for place in places} == {"c1", "c2", "c3"}
    assert all(place.host_name == place.node for place in places)


def test_no_guest_has_an_identity_of_the_host(places: list[Place]) -> None:
    host_boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host_machine_id = Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else ""
    for place in places:
        assert place.boot_id != host_boot_id
        assert place.machine_id != host_machine_id
        assert place.kernel != os.uname().release
        assert place.host_name != os.uname().nodename


def test_a_later_step_is_in_the_same_guest(sandbox: Sandbox, user: User, job: int, places: list[Place]) -> None:
    words = ["srun", f"--jobid={job}", "-N3", f"--guest={IMAGE}", "cat", "/proc/sys/kernel/random/boot_id"]
    seen = outcome(sandbox, words, user=user.name)
    assert sorted(seen.stdout.split()) == sorted(place.boot_id for place in places)
