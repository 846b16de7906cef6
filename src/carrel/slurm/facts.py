"""What Slurm says of its partitions, nodes and settings: text with ``Key=value`` words that only administrators write.

For a bound on what a job may be given (``carrel.core.bound``). Asked as a whole, three commands at once, and rarely:
what is in slurm.conf changes when someone changes it.
"""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.model.cluster import ClusterFacts, Limit, MemoryDefaults, NodeFacts, PartitionFacts
from carrel.process import CommandError
from carrel.slurm import hostlist, version

ANSWER_TIMEOUT_S = 10.0
"""How long Slurm may take; slurmctld answers in milliseconds, or is busy, or is gone."""

_NO_ACCOUNTING = ("accounting storage is disabled", "not running a supported", "is supported.")
"""What sacctmgr says of a Slurm that keeps no accounting; the last since 22.05."""

_HIDDEN_CPUS_PER_CORE = 8
"""More threads to a core than any machine that runs Slurm has."""

_WORD = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)")
_GRES = re.compile(r"([\w.-]+)(?::([A-Za-z_][\w.-]*))?(?::no_consume)?:(\d+)([KMG]?)(?:\(.*\))?")
_DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)")
_MIB = {"K": 2**-10, "": 1, "M": 1, "G": 2**10, "T": 2**20, "P": 2**30}


async def read(slurm: Slurm) -> ClusterFacts:
    """Ask Slurm for all that a bound needs.

    Raises:
        UnreachableError: Slurm did not answer, or not in words that we know.
    """
    partitions, nodes, settings = await asyncio.gather(
        _ask(slurm, "scontrol", "-a", "-o", "show", "partition"),
        _ask(slurm, "scontrol", "-a", "-o", "show", "node"),
        _ask(slurm, "scontrol", "show", "config"),
    )
    try:
        return facts(partitions, nodes, settings)
    except (KeyError, ValueError) as error:
        raise UnreachableError(f"slurm described its partitions in a way that we do not know: {error!r}") from error


