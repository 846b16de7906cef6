"""Kafka: the contract, what its topics hold, and rows that reach a reader exactly once whatever dies meanwhile."""

import base64
import contextlib
import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.errors import RefusedError
from carrel.model.sample import Batch, Note, Row, Told
from carrel.ports import Sink
from carrel.testing import SinkContract, TakenRow
from carrel.testing.kafka import MockKafka, Reader
from carrel.testing.sinks import batch

pytest.importorskip("confluent_kafka", reason="not installed: confluent-kafka (carrel's extra kafka)")
fastavro = pytest.importorskip("fastavro", reason="not installed: fastavro (carrel's extra kafka)")

from carrel.sinks.kafka import KafkaSettings, KafkaSink  # noqa: E402  # it needs the extra

pytestmark = pytest.mark.kafka


def test_on_a_node_the_sink_loads_librdkafka_and_no_event_loop_with_it() -> None:
    code = "import sys, carrel.daemons.sinks, carrel.sinks.kafka; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "confluent_kafka.cimpl" in loaded
    assert not {"asyncio", "ssl", "confluent_kafka"} & set(loaded)


class Registry(http.server.BaseHTTPRequestHandler):
    """Stands in for a schema registry: numbers schemas as they come."""

    schemas: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        schema = json.loads(body["schema"])
        if schema not in self.schemas:
            self.schemas.append(schema)
        answer = json.dumps({"id": self.schemas.index(schema) + 1}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its parent's name
        """Say nothing."""


@pytest.fixture(scope="module")
def mock_kafka() -> Iterator[MockKafka]:
    made = MockKafka()
    yield made
    made.close()


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    Registry.schemas = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def whose(about: dict[str, Any]) -> tuple[str, int, int, int, str, str]:
    numbers = (about["job_id"], about["submit_s"], about["restart"])
    return (about["cluster"], *numbers, about["node"], about["view"])


class TestKafka(SinkContract):
    @pytest.fixture(autouse=True)
    def brokers(self, mock_kafka: MockKafka) -> Iterator[None]:
        self.kafka = mock_kafka
        self.servers = mock_kafka.servers
        self.reader = Reader(self.servers)
        yield
        self.reader.close()

    @contextlib.contextmanager
    def down(self, where: Path) -> Iterator[None]:  # noqa: ARG002  # the contract's
        self.kafka.halt()
        try:
            yield
        finally:
            self.kafka.go_on()

    def settings(self, where: Path) -> KafkaSettings:
        topics = base64.b16encode(where.name.encode()[-40:]).decode()
        return KafkaSettings(servers=self.servers, topics=topics, delivery_timeout_s=2.0)

    def make(self, where: Path) -> Sink:
        return KafkaSink(self.settings(where), "c1")

    def taken(self, where: Path) -> Iterable[TakenRow]:
        for message in self.reader.messages(f"{self.settings(where).topics}.samples.v1"):
            assert dict(message.headers())["seq"]
            yield from self.rows(message.value())

    def rows(self, value: bytes) -> Iterable[TakenRow]:
        about = json.loads(value)
        for at, time_us in enumerate(about["time_us"]):
            series = {name: values[at] for name, values in about["series"].items() if values[at] is not None}
            yield TakenRow(whose(about), about["seq"] + at, time_us, about["constants"] | series)

    def test_a_job_keeps_to_one_partition(self, sink: Sink, tmp_path: Path) -> None:
        for first in range(5):
            sink.write([batch(first, 1), batch(first, 1, job_id=12), batch(first, 1, node="c2")])
        seen: dict[bytes, set[int]] = {}
        for message in self.reader.messages(f"{self.settings(tmp_path).topics}.samples.v1"):
            seen.setdefault(message.key(), set()).add(message.partition())
        assert [len(partitions) for partitions in seen.values()] == [1, 1]

    def test_notes_and_units_have_topics_of_their_own(self, sink: Sink, tmp_path: Path) -> None:
        told = Told(seq=3, note=Note(time_us=17, what="gap", text="two samples were not taken"))
        one = batch()
        sink.write([one, Batch(job=one.job, node="c1", view="host", notes=(told,))])
        sink.write([batch(5)])
        topics = self.settings(tmp_path).topics
        (event,) = self.reader.messages(f"{topics}.events.v1")
        about = self.event(event.value())
        assert (about["seq"], about["what"], about["text"]) == (3, "gap", "two samples were not taken")
        units = self.reader.messages(f"{topics}.metrics.v1")
        assert sorted(message.key() for message in units) == [b"job.cpu_ns", b"job.memory_used_bytes", b"loadavg.load1"]

    def event(self, value: bytes) -> Any:
        return json.loads(value)

    def test_what_is_too_long_for_a_message_goes_in_several(self, tmp_path: Path) -> None:
        sink = KafkaSink(msgspec.structs.replace(self.settings(tmp_path), message_max_bytes=1500), "c1")
        sink.write([batch(0, 60)])
        sink.close()
        assert len(self.reader.messages(f"{self.settings(tmp_path).topics}.samples.v1")) > 1
        self.check(tmp_path, batch(0, 60))


class TestKafkaInAvro(TestKafka):
    @pytest.fixture(autouse=True)
    def schemas(self, registry: str) -> None:
        self.registry = registry

    def settings(self, where: Path) -> KafkaSettings:
        return msgspec.structs.replace(super().settings(where), encoding="avro", registry=self.registry)

    def event(self, value: bytes) -> Any:
        assert value[0] == 0
        schema = Registry.schemas[int.from_bytes(value[1:5], "big") - 1]
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, None)

    def rows(self, value: bytes) -> Iterable[TakenRow]:
        about = self.event(value)
        constants = {name: self.number(found) for name, found in about["constants"].items()}
        for at, time_us in enumerate(about["time_us"]):
            series = {name: self.number(v[at]) for name, v in (about["longs"] | about["others"]).items()}
            values = {name: value for name, value in series.items() if value is not None}
            yield TakenRow(whose(about), about["seq"] + at, time_us, constants | values)

    @staticmethod
    def number(found: Any) -> Any:
        return int(found) if isinstance(found, str) else found


def test_a_row_that_is_too_long_for_any_message_is_refused(mock_kafka: MockKafka) -> None:
    sink = KafkaSink(KafkaSettings(servers=mock_kafka.servers, message_max_bytes=1100), "c1")
    one = batch(0, 1)
    values: dict[str, int | float] = {f"job.{at}": at for at in range(100)}
    many = Row(seq=0, time_us=one.rows[0].time_us, values=values)
    with pytest.raises(RefusedError, match=r"a sample of \d+ bytes; kafka takes 1100"):
        sink.write([type(one)(job=one.job, node="c1", view="host", rows=(many,))])
    sink.close()
