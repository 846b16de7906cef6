"""Flat tables as Parquet, for sites that collect elsewhere: each call of ``write`` makes a file.

A file is written under another name and renamed when it is whole. That is done rarely (``period_s``), since each column
costs 190 bytes before its first value; what waits meanwhile is on the disk already.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from carrel import config
from carrel.errors import UnreachableError
from carrel.model.sample import Batch, Column
from carrel.ports import SinkContext
from carrel.sinks import files


class ParquetSettings(files.FileSettings, frozen=True):
    """``[sinks.parquet]``."""

    period_s: float = 900.0
    rows_max: int = 4096
    """Rows of one file at most; they are in memory before."""


_WHOSE = {"job_id": pa.int64(), "submit_s": pa.int64(), "restart": pa.int64(), "seq": pa.int64()}


class ParquetSink:
    """Writes a file for each day and each call."""

    def __init__(self, settings: ParquetSettings, node: str) -> None:
        """Write below ``settings.dir``.

        Raises:
            CarrelError: it is not set.
        """
        self.period_s = settings.period_s
        self.metrics = settings.metrics
        self.rows_max = settings.rows_max
        self._directory = files.checked(settings, "parquet")
        self._node = node

    @classmethod
    def from_context(cls, context: SinkContext) -> Self:
        return cls(config.sink_settings(context.config, "parquet", ParquetSettings), context.node)

    def write(self, batches: Sequence[Batch]) -> None:
        try:
            for part in files.parts(batches):
                self._write(part)
        except OSError as error:
            raise UnreachableError(f"{error.filename or self._directory}: {error.strerror}; is there room?") from error

    def _write(self, part: files.Part) -> None:
        directory = self._directory / f"date={part.day}"
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        names = [(batch.series, row.seq) for batch, row in part.rows]
        digest = hashlib.sha256(repr((part.columns, names)).encode(errors="surrogateescape")).hexdigest()[:12]
        first_us = min(row.time_us for _, row in part.rows)
        # The same rows again make the same file again.
        path = directory / f"samples.{files.plain(self._node)}.{first_us // 10**6}.{digest}.parquet"
        draft = path.with_name(f".{path.name}.draft")
        try:
            pq.write_table(_table(part), draft, compression="zstd", use_dictionary=list(_texts()), store_schema=False)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        draft.rename(path)
        _sync(directory)

    def close(self) -> None:
        """Nothing stays open between two calls."""


def _texts() -> tuple[str, ...]:
    return tuple(name for name in files.WHOSE if name not in _WHOSE)


def _table(part: files.Part) -> Any:
    columns: dict[str, Column] = {name: column for batch, _ in part.rows for name, column in batch.columns.items()}
    arrays = [pa.array([row.time_us for _, row in part.rows], pa.timestamp("us", tz="UTC"))]
    fields = [pa.field("time", arrays[0].type, nullable=False)]
    for name, values in zip(files.WHOSE, zip(*(files.whose(*one) for one in part.rows), strict=True), strict=True):
        kind = _WHOSE.get(name, pa.string())
        shown = values if name in _WHOSE else [_text(str(value)) for value in values]
        arrays.append(pa.array(shown, kind))
        fields.append(pa.field(name, kind, nullable=False))
    for name in part.columns:
        numbers = [row.values.get(name) for _, row in part.rows]
        kind = _number([number for number in numbers if number is not None])
        arrays.append(pa.array(numbers, kind))
        fields.append(pa.field(name, kind, metadata={"unit": columns[name].unit, "kind": columns[name].kind}))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _text(text: str) -> str:
    """Return it with what is no UTF-8 made visible; Parquet takes nothing else."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _number(values: Sequence[float]) -> Any:
    """A column keeps its type from file to file: it is what the kernel counts with."""
    return pa.float64() if any(isinstance(value, float) for value in values) else pa.uint64()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
