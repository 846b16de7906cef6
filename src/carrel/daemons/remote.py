"""A site whose bank is a myBRC: it is asked before a job gets its lien, and told what the ledger's journal says.

The ledger goes on as ever, with accounts that have no bottom: it knows each run, charges it once, and is there when the
other bank is not. Reports follow its journal into a queue on the disk; killed at any point, they follow again from
where the queue says.
"""

import asyncio
import os
import pwd
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carrel.bank import runs
from carrel.bank.mybrc import Flushed, MybrcBank
from carrel.config import Bank as Settings
from carrel.core import imports, mybrc_report
from carrel.daemons import prices
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.ledger import AnyCommand, OpenAllocation, OpenProject
from carrel.model.money import MOST_MICRO_SU, format_su
from carrel.ports import Store

QUESTIONS = 8
"""Asked at once, at most. Beyond it nobody waits for a bank that does not answer: that is silence."""


class Remote:
    """The other bank, its queue, and what of it is switched on."""

    def __init__(self, settings: Settings, store: Store) -> None:
        """Read its file; the bank itself is asked later.

        Raises:
            CarrelError: the file cannot be read, others may read its token, or the settings do not fit together.
        """
        if settings.offline == "open":
            raise CarrelError('bank.offline = "open" takes jobs on what our own ledger holds; give "closed" or "hold"')
        file = Path(settings.remote.config)
        self.switches = imports.mybrc(prices.text(file), where=str(file))
        self._settings, self._store = settings, store
        queue = Path(settings.dir) / "mybrc.db"
        queue.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        deadline_s = settings.deadline_ms / 1000
        self.bank = MybrcBank(url=self.switches.url, token=self._token(file), queue=queue, answer_s=deadline_s)
        if self.bank.mark is None:
            self.bank.mark_at(runs.last_seq(store))  # what went before was another bank's
        self._threads = ThreadPoolExecutor(QUESTIONS, thread_name_prefix="mybrc")
        self._free = threading.BoundedSemaphore(QUESTIONS)
        self._queue = threading.Lock()
        self._uids: dict[str, int] = {}
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By account: two that ask at once would each hear nothing of the other's job."""

    def _token(self, file: Path) -> str:
        if not self._settings.remote.token_file:
            _secret(file)
            return self.switches.token
        token_file = Path(self._settings.remote.token_file)
        token = prices.text(token_file).strip()
        _secret(token_file)
        return token if " " in token else f"Token {token}"

    async def denial(self, amount_micro_su: int, *, user: str, account: str, cluster: str) -> str:
        """Return why a job may not be submitted; empty: it may.

        Raises:
            UnreachableError: the bank did not answer.
            RefusedError: it does not take our token, or nobody knows the user.
        """
        if not self.switches.at_submit:
            return ""
        waiting = 0
        if self._settings.remote.count_waiting:
            waiting = await asyncio.to_thread(runs.waiting_micro_su, self._store, cluster=cluster, project=account)
        uid = await asyncio.to_thread(self._uid, user)
        if not self._free.acquire(blocking=False):
            raise UnreachableError(f"{QUESTIONS} questions wait for the bank already; is it slow?")
        asked = self._threads.submit(self.bank.can_submit, amount_micro_su + waiting, uid=uid, account=account)
        asked.add_done_callback(lambda _: self._free.release())
        decision = await asyncio.wrap_future(asked)
        if decision.allowed:
            return ""
        with_it = f", with {format_su(waiting)} SU for jobs that wait" if waiting else ""
        return f"{decision.message} (this job may need {format_su(amount_micro_su)} SU{with_it})"

    def tell(self, cluster: str) -> Flushed:
        """Put what the journal has that is new into the queue, and send what is there. Blocks."""
        with self._queue:
            self._gather(cluster)
            return self.bank.flush()

    def _gather(self, cluster: str) -> None:
        mark = self.bank.mark or 0
        while True:
            reached, found = runs.changed(self._store, cluster=cluster, after=mark)
            for lien, inputs in found:
                try:
                    job = mybrc_report.report(lien, inputs, uid=self._uid(lien.user))
                except RefusedError as error:
                    self.bank.park(f"run {lien.run} of user '{lien.user}'", str(error))
                    continue
                if job is not None and job.enddate is None and self.switches.at_start:
                    self.bank.report_start(job, mybrc_report.amount(lien), run=lien.run)
                if job is not None and job.enddate is not None and self.switches.at_end:
                    self.bank.report(job, mybrc_report.amount(lien), run=lien.run)
            if reached == mark:
                return
            # After the reports: killed in between, they are made again, and say the same.
            self.bank.mark_at(reached)
            mark = reached

    def close(self) -> None:
        """Let go of the queue, when whoever sends has ended."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._queue:
            self.bank.close()

    def _uid(self, user: str) -> int:
        if user not in self._uids:
            try:
                self._uids[user] = pwd.getpwnam(user).pw_uid
            except KeyError as error:
                raise RefusedError(f"this host knows no user '{user}'; see: getent passwd {user}") from error
        return self._uids[user]


def opening(account: str) -> list[AnyCommand]:
    """Return what makes the ledger note an account of the other bank; a second time, it changes nothing."""
    name = f"mybrc/{account}"
    return [
        OpenProject(key=f"mybrc/p/{account}", actor="carrelctld", project=account),
        OpenAllocation(
            key=f"mybrc/a/{account}",
            actor="carrelctld",
            allocation=name,
            project=account,
            credit_micro_su=MOST_MICRO_SU,
        ),
    ]


def _secret(file: Path) -> None:
    """Refuse a file with a token in it that others may read."""
    found = file.stat()
    if found.st_mode & 0o077 or found.st_uid not in {0, os.geteuid()}:
        mode = f"{found.st_mode & 0o777:o}"
        raise CarrelError(
            f"{file}: owned by uid {found.st_uid} with mode {mode}, so others have the token; chmod 600 it"
        )
