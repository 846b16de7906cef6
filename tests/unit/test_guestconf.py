"""The slurm.conf of a guest: always a whole node, never a word that a name smuggled in."""

import re

import pytest

from carrel.core.guestconf import ClusterFacts, NodeShape, cluster_facts, dynamic_conf, node_line, slurm_conf, topology
from carrel.errors import CarrelError, UnreachableError

NODE = NodeShape(name="vm3", cpus=4, memory_mib=3000, address="10.0.0.9", port=7003, features=("carrel", "carrel-7"))
CLUSTER = ClusterFacts(cluster="physics", controller="ctl(10.0.0.1)")
WHOLE = ("CPUs", "Boards", "SocketsPerBoard", "CoresPerSocket", "ThreadsPerCore", "RealMemory")


def words(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split())


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (2, 2), (12, 1), (12, 2), (12, 4), (64, 1), (64, 4)])
def test_a_node_is_always_described_in_full_and_its_parts_multiply_to_its_cpus(cpus: int, threads: int) -> None:
    found = words(topology(NodeShape(name="n", cpus=cpus, memory_mib=1, threads_per_core=threads)))
    assert set(found) == set(WHOLE)
    numbers = [int(found[key]) for key in ("Boards", "SocketsPerBoard", "CoresPerSocket", "ThreadsPerCore")]
    product = numbers[0] * numbers[1] * numbers[2] * numbers[3]
    assert product == int(found["CPUs"]) == cpus


def test_every_way_to_describe_a_node_has_the_whole_of_it() -> None:
    for text in (node_line(NODE), dynamic_conf(NODE), slurm_conf(CLUSTER, NODE)):
        assert all(f"{key}=" in text for key in WHOLE)


def test_a_line_has_the_node_s_address_port_features_and_state() -> None:
    found = words(node_line(NODE, state="CLOUD"))
    assert (found["NodeName"], found["NodeAddr"], found["Port"]) == ("vm3", "10.0.0.9", "7003")
    assert (found["Feature"], found["State"]) == ("carrel,carrel-7", "CLOUD")
    assert "NodeName" not in words(dynamic_conf(NODE))


DEFAULT = """\
# Written by Carrel for one guest; what changes it next is the next guest.
ClusterName=physics
SlurmctldHost=ctl(10.0.0.1)
SlurmctldPort=6817
SlurmdPort=6818
AuthType=auth/munge
CredType=cred/munge
SlurmUser=slurm
SlurmdSpoolDir=/var/spool/slurmd
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile=/var/log/slurmd.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup,task/affinity
JobAcctGatherType=jobacct_gather/cgroup
SelectType=select/cons_tres
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
NodeName=vm1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=500
PartitionName=guests Nodes=vm1
"""


def test_the_built_in_file_is_this_one() -> None:
    assert slurm_conf(CLUSTER, NodeShape(name="vm1", cpus=2, memory_mib=500)) == DEFAULT


def test_a_node_with_a_port_of_its_own_listens_there() -> None:
    assert "\nSlurmctldPort=6817\nSlurmdPort=7003\n" in slurm_conf(CLUSTER, NODE)


def test_a_template_may_brace_its_placeholders() -> None:
    assert slurm_conf(CLUSTER, NODE, template="${node_line}").startswith("NodeName=vm3 ")


def test_the_file_of_a_node_that_registers_by_itself_has_no_node_or_slurmd_would_end() -> None:
    text = slurm_conf(CLUSTER, NODE, dynamic=True)
    assert not re.search("^(NodeName|PartitionName)=", text, re.MULTILINE)


