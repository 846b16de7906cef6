"""The price book as a file: reading it, writing it, and making one from the prices that a site has already.

::

    [[version]]
    name = "2026"
    valid_from = 2026-01-01                    # 00:00 UTC, or a time with its offset
    qos = { premium = 2, low = 0.5 }           # factors; a QOS that is not listed has 1

    [version.partition.gpu]
    mode = "max_tres"                          # sum (default) | max_tres | max_tres_gres
    rates = { cpu = 1, mem = "0.25G", "gres/gpu" = 8, "gres/gpu:a100" = 4, guest = 0.1 }

A rate is in SU per hour; ``"0.25G"`` is a quarter SU for each GiB. Decimals are exact: no binary fraction is made.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, get_args

from carrel.errors import CarrelError
from carrel.model.price import MILLION, Mode, PriceBook, PriceList, Rate, Version

_SUFFIXES = {"": 1, "K": 1, "M": 1, "G": 2**10, "T": 2**20, "P": 2**30}
"""Of memory and burst buffers, which are counted in MiB. K divides nothing, as in Slurm."""

_DIGITS_MAX = 12
"""Before the point, and after it. A typing error must not fill the memory with digits."""

_PRICED = re.compile(r"cpu|mem|node|guest|(gres|license|bb)/[^\s=,]+")
_SIZED = ("mem", "bb/")


def parse(text: str, *, where: str) -> PriceBook:
    """Read a price book.

    Raises:
        CarrelError: it is not TOML, has an unknown key, a price that is none, or two versions from one moment.
    """
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, InvalidOperation) as error:
        raise CarrelError(f"{where}: not TOML: {error}") from error
    _known(raw, ("version",), where=where)
    versions = [_version(item, where=f"{where}: version {at}") for at, item in enumerate(_list(raw, where), 1)]
    versions.sort(key=lambda version: version.valid_from)
    for before, after in itertools.pairwise(versions):
        if before.valid_from == after.valid_from:
            raise CarrelError(f"{where}: versions {before.name!r} and {after.name!r} are valid from the same moment")
    if len({version.name for version in versions}) < len(versions):
        raise CarrelError(f"{where}: two versions have one name; a charge names its version, so names are unique")
    return PriceBook(tuple(versions))


def text(book: PriceBook) -> str:
    """Return the book as a file; ``parse`` reads the same book from it."""
    return "\n".join("\n".join(_version_lines(version)) + "\n" for version in book.versions)


def rate(resource: str, value: object, *, where: str) -> Rate:
    """Read the price of one resource: a number, or for memory a number with the unit it is for.

    >>> rate("mem", "0.25G", where="x")
    Rate(micro_su=250000, units=1024)
    """
    if not _PRICED.fullmatch(resource):
        raise CarrelError(
            f"{where}: {resource!r} has no price of its own;"
            " priced are cpu, mem, node, guest, gres/NAME[:TYPE], license/NAME, bb/NAME"
        )
    suffix = ""
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+[KMGTPkmgtp]", value):
        value, suffix = value[:-1], value[-1].upper()
        if not resource.startswith(_SIZED):
            raise CarrelError(f"{where}: {resource} = '{value}{suffix}': only mem and bb/NAME have a unit")
    return _rate(_decimal(value, where=f"{where}: {resource}"), _SUFFIXES[suffix])


def rate_text(resource: str, each: Rate) -> str:
    """Return a rate as it stands in the file: ``0.25G``."""
    suffix = ""
    if resource.startswith(_SIZED):
        suffix = next(word for word in ("P", "T", "G", "") if each.units % _SUFFIXES[word] == 0)
    return decimal_text(Fraction(each.micro_su * _SUFFIXES[suffix], each.units * MILLION)) + suffix


def decimal_text(value: Fraction) -> str:
    """Return an exact decimal; the fraction must be one (its denominator has no factor but 2 and 5)."""
    places = 0
    while value.denominator != 1:
        value, places = value * 10, places + 1
    digits = str(value.numerator).zfill(places + 1)
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


def _version(raw: Any, *, where: str) -> Version:
    table = _table(raw, where=where)
    _known(table, ("name", "valid_from", "qos", "default", "partition"), where=where)
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise CarrelError(f"{where}: no name; a charge names the version that priced it")
    return Version(
        name=name,
        valid_from=_moment(table.get("valid_from"), where=where),
        qos_millionths=_factors(table.get("qos", {}), where=f"{where}: qos"),
        default=_list_of(table["default"], where=f"{where}: default") if "default" in table else None,
        partitions={
            partition: _list_of(item, where=f"{where}: partition {partition}")
            for partition, item in _table(table.get("partition", {}), where=f"{where}: partition").items()
        },
    )


def _list_of(raw: Any, *, where: str) -> PriceList:
    table = _table(raw, where=where)
    _known(table, ("mode", "rates", "qos"), where=where)
    mode = table.get("mode", "sum")
    if mode not in get_args(Mode):
        raise CarrelError(f"{where}: mode {mode!r}; known: {', '.join(get_args(Mode))}")
    rates = _table(table.get("rates", {}), where=f"{where}: rates")
    return PriceList(
        mode=mode,
        rates={resource: rate(resource, value, where=where) for resource, value in rates.items()},
        qos_millionths=_factors(table.get("qos", {}), where=f"{where}: qos"),
    )


def _factors(raw: Any, *, where: str) -> dict[str, int]:
    return {qos: factor(value, where=f"{where}: {qos}") for qos, value in _table(raw, where=where).items()}


def factor(value: object, *, where: str) -> int:
    """Read the factor of a QOS, in millionths."""
    millionths = Fraction(_decimal(value, where=where)) * MILLION
    if millionths.denominator != 1:
        raise CarrelError(f"{where}: factor {value} has more than six decimals")
    return millionths.numerator


def _decimal(value: object, *, where: str) -> Decimal:
    number = _number(value)
    if number is None:
        raise CarrelError(f"{where}: {value!r} is no number")
    if not number.is_finite() or number < 0:
        raise CarrelError(f"{where}: {value} is no price; it must be 0 or more, and finite")
    exponent = number.as_tuple().exponent
    if number.adjusted() >= _DIGITS_MAX or not isinstance(exponent, int) or exponent < -_DIGITS_MAX:
        raise CarrelError(f"{where}: {value} has more than {_DIGITS_MAX} digits on one side of the point")
    return number


def _number(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        return Decimal(value)
    except InvalidOperation:
        return None


def _rate(number: Decimal, units: int) -> Rate:
    micro_su = Fraction(number) * MILLION
    return Rate(micro_su.numerator, units * micro_su.denominator)


def _moment(value: object, *, where: str) -> datetime:
    match value:
        case datetime(tzinfo=None):
            raise CarrelError(
                f"{where}: valid_from {value} has no offset; write 2026-01-01T00:00:00Z, or a date for UTC"
            )
        case datetime(microsecond=fraction) if fraction:
            raise CarrelError(f"{where}: valid_from {value} must be a whole second")
        case datetime():
            return value.astimezone(UTC)
        case date():
            return datetime.combine(value, time(), tzinfo=UTC)
        case _:
            raise CarrelError(f"{where}: valid_from must be a date or a time with its offset, not {value!r}")


def _list(raw: Mapping[str, Any], where: str) -> list[Any]:
    versions = raw.get("version")
    if not isinstance(versions, list) or not versions:
        raise CarrelError(f"{where}: no [[version]], so nothing has a price; see: carrel bank prices import-weights")
    return versions


def _table(raw: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise CarrelError(f"{where}: must be a table, not {raw!r}")
    return raw


def _known(raw: Mapping[str, Any], known: tuple[str, ...], *, where: str) -> None:
    for key in raw:
        if key not in known:
            raise CarrelError(f"{where}: unknown key {key}; known: {', '.join(known)}")


def _version_lines(version: Version) -> list[str]:
    lines = ["[[version]]", f"name = {_quoted(version.name)}", f"valid_from = {version.valid_from:%Y-%m-%dT%H:%M:%SZ}"]
    lines += _factor_line(version.qos_millionths)
    if version.default is not None:
        lines += ["", "[version.default]", *_price_lines(version.default)]
    for partition, listed in version.partitions.items():
        lines += ["", f"[version.partition.{_quoted(partition)}]", *_price_lines(listed)]
    return lines


def _price_lines(listed: PriceList) -> list[str]:
    rates = ", ".join(f"{_quoted(name)} = {_quoted(rate_text(name, each))}" for name, each in listed.rates.items())
    return [f'mode = "{listed.mode}"', f"rates = {{ {rates} }}", *_factor_line(listed.qos_millionths)]


def _factor_line(factors: Mapping[str, int]) -> list[str]:
    if not factors:
        return []
    shown = (f"{_quoted(qos)} = {_quoted(decimal_text(Fraction(value, MILLION)))}" for qos, value in factors.items())
    return [f"qos = {{ {', '.join(shown)} }}"]


def _quoted(word: str) -> str:
    """Quote a TOML string or key; what needs an escape is rare enough to be written as code points."""
    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', lambda found: f"\\u{ord(found[0]):04x}", word) + '"'
