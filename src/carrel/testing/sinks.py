"""The contract of a sink, as tests: inherit it, say how to make your sink and how to read what it took, run pytest.

::

    class TestTimescale(carrel.testing.SinkContract):
        def make(self, where: Path) -> Sink:
            return TimescaleSink(...)

        def taken(self, where: Path) -> Iterable[TakenRow]:
            return ...  # all rows that are there, also those that are there twice

The promises are those of ``carrel.ports.Sink``; a test's name says which.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from carrel.errors import UnreachableError
from carrel.model.job import Job, JobKey
from carrel.model.sample import Batch, Column, Note, Row, Told
from carrel.ports import Sink

COLUMNS = {
    "job.cpu_ns": Column("cpu_ns", "ns", "counter"),
    "job.memory_used_bytes": Column("memory_used_bytes", "bytes"),
    "loadavg.load1": Column("load1", ""),
}


SeriesName = tuple[str, int, int, int, str, str]
"""Cluster, job id, submit time, restart count, node, view."""


class TakenRow(NamedTuple):
    """A row as a reader of the sink finds it."""

    series: SeriesName
    seq: int
    time_us: int
    values: Mapping[str, int | float]


BEGAN_US = time.time_ns() // 1000
"""When the job of every batch began: lately, since a broker removes what is old, and once for all."""


def batch(
    first: int = 0, count: int = 5, *, job_id: int = 4711, restart: int = 0, node: str = "c1", user: str = "ann"
) -> Batch:
    """Return a batch whose numbers follow from their places: the same rows are the same each time."""
    key = JobKey(cluster="alpha", job_id=job_id, submit_s=1731000000, restart=restart)
    rows = tuple(
        Row(
            seq=seq,
            time_us=BEGAN_US + seq * 1_000_000,
            values={"job.cpu_ns": seq * 10**9 + job_id, "job.memory_used_bytes": 2**20, "loadavg.load1": seq / 4},
        )
        for seq in range(first, first + count)
    )
    job = Job(key=key, state="running", user=user, uid=1000, gid=1000, account="physics")
    return Batch(job=job, node=node, view="host", rows=rows, columns=COLUMNS)


class SinkContract:
    """What every sink promises. Override ``make`` and ``taken``; the other hooks where the defaults do not fit."""

    answer_limit_s: float = 60.0
    """No call of ``write`` takes longer, whether anybody is there or not."""

    def make(self, where: Path) -> Sink:
        """Return a sink that writes to ``where``; called again for the same place, as after a restart."""
        raise NotImplementedError

    def taken(self, where: Path) -> Iterable[TakenRow]:
        """Return all rows that are there, in the order in which a reader finds them."""
        raise NotImplementedError

    @contextlib.contextmanager
    def down(self, where: Path) -> Iterator[None]:  # noqa: ARG002  # for those that override it
        """Make it unreachable for a while; override it where the sink can be."""
        pytest.skip("this sink cannot be made unreachable")
        yield

    def once(self, where: Path) -> dict[SeriesName, dict[int, TakenRow]]:
        """Return rows as a reader gets them who passes over those whose name he has seen."""
        found: dict[SeriesName, dict[int, TakenRow]] = {}
        for row in self.taken(where):
            found.setdefault(row.series, {}).setdefault(row.seq, row)
        return found

    def check(self, where: Path, *batches: Batch) -> None:
        """Check that all rows of these are there, once each by their names, and nothing else."""
        found = self.once(where)
        expected: dict[SeriesName, dict[int, Row]] = {}
        for one in batches:
            key = one.job.key
            name: SeriesName = (key.cluster, key.job_id, key.submit_s, key.restart, one.node, one.view)
            expected.setdefault(name, {}).update({row.seq: row for row in one.rows})
        assert {name: list(rows) for name, rows in found.items()} == {n: list(rows) for n, rows in expected.items()}
        for name, rows in expected.items():
            for seq, row in rows.items():
                assert found[name][seq].time_us == row.time_us
                assert dict(found[name][seq].values) == row.values

    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        made = self.make(tmp_path)
        yield made
        made.close()

    def test_what_write_took_is_there_when_it_returns(self, sink: Sink, tmp_path: Path) -> None:
        sink.write([batch()])
        self.check(tmp_path, batch())

    def test_rows_of_several_jobs_runs_and_nodes_come_in_one_call(self, sink: Sink, tmp_path: Path) -> None:
        several = [batch(), batch(job_id=4712), batch(restart=1), batch(node="c2")]
        sink.write(several)
        self.check(tmp_path, *several)

    def test_a_series_goes_on_in_its_order(self, sink: Sink, tmp_path: Path) -> None:
        for first in (0, 5, 10):
            sink.write([batch(first)])
        self.check(tmp_path, batch(0, 15))

    def test_what_was_taken_outlives_the_sink(self, tmp_path: Path) -> None:
        for first in (0, 5):
            made = self.make(tmp_path)
            made.write([batch(first)])
            made.close()
        self.check(tmp_path, batch(0, 10))

    def test_rows_that_come_again_cut_otherwise_have_the_names_and_values_that_they_had(
        self, sink: Sink, tmp_path: Path
    ) -> None:
        sink.write([batch(0, 7)])
        sink.write([batch(3, 2), batch(5, 6)])
        self.check(tmp_path, batch(0, 11))

    def test_a_batch_without_rows_is_taken(self, sink: Sink, tmp_path: Path) -> None:
        told = Told(seq=0, note=Note(time_us=1, what="end", text="the job has ended here"))
        one = batch()
        sink.write([one])
        sink.write([Batch(job=one.job, node=one.node, view=one.view, notes=(told,), ended=True)])
        self.check(tmp_path, one)

    def test_no_rows_at_all_are_taken(self, sink: Sink, tmp_path: Path) -> None:
        sink.write([])
        assert list(self.taken(tmp_path)) == []

    def test_values_of_64_bits_and_those_that_are_absent_survive(self, sink: Sink, tmp_path: Path) -> None:
        one = batch(0, 3)
        values: tuple[dict[str, int | float], ...] = (
            {"job.cpu_ns": 2**64 - 1, "job.memory_used_bytes": 2**63},
            {"loadavg.load1": 0.1},
            {"job.cpu_ns": 2**53 + 1, "job.memory_used_bytes": 0, "loadavg.load1": 1e300},
        )
        rows = tuple(Row(seq=row.seq, time_us=row.time_us, values=v) for row, v in zip(one.rows, values, strict=True))
        odd = Batch(job=one.job, node=one.node, view=one.view, rows=rows, columns=COLUMNS)
        sink.write([odd])
        self.check(tmp_path, odd)

    @pytest.mark.parametrize("name", ["../../../etc/x", "a b\n\"c,';", "=1+1", "ä\udcff", "%s{x}"])
    def test_a_hostile_name_harms_nothing(self, sink: Sink, tmp_path: Path, name: str) -> None:
        hostile = batch(user=name)
        sink.write([hostile])
        sink.write([batch(job_id=4712)])
        self.check(tmp_path, hostile, batch(job_id=4712))

    def test_while_nobody_is_there_a_call_ends_and_says_so(self, sink: Sink, tmp_path: Path) -> None:
        sink.write([batch()])
        with self.down(tmp_path):
            began_s = time.monotonic()
            with pytest.raises(UnreachableError):
                sink.write([batch(5)])
            assert time.monotonic() - began_s < self.answer_limit_s
        sink.write([batch(5)])
        self.check(tmp_path, batch(0, 10))
