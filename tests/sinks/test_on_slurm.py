"""Real jobs, from carreld's sampler to a reader of Kafka: all rows, exactly once, whatever is down or killed."""

import csv
import json
import os
import pwd
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from carrel.model.sample import JobFile
from carrel.model.shipping import ShippingStatus
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import await_end, wait_for
from carrel.testing.kafka import MockKafka, Reader
from carrel.testing.leaks import nothing_left
from carrel.testing.sandbox import MakeSandbox, User

pytest.importorskip("confluent_kafka", reason="not installed: confluent-kafka (carrel's extra kafka)")

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.kafka]

SETTINGS = """
[metrics]
period_s = 0.1
sinks = ["csv", "kafka"]
[sinks.csv]
dir = "{tables}"
period_s = 0.2
[sinks.kafka]
servers = "{servers}"
period_s = 0.2
delivery_timeout_s = 1.0
"""


class Site(NamedTuple):
    """A node with two sinks."""

    box: Sandbox
    kafka: MockKafka
    tables: Path


@pytest.fixture(scope="module")
def site(sandbox_factory: MakeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    kafka, tables = MockKafka(), tmp_path_factory.mktemp("tables")
    conf = SETTINGS.format(tables=tables, servers=kafka.servers)
    box = sandbox_factory(nodes=1, carrel_conf=conf)
    yield Site(box, kafka, tables)
    nothing_left(box)
    box.down()
    kafka.close()


def spool_of(box: Sandbox) -> Path:
    return box.dir / "nodes" / "c1" / "spool"


def shipping(box: Sandbox) -> ShippingStatus:
    return msgspec.json.decode((spool_of(box) / "status.json").read_bytes(), type=ShippingStatus)


def begin(box: Sandbox, user: User, seconds: float) -> int:
    words = ["sbatch", "--parsable", "-o", "/dev/null", "--wrap", f"sleep {seconds}"]
    done = box.run(words, user=user.name)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def sampled(box: Sandbox, user: User, job_id: int) -> int:
    """Return how many samples the files of a job have that has ended."""
    path = box.dir / "metrics" / user.name / str(job_id) / "job.json"
    wait_for(path.exists)
    (series,) = msgspec.json.decode(path.read_bytes(), type=JobFile).series
    return series.rows


def in_csv(tables: Path, job_id: int) -> list[int]:
    found: list[int] = []
    for path in sorted(tables.glob("date=*/*.csv")):
        with path.open(newline="") as file:
            found += [int(row["seq"]) for row in csv.DictReader(file) if int(row["job_id"]) == job_id]
    return sorted(set(found))


def in_kafka(servers: str, job_id: int) -> list[int]:
    """Return the rows that a reader takes who passes over those up to the last one he has seen."""
    reader, seqs = Reader(servers), list[int]()
    for message in reader.messages("carrel.samples.v1"):
        about = json.loads(message.value())
        if about["job_id"] == job_id:
            last = seqs[-1] if seqs else -1
            seqs += [seq for seq in range(about["seq"], about["seq"] + len(about["time_us"])) if seq > last]
    reader.close()
    return seqs


def test_every_sample_of_a_job_is_in_every_sink_and_its_segment_goes(site: Site, user: User) -> None:
    job_id = begin(site.box, user, 1)
    assert await_end(site.box, job_id) == "COMPLETED"
    rows = sampled(site.box, user, job_id)
    wait_for(lambda: not list((spool_of(site.box) / "entries").iterdir()))
    assert in_csv(site.tables, job_id) == in_kafka(site.kafka.servers, job_id) == list(range(rows))
    folder = site.box.dir / "metrics" / user.name / str(job_id)
    assert not [path for path in os.listdir(folder) if path.endswith(".seg")]  # noqa: PTH208  # glob hides some
    for sink in ("csv", "kafka"):  # which is told a moment after the segment is gone
        wait_for(lambda sink=sink: f"sink {sink} has taken" in site.box.run(["carrel", "node", "check", "c1"]).stdout)  # type: ignore[misc]


def test_kafka_that_is_down_and_kills_of_carreld_and_of_the_shipper_cost_no_row_and_no_job_any_time(
    site: Site, user: User
) -> None:
    box = site.box
    site.kafka.halt()
    try:
        long = begin(box, user, 6)
        wait_for((spool_of(box) / "status.json").exists)
        os.kill(shipping(box).pid, signal.SIGKILL)
        wait_for(lambda: "sink kafka takes nothing" in box.run(["carrel", "node", "check", "c1"]).stdout)
        box.kill("carreld@c1")
        box.start("carreld@c1")
        assert await_end(box, long) == "COMPLETED"
        rows = sampled(box, user, long)
        folder = box.dir / "metrics" / user.name / str(long)
        assert (folder / "summary.json").exists()  # its report does not wait for Kafka
        assert (folder / ".samples.c1.seg").exists()
        wait_for(lambda: in_csv(site.tables, long) == list(range(rows)))
    finally:
        site.kafka.go_on()
    wait_for(lambda: not list((spool_of(box) / "entries").iterdir()))
    assert in_kafka(site.kafka.servers, long) == list(range(rows))
    assert not (folder / ".samples.c1.seg").exists()
    assert [sink.dropped for sink in shipping(box).sinks] == [0, 0]


def test_the_process_that_feeds_the_sinks_has_the_lowest_priority_and_goes_with_carreld(site: Site) -> None:
    box = site.box
    wait_for(
        lambda: Path(f"/proc/{shipping(box).pid}").exists()
    )  # what an ended one told stays until the next one tells
    pid = shipping(box).pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name == "root"
    box.kill("carreld@c1")
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    box.start("carreld@c1")
    wait_for(lambda: shipping(box).pid != pid)
