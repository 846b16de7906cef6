"""What resources cost for a time. The quote and the charge are both ``price``, so they cannot disagree.

The price is exact, a fraction, until its end, and is rounded once: a lien up, a charge half up. So for the same
resources and seconds a charge never exceeds its lien, and is never more than half a micro-SU from the truth.
"""

from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import Literal, assert_never

from carrel.model.price import MILLION, Line, Mode, NoPrice, PriceBook, Priced, Rate, Resources

Rounding = Literal["up", "half_up"]

_HOUR_S = 3600


def price(
    book: PriceBook,
    resources: Resources,
    *,
    partition: str,
    qos: str,
    seconds: int,
    moment: datetime,
    rounding: Rounding,
) -> Priced | NoPrice:
    """Return what ``resources`` cost for ``seconds``, by the version in force at ``moment``.

    Args:
        book: The site's prices.
        resources: Allocated, not used: an idle core is still nobody else's.
        partition: The one that the job runs in.
        qos: The job's; empty where the cluster has none.
        seconds: The time limit and what Slurm adds to it, for a quote; ``Elapsed`` for a charge.
        moment: When the run started, or would start.
        rounding: ``up`` for a lien, ``half_up`` for a charge.

    Raises:
        ValueError: ``seconds`` or an amount is negative, as when a clock steps back.
    """
    if seconds < 0 or any(count < 0 for count in resources.values()):
        raise ValueError(f"a job cannot have {dict(resources)} for {seconds} s; did the clock of slurmctld step back?")
    version = book.at(moment)
    if version is None:
        return NoPrice(f"no price is in force at {moment:%Y-%m-%dT%H:%M:%SZ}; see: carrel bank prices show")
    listed = version.list_of(partition)
    if listed is None:
        return NoPrice(
            f"partition {partition!r} has no price in version {version.name!r}; see: carrel bank prices show"
        )
    factor = version.factor_millionths(partition, qos)
    scale = Fraction(factor * seconds, MILLION * _HOUR_S)
    parts = _parts(resources, listed.rates)
    total, counted = _combine(parts, listed.mode)
    return Priced(
        amount_micro_su=rounded(total * scale, rounding),
        version=version.name,
        version_number=version.number,
        partition=partition,
        qos=qos,
        factor_millionths=factor,
        mode=listed.mode,
        seconds=seconds,
        lines=tuple(
            Line(
                resource=name,
                count=resources[name],
                rate=listed.rates[name],
                amount_micro_su=rounded(part * scale, rounding),
                counted=name in counted,
            )
            for name, part in parts.items()
        ),
    )


def hourly(resources: Resources, rates: Mapping[str, Rate], mode: Mode) -> Fraction:
    """Return micro-SU per hour, exactly: a million times what Slurm calls ``billing``, before it truncates."""
    return _combine(_parts(resources, rates), mode)[0]


def rounded(amount: Fraction, rounding: Rounding) -> int:
    """Round to whole micro-SU.

    >>> rounded(Fraction(5, 2), "half_up"), rounded(Fraction(9, 4), "half_up"), rounded(Fraction(9, 4), "up")
    (3, 2, 3)
    """
    if rounding == "up":
        return -(-amount.numerator // amount.denominator)
    return (2 * amount.numerator + amount.denominator) // (2 * amount.denominator)


def _parts(resources: Resources, rates: Mapping[str, Rate]) -> dict[str, Fraction]:
    return {name: resources[name] * rate.each for name, rate in sorted(rates.items()) if resources.get(name)}


def _combine(parts: Mapping[str, Fraction], mode: Mode) -> tuple[Fraction, set[str]]:
    """Return the hour's price and the names that made it."""
    rivals = [name for name in parts if _rival(name, mode)]
    dropped = set(rivals)
    if rivals:
        dropped.remove(max(rivals, key=lambda name: parts[name]))
    counted = parts.keys() - dropped
    return sum((parts[name] for name in counted), Fraction(0)), set(counted)


def _rival(name: str, mode: Mode) -> bool:
    """Tell whether only the dearest of these counts. What no node holds (licences, guests …) always adds up."""
    match mode:
        case "sum":
            return False
        case "max_tres":
            return name in ("cpu", "mem", "node") or name.startswith("gres/")
        case "max_tres_gres":
            return name in ("cpu", "mem", "node")
        case _:
            assert_never(mode)
