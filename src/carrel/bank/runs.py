"""The money of runs, as the loop over Slurm's queue asks for it: what is open, what a job has, what priced it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from carrel.bank.queries import lien_view
from carrel.bank.shelf import columns
from carrel.bank.tables import LIEN
from carrel.model.ledger import AnyCommand, LienView
from carrel.ports import Store

_PAGE = 5000
_IDS_AT_ONCE = 500
_Request = msgspec.json.Decoder(AnyCommand)
JOB_OF_RUN = "rtrim(rtrim(rtrim(run_ref, '0123456789+'), '.'), '0123456789')"
"""As in the index ``lien_task``: cluster and job id, without submission and restart."""


def open_liens(store: Store, *, cluster: str) -> list[LienView]:
    """Return every lien of a cluster that sets money aside."""
    # The states stand here as they do in the index, which is used only then.
    sql = (
        f"SELECT {columns(LIEN)} FROM lien WHERE cluster = %s AND id > %s "  # noqa: S608  # our own names
        "AND state IN ('unbound', 'bound', 'active', 'unknown_end') ORDER BY id LIMIT %s"
    )
    found: list[LienView] = []
    with store.reading() as session:
        while page := [lien_view(row) for row in session.rows(sql, cluster, found[-1].id if found else 0, _PAGE)]:
            found += page
    return found


def liens_of_job(store: Store, job_id: int, *, cluster: str) -> list[LienView]:
    """Return what a job has, in whatever state; of an array, what each task has. Job ids come back: look at the run."""
    sql = f"SELECT {columns(LIEN)} FROM lien WHERE job_id = %s AND job_id > 0 AND cluster = %s ORDER BY id"  # noqa: S608
    with store.reading() as session:
        return [lien_view(row) for row in session.rows(sql, job_id, cluster)]


def liens_of_runs(store: Store, job_ids: Iterable[int], *, cluster: str) -> list[LienView]:
    """Return what the runs of these jobs have, in whatever state. A task is a job of its own here."""
    sql = (
        f"SELECT {columns(LIEN)} FROM lien WHERE {JOB_OF_RUN} IN ({{texts}}) "  # noqa: S608  # our own names
        "AND run_ref IS NOT NULL ORDER BY id"
    )
    wanted = [f"{cluster}/{job_id}." for job_id in sorted(set(job_ids))]
    found: list[LienView] = []
    with store.reading() as session:
        for at in range(0, len(wanted), _IDS_AT_ONCE):
            found += [lien_view(row) for row in session.rows(sql, wanted[at : at + _IDS_AT_ONCE])]
    return found


def waiting_micro_su(store: Store, *, cluster: str, project: str) -> int:
    """Return what is set aside for an account's jobs that have not begun."""
    sql = (
        "SELECT coalesce(sum(open), 0) FROM lien WHERE cluster = %s AND project = %s AND state IN ('unbound', 'bound') "
        "AND state IN ('unbound', 'bound', 'active', 'unknown_end')"  # as in the index
    )
    with store.reading() as session:
        ((amount,),) = session.rows(sql, cluster, project)
        return int(amount)


class Changed(NamedTuple):
    """A run whose money moved, with all that is known of what priced it."""

    lien: LienView
    inputs: dict[str, Any]


def last_seq(store: Store) -> int:
    """Return the number of the last transaction."""
    with store.reading() as session:
        ((seq,),) = session.rows("SELECT coalesce(max(seq), 0) FROM txn")
        return int(seq)


def changed(store: Store, *, cluster: str, after: int) -> tuple[int, list[Changed]]:
    """Return the runs that began or were charged since a transaction, as they are now, and how far that looked."""
    moved = (
        "SELECT seq, CASE WHEN kind IN ('start', 'settle', 'refund') THEN lien ELSE 0 END FROM txn "
        "WHERE seq > %s ORDER BY seq LIMIT %s"
    )
    liens = f"SELECT {columns(LIEN)} FROM lien WHERE id IN ({{ints}}) AND cluster = %s ORDER BY id"  # noqa: S608
    priced = "SELECT request FROM txn WHERE lien = %s AND kind IN ('start', 'settle') ORDER BY seq"
    found: list[Changed] = []
    with store.reading() as session:
        rows = [(int(seq), lien) for seq, lien in session.rows(moved, after, _PAGE)]
        wanted = sorted({int(lien) for _, lien in rows if lien})
        for lien in [lien_view(row) for row in session.rows(liens, wanted, cluster)] if wanted else ():
            inputs: dict[str, Any] = {}
            for (request,) in session.rows(priced, lien.id):
                # A person's correction has no inputs: what was known before still holds.
                inputs |= getattr(_Request.decode(request), "inputs", {})
            found.append(Changed(lien, inputs))
    return (rows[-1][0] if rows else after), found


def last_command(store: Store, lien: int) -> tuple[str, dict[str, Any]]:
    """Return who last priced or charged this lien, and from which inputs; nothing where nobody did."""
    sql = (
        "SELECT request FROM txn WHERE lien = %s AND kind IN ('place', 'quote', 'reprice', 'start', 'settle') "
        "ORDER BY seq DESC LIMIT 1"
    )
    with store.reading() as session:
        for (request,) in session.rows(sql, lien):
            command = _Request.decode(request)
            return command.actor, getattr(command, "inputs", {})
    return "", {}
