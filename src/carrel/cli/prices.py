"""``carrel bank prices``: the price book, whether it fits the cluster, and books made from prices a site has."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import output
from carrel.cli.guest import Json
from carrel.core import imports, pricebook
from carrel.daemons import prices
from carrel.errors import CarrelError, UnreachableError, UsageError
from carrel.model.cluster import ClusterFacts
from carrel.model.price import MILLION, PriceBook, PriceList, Version
from carrel.slurm import facts

File = Annotated[Path | None, Parameter(help="The price book; by default the one in force.")]
Name = Annotated[str, Parameter(help="Name of the version that is made; charges will carry it.")]
From = Annotated[
    str,
    Parameter(
        name="--valid-from", show_default=False, help="First day of the version, as 2026-01-01; today by default."
    ),
]

app = App(name="prices", help="What an hour of each resource costs.")


@app.command
def show(*, json: Json = False) -> None:
    """Show every version of the price book, the one in force marked with a star."""
    book = prices.load(config.load())
    if json:
        output.objects(book.versions)
        return
    current = book.at(datetime.now(UTC))
    output.table(
        ("VERSION", "FROM", "PARTITION", "MODE", "RESOURCE", "SU/HOUR"),
        [
            (f"{version.name}{'*' if version is current else ''}", output.clock(version.valid_from), *row)
            for version in book.versions
            for row in _rows(version)
        ],
    )


@app.command
def check(file: File = None, /) -> int:
    """Check a price book, and whether it fits this cluster; exit 1 when there is anything to say."""
    settings = config.load()
    path = file or prices.path(settings)
    book = prices.read(path)
    try:
        found = list(_misfits(book, asyncio.run(facts.read(settings.slurm))))
    except UnreachableError as error:
        output.say(f"only the file was checked, not whether it fits the cluster: {error}")
        found = []
    for sentence in found:
        print(f"{path}: {sentence}")
    if not found:
        print(f"{path}: ok")
    return 1 if found else 0


@app.command
def import_weights(
    *,
    su: Annotated[str, Parameter(help="SU for one unit of Slurm's billing during an hour.")] = "1",
    name: Name = "slurm",
    valid_from: From = "",
) -> None:
    """Print a price book that prices as Slurm bills: TRESBillingWeights and PriorityFlags of this cluster."""
    cluster = asyncio.run(facts.read(config.load().slurm))
    book = imports.from_weights(
        {partition.name: partition.weights for partition in cluster.partitions.values()},
        priority_flags=cluster.priority_flags,
        su=_amount(su),
        name=name,
        valid_from=_day(valid_from),
    )
    print(pricebook.text(book), end="")


@app.command
def import_mybrc(
    file: Annotated[Path, Parameter(help="The file; /etc/slurm/bank-config.toml where the plug-ins ran.")],
    /,
    *,
    unlisted: Annotated[
        imports.Unlisted, Parameter(help="What a partition without a price is; the plug-ins let it run free.")
    ] = "refuse",
    name: Name = "mybrc",
    valid_from: From = "",
) -> None:
    """Print a price book with the prices of slurm-banking-plugins' bank-config.toml."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CarrelError(f"{file}: {error}; is it a text file and readable by you?") from error
    found = imports.mybrc(text, where=str(file))
    book = imports.from_mybrc(found, unlisted=unlisted, name=name, valid_from=_day(valid_from))
    print(pricebook.text(book), end="")
    switches = {"submit": found.at_submit, "start": found.at_start, "end": found.at_end}
    on = ", ".join(name for name, switch in switches.items() if switch) or "nothing"
    output.say(f"{file}: the plug-ins are enabled at: {on}; their bank: {found.url}")


def _rows(version: Version) -> Iterator[tuple[str, str, str, str]]:
    lists: dict[str, PriceList] = dict(version.partitions)
    if version.default is not None:
        lists["(any other)"] = version.default
    for partition, listed in lists.items():
        for resource, rate in listed.rates.items() or [("(nothing: free)", None)]:
            yield partition, listed.mode, resource, pricebook.rate_text(resource, rate) if rate else "0"
        for qos, factor in {**version.qos_millionths, **listed.qos_millionths}.items():
            yield partition, "", f"QOS {qos}", f"x {pricebook.decimal_text(Fraction(factor, MILLION))}"


def _misfits(book: PriceBook, cluster: ClusterFacts) -> Iterator[str]:
    version = book.at(datetime.now(UTC))
    if version is None:
        yield f"no version is in force today; the first is from {output.clock(book.versions[0].valid_from)}"
        return
    for partition in cluster.partitions:
        if version.list_of(partition) is None:
            yield f"partition {partition!r} has no price, so its jobs are refused; add [version.partition.{partition}]"
    for partition in version.partitions.keys() - cluster.partitions.keys():
        yield f"partition {partition!r} has a price and slurm has no such partition; see: sinfo"
    lists = [*version.partitions.values(), *([version.default] if version.default else [])]
    for resource in sorted({resource for listed in lists for resource in listed.rates} - {"guest"}):
        if cluster.tracked and resource not in cluster.tracked:
            yield f"{resource} has a price and slurm does not count it, so nobody pays; add it to AccountingStorageTRES"


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise UsageError(f"--su {text!r}: not a number") from error
    if not amount.is_finite() or amount < 0:
        raise UsageError(f"--su {text}: must be 0 or more, and finite")
    return amount


def _day(text: str) -> datetime:
    try:
        day = date.fromisoformat(text) if text else datetime.now(UTC).date()
    except ValueError as error:
        raise UsageError(f"--valid-from {text!r}: not a day like 2026-01-01") from error
    return datetime.combine(day, time(), tzinfo=UTC)
