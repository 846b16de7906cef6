"""A segment as one sink reads it: row after row, as it grows, from where the sink was before."""

import contextlib
import fnmatch
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from carrel.errors import CarrelError
from carrel.model.sample import Batch, Column, Note, Row, Schema, Told
from carrel.model.shipping import Mark, SpoolEntry
from carrel.sampling import spool
from carrel.sampling.blocks import Layout
from carrel.sampling.segment import RowRead, SegmentReader

PROCESS = "process"
"""The set that only the table of processes has: a column for each process would be thousands."""

Chosen = tuple[tuple[int, str], ...]


class Series:
    """Reads one entry of the spool for one sink, always one row ahead, so that it is known how old the next one is."""

    def __init__(self, root: Path, entry: SpoolEntry, mark: Mark, *, metrics: Sequence[str]) -> None:
        """Open the segment where ``mark`` says.

        Args:
            root: Where all samples are.
            entry: Which segment.
            mark: How far the sink is.
            metrics: Patterns of the metrics to take.

        Raises:
            CarrelError: it is no segment, or damaged.
            FileNotFoundError: its owner has moved it away.
            OSError: it cannot be read now.
        """
        self.entry = entry
        self.mark = mark
        """How far the caller has taken it; what is in ``ahead`` does not count."""
        self._root = root
        self._metrics = tuple(metrics)
        self._file, self._final = spool.open_segment(root, entry)
        try:
            self._reader = SegmentReader(self._file, name=f"{entry.directory}/{entry.stem}")
            self._reader.skip(mark.rows + mark.notes)
        except BaseException:
            self._file.close()
            raise
        self._entries: Iterator[RowRead | Note] = iter(())
        self._ahead: RowRead | Note | None = None
        self._chosen: dict[int, Chosen] = {}
        self._schemas: tuple[Schema, ...] = ()

    def next_us(self) -> int | None:
        """Return the time of the next row or note, None where there is none yet.

        Raises:
            CarrelError: the file is damaged.
        """
        if self._ahead is None:
            self._ahead = self._read()
        return self._ahead.time_us if self._ahead else None

    def _read(self) -> RowRead | Note | None:
        try:
            found = next(self._entries, None)
            if found is None:
                self._entries = self._reader.entries()
                found = next(self._entries, None)
        except (CarrelError, MemoryError, OSError, ValueError, LookupError, OverflowError) as error:
            # Its owner may write anything into it. That must not keep others' rows from being shipped.
            raise CarrelError(f"{self.entry.directory}/{self.entry.stem}: damaged ({error!r})") from error
        return found

    def take(self, rows_max: int) -> Batch:
        """Return what comes next, no more than so many rows and notes; ``mark`` is then behind it."""
        rows: list[Row] = []
        notes: list[Told] = []
        seen, told = self.mark.rows, self.mark.notes
        while len(rows) + len(notes) < rows_max and self.next_us() is not None:
            entry, self._ahead = self._ahead, None
            if isinstance(entry, RowRead):
                rows.append(Row(seq=seen, time_us=entry.time_us, values=self._values(entry)))
                seen += 1
            elif entry is not None:
                notes.append(Told(seq=told, note=entry))
                told += 1
        ended = self.next_us() is None and self._is_final()
        self.mark = Mark(rows=seen, notes=told, final=ended)
        return Batch(
            job=self.entry.job,
            node=self.entry.node,
            view=self.entry.view,
            rows=tuple(rows),
            notes=tuple(notes),
            columns=_columns(self._schemas, self._metrics),
            ended=ended,
        )

    def discard(self, count: int, *, before_us: int | None = None) -> int:
        """Pass over so many rows and notes, or fewer where those after ``before_us`` begin; return how many rows."""
        seen, told = self.mark.rows, self.mark.notes
        for _ in range(count):
            next_us = self.next_us()
            if next_us is None or (before_us is not None and next_us >= before_us):
                break
            seen += isinstance(self._ahead, RowRead)
            told += isinstance(self._ahead, Note)
            self._ahead = None
        dropped = seen - self.mark.rows
        passed = seen + told - self.mark.rows - self.mark.notes
        self.mark = Mark(rows=seen, notes=told, final=passed > 0 and self.next_us() is None and self._is_final())
        return dropped

    def _is_final(self) -> bool:
        """Say whether this was all. A segment is hidden after its last row, so look again only then."""
        if not self._final and not spool.is_live(self._root, self.entry):
            self._final = True
            return self.next_us() is None
        return self._final

    def waiting_bytes(self) -> int:
        """Return how much of the file has not been read."""
        with contextlib.suppress(OSError):
            return max(os.fstat(self._file.fileno()).st_size - self._reader.end, 0)
        return 0

    def _values(self, row: RowRead) -> dict[str, int | float]:
        values: dict[str, int | float] = {}
        for block in row.blocks:
            chosen = self._chosen.get(block.layout.number)
            if chosen is None:
                chosen = self._choose(block.layout)
            if chosen:
                unpacked = block.layout.packing.unpack(block.packed)
                for at, name in chosen:
                    values[name] = unpacked[at]
        return values

    def _choose(self, layout: Layout) -> Chosen:
        schema = layout.schema
        chosen = () if schema.set == PROCESS else _chosen(schema, self._metrics)
        if chosen and schema not in self._schemas:
            self._schemas += (schema,)
        self._chosen[layout.number] = chosen
        return chosen

    def close(self) -> None:
        self._file.close()


# Jobs of one node have most schemas in common: what is derived from them is kept once, however many are read.
@functools.lru_cache(maxsize=128)
def _chosen(schema: Schema, metrics: tuple[str, ...]) -> Chosen:
    """Return those that are wanted: their places in the row, and their names."""
    return tuple(
        (at, name)
        for at, name in enumerate(schema.names)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in metrics)
    )


@functools.lru_cache(maxsize=128)
def _columns(schemas: tuple[Schema, ...], metrics: tuple[str, ...]) -> dict[str, Column]:
    return {name: schema.columns[at] for schema in schemas for at, name in _chosen(schema, metrics)}
