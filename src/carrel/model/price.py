"""Prices: what an hour of each resource costs in a partition, by date; and the resources that are priced.

Resources carry the names that Slurm's accounting gives them (TRES): ``cpu``, ``mem`` in MiB, ``node``, ``gres/gpu``,
``gres/gpu:a100``, ``license/matlab``, ``bb/datawarp`` in MiB. One is ours: ``guest``, the number of guests.
So a price list reads like ``TRESBillingWeights``, and what ``AllocTRES`` says can be priced as it stands.
"""

from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import Literal

import msgspec

Resources = Mapping[str, int]
"""How much of each resource, by Slurm's name for it. What is absent is 0."""

Mode = Literal["sum", "max_tres", "max_tres_gres"]
"""How the parts of an hour's price become one.

``sum``: all are added. ``max_tres``: the dearest of what a node holds (cpu, mem, node, gres), plus the rest.
``max_tres_gres``: the dearest of cpu, mem and node, plus gres and the rest. As Slurm's PriorityFlags.
"""

MILLION = 1_000_000


class Rate(msgspec.Struct, frozen=True, order=True):
    """``micro_su`` an hour for ``units`` of a resource.

    Two integers, because a price per TiB is no whole number of micro-SU per MiB.
    """

    micro_su: int
    units: int = 1

    @property
    def each(self) -> Fraction:
        """Micro-SU per hour of one unit, exactly."""
        return Fraction(self.micro_su, self.units)


class PriceList(msgspec.Struct, frozen=True, kw_only=True):
    """What a partition's resources cost. A resource without a rate costs nothing."""

    rates: dict[str, Rate] = {}
    mode: Mode = "sum"
    qos_millionths: dict[str, int] = {}
    """Factor of a QOS in this partition, in millionths; over the factors of its version."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """The prices from one moment to the next version's."""

    name: str
    valid_from: datetime
    partitions: dict[str, PriceList] = {}
    default: PriceList | None = None
    """For partitions that have no list; None: they have no price, and a job there is refused."""
    qos_millionths: dict[str, int] = {}
    """Factor of a QOS, in millionths; an unlisted one has the factor 1."""

    @property
    def number(self) -> int:
        """What the ledger keeps of a version: the second from which it is valid, which no other one shares."""
        return int(self.valid_from.timestamp())

    def list_of(self, partition: str) -> PriceList | None:
        """Return the partition's prices; None: it has none, which is not the same as free."""
        return self.partitions.get(partition, self.default)

    def factor_millionths(self, partition: str, qos: str) -> int:
        """Return the factor of a QOS in a partition."""
        own = (self.list_of(partition) or PriceList()).qos_millionths
        return own.get(qos, self.qos_millionths.get(qos, MILLION))


class PriceBook(msgspec.Struct, frozen=True):
    """All versions, earliest first. None is ever changed: what was charged can be computed again."""

    versions: tuple[Version, ...] = ()

    def at(self, moment: datetime) -> Version | None:
        """Return the version in force; None: the book begins later."""
        return next((version for version in reversed(self.versions) if version.valid_from <= moment), None)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One resource of a quote or a charge."""

    resource: str
    count: int
    rate: Rate
    amount_micro_su: int
    """Rounded by itself, for people; the whole is rounded once, from the exact parts."""
    counted: bool = True
    """False: another resource is dearer, and the mode counts only the dearest."""


class Priced(msgspec.Struct, frozen=True, kw_only=True):
    """What resources cost for a time, and why."""

    amount_micro_su: int
    version: str
    version_number: int
    """``Version.number``."""
    partition: str
    qos: str
    factor_millionths: int
    mode: Mode
    seconds: int
    lines: tuple[Line, ...]


class NoPrice(msgspec.Struct, frozen=True):
    """Nobody said what this costs: not the same as free."""

    reason: str


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What a submission may cost at most."""

    amount_micro_su: int
    """Of all tasks and components."""
    at_once_micro_su: int
    """Of as many tasks as may run at the same time (``--array=…%N``)."""
    components: tuple["ComponentQuote", ...]


class ComponentQuote(msgspec.Struct, frozen=True, kw_only=True):
    """One component of a heterogeneous job, or the job itself: its dearest partition."""

    task_micro_su: int
    """One array task, or the job itself."""
    tasks: int
    tasks_at_once: int
    priced: Priced
    notes: tuple[str, ...] = ()
    """What made the bound larger than what was asked for."""


class NoBound(msgspec.Struct, frozen=True):
    """There is no amount that it cannot exceed: not the same as free."""

    reason: str
