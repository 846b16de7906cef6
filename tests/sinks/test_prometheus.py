"""What Prometheus sees: living jobs with few labels, in base units, and how the sinks are doing."""

import time
import urllib.request
from pathlib import Path

import msgspec
import pytest

from carrel.errors import CarrelError
from carrel.model.sample import Batch, Row
from carrel.model.shipping import ShippingStatus, SinkStatus
from carrel.testing.sinks import batch

pytest.importorskip("prometheus_client", reason="not installed: prometheus-client (carrel's extra prometheus)")

from carrel.sinks.prometheus import PrometheusSettings, PrometheusSink

LABELS = '{cluster="alpha",job="4711",node="c1",user="ann",view="host"}'


def status() -> ShippingStatus:
    kafka = SinkStatus(name="kafka", error="nobody is there", rows_dropped={"bytes": 12}, waiting_bytes=4096)
    return ShippingStatus(node="c1", pid=1, time_s=0.0, sinks=(kafka,))


def now(one: Batch) -> Batch:
    """Return a batch whose last row is of now."""
    late_us = time.time_ns() // 1000 - one.rows[-1].time_us
    rows = tuple(msgspec.structs.replace(row, time_us=row.time_us + late_us) for row in one.rows)
    return msgspec.structs.replace(one, rows=rows)


@pytest.fixture
def sink(tmp_path: Path) -> PrometheusSink:
    return PrometheusSink(PrometheusSettings(textfile=str(tmp_path / "carrel.prom")), status)


def scraped(sink: PrometheusSink) -> dict[str, float]:
    sink.write([])
    return shown(Path(sink._settings.textfile).read_text())


def shown(text: str) -> dict[str, float]:
    lines = text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_a_living_job_is_there_in_base_units(sink: PrometheusSink) -> None:
    sink.write([now(batch(0, 5))])
    found = scraped(sink)
    assert found[f"carrel_job_cpu_seconds_total{LABELS}"] == pytest.approx(4 + 4711e-9)
    assert found[f"carrel_job_memory_used_bytes{LABELS}"] == 2**20


def test_a_job_that_ended_is_gone(sink: PrometheusSink) -> None:
    one = now(batch())
    sink.write([one, now(batch(job_id=8))])
    sink.write([Batch(job=one.job, node=one.node, view=one.view, ended=True)])
    assert {name for name in scraped(sink) if "cpu_seconds" in name} == {
        f"carrel_job_cpu_seconds_total{LABELS}".replace("4711", "8")
    }


def test_rows_that_come_late_after_an_outage_tell_nothing_of_now(sink: PrometheusSink) -> None:
    one = batch(0, 1)
    sink.write([msgspec.structs.replace(one, rows=(Row(seq=0, time_us=10**15, values={"job.cpu_ns": 1}),))])
    assert not [name for name in scraped(sink) if name.startswith("carrel_job")]


def test_what_is_read_rarely_stays_until_it_is_read_again(sink: PrometheusSink) -> None:
    one = now(batch(0, 2))
    rare = msgspec.structs.replace(one.rows[1], values={"job.cpu_ns": 7})
    sink.write([msgspec.structs.replace(one, rows=(one.rows[0], rare))])
    assert scraped(sink)[f"carrel_job_memory_used_bytes{LABELS}"] == 2**20


def test_how_the_sinks_are_doing_is_there_too(sink: PrometheusSink) -> None:
    found = scraped(sink)
    assert found['carrel_sink_rows_dropped_total{sink="kafka",why="bytes"}'] == 12
    assert found['carrel_sink_waiting_bytes{sink="kafka"}'] == 4096
    assert found['carrel_sink_failing{sink="kafka"}'] == 1


def test_a_hostile_name_is_one_label(sink: PrometheusSink) -> None:
    sink.write([now(batch(user='"}\nx{a="'))])
    assert len([name for name in scraped(sink) if name.startswith("carrel_job_cpu")]) == 1


def test_it_listens_and_a_port_that_is_taken_is_a_sentence() -> None:
    sink = PrometheusSink(PrometheusSettings(listen="127.0.0.1:0"), status)
    sink.write([now(batch())])
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=30) as answer:
        assert shown(answer.read().decode())[f"carrel_job_memory_used_bytes{LABELS}"] == 2**20
    with pytest.raises(CarrelError, match=r"sinks.prometheus.listen = '127.0.0.1:\d+': .*Address already in use"):
        PrometheusSink(PrometheusSettings(listen=f"127.0.0.1:{sink.port}"), status)
    sink.close()
