"""The rounds: look at Slurm's queue and accounting, decide what the money of each run needs, and have the ledger do it.

Nothing is stored between two rounds that the next could not find out again. A round that fails half-way is made good by
the next one, and commands may be given twice.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from carrel.bank import runs
from carrel.config import Slurm
from carrel.core import billing
from carrel.core.billing import OPEN, Due
from carrel.core.folio import Folio, Name
from carrel.daemons.banking import Bank
from carrel.daemons.settling import Settling
from carrel.daemons.teller import Teller
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.ledger import AnyCommand, LienView, Receipt
from carrel.model.price import NoBound, NoPrice
from carrel.model.request import Request
from carrel.model.run import Seen, mark_of
from carrel.slurm import queue

_LOG = logging.getLogger("carrelctld.bank")
_REFUSED_AGAIN_S = 30.0
"""Who was refused is asked for again so often: money may have come meanwhile."""


class Rounds:
    """One controller's rounds over one cluster."""

    def __init__(self, bank: Bank, slurm: Slurm) -> None:
        """Know nothing yet."""
        self._bank, self._slurm = bank, slurm
        self.teller = Teller(bank.ledger, Path(bank.settings.dir) / "parked.json")
        self.settling = Settling(bank, slurm, self.teller)
        self._refused_s: dict[Name, float] = {}
        self._priced: dict[int, tuple[object, ...]] = {}
        """By lien: what was last priced, so that only a change is priced again."""
        self._uncovered: dict[int, str] = {}
        """By job id: those without a lien, and why; a look that comes back to them says it again."""
        self._short: list[str] = []

    def waiting(self) -> list[str]:
        """Return what a person should look at: what is owed, what has no lien, what may need more than it has."""
        owed = [f"{one.what}: {one.why}" for one in self.teller.parked()]
        bare = [f"job {job_id} has no lien: {why}" for job_id, why in self._uncovered.items()]
        return [*owed, *bare, *(f"run {run} may need more than could be set aside" for run in self._short)]

    async def round(self) -> None:
        """Look, decide, act.

        Raises:
            UnreachableError: Slurm or the ledger did not answer; nothing was decided on what is not known.
        """
        name, store = self._bank.cluster_name, self._bank.ledger.store
        seen = await queue.look(self._slurm, cluster=name)
        # After the look: whatever job it shows was placed before.
        folio = Folio(await asyncio.to_thread(runs.open_liens, store, cluster=name))
        self._short = [lien.run or lien.token for lien in folio.open.values() if "short" in lien.flags]
        strange = [run for run in seen if not (run.waiting_tasks or (run.over and self.settling.done(run)))]
        await self.settling.recall(strange, folio)
        living = [run for run in seen if not run.over]
        await self._place(living, folio)
        await self._go_on(living, folio)
        await self.settling.settle(seen, folio)
        await self._release(living, folio)
        self._priced = {number: what for number, what in self._priced.items() if number in folio.open}
        alive = {(run.key.job_id, run.key.submit_s) for run in living}
        self._refused_s = {run: when for run, when in self._refused_s.items() if run in alive}
        ids = {job_id for job_id, _ in alive}
        self._uncovered = {job_id: why for job_id, why in self._uncovered.items() if job_id in ids}
        self.teller.keep()

    async def _place(self, living: Sequence[Seen], folio: Folio) -> None:
        """Set money aside for what went past the counter: submitted in silence, requeued, moved to another account."""
        for run in living:
            if folio.of(run) is not None or not self._to_be_placed(run):
                continue
            try:
                lien, why = await self._placed(run)
            except UnreachableError as error:
                # The rest of the round needs no bank elsewhere; if it is the ledger that is away, it ends there.
                _LOG.warning("jobs without a lien wait for the bank: %s", error)
                return
            if lien is not None:
                folio.give(run, lien)
                self._uncovered.pop(run.key.job_id, None)
                continue
            self._refused_s[run.key.job_id, run.key.submit_s] = time.monotonic()
            self._uncovered[run.key.job_id] = why
            _LOG.warning("job %d has no lien: %s", run.key.job_id, why)
            if run.state == "pending" and self._bank.settings.uncovered == "hold":
                await self._bank.slurm.hold(run.key.job_id, mark_of(run.token or "none", held=True, before=run.mark))

    def _to_be_placed(self, run: Seen) -> bool:
        if run.key.submit_s < self._bank.since_s and not run.token:
            return False  # older than the bank
        refused_s = self._refused_s.get((run.key.job_id, run.key.submit_s))
        return refused_s is None or time.monotonic() - refused_s > _REFUSED_AGAIN_S

    async def _placed(self, run: Seen) -> tuple[LienView | None, str]:
        """Return the lien that was placed, or the sentence why not."""
        due = self._due(run)
        project = run.account or self._bank.settings.default_account
        if not isinstance(due, Due):
            return None, due.reason if due else "it has no time limit"
        units, token = max(1, run.waiting_tasks), f"again/{self._bank.stamp()}"
        command = billing.place(run, due, token=token, project=project, units=units)
        try:
            answer = await self._bank.place(command, runs=run.state not in {"pending", "held"})
        except RefusedError as error:
            return None, str(error)
        if not isinstance(answer, Receipt):
            return None, answer.sentence
        return _fresh(run, answer, token=token, project=project, units=units), ""

    async def _go_on(self, living: Sequence[Seen], folio: Folio) -> None:
        commands: list[AnyCommand] = []
        for run in living:
            lien = folio.of(run)
            if lien is None:
                continue
            if _moved(run, lien):
                commands += billing.never_began(lien, cluster=run.key.cluster)
                continue
            due = await self._changed(run, lien)
            commands += billing.go_on(run, lien, due, ref=lien.run or folio.ref(run), stamp=self._bank.stamp())
        await self.teller.do(commands)

    async def _changed(self, run: Seen, lien: LienView) -> Due | None:
        """Return what a run may need at most; None: as much as when it was last priced, or nobody can tell."""
        if run.state not in {"pending", "held"}:
            due = self._due(run)
            found = due if isinstance(due, Due) else None
            what: tuple[object, ...] = ("runs", found.amount_micro_su if found else 0)
            # A raise that was not covered is not tried again and again: only the journal would grow.
            tried = lien.state == "active" and self._priced.get(lien.id) == what
            self._priced[lien.id] = what
            return None if tried else found
        what = ("waits", run.key.job_id, run.partitions, run.limit_s, run.qos)
        if self._priced.get(lien.id) == what:
            return None
        _, inputs = await asyncio.to_thread(runs.last_command, self._bank.ledger.store, lien.id)
        request = msgspec.convert(inputs["request"], Request) if "request" in inputs else billing.asked(run)
        limit = "unlimited" if run.limit_s is None else run.limit_s
        qos = (run.qos,) if run.qos else ()
        due = self._quoted(msgspec.structs.replace(request, partitions=run.partitions, time_limit=limit, qos=qos))
        self._priced[lien.id] = what
        return due if isinstance(due, Due) else None

    def _due(self, run: Seen) -> Due | NoPrice | NoBound | None:
        if run.state in {"pending", "held"}:
            return self._quoted(billing.asked(run))
        return billing.needed(run, book=self._bank.book, cluster=self._bank.cluster, now_s=time.time())

    def _quoted(self, request: Request) -> Due | NoPrice | NoBound:
        found = self._bank.quote([request])
        if isinstance(found, NoPrice | NoBound):
            return found
        component = found.components[0]
        inputs = {"request": msgspec.to_builtins(request)}
        return Due(component.task_micro_su, component.priced.version_number, inputs)

    async def _release(self, living: Sequence[Seen], folio: Folio) -> None:
        """Let jobs go that waited for the bank and have their lien now."""
        for run in living:
            if not run.held_for_us or (lien := folio.of(run)) is None or lien.state not in OPEN:
                continue
            try:
                await self._bank.slurm.release(run.key.job_id, mark_of(run.token, before=run.mark))
            except CarrelError as error:
                self.teller.park(f"release of job {run.key.job_id}", str(error))


def _moved(run: Seen, lien: LienView) -> bool:
    """Tell whether a waiting job has another account than its lien."""
    return run.state in {"pending", "held"} and lien.state == "bound" and run.account not in {"", lien.project}


def _fresh(run: Seen, answer: Receipt, *, token: str, project: str, units: int) -> LienView:
    """Return the lien that was just placed, without asking the database for it."""
    return LienView(
        id=answer.lien,
        cluster=run.key.cluster,
        token=token,
        run="",
        job_id=0,
        project=project,
        user=run.user,
        state="unbound",
        units=units,
        lien_micro_su=answer.amount_micro_su,
        charged_micro_su=0,
        refunded_micro_su=0,
        expires_s=None,
        flags=(),
    )
