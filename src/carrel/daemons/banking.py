"""The bank inside carrelctld: ledger, prices, and what Slurm says of its cluster, held ready for every question.

Whatever is kept here besides the ledger can be asked for again: it is kept because a submission waits for the answer.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from carrel import config
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.config import Config
from carrel.core import quote as quoting
from carrel.daemons import prices
from carrel.daemons.remote import Remote, opening
from carrel.errors import CarrelError, UnreachableError
from carrel.model.cluster import ClusterFacts
from carrel.model.ledger import Answer, Place, Refusal
from carrel.model.price import NoBound, NoPrice, PriceBook, Quote
from carrel.model.request import Request
from carrel.ports import Store
from carrel.slurm import associations, facts
from carrel.slurm.associations import Associations
from carrel.slurm.client import SlurmClient

_LOG = logging.getLogger("carrelctld.bank")
STRANGER_PERIOD_S = 5.0
"""So often at most are the associations read anew because of a user who is in none of them."""


def open_store(settings: config.Bank) -> Store:
    """Return the ledger's database.

    Raises:
        CarrelError: it cannot be opened, or the extra ``postgresql`` is not installed.
    """
    if "=" not in settings.database and "://" not in settings.database:
        path = Path(settings.database)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return SqliteStore(path)
    try:
        # An extra: a site whose ledger is a file does not have it.
        from carrel.bank.postgres import PostgresStore  # noqa: PLC0415
    except ImportError as error:
        raise CarrelError("bank.database names a PostgreSQL; install carrel[postgresql]") from error
    return PostgresStore(settings.database)


class Bank:
    """The ledger and all that a price needs. Made by the controller, when the bank is enabled."""

    def __init__(self, settings: Config) -> None:
        """Open the ledger and read the prices.

        Raises:
            CarrelError: the ledger cannot be opened, or there are no prices.
        """
        self.settings = settings.bank
        self.slurm = SlurmClient(settings.slurm)
        self.slurm_settings: dict[str, str] = {}
        """``scontrol show config``, as last read; empty: Slurm has not answered yet."""
        self.ledger = Ledger(open_store(settings.bank))
        self.remote = Remote(settings.bank, self.ledger.store) if settings.bank.provider == "mybrc" else None
        self._opened: set[str] = set()
        self._config = settings
        self._cluster: ClusterFacts | None = None
        self._known = asyncio.Event()
        self._book_file = prices.path(settings)
        self._book_version = _version(self._book_file)
        self._book = prices.load(settings)
        self._associations: Associations | None = None
        self._associations_at_s = 0.0
        self._stamps = itertools.count()
        self._file = Path(settings.bank.dir) / "reconciled.json"
        self._marks = _read_marks(self._file)

    @property
    def book(self) -> PriceBook:
        """The prices in force. A file that was changed is read again; one that is wrong leaves the old prices."""
        version = _version(self._book_file)
        if version != self._book_version:
            self._book_version = version
            try:
                self._book = prices.load(self._config)
            except CarrelError as error:
                _LOG.warning("the prices stay as they were: %s", error)
        return self._book

    @property
    def cluster(self) -> ClusterFacts:
        """What Slurm says of its partitions.

        Raises:
            UnreachableError: it has not answered yet.
        """
        if self._cluster is None:
            raise UnreachableError("slurm has not described its partitions yet; is slurmctld running?")
        return self._cluster

    @property
    def cluster_name(self) -> str:
        """The name that keys of the ledger begin with.

        Raises:
            UnreachableError: Slurm has not said it yet.
        """
        if name := self.slurm_settings.get("ClusterName"):
            return name
        raise UnreachableError("slurm did not name its cluster yet; is slurmctld running?")

    @property
    def accounted(self) -> bool:
        """Whether a slurmdbd keeps what runs used."""
        return self.slurm_settings.get("AccountingStorageType") == "accounting_storage/slurmdbd"

    @property
    def since_s(self) -> int:
        """When the bank was first enabled here. Jobs from before that, without a lien, are not charged."""
        return self._marks.since_s

    @property
    def reconciled_s(self) -> int:
        """All that ended before this was compared with Slurm's accounting."""
        return self._marks.reconciled_s

    def reconciled(self, until_s: int) -> None:
        """Note how far the accounting was compared."""
        self._marks = msgspec.structs.replace(self._marks, reconciled_s=until_s)
        _write_marks(self._file, self._marks)

    def quote(self, components: Sequence[Request], *, moment: datetime | None = None) -> Quote | NoBound | NoPrice:
        """Return what a submission may cost at most; see ``core.quote``."""
        return quoting.quote(components, book=self.book, cluster=self.cluster, moment=moment or datetime.now(UTC))

    async def associations(self, user: str, account: str) -> Associations:
        """Return who may charge what; asked anew where this user was not known a moment ago.

        Raises:
            UnreachableError: slurmdbd did not answer yet.
        """
        known, age_s = self._associations, time.monotonic() - self._associations_at_s
        if known is None or (not known.member(user, account) and age_s > STRANGER_PERIOD_S):
            known = await self._read_associations()
        return known

    async def place(self, command: Place, *, runs: bool = False) -> Answer:
        """Place a lien; a bank elsewhere is asked first, unless the job runs already.

        Raises:
            UnreachableError: the ledger or that bank did not answer.
            RefusedError: that bank does not take our token.
        """
        if self.remote is None:
            return await self.ledger.do(command)
        async with self.remote.turns[command.project]:
            needed = command.amount_micro_su * command.units
            if not runs and (denial := await self.denial(needed, user=command.user, account=command.project)):
                return Refusal(why="funds", sentence=denial, needed_micro_su=needed)
            await self.know(command.project)
            return await self.ledger.do(command)

    async def denial(self, amount_micro_su: int, *, user: str, account: str) -> str:
        """Return why a bank elsewhere does not cover this much more; empty: it does, or there is none."""
        if self.remote is None:
            return ""
        return await self.remote.denial(amount_micro_su, user=user, account=account, cluster=self.cluster_name)

    async def know(self, account: str) -> None:
        """Have an account in the ledger that only a bank elsewhere knows of."""
        if self.remote is not None and account not in self._opened:
            await self.ledger.do_all(opening(account))
            self._opened.add(account)

    def stamp(self) -> str:
        """Return a word that was never used, for the key of what may be asked for again later."""
        return f"{time.time_ns()}.{os.getpid()}.{next(self._stamps)}"

    async def close(self) -> None:
        """Let go of the ledger, and of the queue for a bank elsewhere."""
        if self.remote is not None:
            await asyncio.to_thread(self.remote.close)
        await asyncio.to_thread(self.ledger.close)

    @property
    def ready(self) -> bool:
        """Whether jobs can be priced."""
        return self._known.is_set()

    async def known(self) -> None:
        """Return when Slurm has described its cluster."""
        await self._known.wait()

    async def refresh(self) -> None:
        """Ask Slurm anew for its partitions and settings.

        Raises:
            UnreachableError: it did not answer; what it said last stays.
        """
        found, settings = await asyncio.gather(facts.read(self._config.slurm), self.slurm.settings())
        self.learn(found, settings)
        await self._read_associations()
        self._known.set()

    def learn(self, cluster: ClusterFacts, settings: dict[str, str]) -> None:
        """Take what Slurm says of its partitions and of itself (``scontrol show config``)."""
        self._cluster, self.slurm_settings = cluster, settings

    async def _read_associations(self) -> Associations:
        if self.accounted:
            self._associations = await associations.read(self._config.slurm, cluster=self.cluster_name)
        elif self.slurm_settings:
            self._associations = Associations("")
        else:
            raise UnreachableError("slurm has not said yet whether it keeps accounts; is slurmctld running?")
        self._associations_at_s = time.monotonic()
        return self._associations


def _version(path: Path) -> tuple[int, int]:
    """Return what tells one state of a file from another; nothing of one that is absent."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_ino
    return 0, 0


class _Marks(msgspec.Struct, frozen=True):
    since_s: int
    reconciled_s: int


def _read_marks(path: Path) -> _Marks:
    """Return what an earlier daemon noted; begin now where none did.

    Raises:
        CarrelError: it cannot be read: to begin now would leave what ended before uncharged for ever.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Marks)
    except FileNotFoundError:
        now_s = int(time.time())
        marks = _Marks(now_s, now_s)
        _write_marks(path, marks)
        return marks
    except (OSError, msgspec.MsgspecError) as error:
        raise CarrelError(
            f"{path}: {error}; put back that of a backup, or write when the bank began and until when all is charged: "
            '{"since_s": SECONDS, "reconciled_s": SECONDS}'
        ) from error


def _write_marks(path: Path, marks: _Marks) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(msgspec.json.encode(marks))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
