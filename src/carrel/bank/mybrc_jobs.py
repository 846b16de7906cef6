"""Jobs that clients of the myBRC API told us of. The ledger knows what they cost; this is what else they said."""

from collections.abc import Sequence
from typing import Any

import msgspec

from carrel.bank.tables import MYBRC_JOB
from carrel.core.mybrc import MybrcJob
from carrel.ports import Store

PAGE = 100
_COLUMNS = ", ".join(MYBRC_JOB.columns)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A job and what each of its runs cost."""

    job: MybrcJob
    user: str
    runs: dict[str, int]
    """Run to micro-SU."""
    version: int = 0

    @property
    def amount_micro_su(self) -> int:
        return sum(self.runs.values())


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a list is narrowed to; what is empty is not asked for."""

    user: str = ""
    account: str = ""
    status: str = ""
    partition: str = ""
    least_micro_su: int = 0
    most_micro_su: int = 2**62
    start_s: int = 0
    end_s: int = 2**62


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Some of what was wanted, and the sums of all of it."""

    records: list[Record]
    count: int
    amount_micro_su: int
    cpu_ms: int


class _Body(msgspec.Struct, frozen=True):
    job: MybrcJob
    runs: dict[str, int]


def find(store: Store, jobslurmid: str) -> Record | None:
    sql = f"SELECT {_COLUMNS} FROM mybrc_job WHERE id = %s"  # noqa: S608  # our own names
    with store.reading() as session:
        return next((_record(row) for row in session.rows(sql, jobslurmid)), None)


def put(store: Store, record: Record) -> None:
    """Write a job in place of the version that was read.

    Raises:
        LostRaceError: somebody else wrote it meanwhile.
    """
    job = record.job
    row = (
        job.jobslurmid,
        record.user,
        job.accountid,
        job.jobstatus or "",
        job.partition or "",
        record.amount_micro_su,
        int(job.startdate.timestamp()) if job.startdate else 0,
        round((job.cpu_time or 0) * 3_600_000),
        msgspec.json.encode(_Body(job, record.runs)).decode(),
        record.version or 1,
    )
    with store.writing() as session:
        if record.version:
            session.update("mybrc_job", [row])
        else:
            session.insert("mybrc_job", [row])


def page(store: Store, wanted: Wanted, number: int) -> Page:
    """Return one page, the earliest start first."""
    where = (
        "(username = %s OR %s = '') AND (project = %s OR %s = '') AND (status = %s OR %s = '') "
        "AND (part = %s OR %s = '') AND amount >= %s AND amount <= %s AND start_s >= %s AND start_s < %s"
    )
    given = [
        *(word for word in (wanted.user, wanted.account, wanted.status, wanted.partition) for _ in range(2)),
        *(wanted.least_micro_su, wanted.most_micro_su, wanted.start_s, wanted.end_s),
    ]
    sums = f"SELECT count(*), coalesce(sum(amount), 0), coalesce(sum(cpu_ms), 0) FROM mybrc_job WHERE {where}"  # noqa: S608  # ours
    some = f"SELECT {_COLUMNS} FROM mybrc_job WHERE {where} ORDER BY start_s, id LIMIT %s OFFSET %s"  # noqa: S608  # ours
    with store.reading() as session:
        ((count, amount, cpu_ms),) = session.rows(sums, *given)
        records = [_record(row) for row in session.rows(some, *given, PAGE, (number - 1) * PAGE)]
    return Page(records=records, count=count, amount_micro_su=int(amount), cpu_ms=int(cpu_ms))


def _record(row: Sequence[Any]) -> Record:
    body = msgspec.json.decode(row[8], type=_Body)
    return Record(job=body.job, user=row[1], runs=body.runs, version=row[9])
