"""What clients of the myBRC API ask and tell, done in our ledger: a question sets money aside, a report charges.

The old plug-ins take every answer but a 2xx for *yes*. So each ordinary denial is an answer, and money is set aside
with the question: a hundred jobs that ask at once do not share one balance. The lien has 120 s to see its job start;
a job that waits longer is given a new one at its start, which nobody can refuse any more.
"""

import asyncio
import time
import uuid
from typing import Any

from carrel.bank import mybrc_jobs, queries
from carrel.bank.mybrc_jobs import Record
from carrel.core import mybrc
from carrel.core.mybrc import BadCostError, BadJobError, MybrcJob
from carrel.daemons.callers import name_of, uid_named
from carrel.daemons.desk import Desk
from carrel.model.access import Person
from carrel.model.ledger import (
    AnyCommand,
    Backfill,
    Balance,
    Bind,
    Budget,
    Correct,
    LienView,
    Place,
    Receipt,
    Refusal,
    Settle,
    Start,
)

OPEN = frozenset({"bound", "active", "unknown_end"})
CHARGED = frozenset({"settled", "part_refunded", "refunded"})
JOB_ID_MAX = 2**32


class Decision:
    """An answer to ``can_submit_job``."""

    def __init__(self, message: str, *, success: bool = False, status: int = 200) -> None:
        """Keep it."""
        self.message = message
        self.success = success
        self.status = status


class MybrcDesk:
    """Answers clients of the myBRC API."""

    def __init__(self, desk: Desk) -> None:
        """Stand beside the bank's own desk."""
        self.desk = desk
        self.settings = desk.bank.settings.mybrc
        self._reporting = asyncio.Lock()

    async def can_submit(self, person: Person, job_cost: str, user_id: str, account: str) -> Decision:
        """Decide whether a job may be submitted, and set its cost aside where it may."""
        if self.settings.allow_all:
            return Decision(mybrc.ACCEPTED.format(cost=job_cost), success=True)
        try:
            cost_micro_su = mybrc.cost(job_cost)
        except BadCostError as error:
            return Decision(str(error), status=400)
        for name, value in (("user_id", user_id), ("account_id", account)):
            if not value.strip():
                return Decision(f"{name} {value.strip()} is not a nonempty string.", status=400)
        user = user_of(user_id)
        if user is None:
            return Decision(mybrc.NO_USER.format(user_id=user_id), status=400)
        budgets = await self.desk.read(queries.budgets)
        if not any(one.project == account for one in budgets if not one.user):
            return Decision(mybrc.NO_ACCOUNT.format(account=account), status=400)
        return await self._decided(person, job_cost, cost_micro_su, user=user, account=account, budgets=budgets)

    async def _decided(
        self, person: Person, job_cost: str, cost_micro_su: int, *, user: str, account: str, budgets: list[Budget]
    ) -> Decision:
        words = {"cost": job_cost, "user": user, "account": account}
        slurm = person.associations
        if slurm is not None and user not in slurm.users.get(account, frozenset()):
            return Decision(mybrc.NOT_A_MEMBER.format(**words))
        yes = Decision(mybrc.ACCEPTED.format(**words), success=True)
        if self.settings.unlimited_prefixes and account.startswith(self.settings.unlimited_prefixes):
            return yes
        valid = _valid(await self.desk.read(queries.balances, project=account))
        if not valid:
            return Decision(mybrc.NO_ALLOCATION.format(**words))
        own = next((one for one in budgets if (one.project, one.user) == (account, user)), None)
        if own is not None and own.cap_micro_su == 0:
            return Decision(mybrc.NOT_ACTIVE.format(**words))
        refusal = await self._set_aside(person, cost_micro_su, user, account)
        if refusal is None:
            return yes
        used, most = _figures(refusal, valid, own, [one for one in budgets if not one.user], account)
        text = mybrc.OVER_USER if refusal.why == "user_cap" else mybrc.OVER_ACCOUNT
        return Decision(text.format(**words, used=mybrc.decimal_text(used), most=mybrc.decimal_text(most)))

    async def _set_aside(self, person: Person, amount: int, user: str, account: str) -> Refusal | None:
        token = f"mybrc-{uuid.uuid4().hex}"
        place = Place(
            key=f"l/{self.settings.cluster}/{token}/0",
            actor=person.actor,
            cluster=self.settings.cluster,
            token=token,
            project=account,
            user=user,
            amount_micro_su=amount,
            inputs={"mybrc": "can_submit_job"},
        )
        answer = await self.desk.ledger.do(place)
        return answer if isinstance(answer, Refusal) else None

    async def report(self, person: Person, said: MybrcJob) -> Record:
        """Take what a client says of a job: what began has a lien, what ended is charged. Again: nothing changes.

        Raises:
            BadJobError: it is of nobody whom we know, or cannot be what it says.
        """
        user = user_of(said.userid)
        if user is None:
            raise BadJobError({"userid": [mybrc.NO_USER.format(user_id=said.userid)]})
        # One at a time: what is known of a job is read, added to, and written.
        async with self._reporting:
            before = await self.desk.read(mybrc_jobs.find, jobslurmid=said.jobslurmid)
            job = said if before is None else _together(before.job, said)
            runs = dict(before.runs) if before else {}
            cost_micro_su = await self._money(person, job, user)
            if cost_micro_su is not None:
                runs[job.run] = cost_micro_su
            record = Record(job=job, user=user, runs=runs, version=before.version if before else 0)
            await self.desk.read(mybrc_jobs.put, record=record)
        return record

    async def _money(self, person: Person, job: MybrcJob, user: str) -> int | None:
        """Bring the run's money to where the job is, and return what it costs; None: nothing of it moves."""
        if job.startdate is None:
            return None
        cluster = self.settings.cluster
        lien = await self.desk.read(queries.lien, cluster=cluster, run=job.run)
        amount = mybrc.micro_su(job.amount) if job.amount is not None else lien.lien_micro_su if lien else 0
        if not job.ended:
            if lien is None:
                await self._bind(person, job, user, amount)
                lien = await self.desk.read(queries.lien, cluster=cluster, run=job.run)
            if lien is not None and lien.state in OPEN and (lien.state, lien.lien_micro_su) != ("active", amount):
                await self._done(
                    Start(
                        key=f"mybrc/s/{job.run}/{await self._last(lien)}",
                        actor=person.actor,
                        cluster=cluster,
                        run=job.run,
                        amount_micro_su=amount,
                        # It runs already; the old plug-ins could not stop it either.
                        if_short="overdraw",
                        inputs={"mybrc": "start"},
                    )
                )
            return amount if lien is None or lien.state not in CHARGED else lien.charged_micro_su
        await self._end(person, job, user, lien, amount)
        return amount

    async def _end(self, person: Person, job: MybrcJob, user: str, lien: LienView | None, amount: int) -> None:
        common: dict[str, Any] = {"actor": person.actor, "cluster": self.settings.cluster, "run": job.run}
        common["amount_micro_su"] = amount
        if lien is None:
            await self._done(
                Backfill(
                    key=f"mybrc/e/{job.run}",
                    project=job.accountid,
                    user=user,
                    job_id=_number(job.jobslurmid),
                    inputs={"mybrc": "end"},
                    **common,
                )
            )
        elif lien.state in OPEN:
            await self._done(Settle(key=f"mybrc/e/{job.run}", inputs={"mybrc": "end"}, **common))
        elif lien.state in CHARGED and lien.charged_micro_su != amount:
            key = f"mybrc/c/{job.run}/{await self._last(lien)}"
            await self._done(Correct(key=key, reason="the client of myBRC said another amount", **common))

    async def _bind(self, person: Person, job: MybrcJob, user: str, amount: int) -> None:
        """Give the run the lien that its question placed, or one of its own."""
        cluster = self.settings.cluster
        found = await self.desk.read(queries.latest, project=job.accountid, user=user, states=("unbound",))
        waiting = [one for one in reversed(found) if one.cluster == cluster]
        waiting.sort(key=lambda one: one.lien_micro_su != amount)
        for token in [*(one.token for one in waiting), f"mybrc-{job.run}"]:
            common: dict[str, Any] = {"actor": person.actor, "cluster": cluster, "token": token, "user": user}
            if token == f"mybrc-{job.run}":
                await self._done(
                    Place(key=f"l/{cluster}/{token}/0", project=job.accountid, amount_micro_su=0, **common)
                )
            bind = Bind(key=f"b/{cluster}/{token}/{job.run}", job_id=_number(job.jobslurmid), run=job.run, **common)
            if isinstance(await self.desk.ledger.do(bind), Receipt):
                return

    async def _done(self, command: AnyCommand) -> None:
        answer = await self.desk.ledger.do(command)
        if isinstance(answer, Refusal):
            raise BadJobError({"accountid" if answer.why == "unknown" else "non_field_errors": [answer.sentence]})

    async def _last(self, lien: LienView) -> int:
        """Return the number of the last thing done to a lien: the same request again has the same key, and only it."""
        return (await self.desk.read(queries.history, lien_id=lien.id))[-1].seq


