"""How a user asks for a guest: options, ``#SBATCH`` lines, variables, and the names of the SPANK cloud plug-in."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, await_end, submit, wait_for
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

HOST_BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

# Says who and where it is, and what it has of two mounts; then waits to be looked at.
SCRIPT = """\
echo "$(id -u) $(cat /proc/sys/kernel/random/boot_id) $(ls -d /one /two 2> /dev/null | tr '\\n' ' ')"
touch ready
for i in $(seq 900); do [ -e done ] && break; sleep 0.2; done
"""


class Seen(msgspec.Struct, frozen=True):
    """What a job said, and what carreld says of its guest."""

    uid: int
    boot_id: str
    mounts: list[str]
    guest: dict[str, Any]


def guests(box: Sandbox) -> list[dict[str, Any]]:
    done = box.run(["carrel", "guest", "list", "--json"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def directory(user: User) -> Path:
    place = user.home / f"options-{secrets.token_hex(4)}"
    place.mkdir()
    os.chown(place, user.uid, user.gid)
    return place


def seen(said: str, guest: dict[str, Any]) -> Seen:
    uid, boot_id, *mounts = said.split()
    return Seen(uid=int(uid), boot_id=boot_id, mounts=mounts, guest=guest)


def run(box: Sandbox, user: User, options: Sequence[str], env: Mapping[str, str] | None = None) -> Seen:
    """Run the script by srun and look at its guest meanwhile."""
    place = directory(user)
    words = ["srun", *options, "-n1", "sh", "-c", SCRIPT]
    with ThreadPoolExecutor() as threads:
        srun = threads.submit(box.run, words, user=user.name, cwd=place, env=env, timeout_s=GUEST_TIMEOUT_S)
        try:
            wait_for(lambda: (place / "ready").exists() or srun.done())
            assert not srun.done(), srun.result().stderr
            guest = the_guest(box) if options or env else {}
            assert bool(guests(box)) == bool(guest)
        finally:
            (place / "done").touch()
        done = srun.result()
    assert done.returncode == 0, done.stderr
    wait_for(lambda: guests(box) == [])
    return seen(done.stdout, guest)


def the_guest(box: Sandbox) -> dict[str, Any]:
    """Return the only guest, once carrelctld has heard that it is ready."""
    wait_for(lambda: [guest["state"] for guest in guests(box)] == ["ready"])
    return guests(box)[0]


def facts(guest: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(guest.get(name)) for name in ("image_name", "driver", "clone", "per"))


def test_srun_sbatch_and_salloc_tell_of_every_option(sandbox: Sandbox) -> None:
    options = ("--guest=", "--guest-per=", "--guest-clone=", "--guest-mount=", "--guest-root", "--guest-boot-timeout=")
    others = ("--guest-driver=", "--cloud=", "--cloud-type=", "--cloud-create=")
    for command in ("srun", "sbatch", "salloc"):
        _, _, said = sandbox.run([command, "--help"]).stdout.partition("Options provided by plugins")
        assert [option for option in (*options, *others) if option not in said] == []


def test_a_job_without_an_option_runs_on_its_node_as_ever(sandbox: Sandbox, user: User) -> None:
    plain = run(sandbox, user, [])
    assert (plain.uid, plain.boot_id, plain.guest) == (user.uid, HOST_BOOT_ID, {})
    variables = sandbox.run(["srun", "-n1", "env"], user=user.name).stdout
    # The sandbox's own two are the caller's, and travel as any variable does.
    assert [line for line in variables.splitlines() if "CARREL_JOB" in line or "CARREL_ENTER" in line] == []


def test_every_option_may_stand_in_the_script(sandbox: Sandbox, user: User) -> None:
    script = f"""\
#!/bin/sh
#SBATCH --guest={IMAGE}
#SBATCH --guest-per=job
#SBATCH --guest-clone=full
#SBATCH --guest-mount=/usr/share/doc:/one:ro
#SBATCH --guest-mount=/usr/share/common-licenses:/two
#SBATCH --guest-root
#SBATCH --guest-boot-timeout=150
#SBATCH --guest-driver=qemu
#SBATCH --ntasks=1
{SCRIPT}"""
    job_id, place = submit(sandbox, script, user=user)
    wait_for((place / "ready").exists)
    guest = the_guest(sandbox)
    (place / "done").touch()
    assert await_end(sandbox, job_id) == "COMPLETED"
    job = seen((place / "out").read_text(), guest)
    assert (job.uid, job.mounts) == (0, ["/one", "/two"])
    assert facts(job.guest) == (IMAGE, "qemu", "full", "job")
    assert job.boot_id != HOST_BOOT_ID


def test_variables_stand_in_for_options(sandbox: Sandbox, user: User) -> None:
    env = {
        "CARREL_GUEST": IMAGE,
        "CARREL_GUEST_PER": "task",
        "CARREL_GUEST_CLONE": "full",
        "CARREL_GUEST_MOUNT": "/usr/share/doc:/one:ro\n/usr/share/common-licenses:/two",
        "CARREL_GUEST_ROOT": "yes",
        "CARREL_GUEST_BOOT_TIMEOUT": "150",
        "CARREL_GUEST_DRIVER": "qemu",
    }
    job = run(sandbox, user, [], env)
    assert (job.uid, job.mounts) == (0, ["/one", "/two"])
    assert facts(job.guest) == (IMAGE, "qemu", "full", "task")


def test_an_option_wins_over_the_variable(sandbox: Sandbox, user: User) -> None:
    env = {"CARREL_GUEST": "no-such-image", "CARREL_GUEST_CLONE": "full"}
    job = run(sandbox, user, [f"--guest={IMAGE}", "--guest-clone=linked"], env)
    assert facts(job.guest) == (IMAGE, "qemu", "linked", "job")


@pytest.mark.parametrize(
    ("options", "uid"),
    [
        (["--cloud=kvm", "--cloud-create=yes"], 0),
        (["--cloud=kvm", "--cloud-type=kvm", "--cloud-create=no"], None),
        (["--cloud-type=kvm"], None),
    ],
)
def test_the_names_of_the_cloud_plugin_mean_a_guest(
    sandbox: Sandbox, user: User, options: list[str], uid: int | None
) -> None:
    job = run(sandbox, user, options)
    assert facts(job.guest) in {(IMAGE, "qemu", clone, "job") for clone in ("linked", "instant")}
    assert job.uid == (user.uid if uid is None else uid)
    assert job.boot_id != HOST_BOOT_ID


def test_salloc_gives_its_steps_the_guest(sandbox: Sandbox, user: User) -> None:
    words = ["salloc", f"--guest={IMAGE}", "-n1", "srun", "cat", "/proc/sys/kernel/random/boot_id"]
    done = sandbox.run(words, user=user.name, timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != HOST_BOOT_ID
