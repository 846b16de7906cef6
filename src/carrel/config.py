"""Settings: one TOML file, the same on every node; each setting is declared once, here.

An unknown key is an error. ``{node}`` in a path stands for the Slurm name of the node that reads it.
A driver's own settings are its own ``Struct``, decoded from ``[drivers.<name>]`` (see ``driver_settings``).
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from carrel import paths
from carrel.errors import CarrelError

Percent = Meta(ge=0, le=100)
Deadline = Meta(ge=1, le=500)
Hours = Meta(ge=0, le=1000)


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
    map_dir: str = "/var/spool/carrel/maps"
    """Where the controller writes ``vm_map<jobid>.conf``, for programs that knew VINO-Slurm."""


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


class Bank(Section, frozen=True):
    enabled: bool = False
    """Price each job before it runs. ``job_submit.lua`` reads this, too: with false it asks nobody."""
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
    prices: Prices = Prices()


class Metrics(Section, frozen=True):
    """Read by ``carrel job report`` and by the sampler, which carreld does not run yet."""

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
    sync_period_s: float = 1.0
    """A power cut loses what is younger than this; a kill loses nothing that was written."""
    job_bytes_max: int = 256 * 2**20
    """Before the samples of a job on one node grow beyond this, it is sampled less often, and the files say so."""
    formats: tuple[Literal["csv", "parquet"], ...] = ("csv",)
    """Written at the end of a job. ``parquet`` needs ``carrel[parquet]`` on the node."""
    keep_days: float = 90.0
    """Samples of jobs that ended longer ago are removed; 0: never."""
    user_bytes_max: int = 10 * 2**30
    """A user's oldest jobs are removed beyond this; 0: never."""


class Config(Section, frozen=True):
    slurm: Slurm = Slurm()
    guests: Guests = Guests()
    images: Images = Images()
    node: Node = Node()
    controller: Controller = Controller()
    bank: Bank = Bank()
    metrics: Metrics = Metrics()
    drivers: dict[str, dict[str, Any]] = {}

    source: str = ""
    """The file that these settings came from; empty when all are defaults. Not a setting."""


_S = TypeVar("_S", bound=msgspec.Struct)


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
    except tomllib.TOMLDecodeError as error:
        raise CarrelError(f"{path}: not TOML: {error}") from error
    if "source" in raw:
        raise CarrelError(f"{path}: unknown key source")
    return msgspec.structs.replace(_convert(raw, Config, where=str(path)), source=str(path))


def driver_settings(config: Config, name: str, struct: type[_S]) -> _S:
    """Decode ``[drivers.<name>]`` into the driver's own struct; its defaults where the table is absent."""
    where = f"{config.source or 'defaults'}: drivers.{name}"
    return _convert(config.drivers.get(name, {}), struct, where=where)


def _convert(raw: dict[str, Any], struct: type[_S], *, where: str) -> _S:
    _refuse_unknown(raw, struct, where=where, prefix="")
    try:
        return msgspec.convert(raw, struct)
    except msgspec.ValidationError as error:
        raise CarrelError(f"{where}: {str(error).replace('`', '')}") from error


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
