"""Slurm's own words about partitions and nodes. That they are its words is tested in tests/slurm."""

import pytest

from carrel.model.cluster import Limit, MemoryDefaults
from carrel.slurm import facts

SETTINGS = """Configuration data as of 2026-01-01T00:00:00
AccountingStorageTRES   = cpu,mem,gres/gpu
DefMemPerCPU            = 512
JobDefaults             = DefCpuPerGPU=2,DefMemPerGPU=900
MaxMemPerNode           = UNLIMITED
OverTimeLimit           = 3 min
PriorityFlags           = MAX_TRES
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY,CR_ONE_TASK_PER_CORE
"""
NODES = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=4 CPUAlloc=0 CPUEfctv=14 CPUTot=16 Gres=gpu:a100:2(S:0-1),gpu:v100:1,net:1K \
RealMemory=16000 Sockets=2 Boards=1 State=IDLE ThreadsPerCore=2 Reason=CPUTot=1 RealMemory=1 [root@now]
NodeName=n2 Arch=x86_64 CoresPerSocket=4 CPUEfctv=4 CPUTot=4 Gres=(null) RealMemory=8000 Sockets=1 ThreadsPerCore=2
"""
PARTITIONS = """\
PartitionName=a Default=NO DefaultTime=00:30:00 MaxTime=1-02:00:00 Nodes=n[1-4] OverSubscribe=EXCLUSIVE \
OverTimeLimit=5 TotalCPUs=60 TotalNodes=4 JobDefaults=(null) DefMemPerNode=700 MaxMemPerCPU=100 \
TRES=cpu=60,mem=40G,node=4,billing=60,gres/gpu=7,gres/gpu:a100=2 TRESBillingWeights=CPU=1.0,Mem=0.25G
PartitionName=b Default=YES DefaultTime=NONE MaxTime=UNLIMITED Nodes=(null) OverSubscribe=NO OverTimeLimit=NONE \
TotalCPUs=0 TotalNodes=0 JobDefaults=DefCpuPerGPU=3 DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
"""


def test_a_partition_is_read_with_its_nodes_limits_and_defaults() -> None:
    cluster = facts.facts(PARTITIONS, NODES, SETTINGS)
    part = cluster.partitions["a"]
    assert (part.default_time_s, part.max_time_s, part.over_time_s, part.exclusive) == (1800, 93600, 300, True)
    assert part.memory == MemoryDefaults(per_node_mib=700, max_per_cpu_mib=100)
    assert part.weights == "CPU=1.0,Mem=0.25G"
    empty = cluster.partitions["b"]
    assert (empty.nodes, empty.hidden_nodes, empty.default_time_s, empty.max_time_s) == ((), 0, None, "unlimited")
    assert (empty.over_time_s, empty.memory) == (None, MemoryDefaults(cpus_per_gpu=3))


def test_a_reason_that_an_administrator_wrote_is_no_fact() -> None:
    node = facts.facts(PARTITIONS, NODES, SETTINGS).partitions["a"].nodes[0]
    assert (node.cpus, node.for_jobs, node.cpus_per_core, node.memory_mib) == (16, 14, 2, 16000)
    assert node.gres == {"gpu": 3, "gpu:a100": 2, "gpu:v100": 1, "net": 1024}


def test_where_slurm_counts_cores_a_core_is_one_cpu() -> None:
    assert facts.facts(PARTITIONS, NODES, SETTINGS).partitions["a"].nodes[1].cpus_per_core == 1


def test_nodes_that_are_not_shown_have_what_is_left() -> None:
    part = facts.facts(PARTITIONS, NODES, SETTINGS).partitions["a"]
    assert part.hidden_nodes == 2
    assert part.hidden is not None
    assert (part.hidden.cpus, part.hidden.memory_mib) == (40, 40 * 1024 - 24000)
    assert part.hidden.gres == {"gpu": 4, "gpu:a100": 0}


def test_the_clusters_own_settings_are_read() -> None:
    cluster = facts.facts(PARTITIONS, NODES, SETTINGS)
    assert (cluster.default_partition, cluster.over_time_s, cluster.task_per_core) == ("b", 180, True)
    assert (cluster.whole_nodes, cluster.whole_cpus, cluster.priority_flags) == ("", "", "MAX_TRES")
    assert cluster.memory == MemoryDefaults(per_cpu_mib=512, per_gpu_mib=900, cpus_per_gpu=2)
    assert cluster.tracked == ("cpu", "mem", "gres/gpu")


@pytest.mark.parametrize(
    ("settings", "whole_nodes", "whole_cpus", "over_s"),
    [
        ("SelectType = select/linear\nOverTimeLimit = UNLIMITED\n", "select/linear", "", "unlimited"),
        ("SelectTypeParameters = CR_SOCKET_MEMORY\n", "", "CR_Socket", 0),
    ],
)
def test_other_ways_to_select_are_known(settings: str, whole_nodes: str, whole_cpus: str, over_s: Limit) -> None:
    cluster = facts.facts("", "", settings)
    assert (cluster.whole_nodes, cluster.whole_cpus, cluster.over_time_s) == (whole_nodes, whole_cpus, over_s)


def test_a_partition_in_unknown_words_is_not_guessed_at() -> None:
    with pytest.raises(KeyError):
        facts.facts("PartitionName=a State=UP\n", "", "")


def test_allocated_resources_are_read_in_mib() -> None:
    assert facts.tres("cpu=4,mem=1.50G,node=1,billing=4,gres/gpu:a100=2,license/x=1") == {
        "cpu": 4,
        "mem": 1536,
        "node": 1,
        "billing": 4,
        "gres/gpu:a100": 2,
        "license/x": 1,
    }
    assert facts.tres("") == {}
    assert facts.tres("mem=1K")["mem"] == 1


def test_resources_that_are_none_are_an_error() -> None:
    with pytest.raises(ValueError, match="cpu=four"):
        facts.tres("cpu=four")
