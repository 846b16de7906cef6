"""What a bank that speaks myBRC is told of a run: from what the ledger has of it. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from carrel.core.billing import CHARGED
from carrel.core.folio import name_of
from carrel.core.mybrc import MybrcJob
from carrel.model.ledger import LienView

_HOUR_S = 3600


def report(lien: LienView, inputs: Mapping[str, Any], *, uid: int) -> MybrcJob | None:
    """Return a run as its bank is told of it: begun, or ended; None: nothing of it is to be told.

    Args:
        lien: Its money.
        inputs: What priced it last: of ``core.billing``, or whatever a person gave.
        uid: Of its user, who is known by this number there.
    """
    name = name_of(lien.run)
    ended = lien.state in CHARGED
    if name is None or not (ended or lien.state == "active"):
        return None
    job_id, submit_s = name
    if not ended and "moment_s" not in inputs:
        return None  # it ended before anybody saw it begin
    start_s = max(submit_s, int(inputs.get("moment_s", submit_s)))
    seconds = int(inputs.get("seconds", 0))
    resources = inputs.get("resources", {})
    cpus, nodes = int(resources.get("cpu", 0)), int(resources.get("node", 0))
    return MybrcJob(
        jobslurmid=str(job_id),
        userid=str(uid),
        accountid=lien.project,
        jobstatus=str(inputs.get("state", "COMPLETED")) if ended else "RUNNING",
        partition=str(inputs.get("partition", "")) or None,
        qos=str(inputs.get("qos", "")) or None,
        submitdate=_moment(submit_s),
        startdate=_moment(start_s),
        enddate=_moment(start_s + seconds) if ended else None,
        num_cpus=cpus or None,
        num_alloc_nodes=nodes or None,
        raw_time=seconds / _HOUR_S if ended else None,
        cpu_time=cpus * seconds / _HOUR_S if ended else None,
    )


def amount(lien: LienView) -> int:
    """Return what a run costs as far as is known: what it may cost at most, then its charge less what was refunded."""
    return lien.charged_micro_su - lien.refunded_micro_su if lien.state in CHARGED else lien.lien_micro_su


def _moment(time_s: int) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)
