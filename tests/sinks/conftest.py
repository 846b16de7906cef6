"""A node whose sampler is the test: it writes rows of jobs, and tells the spool of them as the sampler does."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.config import Metrics
from carrel.daemons.outlet import Outlet
from carrel.model.job import Job, JobKey
from carrel.model.sample import Column, Note, Schema
from carrel.model.shipping import ShippingStatus, SinkStatus
from carrel.process import CommandError, run
from carrel.sampling import compact
from carrel.sampling.blocks import Layout, Reading
from carrel.sampling.folder import JobFolder
from carrel.sampling.segment import SegmentWriter
from carrel.sampling.spool import Spool
from carrel.sinks.memory import MemorySink
from carrel.testing.kafka import Kafka

CHECKOUT = Path(__file__).resolve().parents[2]
PINS = Path(__file__).parent / "kafka"
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
SCHEMA = Schema(
    set="job",
    columns=(Column("cpu_ns", "ns", "counter"), Column("memory_used_bytes", "bytes"), Column("limit_bytes", "bytes")),
    source="test",
)


class Recorded:
    """A job that is being sampled on ``c1``."""

    def __init__(self, root: Path, spool: Spool, job_id: int, *, since_us: int) -> None:
        self.key = JobKey(cluster="alpha", job_id=job_id, submit_s=1731000000)
        self.job = Job(key=self.key, state="running", user="ann", uid=os.geteuid(), gid=os.getegid(), account="physics")
        self.root, self.spool, self.since_us = root, spool, since_us
        self.folder = JobFolder.make(root, self.key, user="ann", uid=self.job.uid, gid=self.job.gid)
        self.path = self.folder.path / "samples.c1.seg"
        self.kept = self.folder.path / ".samples.c1.seg"
        self.writer = SegmentWriter(self.folder.create(self.path.name), name=str(self.path))
        self.layout = Layout(SCHEMA)
        self.writer.note(Note(time_us=since_us, what="start", text="sampled", job=self.job))
        self.closed = False
        self.enlist()

    def enlist(self) -> None:
        self.spool.enlist(self.job, self.folder, node="c1", view="host", since_us=self.since_us)

    def rows(self, count: int) -> None:
        for _ in range(count):
            at = self.writer.rows
            reading = Reading([self.layout.block((at * 10**9, 2**20 + at % 7, 2**64 - 1))])
            self.writer.row(self.since_us + at * 1_000_000, (None, reading))

    def end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the last note, and make the tables."""
        self.writer.note(Note(time_us=self.since_us + self.writer.rows * 1_000_000, what="end", text="ended"))
        self.close()
        with monkeypatch.context() as context:
            context.chdir(self.folder.path)
            keep = self.spool.holds(self.folder, "samples.c1")
            compact.compact("samples.c1", ["csv"], keep=keep)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.writer.close()


class SampledNode:
    """A node with a spool."""

    def __init__(self, where: Path) -> None:
        self.settings = Metrics(root=str(where / "metrics"), spool_bytes_max=2**20)
        self.root = Path(self.settings.root)
        self.spool = Spool(where / "spool")
        self.closing = contextlib.ExitStack()

    def job(self, job_id: int = 7, rows: int = 0, *, since_us: int | None = None) -> Recorded:
        since_us = time.time_ns() // 1000 if since_us is None else since_us
        made = Recorded(self.root, self.spool, job_id, since_us=since_us)
        made.rows(rows)
        self.closing.callback(made.folder.close)
        self.closing.callback(made.close)
        return made

    def outlet(self, sink: MemorySink, *, name: str = "memory", now_us: Callable[[], int] | None = None) -> Outlet:
        clock = {"now_us": now_us} if now_us else {}
        made = Outlet(name, lambda: sink, Spool(self.spool.directory), self.settings, **clock)
        self.closing.callback(made.close)
        return made


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """Apache Kafka's server, fetched once by Maven into the checkout's build directory."""
    for program, package in (("java", "openjdk-17-jre-headless"), ("mvn", "maven")):
        if shutil.which(program) is None:
            pytest.skip(f"no real Kafka: {program} is not installed ({package})")
    target = CHECKOUT / "build" / "kafka-jars"
    with target.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may fetch it too, and would remove what is in use here
        _fetch_jars(target)
    return target


def _fetch_jars(target: Path) -> None:
    if not _as_pinned(target):
        draft = target.with_name(f".kafka-jars.{os.getpid()}")
        try:
            run(["mvn", "-B", "-q", "-f", PINS / "pom.xml", COPY, f"-DoutputDirectory={draft}"], timeout_s=600)
        except CommandError as error:
            pytest.skip(f"no real Kafka: Maven cannot fetch it: {error}")
        assert _as_pinned(draft), f"{draft}: other files than {PINS}/jars.sha256 says"
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)


def _as_pinned(directory: Path) -> bool:
    lines = (PINS / "jars.sha256").read_text().splitlines()
    wanted = {name: total for total, name in (line.split() for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.jar")}
    return found == wanted


@pytest.fixture(scope="session")
def kafka(kafka_jars: Path) -> Iterator[Kafka]:
    """A real Kafka for the session."""
    where = Path(tempfile.mkdtemp(prefix="carrel-kafka."))
    try:
        broker = Kafka(where, kafka_jars)
        yield broker
        broker.close()
    finally:
        shutil.rmtree(where)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SampledNode]:
    made = SampledNode(tmp_path)
    with made.closing:
        yield made


class Shipper:
    """``carrel serve sinks`` as carreld starts it."""

    def __init__(self, node: SampledNode, settings: str) -> None:
        where = node.spool.directory.parent
        self.spool = node.spool.directory
        self.config = where / "carrel.toml"
        self.config.write_text(f'[node]\ndir = "{where}"\n[metrics]\nroot = "{node.root}"\n{settings}')
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [sys.executable, "-m", "carrel.cli.main", "serve", "sinks", "--node", "c1"]
        self.child = subprocess.Popen(words, env={**os.environ, "CARREL_CONFIG": str(self.config)})

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.child:
            self.child.send_signal(number)
            self.child.wait(timeout=60)
            self.child = None

    def status(self, name: str) -> SinkStatus:
        """Return how a sink is doing, as the process that runs now has told."""
        with contextlib.suppress(FileNotFoundError):
            found = msgspec.json.decode((self.spool / "status.json").read_bytes(), type=ShippingStatus)
            if self.child and found.pid == self.child.pid:
                return next(sink for sink in found.sinks if sink.name == name)
        return SinkStatus(name=name)


@pytest.fixture
def shipper(node: SampledNode) -> Iterator[Callable[[str], Shipper]]:
    """Makes shippers, one at a time; none outlives the test."""
    made: list[Shipper] = []

    def make(settings: str) -> Shipper:
        made.append(Shipper(node, settings))
        return made[-1]

    yield make
    for one in made:
        one.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Callable[[], Any], str], None]:
    """Waits for a fact that is in another process or thread."""

    def wait(fact: Callable[[], Any], what: str) -> None:
        deadline_s = time.monotonic() + 120
        while not fact():
            assert time.monotonic() < deadline_s, f"{what} did not come"
            time.sleep(0.02)

    return wait
