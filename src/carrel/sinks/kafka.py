"""Samples to Kafka: three fixed topics, keyed by run, so that a reader gets the rows of a job in order.

The spool on the disk is the buffer, not librdkafka: a call produces, waits until all brokers that must have it have it,
and only then does the row count as taken. What comes twice after a failure has the name that it had before, and within
a partition the rows of a series come in order, so a reader that passes over those up to the last one it has seen gets
each exactly once.
"""

import importlib.util
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, Self

from carrel import config
from carrel.config import Section
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.sample import Batch, Row
from carrel.ports import SinkContext
from carrel.sinks.messages import Avro, Encoder, Json

_FLUSH_MARGIN_S = 5.0
_HEADERS_BYTES = 1024
"""Room for what a message has beside its value."""


def _librdkafka() -> Any:
    """Return the part of confluent-kafka that is C, without the package around it.

    Version 2.16 imports asyncio and TLS for serialisers that are not used here: 7 MB on each node, of 30.

    Raises:
        ImportError: it is not installed.
    """
    package = importlib.util.find_spec("confluent_kafka")
    found = package and PathFinder.find_spec("confluent_kafka.cimpl", package.submodule_search_locations)
    if found is None or found.loader is None:
        raise ImportError("there is no confluent_kafka.cimpl")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


_LIBRDKAFKA = _librdkafka()


class KafkaSettings(Section, frozen=True):
    """``[sinks.kafka]``."""

    servers: str = ""
    """``host:port,host:port``: some of the brokers."""
    encoding: Literal["json", "avro"] = "json"
    registry: str = ""
    """Address of the schema registry: needed for Avro."""
    topics: str = "carrel"
    """Topics are ``<topics>.samples.v1``, ``<topics>.events.v1`` and ``<topics>.metrics.v1``."""
    metrics: tuple[str, ...] = ("*",)
    period_s: float = 5.0
    delivery_timeout_s: float = 30.0
    """A broker that has not answered by then is down; the rows come again."""
    message_max_bytes: int = 1_000_000
    """As the brokers have it; longer messages are cut into shorter ones."""
    properties_file: str = ""
    """More of librdkafka's properties (``security.protocol``, passwords), ``name=value`` a line; for root to read."""


class KafkaSink:
    """Produces messages, and waits for them."""

    rows_max = 240

    def __init__(self, settings: KafkaSettings, node: str) -> None:
        """Keep settings; brokers are looked for by the first call of ``write``.

        Raises:
            CarrelError: they lack something.
        """
        if not settings.servers:
            raise CarrelError("sinks.kafka.servers is not set; name some brokers in [sinks.kafka]: host:port,host:port")
        if settings.encoding == "avro" and not settings.registry:
            raise CarrelError(
                "sinks.kafka.encoding = avro needs sinks.kafka.registry, the address of a schema registry"
            )
        self.period_s = settings.period_s
        self.metrics = settings.metrics
        self._settings = settings
        self._node = node
        self._topics = tuple(f"{settings.topics}.{what}.v1" for what in ("samples", "events", "metrics"))
        self._encoder: Encoder = Json()
        if settings.encoding == "avro":
            subjects = (f"{self._topics[0]}-value", f"{self._topics[1]}-value", f"{self._topics[2]}-value")
            from carrel.sinks.registry import Registry  # noqa: PLC0415  # who sends JSON does without urllib's 4 MB

            self._encoder = Avro(Registry(settings.registry), subjects)
        self._producer: Any = None
        self._failed: list[Any] = []
        self._heard = ""
        self._told: set[str] = set()

    @classmethod
    def from_context(cls, context: SinkContext) -> Self:
        return cls(config.sink_settings(context.config, "kafka", KafkaSettings), context.node)

    def write(self, batches: Sequence[Batch]) -> None:
        producer = self._producer = self._producer or self._connected()
        self._failed = []
        try:
            news = self._tell_metrics(batches)
            for batch in batches:
                self._send(batch)
            # What is left was in flight when time ran out.
            left = producer.flush(self._settings.delivery_timeout_s + _FLUSH_MARGIN_S)
        except BaseException:
            self._let_go()
            raise
        if self._failed or left:
            error = self._failed[0] if self._failed else f"{left} messages were not acknowledged"
            # A producer that failed once may still send what it has, in whatever order: the next one starts clean.
            self._let_go()
            raise UnreachableError(f"kafka at {self._settings.servers}: {error}; {self._heard or 'is it up?'}")
        self._told |= news

    def _connected(self) -> Any:
        settings = self._settings
        own: dict[str, Any] = {
            "bootstrap.servers": settings.servers,
            "client.id": f"carrel-{self._node}",
            "enable.idempotence": True,
            "acks": "all",
            "compression.type": "zstd",
            "delivery.timeout.ms": round(settings.delivery_timeout_s * 1000),
            "queue.buffering.max.kbytes": 16384,
            "message.max.bytes": settings.message_max_bytes,
            "error_cb": self._hear,
            # Where to write to stderr is not librdkafka's to decide; what it says comes with the failure.
            "log_level": 0,
        }
        try:
            return _LIBRDKAFKA.Producer(own | _properties(settings.properties_file))
        except (_LIBRDKAFKA.KafkaException, ValueError, TypeError) as error:
            raise CarrelError(f"sinks.kafka: {error}") from error

    def _hear(self, error: Any) -> None:
        self._heard = error.str()

    def _send(self, batch: Batch) -> None:
        samples, events, _ = self._topics
        if batch.rows:
            self._send_rows(samples, batch, batch.rows)
        for told in batch.notes:
            self._produce(events, batch, told.seq, self._encoder.event(batch, told))

    def _send_rows(self, topic: str, batch: Batch, rows: Sequence[Row]) -> None:
        value = self._encoder.samples(batch, rows)
        if len(value) + _HEADERS_BYTES <= self._settings.message_max_bytes:
            self._produce(topic, batch, rows[0].seq, value)
            return
        if len(rows) == 1:
            most = self._settings.message_max_bytes
            raise RefusedError(f"{batch.series}: a sample of {len(value)} bytes; kafka takes {most}")
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            self._send_rows(topic, batch, half)

    def _produce(self, topic: str, batch: Batch, seq: int, value: bytes) -> None:
        key = f"{batch.job.key.cluster}.{batch.job.key}".encode(errors="surrogateescape")
        series = batch.series.encode(errors="surrogateescape")
        self._put(topic, key, value, [("series", series), ("seq", str(seq).encode())])

    def _tell_metrics(self, batches: Sequence[Batch]) -> set[str]:
        """Tell once what each metric is: by its name as the key, so that a compacted topic keeps just that."""
        news = {n: c for batch in batches for n, c in batch.columns.items() if n not in self._told}
        for name, column in news.items():
            self._put(self._topics[2], name.encode(errors="replace"), self._encoder.metric(name, column), [])
        return set(news)

    def _put(self, topic: str, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key, on_delivery=self._delivered, headers=headers)
            except BufferError:  # as much as may be in memory: wait until some of it is there
                self._producer.poll(1.0)
                if self._failed:
                    return
            except _LIBRDKAFKA.KafkaException as error:
                raise UnreachableError(f"kafka at {self._settings.servers}: {error}") from error
            else:
                self._producer.poll(0)
                return

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failed.append(error.str())

    def _let_go(self) -> None:
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(0)
            self._producer = None

    def close(self) -> None:
        self._let_go()


def _properties(path: str) -> dict[str, str]:
    if not path:
        return {}
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise CarrelError(f"{path}: {error.strerror} (sinks.kafka.properties_file)") from error
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name.strip(): value.strip() for name, _, value in pairs}
