"""The most that Slurm may allocate. What real clusters gave is in tests/slurm; here each rule has its plain case."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from carrel.core.bound import OVERRUN_S, Bound, bound
from carrel.core.quote import quote
from carrel.model.cluster import ClusterFacts, MemoryDefaults, NodeFacts, PartitionFacts
from carrel.model.price import MILLION, NoBound, NoPrice, PriceBook, PriceList, Quote, Rate, Version
from carrel.model.request import Gpus, Request

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
LARGE = NodeFacts(
    name="n1", cpus=16, for_jobs=16, cpus_per_core=2, memory_mib=16000, gres={"gpu": 4, "gpu:a100": 2, "gpu:v100": 2}
)
SMALL = NodeFacts(name="n2", cpus=8, for_jobs=8, cpus_per_core=2, memory_mib=8000)
PARTITION = PartitionFacts(
    name="p", nodes=(LARGE, SMALL, SMALL), default_time_s=600, memory=MemoryDefaults(per_cpu_mib=100)
)
CLUSTER = ClusterFacts(partitions={"p": PARTITION}, default_partition="p")


def most(partition: PartitionFacts = PARTITION, cluster: ClusterFacts = CLUSTER, /, **asked: Any) -> dict[str, int]:
    """Return the bound of a request that has one candidate."""
    found = bound(Request(**asked), partition, cluster)
    assert isinstance(found, Bound), found
    assert len(found.candidates) == 1
    return found.candidates[0]


def changed(**more: Any) -> PartitionFacts:
    return msgspec.structs.replace(PARTITION, **more)


@pytest.mark.parametrize(
    ("asked", "cpus", "nodes"),
    [
        ({}, 2, 1),  # unset is not free: one task has a core
        ({"tasks": 3, "max_nodes": 1}, 4, 1),
        ({"tasks": 4, "cpus_per_task": 3, "max_nodes": 1}, 13, 1),
        ({"tasks": 3}, 6, 3),  # it may be spread, and takes whole cores on each node
        ({"cpus_per_task": 3}, 4, 1),
        ({"cpus_per_task": 3, "threads_per_core": 1}, 6, 1),
        ({"tasks": 5, "tasks_per_core": 1, "max_nodes": 1}, 10, 1),
        ({"min_nodes": 2, "max_nodes": 2, "tasks_per_node": 3}, 8, 2),
        ({"min_nodes": 1, "max_nodes": 3}, 6, 3),  # a range is taken as far as it goes
        ({"named_nodes": 2}, 4, 2),
        ({"cpus_per_node": 5}, 6, 1),
        ({"cpus_per_task": 4, "cpus_per_node": 4}, 4, 1),  # sbatch writes -c as --mincpus too
        ({"tasks": 2, "cpus_per_task": 2, "cpus_per_node": 3}, 8, 2),  # each of the nodes that they are spread over
        ({"tasks": 1000}, 32, 3),  # never more than there is
        ({"whole_nodes": "--exclusive"}, 16, 1),
        ({"whole_nodes": "--exclusive", "min_nodes": 2, "max_nodes": 2}, 24, 2),
        ({"whole_cpus": "--ntasks-per-socket"}, 16, 1),
        ({"spread": True}, 6, 3),
        ({"spread": True, "min_nodes": 1, "max_nodes": 1}, 2, 1),
        ({"spread": True, "tasks": 2}, 4, 2),
        ({"min_nodes": 1, "max_nodes": 3, "tasks": 2}, 4, 2),  # no more nodes than tasks
        ({"whole_nodes": "--exclusive", "tasks": 8}, 24, 2),  # four fit on a small node
        ({"whole_nodes": "--exclusive", "tasks": 8, "cpus_per_task": 3}, 32, 3),
        ({"whole_nodes": "--exclusive", "tasks": 4, "tasks_per_node": 2}, 24, 2),
        ({"whole_nodes": "--exclusive", "tasks": 2, "memory_per_cpu_mib": 3000}, 24, 2),
        ({"whole_nodes": "--exclusive", "tasks": 2, "memory_per_node_mib": 8000}, 16, 1),
        ({"whole_nodes": "--core-spec", "tasks": 3}, 32, 3),
    ],
)
def test_cpus_are_whole_cores_on_as_many_nodes_as_slurm_may_take(asked: dict[str, int], cpus: int, nodes: int) -> None:
    found = most(**asked)
    assert (found["cpu"], found["node"]) == (cpus, nodes)


def test_a_cluster_with_one_task_per_core_gives_each_task_its_own() -> None:
    apart = msgspec.structs.replace(CLUSTER, task_per_core=True)
    assert most(PARTITION, apart, tasks=3, max_nodes=1)["cpu"] == 6


@pytest.mark.parametrize("change", [{"whole_nodes": "select/linear"}, {"whole_cpus": "CR_Socket"}])
def test_a_cluster_that_gives_more_than_cores_is_bounded_by_nodes(change: dict[str, str]) -> None:
    assert most(PARTITION, msgspec.structs.replace(CLUSTER, **change))["cpu"] == 16


def test_an_exclusive_partition_gives_whole_nodes_with_their_gpus() -> None:
    found = most(changed(exclusive=True), min_nodes=2, max_nodes=2)
    assert found == {
        "cpu": 24,
        "mem": 2400,
        "node": 2,
        "gres/gpu": 4,
        "gres/gpu:a100": 2,
        "gres/gpu:v100": 2,
    }


@pytest.mark.parametrize(
    ("asked", "memory", "mib"),
    [
        ({"memory_per_node_mib": 500, "min_nodes": 2, "max_nodes": 2}, {}, 1000),
        ({"memory_per_node_mib": 0, "min_nodes": 2, "max_nodes": 2}, {}, 24000),
        ({"memory_per_cpu_mib": 300, "cpus_per_task": 4}, {}, 1200),
        ({"memory_per_cpu_mib": 0}, {}, 16000),
        ({"cpus_per_task": 4}, {"per_cpu_mib": 100}, 400),
        ({"min_nodes": 2, "max_nodes": 2}, {"per_node_mib": 700}, 1400),
        ({}, {}, 16000),  # no default: all of the node
        ({"memory_per_node_mib": 10**9}, {}, 16000),
        ({"gpus": Gpus(per_node={"a100": 2}, memory_each_mib=600)}, {}, 1200),
        ({"gpus": Gpus(per_node={"a100": 2})}, {"per_gpu_mib": 500, "per_cpu_mib": 100}, 1000),
        ({"gpus": Gpus(memory_each_mib=5)}, {}, 16000),
        ({"memory_per_cpu_mib": 2500}, {"max_per_cpu_mib": 1000}, 4 * 834),
        ({"memory_per_node_mib": 3000}, {"max_per_cpu_mib": 1000}, 3000),
    ],
)
def test_memory_is_what_was_asked_for_or_the_default(asked: dict[str, Any], memory: dict[str, int], mib: int) -> None:
    assert most(changed(memory=MemoryDefaults(**memory)), **asked)["mem"] == mib


def test_the_clusters_default_counts_where_the_partition_has_none() -> None:
    cluster = msgspec.structs.replace(CLUSTER, memory=MemoryDefaults(per_node_mib=900))
    assert most(changed(memory=MemoryDefaults()), cluster)["mem"] == 900
    assert most(PARTITION, cluster)["mem"] == 200


def test_more_memory_per_cpu_than_is_allowed_takes_more_cpus() -> None:
    assert most(changed(memory=MemoryDefaults(max_per_cpu_mib=1000)), memory_per_cpu_mib=2500)["cpu"] == 4
    assert most(changed(memory=MemoryDefaults(max_per_cpu_mib=1000)), memory_per_node_mib=0)["cpu"] == 16


@pytest.mark.parametrize(
    ("gpus", "count"),
    [
        (Gpus(per_job={"a100": 3}), 3),
        (Gpus(per_node={"a100": 2}), 4),
        (Gpus(per_task={"a100": 1}), 5),
        (Gpus(per_job={"a100": 3}, per_node={"a100": 2}), 4),
    ],
)
def test_gpus_are_counted_by_type_in_every_way_to_ask(gpus: Gpus, count: int) -> None:
    found = most(gpus=gpus, tasks=5, min_nodes=2, max_nodes=2)
    assert (found["gres/gpu"], found["gres/gpu:a100"]) == (count, count)


def test_a_gpu_without_a_type_may_turn_out_to_be_of_any() -> None:
    found = bound(Request(gpus=Gpus(per_node={"": 2})), PARTITION, CLUSTER)
    assert isinstance(found, Bound)
    assert [{name: each.get(name) for name in each if "gpu:" in name} for each in found.candidates] == [
        {"gres/gpu:a100": 2},
        {"gres/gpu:v100": 2},
    ]


def test_gpus_of_a_job_that_names_no_tasks_may_come_from_several_nodes() -> None:
    assert most(gpus=Gpus(per_job={"a100": 3}))["node"] == 3
    assert most(gpus=Gpus(per_job={"a100": 3}), tasks=1)["node"] == 1


def test_gpus_of_a_whole_job_may_bring_the_memory_of_the_others_on_its_nodes() -> None:
    asked = Gpus(per_job={"a100": 1}, memory_each_mib=600)
    assert most(gpus=asked, tasks=1)["mem"] == 600
    assert most(gpus=asked, min_nodes=2, max_nodes=2)["mem"] == 4 * 600


def test_gpus_by_socket_may_come_from_any_number_of_nodes() -> None:
    asked = {"gpus": Gpus(per_socket={"": 1}), "whole_nodes": "--gpus-per-socket"}
    assert most(**asked)["node"] == 3
    assert most(**asked, max_nodes=1)["node"] == 1


def test_gpus_bring_cpus_and_tasks() -> None:
    assert most(gpus=Gpus(per_node={"a100": 2}, cpus_each=3))["cpu"] >= 6
    assert most(gpus=Gpus(per_node={"a100": 2}, tasks_each=4), max_nodes=1)["cpu"] >= 8
    by_default = changed(memory=MemoryDefaults(cpus_per_gpu=3, per_cpu_mib=1))
    assert most(by_default, gpus=Gpus(per_node={"a100": 2}))["cpu"] >= 6


def test_other_gres_licences_and_guests_are_counted() -> None:
    found = most(gres={"net:fast": 2}, licences={"matlab": 3}, min_nodes=2, max_nodes=2, guest=True)
    assert {name: found[name] for name in ("gres/net", "gres/net:fast", "license/matlab", "guest")} == {
        "gres/net": 4,
        "gres/net:fast": 4,
        "license/matlab": 3,
        "guest": 2,
    }
    assert most(tasks=5, guest=True, guest_per_task=True)["guest"] == 5


@pytest.mark.parametrize(
    ("asked", "partition", "cluster", "seconds"),
    [
        (3600, {}, {}, 3600),
        (None, {}, {}, 600),
        (None, {"default_time_s": None, "max_time_s": 7200}, {}, 7200),
        (3600, {"over_time_s": 300}, {"over_time_s": 60}, 3900),
        (3600, {}, {"over_time_s": 60}, 3660),
    ],
)
def test_the_time_is_the_limit_and_what_slurm_adds(
    asked: int | None, partition: dict[str, Any], cluster: dict[str, Any], seconds: int
) -> None:
    found = bound(Request(time_limit=asked), changed(**partition), msgspec.structs.replace(CLUSTER, **cluster))
    assert isinstance(found, Bound)
    assert found.seconds == seconds + OVERRUN_S


@pytest.mark.parametrize(
    ("asked", "partition", "reason"),
    [
        ({"time_limit": "unlimited"}, {}, "an unlimited time has no price; give --time"),
        ({}, {"default_time_s": None}, "no time limit was given and partition 'p' has none; give --time"),
        ({}, {"over_time_s": "unlimited"}, "lets jobs run past their limit for ever"),
        ({"min_nodes": 4}, {}, "partition 'p' has 3 nodes, 4 were asked for"),
        ({}, {"nodes": ()}, "partition 'p' has 0 nodes, 1 were asked for"),
    ],
)
def test_where_there_is_no_bound_the_outcome_says_why(
    asked: dict[str, Any], partition: dict[str, Any], reason: str
) -> None:
    found = bound(Request(**asked), changed(**partition), CLUSTER)
    assert isinstance(found, NoBound)
    assert reason in found.reason


def test_hidden_nodes_may_have_all_that_is_not_seen() -> None:
    hidden = NodeFacts(name="", cpus=64, cpus_per_core=8, memory_mib=9000)
    found = bound(Request(tasks=2), changed(hidden_nodes=2, hidden=hidden), CLUSTER)
    assert isinstance(found, Bound)
    assert found.candidates[0]["cpu"] == 16
    assert "2 nodes are hidden" in found.notes[-1]


# quote


def book(**partitions: int) -> PriceBook:
    lists = {name: PriceList(rates={"cpu": Rate(each)}) for name, each in partitions.items()}
    return PriceBook((Version(name="v", valid_from=MOMENT, partitions=lists, qos_millionths={"dear": 3 * MILLION}),))


def quoted(*components: Request, prices: PriceBook | None = None, **more: PartitionFacts) -> Quote | NoBound | NoPrice:
    cluster = msgspec.structs.replace(CLUSTER, partitions={"p": PARTITION, **more})
    return quote(components, book=prices or book(p=3600, q=7200), cluster=cluster, moment=MOMENT)


HOUR = 600 + OVERRUN_S
"""Seconds of a job that names no time: with 3600 micro-SU an hour, also micro-SU of one CPU."""


def amount(answer: Quote | NoBound | NoPrice) -> int:
    assert isinstance(answer, Quote), answer
    return answer.amount_micro_su


def test_the_dearest_partition_of_a_list_counts() -> None:
    other = msgspec.structs.replace(PARTITION, name="q")
    assert amount(quoted(Request(partitions=("p",)))) == 2 * HOUR
    assert amount(quoted(Request(partitions=("p", "q")), q=other)) == 4 * HOUR
    assert amount(quoted(Request(partitions=("q", "p")), q=other)) == 4 * HOUR


def test_of_equally_dear_partitions_the_first_is_named() -> None:
    answer = quoted(
        Request(partitions=("q", "p")), prices=book(p=1, q=1), q=msgspec.structs.replace(PARTITION, name="q")
    )
    assert isinstance(answer, Quote)
    assert answer.components[0].priced.partition == "q"


def test_a_partition_of_a_list_that_has_no_bound_or_no_price_spoils_it() -> None:
    endless = msgspec.structs.replace(PARTITION, name="q", default_time_s=None)
    assert isinstance(quoted(Request(partitions=("p", "q")), q=endless), NoBound)
    unpriced = msgspec.structs.replace(PARTITION, name="r")
    assert isinstance(quoted(Request(partitions=("p", "r")), r=unpriced), NoPrice)
    assert quoted(Request(partitions=("p", "nope"))) == NoBound("there is no partition 'nope'; see: sinfo")


def test_without_a_default_partition_one_must_be_named() -> None:
    cluster = msgspec.structs.replace(CLUSTER, default_partition="")
    answer = quote([Request()], book=book(p=1), cluster=cluster, moment=MOMENT)
    assert answer == NoBound("no partition was named and the cluster has no default one; give --partition")


def test_the_dearest_qos_counts() -> None:
    assert amount(quoted(Request(qos=("cheap", "dear")))) == 3 * 2 * HOUR


def test_every_task_of_an_array_is_a_run_rounded_by_itself() -> None:
    third = book(p=1)  # 2 CPUs, 660 s, 1 micro-SU an hour: a fraction of one
    answer = quoted(Request(array_tasks=1000, array_at_once=10), prices=third)
    assert isinstance(answer, Quote)
    assert (answer.amount_micro_su, answer.at_once_micro_su) == (1000, 10)


def test_the_components_of_a_heterogeneous_job_add_up() -> None:
    assert amount(quoted(Request(), Request(cpus_per_task=4))) == (2 + 4) * HOUR
    assert isinstance(quoted(Request(), Request(time_limit="unlimited")), NoBound)


def test_the_dearest_type_of_gpu_counts() -> None:
    rates = {"gres/gpu": Rate(3600), "gres/gpu:a100": Rate(3600), "gres/gpu:v100": Rate(7200)}
    listed = PriceBook((Version(name="v", valid_from=MOMENT, default=PriceList(rates=rates)),))
    assert amount(quoted(Request(gpus=Gpus(per_node={"": 2})), prices=listed)) == 2 * 3 * HOUR


def test_more_than_an_account_can_hold_has_no_bound() -> None:
    assert isinstance(quoted(Request(array_tasks=10**15), prices=book(p=10**15)), NoBound)
    for over in (0, 1):
        rate = Rate((2**63 - 1 + over) * 3600, 2 * HOUR)
        exactly = PriceBook((Version(name="v", valid_from=MOMENT, default=PriceList(rates={"cpu": rate})),))
        assert isinstance(quoted(Request(), prices=exactly), NoBound if over else Quote)
