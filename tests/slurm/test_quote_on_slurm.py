"""The bound against what a real slurmctld allocates, and our prices against Slurm's own ``billing``.

The nodes are a cloud's: slurmctld gives them to jobs without a slurmd, so any machine can have GPUs and threads.
Of such nodes it does not count the GPUs of ``--gpus`` and ``--gpus-per-task``, which it does count on real ones.
"""

import asyncio
import json
import math
import random
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from carrel.config import Slurm
from carrel.core import imports
from carrel.core.bound import bound
from carrel.core.pricing import hourly, price
from carrel.core.quote import quote
from carrel.model.cluster import ClusterFacts
from carrel.model.price import MILLION, NoBound, PriceBook, Priced, PriceList, Quote, Rate, Version
from carrel.sandbox.cluster import Sandbox
from carrel.slurm import facts, sbatch
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm

NODES = 48
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
WEIGHTS = "CPU=1.0,Mem=0.5G,Node=2,GRES/gpu=4,GRES/gpu:a100=2,License/matlab=8"
CONF = f"""
GresTypes=gpu
AccountingStorageTRES=gres/gpu,gres/gpu:a100,gres/gpu:v100,license/matlab
Licenses=matlab:100000
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=86400
ResumeTimeout=3600
NodeName=t[1-{NODES}] NodeAddr=127.0.0.1 Port=39991 CPUs=16 Sockets=2 CoresPerSocket=4 ThreadsPerCore=2 \
RealMemory=16000 Gres=gpu:a100:2,gpu:v100:2 State=CLOUD
PartitionName=threads Nodes=t[1-{NODES}] DefaultTime=30 MaxTime=2:00:00 OverTimeLimit=5 \
TRESBillingWeights="{WEIGHTS}" DefMemPerCPU=100
PartitionName=bumped Nodes=t[1-{NODES}] MaxTime=60 TRESBillingWeights="{WEIGHTS}" DefMemPerCPU=100 MaxMemPerCPU=700
PartitionName=whole Nodes=t[1-{NODES}] MaxTime=60 TRESBillingWeights="{WEIGHTS}" OverSubscribe=EXCLUSIVE
PartitionName=pernode Nodes=t[1-{NODES}] MaxTime=60 DefMemPerNode=2000 DefCpuPerGPU=3 DefMemPerGPU=700
"""
PARTITIONS = ("threads", "bumped", "whole", "pernode")


