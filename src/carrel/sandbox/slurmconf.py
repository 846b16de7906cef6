"""The text of a sandbox's configuration files: pure functions of what it shall be.

Slurm expands no variables, so every path is written out.
"""

import json
from pathlib import Path

import msgspec

from carrel.sandbox.layout import Layout
from carrel.sandbox.spec import POOL_PER_HOST, Spec

_DATABASE_PORT_OFFSET = 60
"""Above the ports of the nodes, below the next sandbox's block."""

NODE_CPUS = 4


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What the harness found on this machine for a sandbox: names, addresses, ports."""

    layout: Layout
    spec: Spec
    user: str
    host: str
    base_port: int
    addresses: tuple[str, ...] = ()
    """Of the nodes, when each has its own network; empty: all on 127.0.0.1."""
    controller_address: str = "127.0.0.1"

    @property
    def cluster(self) -> str:
        return f"carrel{self.base_port}"

    @property
    def database_port(self) -> int:
        return self.base_port + _DATABASE_PORT_OFFSET

    @property
    def nodes(self) -> tuple[str, ...]:
        if self.spec.prefix:
            return tuple(f"{self.spec.prefix}{number}" for number in range(1, self.spec.nodes + 1))
        return self._names("c", self.spec.nodes)

    @property
    def hosts(self) -> tuple[str, ...]:
        return self._names(self.spec.host_prefix, self.spec.hosts)

    @property
    def pool(self) -> tuple[str, ...]:
        """Return the names that guests have as Slurm nodes."""
        return self._names("v", self.spec.hosts * POOL_PER_HOST)

    def _names(self, letter: str, count: int) -> tuple[str, ...]:
        unique = f"s{self.base_port}{letter}" if self.spec.proctrack == "cgroup" else letter
        return tuple(f"{unique}{number}" for number in range(1, count + 1))

    def pool_port(self, name: str) -> int:
        return self.base_port + 1 + len(self.nodes) + self.pool.index(name)

    def node_endpoint(self, node: str) -> tuple[str, int]:
        """Return address and port of a node's slurmd."""
        index = self.nodes.index(node)
        if self.addresses:
            return self.addresses[index], self.base_port + 1
        return "127.0.0.1", self.base_port + 1 + index


def slurm_conf(place: Place) -> str:
    """Return slurm.conf."""
    spec = place.spec
    parts = [_identity(place), _behaviour(spec)]
    if spec.guests:
        parts.append(_hooks(place.layout))
    if spec.slurmdbd:
        parts.append(_accounting(place))
    if spec.bank or spec.hosts:
        parts.append("JobSubmitPlugins=lua\n")
    parts += [spec.extra_conf.rstrip() + "\n", _nodes(place)]
    if spec.hosts:
        parts.append(_pool(place))
    return "\n".join(part for part in parts if part.strip())


def _identity(place: Place) -> str:
    root = place.layout.root
    scratch = root / "tmp"
    return f"""\
ClusterName={place.cluster}
SlurmctldHost={place.host}({place.controller_address})
SlurmctldPort={place.base_port}
SlurmUser={place.user}
SlurmdUser={place.user}
AuthType=auth/munge
AuthInfo=socket={place.layout.munge_socket}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
TmpFS={scratch}/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
PlugStackConfig={root}/etc/plugstack.conf
"""


def _behaviour(spec: Spec) -> str:
    confined = spec.proctrack == "cgroup"
    tracking = (
        "ProctrackType=proctrack/cgroup\nTaskPlugin=task/affinity,task/cgroup\nJobAcctGatherType=jobacct_gather/cgroup"
        if confined
        else "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/linux"
    )
    flags = "Alloc,Contain" if confined else "Alloc"
    # Heterogeneous jobs, and many others once something waits, are started by backfill alone: by itself every 30 s.
    prompt = "sched_min_interval=0,batch_sched_delay=0,bf_interval=1"
    return f"""\
{tracking}
PrologFlags={flags}
JobAcctGatherFrequency=task=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
LaunchParameters=use_interactive_step
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=3
MinJobAge=300
SchedulerParameters={prompt}
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
MailProg=/bin/true
DefMemPerCPU=512
MaxNodeCount=64
TreeWidth=65533
"""


def _hooks(layout: Layout) -> str:
    return f"Prolog={layout.etc}/prolog\nEpilog={layout.etc}/epilog\n"


