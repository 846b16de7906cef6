"""What a sandbox is asked to be, and what it turned out to be: the two structs that cross to its harness and back."""

from typing import Literal

import msgspec

from carrel.errors import UsageError

NODES_MAX = 50
POOL_PER_HOST = 8
"""Names for guests-as-nodes: more than a host carries at once, since a name rests for some seconds after its use."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """The request: written as one line of JSON to the harness."""

    dir: str
    nodes: int = 3
    node_memory_mb: int = 8000
    """What Slurm gives to jobs on each node; nothing checks that this machine has it."""
    hosts: int = 0
    """Hypervisor hosts: they run carreld, and Slurm does not schedule them. Guests on them are Slurm nodes."""
    netns: bool = False
    slurmdbd: bool = False
    proctrack: Literal["linuxproc", "cgroup"] = "linuxproc"
    guests: bool = True
    prefix: str = ""
    """What node names start with; empty: ``c``, or with proctrack ``cgroup`` a word of this sandbox alone,
    because Slurm names its cgroups after nodes and a machine has only one cgroup tree."""
    host_prefix: str = "h"
    """What names of hosts start with."""
    users: tuple[str, ...] = ()
    """Users of the account ``demo`` besides root (slurmdbd only)."""
    enforce: str = ""
    """``AccountingStorageEnforce`` (slurmdbd only); empty: nothing is enforced."""
    bank: bool = False
    """Every job is priced and charged; with slurmdbd its accounts are enforced."""
    deposit_su: int = 1000
    """What the account ``demo`` begins with (bank only)."""
    extra_conf: str = ""
    """Lines for slurm.conf; they stand before the nodes, so they may override what stands above."""
    carrel_conf: str = ""
    """Lines for carrel.toml, below ours."""
    detached: bool = False
    """Live on when whoever started the harness is gone (``carrel sandbox up``)."""

    def __post_init__(self) -> None:
        """Refuse a number of nodes that the ports of a sandbox do not hold."""
        if not 1 <= self.nodes <= NODES_MAX:
            raise UsageError(f"--nodes {self.nodes}: a sandbox has 1 to {NODES_MAX} nodes")
        most = (NODES_MAX - self.nodes) // POOL_PER_HOST
        if not 0 <= self.hosts <= most:
            raise UsageError(f"--hosts {self.hosts}: beside {self.nodes} nodes a sandbox has 0 to {most} hosts")
        if self.hosts and not self.guests:
            raise UsageError(f"--hosts {self.hosts}: hosts are there for guests; leave --no-guests out")


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon of the sandbox, as the harness sees it."""

    name: str
    """``munged``, ``slurmctld``, ``slurmd@c1``, ``carreld@c1``, ``carrelctld``, ``slurmdbd``, ``mariadbd``."""
    pid: int
    """0: not running."""
    ended: str = ""
    """How it ended, when it is not running: ``exited with 1``, ``killed by SIGKILL``."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox that is up."""

    dir: str
    cluster: str
    nodes: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    """Slurm's names for guests on ``hosts``."""
    pid: int
    """The harness: parent of all that runs here."""
    netns: str = ""
    """Network namespace in which clients must run; empty: the machine's own."""
    guests: bool = True
    slurmdbd: bool = False
    cgroups: bool = False
    """Slurm made cgroups named after these nodes."""
    daemons: tuple[Daemon, ...] = ()


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line on the harness's socket."""

    do: Literal["status", "kill", "start", "stop"]
    name: str = ""
    signal: int = 0


class Tell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line from the harness: progress while it starts, an answer later."""

    progress: str = ""
    error: str = ""
    exit_code: int = 1
    """What the command line exits with for ``error``."""
    facts: Facts | None = None
