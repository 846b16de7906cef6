"""The bank inside carrelctld: ledger, prices, and what Slurm says of its cluster, held ready for every question.

Whatever is kept here besides the ledger can be asked for again: it is kept because a submission waits for the answer.
"""

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from carrel import config
from carrel.bank.ledger import Ledger
from carrel.bank.sqlite import SqliteStore
from carrel.config import Config
from carrel.core import quote as quoting
from carrel.daemons import prices
from carrel.errors import CarrelError, UnreachableError
from carrel.model.cluster import ClusterFacts
from carrel.model.ledger import Sweep
from carrel.model.price import NoBound, NoPrice, PriceBook, Quote
from carrel.model.request import Request
from carrel.ports import Store
from carrel.slurm import facts
from carrel.slurm.client import SlurmClient

_LOG = logging.getLogger("carrelctld.bank")
SWEEP_PERIOD_S = 5.0
FACTS_PERIOD_S = 60.0
FACTS_RETRY_S = 0.5
"""Slurm may start after us, and until it has answered once nothing has a price."""


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
        self._config = settings
        self._cluster: ClusterFacts | None = None
        self._known = asyncio.Event()
        self._book_file = prices.path(settings)
        self._book_version = _version(self._book_file)
        self._book = prices.load(settings)
        self._sweeps = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

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

    def quote(self, components: Sequence[Request], *, moment: datetime | None = None) -> Quote | NoBound | NoPrice:
        """Return what a submission may cost at most; see ``core.quote``."""
        return quoting.quote(components, book=self.book, cluster=self.cluster, moment=moment or datetime.now(UTC))

    def start(self) -> None:
        """Begin to keep things up to date."""
        self._keep("facts", self._read_facts)
        self._keep("sweep", self._sweep)

    async def close(self) -> None:
        """End all that ``start`` began, and let go of the ledger."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.ledger.close)

    async def known(self) -> None:
        """Return when Slurm has described its cluster."""
        await self._known.wait()

    async def refresh(self) -> None:
        """Ask Slurm anew for its partitions and settings.

        Raises:
            UnreachableError: it did not answer; what it said last stays.
        """
        found, settings = await asyncio.gather(facts.read(self._config.slurm), self.slurm.settings())
        self._cluster, self.slurm_settings = found, settings
        self._known.set()

    async def _read_facts(self) -> float:
        try:
            await self.refresh()
        except UnreachableError:
            if not self._known.is_set():
                return FACTS_RETRY_S
            raise
        return FACTS_PERIOD_S

    async def _sweep(self) -> float:
        key = f"sweep/{os.getpid()}/{datetime.now(UTC).timestamp()}/{next(self._sweeps)}"
        answer = await self.ledger.do(Sweep(key=key, actor="carrelctld"))
        return 0.0 if "more" in getattr(answer, "flags", ()) else SWEEP_PERIOD_S

    def _keep(self, name: str, deed: Callable[[], Awaitable[float]]) -> None:
        """Do it again and again, each time after as many seconds as it returns; a failure is logged, not the end."""

        async def keep() -> None:
            while True:
                pause_s = SWEEP_PERIOD_S
                try:
                    pause_s = await deed()
                except CarrelError as error:
                    _LOG.warning("%s: %s", name, error)
                except Exception:  # noqa: BLE001  # one bad record must not stop the bank
                    _LOG.exception("%s: it goes on", name)
                await asyncio.sleep(pause_s)

        self._tasks.append(asyncio.create_task(keep(), name=f"bank-{name}"))


def _version(path: Path) -> tuple[int, int]:
    """Return what tells one state of a file from another; nothing of one that is absent."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_ino
    return 0, 0
