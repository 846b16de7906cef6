"""What the tables of a node have in common: what each row begins with, and which day it belongs to."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from carrel.config import Section
from carrel.errors import CarrelError
from carrel.model.sample import Batch, Row

_PLAIN = re.compile(rb"[A-Za-z0-9_+-]")
WHOSE = ("cluster", "job_id", "submit_s", "restart", "user", "node", "view", "seq")


class FileSettings(Section, frozen=True):
    """``[sinks.csv]`` and ``[sinks.parquet]``."""

    dir: str = ""
    """Tables go to ``<dir>/date=2026-11-21/``; nodes may share it. The site takes them from there, and removes them."""
    metrics: tuple[str, ...] = ("job.*", "processes.*", "loadavg.*", "meminfo.*")
    """Patterns of the metrics that get a column."""
    period_s: float = 10.0


def checked(settings: FileSettings, name: str) -> Path:
    """Return the directory.

    Raises:
        CarrelError: it is not set.
    """
    if not Path(settings.dir).is_absolute():
        raise CarrelError(f"sinks.{name}.dir = '{settings.dir}': an absolute path is needed; set it in [sinks.{name}]")
    return Path(settings.dir)


class Part(msgspec.Struct, frozen=True):
    """Rows that go to one table: those of one day with the same columns."""

    day: str
    columns: tuple[str, ...]
    rows: list[tuple[Batch, Row]]


def parts(batches: Sequence[Batch]) -> Iterator[Part]:
    """Sort rows into tables, in the order in which they came."""
    found: dict[tuple[str, tuple[str, ...]], Part] = {}
    for batch in batches:
        columns = tuple(sorted(batch.columns))
        for row in batch.rows:
            day = datetime.fromtimestamp(row.time_us / 1e6, tz=UTC).strftime("%Y-%m-%d")
            part = found.setdefault((day, columns), Part(day, columns, []))
            part.rows.append((batch, row))
    yield from found.values()


def whose(batch: Batch, row: Row) -> tuple[str | int, ...]:
    """Return the values of ``WHOSE``."""
    job = batch.job
    key = job.key
    return (key.cluster, key.job_id, key.submit_s, key.restart, job.user, batch.node, batch.view, row.seq)


def plain(text: str) -> str:
    """Return a name that is safe as a part of a path: letters, digits, ``_+-``; other bytes are ``%XX``.

    >>> plain("c1.example/.."), plain("c1")
    ('c1%2Eexample%2F%2E%2E', 'c1')
    """
    raw = text.encode(errors="surrogateescape")
    return "".join(chr(byte) if _PLAIN.match(bytes([byte])) else f"%{byte:02X}" for byte in raw)