def _together(before: MybrcJob, said: MybrcJob) -> MybrcJob:
    """Return what is known of a job now.

    Raises:
        BadJobError: it would belong to somebody else.
    """
    found = mybrc.merged(before, said)
    if said.startdate is not None and before.run != said.run:
        # Requeued, it begins anew: what its last run said of its end is not this one's.
        return said
    # A start that comes after the end is late, and tells nothing.
    return before if before.ended and not said.ended else found


def user_of(user_id: str) -> str | None:
    """Return the name of a cluster's UID; None: this host knows none."""
    if not user_id.isascii() or not user_id.isdigit() or len(user_id) > 10:
        return None
    name = name_of(int(user_id))
    return name if uid_named(name) is not None else None


def _valid(balances: list[Balance]) -> list[Balance]:
    now_s = int(time.time())
    return [one for one in balances if one.start_s <= now_s and (one.end_s is None or now_s < one.end_s)]


def _figures(
    refusal: Refusal, valid: list[Balance], own: Budget | None, projects: list[Budget], account: str
) -> tuple[int, int]:
    """Return what is used and what there is at most, of that which stood in the way."""
    if refusal.why == "user_cap" and own is not None:
        return own.committed_micro_su, own.cap_micro_su or 0
    if refusal.why == "project_cap":
        above = {one.project: one for one in projects}
        node = above.get(account)
        while node is not None:
            if node.cap_micro_su is not None and node.committed_micro_su + refusal.needed_micro_su > node.cap_micro_su:
                return node.committed_micro_su, node.cap_micro_su
            node = above.get(node.parent)
    used = sum(one.lien_micro_su + one.spent_micro_su for one in valid)
    return used, used + sum(one.available_micro_su + one.credit_micro_su for one in valid)


def _number(jobslurmid: str) -> int:
    head = jobslurmid.partition("_")[0]
    return int(head) if head.isascii() and head.isdigit() and int(head) <= JOB_ID_MAX else 0
