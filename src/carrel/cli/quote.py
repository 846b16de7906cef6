"""``carrel quote``: what a submission may cost at most, before it is submitted."""

import asyncio
import os
import pwd
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, TextIO

import msgspec
from cyclopts import App, Parameter

from carrel import config
from carrel.cli import output
from carrel.cli.guest import Json
from carrel.cli.payer import payer
from carrel.config import Config
from carrel.core import pricebook
from carrel.core.quote import quote
from carrel.daemons import prices
from carrel.errors import CarrelError, RefusedError, UsageError
from carrel.model.cluster import ClusterFacts
from carrel.model.money import format_su
from carrel.model.price import MILLION, ComponentQuote, NoBound, NoPrice, PriceBook, Quote
from carrel.model.request import Request
from carrel.slurm import facts, sbatch

_SCRIPT_MAX = 4 * 2**20
"""Slurm's own bound (max_script_size)."""

app = App(name="quote", help="What a submission may cost, before it is submitted.", help_flags=["--help"])


@app.default
def show(
    *words: Annotated[
        str,
        Parameter(
            name="SBATCH-ARGUMENTS", allow_leading_hyphen=True, help="Options and script, as sbatch would take them."
        ),
    ],
    json: Json = False,
) -> None:
    """Print what sbatch with these arguments may cost at most: the price of the most that Slurm may allocate.

    Where there is a bank, also what the account has left. Nothing is submitted. #SBATCH lines of the script and
    SBATCH_* variables count as they do for sbatch.
    """
    settings = config.load()
    components = sbatch.parse(words, script=_script(words), environment=os.environ)
    if settings.guests.per == "task":
        components = tuple(msgspec.structs.replace(each, guest_per_task=True) for each in components)
    answer = asyncio.run(_ask(settings, prices.load(settings), components))
    if not isinstance(answer, Quote):
        raise RefusedError(answer.reason)
    pays = payer(settings, components[0].account)
    if json:
        output.objects([{**msgspec.structs.asdict(answer), "payer": pays}])
        return
    for component in answer.components:
        _describe(component)
    print(f"may cost at most {format_su(answer.amount_micro_su)} SU")
    if answer.at_once_micro_su != answer.amount_micro_su:
        print(f"of that at the same time {format_su(answer.at_once_micro_su)} SU")
    if told := pays and pays.told(answer.amount_micro_su):
        print(told)


async def _ask(settings: Config, book: PriceBook, components: tuple[Request, ...]) -> Quote | NoBound | NoPrice:
    cluster = await facts.read(settings.slurm)
    moment = datetime.now(UTC)
    version = book.at(moment)
    if version and (version.qos_millionths or any(each.qos_millionths for each in version.partitions.values())):
        components = tuple([await _with_qos(settings, cluster, request) for request in components])
    return quote(components, book=book, cluster=cluster, moment=moment)


async def _with_qos(settings: Config, cluster: ClusterFacts, request: Request) -> Request:
    """Fill in the QOS that Slurm would: only where the price depends on it is slurmdbd asked."""
    if request.qos:
        return request
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        raise CarrelError(
            f"uid {os.geteuid()} has no name here, so nobody knows its default QOS; give --qos"
        ) from error
    partitions = request.partitions or (cluster.default_partition,)
    qos = await facts.default_qos(settings.slurm, user, request.account, partitions)
    return msgspec.structs.replace(request, qos=qos)


def _script(words: tuple[str, ...]) -> str:
    name = sbatch.script_of(words)
    try:
        if name:
            with Path(name).open(errors="replace") as file:
                return _bounded(file, name)
        if any(word.startswith("--wrap") for word in words):
            return ""
        if sys.stdin.isatty():
            raise UsageError("no script; name one, or give --wrap COMMAND")
        return _bounded(sys.stdin, "standard input")
    except OSError as error:
        raise CarrelError(f"{name}: {error.strerror}; sbatch would look for the script there too") from error


def _bounded(file: TextIO, name: str) -> str:
    text = file.read(_SCRIPT_MAX + 1)
    if len(text) > _SCRIPT_MAX:
        raise UsageError(f"{name}: longer than {_SCRIPT_MAX // 2**20} MiB, and no script that sbatch takes; is it one?")
    return text


def _describe(component: ComponentQuote) -> None:
    priced = component.priced
    factor = pricebook.decimal_text(Fraction(priced.factor_millionths, MILLION))
    output.fields(_fields(component, factor))
    print()
    output.table(
        ("RESOURCE", "COUNT", "SU/HOUR", "SU"),
        [
            (
                *(line.resource, line.count, pricebook.rate_text(line.resource, line.rate)),
                format_su(line.amount_micro_su) if line.counted else "(another is dearer)",
            )
            for line in priced.lines
        ],
    )
    print()


def _fields(component: ComponentQuote, factor: str) -> Iterator[tuple[str, object]]:
    priced = component.priced
    yield "partition", priced.partition
    yield "qos", f"{priced.qos} x {factor}" if priced.qos else ""
    yield "prices", f"{priced.version} ({priced.mode})"
    yield "time", f"{priced.seconds} s: the limit, and what slurm may add to it"
    yield "run", f"{format_su(component.task_micro_su)} SU"
    if component.tasks > 1:
        yield "array", f"{component.tasks} tasks, {component.tasks_at_once} at the same time"
    for note in component.notes:
        yield "note", note
