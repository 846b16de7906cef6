"""A bank that speaks myBRC, and is not ours: asked before a job runs, told what it used until it has heard it.

A question is asked once and answered now. A report is written to a queue on the disk first, and sent until the bank
takes it, in order for each job; one that it will never take is put aside, with its words, and holds up no other.
An end is a PUT: it creates what is absent, so that a lost POST does not matter. A start is a POST, and the first one of
its job id only: a PUT without an end would change that bank's amount and not what it counts as used. It keeps one
amount for a job id, so runs of a requeued job are added up here.
"""

import http.client
import sqlite3
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from carrel.core import mybrc
from carrel.core.imports import Mybrc
from carrel.core.mybrc import AMOUNT_MAX, MybrcJob
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.money import MICRO_SU_PER_SU, format_su

ANSWER_MAX_BYTES = 1 << 20
TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS report (number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, method TEXT NOT NULL,
body TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS parked (number INTEGER PRIMARY KEY, body TEXT NOT NULL, why TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS run (job TEXT NOT NULL, run TEXT NOT NULL, amount INTEGER NOT NULL, PRIMARY KEY (job, run))
STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mark (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL) STRICT;
"""


class Decision(NamedTuple):
    """Whether a job may be submitted, in the bank's words."""

    allowed: bool
    message: str


class Flushed(NamedTuple):
    """What became of the queue."""

    sent: int
    left: int
    parked: int
    problem: str
    """Why the rest is left; empty: nothing is."""


class _Answer(NamedTuple):
    status: int
    body: Any


class MybrcBank:
    """Blocks for as long as the bank takes, five seconds at most for each request: call it beside the loop."""

    def __init__(
        self, *, url: str, token: str, queue: Path, timeout_s: float = TIMEOUT_S, answer_s: float = TIMEOUT_S
    ) -> None:
        """Open the queue; the bank itself is asked later.

        Args:
            url: Of the API, as ``https://bank.example.org/api``.
            token: As it is sent, with the word ``Token``.
            queue: File of the reports that the bank has not taken yet.
            timeout_s: For one request.
            answer_s: For one question, where that is less.

        Raises:
            CarrelError: the address is none, or the queue cannot be opened.
        """
        self._where = urlsplit(url)
        if self._where.scheme not in ("http", "https") or not self._where.hostname:
            raise CarrelError(f"API.url = '{url}': give http://host:port/path or https://…")
        self._url = url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        self._answer_s = min(answer_s, timeout_s)
        try:
            self._queue = sqlite3.connect(queue, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):
                self._queue.execute(f"PRAGMA {pragma}")
            self._queue.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise CarrelError(f"{queue}: {error}; is its directory there, and writable?") from error

    @classmethod
    def configured(cls, found: Mybrc, *, queue: Path) -> "MybrcBank":
        """Return the bank that a ``bank-config.toml`` names."""
        return cls(url=found.url, token=found.token, queue=queue)

    def close(self) -> None:
        self._queue.close()

    def can_submit(self, amount_micro_su: int, *, uid: int, account: str) -> Decision:
        """Ask whether a job may be submitted. What costs nothing is not asked.

        Raises:
            UnreachableError: the bank did not answer, or failed: the site's offline policy decides.
            RefusedError: it does not know our token, or has no such address: that is no outage.
        """
        if amount_micro_su <= 0:
            return Decision(allowed=True, message="the job costs nothing")
        cost = mybrc.decimal_text(amount_micro_su, up=True)
        if not mybrc.fits(cost):
            return Decision(
                allowed=False,
                message=f"this job may need {format_su(amount_micro_su)} SU, more than the bank can be asked for",
            )
        path = f"/can_submit_job/{cost}/{uid}/{quote(account, safe='')}/"
        answer = self._ask("GET", path, timeout_s=self._answer_s)
        if answer.status not in (200, 400):
            raise self._failure(answer, "GET", path)
        body = answer.body if isinstance(answer.body, dict) else {}
        message = str(body.get("message") or "the bank gave no reason")
        # The old plug-ins took a 400 for yes; it says that the user or the account does not exist.
        return Decision(allowed=answer.status == 200 and body.get("success") is True, message=message)

    @property
    def mark(self) -> int | None:
        """Up to where the ledger's journal was read into the queue; None: the queue is new."""
        return next((int(seq) for (seq,) in self._queue.execute("SELECT seq FROM mark")), None)

    def mark_at(self, seq: int) -> None:
        self._queue.execute("INSERT INTO mark VALUES (1, ?) ON CONFLICT DO UPDATE SET seq = excluded.seq", (seq,))

    def report_start(self, job: MybrcJob, amount_micro_su: int, *, run: str = "") -> None:
        """Have the bank told that a job began, some time. Told again, or of a later run of it, nothing happens."""
        with self._transaction():
            known = self._queue.execute("SELECT 1 FROM run WHERE job = ?", (job.jobslurmid,)).fetchone()
            if known is None:
                amounts = (job.jobslurmid, run or job.run, amount_micro_su)
                self._queue.execute("INSERT INTO run VALUES (?, ?, ?)", amounts)
                self._put("POST", job, amount_micro_su)

    def report(self, job: MybrcJob, amount_micro_su: int, *, run: str = "") -> None:
        """Have the bank told of a run, some time: when this returns, the report is on the disk.

        Told again with another amount, the last one counts. ``run``: what tells it from other runs of the job; by
        default its start.
        """
        with self._transaction():
            self._queue.execute(
                "INSERT INTO run VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET amount = excluded.amount",
                (job.jobslurmid, run or job.run, amount_micro_su),
            )
            total = "SELECT sum(amount) FROM run WHERE job = ?"
            ((amount,),) = self._queue.execute(total, (job.jobslurmid,))
            # What waits for the same job says less than this does.
            self._queue.execute("DELETE FROM report WHERE job = ?", (job.jobslurmid,))
            self._put("PUT", job, amount)

    def _put(self, method: str, job: MybrcJob, amount_micro_su: int) -> None:
        body = msgspec.json.encode(mybrc.shown(job, amount_micro_su)).decode()
        insert = "INSERT INTO report (job, method, body) VALUES (?, ?, ?)"
        self._queue.execute(insert, (job.jobslurmid, method, body))

    def flush(self) -> Flushed:
        """Send what waits, the oldest first, and say what is left. Killed between two, one is sent a second time."""
        sent, problem = 0, ""
        waiting = list(self._queue.execute("SELECT number, job, method, body FROM report ORDER BY number"))
        for number, job, method, body in waiting:
            try:
                why = self._send(method, job, body)
            except CarrelError as error:
                problem = str(error)
                break
            with self._transaction():
                if why:
                    self.park(body, why)
                # Only this one: a newer report of the job may have come meanwhile.
                self._queue.execute("DELETE FROM report WHERE number = ?", (number,))
            sent += not why
        ((left, parked),) = self._queue.execute("SELECT (SELECT count(*) FROM report), (SELECT count(*) FROM parked)")
        return Flushed(sent, left, parked, problem)

    def park(self, body: str, why: str) -> None:
        """Keep for a person what the bank cannot be told."""
        self._queue.execute("INSERT INTO parked (body, why) VALUES (?, ?)", (body, why))

    def parked(self) -> list[tuple[str, str]]:
        """Return the reports that the bank will not take, each with its words: a person is needed."""
        return [(str(body), str(why)) for body, why in self._queue.execute("SELECT body, why FROM parked")]

    def _send(self, method: str, job: str, body: str) -> str:
        """Send one report; return why the bank will never take it, empty where it did.

        Raises:
            CarrelError: it may take it later.
        """
        amount = msgspec.json.decode(body)["amount"]
        if mybrc.micro_su(Decimal(amount)) > AMOUNT_MAX * MICRO_SU_PER_SU:
            return f"{amount} SU are more than the bank takes for one job; its most is {AMOUNT_MAX}"
        path = f"/jobs/{quote(job, safe='')}/" if method == "PUT" else "/jobs/"
        answer = self._ask(method, path, body.encode())
        # A start that is refused is there already: the answer was lost. If it is wrong, its end is refused, too.
        if 200 <= answer.status < 300 or (method == "POST" and answer.status == 400):
            return ""
        if answer.status == 400:
            return msgspec.json.encode(answer.body).decode()
        raise self._failure(answer, method, path)

    def _ask(self, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 0) -> _Answer:
        host, port = self._where.hostname or "", self._where.port
        connection: http.client.HTTPConnection
        if self._where.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s or self._timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s or self._timeout_s)
        headers = {"Authorization": self._token, "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, f"{self._where.path.rstrip('/')}{path}", body=body, headers=headers)
            answer = connection.getresponse()
            text = answer.read(ANSWER_MAX_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"the bank at {self._url}: {error}; is it running?") from error
        finally:
            connection.close()
        try:
            return _Answer(answer.status, msgspec.json.decode(text))
        except msgspec.DecodeError as error:
            if answer.status == 200:
                raise UnreachableError(f"the bank at {self._url} answered {path} with what is no JSON") from error
            return _Answer(answer.status, None)

    def _failure(self, answer: _Answer, method: str, path: str) -> CarrelError:
        said = f"the bank at {self._url} answered {method} {path} with {answer.status}"
        if answer.status in (401, 403):
            return RefusedError(f"{said}: it does not take our token; has it expired? see: API.token")
        if answer.status < 500:
            return RefusedError(f"{said}; is the address right? see: API.url")
        return UnreachableError(f"{said}; see its log")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._queue.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._queue.execute("COMMIT")
        finally:
            if self._queue.in_transaction:
                self._queue.execute("ROLLBACK")
