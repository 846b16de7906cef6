"""Settings: one TOML file, the same on every node; each setting is declared once, here.

An unknown key is an error. ``{node}`` in a path stands for the Slurm name of the node that reads it.
A driver's own settings are its own ``Struct``, decoded from ``[drivers.<name>]`` (see ``driver_settings``); so are a
sink's, from ``[sinks.<name>]``.
"""

import difflib
import math
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from carrel import paths
from carrel.errors import CarrelError
from carrel.model.host import Overcommit, Policy

_NO_WORD = re.compile(r"Invalid enum value (.*) - at `\$\.([\w.]+)`", re.DOTALL)
_MEASURED = re.compile(r"_(s|ms|bytes|days|hours|cores|max|min|count)$")

Percent = Meta(ge=0, le=100)
Deadline = Meta(ge=1, le=500)
Hours = Meta(ge=0, le=1000)
AtLeastOnce = Annotated[int, Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration file."""


class Slurm(Section, frozen=True):
    bin_dir: str = "/usr/bin"
    """Directory of ``srun``, ``squeue``, ``scontrol`` and the others on this host."""
    conf: str = ""
    """Path of ``slurm.conf``; empty: Slurm's own default, or ``SLURM_CONF`` of the environment."""
    spool_dir: str = "/var/spool/slurmd"
    """``SlurmdSpoolDir``; its step sockets tell carrel-guard that a job is gone while carreld is dead."""


class Templates(Section, frozen=True):
    """What instant clones are made from; see ``docs/reference/clones.md``."""

    dir: str = ""
    """Directory of templates, on this node's own disk and writable by root alone; empty: ``/var/lib/carrel/templates``,
    or ``build/templates`` of a source checkout."""
    share: Literal["all", "user", "none"] = "all"
    """Who has the same memory pages: clones of ``all`` users, those of one ``user``, or nobody, which is the end of
    instant clones; see ``docs/explanation/clones-and-security.md``."""
    user: str = "nobody"
    """Whom a template's guest runs as while it boots."""
    max_bytes: int = 2 * 2**30
    """Memory of all templates of a node together; those unused for longest go first."""
    max_age_s: float = 30 * 86400.0
    """A template that was not used for so long goes."""
    base_max_bytes: int = 4 * 2**30
    """Memory of the largest template; a clone of any size beyond gets the rest plugged in."""

    @property
    def path(self) -> Path:
        return Path(self.dir) if self.dir else paths.template_store()


class GuestLogs(Section, frozen=True):
    """What is kept of guests that were Slurm nodes; see ``docs/reference/guest-logs.md``."""

    dir: str = "/var/lib/carrel/guest-logs"
    """``<dir>/<user>/<run>/``, for root to write; on the host of the controller, and of each node with such guests."""
    keep_days: float = 30.0
    """Those of guests that ended longer ago are removed; 0: never."""
    user_bytes_max: int = 1 * 2**30
    """A user's oldest are removed beyond this; 0: never."""
    file_bytes_max: int = 4 * 2**20
    """Of a slurmd log or a console, the end of this size is kept."""


class Guests(Section, frozen=True):
    driver: str = "qemu"
    """Driver used where ``--guest-driver`` is absent."""
    per: Literal["job", "task"] = "job"
    clone: Literal["auto", "instant", "linked", "full"] = "auto"
    """``auto`` is ``instant`` where a template is there and ``linked`` where none is, and then makes one for the next
    guest; ``carrel job show`` says which was taken and why."""
    accelerator: Literal["kvm", "tcg", "auto"] = "kvm"
    """``auto`` takes KVM where a guest really boots with it, else emulation, and says which it took."""
    default_mounts: tuple[Literal["home", "workdir"], ...] = ("home", "workdir")
    """Host directories mounted at their own paths in every guest, when they exist and are not system directories."""
    memory_reserve_bytes: int = 160 * 2**20
    """What is left of the job's memory for QEMU itself; the guest gets the rest. QEMU needs about 60 MiB, 15 for each
    CPU beyond the first, and under emulation ``drivers.qemu.translation_cache_bytes``."""
    memory_min_bytes: int = 160 * 2**20
    """A guest smaller than this does not boot; the job is refused."""
    boot_timeout_s: float = 120.0
    stop_timeout_s: float = 10.0
    """How long an epilog waits for its guest to be gone."""
    console_bytes: int = 1 * 2**20
    """How much of a guest's console is kept."""
    templates: Templates = Templates()
    logs: GuestLogs = GuestLogs()
    map_dir: str = "/var/spool/carrel/maps"
    """Where the controller writes ``vm_map<jobid>.conf``, for programs that knew VINO-Slurm."""


class GuestNodes(Section, frozen=True):
    """Guests that are Slurm nodes of their own; see ``docs/how-to/guests-as-nodes.md``."""

    hosts: str = ""
    """The hosts that carry them, as Slurm writes node names: ``h[1-40]``. Slurm schedules none of these."""
    remote: dict[str, str] = {}
    """Hosts that carry no carreld, by the driver that makes guests there: ``vsphere = "esx-[1-8]"``. Their guests run
    a slurmd inside; carrelctld speaks for these hosts."""
    host_cpus: int = 0
    """CPUs that each host's carreld says it has for guests; 0: all that its machine has."""
    host_memory_mib: int = 0
    """Memory likewise, in MiB."""
    partition: str = "guests"
    """Slurm's partition of the pool of names that such guests get; jobs in it have a guest that is a node."""
    knock: str = "/run/carrel/knock"
    """A file that ``job_submit.lua`` opens when it has taken such a job, so that carrelctld, on the same machine, looks
    at once; empty, or not there: at its next look, within a second."""
    configuring_max_s: float = 30.0
    """A job that was given its nodes and does not start within this time is given back to the queue."""
    start_max_s: float = 120.0
    """A job that has its guests, and that Slurm does not start within this time (a limit, a licence), gives them back;
    it is tried again after as long, and then twice as long each time, up to ``placement.launches.backoff_max_s``."""
    join_max_s: float = 120.0
    """A guest whose slurmd has not registered so long after it was ready has failed."""
    host_silent_s: float = 30.0
    """A host that was not heard for so long gets no new guest, and those that begin there begin elsewhere."""


class Images(Section, frozen=True):
    store: str = ""
    """Directory of images; empty: ``/var/lib/carrel/images``, or ``build/images`` of a source checkout."""

    @property
    def path(self) -> Path:
        return Path(self.store) if self.store else paths.image_store()


class Node(Section, frozen=True):
    dir: str = "/var/spool/carrel/{node}"
    """A node's own directory: the socket of carreld, and a directory per guest. On a disk, not in memory."""
    sweep_period_s: float = 2.0
    report_period_s: float = 30.0

    def path(self, node: str) -> Path:
        return Path(self.dir.replace("{node}", node))


class Controller(Section, frozen=True):
    listen: str = "unix:/run/carrel/carrelctld.sock"
    """``unix:PATH`` or ``tcp:HOST:PORT``. Over TCP every caller proves itself with munge."""
    munge_socket: str = ""
    """Munge's socket; empty: munge's own default."""
    user: str = "root"
    """Whom carrelctld runs as. Over TCP a host of guests that are nodes takes orders from nobody else."""


class Rate(Section, frozen=True):
    """How many guests of a kind are begun at most in each ``window_s``."""

    instant: AtLeastOnce = 200
    linked: AtLeastOnce = 60
    full: AtLeastOnce = 10


class Launches(Section, frozen=True):
    """How guests that are Slurm nodes are begun, and what follows where one cannot be made."""

    rate: Rate = Rate()
    window_s: float = 60.0
    attempts: AtLeastOnce = 5
    """After so many failures the job stays held, for a person to look at."""
    backoff_s: float = 2.0
    """Wait after the first failure; twice as long after each further one."""
    backoff_max_s: float = 300.0
    failures: AtLeastOnce = 3
    """After so many in a row a host or an image rests, and then gets a single trial."""
    rest_s: float = 60.0
    """Twice as long after each trial that fails."""
    rest_max_s: float = 1800.0
    patience_s: float = 3600.0
    """A job that has waited for so long is not passed by others any more, if room comes as guests end."""


class Addresses(Section, frozen=True):
    """Addresses for guests that are Slurm nodes; without any, their network gives them one."""

    static: tuple[str, ...] = ()
    """Ranges that are Carrel's alone: ``10.0.0.10-10.0.0.20``, ``10.0.1.0/24``."""
    list: str = ""
    """A file of lines ``ADDRESS;JOB;USED`` that other programs share, in place of ``static``."""


class Placement(Section, frozen=True):
    """Where guests go that are Slurm nodes of their own."""

    table: str = "/var/lib/carrel/hosts.db"
    """The controller's file of hosts and of what is taken of them, on a disk of its own machine."""
    policy: Policy = "best-fit"
    """What is chosen among the hosts with room: see ``docs/reference/hosts.md``."""
    overcommit: Overcommit = Overcommit()
    """How often a CPU, or a byte of memory, may be promised to guests."""
    command: tuple[str, ...] = ()
    """A command of the site's that chooses instead of ``policy``: JSON in, JSON out."""
    command_timeout_s: float = 5.0
    """A command that takes longer is killed, and the job waits."""
    launches: Launches = Launches()
    addresses: Addresses = Addresses()

    @property
    def path(self) -> Path:
        return Path(self.table)


class Prices(Section, frozen=True):
    book: str = ""
    """The price book; empty: ``prices.toml`` beside this file, or ``/etc/carrel/prices.toml``."""


class RefundPercent(Section, frozen=True):
    """What is given back of a charge, by how the run ended."""

    node_fail: Annotated[int, Percent] = 100
    boot_fail: Annotated[int, Percent] = 100
    preempted: Annotated[int, Percent] = 100
    guest_fail: Annotated[int, Percent] = 100
    """None of its guests could be started, and not by the user's fault."""


class AlertSettings(Section, frozen=True):
    """When an account has used so much that somebody should know."""

    percent: tuple[Annotated[int, Meta(ge=1, le=1000)], ...] = (50, 75, 90, 100)
    """Of what its valid allocations were given, charged; empty: no alerts."""
    command: tuple[str, ...] = ()
    """Run for each crossing, with ``CARREL_ALERT`` (the crossing's name), ``CARREL_ALERT_ACCOUNT``,
    ``CARREL_ALERT_PERCENT`` and ``CARREL_ALERT_SENTENCE`` in its environment; the first word is a path. One that
    fails is run again later."""
    period_s: float = 60.0
    timeout_s: float = 30.0


class MybrcServer(Section, frozen=True):
    """The myBRC API, for clusters that run slurm-banking-plugins; below ``/api`` and ``/mybrc-rest``."""

    enabled: bool = False
    allow_all: bool = False
    """Every job may be submitted, whatever it costs; nothing is set aside."""
    unlimited_prefixes: tuple[str, ...] = ()
    """Accounts whose names begin so may submit whatever it costs, as ``co_`` there."""
    cluster: str = "mybrc"
    """What the ledger calls the cluster whose plug-ins ask."""
    year_begins: Annotated[str, Meta(pattern=r"^(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])\Z")] = "01-01"
    """Month and day from which on ``GET /jobs/`` lists where no time is asked for."""


class MybrcClient(Section, frozen=True):
    """The bank that decides with ``bank.provider = "mybrc"``; see ``docs/reference/mybrc.md``."""

    config: str = "/etc/carrel/bank-config.toml"
    """The file of slurm-banking-plugins: ``[Enable]``, ``[PartitionPrice]``, ``[QosMultiplier]`` and ``[API]``."""
    token_file: str = ""
    """The token, in a file that only its owner may read; empty: ``API.token`` of ``config``, which must be such a
    file then."""
    count_waiting: bool = True
    """Ask for a job's cost and for that of its account's jobs that wait: such a bank counts a job from its start. False
    where it sets aside what it said yes to, as ours does."""
    report_period_s: float = 1.0
    """How often it is told what began and ended."""


class Bank(Section, frozen=True):
    enabled: bool = False
    """Price each job before it runs. ``job_submit.lua`` reads this, too: with false it asks nobody."""
    provider: Literal["carrel", "mybrc"] = "carrel"
    """Who decides what accounts have: our ledger; or a bank that speaks myBRC, and the ledger keeps what it is told."""
    database: str = "/var/lib/carrel/bank/ledger.db"
    """The ledger: path of an SQLite file, or a connection string of PostgreSQL (``host=… dbname=…``)."""
    dir: str = "/var/lib/carrel/bank"
    """How far the accounting was read, and what ``carrelctld`` and ``job_submit.lua`` leave for each other with
    ``offline = "open"``: the lease and the journal. On a disk."""
    socket: str = "/run/carrel/submit.sock"
    """Where ``job_submit.lua`` asks; only root and ``SlurmUser`` are answered."""
    deadline_ms: Annotated[int, Deadline] = 50
    """How long ``job_submit.lua`` waits for an answer: slurmctld waits with it."""
    offline: Literal["closed", "open", "hold"] = "closed"
    """What it does on silence: refuse the job; take it as far as the lease reaches; or take it and hold it, so that it
    starts when the bank has answered."""
    lease_hours: Annotated[int, Hours] = 1
    """With ``open``: how many hours of all nodes, at most, each account sets aside for times of silence; but never more
    than a tenth of what it has."""
    uncovered: Literal["charge", "hold"] = "hold"
    """What becomes of a waiting job without a lien whose account does not cover it: it is ``hold`` in the queue until
    the account does, or it runs and is charged all the same. One that runs already is charged."""
    default_account: str = ""
    """Who pays for jobs that name no account where Slurm has no default one, as without slurmdbd."""
    look_period_s: float = 2.0
    """How often the queue is looked at."""
    reconcile_period_s: float = 600.0
    """How often all that ended lately is compared with Slurm's accounting."""
    refund_percent: RefundPercent = RefundPercent()
    alerts: AlertSettings = AlertSettings()
    mybrc: MybrcServer = MybrcServer()
    remote: MybrcClient = MybrcClient()
    prices: Prices = Prices()


class Metrics(Section, frozen=True):
    """What carreld samples of the jobs of its node, with and without a guest; see ``docs/reference/metrics.md``."""

    enabled: bool = True
    """Sample all jobs."""
    root: str = "/var/lib/carrel/metrics"
    """The samples of a job go to ``<root>/<user>/<job>/``, on a disk that root can write; nodes may share it."""
    period_s: float = 1.0
    """Time between two samples of a job that asked for no other."""
    period_min_s: float = 0.05
    period_max_s: float = 3600.0
    slow_period_s: float = 60.0
    """Interrupts are read so often: they cost more than all else, on nodes with many CPUs milliseconds."""
    process_period_s: float = 10.0
    """Processes are read so often after the first seconds of a job."""
    budget_cores: float = 0.01
    """Part of a CPU that sampling may take; beyond it, the dearest sources are read less often, as the files say."""
    sync_period_s: float = 5.0
    """A power cut loses what is younger than this; a kill loses nothing that was written. Syncing each second takes a
    quarter of what a sample takes."""
    job_bytes_max: int = 256 * 2**20
    """Before the samples of a job on one node grow beyond this, it is sampled less often, and the files say so."""
    formats: tuple[Literal["csv", "parquet"], ...] = ("csv",)
    """Written at the end of a job. ``parquet`` needs ``carrel[parquet]`` on the node."""
    keep_days: float = 90.0
    """Samples of jobs that ended longer ago are removed; 0: never."""
    user_bytes_max: int = 10 * 2**30
    """A user's oldest jobs are removed beyond this; 0: never."""
    readers: str = ""
    """Unix group that may read the samples of all users, such as that of Slurm's operators; empty: only root may."""
    operators: str = ""
    """Unix group that may change how often any job is sampled, as its owner and root may."""
    sampler: Literal["carrel", "ldms"] = "carrel"
    """``ldms``: ldmsd samples instead, as ``[ldms]`` says; what carrel reads of a job alone is then missing."""
    sinks: tuple[str, ...] = ()
    """Where samples also go: ``csv``, ``parquet``, ``kafka``, ``prometheus``, or one that the site installed; the
    settings of each are the table ``[sinks.<name>]``."""
    spool_bytes_max: int = 1 * 2**30
    """So much waits on a node for a sink that is down; beyond it, the oldest rows are dropped and counted."""
    spool_age_max_s: float = 7 * 86400.0
    """Rows that have waited longer are dropped and counted."""
    sinks_memory_max_bytes: int = 512 * 2**20
    """The process that feeds the sinks is ended beyond this, and started again."""


class Ldms(Section, frozen=True):
    """With ``metrics.sampler = "ldms"``: the site's own ``ldmsd`` samples; see ``docs/how-to/ldms.md``."""

    plugins: tuple[str, ...] = ("meminfo", "vmstat", "dstat", "loadavg", "procinterrupts", "procstat2")
    port_first: int = 10101
    port_count: int = 64
    """Each job on a node has a sampler of its own, at a port of its own."""
    auth: Literal["munge", "ovis", "none"] = "munge"
    auth_options: tuple[str, ...] = ()
    """``socket=/run/munge/munge.socket.2``, or for ``ovis``: ``conf=/etc/ldms/secret``."""
    aggregator: str = "localhost"
    """Host of the aggregator, a long-lived ``ldmsd``: ``carrel metrics ldms-config`` prints its configuration."""
    aggregator_port: int = 20001
    store_dir: str = "/var/lib/carrel/ldms"
    """On the aggregator's host: a job's rows are in ``<store_dir>/<user>/<job>/<node>/<set>``."""
    reconnect_s: float = 1.0
    kafka: str = ""
    """Brokers that get all rows too, as JSON: ``host:port,host:port``."""
    kafka_conf: str = ""
    """More of librdkafka's properties."""
    topic: str = "ldms.%S"
    """``%S`` is the schema with its digest: ``ldms.meminfo_ef957a7``."""
    environment: dict[str, str] = {}
    """For ldmsd: ``LDMSD_PLUGIN_LIBPATH`` and the like, where the site's is not installed in the system."""


class Config(Section, frozen=True):
    slurm: Slurm = Slurm()
    guests: Guests = Guests()
    guest_nodes: GuestNodes = GuestNodes()
    images: Images = Images()
    node: Node = Node()
    controller: Controller = Controller()
    placement: Placement = Placement()
    bank: Bank = Bank()
    metrics: Metrics = Metrics()
    ldms: Ldms = Ldms()
    drivers: dict[str, dict[str, Any]] = {}
    sinks: dict[str, dict[str, Any]] = {}

    source: str = ""
    """The file that these settings came from; empty when all are defaults. Not a setting."""


_S = TypeVar("_S", bound=msgspec.Struct)


def this_node() -> str:
    """Return what Slurm most likely calls this machine: what slurmd says of itself, else the host's short name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def load(path: Path | None = None) -> Config:
    """Read the configuration; all defaults where there is no file.

    Raises:
        CarrelError: the file cannot be read, is not TOML, or has an unknown key or a wrong type.
    """
    path = path or paths.config_file()
    if path is None:
        return Config()
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise CarrelError(f"{path}: {error.strerror}; is it readable by you?") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CarrelError(f"{path}: not TOML: {error}") from error
    if "source" in raw:
        raise CarrelError(f"{path}: unknown key source")
    return msgspec.structs.replace(_convert(raw, Config, where=str(path)), source=str(path))


def driver_settings(config: Config, name: str, struct: type[_S]) -> _S:
    """Decode ``[drivers.<name>]`` into the driver's own struct; its defaults where the table is absent."""
    where = f"{config.source or 'defaults'}: drivers.{name}"
    return _convert(config.drivers.get(name, {}), struct, where=where)


def sink_settings(config: Config, name: str, struct: type[_S]) -> _S:
    """Decode ``[sinks.<name>]`` into the sink's own struct; its defaults where the table is absent."""
    where = f"{config.source or 'defaults'}: sinks.{name}"
    return _convert(config.sinks.get(name, {}), struct, where=where)


def _convert(raw: dict[str, Any], struct: type[_S], *, where: str) -> _S:
    _refuse_unknown(raw, struct, where=where, prefix="")
    _refuse_impossible(raw, where=where, prefix="")
    try:
        return msgspec.convert(raw, struct)
    except msgspec.ValidationError as error:
        raise CarrelError(f"{where}: {what_is_wrong(error, struct)}") from error


def what_is_wrong(error: msgspec.ValidationError, struct: type[msgspec.Struct]) -> str:
    """Return what msgspec says of a value; of a word that is none of some, which ones there are: it does not say."""
    match = _NO_WORD.fullmatch(str(error))
    words = _words_of(struct, match[2]) if match else ()
    return f"{match[2]} = {match[1]}; give {', '.join(words)}" if match and words else str(error).replace("`", "")


def _words_of(struct: type[msgspec.Struct], key: str) -> tuple[str, ...]:
    """Return the words that may stand for a key; none where it is not one of a few."""
    kind: Any = struct
    for name in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return ()
        kind = next((field.type for field in msgspec.structs.fields(kind) if field.name == name), None)
    either = [kind, *get_args(kind)]  # a word, or none
    return tuple(str(word) for each in either if get_origin(each) is Literal for word in get_args(each))


def _refuse_impossible(raw: dict[str, Any], *, where: str, prefix: str) -> None:
    """A time or a size has its unit in its name: none is negative, and a loop without a pause takes a whole CPU."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _refuse_impossible(value, where=where, prefix=f"{prefix}{key}.")
        elif isinstance(value, int | float) and _MEASURED.search(key):
            positive = key.endswith(("period_s", "timeout_s"))
            if not 0 <= value < math.inf or (positive and not value):
                raise CarrelError(f"{where}: {prefix}{key} = {value}: must be {'above 0' if positive else '0 or more'}")


def _refuse_unknown(raw: dict[str, Any], struct: type[msgspec.Struct], *, where: str, prefix: str) -> None:
    """The message of msgspec names no neighbour; a mistyped key deserves its correction."""
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else f"; known: {', '.join(sorted(known))}"
            raise CarrelError(f"{where}: unknown key {prefix}{key}{hint}")
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, where=where, prefix=f"{prefix}{key}.")