async def default_qos(slurm: Slurm, user: str, account: str, partitions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the QOS that Slurm may give a job of this user that names none; empty: there is no accounting.

    Raises:
        UnreachableError: slurmdbd did not answer.
    """
    where = [f"user={user}", *([f"account={account}"] if account else [])]
    try:
        text = await _ask(
            slurm, "sacctmgr", "-n", "-P", "show", "assoc", *where, "format=Account,Partition,DefaultQOS,QOS"
        )
        own = await _default_account(slurm, user)
    except UnreachableError as error:
        if any(words in str(error) for words in _NO_ACCOUNTING):
            return ()
        raise
    payer = account or own
    found = set()
    for line in text.splitlines():
        who, partition, default, allowed = f"{line}|||".split("|")[:4]
        if who == payer and (not partition or partition in partitions):
            # Slurm takes the association's only QOS where it names no default, and "normal" where it names several.
            found.add(default or (allowed if allowed and "," not in allowed else "normal"))
    return tuple(sorted(found))


async def default_account(slurm: Slurm, user: str) -> str:
    """Return whom a job of this user charges that names no account; empty: there is none, or no accounting.

    Raises:
        UnreachableError: slurmdbd did not answer.
    """
    try:
        return await _default_account(slurm, user)
    except UnreachableError as error:
        if any(words in str(error) for words in _NO_ACCOUNTING):
            return ""
        raise


async def _default_account(slurm: Slurm, user: str) -> str:
    words = ("-n", "-P", "show", "user", f"name={user}", "format=DefaultAccount")
    return (await _ask(slurm, "sacctmgr", *words)).strip()


def facts(partitions: str, nodes: str, settings: str) -> ClusterFacts:
    """Read what the three commands print."""
    known = {node.name: node for node in map(_node, nodes.splitlines()) if node is not None}
    found = [_partition(line, known) for line in partitions.splitlines() if line.startswith("PartitionName=")]
    first = next((part for part, chosen in found if chosen), None)
    pairs = (line.partition("=") for line in settings.splitlines())
    setting = {key.strip(): value.strip() for key, separator, value in pairs if separator}
    parameters = setting.get("SelectTypeParameters", "").upper()
    return ClusterFacts(
        partitions={part.name: part for part, _ in found},
        default_partition=first.name if first else "",
        over_time_s=_minutes(setting.get("OverTimeLimit", "0").removesuffix("min").strip()) or 0,
        whole_nodes=select if (select := setting.get("SelectType", "")) == "select/linear" else "",
        whole_cpus="CR_Socket" if "CR_SOCKET" in parameters else "",
        task_per_core="CR_ONE_TASK_PER_CORE" in parameters,
        memory=_memory_defaults(setting, setting.get("JobDefaults", "")),
        priority_flags=setting.get("PriorityFlags", ""),
        tracked=tuple(filter(None, setting.get("AccountingStorageTRES", "").split(","))),
    )


def _partition(line: str, known: Mapping[str, NodeFacts]) -> tuple[PartitionFacts, bool]:
    words = dict(reversed(_WORD.findall(line)))
    names = hostlist.expand(words["Nodes"]) if words["Nodes"] != "(null)" else ()
    nodes = tuple(known[name] for name in names if name in known)
    hidden_nodes = len(names) - len(nodes)
    part = PartitionFacts(
        name=words["PartitionName"],
        nodes=nodes,
        hidden_nodes=hidden_nodes,
        hidden=_hidden(words, nodes) if hidden_nodes else None,
        default_time_s=_time(words.get("DefaultTime", "NONE")),
        max_time_s=_time(words.get("MaxTime", "UNLIMITED")) or "unlimited",
        over_time_s=_minutes(words.get("OverTimeLimit", "NONE")),
        exclusive=version.gives_whole_nodes(words),
        memory=_memory_defaults(words, words.get("JobDefaults", "")),
        weights="" if (weights := words.get("TRESBillingWeights", "")) == "(null)" else weights,
    )
    return part, words.get("Default") == "YES"


def _node(line: str) -> NodeFacts | None:
    words = dict(reversed(_WORD.findall(line)))
    if "NodeName" not in words:
        return None
    cpus, cores = int(words["CPUTot"]), int(words["Sockets"]) * int(words["CoresPerSocket"])
    return NodeFacts(
        name=words["NodeName"],
        cpus=cpus,
        cpus_per_core=-(-cpus // cores) if cores else 1,
        for_jobs=int(words.get("CPUEfctv", cpus)),
        memory_mib=int(words["RealMemory"]),
        gres=_gres(words.get("Gres", "")),
    )


def _hidden(words: Mapping[str, str], seen: tuple[NodeFacts, ...]) -> NodeFacts:
    """Return what the partition has beside the nodes that are shown, as if it were in one."""
    total = tres(words.get("TRES", ""))
    gres = {name.removeprefix("gres/"): count for name, count in total.items() if name.startswith("gres/")}
    for node in seen:
        gres = {name: count - node.gres.get(name, 0) for name, count in gres.items()}
    return NodeFacts(
        name="",
        cpus=int(words["TotalCPUs"]) - sum(node.cpus for node in seen),
        cpus_per_core=_HIDDEN_CPUS_PER_CORE,
        memory_mib=total.get("mem", 0) - sum(node.memory_mib for node in seen),
        gres=gres,
    )


def tres(text: str) -> dict[str, int]:
    """Read ``AllocTRES`` and its like: ``cpu=4,mem=2G,node=1,gres/gpu=2``; memory in MiB.

    Raises:
        ValueError: it is no such list.
    """
    found = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        match = _MEMORY.fullmatch(value)
        if not match:
            raise ValueError(f"{item!r} of {text!r}")
        sized = name == "mem" or name.startswith("bb/")
        amount = float(match[1]) * (_MIB[match[2]] if sized else 1)
        found[name] = -int(-amount // 1)
    return found


def _gres(text: str) -> dict[str, int]:
    """Read ``gpu:a100:2(S:0-1),gpu:v100:2``."""
    found: dict[str, int] = {}
    for item in re.split(r",(?![^()]*\))", text):
        match = _GRES.fullmatch(item)
        if match:
            name, kind = match[1], match[2]
            count = int(match[3]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[4]]
            for each in (name, f"{name}:{kind}") if kind else (name,):
                found[each] = found.get(each, 0) + count
    return found


def _memory_defaults(words: Mapping[str, str], job_defaults: str) -> MemoryDefaults:
    more = dict(re.findall(r"(\w+)=(\d+)", job_defaults))
    return MemoryDefaults(
        per_node_mib=_count(words.get("DefMemPerNode")),
        per_cpu_mib=_count(words.get("DefMemPerCPU")),
        max_per_cpu_mib=_count(words.get("MaxMemPerCPU")),
        per_gpu_mib=_count(more.get("DefMemPerGPU")),
        cpus_per_gpu=_count(more.get("DefCpuPerGPU")),
    )


def _count(word: str | None) -> int | None:
    return int(word) if word and word.isdigit() and int(word) else None


def _time(word: str) -> Limit | None:
    """Read ``1-02:00:00``, ``UNLIMITED`` or ``NONE``."""
    match = _DURATION.fullmatch(word)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return None if word == "NONE" else "unlimited"


def _minutes(word: str) -> Limit | None:
    if word.isdigit():
        return int(word) * 60
    return None if word == "NONE" else "unlimited"


async def _ask(slurm: Slurm, *words: str) -> str:
    env = {"SLURM_CONF": slurm.conf} if slurm.conf else {}
    try:
        return await process.run_async(
            [Path(slurm.bin_dir) / words[0], *words[1:]], timeout_s=ANSWER_TIMEOUT_S, env=env
        )
    except CommandError as error:
        raise UnreachableError(f"slurm did not answer: {error}") from error
