"""Prices that a site has already: Slurm's ``TRESBillingWeights``, slurm-banking-plugins' ``bank-config.toml``."""

import re
import tomllib
from collections.abc import Mapping
from datetime import datetime
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

import msgspec

from carrel.core import pricebook
from carrel.errors import CarrelError
from carrel.model.price import Mode, PriceBook, PriceList, Rate, Version

_UNITS = "KMGTP"
_WEIGHT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)([KMGTPkmgtp]?)")

_EXACT = Context(prec=100)
"""Enough digits for any weight times any price."""

Unlisted = Literal["refuse", "free"]


class Mybrc(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bank-config.toml`` says. A switch that is missing is off, as in the plug-ins."""

    at_submit: bool
    at_start: bool
    at_end: bool
    prices: dict[str, Decimal]
    """SU of one CPU-hour."""
    factors: dict[str, Decimal]
    url: str
    token: str
    """As it is sent, with the word ``Token``. A secret: never shown."""


def weights(text: str, *, su: Decimal = Decimal(1), where: str) -> dict[str, Rate]:
    """Read ``TRESBillingWeights``: one unit of ``billing`` for an hour becomes ``su``.

    A suffix divides as Slurm divides: from MiB for memory and burst buffers, from one for all else, and a smaller
    unit than the resource's own divides nothing.

    Raises:
        CarrelError: a weight is no number, or is for something that no price can be set aside for (energy).
    """
    rates = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        kind, slash, rest = name.partition("/")
        resource = f"{kind.lower()}{slash}{rest}"
        match = _WEIGHT.fullmatch(value)
        if not match:
            raise CarrelError(f"{where}: weight {item!r} is no number of 0 or more")
        plain = pricebook.rate(resource, str(_EXACT.multiply(Decimal(match[1]), su)), where=where)
        rates[resource] = Rate(plain.micro_su, plain.units * _divisor(resource, match[2].upper()))
    return rates


def mode(priority_flags: str) -> Mode:
    """Return how Slurm makes one number of the weights."""
    flags = {flag.strip().upper() for flag in priority_flags.split(",")}
    if "MAX_TRES_GRES" in flags:
        return "max_tres_gres"
    return "max_tres" if "MAX_TRES" in flags else "sum"


def from_weights(
    partitions: Mapping[str, str],
    *,
    priority_flags: str,
    su: Decimal,
    name: str,
    valid_from: datetime,
) -> PriceBook:
    """Return a book that prices as Slurm bills: each partition's weights, or its CPUs where it has none."""
    lists = {
        partition: PriceList(
            mode=mode(priority_flags),
            rates=weights(text or "cpu=1", su=su, where=f"partition {partition}: TRESBillingWeights"),
        )
        for partition, text in partitions.items()
    }
    return PriceBook((Version(name=name, valid_from=valid_from, partitions=lists),))


def mybrc(text: str, *, where: str) -> Mybrc:
    """Read ``bank-config.toml``.

    Raises:
        CarrelError: it is not TOML, or a value has the wrong type.
    """
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, InvalidOperation) as error:
        raise CarrelError(f"{where}: not TOML: {error}") from error
    enable, api = _section(raw, "Enable", where), _section(raw, "API", where)
    return Mybrc(
        at_submit=_switch(enable, "enable_job_submit_plugin", where),
        at_start=_switch(enable, "enable_spank_plugin", where),
        at_end=_switch(enable, "enable_job_complete_plugin", where),
        prices=_numbers(raw, "PartitionPrice", where),
        factors=_numbers(raw, "QosMultiplier", where),
        url=str(api.get("url", "http://localhost:8080")),
        token=str(api.get("token", "")),
    )


def from_mybrc(found: Mybrc, *, unlisted: Unlisted, name: str, valid_from: datetime) -> PriceBook:
    """Return a book with the same prices; ``unlisted``: what a partition without a price is, free in the plug-ins."""
    lists = {
        partition: PriceList(rates={"cpu": pricebook.rate("cpu", price, where=f"PartitionPrice.{partition}")})
        for partition, price in found.prices.items()
    }
    factors = {qos: pricebook.factor(value, where=f"QosMultiplier.{qos}") for qos, value in found.factors.items()}
    free = PriceList() if unlisted == "free" else None
    return PriceBook(
        (Version(name=name, valid_from=valid_from, partitions=lists, default=free, qos_millionths=factors),)
    )


def _divisor(resource: str, suffix: str) -> int:
    own = 2 if resource.startswith(("mem", "bb/")) else 0
    steps = _UNITS.index(suffix) + 1 - own if suffix else 0
    return int(Fraction(1024) ** max(0, steps))


def _section(raw: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = raw.get(name, {})
    if not isinstance(section, dict):
        raise CarrelError(f"{where}: {name} must be a table, not {section!r}")
    return section


def _switch(section: Mapping[str, Any], name: str, where: str) -> bool:
    value = section.get(name, False)
    if not isinstance(value, bool):
        raise CarrelError(f"{where}: Enable.{name} must be true or false, not {value!r}")
    return value


def _numbers(raw: Mapping[str, Any], name: str, where: str) -> dict[str, Decimal]:
    numbers = {}
    for key, value in _section(raw, name, where).items():
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise CarrelError(f"{where}: {name}.{key} must be a number, not {value!r}")
        numbers[key] = Decimal(value)
    return numbers
