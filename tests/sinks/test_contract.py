"""Our sinks that need no server keep the contract."""

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from carrel.ports import Sink
from carrel.sinks.csv import CsvSink, tables
from carrel.sinks.files import FileSettings
from carrel.sinks.memory import MemorySink
from carrel.sinks.parquet import ParquetSettings, ParquetSink
from carrel.testing import SinkContract, TakenRow
from carrel.testing.sinks import batch

ALL = ("*",)


class TestMemory(SinkContract):
    @pytest.fixture(autouse=True)
    def kept(self) -> None:
        self.sink_kept = MemorySink()

    def make(self, where: Path) -> Sink:  # noqa: ARG002  # the contract's
        return self.sink_kept

    def taken(self, where: Path) -> Iterable[TakenRow]:  # noqa: ARG002  # the contract's
        for one in self.sink_kept.batches:
            key = one.job.key
            name = (key.cluster, key.job_id, key.submit_s, key.restart, one.node, one.view)
            yield from (TakenRow(name, row.seq, row.time_us, row.values) for row in one.rows)


def number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


@contextlib.contextmanager
def in_the_way(directory: Path) -> Iterator[None]:
    """A file where the tables should go."""
    away = directory.with_name("away")
    directory.rename(away)
    directory.touch()
    yield
    directory.unlink()
    away.rename(directory)


class TestCsv(SinkContract):
    def make(self, where: Path) -> Sink:
        return CsvSink(FileSettings(dir=str(where / "tables"), metrics=ALL), "c1.example/..")

    def taken(self, where: Path) -> Iterable[TakenRow]:
        for path in tables(where / "tables"):
            with path.open(errors="surrogateescape", newline="") as file:
                yield from map(self.row, csv.DictReader(file))

    @staticmethod
    def row(cells: dict[str, str]) -> TakenRow:
        whose = [cells.pop(name) for name in ("cluster", "job_id", "submit_s", "restart", "user", "node", "view")]
        name = (whose[0], int(whose[1]), int(whose[2]), int(whose[3]), whose[5], whose[6])
        time_us, seq = int(cells.pop("time_s").replace(".", "")), int(cells.pop("seq"))
        return TakenRow(name, seq, time_us, {what: number(cell) for what, cell in cells.items() if cell})

    @contextlib.contextmanager
    def down(self, where: Path) -> Iterator[None]:
        with in_the_way(where / "tables"):
            yield

    def test_what_a_killed_writer_left_unfinished_is_cut_off(self, sink: Sink, tmp_path: Path) -> None:
        sink.write([batch()])
        (path,) = tables(tmp_path / "tables")
        path.write_bytes(path.read_bytes()[:-7])
        sink.write([batch(4, 2)])
        self.check(tmp_path, batch(0, 6))


class TestParquet(SinkContract):
    def make(self, where: Path) -> Sink:
        return ParquetSink(ParquetSettings(dir=str(where / "tables"), metrics=ALL), "c1.example/..")

    def taken(self, where: Path) -> Iterable[TakenRow]:
        for path in sorted((where / "tables").glob("date=*/samples.*.parquet"), key=lambda one: one.stat().st_mtime_ns):
            for row in pq.ParquetFile(path).read().to_pylist():
                whose = tuple(row.pop(name) for name in ("cluster", "job_id", "submit_s", "restart", "node", "view"))
                at, seq, _ = row.pop("time"), row.pop("seq"), row.pop("user")
                time_us = round(at.timestamp() * 1e6)
                yield TakenRow(whose, seq, time_us, {name: value for name, value in row.items() if value is not None})

    @contextlib.contextmanager
    def down(self, where: Path) -> Iterator[None]:
        with in_the_way(where / "tables"):
            yield
