"""What the spool holds goes to a sink: all, in order, whatever fails; beyond the cap it is dropped, and counted."""

import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.sample import Batch
from carrel.sinks.memory import MemorySink

SERIES = "alpha.7.1731000000.0/c1/host"
DOWN = "nobody answers"


def seqs(sink: MemorySink, series: str = SERIES) -> list[int]:
    return [row.seq for row in sink.rows().get(series, [])]


def test_rows_reach_the_sink_with_their_names_values_and_units(node: Any) -> None:
    job, sink = node.job(rows=3), MemorySink()
    node.outlet(sink).turn()
    (batch,) = sink.batches
    assert batch.job == job.job
    assert [row.values for row in batch.rows][2] == {
        "job.cpu_ns": 2 * 10**9,
        "job.memory_used_bytes": 2**20 + 2,
        "job.limit_bytes": 2**64 - 1,
    }
    assert batch.columns["job.cpu_ns"].unit == "ns"
    assert batch.columns["job.cpu_ns"].kind == "counter"


def test_a_sink_gets_no_row_twice_while_all_is_well(node: Any) -> None:
    job, sink = node.job(rows=3), MemorySink()
    outlet = node.outlet(sink)
    outlet.turn()
    job.rows(2)
    outlet.turn()
    outlet.turn()
    assert [row.seq for batch in sink.batches for row in batch.rows] == [0, 1, 2, 3, 4]


def test_a_sink_gets_the_metrics_it_wants(node: Any) -> None:
    node.job(rows=1)
    sink = MemorySink(metrics=["job.cpu*"])
    node.outlet(sink).turn()
    assert list(sink.batches[0].rows[0].values) == list(sink.batches[0].columns) == ["job.cpu_ns"]


