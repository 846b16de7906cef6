"""What a real Slurm's accounting says: of people, and of jobs, whose prices are compared with what it billed.

The nodes are a cloud's: slurmctld gives them to jobs without a slurmd, so a thousand jobs start at once. What Slurm
bills is an integer, truncated; what we charge is exact, so that both are compared truncated.
"""

import asyncio
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from carrel.config import Slurm
from carrel.core import imports
from carrel.core.pricing import hourly
from carrel.model.price import MILLION
from carrel.sandbox.cluster import Sandbox
from carrel.slurm import facts
from carrel.slurm.client import SlurmClient
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
NODES = 48
SHAPES, TASKS = 34, 15
"""Random descriptions for each of two modes, each an array of so many jobs. The third mode, MAX_TRES_GRES, came with
Slurm 23.11; its documented example is in tests/unit/test_pricing.py."""
MODES = {"sum": "", "max": "MAX_TRES"}
WEIGHTS = {
    "whole": "CPU=1,Mem=1G,Node=2,GRES/gpu=4,GRES/gpu:a100=2,License/matlab=8",
    "broken": "CPU=0.3,Mem=0.07G,Node=0.9,GRES/gpu=3.3,License/matlab=0.1",
    "memory": "Mem=1.5G",
    "plain": "",
}
CONF = f"""
GresTypes=gpu
PriorityType=priority/multifactor

AccountingStorageTRES=gres/gpu,gres/gpu:a100,gres/gpu:v100,license/matlab
Licenses=matlab:1000000
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=86400
ResumeTimeout=3600

NodeName=t[1-{NODES}] NodeAddr=127.0.0.1 Port=39991 CPUs=128 Sockets=2 CoresPerSocket=32 ThreadsPerCore=2 \
RealMemory=1000000 Gres=gpu:a100:32,gpu:v100:32 State=CLOUD
""" + "".join(
    f"PartitionName={name} Nodes=t[1-{NODES}] MaxTime=60 DefMemPerCPU=100"
    + (f' TRESBillingWeights="{weights}"\n' if weights else "\n")
    for name, weights in WEIGHTS.items()
)


@pytest.fixture(scope="module")
def cloud(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    box = sandbox_factory(nodes=1, guests=False, slurmdbd=True, extra_conf=CONF)
    yield box
    box.down()


def a_description(rng: random.Random) -> list[str]:
    words = [f"-p{rng.choice(list(WEIGHTS))}", f"-n{rng.choice((1, 1, 2, 3, 5))}", f"-c{rng.choice((1, 1, 2, 3))}"]
    if rng.random() < 0.5:
        words.append(rng.choice(("--mem=300", "--mem=3G", "--mem-per-cpu=150", "--mem-per-cpu=777")))
    if rng.random() < 0.4:
        words.append(rng.choice(("--gres=gpu:1", "--gres=gpu:a100:2", "--gpus-per-node=2", "--gres=gpu:v100:1")))
    if rng.random() < 0.2:
        words.append(f"-Lmatlab:{rng.choice((1, 3))}")
    if rng.random() < 0.2:
        words.append("-N2-3" if "-n1" not in words else "-N1")
    return words


def submit(box: Sandbox, mode: str, rng: random.Random) -> None:
    """Submit the jobs of one mode, and return when each has its nodes."""
    if MODES[mode]:
        with box.layout.slurm_conf.open("a") as conf:
            conf.write(f"PriorityFlags={MODES[mode]}\n")
        assert box.run(["scontrol", "reconfigure"]).returncode == 0
        wait_for(lambda: shown(box, "PriorityFlags").endswith(f"= {MODES[mode]}"), "the flags are in force")
    array = f"--array=1-{TASKS}"
    for _ in range(SHAPES):
        words = a_description(rng)
        done = box.run(["sbatch", "-J", mode, "-D", "/tmp", "-o", "/dev/null", array, *words, "--wrap", "true"])
        assert done.returncode == 0, (words, done.stderr)
    wait_for(lambda: not waiting(box, mode), "each job has its nodes", timeout_s=120)
    assert box.run(["scancel", "--name", mode]).returncode == 0


def shown(box: Sandbox, key: str) -> str:
    lines = box.run(["scontrol", "show", "config"]).stdout.splitlines()
    return next((line for line in lines if line.startswith(key)), "")


def waiting(box: Sandbox, name: str) -> str:
    return str(box.run(["squeue", "-h", "-n", name, "-t", "PENDING", "-o", "%i"]).stdout).strip()


def records(box: Sandbox) -> list[tuple[str, str, Mapping[str, int]]]:
    """Return mode, partition and AllocTRES of every job that had nodes, as the accounting has them."""
    fields = ["-o", "JobName,Partition,AllocTRES", "-S", "now-1days"]
    text = box.run(["sacct", "-a", "-X", "-n", "-P", "--noconvert", *fields]).stdout
    rows = [line.split("|") for line in text.splitlines()]
    found = [(mode, partition, facts.tres(tres)) for mode, partition, tres in rows if mode in MODES]
    return [row for row in found if row[2]]


def test_a_thousand_jobs_are_priced_as_slurm_billed_them(cloud: Sandbox) -> None:
    rng = random.Random(20260302)  # noqa: S311  # a fixed choice of descriptions, no secret
    for mode in MODES:
        submit(cloud, mode, rng)
    wanted = len(MODES) * SHAPES * TASKS
    wait_for(lambda: len(records(cloud)) >= wanted, "all are accounted", timeout_s=120)
    books = {
        mode: imports.from_weights(WEIGHTS, priority_flags=flags, su=Decimal(1), name="slurm", valid_from=MOMENT)
        for mode, flags in MODES.items()
    }
    compared = records(cloud)
    for mode, partition, told in compared:
        listed = books[mode].versions[0].partitions[partition]
        ours = int(hourly(told, listed.rates, listed.mode) / MILLION)
        # A billing of 0 is left out.
        assert ours == told.get("billing", 0), f"{mode} {partition}: {dict(told)}"
    assert len(compared) >= 1000
    assert len({tuple(sorted(told.items())) for _, _, told in compared}) > SHAPES, "they are not all alike"


def test_who_belongs_coordinates_and_administers_is_what_slurms_accounting_says(cloud: Sandbox) -> None:
    for words in (
        ("add", "account", "physics", "description=x", "organization=x"),
        ("add", "account", "lasers", "parent=physics", "description=x", "organization=x"),
        ("add", "user", "daemon", "account=lasers"),
        ("add", "user", "bin", "account=physics"),
        ("add", "coordinator", "account=physics", "names=bin"),
        ("modify", "user", "daemon", "set", "adminlevel=Administrator"),
    ):
        done = cloud.run(["sacctmgr", "-i", *words])
        assert done.returncode == 0, done.stdout + done.stderr
    found = asyncio.run(SlurmClient(Slurm(conf=cloud.env["SLURM_CONF"])).associations())
    assert found is not None
    assert (found.accounts["physics"], found.accounts["lasers"]) == ("", "physics")
    assert found.users["lasers"] == {"daemon"}
    assert found.coordinates("bin", "lasers")
    assert not found.coordinates("daemon", "lasers")
    assert {"root", "daemon"} <= found.administrators
    assert "bin" not in found.administrators


def test_a_slurm_without_accounting_knows_nobody(sandbox_factory: MakeSandbox) -> None:
    box = sandbox_factory(nodes=1, guests=False)
    try:
        assert asyncio.run(SlurmClient(Slurm(conf=box.env["SLURM_CONF"])).associations()) is None
    finally:
        box.down()
