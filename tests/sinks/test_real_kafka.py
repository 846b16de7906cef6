"""Apache Kafka itself: rows reach a reader exactly once, whatever is stopped, killed or slow meanwhile."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from carrel.testing.kafka import Kafka, Reader

pytest.importorskip("confluent_kafka", reason="not installed: confluent-kafka (carrel's extra kafka)")

pytestmark = pytest.mark.kafka

SETTINGS = """sinks = ["kafka", "csv"]
[sinks.kafka]
servers = "{servers}"
topics = "{topics}"
period_s = 0.1
delivery_timeout_s = 1.5
[sinks.csv]
dir = "{tables}"
period_s = 0.1
"""


def exactly_once(servers: str, topic: str) -> dict[tuple[int, str], list[int]]:
    """Return the numbers of the rows of each series, as a reader takes them who keeps only the last one in mind."""
    last: dict[tuple[int, str], int] = {}
    taken: dict[tuple[int, str], list[int]] = {}
    reader = Reader(servers)
    for message in reader.messages(topic):
        about = json.loads(message.value())
        series = about["job_id"], about["node"]
        for at in range(len(about["time_us"])):
            seq = about["seq"] + at
            if seq > last.get(series, -1):
                last[series] = seq
                taken.setdefault(series, []).append(seq)
    reader.close()
    return taken


def test_a_broker_and_a_shipper_that_are_killed_cost_no_row(  # noqa: PLR0917  # fixtures
    node: Any, kafka: Kafka, shipper: Any, wait_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ships = shipper(SETTINGS.format(servers=kafka.servers, topics="killed", tables=tmp_path / "tables"))
    long, short = node.job(7), node.job(8, rows=200)
    ships.start()
    long.rows(300)
    wait_for(lambda: ships.status("kafka").rows_written >= 500, "the first rows")

    kafka.stop(signal.SIGKILL)
    long.rows(1000)
    short.end(monkeypatch)
    wait_for(lambda: ships.status("kafka").error, "word of the broker")
    # The other sink is none the worse for it.
    wait_for(lambda: ships.status("csv").rows_written == 1500, "the other sink's rows")
    ships.end(signal.SIGKILL)
    long.rows(1000)
    assert short.kept.exists()

    kafka.start()
    for _ in range(2):
        ships.start()
        written = ships.status("kafka").rows_written
        wait_for(lambda n=written: ships.status("kafka").rows_written > n, "more rows")
        ships.end(signal.SIGKILL)
        long.rows(500)
    long.end(monkeypatch)
    ships.start()
    wait_for(lambda: not node.spool.entries(), "the end of all that waits")
    assert not short.kept.exists()
    assert not long.kept.exists()
    assert exactly_once(kafka.servers, "killed.samples.v1") == {
        (7, "c1"): list(range(3300)),
        (8, "c1"): list(range(200)),
    }
    assert [ships.status(sink).dropped for sink in ("kafka", "csv")] == [0, 0]
    ships.end()
