"""What the money of a run needs next: three facts in, commands of the ledger out. Pure, like ``core.lifecycle``.

::

    slurm says               lien              ->  commands
    waits                    none                  Place, Bind        not covered: the site's policy
    waits                    unbound               Bind               an array without a run: each task brings its own
    waits, changed           bound                 Reprice
    runs | suspended         none                  Place, Bind, Start
    runs | suspended         unbound | bound       Bind, Start        priced by what was allocated; splits an array
    runs | suspended         active, too small     Reprice            or too large: its limit was changed
    runs | suspended         unknown_end           Start              it was not gone
    ended, never began       unbound | bound       Void
    ended, and accounted     any open one          Bind, Start, Settle, Refund by the rules of its end
    ended, and accounted     none                  Backfill, Refund
    no task of it waits      array's, units left   Void
    no such run              active                MarkUnknown, and after an hour Settle by what was last seen
    no such run              bound                 after an hour: Void

A run that ended and is not accounted yet asks for nothing. Each command carries the run in its key, so a plan that is
old, or is carried out twice or by two controllers, charges nothing twice.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from carrel.config import RefundPercent
from carrel.core.bound import OVERRUN_S
from carrel.core.pricing import price
from carrel.model.cluster import ClusterFacts
from carrel.model.ledger import (
    AnyCommand,
    Backfill,
    Bind,
    LienView,
    MarkUnknown,
    Place,
    Refund,
    Reprice,
    Settle,
    Start,
    Void,
)
from carrel.model.price import NoPrice, PriceBook, Priced
from carrel.model.request import Gpus, Request
from carrel.model.run import Seen, Used, guests_of

OPEN = frozenset({"unbound", "bound", "active", "unknown_end"})
CHARGED = frozenset({"settled", "part_refunded", "refunded"})
UNKNOWN_SETTLED_AFTER_S = 3600.0
"""Slurm may take this long to remember a run, after a crash of its controller or of its database."""
UNKNOWN_AFTER_S = 60.0
ACTOR = "carrelctld"


class Due(msgspec.Struct, frozen=True):
    """A price with what it was made of, as the ledger keeps it: from ``inputs`` the amount can be computed again."""

    amount_micro_su: int
    version: int
    inputs: dict[str, Any]


def needed(run: Seen, *, book: PriceBook, cluster: ClusterFacts, now_s: float) -> Due | NoPrice | None:
    """Return what must be set aside for a run that has its nodes; None: no amount would do, it may run for ever."""
    if run.limit_s is None:
        return None
    partition = run.partitions[0]
    facts = cluster.partitions.get(partition)
    over = cluster.over_time_s if facts is None or facts.over_time_s is None else facts.over_time_s
    if over == "unlimited":
        return None
    inputs = {
        "resources": _with_guests(run.resources, run.token),
        "partition": partition,
        "qos": run.qos,
        "seconds": run.limit_s + over + OVERRUN_S,
        "moment_s": run.start_s or int(now_s),
    }
    return _due(book, inputs, rounding="up")


def charge(used: Used, *, book: PriceBook) -> Due | NoPrice:
    """Return what a run that ended is charged: the price of what the accounting says."""
    inputs = {
        "resources": _with_guests(used.resources, used.token),
        "partition": used.partition,
        "qos": used.qos,
        "seconds": used.elapsed_s,
        "moment_s": used.start_s or used.end_s,
        "state": used.state,
        "source": used.source,
    }
    return _due(book, inputs, rounding="half_up")


def recompute(book: PriceBook) -> Callable[[int, Mapping[str, Any]], int | None]:
    """Return the function by which ``bank.verify`` computes charges again; None of inputs that are none of ours."""

    def amount(version: int, inputs: Mapping[str, Any]) -> int | None:
        if not {"resources", "partition", "qos", "seconds", "moment_s", "source"} <= inputs.keys():
            return None
        found = _due(book, dict(inputs), rounding="half_up")
        return found.amount_micro_su if isinstance(found, Due) and found.version == version else None

    return amount


def asked(run: Seen) -> Request:
    """Return what a waiting job asks for, as far as the queue shows it: for one whose submission we did not see."""
    nodes = max(1, run.resources.get("node", 1))
    gpus = {name[9:]: count for name, count in run.resources.items() if name.startswith("gres/gpu:")}
    untyped = run.resources.get("gres/gpu", 0) - sum(gpus.values())
    return Request(
        partitions=run.partitions,
        qos=(run.qos,) if run.qos else (),
        account=run.account,
        time_limit="unlimited" if run.limit_s is None else run.limit_s,
        min_nodes=nodes,
        max_nodes=nodes,
        tasks=max(nodes, run.resources.get("cpu", 1)),
        memory_per_node_mib=-(-run.resources.get("mem", 0) // nodes),
        gpus=Gpus(per_job=gpus | ({"": untyped} if untyped > 0 else {})),
        licences={n.removeprefix("license/"): c for n, c in run.resources.items() if n.startswith("license/")},
        array_tasks=max(1, run.waiting_tasks),
        guest=guests_of(run.token, nodes=1) > 0,
        guest_per_task=guests_of(run.token, nodes=0) > 0,
    )


def place(run: Seen, due: Due, *, token: str, project: str, units: int = 1) -> Place:
    return Place(
        key=f"l/{run.key.cluster}/{token}/0",
        actor=ACTOR,
        cluster=run.key.cluster,
        token=token,
        project=project,
        user=run.user,
        amount_micro_su=due.amount_micro_su,
        units=units,
        price_version=due.version,
        inputs=due.inputs,
    )


def go_on(run: Seen, lien: LienView, due: Due | None, *, ref: str, stamp: str) -> tuple[AnyCommand, ...]:
    """Return what a run that has not ended needs, beside the lien that it has.

    Args:
        run: What Slurm says of it.
        lien: What it has: its own, or its array's.
        due: What it may need at most; of tasks that wait, for each of them. None: nobody can tell.
        ref: The run's key in the ledger.
        stamp: A word that was never used: a price may be raised to an amount that it had before.
    """
    if lien.state not in OPEN:
        return ()  # a person has settled it
    bind = _bind(run.key.cluster, lien, user=run.user, job_id=run.array_job_id or run.key.job_id, ref=_name(run, ref))
    if run.state in {"pending", "held"}:
        return (*bind, *_reprice(run, lien, due, stamp=stamp))
    if lien.state == "active":
        return _reprice(run, lien, due, stamp=stamp)
    due = due or Due(lien.lien_micro_su // lien.units, 0, {})
    again = f"/{stamp}" if lien.state == "unknown_end" else ""
    return (*bind, _start(run.key.cluster, lien, due, ref=ref, key=f"s/{run.key.cluster}/{ref}{again}"))


def end(
    used: Used, lien: LienView | None, due: Due, refunds: RefundPercent, *, cluster: str, ref: str
) -> tuple[AnyCommand, ...]:
    """Return what charges a run that has ended: bound and started first, where nobody saw it run."""
    back = given_back(used, due, refunds, cluster=cluster, ref=ref)
    if lien is None:
        return (_backfill(used, due, cluster=cluster, ref=ref), *back)
    array = used.array_job_id > 0 and not lien.run
    bind = _bind(cluster, lien, user=used.user, job_id=used.array_job_id or used.job_id, ref="" if array else ref)
    if used.state == "CANCELLED" and not used.elapsed_s and lien.state in {"unbound", "bound"}:
        # Tasks of an array that never began give their liens back together, when none waits any more.
        return bind if array else (*bind, _void(cluster, lien, "it never began"))
    unit = Due(lien.lien_micro_su // lien.units, 0, {})
    start = (_start(cluster, lien, unit, ref=ref, key=f"s/{cluster}/{ref}"),) if array else ()
    return (*bind, *start, _settle(cluster, ref, due), *back)


def never_began(lien: LienView, *, cluster: str) -> tuple[AnyCommand, ...]:
    """Return what frees the lien of a job that was cancelled, or of an array of which no task waits."""
    return (_void(cluster, lien, "it never began"),) if lien.state in {"unbound", "bound"} else ()


def gone(lien: LienView, last: Due | None, *, cluster: str, unknown_for_s: float) -> tuple[AnyCommand, ...]:
    """Return what becomes of a lien whose run neither slurmctld nor the accounting knows.

    Args:
        lien: An open one.
        last: The price of the run as it was last seen; None: it may still be remembered, or nobody saw it.
        cluster: Its cluster.
        unknown_for_s: How long they have answered so.
    """
    if lien.state == "bound":
        late = unknown_for_s > UNKNOWN_SETTLED_AFTER_S
        return (_void(cluster, lien, "slurm has forgotten it, and nobody saw it run"),) if late else ()
    if lien.state == "active" and unknown_for_s > UNKNOWN_AFTER_S:
        return (MarkUnknown(key=f"u/{cluster}/{lien.run}/{lien.id}", actor=ACTOR, cluster=cluster, run=lien.run),)
    if lien.state == "unknown_end" and last is not None and unknown_for_s > UNKNOWN_SETTLED_AFTER_S:
        return (_settle(cluster, lien.run, last),)
    return ()


def _name(run: Seen, ref: str) -> str:
    """An array is bound without a run."""
    return "" if run.array_job_id and not run.key.restart else ref


def _bind(cluster: str, lien: LienView, *, user: str, job_id: int, ref: str) -> tuple[AnyCommand, ...]:
    if lien.state != "unbound":
        return ()
    key = f"b/{cluster}/{lien.token}/{job_id}"
    return (Bind(key=key, actor=ACTOR, cluster=cluster, token=lien.token, user=user, job_id=job_id, run=ref),)


def _start(cluster: str, lien: LienView, due: Due, *, ref: str, key: str) -> Start:
    return Start(
        key=key,
        actor=ACTOR,
        cluster=cluster,
        run=ref,
        token="" if lien.run else lien.token,
        amount_micro_su=due.amount_micro_su,
        if_short="keep",
        price_version=due.version,
        inputs=due.inputs,
    )


def _reprice(run: Seen, lien: LienView, due: Due | None, *, stamp: str) -> tuple[AnyCommand, ...]:
    if due is None or due.amount_micro_su * lien.units == lien.lien_micro_su:
        return ()
    name, token = _named(lien)
    return (
        Reprice(
            key=f"m/{run.key.cluster}/{name or token}/{due.amount_micro_su}/{stamp}",
            actor=ACTOR,
            cluster=run.key.cluster,
            amount_micro_su=due.amount_micro_su,
            if_short="keep",
            price_version=due.version,
            inputs=due.inputs,
            run=name,
            token=token,
        ),
    )


def _void(cluster: str, lien: LienView, reason: str) -> Void:
    run, token = _named(lien)
    return Void(key=f"v/{cluster}/{lien.id}", actor=ACTOR, cluster=cluster, run=run, token=token, reason=reason)


def _settle(cluster: str, ref: str, due: Due) -> Settle:
    return Settle(
        key=f"e/{cluster}/{ref}",
        actor=ACTOR,
        cluster=cluster,
        run=ref,
        amount_micro_su=due.amount_micro_su,
        price_version=due.version,
        inputs=due.inputs,
    )


def _backfill(used: Used, due: Due, *, cluster: str, ref: str) -> Backfill:
    return Backfill(
        key=f"e/{cluster}/{ref}",
        actor=ACTOR,
        cluster=cluster,
        run=ref,
        project=used.account,
        user=used.user,
        job_id=used.job_id,
        amount_micro_su=due.amount_micro_su,
        price_version=due.version,
        inputs=due.inputs,
    )


def _named(lien: LienView) -> tuple[str, str]:
    """Return how a command names the lien: by run, or by token before it has one."""
    return (lien.run, "") if lien.run else ("", lien.token)


def given_back(used: Used, due: Due, rules: RefundPercent, *, cluster: str, ref: str) -> tuple[AnyCommand, ...]:
    """Return what gives back of a charge, by how the run ended."""
    percent = {"NODE_FAIL": rules.node_fail, "BOOT_FAIL": rules.boot_fail, "PREEMPTED": rules.preempted}
    back = due.amount_micro_su * percent.get(used.state, 0) // 100
    return (refund(cluster, ref, back, state=used.state),) if back else ()


def refund(cluster: str, ref: str, amount_micro_su: int, *, state: str) -> Refund:
    """Return what gives back a part of a charge, by the rule for this end."""
    return Refund(
        key=f"r/{cluster}/{ref}/{state}/rule",
        actor=ACTOR,
        cluster=cluster,
        run=ref,
        amount_micro_su=amount_micro_su,
        reason=f"rule for {state}",
    )


def _with_guests(resources: Mapping[str, int], token: str) -> dict[str, int]:
    guests = guests_of(token, nodes=resources.get("node", 1))
    return dict(resources) | ({"guest": guests} if guests else {})


def _due(book: PriceBook, inputs: dict[str, Any], *, rounding: Any) -> Due | NoPrice:
    found = price(
        book,
        inputs["resources"],
        partition=inputs["partition"],
        qos=inputs["qos"],
        seconds=inputs["seconds"],
        moment=datetime.fromtimestamp(inputs["moment_s"], UTC),
        rounding=rounding,
    )
    return Due(found.amount_micro_su, found.version_number, inputs) if isinstance(found, Priced) else found