@pytest.fixture(scope="module")
def cloud(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    box = sandbox_factory(nodes=1, guests=False, slurmdbd=True, extra_conf=CONF)
    yield box
    box.down()


@pytest.fixture(scope="module")
def hidden(cloud: Sandbox) -> ClusterFacts:
    """Of the cluster that shows none of its cloud nodes, as is Slurm's default."""
    return read(cloud)


@pytest.fixture(scope="module")
def cluster(cloud: Sandbox, hidden: ClusterFacts) -> ClusterFacts:
    """Of the cluster that shows them. The sandbox waits for what sinfo shows, so this comes later."""
    with cloud.layout.slurm_conf.open("a") as conf:
        conf.write("PrivateData=cloud\n")
    assert cloud.run(["scontrol", "reconfigure"]).returncode == 0
    wait_for(lambda: read(cloud).partitions["threads"].hidden_nodes == 0, "the cloud's nodes are shown")
    return read(cloud)


def read(box: Sandbox) -> ClusterFacts:
    return asyncio.run(facts.read(Slurm(conf=box.env["SLURM_CONF"])))


BOOK = PriceBook(
    (
        Version(
            name="test",
            valid_from=MOMENT,
            default=PriceList(
                rates={
                    "cpu": Rate(1_000_000),
                    "mem": Rate(250_000, 1024),
                    "node": Rate(10_000),
                    "gres/gpu": Rate(3_000_000),
                    "gres/gpu:a100": Rate(2_000_000),
                    "license/matlab": Rate(700_000),
                }
            ),
        ),
    )
)


def test_the_facts_are_those_of_the_configuration(cluster: ClusterFacts) -> None:
    assert cluster.default_partition == "main"
    threads = cluster.partitions["threads"]
    assert (len(threads.nodes), threads.hidden_nodes) == (NODES, 0)
    node = threads.nodes[0]
    assert (node.cpus, node.cpus_per_core, node.memory_mib) == (16, 2, 16000)
    assert node.gres == {"gpu": 4, "gpu:a100": 2, "gpu:v100": 2}
    assert (threads.default_time_s, threads.max_time_s, threads.over_time_s) == (1800, 7200, 300)
    assert cluster.partitions["bumped"].memory.max_per_cpu_mib == 700
    assert cluster.partitions["whole"].exclusive
    assert cluster.partitions["pernode"].memory.cpus_per_gpu == 3
    assert cluster.partitions["main"].max_time_s == "unlimited"
    assert cluster.memory.per_cpu_mib == 512


def test_nodes_that_slurm_hides_count_as_large_as_they_can_be(hidden: ClusterFacts) -> None:
    threads = hidden.partitions["threads"]
    if threads.nodes:
        pytest.skip("this release of Slurm shows the nodes of a cloud unasked")
    assert threads.hidden_nodes == NODES
    limits = bound(sbatch.parse(["-n3"], script="", environment={})[0], threads, hidden)
    assert not isinstance(limits, NoBound)
    assert limits.candidates[0]["cpu"] == 3 * 8
    assert "PrivateData=cloud" in limits.notes[-1]


def a_description(rng: random.Random) -> list[str]:
    """Return the arguments of a random sbatch."""

    def maybe(chance: float, *words: str) -> list[str]:
        return [rng.choice(words)] if rng.random() < chance else []

    words = [f"--partition={rng.choice(PARTITIONS)}", f"--time={rng.randint(1, 60)}"]
    words += maybe(0.5, "-N1", "-N2", "-N3", "-N1-3", "-N2-5")
    words += maybe(0.6, *(f"-n{number}" for number in (1, 2, 3, 5, 7, 16, 21)))
    words += maybe(0.5, *(f"-c{number}" for number in (1, 2, 3, 5, 8)))
    words += maybe(0.2, "--ntasks-per-node=1", "--ntasks-per-node=2", "--ntasks-per-node=3")
    words += maybe(0.2, "--threads-per-core=1", "--ntasks-per-core=1", "--hint=nomultithread", "-mcyclic", "-mplane=2")
    words += maybe(0.6, "--mem=300", "--mem=3G", "--mem=0", "--mem-per-cpu=150", "--mem-per-cpu=1500")
    words += maybe(0.3, "--gres=gpu:1", "--gres=gpu:a100:2", "--gpus-per-node=2", "--gpus=3", "--gpus=v100:2")
    words += maybe(0.2, "--mincpus=3", "--mincpus=6", "--mincpus=11")
    words += maybe(0.1, "--exclusive", "--exclusive=user", "-O", "--spread-job", "--contiguous")
    words += maybe(0.1, "--ntasks-per-socket=2", "--cores-per-socket=2", "-B2:1")
    if any("gpu" in word for word in words):
        words += maybe(0.3, "--cpus-per-gpu=3", "--mem-per-gpu=600")
        if any(word.startswith("--mem-per-gpu") for word in words):
            words = [word for word in words if not word.startswith(("--mem=", "--mem-per-cpu"))]
        if "--cpus-per-gpu=3" in words:
            words = [word for word in words if not word.startswith("-c")]
    return words + maybe(0.2, "-Lmatlab:2")


def submit(box: Sandbox, words: list[str]) -> str:
    """Return the job's id; empty: Slurm refused it."""
    command = ["sbatch", "--parsable", "-D", "/tmp", "-o", "/dev/null", *words, "--wrap", "true"]
    done = box.run(command)
    return done.stdout.strip() if done.returncode == 0 else ""


def shown(box: Sandbox, job_id: str) -> dict[str, str]:
    line = box.run(["scontrol", "show", "job", "-o", job_id]).stdout
    return dict(item.split("=", 1) for item in line.split() if "=" in item)


def allocated(box: Sandbox, job_id: str) -> Mapping[str, str] | None:
    """Return what Slurm says of the job once it has nodes; None: it waits for something that is busy."""
    last: dict[str, str] = {}

    def decided() -> bool:
        last.update(shown(box, job_id))
        return last["JobState"] in ("CONFIGURING", "RUNNING", "COMPLETED") or last["Reason"] not in ("None", "Priority")

    wait_for(decided, f"job {job_id} is given nodes or told to wait")
    last.setdefault("TRES", last.get("AllocTRES", ""))  # its name in newer releases
    return last if last["JobState"] != "PENDING" else None


def charge(words: Mapping[str, str], book: PriceBook, seconds: int) -> Priced:
    told = facts.tres(words["TRES"])
    partition = words["Partition"]
    charged = price(book, told, partition=partition, qos="", seconds=seconds, moment=MOMENT, rounding="half_up")
    assert isinstance(charged, Priced)
    return charged


def test_a_quote_is_never_below_what_slurm_then_allocates(cloud: Sandbox, cluster: ClusterFacts) -> None:
    rng = random.Random(20260101)  # noqa: S311  # a fixed choice of descriptions, no secret
    started = 0
    # Slurm looks for nodes once a second. Eight jobs of at most five nodes each find room beside each other.
    for _ in range(5):
        submitted = [(words, submit(cloud, words)) for words in (a_description(rng) for _ in range(8))]
        for words, job_id in submitted:
            given = allocated(cloud, job_id) if job_id else None
            if given is not None:
                started += 1
                not_below(words, given, cluster)
            if job_id:
                cloud.run(["scancel", job_id])
    assert started >= 24


def not_below(words: list[str], given: Mapping[str, str], cluster: ClusterFacts) -> None:
    """See that what a job was given is within its bound, and its price within its quote."""
    asked = sbatch.parse(words, script="", environment={})
    # sbatch writes -c as --mincpus too, and that is what the bank's counter is shown.
    each = asked[0].cpus_per_task or 0
    asked = (msgspec.structs.replace(asked[0], cpus_per_node=max(asked[0].cpus_per_node or 0, each) or None),)
    quoted = quote(asked, book=BOOK, cluster=cluster, moment=MOMENT)
    sentence = f"sbatch {shlex.join(words)}: {given['TRES']}"
    assert isinstance(quoted, Quote), f"{sentence}: {quoted}"
    limits = bound(asked[0], cluster.partitions[given["Partition"]], cluster)
    assert not isinstance(limits, NoBound)
    told = facts.tres(given["TRES"])
    for name in told.keys() - {"billing"}:
        most = max(candidate.get(name, 0) for candidate in limits.candidates)
        assert most >= told[name], f"{sentence}: {name} is bounded by {limits.candidates}"
    assert quoted.amount_micro_su >= charge(given, BOOK, limits.seconds).amount_micro_su, sentence


def test_what_slurm_bills_is_the_imported_price_truncated(cloud: Sandbox, cluster: ClusterFacts) -> None:
    weights = {part.name: part.weights for part in cluster.partitions.values()}
    book = imports.from_weights(weights, priority_flags="", su=Decimal(1), name="slurm", valid_from=MOMENT)
    for words in (
        ["-pthreads", "-n3", "--mem=1234", "-Lmatlab:3"],
        ["-pthreads", "-n5", "-c3", "--mem-per-cpu=333", "--gres=gpu:a100:1"],
        ["-pthreads", "-N2", "--gpus-per-node=v100:2"],
        ["-pwhole", "-N3", "--mem=700"],
        ["-ppernode", "-n3"],
        ["-pmain", "-n2", "-t5"],
    ):
        job_id = submit(cloud, words)
        given = allocated(cloud, job_id)
        assert given is not None, words
        told = facts.tres(given["TRES"])
        listed = book.versions[0].partitions[given["Partition"]]
        assert int(hourly(told, listed.rates, listed.mode) / MILLION) == told["billing"], given["TRES"]
        cloud.run(["scancel", job_id])


def test_a_component_without_a_time_has_the_first_ones(cloud: Sandbox) -> None:
    words = ["-pthreads", "-t5", "-n1", ":", "-n1"]
    job_id = submit(cloud, words)
    lines = cloud.run(["scontrol", "show", "job", "-o", job_id]).stdout.splitlines()
    cloud.run(["scancel", job_id])
    assert ["TimeLimit=00:05:00" in line.split() for line in lines] == [True, True]
    assert ["Partition=threads" in line.split() for line in lines] == [True, False]
    asked = sbatch.parse(words, script="", environment={})
    assert [(each.time_limit, each.partitions) for each in asked] == [(300, ("threads",)), (300, ())]


def test_the_qos_of_a_job_that_names_none_is_known_before_it_is_submitted(cloud: Sandbox) -> None:
    settings = Slurm(conf=cloud.env["SLURM_CONF"])
    assert asyncio.run(facts.default_qos(settings, "root", "", ("main",))) == ("normal",)
    assert cloud.run(["sacctmgr", "-i", "add", "qos", "premium"]).returncode == 0
    assert cloud.run(["sacctmgr", "-i", "modify", "user", "root", "set", "qos+=premium"]).returncode == 0
    modified = cloud.run(["sacctmgr", "-i", "modify", "user", "root", "set", "defaultqos=premium"])
    assert modified.returncode == 0
    assert asyncio.run(facts.default_qos(settings, "root", "demo", ("main",))) == ("premium",)


def carrel(box: Sandbox, *words: str) -> tuple[int, str, str]:
    done = box.run([sys.executable, "-m", "carrel.cli.main", *words])
    return done.returncode, done.stdout, done.stderr


def test_the_commands_make_a_book_check_it_and_quote_with_it(
    cloud: Sandbox, cluster: ClusterFacts, tmp_path: Path
) -> None:
    book = cloud.layout.carrel_conf.with_name("prices.toml")
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH -p threads -n 3 -t 1:00:00\nsrun true\n#SBATCH -n 99\n")
    assert carrel(cloud, "bank", "prices", "check")[0] == 3
    status, text, _ = carrel(cloud, "bank", "prices", "import-weights", "--su", "0.5")
    assert status == 0
    book.write_text(text)
    assert carrel(cloud, "bank", "prices", "check") == (0, f"{book}: ok\n", "")
    status, answer, _ = carrel(cloud, "quote", "--json", "-N1", str(script))
    # 4 CPUs of two cores, 4 x 100 MiB, one node; an hour, 5 min of OverTimeLimit and one of Slurm's own.
    weighed = 4 + Fraction(400, 1024) / 2 + 2
    assert json.loads(answer)["amount_micro_su"] == math.ceil(weighed * 500_000 * 3960 / 3600)
    assert status == 0
    status, _, said = carrel(cloud, "quote", "-p", "main", "-t", "0", str(script))
    assert (status, said) == (4, "carrel: an unlimited time has no price; give --time\n")
    book.write_text(
        text + '[version.partition."gone"]\nrates = { license/foo = 1 }\n'.replace("license/foo", '"license/foo"')
    )
    status, answer, _ = carrel(cloud, "bank", "prices", "check")
    assert status == 1
    assert "slurm has no such partition" in answer
    assert "license/foo has a price and slurm does not count it" in answer
