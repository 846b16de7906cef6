"""The samples of a running job as they come: the ends of its segments, read on from where the last look stopped."""

import contextlib
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from carrel.core.curves import Recording, Series
from carrel.core.usage import Usage, wanted
from carrel.errors import CarrelError
from carrel.model.job import Job
from carrel.model.sample import Column, NodeSummary, Note
from carrel.sampling.folder import of_stem
from carrel.sampling.segment import RowRead, SegmentReader
from carrel.sampling.tables import PROCESS

KEPT = 240
"""Rows of each node that are looked back upon."""


class Tail:
    """One node and view."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Begin at the beginning: rows are differences to those before.

        Raises:
            CarrelError: it is no segment.
        """
        self.path = path
        self.node, self.view = of_stem(path.name)
        self.job: Job | None = None
        self.ended = False
        self.last_us = 0
        self._file = file
        self._reader = SegmentReader(file, name=str(path))
        self._usage = Usage(self.node, self.view)
        self._rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=KEPT)
        self._columns: dict[str, Column] = {}

    def poll(self) -> bool:
        """Read what is new; return whether there is another row."""
        before_us = self.last_us
        for entry in self._reader.entries():
            if isinstance(entry, Note):
                self._usage.note(entry)
            else:
                self._row(entry)
        self.job, self.ended = self._usage.job, self._usage.ended
        return self.last_us != before_us

    def _row(self, row: RowRead) -> None:
        values: dict[str, float] = {}
        for block in row.blocks:
            schema = block.layout.schema
            if schema.set == PROCESS:
                continue
            places = [(at, name) for at, name in enumerate(schema.names) if wanted(name)]
            if places:
                numbers = block.layout.packing.unpack(block.packed)
                for at, name in places:
                    column = schema.columns[at]
                    self._columns[name] = Column(name, column.unit, column.kind)
                    values[name] = numbers[at]
        self._usage.row(row.time_us, values)
        self._rows.append((row.time_us, values))
        self.last_us = row.time_us

    @property
    def summary(self) -> NodeSummary | None:
        """Return what was used from the beginning on."""
        return self._usage.summary()

    def recording(self) -> Recording | None:
        """Return the last rows; None: there is none yet."""
        summary = self.summary
        if summary is None:
            return None
        series = {
            name: Series(column=column, times_us=array("q"), values=array("d"))
            for name, column in self._columns.items()
        }
        for time_us, values in self._rows:
            for name, value in values.items():
                series[name].times_us.append(time_us)
                series[name].values.append(value)
        return Recording(
            node=self.node,
            view=self.view,
            first_us=self._rows[0][0],
            last_us=self.last_us,
            series={name: one for name, one in series.items() if one.times_us},
            names=self._columns,
            cpus=summary.cpus,
            memory_limit_bytes=summary.memory_limit_bytes,
        )

    def close(self) -> None:
        self._file.close()


class Follower:
    """All nodes and views of a job, also those that begin later."""

    def __init__(self, directory: Path) -> None:
        """Look at nothing yet."""
        self._directory = directory
        self._tails: dict[str, Tail] = {}

    def poll(self) -> Sequence[Tail]:
        """Read what is new and return those that have another row since the last call.

        Raises:
            CarrelError: a file is damaged, or not the caller's to read.
        """
        for path in self._directory.glob("samples.*.seg"):
            if path.name not in self._tails:
                with contextlib.suppress(FileNotFoundError):  # it became a table just now
                    self._tails[path.name] = _opened(path)
        return [tail for tail in self._tails.values() if tail.poll()]

    @property
    def tails(self) -> Sequence[Tail]:
        return tuple(self._tails.values())

    @property
    def over(self) -> bool:
        """Say whether all that began has ended. A segment that is gone became a table, and its end was read before."""
        return all(tail.ended or not tail.path.exists() for tail in self._tails.values())

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()


def _opened(path: Path) -> Tail:
    try:
        file = path.open("rb")
    except PermissionError as error:
        raise CarrelError(f"{path}: {error.strerror}; are these your samples?") from error
    try:
        return Tail(path, file)
    except CarrelError:
        file.close()
        raise
