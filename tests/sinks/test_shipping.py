"""The process that feeds the sinks: sinks that are slow, down or full, and what is told of them."""

import contextlib
import csv
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel import config
from carrel.daemons.sinks import Shipping, make_sink
from carrel.errors import CarrelError, NotFoundError
from carrel.model.shipping import ShippingStatus
from carrel.ports import SinkContext
from carrel.process import run
from carrel.sinks.csv import CsvSink, tables
from carrel.sinks.files import FileSettings
from carrel.sinks.memory import MemorySink
from carrel.testing.kafka import MockKafka, Reader

SERIES = "alpha.7.1731000000.0/c1/host"
ALL = ("*",)


def context(settings: config.Config | None = None) -> SinkContext:
    return SinkContext(
        config=settings or config.Config(), node="c1", status=lambda: ShippingStatus(node="c1", pid=1, time_s=0.0)
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("csv", r"sinks.csv.dir = '': an absolute path is needed; set it in \[sinks.csv\]"),
        ("parquet", r"sinks.parquet.dir = ''"),
        ("kafka", r"sinks.kafka.servers is not set; name some brokers"),
    ],
)
def test_what_a_sink_lacks_is_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(CarrelError, match=sentence):
        make_sink(name, context())


def test_an_unknown_sink_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(NotFoundError, match=r"no sink 'kafak' is installed .* known: csv, kafka, parquet, prometheus"):
        make_sink("kafak", context())


def test_a_mistyped_setting_of_a_sink_is_named() -> None:
    settings = config.Config(sinks={"kafka": {"server": "x"}})
    with pytest.raises(CarrelError, match=r"sinks.kafka: unknown key server \(did you mean servers\?\)"):
        make_sink("kafka", context(settings))


def test_a_slow_sink_keeps_no_other_waiting(node: Any, wait_for: Any) -> None:
    go_on = threading.Event()

    class Slow(MemorySink):
        def write(self, batches: Any) -> None:
            assert go_on.wait(60)
            super().write(batches)

    node.job(rows=100)
    slow, fast = Slow(), MemorySink()
    outlets = [node.outlet(slow, name="slow"), node.outlet(fast, name="fast")]
    threads = [threading.Thread(target=outlet.run) for outlet in outlets]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: outlets[1].status().rows_written == 100, "the fast sink's rows")
        assert outlets[0].status().rows_written == 0
        go_on.set()
        wait_for(lambda: outlets[0].status().rows_written == 100, "the slow sink's rows")
    finally:
        for outlet, thread in zip(outlets, threads, strict=True):
            outlet.stop()
            thread.join(60)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    try:
        run(["mount", "-t", "tmpfs", "-o", "size=64k", "carrel-test", where])
    except CarrelError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    yield where
    run(["umount", where])


def written(directory: Path) -> list[int]:
    found = []
    for path in tables(directory):
        with path.open(newline="") as file:
            found += [int(row["seq"]) for row in csv.DictReader(file)]
    return found


@pytest.mark.root
def test_a_disk_that_is_full_loses_no_row_of_its_sink(node: Any, tmpfs: Path) -> None:
    node.job(rows=1500)
    sink = CsvSink(FileSettings(dir=str(tmpfs), metrics=ALL), "c1")
    outlet = node.outlet(sink)
    outlet.turn()
    outlet.turn()
    assert "No space left on device; is there room?" in outlet.status().error
    had = written(tmpfs)
    assert had == list(range(len(had)))
    assert 0 < len(had) < 1500
    run(["mount", "-o", "remount,size=8m", tmpfs])
    outlet.turn()
    assert sorted(set(written(tmpfs))) == list(range(1500))
    assert outlet.status().dropped == 0


@pytest.mark.root
def test_a_spool_whose_disk_is_full_loses_no_row_and_brings_some_twice(node: Any, tmpfs: Path) -> None:
    job, sink = node.job(rows=10), MemorySink()
    shutil.move(node.spool.directory, tmpfs / "spool")
    node.spool.directory.symlink_to(tmpfs / "spool")
    outlet = node.outlet(sink)
    outlet.turn()
    with (tmpfs / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    for _ in range(3):
        job.rows(10)
        outlet.turn()
    assert "No space left" in outlet.status().error
    assert [row.seq for row in sink.rows()[SERIES]] == list(range(40))
    again = MemorySink()
    node.outlet(again).turn()
    assert [row.seq for row in again.rows()[SERIES]] == list(range(10, 40))


def test_without_sinks_what_earlier_ones_left_is_tidied_up(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    over, running = node.job(7, rows=3), node.job(8, rows=3)
    over.end(monkeypatch)
    where = node.spool.directory.parent
    shipping = Shipping(config.Config(node=config.Node(dir=str(where)), metrics=node.settings), "c1")
    shipping.tidy()
    assert not over.kept.exists()
    assert [entry.job.key.job_id for entry in node.spool.entries().values()] == [8]
    assert running.path.exists()


def test_two_processes_do_not_feed_the_sinks_of_one_node(node: Any) -> None:
    settings = config.Config(node=config.Node(dir=str(node.spool.directory.parent)), metrics=node.settings)
    first = Shipping(settings, "c1")
    with pytest.raises(CarrelError, match=r"another process feeds the sinks of this node; is carreld running\?"):
        Shipping(settings, "c1")
    assert first.status().sinks == ()


def test_a_process_told_to_stop_ends_with_all_marks_kept(
    node: Any, shipper: Any, wait_for: Any, tmp_path: Path
) -> None:
    ships = shipper(f'sinks = ["csv"]\n[sinks.csv]\ndir = "{tmp_path}/tables"\nperiod_s = 0.1\n')
    node.job(rows=100)
    ships.start()
    wait_for(lambda: ships.status("csv").rows_written == 100, "all rows")
    child: subprocess.Popen[bytes] = ships.child
    ships.end()
    assert child.returncode == 0
    ships.start()
    wait_for(lambda: ships.status("csv").rows_written == 100, "the same number")
    assert written(tmp_path / "tables") == list(range(100))
    ships.end()


@pytest.mark.kafka
def test_beyond_the_cap_rows_are_dropped_and_the_reader_sees_as_many_missing(
    node: Any, shipper: Any, wait_for: Any
) -> None:
    broker = MockKafka()
    kafka = f'[sinks.kafka]\nservers = "{broker.servers}"\nperiod_s = 0.1\ndelivery_timeout_s = 1.0\n'
    ships = shipper(f'sinks = ["kafka"]\nspool_bytes_max = 8192\n{kafka}')
    job = node.job(rows=10)
    broker.halt()
    ships.start()
    wait_for(lambda: ships.status("kafka").error, "word of the broker")
    job.rows(3000)
    wait_for(lambda: ships.status("kafka").rows_dropped, "the cap")
    broker.go_on()
    job.rows(10)
    wait_for(lambda: ships.status("kafka").rows_written + ships.status("kafka").dropped == 3020, "all rows")
    dropped = ships.status("kafka").rows_dropped["bytes"]
    ships.end(signal.SIGTERM)
    reader = Reader(broker.servers)
    seen = [json.loads(message.value()) for message in reader.messages("carrel.samples.v1")]
    reader.close()
    broker.close()
    seqs = {one["seq"] + at for one in seen for at in range(len(one["time_us"]))}
    # What was in flight when the broker was halted may have come all the same.
    assert 3020 - dropped <= len(seqs) <= 3020 - dropped + 10
    assert seqs >= set(range(3010, 3020))
    assert msgspec.json.decode((node.spool.directory / "status.json").read_bytes())["sinks"][0]["error"] == ""
