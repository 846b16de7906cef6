"""What a submission asks for, before Slurm has put its defaults in place: each field may be unset.

The fields are those of ``sbatch`` and of ``job_desc`` in ``job_submit.lua``; None means that the user said nothing.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

TimeLimit = int | Literal["unlimited"]
"""Seconds. ``0``, ``UNLIMITED`` and ``INFINITE`` of Slurm are ``unlimited``."""

ByType = Mapping[str, int]
"""GPUs by type; the type ``""`` is any."""


class Gpus(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs as they may be asked for; more than one way at a time is legal."""

    per_job: ByType = {}
    per_node: ByType = {}
    per_task: ByType = {}
    per_socket: ByType = {}
    cpus_each: int | None = None
    tasks_each: int | None = None
    memory_each_mib: int | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One component of a submission; most have one."""

    partitions: tuple[str, ...] = ()
    """Empty: the default one. Slurm may take any of several."""
    qos: tuple[str, ...] = ()
    account: str = ""
    time_limit: TimeLimit | None = None
    min_nodes: int | None = None
    max_nodes: int | None = None
    named_nodes: int = 0
    """How many nodes ``--nodelist`` names: the job gets all of them."""
    spread: bool = False
    tasks: int | None = None
    tasks_per_node: int | None = None
    tasks_per_core: int | None = None
    cpus_per_task: int | None = None
    cpus_per_node: int | None = None
    """``--mincpus``."""
    threads_per_core: int | None = None
    memory_per_node_mib: int | None = None
    """0: all of each node."""
    memory_per_cpu_mib: int | None = None
    gpus: Gpus = Gpus()
    gres: dict[str, int] = {}
    """Per node, without GPUs: name, or name and type, as in ``gres/NAME:TYPE``."""
    licences: dict[str, int] = {}
    whole_nodes: str = ""
    """The option that takes nodes with all that they have: ``--exclusive``."""
    whole_cpus: str = ""
    """The option whose effect on cores is not computed, so that all CPUs of a node are counted."""
    array_tasks: int = 1
    array_at_once: int | None = None
    """``%N`` of ``--array``."""
    guest: bool = False
    guest_per_task: bool = False
