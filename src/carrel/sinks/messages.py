"""What goes through Kafka: rows column by column, a number alone where it is the same in all of them.

A message is a batch, not a value: at 1 Hz a thousand nodes with a job each send a few hundred a second. JSON is for
people and any reader. Avro is smaller, and a kernel that counts something new needs no new schema: names of metrics are
data.
"""

import io
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from carrel.model.sample import Batch, Column, Row, Told

FORMAT = 1
LONG_MAX = 2**63
"""Avro has no unsigned numbers: what reaches this goes as decimal digits."""

_WHOSE: list[dict[str, Any]] = [
    *({"name": name, "type": "string"} for name in ("cluster", "user", "account", "partition", "name", "node", "view")),
    *({"name": name, "type": "long"} for name in ("job_id", "submit_s", "restart")),
    {"name": "seq", "type": "long"},
]
_VALUE = ["null", "long", "double", "string"]
SAMPLES: dict[str, Any] = {
    "type": "record",
    "name": "Samples",
    "namespace": "carrel.v1",
    "fields": [
        *_WHOSE,
        {"name": "time_us", "type": {"type": "array", "items": "long"}},
        {"name": "constants", "type": {"type": "map", "values": _VALUE}},
        {"name": "longs", "type": {"type": "map", "values": {"type": "array", "items": "long"}}},
        {"name": "others", "type": {"type": "map", "values": {"type": "array", "items": _VALUE}}},
    ],
}
EVENT: dict[str, Any] = {
    "type": "record",
    "name": "Event",
    "namespace": "carrel.v1",
    "fields": [
        *_WHOSE,
        *({"name": name, "type": "string"} for name in ("what", "text")),
        {"name": "time_us", "type": "long"},
    ],
}
METRIC: dict[str, Any] = {
    "type": "record",
    "name": "Metric",
    "namespace": "carrel.v1",
    "fields": [{"name": name, "type": "string"} for name in ("name", "unit", "kind")],
}

Value = int | float


class Encoder(Protocol):
    """Makes the value of a message."""

    def samples(self, batch: Batch, rows: Sequence[Row]) -> bytes:
        """Return consecutive rows of a batch."""
        ...

    def event(self, batch: Batch, told: Told) -> bytes:
        """Return a note of a batch's series."""
        ...

    def metric(self, name: str, column: Column) -> bytes:
        """Return what a metric is."""
        ...


def whose(batch: Batch, seq: int) -> dict[str, Any]:
    job = batch.job
    texts = {"user": job.user, "account": job.account, "partition": job.partition, "name": job.name}
    texts |= {"cluster": job.key.cluster, "node": batch.node, "view": batch.view}
    numbers = {"job_id": job.key.job_id, "submit_s": job.key.submit_s, "restart": job.key.restart, "seq": seq}
    # Names come from elsewhere and may hold any byte; what reads messages takes UTF-8.
    return {n: t.encode(errors="surrogateescape").decode(errors="replace") for n, t in texts.items()} | numbers


def columnar(rows: Sequence[Row]) -> tuple[dict[str, Value], dict[str, list[Value | None]]]:
    """Return what is the same in all rows, and the values of the rest; None: not read at that moment."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    constants: dict[str, Value] = {}
    series: dict[str, list[Value | None]] = {}
    for name in names:
        values = [row.values.get(name) for row in rows]
        first = values[0]
        if first is not None and values.count(first) == len(values):
            constants[name] = first
        else:
            series[name] = values
    return constants, series


class Json:
    """Messages as JSON objects."""

    def samples(self, batch: Batch, rows: Sequence[Row]) -> bytes:
        constants, series = columnar(rows)
        about = whose(batch, rows[0].seq) | {"format": FORMAT, "time_us": [row.time_us for row in rows]}
        return msgspec.json.encode(about | {"constants": constants, "series": series})

    def event(self, batch: Batch, told: Told) -> bytes:
        note = told.note
        about = {"format": FORMAT, "time_us": note.time_us, "what": note.what, "text": note.text}
        return msgspec.json.encode(whose(batch, told.seq) | about)

    def metric(self, name: str, column: Column) -> bytes:
        return msgspec.json.encode({"name": name, "unit": column.unit, "kind": column.kind})


class Schemas(Protocol):
    """Knows the number of a schema."""

    def number(self, subject: str, schema: dict[str, Any]) -> int:
        """Return the schema's number in the registry; it is registered if need be.

        Raises:
            UnreachableError: the registry does not answer.
        """
        ...


class Avro:
    """Messages as Avro with the head that readers of a schema registry expect: 0, and the schema's number."""

    def __init__(self, schemas: Schemas, subjects: tuple[str, str, str]) -> None:
        """Register schemas when they are first needed.

        Args:
            schemas: The registry.
            subjects: Those of samples, events and metrics.
        """
        from fastavro import parse_schema, schemaless_writer  # noqa: PLC0415  # who sends JSON does without

        self._write = schemaless_writer
        self._schemas = schemas
        kinds = (SAMPLES, EVENT, METRIC)
        self._kinds = [(subject, kind, parse_schema(kind)) for subject, kind in zip(subjects, kinds, strict=True)]

    def _encoded(self, which: int, record: dict[str, Any]) -> bytes:
        subject, kind, parsed = self._kinds[which]
        out = io.BytesIO()
        out.write(b"\0" + self._schemas.number(subject, kind).to_bytes(4, "big"))
        self._write(out, parsed, record)
        return out.getvalue()

    def samples(self, batch: Batch, rows: Sequence[Row]) -> bytes:
        constants, series = columnar(rows)
        longs = {name: values for name, values in series.items() if all(map(_is_long, values))}
        others = {name: list(map(_value, values)) for name, values in series.items() if name not in longs}
        record = whose(batch, rows[0].seq) | {
            "time_us": [row.time_us for row in rows],
            "longs": longs,
            "others": others,
        }
        return self._encoded(0, record | {"constants": {name: _value(value) for name, value in constants.items()}})

    def event(self, batch: Batch, told: Told) -> bytes:
        note = told.note
        about = {"time_us": note.time_us, "what": note.what, "text": note.text}
        return self._encoded(1, whose(batch, told.seq) | about)

    def metric(self, name: str, column: Column) -> bytes:
        return self._encoded(2, {"name": name, "unit": column.unit, "kind": column.kind})


def _is_long(value: Value | None) -> bool:
    return isinstance(value, int) and value < LONG_MAX


def _value(value: Value | None) -> Value | str | None:
    return str(value) if isinstance(value, int) and value >= LONG_MAX else value
