"""A node whose sampler is the test: it writes rows of jobs, and tells the spool of them as the sampler does."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carrel.config import Metrics
from carrel.daemons.outlet import Outlet
from carrel.model.job import Job, JobKey
from carrel.model.sample import Column, Note, Schema
from carrel.sampling import compact
from carrel.sampling.blocks import Layout, Reading
from carrel.sampling.folder import JobFolder
from carrel.sampling.segment import SegmentWriter
from carrel.sampling.spool import Spool
from carrel.sinks.memory import MemorySink

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


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SampledNode]:
    made = SampledNode(tmp_path)
    with made.closing:
        yield made
