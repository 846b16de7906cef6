"""Flat tables as CSV: a file for each day and node, for sites that collect elsewhere.

The header of a file never changes: where a kernel or a job has other columns, they go to a file of their own, which has
a digest of them in its name. A row whose writer died is cut off by the next one.
"""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from carrel import config
from carrel.errors import UnreachableError
from carrel.model.sample import Batch
from carrel.ports import SinkContext
from carrel.sinks import files

ROWS_MAX = 240
_TAIL_BYTES = 1 << 20


class CsvSink:
    """Appends rows to tables."""

    rows_max = ROWS_MAX

    def __init__(self, settings: files.FileSettings, node: str) -> None:
        """Write below ``settings.dir``.

        Raises:
            CarrelError: it is not set.
        """
        self.period_s = settings.period_s
        self.metrics = settings.metrics
        self._directory = files.checked(settings, "csv")
        self._node = node

    @classmethod
    def from_context(cls, context: SinkContext) -> Self:
        return cls(config.sink_settings(context.config, "csv", files.FileSettings), context.node)

    def write(self, batches: Sequence[Batch]) -> None:
        try:
            for part in files.parts(batches):
                self._append(part)
        except OSError as error:
            raise UnreachableError(f"{error.filename or self._directory}: {error.strerror}; is there room?") from error

    def _append(self, part: files.Part) -> None:
        directory = self._directory / f"date={part.day}"
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        digest = hashlib.sha256("\n".join(part.columns).encode()).hexdigest()[:7]
        path = directory / f"samples.{files.plain(self._node)}.{digest}.csv"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = _whole(descriptor)
            os.ftruncate(descriptor, size)
            try:
                _write(descriptor, _lines(part, header=size == 0))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)  # the disk is full: nobody shall read half of it
                raise
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing stays open between two calls."""


def _lines(part: files.Part, *, header: bool) -> bytes:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    if header:
        table.writerow(("time_s", *files.WHOSE, *part.columns))
    for batch, row in part.rows:
        time_s = f"{row.time_us // 10**6}.{row.time_us % 10**6:06d}"
        values = (row.values.get(name, "") for name in part.columns)
        table.writerow((time_s, *files.whose(batch, row), *values))
    return out.getvalue().encode(errors="surrogateescape")


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _whole(descriptor: int) -> int:
    """Return where the last whole row ends."""
    size = os.fstat(descriptor).st_size
    start = max(size - _TAIL_BYTES, 0)
    tail = os.pread(descriptor, size - start, start)
    return start + tail.rfind(b"\n") + 1


def tables(directory: Path) -> list[Path]:
    """Return all tables below a directory, the oldest first."""
    return sorted(directory.glob("date=*/samples.*.csv"))
