"""The quote: the price of the most that Slurm may give a submission. Neither an unset field nor an unknown is free."""

import itertools
from collections.abc import Sequence
from datetime import datetime

from carrel.core.bound import bound
from carrel.core.pricing import price
from carrel.model.cluster import ClusterFacts
from carrel.model.money import HELD_MICRO_SU, format_su
from carrel.model.price import ComponentQuote, NoBound, NoPrice, PriceBook, Priced, Quote
from carrel.model.request import Request


def quote(
    components: Sequence[Request], *, book: PriceBook, cluster: ClusterFacts, moment: datetime
) -> Quote | NoBound | NoPrice:
    """Return what a submission may cost at most, all array tasks and components together.

    Slurm may take any partition of a list, and any QOS, so the dearest counts. Each array task is a run of its own
    and its amount is rounded up by itself, as its lien is.

    Args:
        components: One, or those of a heterogeneous job.
        book: The site's prices.
        cluster: What Slurm says of its partitions.
        moment: When it would start: now, or ``--begin``. A later version of the book is met when the job starts.
    """
    quoted: list[ComponentQuote] = []
    for request in components:
        answer = _component(request, book, cluster, moment)
        if not isinstance(answer, ComponentQuote):
            return answer
        quoted.append(answer)
    amount = sum(each.task_micro_su * each.tasks for each in quoted)
    if amount > HELD_MICRO_SU:
        return NoBound(f"{format_su(amount)} SU is more than an account can hold; is the request right?")
    at_once = sum(each.task_micro_su * each.tasks_at_once for each in quoted)
    return Quote(amount_micro_su=amount, at_once_micro_su=at_once, components=tuple(quoted))


def _component(
    request: Request, book: PriceBook, cluster: ClusterFacts, moment: datetime
) -> ComponentQuote | NoBound | NoPrice:
    best: ComponentQuote | None = None
    cannot: NoBound | None = None
    for name in request.partitions or (cluster.default_partition,):
        answer = _in_partition(request, name, book, cluster, moment)
        if isinstance(answer, NoPrice):
            return answer
        if isinstance(answer, NoBound):
            cannot = answer
        elif best is None or answer.task_micro_su > best.task_micro_su:
            best = answer
    # Slurm may choose the very partition that has no bound, so the others do not help.
    return cannot or best or NoBound("no partition was named and the cluster has no default one; give --partition")


def _in_partition(
    request: Request, name: str, book: PriceBook, cluster: ClusterFacts, moment: datetime
) -> ComponentQuote | NoBound | NoPrice:
    partition = cluster.partitions.get(name)
    if partition is None:
        if not name:
            return NoBound("no partition was named and the cluster has no default one; give --partition")
        return NoBound(f"there is no partition {name!r}; see: sinfo")
    limits = bound(request, partition, cluster)
    if isinstance(limits, NoBound):
        return limits
    found: list[Priced] = []
    for resources, qos in itertools.product(limits.candidates, request.qos or ("",)):
        seconds = limits.seconds
        priced = price(book, resources, partition=name, qos=qos, seconds=seconds, moment=moment, rounding="up")
        if isinstance(priced, NoPrice):
            return priced
        found.append(priced)
    best = max(found, key=lambda priced: priced.amount_micro_su)
    return ComponentQuote(
        task_micro_su=best.amount_micro_su,
        tasks=request.array_tasks,
        tasks_at_once=min(request.array_tasks, request.array_at_once or request.array_tasks),
        priced=best,
        notes=limits.notes,
    )
