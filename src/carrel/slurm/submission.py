"""A submission as ``job_submit.lua`` sees it: slurmctld's own fields, with its own words for *not set*.

What Lua is not shown (``--core-spec``, ``--overcommit``, ``--hint`` but for its effect on threads) is not in the bound;
the run is priced anew by what it was given when it starts.
"""

from collections.abc import Mapping

import msgspec

from carrel.errors import UsageError
from carrel.model.request import Gpus, Request, TimeLimit
from carrel.slurm import hostlist, sbatch

_NARROW = frozenset({0xFFFE, 0xFFFF})
"""``NO_VAL16`` and ``INFINITE16``."""
_WIDE = frozenset({0xFFFFFFFE, 0xFFFFFFFF})
"""``NO_VAL`` and ``INFINITE``."""
_WIDE_FIELDS = frozenset({"num_tasks", "min_nodes", "max_nodes", "time_limit"})
_MEMORY_MIB_MAX = 1 << 40
"""Beyond it is ``NO_VAL64`` as Lua's numbers round it, or nonsense."""
_SOCKETS = ("boards_per_node", "sockets_per_board", "sockets_per_node", "cores_per_socket", "ntasks_per_socket")
EXCLUSIVE = 0
"""Of ``shared``."""


def request(fields: Mapping[str, str]) -> Request:
    """Return what a submission asks for.

    Raises:
        UsageError: a field has a value that Slurm does not give it.
    """
    tasks, at_once = sbatch.array(fields["array_inx"]) if fields.get("array_inx") else (1, None)
    low, high = _number(fields, "min_nodes"), _number(fields, "max_nodes")
    per_node_gres, per_node_gpus = sbatch.gres(_gres_text(fields, "tres_per_node"))
    image, per = fields.get("guest", ""), fields.get("guest_per", "")
    return Request(
        partitions=_names(fields, "partition"),
        qos=_names(fields, "qos"),
        account=fields.get("account", ""),
        time_limit=_time(fields),
        min_nodes=low,
        max_nodes=high,
        named_nodes=len(hostlist.expand(fields.get("req_nodes", ""))),
        tasks=_number(fields, "num_tasks"),
        tasks_per_node=_number(fields, "ntasks_per_node"),
        tasks_per_core=_number(fields, "ntasks_per_core"),
        cpus_per_task=_number(fields, "cpus_per_task"),
        cpus_per_node=_number(fields, "pn_min_cpus"),
        threads_per_core=_number(fields, "threads_per_core"),
        memory_per_node_mib=_memory(fields, "min_mem_per_node"),
        memory_per_cpu_mib=_memory(fields, "min_mem_per_cpu"),
        gpus=Gpus(
            per_job=_gpus(fields, "tres_per_job"),
            per_node=per_node_gpus,
            per_task=_gpus(fields, "tres_per_task"),
            per_socket=_gpus(fields, "tres_per_socket"),
            cpus_each=_each(fields, "cpus_per_tres"),
            tasks_each=_number(fields, "ntasks_per_gpu") or _number(fields, "ntasks_per_tres"),
            memory_each_mib=_each(fields, "mem_per_tres"),
        ),
        gres=per_node_gres,
        licences=sbatch.licences(fields.get("licenses", "")),
        whole_nodes="--exclusive" if fields.get("shared") == str(EXCLUSIVE) else "",
        whole_cpus=next((f"--{name}" for name in _SOCKETS if _number(fields, name)), ""),
        array_tasks=tasks,
        array_at_once=at_once,
        guest=bool(image),
        guest_per_task=bool(image) and per == "task",
    )


def changed(before: Request, fields: Mapping[str, str]) -> Request:
    """Return the request with what ``scontrol update`` changes in it; see ``request``."""
    after, nothing = request(fields), Request()
    changes = {
        name: value
        for name in Request.__struct_fields__
        if (value := getattr(after, name)) != getattr(nothing, name) and name not in {"array_tasks", "array_at_once"}
    }
    if after.memory_per_cpu_mib is not None or after.memory_per_node_mib is not None:
        changes |= {"memory_per_cpu_mib": after.memory_per_cpu_mib, "memory_per_node_mib": after.memory_per_node_mib}
    return msgspec.structs.replace(before, **changes)


def _number(fields: Mapping[str, str], name: str) -> int | None:
    text = fields.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"{name} {text[:40]!r}: not a number")
    value = int(text)
    if value in (_WIDE if name in _WIDE_FIELDS else _NARROW):
        return None
    if value > max(_WIDE):
        raise UsageError(f"{name} {value}: slurm has no such number")
    return value or None


def _memory(fields: Mapping[str, str], name: str) -> int | None:
    text = fields.get(name, "")
    return int(text) if text.isdigit() and int(text) < _MEMORY_MIB_MAX else None


def _time(fields: Mapping[str, str]) -> TimeLimit | None:
    if fields.get("time_limit") in {"0", str(0xFFFFFFFF)}:
        return "unlimited"
    minutes = _number(fields, "time_limit")
    return minutes * 60 if minutes else None


def _names(fields: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(filter(None, fields.get(name, "").split(",")))


def _gres_text(fields: Mapping[str, str], name: str) -> str:
    """Return ``gpu:a100:2`` of ``gres:gpu:a100:2`` and of ``gres/gpu:a100=2``, as releases write it."""
    words = fields.get(name, "").split(",")
    return ",".join(word.removeprefix("gres:").removeprefix("gres/").replace("=", ":") for word in words if word)


def _gpus(fields: Mapping[str, str], name: str) -> dict[str, int]:
    words = [word for word in _gres_text(fields, name).split(",") if word.partition(":")[0] == "gpu"]
    return {kind: count for kind, count in sbatch.gres(",".join(words))[1].items() if count}


def _each(fields: Mapping[str, str], name: str) -> int | None:
    """Return the number of ``gres:gpu:4``, which is for each GPU."""
    _, _, count = fields.get(name, "").replace("=", ":").rpartition(":")
    return int(count) or None if count.isdigit() else None
