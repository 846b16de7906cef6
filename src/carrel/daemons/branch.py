"""The bank at work in carrelctld: the counter, the rounds, and what else must be done every few seconds."""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable

from carrel.config import Config
from carrel.daemons.alerts import Alerts
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.daemons.counter import LINE_BYTES_MAX, Counter
from carrel.daemons.lease import Lease
from carrel.daemons.rounds import Rounds
from carrel.daemons.settling import Reconciled
from carrel.daemons.starts import Starts
from carrel.errors import CarrelError, UnreachableError
from carrel.model.ledger import Sweep

_LOG = logging.getLogger("carrelctld.bank")
SWEEP_PERIOD_S = 5.0
FACTS_PERIOD_S = 60.0
FACTS_RETRY_S = 0.5
"""Slurm may start after us, and until it has answered once nothing has a price."""
FAILED_PAUSE_S = 2.0
OVERLAP_S = 26 * 3600
"""So far back each comparison reaches beyond the last one: records may come late, and days have 25 hours at times."""
LAG_S = 10
"""slurmdbd may be so late with a record."""


class Branch:
    """Everything that works on one bank."""

    def __init__(self, settings: Config, bank: Bank, board: Board) -> None:
        """Begin nothing yet."""
        self._starts = Starts(bank, board, since_s=time.time())
        self.bank = bank
        self.rounds = Rounds(bank, settings.slurm)
        self._counter = Counter(bank)
        self._alerts = Alerts(settings.bank.alerts, bank.ledger.store)
        self._lease = Lease(bank, self._counter)
        self._swept_s = self._reconciled_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None

    async def start(self, listening: socket.socket) -> None:
        """Answer on this socket, and begin the rounds."""
        self._server = await asyncio.start_unix_server(self._counter.connected, sock=listening, limit=LINE_BYTES_MAX)
        self._keep("facts", self._facts)
        self._keep("rounds", self._round)
        self._keep("alerts", self._alerts.look)
        if self.bank.remote is not None:
            self._keep("reports", self._report)

    async def close(self) -> None:
        """End all that ``start`` began, and let go of the ledger."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.bank.close()

    async def reconcile(self) -> Reconciled:
        """Compare all that ended lately with Slurm's accounting, and make good what is missing.

        Raises:
            UnreachableError: there is no accounting, or it did not answer.
        """
        if not self.bank.accounted:
            raise UnreachableError(
                "slurm keeps no accounts here (AccountingStorageType), so there is nothing to compare"
            )
        until_s = int(time.time()) - LAG_S
        from_s = max(self.bank.since_s, self.bank.reconciled_s - OVERLAP_S)
        found = await self.rounds.settling.reconcile(from_s)
        # In this order: what is older than the mark, and is not kept, is looked for by nobody.
        self.rounds.teller.keep()
        self.bank.reconciled(until_s)
        return found

    async def _facts(self) -> float:
        try:
            await self.bank.refresh()
        except UnreachableError:
            if self.bank.slurm_settings:
                raise
            return FACTS_RETRY_S
        return FACTS_PERIOD_S

    async def _round(self) -> float:
        await self.bank.known()
        if self.bank.settings.offline == "open":
            # Before the look: what was promised has its own lien then, and is not placed once more.
            await self._lease.keep()
        await self.rounds.round()
        now_s = time.monotonic()
        # After a round: a lien whose job was there for us to see is bound by now, and not swept.
        if now_s - self._swept_s > SWEEP_PERIOD_S:
            answer = await self.bank.ledger.do(Sweep(key=f"sweep/{self.bank.stamp()}", actor="carrelctld"))
            self._swept_s = 0.0 if "more" in getattr(answer, "flags", ()) else now_s
        await self.rounds.teller.do(await self._starts.refunds())
        if self.bank.accounted and now_s - self._reconciled_s > self.bank.settings.reconcile_period_s:
            self._reconciled_s = now_s
            found = await self.reconcile()
            if found.created or found.corrected or found.parked:
                _LOG.info("reconciled: %s", found)
        return self.bank.settings.look_period_s

    async def _report(self) -> float:
        """Tell a bank elsewhere what began and ended, and keep for a person what it will not hear."""
        await self.bank.known()
        if self.bank.remote is not None:
            flushed = await asyncio.to_thread(self.bank.remote.tell, self.bank.cluster_name)
            if flushed.problem:
                _LOG.warning("%d reports wait: %s", flushed.left, flushed.problem)
            if flushed.parked:
                self.rounds.teller.park(f"{flushed.parked} reports", "the bank does not take them; see mybrc.db")
        return self.bank.settings.remote.report_period_s

    def _keep(self, name: str, deed: Callable[[], Awaitable[float]]) -> None:
        """Do it again and again, each time after as many seconds as it returns; a failure is logged, not the end."""

        async def keep() -> None:
            while True:
                pause_s = FAILED_PAUSE_S
                try:
                    pause_s = await deed()
                except CarrelError as error:
                    _LOG.warning("%s: %s", name, error)
                except Exception:  # noqa: BLE001  # one bad record must not stop the bank
                    _LOG.exception("%s: it goes on", name)
                await asyncio.sleep(pause_s)

        self._tasks.append(asyncio.create_task(keep(), name=f"bank-{name}"))
