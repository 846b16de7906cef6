"""The ``slurm.conf`` of a guest whose own slurmd joins the cluster, and what a slurmd is told of its node.

A node is always described in full (``Boards``, ``SocketsPerBoard``, ``CoresPerSocket``, ``ThreadsPerCore`` and
``CPUs``): Slurm 22.05 completes a partial description from ``NodeName=DEFAULT``, and where that does not multiply out,
slurmctld ends with ``fatal`` when the node registers.
"""

import re
import string
from collections.abc import Mapping, Sequence

import msgspec

from carrel.errors import CarrelError, UnreachableError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_WORD = re.compile(r"[!-~]+")
_UNFIT = re.compile(r"[\s,#\"'=]")

DEFAULT_TEMPLATE = """\
# Written by Carrel for one guest; what changes it next is the next guest.
ClusterName=$cluster
SlurmctldHost=$controller
SlurmctldPort=$controller_port
SlurmdPort=$node_port
AuthType=$auth_type
CredType=$cred_type
SlurmUser=$slurm_user
SlurmdSpoolDir=/var/spool/slurmd
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile=/var/log/slurmd.log
ProctrackType=$proctrack_type
TaskPlugin=$task_plugin
JobAcctGatherType=$job_acct_gather_type
SelectType=$select_type
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
$node_line
"""
"""``config_overrides``: the guest's kernel sees less memory than the guest was given, and would be INVALID.
``NO_CONF_HASH``: the guest's file is not the controller's, and says so on purpose."""


