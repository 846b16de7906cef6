"""A sink that keeps what it gets: for tests, and for authors to see what one is given."""

from collections.abc import Sequence
from typing import Self

from carrel.errors import CarrelError
from carrel.model.sample import Batch, Row
from carrel.ports import SinkContext


class MemorySink:
    """Keeps batches; ``failures`` are raised first, one a call."""

    def __init__(self, *, period_s: float = 0.01, metrics: Sequence[str] = ("*",), rows_max: int = 240) -> None:
        """Keep batches from now on."""
        self.period_s = period_s
        self.metrics = metrics
        self.rows_max = rows_max
        self.batches: list[Batch] = []
        self.failures: list[CarrelError] = []
        self.closed = False

    @classmethod
    def from_context(cls, _context: SinkContext) -> Self:
        return cls()

    def write(self, batches: Sequence[Batch]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.batches += batches

    def close(self) -> None:
        self.closed = True

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of each series, each once, in the order in which they came first."""
        found: dict[str, dict[int, Row]] = {}
        for batch in self.batches:
            rows = found.setdefault(batch.series, {})
            for row in batch.rows:
                rows.setdefault(row.seq, row)
        return {series: list(rows.values()) for series, rows in found.items() if rows}
