"""Living jobs for Prometheus: the last sample of each, with few labels.

Labels of jobs make new series all day long, so what is offered is what dashboards of now need, in base units; history
belongs into files. A job that ended is gone with its last row.
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import prometheus_client
from prometheus_client import core
from prometheus_client.registry import Collector

from carrel import config
from carrel.config import Section
from carrel.errors import CarrelError, UnreachableError
from carrel.model.sample import Batch, Column, Row
from carrel.ports import SinkContext

LABELS = ("cluster", "job", "user", "node", "view")
STALE_S = 300.0
"""A row that is older when it comes tells nothing of now."""

_UNITS = {
    "ns": ("seconds", 1e-9),
    "us": ("seconds", 1e-6),
    "ms": ("seconds", 1e-3),
    "bytes": ("bytes", 1.0),
    "KiB": ("bytes", 1024.0),
}
_SUFFIX = re.compile(r"_(ns|us|ms|bytes)$")
_UNSAFE = re.compile(r"[^A-Za-z0-9_]+")


class PrometheusSettings(Section, frozen=True):
    """``[sinks.prometheus]``."""

    listen: str = "127.0.0.1:9474"
    """Address and port. Whoever can reach it sees all jobs of the node."""
    certificate: str = ""
    """Files for TLS, in PEM; empty: none."""
    key: str = ""
    client_ca: str = ""
    """Only clients with a certificate of this authority are answered."""
    textfile: str = ""
    """Written instead of listening, for node_exporter: ``/var/lib/node_exporter/carrel.prom``."""
    metrics: tuple[str, ...] = ("job.*", "processes.*")
    period_s: float = 1.0


class PrometheusSink:
    """Keeps the last row of each series for whoever asks."""

    rows_max = 240

    def __init__(self, settings: PrometheusSettings, status: Any) -> None:
        """Listen, unless a file is wanted.

        Raises:
            CarrelError: the address is wrong or taken.
        """
        self.period_s = settings.period_s
        self.metrics = settings.metrics
        self._settings = settings
        self._registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self._offer = Offer(status)
        self._registry.register(self._offer)
        self._server: Any = None
        if not settings.textfile:
            self._server, self._thread = self._listening()

    @classmethod
    def from_context(cls, context: SinkContext) -> Self:
        return cls(config.sink_settings(context.config, "prometheus", PrometheusSettings), context.status)

    def _listening(self) -> tuple[Any, threading.Thread]:
        settings = self._settings
        host, _, port = settings.listen.rpartition(":")
        try:
            return prometheus_client.start_http_server(
                int(port),
                host,
                self._registry,
                certfile=settings.certificate or None,
                keyfile=settings.key or None,
                client_cafile=settings.client_ca or None,
                client_auth_required=bool(settings.client_ca),
            )
        except (OSError, ValueError, OverflowError) as error:
            raise CarrelError(f"sinks.prometheus.listen = '{settings.listen}': {error}") from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def write(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._offer.take(batch)
        if self._settings.textfile:
            try:
                prometheus_client.write_to_textfile(self._settings.textfile, self._registry)
            except OSError as error:
                raise UnreachableError(f"{self._settings.textfile}: {error.strerror}; is there room?") from error

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


class Offer(Collector):
    """What is offered now. Asked from other threads."""

    def __init__(self, status: Any) -> None:
        """Begin with nothing; ``status`` returns how the sinks are doing."""
        self._status = status
        self._lock = threading.Lock()
        self._last: dict[str, tuple[Batch, Row]] = {}

    def take(self, batch: Batch) -> None:
        with self._lock:
            if batch.ended:
                self._last.pop(batch.series, None)
            elif batch.rows and batch.rows[-1].time_us / 1e6 > time.time() - STALE_S:
                # What was not read at this moment, since it is read rarely, is still the last that is known.
                before = self._last.get(batch.series)
                values = dict(before[1].values) if before else {}
                for row in batch.rows:
                    values |= row.values
                last = batch.rows[-1]
                self._last[batch.series] = batch, Row(seq=last.seq, time_us=last.time_us, values=values)

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics of all jobs, then how the sinks are doing."""
        with self._lock:
            last = list(self._last.values())
        families: dict[str, Any] = {}
        for batch, row in last:
            labels = [batch.job.key.cluster, str(batch.job.key.job_id), batch.job.user, batch.node, batch.view]
            labels = [label.encode(errors="surrogateescape").decode(errors="replace") for label in labels]
            stamp = families.setdefault(
                "",
                core.GaugeMetricFamily(
                    "carrel_sample_timestamp_seconds", "when the job was last sampled", labels=LABELS
                ),
            )
            stamp.add_metric(labels, row.time_us / 1e6)
            for name, value in row.values.items():
                if name not in families:
                    families[name] = _family(name, batch.columns[name])
                families[name].add_metric(labels, value * _factor(batch.columns[name]))
        yield from families.values()
        yield from self._of_sinks()

    def _of_sinks(self) -> Iterator[core.Metric]:
        written = core.CounterMetricFamily("carrel_sink_rows_written", "rows that a sink has taken", labels=["sink"])
        dropped = core.CounterMetricFamily("carrel_sink_rows_dropped", "rows it never got", labels=["sink", "why"])
        waiting = core.GaugeMetricFamily("carrel_sink_waiting_bytes", "what waits for it", labels=["sink"])
        failing = core.GaugeMetricFamily("carrel_sink_failing", "1: it takes nothing now", labels=["sink"])
        for sink in self._status().sinks:
            written.add_metric([sink.name], sink.rows_written)
            waiting.add_metric([sink.name], sink.waiting_bytes)
            failing.add_metric([sink.name], float(bool(sink.error)))
            for why in ("bytes", "age", "refused"):
                dropped.add_metric([sink.name, why], sink.rows_dropped.get(why, 0))
        yield from (written, dropped, waiting, failing)


def exposed(name: str, column: Column) -> str:
    """Return what Prometheus calls a metric, less the ``_total`` of counters.

    >>> exposed("job.cpu_ns", Column("cpu_ns", "ns", "counter")), exposed("job.tasks", Column("tasks", "count"))
    ('carrel_job_cpu_seconds', 'carrel_job_tasks')
    """
    unit = _UNITS.get(column.unit, ("", 1.0))[0]
    stem = _UNSAFE.sub("_", _SUFFIX.sub("", name) if unit else name)
    return f"carrel_{stem}_{unit}" if unit else f"carrel_{stem}"


def _factor(column: Column) -> float:
    return _UNITS.get(column.unit, ("", 1.0))[1]


def _family(name: str, column: Column) -> Any:
    kind = core.CounterMetricFamily if column.kind == "counter" else core.GaugeMetricFamily
    return kind(exposed(name, column), f"{name} of the job", labels=LABELS)
