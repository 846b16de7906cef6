"""What the commands say of templates and of clones, where both are real."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, wait_for
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.timeout(400),
    pytest.mark.clones("auto"),  # with templates of its own, made by what is tested here
]

MIB = 2**20
JOB_MIB = 512
TEMPLATE_MIB = 256
"""Of what a job of ``JOB_MIB`` leaves its guest; the rest is plugged in."""
JOB = ("-N1", "-n1", f"--mem={JOB_MIB}")
WARM = ("image", "warm", IMAGE, "--cpus", "1", "--memory", str(JOB_MIB))


@pytest.fixture(scope="module")
def box(sandbox_factory: MakeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One node with templates of its own: none, at first."""
    place = tmp_path_factory.mktemp("templates")
    box = sandbox_factory(
        nodes=1,
        extra_conf="PartitionName=shared Nodes=ALL OverSubscribe=FORCE:4",
        carrel_conf=f'[guests.templates]\ndir = "{place}"\n',
    )
    yield box
    box.down()


def carrel(box: Sandbox, *words: str) -> list[Any]:
    """Return what ``carrel … --json`` prints, line by line."""
    done = box.run(["carrel", *words, "--json"], timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def enter(box: Sandbox, job_id: int) -> None:
    done = box.run(["srun", f"--jobid={job_id}", f"--guest={IMAGE}", "true"], timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    # The commands ask carrelctld, which hears of it a moment later.
    wait_for(lambda: [one["state"] for one in carrel(box, "guest", "list", "--job", str(job_id))] == ["ready"])


def loaded(box: Sandbox) -> int:
    """Count the templates whose memory carreld holds."""
    count = 0
    for link in Path(f"/proc/{box.pid('carreld@' + box.nodes[0])}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed just now
            count += "memfd:carrel-template" in str(link.readlink())
    return count


def test_a_template_made_ahead_serves_the_first_job_and_is_made_once(box: Sandbox) -> None:
    assert [one["state"] for one in carrel(box, *WARM)] == ["made"]
    (again,) = carrel(box, *WARM)
    assert again["state"] == "there"
    (template,) = carrel(box, "image", "templates")
    assert (template["digest"], template["usable"], template["why_not"]) == (again["digest"], True, "")
    assert (template["cpus"], template["memory_bytes"]) == (1, TEMPLATE_MIB * MIB)
    assert 10 * MIB < template["ram_bytes"] < TEMPLATE_MIB * MIB
    (image,) = carrel(box, "image", "show", IMAGE)
    assert [one["digest"] for one in image["templates"]] == [template["digest"]]
    with allocation(box, *JOB) as job_id:
        enter(box, job_id)
        (guest,) = carrel(box, "guest", "show", str(job_id))
        shown = box.run(["carrel", "job", "show", str(job_id), "--timing"]).stdout
    assert (guest["clone"], guest["clone_why"]) == ("instant", f"from a template for {again['shape']}")
    assert f"instant (from a template for {again['shape']})" in shown
    assert list(guest["phases"]) == ["qemu", "resume", "memory", "identity"]
    assert sum(guest["phases"].values()) == pytest.approx(guest["boot_s"], abs=0.001)
    words = [line.split()[:1] for line in shown.splitlines()]
    at = words.index(["total"])
    assert words[at - 4 : at] == [["qemu"], ["resume"], ["memory"], ["identity"]]


def test_clones_of_one_template_share_its_memory(box: Sandbox) -> None:
    carrel(box, *WARM)
    with allocation(box, "-p", "shared", *JOB) as one, allocation(box, "-p", "shared", *JOB) as other:
        for job_id in (one, other):
            enter(box, job_id)
        guests = [carrel(box, "guest", "show", str(job_id))[0] for job_id in (one, other)]
    assert [guest["clone"] for guest in guests] == ["instant"] * 2
    for guest in guests:
        # Each has most of the template in common with the other, so that all of it counts half.
        assert guest["memory_shared_bytes"] > 20 * MIB
        assert guest["memory_pss_bytes"] < guest["memory_bytes"]


def test_a_clone_has_as_much_memory_as_a_guest_that_booted(box: Sandbox) -> None:
    carrel(box, *WARM)
    have_mib = []
    for kind in ("instant", "linked"):
        words = ["srun", *JOB, f"--guest={IMAGE}", f"--guest-clone={kind}", "grep", "MemTotal", "/proc/meminfo"]
        done = box.run(words, timeout_s=GUEST_TIMEOUT_S)
        have_mib.append(int(done.stdout.split()[1]) / 1024)
    assert have_mib[0] == pytest.approx(have_mib[1], abs=16)


def test_a_template_is_removed_under_a_clone_that_goes_on_and_its_memory_goes(box: Sandbox) -> None:
    (template,) = carrel(box, *WARM)
    with allocation(box, *JOB) as job_id:
        enter(box, job_id)
        assert loaded(box) == 1
        done = box.run(["carrel", "image", "templates", "--remove", template["digest"][:8]])
        assert done.stdout.startswith("removed 1 template"), done.stderr
        assert carrel(box, "image", "templates") == []
        enter(box, job_id)
    with allocation(box, *JOB) as job_id:
        enter(box, job_id)
        (guest,) = carrel(box, "guest", "show", str(job_id))
        assert guest["clone"] == "linked"
        assert guest["clone_why"].startswith("the first for ")
        wait_for(lambda: len(carrel(box, "image", "templates")) == 1)
        wait_for(lambda: loaded(box) == 0)  # carreld has made the new one itself


def test_the_templates_of_a_node_are_roots_alone(box: Sandbox, user: User) -> None:
    for words in (["image", "templates"], list(WARM)):
        done = box.run(["carrel", *words], user=user.name)
        assert done.returncode == 4, done.stderr
        assert "root" in done.stderr
