"""A segment as tables: which columns ever change, and row after row of those that do.

Two passes, so that no job is too long: the first one looks, the second one writes. Of a node's thousand columns, most
never change while a job runs; those are told once, in ``job.json``, and in no table.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from carrel.core.usage import Usage, wanted
from carrel.model.sample import Column, NodeSummary, Note, View
from carrel.sampling.blocks import Block, Layout
from carrel.sampling.segment import RowRead, open_reader

PROCESS = "process"
"""The set whose rows are a table of their own: a column for each process would be thousands."""

_FIRST = ("job", "processes", "gpu")
"""What is the job's own comes before what is the node's."""

Value = int | float


class Varying(msgspec.Struct, frozen=True, kw_only=True):
    """A column of the table."""

    name: str
    column: Column
    floating: bool
    unsigned: bool
    """It has values that only fit an unsigned number."""


class _Seen:
    """What one layout's values were: the first ones, and by bits what ever differed."""

    __slots__ = ("changed", "first", "ored")

    def __init__(self, packed: bytes) -> None:
        self.first = self.ored = int.from_bytes(packed, "little")
        self.changed = 0

    def add(self, packed: bytes) -> None:
        value = int.from_bytes(packed, "little")
        self.changed |= value ^ self.first
        self.ored |= value


class Survey:
    """The first pass over a segment."""

    def __init__(self, path: Path, *, node: str, view: View) -> None:
        """Read all of it.

        Raises:
            CarrelError: it is no segment.
        """
        self.path = path
        self.rows = 0
        self.processes = 0
        """Rows of the table of processes."""
        self.notes: list[Note] = []
        self.usage = Usage(node, view)
        self._seen: dict[Layout, _Seen] = {}
        self._wanted: dict[Layout, list[tuple[int, str]]] = {}
        with open_reader(path) as reader:
            for entry in reader.entries():
                if isinstance(entry, Note):
                    self.notes.append(entry)
                    self.usage.note(entry)
                else:
                    self._row(entry)
            self.sources = {layout.schema.set: layout.schema.source for layout in reader.layouts}
        self.varying, self.constants = self._sorted()
        self.units = {c.name: c.column.unit for c in self.varying}

    @property
    def counters(self) -> tuple[str, ...]:
        """Return the names of counters, also of those that rested."""
        varying = [one.name for one in self.varying if one.column.kind == "counter"]
        return (*varying, *(name for name, (column, _) in self.constants.items() if column.kind == "counter"))

    @property
    def summary(self) -> NodeSummary | None:
        return self.usage.summary()

    def _row(self, row: RowRead) -> None:
        self.rows += 1
        values: dict[str, float] = {}
        for block in row.blocks:
            layout = block.layout
            if layout.schema.set == PROCESS:
                self.processes += 1
                continue
            seen = self._seen.get(layout)
            if seen is None:
                self._seen[layout] = _Seen(block.packed)
                names = layout.schema.names
                self._wanted[layout] = [(at, name) for at, name in enumerate(names) if wanted(name)]
            else:
                seen.add(block.packed)
            if places := self._wanted[layout]:
                unpacked = layout.packing.unpack(block.packed)
                values |= {name: unpacked[at] for at, name in places}
        self.usage.row(row.time_us, values)

    def _sorted(self) -> tuple[list[Varying], dict[str, tuple[Column, Value]]]:
        """Tell what varies from what does not; a sampler that was restarted began a new layout of the same names."""
        varying: dict[str, Varying] = {}
        constants: dict[str, tuple[Column, Value]] = {}
        for layout, seen in self._seen.items():
            size, schema = layout.packing.size, layout.schema
            firsts, ored = (layout.packing.unpack(bits.to_bytes(size, "little")) for bits in (seen.first, seen.ored))
            changed = seen.changed.to_bytes(size, "little")
            for at, (name, column) in enumerate(zip(schema.names, schema.columns, strict=True)):
                unsigned = not schema.floating and ored[at] >= 2**63
                before = varying.get(name)
                same = (
                    not any(changed[at * 8 : at * 8 + 8]) and constants.get(name, (column, firsts[at]))[1] == firsts[at]
                )
                if same and before is None:
                    constants[name] = (column, firsts[at])
                    continue
                unsigned = unsigned or (before is not None and before.unsigned)
                if name in constants:
                    unsigned = unsigned or constants.pop(name)[1] >= 2**63
                varying[name] = Varying(name=name, column=column, floating=schema.floating, unsigned=unsigned)
        return sorted(varying.values(), key=lambda one: one.name.partition(".")[0] not in _FIRST), constants

    def table(self) -> Iterator[tuple[int, list[Value | None]]]:
        """Yield (time in us, values of ``varying``); None where a value was not read at that moment."""
        places = {column.name: at for at, column in enumerate(self.varying)}
        chosen: dict[Layout, list[tuple[int, int]]] = {}
        for row in _rows(self.path, self.rows):
            values: list[Value | None] = [None] * len(places)
            for block in row.blocks:
                layout = block.layout
                if layout.schema.set == PROCESS:
                    continue
                if layout not in chosen:
                    names = enumerate(layout.schema.names)
                    chosen[layout] = [(at, places[name]) for at, name in names if name in places]
                unpacked = layout.packing.unpack(block.packed)
                for at, place in chosen[layout]:
                    values[place] = unpacked[at]
            yield row.time_us, values

    def process_table(self) -> Iterator[tuple[int, str, tuple[Value, ...]]]:
        """Yield (time in us, program, values of ``process_columns``) for each reading of each process."""
        for row in _rows(self.path, self.rows):
            for block in row.blocks:
                if block.layout.schema.set == PROCESS:
                    yield row.time_us, block.layout.schema.label, _values(block)

    def process_columns(self) -> tuple[Column, ...]:
        """Return the columns of ``process_table``."""
        for row in _rows(self.path, self.rows):
            for block in row.blocks:
                if block.layout.schema.set == PROCESS:
                    return block.layout.schema.columns
        return ()


def _rows(path: Path, limit: int) -> Iterator[RowRead]:
    """Yield as many rows as the first pass saw: the segment may have grown since."""
    with open_reader(path) as reader:
        for entry in reader.entries():
            if isinstance(entry, RowRead):
                if entry.seq >= limit:
                    return
                yield entry


def _values(block: Block) -> tuple[Value, ...]:
    return block.layout.packing.unpack(block.packed)
