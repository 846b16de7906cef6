"""Measure what bringing samples to Kafka costs on this machine, and print what was seen.

Usage: python benchmarks/kafka_sink.py [--repeat 3] [--messages 50000] [--servers HOST:PORT]

Without ``--servers``, brokers are librdkafka's mock cluster in a process of its own: they compete for the same CPUs,
and write nothing to a disk. CPU time is this process's alone. Nothing is asserted: figures are for reading.
"""

import argparse
import contextlib
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from carrel.config import Metrics
from carrel.daemons.outlet import Outlet
from carrel.model.job import Job, JobKey
from carrel.model.sample import Batch, Column, Row
from carrel.sampling import node
from carrel.sampling.blocks import Reading
from carrel.sampling.folder import JobFolder
from carrel.sampling.segment import SegmentWriter
from carrel.sampling.series import Series
from carrel.sampling.spool import Spool
from carrel.sinks.kafka import KafkaSettings, KafkaSink
from carrel.sinks.messages import Avro, Encoder, Json
from carrel.testing.kafka import MockKafka

ROWS = 600
KEY = JobKey(cluster="bench", job_id=1, submit_s=1)
JOB = Job(key=KEY, state="running", user="bench", uid=os.geteuid(), gid=os.getegid(), cpus=1)


class Figures:
    """Prints rows as they come."""

    def row(self, what: str, values: Sequence[float], unit: str, note: str = "") -> None:
        """Print the median and the spread of ``values``."""
        spread = f"{min(values):.4g} … {max(values):.4g}" if len(values) > 1 else ""
        print(
            f"{what:<58} {statistics.median(values):>10.4g} {unit:<8} {spread:<20} n={len(values)} {note}", flush=True
        )


class OneSchema:
    """Numbers every schema 1: what a registry says costs one request in the life of a process."""

    def number(self, subject: str, schema: dict[str, object]) -> int:  # noqa: ARG002  # the protocol's
        """Return 1."""
        return 1


def messages(figures: Figures, servers: str, repeat: int, count: int) -> None:
    """Small messages, as many as possible: what a message costs beside its contents."""
    column = Column("cpu_ns", "ns", "counter")
    batches = [
        Batch(
            job=JOB,
            node="c1",
            view="host",
            rows=(Row(seq=at, time_us=at, values={"job.cpu_ns": at * 10**9}),),
            columns={"job.cpu_ns": column},
        )
        for at in range(count)
    ]
    sink = KafkaSink(KafkaSettings(servers=servers, topics="bench.small"), "c1")
    sink.write(batches[:100])
    rates, costs = [], []
    for _ in range(repeat):
        began_s, cpu_s = time.monotonic(), time.process_time()
        sink.write(batches)
        rates.append(count / (time.monotonic() - began_s))
        costs.append((time.process_time() - cpu_s) / count * 1e6)
    sink.close()
    size = len(Json().samples(batches[-1], batches[-1].rows))
    figures.row("messages of one value, acknowledged by all replicas", rates, "1/s", f"{size} bytes each, as JSON")
    figures.row("  CPU, encoding included", costs, "us each")


@contextlib.contextmanager
def recorded(where: Path) -> Iterator[tuple[Spool, int]]:
    """Record this node's own values, one sample soon after the other; give the spool, and how many values a row has."""
    spool = Spool(where / "spool")
    folder = JobFolder.make(where / "metrics", KEY, user="bench", uid=JOB.uid, gid=JOB.gid)
    writer = SegmentWriter(folder.create("samples.c1.seg"), name="bench")
    sources = [source for source in node.sources() if not source.period_s]
    values = 0
    for at in range(ROWS):
        blocks = [block for source in sources for block in source.read()]
        values = sum(len(block.layout.schema.columns) for block in blocks)
        writer.row(1_700_000_000_000_000 + at * 1_000_000, (Reading(blocks), None))
        time.sleep(0.005)
    spool.enlist(JOB, folder, node="c1", view="host", since_us=1)
    yield spool, values
    writer.close()
    folder.close()
    for source in sources:
        source.close()


def sizes(figures: Figures, spool: Spool, root: Path, values: int) -> None:
    """Bytes of a value in a message, and what compression leaves of them."""
    (entry,) = spool.entries().values()
    for rows in (5, 60):
        for name, encoder in (("JSON", Json()), ("Avro", Avro(OneSchema(), ("a", "b", "c")))):
            found = list(_encoded(root, spool, encoder, rows))
            whole = sum(map(len, found))
            packed = len(
                subprocess.run(["zstd", "-3", "-c"], input=b"".join(found), capture_output=True, check=True).stdout
            )
            figures.row(f"{name}, {rows} rows a message: bytes per value", [whole / ROWS / values], "B")
            figures.row("  compressed", [packed / ROWS / values], "B", "zstd -3 over all messages")
    figures.row("the segment itself", [(root / entry.directory / "samples.c1.seg").stat().st_size / ROWS / values], "B")


def _encoded(root: Path, spool: Spool, encoder: Encoder, rows: int) -> Iterator[bytes]:
    from carrel.model.shipping import Mark  # noqa: PLC0415  # a detail of this function

    (entry,) = spool.entries().values()
    series = Series(root, entry, Mark(), metrics=("*",))
    while batch := series.take(rows):
        if not batch.rows:
            break
        yield encoder.samples(batch, batch.rows)
    series.close()


def whole_way(figures: Figures, servers: str, where: Path, values: int, repeat: int) -> None:
    """From a segment to Kafka, as after an outage."""
    rates, costs = [], []
    for at in range(repeat):
        sink = KafkaSink(KafkaSettings(servers=servers, topics="bench.rows"), "c1")
        outlet = Outlet(f"bench{at}", lambda sink=sink: sink, Spool(where / "spool"), _settings(where))  # type: ignore[misc]
        began_s, cpu_s = time.monotonic(), time.process_time()
        outlet.turn()
        rates.append(ROWS / (time.monotonic() - began_s))
        costs.append((time.process_time() - cpu_s) / ROWS * 1e6)
        status = outlet.status()
        if status.rows_written != ROWS:
            print(f"  only {status.rows_written} rows of {ROWS} were taken: {status.error}")
        outlet.close()
    figures.row(f"rows of {values} values, from the segment to Kafka", rates, "rows/s")
    figures.row("  CPU", costs, "us each")
    figures.row("  values", [rate * values for rate in rates], "1/s")
    figures.row("resident, at most", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], "MB")


def _settings(where: Path) -> Metrics:
    return Metrics(root=str(where / "metrics"), spool_age_max_s=1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--messages", type=int, default=50_000, help="small messages of one measurement")
    parser.add_argument("--servers", default="", help="brokers; by default a mock cluster")
    arguments = parser.parse_args()
    kernel, python = platform.release(), platform.python_version()
    print(f"{os.cpu_count()} CPUs, Linux {kernel}, Python {python}, load {os.getloadavg()[0]:.1f}")
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = arguments.servers or stack.enter_context(contextlib.closing(MockKafka())).servers
        spool, values = stack.enter_context(recorded(where))
        sizes(Figures(), spool, where / "metrics", values)
        whole_way(Figures(), servers, where, values, arguments.repeat)
        messages(Figures(), servers, arguments.repeat, arguments.messages)


if __name__ == "__main__":
    main()