def _accounting(place: Place) -> str:
    enforced = place.spec.enforce or ("associations,limits,qos" if place.spec.bank else "")
    enforce = f"AccountingStorageEnforce={enforced}\n" if enforced else ""
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={place.database_port}
AccountingStoragePass={place.layout.munge_socket}
AccountingStoreFlags=job_comment,job_env,job_script
{enforce}"""


def _nodes(place: Place) -> str:
    shape = f"CPUs={NODE_CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={NODE_CPUS} ThreadsPerCore=1"
    lines = [f"NodeName=DEFAULT {shape} RealMemory={place.spec.node_memory_mb}"]
    for node in place.nodes:
        address, port = place.node_endpoint(node)
        host = node if place.addresses else place.host
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port}")
    # Without a time limit a job has no price.
    default_time = " DefaultTime=60" if place.spec.bank else ""
    names = ",".join(place.nodes)
    lines.append(f"PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE{default_time} State=UP")
    return "\n".join(lines) + "\n"


def _pool(place: Place) -> str:
    """Return what guests-as-nodes need; docs/how-to/guests-as-nodes.md has the same lines for a site."""
    shape = "CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=256000"
    names = ",".join(place.pool)
    default_time = " DefaultTime=60" if place.spec.bank else ""
    lines = [
        "SuspendProgram=/bin/true\nResumeProgram=/bin/true",
        "SuspendTime=INFINITE\nSuspendTimeout=1\nResumeTimeout=60",
        "SlurmctldParameters=idle_on_node_suspend,power_save_interval=1",
        "PrivateData=cloud",
        *(f"NodeName={name} Port={place.pool_port(name)} State=CLOUD {shape}" for name in place.pool),
        f"PartitionName=guests Nodes={names} MaxTime=INFINITE{default_time} SuspendTime=31536000 State=UP",
    ]
    return "\n".join(lines) + "\n"


def cgroup_conf(spec: Spec) -> str:
    """Return cgroup.conf."""
    lines = ["CgroupPlugin=cgroup/v1"]
    if spec.proctrack == "cgroup":
        lines += ["ConstrainCores=yes", "ConstrainRAMSpace=yes"]
    return "\n".join(lines) + "\n"


def plugstack_conf(layout: Layout) -> str:
    """Return plugstack.conf. The plug-in itself puts the node's name in place of ``%n``: Slurm does not."""
    return (
        f"required {layout.libexec}/spank_carrel.so socket={layout.root}/nodes/%n/carreld.sock"
        f" enter={layout.libexec}/carrel-enter image=debian12\n"
    )


def hook_script(layout: Layout, role: str) -> str:
    """Return the Prolog or Epilog: Slurm passes it no arguments, so the role stands here."""
    return f"#!/bin/sh\nCARREL_CONFIG={layout.carrel_conf} exec {layout.libexec}/carrel-hook {role}\n"


def carrel_toml(place: Place, image_store: Path) -> str:
    """Return carrel.toml. Lines of the caller come last; a table of theirs may be one of ours."""
    layout = place.layout
    ours: dict[str, dict[str, str | float | bool]] = {
        "slurm": {"conf": str(layout.slurm_conf), "spool_dir": f"{layout.root}/spool/{{node}}"},
        "guests": {
            "accelerator": "tcg",
            "boot_timeout_s": 60.0,
            "map_dir": f"{layout.root}/maps",
            "logs.dir": f"{layout.root}/guest-logs",
        },
        "images": {"store": str(image_store)},
        "node": {"dir": f"{layout.root}/nodes/{{node}}"},
        "metrics": {"root": f"{layout.root}/metrics"},
        "placement": {"table": str(layout.hosts_table)},
        "controller": {"listen": f"unix:{layout.controller_socket}", "munge_socket": str(layout.munge_socket)},
    }
    ours["guest_nodes"] = {"knock": f"{layout.run}/knock"}
    if place.hosts:
        sizes: dict[str, str | float | bool] = {"host_cpus": NODE_CPUS, "host_memory_mib": place.spec.node_memory_mb}
        ours["guest_nodes"] |= {"hosts": ",".join(place.hosts), **sizes}
    if place.spec.bank:
        ours["bank"] = {
            "enabled": True,
            "database": f"{layout.bank}/ledger.db",
            "dir": str(layout.bank),
            "socket": str(layout.submit_socket),
            "default_account": "" if place.spec.slurmdbd else "demo",
            # A sandbox shares its machine with whatever else runs there.
            "deadline_ms": 500,
            "look_period_s": 0.5,
            "reconcile_period_s": 5.0,
        }
    return _toml(ours, place.spec.carrel_conf)


def prices_toml() -> str:
    """Return the price book: a core for an hour is one unit, in every partition."""
    return '[[version]]\nname = "sandbox"\nvalid_from = 2020-01-01\n\n[version.default]\nrates = { cpu = 1 }\n'


def _toml(ours: dict[str, dict[str, str | float | bool]], extra: str) -> str:
    """Merge the caller's tables into ours: TOML forbids a table to appear twice."""
    more = msgspec.toml.decode(extra, type=dict[str, object]) if extra.strip() else {}
    lines = [
        "# Guests are emulated (tcg) by choice: a sandbox must behave the same on every machine, with or without KVM."
    ]
    for table in [*ours, *(name for name in more if name not in ours)]:
        theirs = more.get(table, {})
        values = {**ours.get(table, {}), **(theirs if isinstance(theirs, dict) else {})}
        lines += _table(table, values)
    return "\n".join(lines) + "\n"


def _table(name: str, values: dict[str, object]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _table(f"{name}.{key}", value)
    return lines


def slurmdbd_conf(place: Place) -> str:
    """Return slurmdbd.conf. The database knows its user by the socket's peer, so there is no password."""
    layout = place.layout
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={place.database_port}
SlurmUser={place.user}
PidFile={layout.run}/slurmdbd.pid
LogFile={layout.log}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={place.user}
StorageLoc=slurm_acct_db
"""
