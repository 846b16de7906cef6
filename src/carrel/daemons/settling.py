"""Settling: what ended is charged, once, as Slurm's accounting says; what nobody knows the end of waits for a person.

Where there is no slurmdbd, slurmctld's own memory of ended jobs (``MinJobAge``) takes its place.
"""

import asyncio
import logging
import re
import time
from collections.abc import Iterable, Sequence

import msgspec

from carrel.bank import runs
from carrel.config import Slurm
from carrel.core import billing
from carrel.core.billing import CHARGED, Due
from carrel.core.folio import Folio, Name, name_of
from carrel.daemons.banking import Bank
from carrel.daemons.teller import Teller
from carrel.model.ledger import AnyCommand, Correct, LienView, Refund
from carrel.model.price import NoPrice
from carrel.model.run import Seen, Used
from carrel.slurm import accounting
from carrel.slurm.accounting import Records

_LOG = logging.getLogger("carrelctld.bank")


class Reconciled(msgspec.Struct, kw_only=True):
    """What a comparison of the ledger with the accounting found."""

    from_s: int
    matched: int = 0
    created: int = 0
    """Charged now: nobody had set money aside, or the end was not known."""
    corrected: int = 0
    parked: int = 0


class Settling:
    """Charges what ended."""

    def __init__(self, bank: Bank, slurm: Slurm, teller: Teller) -> None:
        """Know nothing yet."""
        self._bank, self._slurm, self._teller = bank, slurm, teller
        self._done: set[Name] = set()
        """Runs that need nothing more, as long as the queue shows them."""
        self._seen: dict[Name, Seen] = {}
        """Runs with an open lien, as they were last seen alive."""
        self._missing_since_s: dict[int, float] = {}

    def done(self, run: Seen) -> bool:
        return _name(run) in self._done

    async def settle(self, seen: Sequence[Seen], folio: Folio) -> None:
        """Charge what ended, free what never began, and count how long the rest is missing."""
        here = {_name(run) for run in seen}
        self._remember(seen, folio)
        ended = [run for run in seen if run.over and not self.done(run)]
        await self._teller.do(self._never_began(ended, folio))
        missing = [lien for lien in folio.open.values() if lien.run and name_of(lien.run) not in here]
        idle = _idle_arrays(seen, folio)
        records = await self._records(ended, missing, idle, seen)
        await self.charge(records.ended, folio)
        self._unreadable(records)
        await self._teller.do(self._leftover(idle, ended))
        await self._teller.do(self._gone(missing, records))

    async def recall(self, ended: Iterable[Seen | Used], folio: Folio) -> None:
        """Have in the folio what these runs were charged before."""
        strange = [run for run in ended if (lien := folio.of(run)) is None or not lien.run]
        ids = {run.key.job_id if isinstance(run, Seen) else run.job_id for run in strange}
        name, store = self._bank.cluster_name, self._bank.ledger.store
        for lien in await asyncio.to_thread(runs.liens_of_runs, store, ids, cluster=name) if ids else ():
            folio.add(lien)

    async def charge(self, ended: Iterable[Used], folio: Folio) -> int:
        """Charge these runs where they are not charged yet; return how many were."""
        ended = list(ended)
        await self.recall([used for used in ended if (used.job_id, used.submit_s) not in self._done], folio)
        plans: list[tuple[Name, tuple[AnyCommand, ...]]] = []
        owed, unpaid = self._teller.owed(), set[Name]()
        for used in ended:
            name = (used.job_id, used.submit_s)
            lien = folio.of(used)
            if name in self._done or self._not_ours(used, lien):
                self._done.add(name)
            elif due := self._due(used):
                plans.append((name, await self._plan(used, lien, due, folio, again=name in owed)))
            else:
                unpaid.add(name)
        answers = await self._teller.do([command for _, commands in plans for command in commands])
        at = 0
        for name, commands in plans:
            if self._teller.all_done(answers[at : at + len(commands)]):
                self._done.add(name)
            else:
                unpaid.add(name)
            at += len(commands)
        self._teller.paid({(used.job_id, used.submit_s) for used in ended} - unpaid)
        return sum(1 for _, commands in plans if commands)

    async def reconcile(self, from_s: int) -> Reconciled:
        """Compare all that ended since with the ledger: charge what was missed, correct what was not known better.

        Raises:
            UnreachableError: slurmdbd or the ledger did not answer.
        """
        records = await accounting.since(self._slurm, from_s)
        here = {used.job_id for used in records.ended}
        if late_ids := {job_id for job_id, _ in self._teller.owed()} - here:
            more = await accounting.of_jobs(self._slurm, late_ids)
            records.ended.extend(more.ended)
            records.broken.extend(more.broken)
        found = Reconciled(from_s=from_s)
        name, store = self._bank.cluster_name, self._bank.ledger.store
        folio = Folio(await asyncio.to_thread(runs.open_liens, store, cluster=name))
        await self.recall(records.ended, folio)
        self._done -= {(used.job_id, used.submit_s) for used in records.ended}
        known = [used for used in records.ended if (lien := folio.of(used)) is not None and lien.state in CHARGED]
        found.corrected = await self.charge(known, folio)
        found.matched = len(known) - found.corrected
        names = {(used.job_id, used.submit_s) for used in known}
        late = [used for used in records.ended if (used.job_id, used.submit_s) not in names]
        found.created = await self.charge(late, folio)
        self._unreadable(records)
        found.parked = len(self._teller.owed())
        return found

    def _unreadable(self, records: Records) -> None:
        """Park lines whose job can be told; of such a line no submission is known, and 0 stands for it."""
        jobs = {line: int(job[1]) if (job := _JOB.match(line)) else 0 for line in records.broken}
        for line, job_id in jobs.items():
            self._teller.park(line, "sacct's line cannot be read", run=(job_id, 0))
        self._teller.paid({(used.job_id, 0) for used in records.ended if used.job_id not in jobs.values()})

    async def _afterwards(self, used: Used, lien: LienView, due: Due) -> tuple[AnyCommand, ...]:
        """Return what a run that was charged still needs: a correction, or the refund that a kill came before."""
        if commands := await self._correction(used, lien, due):
            return commands
        if lien.state != "settled" or lien.charged_micro_su != due.amount_micro_su:
            return ()
        rules = self._bank.settings.refund_percent
        return billing.given_back(used, due, rules, cluster=self._bank.cluster_name, ref=lien.run)

    async def _correction(self, used: Used, lien: LienView, due: Due) -> tuple[AnyCommand, ...]:
        """Return what charges anew a run of which more is known now than when it was charged.

        After a crash slurmctld may run a job again that had ended; slurmdbd then has its second life in place of the
        first. A person's word stands, and so does a charge by prices that were in force.
        """
        if due.amount_micro_su == lien.charged_micro_su:
            return ()
        actor, inputs = await asyncio.to_thread(runs.last_command, self._bank.ledger.store, lien.id)
        what = ("seconds", "resources", "partition", "qos")
        if actor != billing.ACTOR or all(inputs.get(name) == due.inputs[name] for name in what):
            return ()
        return (
            Correct(
                key=f"c/{self._bank.cluster_name}/{lien.run}/{self._bank.stamp()}",
                actor=billing.ACTOR,
                cluster=self._bank.cluster_name,
                run=lien.run,
                amount_micro_su=due.amount_micro_su,
                reason=f"{used.source} says {used.elapsed_s} s now",
                price_version=due.version,
                inputs=due.inputs,
            ),
        )

    def _remember(self, seen: Sequence[Seen], folio: Folio) -> None:
        open_runs = {name for lien in folio.open.values() if (name := name_of(lien.run))}
        self._seen |= {_name(run): run for run in seen if not run.over and _name(run) in open_runs}
        self._seen = {name: run for name, run in self._seen.items() if name in open_runs}
        # After a crash slurmctld may take a run for alive whose end it has forgotten.
        self._done &= {_name(run) for run in seen if run.over}

    def _never_began(self, ended: Sequence[Seen], folio: Folio) -> list[AnyCommand]:
        found: list[AnyCommand] = []
        for run in ended:
            if run.placed or run.elapsed_s:
                continue
            lien = folio.of(run)
            if lien is not None and (lien.run or not run.array_job_id):
                found += billing.never_began(lien, cluster=run.key.cluster)
            self._done.add(_name(run))
        return found

    async def _records(
        self, ended: Sequence[Seen], missing: Sequence[LienView], idle: dict[int, LienView], seen: Sequence[Seen]
    ) -> Records:
        ended = [run for run in ended if not self.done(run)]
        if not self._bank.accounted:
            gone_on = {run.key.job_id: run for run in seen if run.key.restart}
            requeued = [self._requeued(lien, gone_on.get(lien.job_id)) for lien in missing]
            return Records([*map(_as_accounted, ended), *filter(None, requeued)], set(), [])
        ids = {run.key.job_id for run in ended} | {lien.job_id for lien in missing} | idle.keys()
        return await accounting.of_jobs(self._slurm, ids) if ids else Records([], set(), [])

    def _requeued(self, lien: LienView, following: Seen | None) -> Used | None:
        """Return what a run used that slurmctld forgot when it was requeued: it ended when the next was submitted."""
        last = self._seen.get(name_of(lien.run) or (0, 0))
        if last is None or following is None or not last.start_s or following.key.submit_s < last.start_s:
            return None
        used = _as_accounted(last)
        elapsed_s = min(following.key.submit_s - last.start_s, last.elapsed_s + _SLACK_S)
        return msgspec.structs.replace(used, state="REQUEUED", end_s=following.key.submit_s, elapsed_s=elapsed_s)

    async def _plan(
        self, used: Used, lien: LienView | None, due: Due, folio: Folio, *, again: bool
    ) -> tuple[AnyCommand, ...]:
        if lien is not None and lien.state in CHARGED:
            return await self._afterwards(used, lien, due)
        used = msgspec.structs.replace(used, account=used.account or self._bank.settings.default_account)
        if lien is None:
            await self._bank.know(used.account)
        commands = billing.end(
            used,
            lien,
            due,
            self._bank.settings.refund_percent,
            cluster=self._bank.cluster_name,
            ref=lien.run if lien is not None and lien.run else folio.ref(used),
        )
        if not again:
            return commands
        # The ledger remembers a refusal under its key. A run is charged once whatever the keys, but refunds add up.
        stamp = self._bank.stamp()
        return tuple(
            command if isinstance(command, Refund) else msgspec.structs.replace(command, key=f"{command.key}/{stamp}")
            for command in commands
        )

    def _due(self, used: Used) -> Due | None:
        due = billing.charge(used, book=self._bank.book)
        if isinstance(due, NoPrice):
            name = used.job_id, used.submit_s
            self._teller.park(f"run {used.job_id}.{used.submit_s}", due.reason, run=name)
            return None
        return due

    def _not_ours(self, used: Used, lien: LienView | None) -> bool:
        """Tell whether a run costs nothing: it never began, or is older than the bank."""
        return lien is None and (not used.elapsed_s or used.submit_s < self._bank.since_s)

    def _leftover(self, idle: dict[int, LienView], ended: Sequence[Seen]) -> list[AnyCommand]:
        """Free what is left of arrays of which no task waits, unless a task that ended still needs its unit."""
        needing = {run.array_job_id for run in ended if not self.done(run)}
        return [
            command
            for job_id, lien in idle.items()
            if job_id not in needing
            for command in billing.never_began(lien, cluster=self._bank.cluster_name)
        ]

    def _gone(self, missing: Sequence[LienView], records: Records) -> list[AnyCommand]:
        now_s = time.monotonic()
        lost = [lien for lien in missing if (name := name_of(lien.run)) and name not in self._done]
        self._missing_since_s = {lien.id: self._missing_since_s.get(lien.id, now_s) for lien in lost}
        found: list[AnyCommand] = []
        for lien in lost:
            name = name_of(lien.run) or (0, 0)
            # What the accounting takes for running is a runaway: it is listed, and never settled by itself.
            last = None if name in records.going else self._seen.get(name)
            due = self._due(msgspec.structs.replace(_as_accounted(last), source="last_seen")) if last else None
            unknown_for_s = now_s - self._missing_since_s[lien.id]
            found += billing.gone(lien, due, cluster=self._bank.cluster_name, unknown_for_s=unknown_for_s)
        return found


_JOB = re.compile(r"(?:job )?(\d+)\b")
_SLACK_S = 5
"""A run that was seen went on for this long at most before the next look."""


def _idle_arrays(seen: Sequence[Seen], folio: Folio) -> dict[int, LienView]:
    """Return the arrays' liens of which no task waits any more."""
    waiting = {run.array_job_id for run in seen if run.waiting_tasks}
    return {job_id: lien for job_id, lien in folio.arrays().items() if job_id not in waiting}


def _name(run: Seen) -> Name:
    return run.key.job_id, run.key.submit_s


def _as_accounted(run: Seen) -> Used:
    """Return what slurmctld says of a run, in the form of slurmdbd."""
    return Used(
        job_id=run.key.job_id,
        submit_s=run.key.submit_s,
        restart=run.key.restart,
        array_job_id=run.array_job_id,
        state=run.slurm_state,
        user=run.user,
        account=run.account,
        partition=run.partitions[0],
        qos=run.qos,
        resources=run.resources,
        start_s=run.start_s,
        end_s=run.end_s or run.start_s,
        elapsed_s=run.elapsed_s,
        mark=run.mark,
        source="slurmctld",
    )
