"""Runs whose guests we could not start: what they were charged is given back.

Only root's carreld reports to the board, so no user makes such a refund. A guest that the user's own request made
impossible is refused before it is tried, and is none of these. Nor is a job that runs on its nodes themselves, and has
a step whose guest fails: all else that it ran would be free.
"""

import asyncio
import time
from collections.abc import Sequence

from carrel.bank import runs
from carrel.core import billing
from carrel.core.folio import name_of
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.model.ledger import LienView, Refund

STATE = "GUEST_FAIL"
_SLACK_S = 5.0
"""Between the clocks of a node and of slurmctld."""
_TOLD_AGAIN_S = 60.0
"""Within this time of our start the nodes have told us what they had told before it; see ``daemons.report``."""

Times = Sequence[tuple[float, bool]]


class Starts:
    """Finds charged runs in which a guest failed and no task ever entered one."""

    def __init__(self, bank: Bank, board: Board, *, since_s: float) -> None:
        """Know nothing yet; the board comes back with the nodes' reports, and the ledger knows what was refunded.

        Args:
            bank: Whose charges are given back.
            board: What the nodes reported.
            since_s: When they began to report to it.
        """
        self._bank, self._board, self._since_s = bank, board, since_s

    async def refunds(self) -> list[Refund]:
        """Return the refunds that are due."""
        percent = self._bank.settings.refund_percent.guest_fail
        if not percent or not (starts := self._board.starts()):
            return []
        name, store = self._bank.cluster_name, self._bank.ledger.store
        found = []
        for lien in await asyncio.to_thread(runs.liens_of_runs, store, starts, cluster=name):
            # Of a task: the lien's own job id is that of the array, where other tasks' guests may have started.
            run = name_of(lien.run)
            if run and lien.state == "settled" and lien.charged_micro_su and await self._failed(lien, starts[run[0]]):
                amount = lien.charged_micro_su * percent // 100
                found += [billing.refund(name, lien.run, amount, state=STATE)] if amount else []
        return found

    async def _failed(self, lien: LienView, times: Times) -> bool:
        """Tell whether in the time of this very run a guest failed and no task entered one: job ids come back."""
        _, inputs = await asyncio.to_thread(runs.last_command, self._bank.ledger.store, lien.id)
        if "guest" not in inputs.get("resources", {}):
            return False
        began_s, ran_s = float(inputs.get("moment_s", 0)), float(inputs.get("seconds", 0))
        if began_s < self._since_s and time.time() < self._since_s + _TOLD_AGAIN_S:
            return False
        mine = [entered for at_s, entered in times if began_s - _SLACK_S <= at_s <= began_s + ran_s + _SLACK_S]
        return bool(mine) and not any(mine)
