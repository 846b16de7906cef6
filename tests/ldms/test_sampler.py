"""ldmsd in the place of our sampler, with a stand-in that writes down what it is told."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from carrel.config import Config, Ldms, Metrics
from carrel.daemons import ldms
from carrel.daemons.ldms import LdmsSampler
from carrel.errors import CarrelError, RefusedError
from carrel.model.job import Job, JobKey

LDMSD = """#!/bin/sh
exec sleep 1000
"""
CONTROLLER = """#!/bin/sh
[ ! -e {where}/aggregator-is-down ] || { echo down >&2; exit 1; }
{ echo "# $*"; cat; } >> {where}/told
"""
T = TypeVar("T")


def job(number: int = 7) -> Job:
    key = JobKey(cluster="alpha", job_id=number, submit_s=1)
    return Job(key=key, state="running", user="ann", uid=os.geteuid(), gid=os.getegid())


def got(answer: "Future[T]") -> T:
    return answer.result(timeout=60)


def wait_for(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.01)  # the fact is in another thread


class Site:
    """A node with LDMS on its PATH."""

    def __init__(self, where: Path) -> None:
        self.where = where
        binaries = where / "bin"
        binaries.mkdir()
        for name, text in (("ldmsd", LDMSD), ("ldmsd_controller", CONTROLLER)):
            path = binaries / name
            path.write_text(text.replace("{where}", str(where)))
            path.chmod(0o755)
        search = f"{binaries}:/usr/bin:/bin"  # and no LDMS that is really installed
        # A fixed row of ports that nobody listens on here.
        settings = Ldms(
            environment={"PATH": search}, store_dir=str(where / "store"), port_count=2, plugins=("meminfo",)
        )
        metrics = Metrics(root=str(where / "metrics"), sampler="ldms", period_s=0.1)
        self.config = Config(metrics=metrics, ldms=settings)

    @contextlib.contextmanager
    def sampler(self) -> Iterator[LdmsSampler]:
        made = LdmsSampler(self.config, "c1", self.where)
        thread = threading.Thread(target=made.run, daemon=True)
        thread.start()
        try:
            yield made
        finally:
            made.stop()
            thread.join(60)
        assert not thread.is_alive()

    def told(self) -> list[str]:
        path = self.where / "told"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(ldms, "RETRY_S", 0.05)
    made = Site(tmp_path)
    yield made
    for record in LdmsSampler(made.config, "c1", tmp_path)._jobs.values():
        record.pid.kill(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid.number, 0)


def test_a_job_gets_a_sampler_and_the_aggregator_is_told(site: Site) -> None:
    with site.sampler() as sampler:
        path = got(sampler.add(job()))
        assert path == site.where / "metrics" / "ann" / "7"
        assert sampler.runs() == (job().key,)
    told = site.told()
    assert told[0] == "# -h localhost -x sock -p 20001 -a munge"
    assert "strgp_add name=j7_0_c1_meminfo plugin=store_csv container=ann/7/c1 schema=meminfo" in told
    assert (site.where / "ldms" / "7.1.0.conf").read_text().splitlines()[1] == (
        "listen xprt=sock port=10101 auth=carrel_auth"
    )


def test_jobs_at_once_have_ports_of_their_own_and_one_too_many_is_a_sentence(site: Site) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job(7)))
        got(sampler.add(job(8)))
        with pytest.raises(CarrelError, match=r"all 2 ports for LDMS samplers are taken; raise ldms.port_count"):
            got(sampler.add(job(9)))
        assert sampler.status().failures == {"command": 1}
        got(sampler.remove(job(7).key)).close()
        got(sampler.add(job(9)))
    assert "strgp_del name=j7_0_c1_meminfo" in site.told()
    assert [line.split()[1] for line in site.told() if line.startswith("prdcr_add")] == [
        "name=c1-10101",
        "name=c1-10102",
        "name=c1-10101",
    ]


def test_a_second_call_changes_nothing(site: Site) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job()))
        first = sampler._jobs[job().key]
        got(sampler.add(job()))
        assert sampler._jobs[job().key] == first
        assert first.pid.alive


def test_an_aggregator_that_is_down_is_told_later(site: Site) -> None:
    down = site.where / "aggregator-is-down"
    down.touch()
    with site.sampler() as sampler:
        got(sampler.add(job()))  # the job does not wait for it
        wait_for(lambda: sampler.status().failures.get("aggregator", 0) >= 2)
        assert "ldmsd at localhost:20001 does not answer" in sampler.status().last_failure
        down.unlink()
        wait_for(lambda: "updtr_start name=j7_0_c1" in site.told())


def test_a_port_is_not_given_on_before_the_aggregator_has_let_go_of_it(site: Site) -> None:
    down = site.where / "aggregator-is-down"
    with site.sampler() as sampler:
        got(sampler.add(job(7)))
        down.touch()
        got(sampler.remove(job(7).key)).close()
        got(sampler.add(job(8)))
        assert "port=10102" in (site.where / "ldms" / "8.1.0.conf").read_text()
        down.unlink()
        wait_for(lambda: "strgp_del name=j7_0_c1_meminfo" in site.told())
        wait_for(lambda: not (site.where / "ldms" / "7.1.0.json").exists())


def test_a_carreld_that_is_started_again_finds_the_samplers_of_the_last_one(site: Site) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job()))
        first = sampler._jobs[job().key]
    with site.sampler() as sampler:
        assert sampler.runs() == (job().key,)
        got(sampler.add(job()))
        assert sampler._jobs[job().key] == first
        got(sampler.remove(job().key)).close()
        assert sampler.runs() == ()


def test_a_sampler_that_died_is_started_again_at_its_port(site: Site) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job()))
        record = sampler._jobs[job().key]
        record.pid.kill(signal.SIGKILL)
        os.waitpid(record.pid.number, 0)
        assert sampler.runs() == ()
        got(sampler.add(job()))
        assert sampler._jobs[job().key].place.port == record.place.port


def test_an_aggregator_that_forgot_all_jobs_is_told_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldms, "RETELL_S", 0.05)
    with site.sampler() as sampler:
        got(sampler.add(job()))
        wait_for(lambda: site.told().count("updtr_start name=j7_0_c1") >= 3)


def test_what_died_while_no_carreld_lived_is_let_go_of(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job()))
        record = sampler._jobs[job().key]
    record.pid.kill(signal.SIGKILL)
    os.waitpid(record.pid.number, 0)
    monkeypatch.setattr(ldms, "FORGOTTEN_S", 0.05)
    with site.sampler():
        wait_for(lambda: not (site.where / "ldms" / "7.1.0.json").exists())
    assert "strgp_del name=j7_0_c1_meminfo" in site.told()


def test_the_interval_of_a_running_job_changes_at_both_ends(site: Site) -> None:
    with site.sampler() as sampler:
        got(sampler.add(job()))
        got(sampler.interval(job().key, 0.5))
        with pytest.raises(RefusedError, match=r"a job cannot be sampled every 0\.001 s"):
            got(sampler.interval(job().key, 0.001))
    told = site.told()
    assert "# -h localhost -x sock -p 10101 -a munge" in told
    assert "start name=meminfo interval=500000us offset=0" in told
    assert "updtr_start name=j7_0_c1 interval=500000us offset=50000us" in told


def test_without_ldmsd_the_node_is_at_fault(site: Site) -> None:
    (site.where / "bin" / "ldmsd").unlink()
    with site.sampler() as sampler, pytest.raises(CarrelError, match=r"ldmsd is not on PATH"):
        got(sampler.add(job()))