def test_notes_come_too_and_are_counted_on_their_own(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, sink = node.job(rows=2), MemorySink()
    job.end(monkeypatch)
    node.outlet(sink).turn()
    assert [(told.seq, told.note.what) for batch in sink.batches for told in batch.notes] == [(0, "start"), (1, "end")]


def test_a_sink_that_was_down_reads_on_and_misses_nothing(node: Any) -> None:
    job, sink = node.job(rows=2), MemorySink()
    outlet = node.outlet(sink)
    outlet.turn()
    sink.failures = [UnreachableError(DOWN)] * 3
    for _ in range(3):
        job.rows(200)
        outlet.turn()
        assert outlet.status().error == DOWN
    outlet.turn()
    assert seqs(sink) == list(range(602))
    assert (outlet.status().error, outlet.status().dropped) == ("", 0)


def test_while_a_sink_is_down_it_is_asked_less_and_less_often(node: Any) -> None:
    node.job(rows=1)
    sink = MemorySink(period_s=1.0)
    sink.failures = [UnreachableError(DOWN)] * 8
    outlet = node.outlet(sink)
    assert [outlet.turn() for _ in range(9)] == [2, 4, 8, 16, 30, 30, 30, 30, 1]


def test_a_process_that_was_killed_after_the_sink_took_rows_brings_them_again(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.job(rows=3)
    sink = MemorySink()
    killed = node.outlet(sink)
    monkeypatch.setattr(killed, "_save", lambda: None)
    killed.turn()
    node.outlet(sink).turn()
    assert [row.seq for batch in sink.batches for row in batch.rows] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("rows", [1, 599, 600, 601, 1300])
def test_a_new_process_goes_on_where_the_last_one_was(node: Any, rows: int) -> None:
    job, first, second = node.job(rows=rows), MemorySink(), MemorySink()
    node.outlet(first).turn()
    job.rows(2)
    node.outlet(second).turn()
    assert seqs(first) == list(range(rows))
    assert seqs(second) == [rows, rows + 1]
    assert second.batches[0].rows[0].values["job.cpu_ns"] == rows * 10**9


def test_a_batch_that_is_refused_is_dropped_alone_and_counted(node: Any) -> None:
    class Fussy(MemorySink):
        def write(self, batches: Any) -> None:
            if any(batch.job.key.job_id == 8 and batch.rows for batch in batches):
                raise RefusedError("not this one")
            super().write(batches)

    node.job(7, rows=2)
    node.job(8, rows=5)
    node.job(9, rows=2)
    sink = Fussy()
    outlet = node.outlet(sink)
    outlet.turn()
    assert list(sink.rows()) == [SERIES, SERIES.replace(".7.", ".9.")]
    assert outlet.status().rows_dropped == {"refused": 5}
    assert outlet.status().rows_written == 4


def test_a_sink_that_breaks_is_made_anew(node: Any) -> None:
    class Broken(MemorySink):
        def write(self, batches: Any) -> None:
            raise ZeroDivisionError(len(batches))

    node.job(rows=2)
    broken, good = Broken(), MemorySink()
    outlet = node.outlet(broken)
    outlet.turn()
    assert broken.closed
    assert outlet.status().error == "1"
    outlet._make = lambda: good
    outlet.turn()
    assert seqs(good) == [0, 1]


def test_a_sink_that_cannot_be_made_still_has_its_cap(node: Any) -> None:
    def make() -> MemorySink:
        raise CarrelError("its library is missing")

    node.job(rows=500, since_us=0)
    outlet = node.outlet(MemorySink())
    outlet._make = make
    outlet.turn()
    assert outlet.status().error == "its library is missing"
    assert outlet.status().rows_dropped == {"age": 500}


def test_beyond_the_cap_the_oldest_rows_of_all_jobs_go(node: Any) -> None:
    sink = MemorySink()
    sink.failures = [UnreachableError(DOWN)] * 2
    now_us = time.time_ns() // 1000
    old, young = node.job(7, since_us=now_us - 10**9), node.job(8, since_us=now_us)
    outlet = node.outlet(sink)
    outlet.turn()
    old.rows(600)
    young.rows(600)
    size = old.writer.size + young.writer.size
    node.settings = msgspec.structs.replace(node.settings, spool_bytes_max=size * 2 // 3)
    outlet._settings = node.settings
    outlet.turn()
    outlet.turn()
    dropped = outlet.status().rows_dropped["bytes"]
    assert 300 < dropped < 500
    assert seqs(sink) == list(range(dropped, 600))  # a gap that a reader sees
    assert seqs(sink, SERIES.replace(".7.", ".8.")) == list(range(600))


def test_rows_that_waited_too_long_go(node: Any) -> None:
    job, sink = node.job(rows=100), MemorySink()
    now_us = job.since_us + 50 * 1_000_000 + round(node.settings.spool_age_max_s * 1e6)
    outlet = node.outlet(sink, now_us=lambda: now_us)
    outlet.turn()
    assert seqs(sink) == list(range(50, 100))
    assert outlet.status().rows_dropped == {"age": 50}


def test_what_was_dropped_is_still_counted_after_a_restart(node: Any) -> None:
    node.job(rows=10, since_us=0)
    node.outlet(MemorySink()).turn()
    assert node.outlet(MemorySink()).status().rows_dropped == {"age": 10}


def test_a_job_that_ended_keeps_its_segment_until_the_sink_has_it(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, sink = node.job(rows=5), MemorySink()
    sink.failures = [UnreachableError(DOWN)]
    outlet = node.outlet(sink)
    outlet.turn()
    job.rows(5)
    job.end(monkeypatch)
    assert not job.path.exists()
    assert job.kept.exists()
    outlet.turn()
    assert seqs(sink) == list(range(10))
    assert sink.batches[-1].ended
    (name,) = outlet.through()
    node.spool.remove(name, node.root)
    node.spool.remove(name, node.root)
    assert not job.kept.exists()
    assert node.spool.entries() == {}


def test_a_full_spool_lets_go_of_segments_of_a_sink_that_is_down(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink()
    sink.failures = [UnreachableError(DOWN)] * 2
    node.job(rows=400, since_us=time.time_ns() // 1000 - 10**9).end(monkeypatch)
    outlet = node.outlet(sink)
    outlet.turn()
    outlet._settings = msgspec.structs.replace(node.settings, spool_bytes_max=0)
    outlet.turn()
    assert len(outlet.through()) == 1
    assert outlet.status().rows_dropped == {"bytes": 400}


def test_more_jobs_than_may_be_open_come_one_after_the_other(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carrel.daemons.outlet.OPEN_MAX", 2)
    for job_id in range(1, 6):
        node.job(job_id, rows=2, since_us=time.time_ns() // 1000 - job_id).end(monkeypatch)
    sink = MemorySink()
    outlet = node.outlet(sink)
    for _ in range(3):
        outlet.turn()
    assert len(sink.rows()) == 5
    assert len(outlet.through()) == 5


def test_one_job_with_much_to_bring_does_not_keep_the_others_waiting(node: Any) -> None:
    node.job(7, rows=2000)
    node.job(8, rows=1)
    sink = MemorySink(rows_max=60)
    node.outlet(sink).turn()
    first = next(at for at, batch in enumerate(sink.batches) if batch.job.key.job_id == 8)
    assert first <= 1
    assert len(seqs(sink)) == 2000


def test_a_job_whose_owner_removed_its_samples_is_given_up_and_counted(node: Any) -> None:
    job, sink = node.job(rows=5), MemorySink()
    shutil.rmtree(job.folder.path)
    outlet = node.outlet(sink)
    outlet.turn()
    assert outlet.status().series_lost == 1
    assert sink.batches[-1].ended
    assert len(outlet.through()) == 1


def test_a_root_that_is_not_mounted_loses_nothing(node: Any) -> None:
    node.job(rows=5)
    sink = MemorySink()
    away = node.root.with_name("away")
    node.root.rename(away)
    node.root.mkdir()
    outlet = node.outlet(sink)
    outlet.turn()
    assert f"is {node.root} mounted?" in outlet.status().error
    assert outlet.status().series_lost == 0
    node.root.rmdir()
    away.rename(node.root)
    outlet.turn()
    assert seqs(sink) == list(range(5))
    assert outlet.status().error == ""


def test_a_link_in_place_of_the_samples_is_not_followed(node: Any, tmp_path: Path) -> None:
    job, other, sink = node.job(7, rows=5), node.job(8, rows=3), MemorySink()
    job.path.unlink()
    job.path.symlink_to(other.path)
    outlet = node.outlet(sink)
    outlet.turn()
    assert list(sink.rows()) == [SERIES.replace(".7.", ".8.")]
    assert outlet.status().series_lost == 1


def test_what_an_owner_writes_into_his_samples_harms_nobody_else(node: Any) -> None:
    bad, _, sink = node.job(7, rows=5), node.job(8, rows=5), MemorySink()
    bad.path.write_bytes(b"something else entirely")
    outlet = node.outlet(sink)
    outlet.turn()
    assert seqs(sink, SERIES.replace(".7.", ".8.")) == list(range(5))
    assert outlet.status().series_lost == 1


def test_whose_rows_they_are_does_not_depend_on_what_is_in_the_file(node: Any) -> None:
    mine, theirs, sink = node.job(7, rows=2), node.job(8, rows=2), MemorySink()
    mine.path.write_bytes(theirs.path.read_bytes())
    node.outlet(sink).turn()
    assert {batch.job.key.job_id for batch in sink.batches if batch.rows} == {7, 8}


def test_what_is_learnt_of_a_job_later_reaches_the_sink(node: Any) -> None:
    job, sink = node.job(rows=1), MemorySink()
    outlet = node.outlet(sink)
    outlet.turn()
    job.job = msgspec.structs.replace(job.job, name="train")
    job.enlist()
    job.rows(1)
    outlet.turn()
    assert [batch.job.name for batch in sink.batches] == ["", "train"]


def test_two_sinks_go_their_own_ways(node: Any) -> None:
    job, well, down = node.job(rows=4), MemorySink(), MemorySink()
    down.failures = [UnreachableError(DOWN)]
    outlets = [node.outlet(well, name="well"), node.outlet(down, name="down")]
    for outlet in outlets:
        outlet.turn()
    assert (seqs(well), seqs(down)) == ([0, 1, 2, 3], [])
    job.rows(1)
    for outlet in outlets:
        outlet.turn()
    assert seqs(well) == seqs(down) == list(range(5))


def test_the_name_of_a_series_tells_runs_nodes_and_views_apart(node: Any) -> None:
    job = node.job().job
    batch = Batch(job=job, node="c1", view="guest")
    assert batch.series == "alpha.7.1731000000.0/c1/guest"
