"""A site's real ldmsd understands what it is told: each job gets its own directory, and Kafka gets all rows."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from carrel.config import Config, Ldms, Metrics
from carrel.daemons import ldms_import
from carrel.daemons.ldms import LdmsSampler
from carrel.ldms import plan
from carrel.ldms.csvfile import read
from carrel.model.job import Job, JobKey
from carrel.testing.kafka import MockKafka, Reader

pytestmark = [
    pytest.mark.ldms,
    pytest.mark.skipif(shutil.which("ldmsd") is None, reason="no real LDMS: ldmsd is not installed"),
]
T = TypeVar("T")


def got(answer: "Future[T]") -> T:
    return answer.result(timeout=120)


def wait_for(fact: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 120
    while not fact():
        assert time.monotonic() < deadline_s, f"{what} did not come"
        time.sleep(0.05)  # the fact is in another process


def job(number: int, user: str) -> Job:
    key = JobKey(cluster="alpha", job_id=number, submit_s=1)
    return Job(key=key, state="running", user=user, uid=os.geteuid(), gid=os.getegid())


def free_ports(count: int) -> int:
    """Return the first of a row of ports that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        first = int(one.getsockname()[1])
    return first if first + count < 65536 else first - count


@pytest.fixture(scope="module")
def munge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A munge of this test's own."""
    if shutil.which("munged") is None:
        pytest.skip("no munge: munged is not installed")
    where = tmp_path_factory.mktemp("munge", numbered=True)
    where.chmod(0o755)
    (where / "key").write_bytes(os.urandom(128))
    (where / "key").chmod(0o400)
    words = ["munged", "--foreground", f"--socket={where}/s", f"--key-file={where}/key", f"--pid-file={where}/pid"]
    words += [f"--seed-file={where}/seed", f"--log-file={where}/log", "--force", "--num-threads=2"]
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((where / "s").exists, "munge's socket")
    yield f"{where}/s"
    child.terminate()
    child.wait()


@pytest.fixture(scope="module")
def kafka() -> Iterator[MockKafka]:
    made = MockKafka()
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, munge: str, kafka: MockKafka
) -> Iterator[tuple[Config, LdmsSampler]]:
    """An aggregator, and a node whose jobs it hears of."""
    where = tmp_path_factory.mktemp("ldms")
    first = free_ports(5)
    settings = Ldms(
        port_first=first + 1,
        port_count=4,
        aggregator_port=first,
        store_dir=str(where / "store"),
        auth_options=(f"socket={munge}",),
        kafka=kafka.servers,
        reconnect_s=0.2,
    )
    metrics = Metrics(root=str(where / "metrics"), sampler="ldms", period_s=0.2)
    (where / "store").mkdir()
    (where / "store" / "as_is.json").write_text(plan.as_is())
    (where / "agg.conf").write_text(plan.aggregator(settings, decomposition=str(where / "store" / "as_is.json")))
    words = ["ldmsd", "-c", str(where / "agg.conf"), "-l", str(where / "agg.log"), "-r", str(where / "agg.pid")]
    aggregator = subprocess.Popen([*words, "-v", "ERROR"], stdin=subprocess.DEVNULL)
    config = Config(metrics=metrics, ldms=settings)
    sampler = LdmsSampler(config, "c1", where)
    thread = threading.Thread(target=sampler.run, daemon=True)
    thread.start()
    yield config, sampler
    for one in sampler.runs():
        got(sampler.remove(one)).close()
    sampler.stop()
    thread.join()
    aggregator.terminate()
    aggregator.wait()


def test_each_of_two_jobs_on_a_node_gets_its_own_directory_with_all_six_sets(
    site: tuple[Config, LdmsSampler], kafka: MockKafka
) -> None:
    config, sampler = site
    store = Path(config.ldms.store_dir)
    jobs = [job(101, "ann"), job(102, "bob")]
    for one in jobs:
        got(sampler.add(one))
    for one in jobs:
        where = store / one.user / str(one.key.job_id) / "c1"
        wait_for(lambda w=where: len(list(w.glob("*"))) == 6, f"six files in {where}")  # type: ignore[misc]
        wait_for(lambda w=where: len(list(read(w / "loadavg"))) >= 5, "some rows")  # type: ignore[misc]
    got(sampler.interval(jobs[0].key, 0.1))
    for one in jobs:
        got(sampler.remove(one.key)).close()
        rows = [row for path in (store / one.user / str(one.key.job_id) / "c1").iterdir() for row in read(path)]
        assert {row.set for row in rows} == set(config.ldms.plugins)
        assert {row.producer for row in rows} == {f"{one.user}-{one.key.job_id}-c1", ""}
        assert {row.component for row in rows} == {one.key.job_id}

    # The same port again, for another job: nothing more comes to the first one.
    before = (store / "ann" / "101" / "c1" / "loadavg").read_bytes()
    third = job(103, "ann")
    got(sampler.add(third))
    where = store / "ann" / "103" / "c1"
    wait_for(lambda: (where / "loadavg").exists() and len(list(read(where / "loadavg"))) >= 3, "the third job's rows")
    got(sampler.remove(third.key)).close()
    assert (store / "ann" / "101" / "c1" / "loadavg").read_bytes() == before

    files = ldms_import.nodes_of(store, jobs[0])["c1"]
    path, samples = ldms_import.load(jobs[0], files, Path(config.metrics.root), node="c1", formats=["csv"])
    assert samples >= 5
    assert list(path.glob("samples.c1.csv*"))

    reader = Reader(kafka.servers)
    topics = [name for name in reader.topics() if name.startswith("ldms.loadavg_")]
    seen = {json.loads(message.value())["component_id"] for topic in topics for message in reader.messages(topic)}
    reader.close()
    assert seen == {101, 102, 103}


def test_who_has_no_credential_of_the_site_reads_nothing(site: tuple[Config, LdmsSampler]) -> None:
    config, sampler = site
    got(sampler.add(job(104, "ann")))
    port = str(sampler._jobs[job(104, "ann").key].place.port)
    words = ["ldms_ls", "-h", "localhost", "-x", "sock", "-p", port]
    (option,) = config.ldms.auth_options
    wait_for(lambda: "ann-104-c1/meminfo" in _said([*words, "-a", "munge", "-A", option]), "the job's sets")
    assert "ann-104-c1" not in _said(words)
    got(sampler.remove(job(104, "ann").key)).close()


def _said(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stdout