def test_a_site_s_own_template_is_filled_in() -> None:
    assert slurm_conf(CLUSTER, NODE, template="ClusterName=$cluster # $$5\n$node_line\n").startswith(
        "ClusterName=physics # $5\nNodeName=vm3 "
    )


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("ClusterName=$cluster\n", r"has no \$node_line"),
        ("$node_line $clustr", r"has \$clustr; known: \$cluster, \$controller, .*\$partition, \$node, \$node_line$"),
        ("$node_line $backups", r"has \$backups; known: "),  # they stand with $controller, as lines of their own
        ("$node_line 5$", r"write \$\$ for a dollar"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(template: str, sentence: str) -> None:
    with pytest.raises(CarrelError, match=sentence):
        slurm_conf(CLUSTER, NODE, template=template)


@pytest.mark.parametrize(
    "node",
    [
        NodeShape(name="vm1\nSlurmUser=root", cpus=1, memory_mib=1),
        NodeShape(name="vm1 Port=1", cpus=1, memory_mib=1),
        NodeShape(name="", cpus=1, memory_mib=1),
        NodeShape(name="vm1", cpus=1, memory_mib=1, features=("a,b",)),
        NodeShape(name="vm1", cpus=1, memory_mib=1, features=("a\nb",)),
        NodeShape(name="vm1", cpus=1, memory_mib=1, address="10.0.0.1 State=UP"),
        *(NodeShape(name="vm1", cpus=1, memory_mib=1, address=f"10.0.0.1{letter}") for letter in ",#\"'="),
    ],
)
def test_a_name_that_would_write_configuration_of_its_own_is_refused(node: NodeShape) -> None:
    for render in (node_line, dynamic_conf):
        with pytest.raises(CarrelError, match=r"^(name|address|feature) '?\"?.* of a node cannot stand in slurm\.conf"):
            render(node)


def test_an_address_of_ipv6_is_a_word_too() -> None:
    assert "NodeAddr=fe80::1 " in node_line(NodeShape(name="vm1", cpus=1, memory_mib=1, address="fe80::1"))


def test_a_controller_that_would_write_a_second_line_is_refused() -> None:
    with pytest.raises(CarrelError, match=r"controller .* cannot stand"):
        slurm_conf(ClusterFacts(cluster="c", controller="ctl\nSlurmUser=root"), NODE)


@pytest.mark.parametrize(("cpus", "memory", "threads"), [(0, 1, 1), (1, 0, 1), (3, 1, 2), (1, 1, 0)])
def test_a_shape_that_does_not_multiply_out_is_refused(cpus: int, memory: int, threads: int) -> None:
    with pytest.raises(CarrelError, match="node n: "):
        topology(NodeShape(name="n", cpus=cpus, memory_mib=memory, threads_per_core=threads))


SETTINGS = {
    "ClusterName": "k",
    "SlurmctldHost[0]": "head0",
    "SlurmctldHost[10]": "head10(10.0.0.10)",
    "SlurmctldHost[2]": "head2",
    "SlurmctldPort": "7100-7102",
    "SlurmdPort": "7200",
    "AuthType": "auth/a",
    "CredType": "cred/c",
    "SlurmUser": "keeper(64030)",
    "ProctrackType": "proctrack/p",
    "TaskPlugin": "task/t",
    "JobAcctGatherType": "jobacct_gather/j",
    "SelectType": "select/s",
}
"""As ``scontrol show config`` has them, which sorts them as words."""


def test_the_facts_of_a_cluster_are_those_that_scontrol_shows() -> None:
    assert cluster_facts(SETTINGS, partition="guests") == ClusterFacts(
        cluster="k",
        controller="head0",
        backups=("head2", "head10(10.0.0.10)"),
        controller_port=7100,
        node_port=7200,
        auth_type="auth/a",
        cred_type="cred/c",
        slurm_user="keeper",
        proctrack_type="proctrack/p",
        task_plugin="task/t",
        job_acct_gather_type="jobacct_gather/j",
        select_type="select/s",
        partition="guests",
    )


@pytest.mark.parametrize("without", ["ClusterName", "SlurmctldHost[0]"])
def test_a_slurm_that_does_not_say_who_it_is_is_not_there(without: str) -> None:
    told = {"SlurmctldHost[0]": "head0"} | {"ClusterName": "k"}
    del told[without]
    with pytest.raises(UnreachableError, match="is slurmctld there"):
        cluster_facts(told, partition="guests")


def test_a_guest_is_told_of_every_controller_and_of_the_other_nodes_of_its_job() -> None:
    facts = cluster_facts(SETTINGS, partition="guests")
    conf = slurm_conf(
        facts, NodeShape(name="v1", cpus=1, memory_mib=100), peers=[NodeShape(name="v2", cpus=1, memory_mib=100)]
    )
    assert re.findall(r"^SlurmctldHost=(.*)$", conf, re.MULTILINE) == ["head0", "head2", "head10(10.0.0.10)"]
    assert re.findall(r"^NodeName=(\S+)", conf, re.MULTILINE) == ["v1", "v2"]
    assert "Nodes=v1,v2" in conf
