"""What is told of sinks: the series that they have to take, how far each one is, and what was dropped."""

from typing import Literal

import msgspec

from carrel.model.job import Job
from carrel.model.sample import View

Why = Literal["bytes", "age", "refused", "gone"]
"""Why rows were dropped: too many waited, too long, the sink will never take them, or their owner removed them."""


class SpoolEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A segment that sinks have to take. Written by carreld, so whose it is does not depend on what is in it."""

    job: Job
    node: str
    view: View
    directory: str
    """The job's, below the root of all samples."""
    stem: str
    since_us: int


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a sink is with a series: so many of its rows and notes are safe there, or were dropped."""

    rows: int = 0
    notes: int = 0
    final: bool = False
    """It is through."""


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """All that one sink remembers."""

    marks: dict[str, Mark] = {}
    """By the name of the entry."""
    rows_written: int = 0
    rows_dropped: dict[Why, int] = {}
    series_lost: int = 0
    """Removed by their owners before anybody could count their rows."""


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How one sink is doing."""

    name: str
    error: str = ""
    """What it said last; empty: all is well."""
    failing_since_s: float = 0.0
    rows_written: int = 0
    rows_dropped: dict[Why, int] = {}
    series_lost: int = 0
    waiting_bytes: int = 0
    waiting_since_s: float = 0.0
    """Time of the oldest row that it has not got; 0: none waits."""
    series: int = 0

    @property
    def dropped(self) -> int:
        """Return how many rows it will never get."""
        return sum(self.rows_dropped.values())


class ShippingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the process that feeds the sinks of a node is doing."""

    node: str
    pid: int
    time_s: float
    sinks: tuple[SinkStatus, ...] = ()