class NodeShape(msgspec.Struct, frozen=True, kw_only=True):
    """A node as Slurm is told of it."""

    name: str
    cpus: int
    memory_mib: int
    threads_per_core: int = 1
    address: str = ""
    port: int = 0
    features: tuple[str, ...] = ()


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest must know of its cluster; ``scontrol show config`` has it."""

    cluster: str
    controller: str
    """Host name, or ``host(address)``."""
    backups: tuple[str, ...] = ()
    """Further controllers, in their order."""
    controller_port: int = 6817
    node_port: int = 6818
    auth_type: str = "auth/munge"
    cred_type: str = "cred/munge"
    slurm_user: str = "slurm"
    proctrack_type: str = "proctrack/cgroup"
    task_plugin: str = "task/cgroup,task/affinity"
    job_acct_gather_type: str = "jobacct_gather/cgroup"
    select_type: str = "select/cons_tres"
    partition: str = "guests"


def cluster_facts(settings: Mapping[str, str], *, partition: str) -> ClusterFacts:
    """Return what ``scontrol show config`` says, as a guest must know it.

    Raises:
        UnreachableError: it does not say who the controller is.
    """
    keys = {key: text for key, text in settings.items() if key.startswith("SlurmctldHost[")}
    hosts = [keys[key] for key in sorted(keys, key=lambda key: int(key.partition("[")[2].rstrip("]")))]
    try:
        return ClusterFacts(
            cluster=settings["ClusterName"],
            controller=hosts[0],
            backups=tuple(hosts[1:]),
            controller_port=int(settings["SlurmctldPort"].partition("-")[0]),
            node_port=int(settings["SlurmdPort"]),
            auth_type=settings["AuthType"],
            cred_type=settings["CredType"],
            slurm_user=settings["SlurmUser"].partition("(")[0],
            proctrack_type=settings["ProctrackType"],
            task_plugin=settings["TaskPlugin"],
            job_acct_gather_type=settings["JobAcctGatherType"],
            select_type=settings["SelectType"],
            partition=partition,
        )
    except (KeyError, IndexError) as error:
        raise UnreachableError(f"scontrol show config does not say {error}; is slurmctld there?") from error


def topology(node: NodeShape) -> str:
    """Return the words that describe a node's processors and memory, all of them.

    >>> topology(NodeShape(name="vm1", cpus=4, memory_mib=2000))
    'CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=2000'
    """
    if node.cpus < 1 or node.memory_mib < 1 or node.threads_per_core < 1:
        raise CarrelError(f"node {node.name}: {node.cpus} CPUs and {node.memory_mib} MiB; each must be 1 or more")
    if node.cpus % node.threads_per_core:
        raise CarrelError(
            f"node {node.name}: {node.cpus} CPUs are no whole cores of {node.threads_per_core} threads each; "
            "slurmctld would end over it"
        )
    cores = node.cpus // node.threads_per_core
    return (
        f"CPUs={node.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} "
        f"ThreadsPerCore={node.threads_per_core} RealMemory={node.memory_mib}"
    )


def node_line(node: NodeShape, *, state: str = "") -> str:
    """Return the line of ``slurm.conf`` for a node; ``state``: such as ``CLOUD``.

    Raises:
        CarrelError: a name or address would make two words or two lines of it.
    """
    return f"NodeName={_checked(node.name, 'name')} {_rest(node, state=state)}"


def dynamic_conf(node: NodeShape, *, state: str = "") -> str:
    """Return what ``slurmd -Z --conf`` is given for a node; ``state``: ``DRAIN`` is honoured, ``CLOUD`` is not."""
    _checked(node.name, "name")
    return _rest(node, state=state)


def slurm_conf(
    cluster: ClusterFacts,
    node: NodeShape,
    *,
    peers: Sequence[NodeShape] = (),
    template: str = DEFAULT_TEMPLATE,
    dynamic: bool = False,
) -> str:
    """Return the guest's ``slurm.conf``.

    Args:
        cluster: What ``$cluster``, ``$controller`` and the others of ``ClusterFacts`` become.
        node: The guest's own node: ``$node``, and ``$node_line`` with its whole shape and a partition for it.
        peers: The other nodes of its job, which an ``srun`` inside it talks to.
        template: The site's own, else the built-in one. ``$$`` is a dollar.
        dynamic: slurmd is started with ``-Z`` and ``dynamic_conf``; it ends where its file has its node as well.

    Raises:
        CarrelError: the template has no ``$node_line``, or a placeholder that nobody knows.
    """
    if "$node_line" not in template and "${node_line}" not in template:
        raise CarrelError("the template of slurm.conf has no $node_line; without a whole one slurmctld may end")
    values = {
        field.name: _plain(str(getattr(cluster, field.name)), field.name)
        for field in msgspec.structs.fields(ClusterFacts)
        if field.name != "backups"
    }
    backups = (_plain(backup, "backup controller") for backup in cluster.backups)
    values["controller"] = "\nSlurmctldHost=".join((values["controller"], *backups))
    values["node_port"] = str(node.port or cluster.node_port)
    whole = node_line(node)
    line = f"# slurmd -Z says it: {whole}"
    if not dynamic:
        names = ",".join(each.name for each in (node, *peers))
        others = "".join(f"{node_line(peer, state='CLOUD')}\n" for peer in peers)
        line = f"{whole}\n{others}PartitionName={cluster.partition} Nodes={names}"
    try:
        return string.Template(template).substitute(values, node=node.name, node_line=line)
    except KeyError as error:
        known = ", ".join(f"${name}" for name in (*values, "node", "node_line"))
        raise CarrelError(f"the template of slurm.conf has ${error.args[0]}; known: {known}") from error
    except ValueError as error:
        raise CarrelError(f"the template of slurm.conf: {error}; write $$ for a dollar") from error


def _rest(node: NodeShape, *, state: str) -> str:
    words = []
    if node.address:
        words.append(f"NodeAddr={_checked(node.address, 'address')}")
    if node.port:
        words.append(f"Port={node.port}")
    words.append(topology(node))
    if node.features:
        words.append(f"Feature={','.join(_checked(feature, 'feature') for feature in node.features)}")
    if state:
        words.append(f"State={_checked(state, 'state')}")
    return " ".join(words)


def _checked(word: str, what: str) -> str:
    """Names come from jobs and from the site; one with a blank or a newline would write configuration of its own."""
    if not _NAME.fullmatch(word) and not (what == "address" and _WORD.fullmatch(word) and not _UNFIT.search(word)):
        raise CarrelError(
            f"{what} {word!r} of a node cannot stand in slurm.conf; use letters, digits, '.', '_' and '-'"
        )
    return word


def _plain(word: str, what: str) -> str:
    if not word or not word.isprintable():
        raise CarrelError(f"{what} {word!r} of the cluster cannot stand in slurm.conf")
    return word
