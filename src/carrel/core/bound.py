"""The most that Slurm may give a submission: resources and time, from what was asked and what the partition has.

A bound may be too high, never too low. Where the rules of Slurm's selection are not simple enough to be sure
(sockets, core specialisation), it is whole nodes. Slurm allocates whole cores on each node; with ``k`` CPUs to a core
that adds at most ``k - 1`` for each node. What was measured on real clusters stands in the property test.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from carrel.model.cluster import ClusterFacts, MemoryDefaults, NodeFacts, PartitionFacts
from carrel.model.price import NoBound
from carrel.model.request import ByType, Gpus, Request

OVERRUN_S = 60
"""Slurm looks for jobs over their limit every 30 s; such with a limit of 60 s were seen to end after 75 to 101 s."""


class Bound(NamedTuple):
    """What one component may be given in one partition."""

    candidates: tuple[dict[str, int], ...]
    """The same but for the type of GPUs that were asked for without one: any of them may be given."""
    seconds: int
    notes: tuple[str, ...]


class _Shape(NamedTuple):
    nodes: int
    tasks: int
    cpus: int
    whole: str


def bound(request: Request, partition: PartitionFacts, cluster: ClusterFacts) -> Bound | NoBound:
    """Return the most that one run may be given in this partition."""
    seconds = _seconds(request, partition, cluster)
    if isinstance(seconds, NoBound):
        return seconds
    count = len(partition.nodes) + partition.hidden_nodes
    least = max(request.min_nodes or 1, request.named_nodes)
    if least > count:
        return NoBound(f"partition {partition.name!r} has {count} nodes, {least} were asked for; see: sinfo")
    members = _members(partition)
    defaults = _defaults(partition, cluster)
    shape = _shape(request, partition, cluster, members, defaults)
    largest = _largest_of(members, shape.nodes)
    resources = {
        "cpu": shape.cpus,
        "mem": min(_memory(request, shape, defaults, largest), largest(lambda node: node.memory_mib)),
        "node": shape.nodes,
        **{f"license/{name}": number for name, number in request.licences.items()},
        **({"guest": shape.tasks if request.guest_per_task else shape.nodes} if request.guest else {}),
    }
    notes = tuple(_notes(request, partition, cluster, shape))
    candidates = tuple(resources | gres for gres in _gres(request, shape, members, largest))
    return Bound(candidates, seconds, notes)


def _notes(request: Request, partition: PartitionFacts, cluster: ClusterFacts, shape: _Shape) -> Iterator[str]:
    if shape.whole:
        yield f"whole nodes: {shape.whole}"
    elif coarse := request.whole_cpus or cluster.whole_cpus:
        yield f"all CPUs of each node: {coarse}"
    if request.max_nodes is None and shape.nodes > max(request.min_nodes or 1, request.named_nodes):
        yield f"slurm may spread it over {shape.nodes} nodes; --nodes would make the bound closer"
    if partition.hidden_nodes:
        yield f"{partition.hidden_nodes} nodes are hidden and counted as large as can be (PrivateData=cloud)"


def _seconds(request: Request, partition: PartitionFacts, cluster: ClusterFacts) -> int | NoBound:
    limit = request.time_limit
    if limit is None:
        limit = partition.max_time_s if partition.default_time_s is None else partition.default_time_s
        if limit == "unlimited":
            return NoBound(f"no time limit was given and partition {partition.name!r} has none; give --time")
    if limit == "unlimited":
        return NoBound("an unlimited time has no price; give --time")
    over = cluster.over_time_s if partition.over_time_s is None else partition.over_time_s
    if over == "unlimited":
        return NoBound(f"partition {partition.name!r} lets jobs run past their limit for ever (OverTimeLimit)")
    return limit + over + OVERRUN_S


def _shape(
    request: Request,
    partition: PartitionFacts,
    cluster: ClusterFacts,
    members: list[NodeFacts],
    defaults: MemoryDefaults,
) -> _Shape:
    tasks = max(request.tasks or 0, _tasks_of_gpus(request))
    least = max(request.min_nodes or 1, request.named_nodes)
    most = max(least, _most_nodes(request, partition, cluster, defaults, tasks))
    anywhere = (request.spread or request.gpus.per_socket) and request.max_nodes is None and not request.tasks
    nodes = len(members) if anywhere else min(most, len(members))
    tasks = max(tasks, nodes * max(1, request.tasks_per_node or 0))
    tasks = max(tasks, sum(_gpus(request, nodes, tasks).values()) * (request.gpus.tasks_each or 0))
    whole = _whole(request, partition, cluster)
    largest = _largest_of(members, nodes)
    all_cpus = largest(lambda node: node.cpus)
    if whole or request.whole_cpus or cluster.whole_cpus:
        return _Shape(nodes, tasks, all_cpus, whole)
    threads = max(node.cpus_per_core for node in members)
    each, per_node = _cpus_wanted(request, defaults, largest)
    usable = min(threads, request.threads_per_core or threads)
    on_own_cores = tasks * -(-each // usable) * threads
    apart = usable < threads or request.tasks_per_core is not None or cluster.task_per_core
    packed = on_own_cores if apart else min(on_own_cores, tasks * each + nodes * (threads - 1))
    every_gpu = sum(_gpus(request, nodes, tasks).values())
    for_gpus = every_gpu * (request.gpus.cpus_each or defaults.cpus_per_gpu or 0)
    extra = _cores(for_gpus, usable, threads) + nodes * (threads - 1 if for_gpus else 0)
    # sbatch writes -c as --mincpus too. Each node has a task, whose CPUs count towards what the node has at least.
    missing = max(0, _cores(per_node, usable, threads) - _cores(each, usable, threads))
    cpus = packed + extra + nodes * missing
    return _Shape(nodes, tasks, min(cpus, all_cpus), "")


def _most_nodes(
    request: Request, partition: PartitionFacts, cluster: ClusterFacts, defaults: MemoryDefaults, tasks: int
) -> int:
    """Return how many nodes Slurm takes at most, where fewer were not asked for."""
    if request.max_nodes is not None:
        return min(request.max_nodes, tasks) if request.tasks else request.max_nodes
    if not request.tasks:
        # GPUs for the whole job are gathered from as many nodes as it takes.
        return max(tasks, sum(request.gpus.per_job.values()))
    simple = request.whole_nodes in ("", "--exclusive") and not (request.whole_cpus or cluster.whole_cpus)
    if _whole(request, partition, cluster) and simple and request.gpus == Gpus() and not partition.hidden_nodes:
        # Nobody else is on its nodes, so each of them but the last is filled with tasks.
        fit = [room for node in partition.nodes if (room := _room(request, node, defaults))]
        return -(-tasks // min(fit)) if fit else tasks
    return tasks


def _room(request: Request, node: NodeFacts, defaults: MemoryDefaults) -> int:
    """Return how many tasks an empty node holds at least, each on cores of its own."""
    each, _ = _cpus_wanted(request, defaults, lambda what: what(node))
    usable = min(node.cpus_per_core, request.threads_per_core or node.cpus_per_core)
    rooms = [node.for_jobs // _cores(each, usable, node.cpus_per_core)]
    per_cpu_mib = request.memory_per_cpu_mib or defaults.per_cpu_mib
    if per_cpu_mib and request.memory_per_node_mib is None:
        rooms.append(node.memory_mib // (per_cpu_mib * _cores(each, usable, node.cpus_per_core)))
    if request.tasks_per_node:
        rooms.append(request.tasks_per_node)
    return min(rooms)


def _cores(cpus: int, usable: int, threads: int) -> int:
    """Return the CPUs of the whole cores that ``cpus`` take."""
    return -(-cpus // usable) * threads


def _cpus_wanted(request: Request, defaults: MemoryDefaults, largest: "_Largest") -> tuple[int, int]:
    """Return CPUs per task and per node; a job that wants more memory per CPU than is allowed gets more CPUs."""
    each, per_node = request.cpus_per_task or 1, request.cpus_per_node or 0
    most = defaults.max_per_cpu_mib
    if most:
        each *= -(-(request.memory_per_cpu_mib or 0) // most) or 1
        per_node_mib = request.memory_per_node_mib
        if per_node_mib == 0:
            per_node_mib = largest(lambda node: node.memory_mib)
        per_node = max(per_node, -(-(per_node_mib or 0) // most))
    return each, per_node


def _memory(request: Request, shape: _Shape, defaults: MemoryDefaults, largest: "_Largest") -> int:
    everything = largest(lambda node: node.memory_mib)
    gpus = sum(_gpus(request, shape.nodes, shape.tasks).values())
    if request.memory_per_node_mib is not None:
        return shape.nodes * request.memory_per_node_mib or everything
    if request.memory_per_cpu_mib is not None:
        steps = -(-request.memory_per_cpu_mib // (defaults.max_per_cpu_mib or request.memory_per_cpu_mib or 1)) or 1
        return shape.cpus * -(-request.memory_per_cpu_mib // steps) or everything
    if gpus and (each := request.gpus.memory_each_mib or defaults.per_gpu_mib):
        return everything if shape.whole else each * _gpus_with_memory(request, shape, gpus, largest)
    if request.gpus.memory_each_mib is not None:
        return everything
    if defaults.per_cpu_mib:
        return shape.cpus * defaults.per_cpu_mib
    return shape.nodes * (defaults.per_node_mib or 0) or everything


def _gpus_with_memory(request: Request, shape: _Shape, gpus: int, largest: "_Largest") -> int:
    """Return how many GPUs bring memory: those of ``--gpus`` on several nodes may be counted with the nodes' others.

    Slurm 22.05 gave 2 GPUs on 11 nodes the memory of 43.
    """
    if request.gpus.per_job and shape.nodes > 1:
        return max(gpus, largest(lambda node: node.gres.get("gpu", 0)))
    return gpus


def _gres(request: Request, shape: _Shape, members: list[NodeFacts], largest: "_Largest") -> Iterable[dict[str, int]]:
    """Yield what is asked for of each kind, once for each type that GPUs without a type may turn out to have."""
    names = {name for node in members for name in node.gres}
    if shape.whole:
        yield {f"gres/{name}": largest(lambda node, name=name: node.gres.get(name, 0)) for name in sorted(names)}  # type: ignore[misc]
        return
    fixed: dict[str, int] = {}
    for name, number in request.gres.items():
        for each in {name, name.partition(":")[0]}:
            fixed[f"gres/{each}"] = fixed.get(f"gres/{each}", 0) + number * shape.nodes
    gpus = _gpus(request, shape.nodes, shape.tasks)
    if gpus:
        fixed["gres/gpu"] = sum(gpus.values())
        fixed |= {f"gres/gpu:{kind}": number for kind, number in gpus.items() if kind}
    untyped = gpus.get("", 0)
    kinds = sorted(name for name in names if name.startswith("gpu:")) if untyped else []
    for kind in kinds or [""]:
        more = {f"gres/{kind}": fixed.get(f"gres/{kind}", 0) + untyped} if kind else {}
        yield fixed | more


def _gpus(request: Request, nodes: int, tasks: int) -> dict[str, int]:
    """Return the most GPUs by type."""
    gpus = request.gpus
    asked = [gpus.per_job, _times(gpus.per_node, nodes), _times(gpus.per_task, tasks)]
    kinds = {kind for form in asked for kind in form}
    return {kind: most for kind in sorted(kinds) if (most := max(form.get(kind, 0) for form in asked))}


def _tasks_of_gpus(request: Request) -> int:
    """Return how many tasks a number of GPUs for the whole job makes: some for each GPU, or some GPUs for each."""
    whole, each = sum(request.gpus.per_job.values()), sum(request.gpus.per_task.values())
    return max(whole * (request.gpus.tasks_each or 0), -(-whole // each) if each else 0)


def _times(by_type: ByType, factor: int) -> Mapping[str, int]:
    return {kind: number * factor for kind, number in by_type.items()}


def _whole(request: Request, partition: PartitionFacts, cluster: ClusterFacts) -> str:
    if request.whole_nodes:
        return request.whole_nodes
    if partition.exclusive:
        return f"partition {partition.name!r} has OverSubscribe=EXCLUSIVE"
    return cluster.whole_nodes


def _members(partition: PartitionFacts) -> list[NodeFacts]:
    return [*partition.nodes, *([partition.hidden] * partition.hidden_nodes if partition.hidden else [])]


def _defaults(partition: PartitionFacts, cluster: ClusterFacts) -> MemoryDefaults:
    """The partition's own defaults go before the cluster's; one of per node and per CPU is in force."""
    own, general = partition.memory, cluster.memory
    base = general if own.per_node_mib is None and own.per_cpu_mib is None else own
    return MemoryDefaults(
        per_node_mib=base.per_node_mib,
        per_cpu_mib=base.per_cpu_mib,
        per_gpu_mib=own.per_gpu_mib or general.per_gpu_mib,
        cpus_per_gpu=own.cpus_per_gpu or general.cpus_per_gpu,
        max_per_cpu_mib=own.max_per_cpu_mib or general.max_per_cpu_mib,
    )


_Largest = Callable[[Callable[[NodeFacts], int]], int]


def _largest_of(members: list[NodeFacts], count: int) -> _Largest:
    """Return a function that sums something over the ``count`` nodes which have most of it."""
    return lambda what: sum(heapq.nlargest(count, (what(node) for node in members)))
