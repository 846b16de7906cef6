"""What Slurm's configuration says of partitions and nodes, as far as it decides what a job may be given."""

from typing import Literal

import msgspec

Limit = int | Literal["unlimited"]


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A node as slurmctld knows it."""

    name: str
    cpus: int
    cpus_per_core: int = 1
    """CPUs that are given together: threads of a core, or 1 where Slurm counts cores."""
    for_jobs: int = 0
    """CPUs that are not kept for the system (``CoreSpecCount``)."""
    memory_mib: int = 0
    gres: dict[str, int] = {}
    """By name, and by name and type: ``gpu``, ``gpu:a100``."""


class MemoryDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """MiB that a job has which names no amount; None: not set here."""

    per_node_mib: int | None = None
    per_cpu_mib: int | None = None
    per_gpu_mib: int | None = None
    cpus_per_gpu: int | None = None
    max_per_cpu_mib: int | None = None
    """A job that wants more per CPU gets more CPUs."""


class PartitionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A partition as slurmctld knows it."""

    name: str
    nodes: tuple[NodeFacts, ...] = ()
    hidden_nodes: int = 0
    """Nodes that Slurm does not show: powered down in a cloud, without ``PrivateData=cloud``."""
    hidden: NodeFacts | None = None
    """What all hidden nodes have together; any one of them may have all of it."""
    default_time_s: Limit | None = None
    max_time_s: Limit = "unlimited"
    over_time_s: Limit | None = None
    exclusive: bool = False
    memory: MemoryDefaults = MemoryDefaults()
    weights: str = ""
    """``TRESBillingWeights``."""


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a bound is computed from."""

    partitions: dict[str, PartitionFacts]
    default_partition: str = ""
    over_time_s: Limit = 0
    whole_nodes: str = ""
    """Why every job gets whole nodes (``select/linear``); empty: it does not."""
    whole_cpus: str = ""
    """Why all CPUs of a node are counted (``CR_Socket``: whole sockets are given)."""
    task_per_core: bool = False
    """``CR_ONE_TASK_PER_CORE``."""
    memory: MemoryDefaults = MemoryDefaults()
    priority_flags: str = ""
    tracked: tuple[str, ...] = ()
    """``AccountingStorageTRES``: what Slurm counts, and so what a charge can see."""
