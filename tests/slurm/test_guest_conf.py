"""A slurmd with the slurm.conf of a guest joins a real cluster, and its controller survives it."""

import re
import signal
import subprocess  # slurmd is a child of its own here, as it would be in a guest
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from carrel.core.guestconf import DEFAULT_TEMPLATE, ClusterFacts, NodeShape, dynamic_conf, node_line, slurm_conf
from carrel.sandbox.cluster import Sandbox
from carrel.testing.daemons import wait_for
from carrel.testing.sandbox import MakeSandbox

pytestmark = [pytest.mark.slurm, pytest.mark.root]


# Four CPUs are what NodeName=DEFAULT of the sandbox multiplies out to, and these have three.
FIXED = NodeShape(name="vm1", cpus=3, memory_mib=500, address="127.0.0.1")
DYNAMIC = NodeShape(name="vm9", cpus=3, memory_mib=500, features=("carrel",))


@pytest.fixture(scope="module")
def cluster(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    box: Sandbox = sandbox_factory(guests=False, nodes=1)
    # A sandbox waits for all its nodes, and this one is to come later.
    with box.layout.slurm_conf.open("a") as conf:
        conf.write(f"{node_line(fixed(box))}\nPartitionName=guests Nodes=vm1 MaxTime=INFINITE State=UP\n")
    box.restart("slurmctld")
    yield box
    box.down()


def fixed(cluster: Sandbox) -> NodeShape:
    """Return the first with a port of the sandbox's own block, which nobody else takes."""
    (port,) = re.findall(r"^SlurmctldPort=(\d+)$", cluster.layout.slurm_conf.read_text(), re.MULTILINE)
    return msgspec.structs.replace(FIXED, port=int(port) + 32)


def guest_conf(cluster: Sandbox, node: NodeShape, where: Path, *, dynamic: bool) -> Path:
    """Write the guest's file: the built-in template with directories of its own, and the cluster's munge."""
    known = dict(
        line.split("=", 1) for line in cluster.layout.slurm_conf.read_text().splitlines() if "=" in line.split(" ")[0]
    )
    facts = ClusterFacts(
        cluster=known["ClusterName"],
        controller=known["SlurmctldHost"],
        controller_port=int(known["SlurmctldPort"]),
        slurm_user=known["SlurmUser"],
        proctrack_type="proctrack/linuxproc",
        task_plugin="task/none",
        job_acct_gather_type="jobacct_gather/none",
    )
    template = DEFAULT_TEMPLATE.replace("/var/spool/slurmd", f"{where}/spool").replace("/run/", f"{where}/")
    template = template.replace("/var/log/", f"{where}/") + f"AuthInfo={known['AuthInfo']}\nPlugStackConfig=/dev/null\n"
    (where / "spool").mkdir()
    path = where / "slurm.conf"
    path.write_text(slurm_conf(facts, node, template=template, dynamic=dynamic))
    return path


@pytest.fixture
def slurmd(cluster: Sandbox) -> Iterator["Starter"]:
    starter = Starter(cluster)
    yield starter
    starter.stop()


class Starter:
    """Starts slurmds as guests would, and ends them."""

    def __init__(self, cluster: Sandbox) -> None:
        self._cluster = cluster
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, node: NodeShape, where: Path, *words: str) -> None:
        conf = guest_conf(self._cluster, node, where, dynamic="-Z" in words)
        command = ["slurmd", "-D", "-N", node.name, "-f", str(conf), *words]
        died_with_us = ["setpriv", "--pdeathsig", "KILL"]
        self._started.append(subprocess.Popen([*died_with_us, *command], stderr=subprocess.DEVNULL))

    def stop(self) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def state(cluster: Sandbox, node: str) -> str:
    return cluster.run(["sinfo", "-h", "-N", "-n", node, "-o", "%T"]).stdout.split("\n")[0]


def test_a_guest_with_the_built_in_file_joins_and_runs_a_task(
    cluster: Sandbox, slurmd: Starter, tmp_path: Path
) -> None:
    controller = cluster.pid("slurmctld")
    slurmd.start(fixed(cluster), tmp_path)
    wait_for(lambda: state(cluster, "vm1") == "idle", "vm1 is idle")
    done = cluster.run(["srun", "-p", "guests", "-c3", "--mem=100", "printenv", "SLURMD_NODENAME"])
    assert done.stdout == "vm1\n", done.stderr
    assert cluster.pid("slurmctld") == controller


def test_a_guest_that_registers_by_itself_is_whole_and_ends_no_controller(
    cluster: Sandbox, slurmd: Starter, tmp_path: Path
) -> None:
    controller = cluster.pid("slurmctld")
    slurmd.start(DYNAMIC, tmp_path, "-Z", "--conf", dynamic_conf(DYNAMIC, state="DRAIN"))

    def registered() -> bool:
        return "DRAIN" in cluster.run(["scontrol", "-o", "show", "node", "vm9"]).stdout

    wait_for(registered, "vm9 registered")
    shown = cluster.run(["scontrol", "-o", "show", "node", "vm9"]).stdout
    for word in ("CPUTot=3", "CoresPerSocket=3", "Sockets=1", "ThreadsPerCore=1", "RealMemory=500", "carrel"):
        assert word in shown
    assert cluster.pid("slurmctld") == controller
