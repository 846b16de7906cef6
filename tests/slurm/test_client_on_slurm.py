"""The client against a real Slurm: what it reads is what Slurm does, whatever a user types."""

import asyncio
import os
import pwd
import time
from pathlib import Path

import pytest

from carrel.config import Slurm
from carrel.errors import RefusedError, UnreachableError
from carrel.model.job import Job
from carrel.sandbox.cluster import Sandbox
from carrel.slurm import version
from carrel.slurm.client import SlurmClient
from carrel.testing.daemons import wait_for

pytestmark = pytest.mark.slurm


def settings(slurm: Sandbox) -> Slurm:
    return Slurm(conf=slurm.env["SLURM_CONF"])


def client(slurm: Sandbox, node: str | None = None) -> SlurmClient:
    return SlurmClient(settings(slurm), node)


def submit(slurm: Sandbox, *options: str, script: str = "sleep 60") -> int:
    # The job's output shall lie in no checkout.
    words = ["sbatch", "--parsable", "-D", "/tmp", "-o", "/dev/null", *options, "--wrap", script]
    return int(slurm.run(words).stdout.strip())


def job(slurm: Sandbox, job_id: int, node: str | None = None) -> Job | None:
    return asyncio.run(client(slurm, node).job(job_id))


def running(slurm: Sandbox, job_id: int, node: str | None = None) -> Job:
    def is_running() -> bool:
        found = job(slurm, job_id, node)
        return found is not None and found.state == "running" and found.slurm_state == "RUNNING"

    wait_for(is_running, f"job {job_id} runs")
    found = job(slurm, job_id, node)
    assert found is not None
    return found


def cancel(slurm: Sandbox, job_id: int) -> None:
    slurm.run(["scancel", str(job_id)])


def test_a_running_job_is_seen_with_what_it_has_on_each_node(slurm: Sandbox) -> None:
    before_s = int(time.time())
    job_id = submit(slurm, "-N2", "-n3", "-c1", "--mem-per-cpu=100", "-m", "plane=2")
    first, second = slurm.nodes[:2]
    found = running(slurm, job_id, first)
    other = running(slurm, job_id, second)
    assert found.nodes == (first, second)
    assert sorted([(found.cpus, found.memory_bytes), (other.cpus, other.memory_bytes)]) == [
        (1, 100 * 2**20),
        (2, 200 * 2**20),
    ]
    assert (found.key.cluster, found.key.restart) == (slurm.cluster, 0)
    assert before_s <= found.key.submit_s <= int(time.time())
    assert (found.uid, found.user) == (os.getuid(), pwd.getpwuid(os.getuid()).pw_name)
    cancel(slurm, job_id)


def test_the_time_zone_of_the_daemon_does_not_change_the_key(slurm: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(slurm, "-H")
    here = job(slurm, job_id)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert job(slurm, job_id) == here
    cancel(slurm, job_id)


def test_a_job_that_waits_is_held_or_pending(slurm: Sandbox) -> None:
    held, later = submit(slurm, "-H"), submit(slurm, "--begin=now+1hour")
    states = {found.key.job_id: found.state for found in asyncio.run(client(slurm).jobs())}
    assert (states[held], states[later]) == ("held", "pending")
    cancel(slurm, held)
    cancel(slurm, later)


def test_a_node_sees_only_the_jobs_on_it(slurm: Sandbox) -> None:
    job_id = submit(slurm, "-w", slurm.nodes[0])
    running(slurm, job_id)
    seen = {node: [found.key.job_id for found in asyncio.run(client(slurm, node).jobs())] for node in slurm.nodes[:2]}
    assert job_id in seen[slurm.nodes[0]]
    assert job_id not in seen[slurm.nodes[1]]
    cancel(slurm, job_id)


def test_an_ended_job_is_listed_no_more_but_still_known(slurm: Sandbox) -> None:
    job_id = submit(slurm, script="true")

    def ended() -> bool:
        found = job(slurm, job_id)
        return found is not None and found.slurm_state == "COMPLETED"

    wait_for(ended, "the job has ended")
    assert job_id not in [found.key.job_id for found in asyncio.run(client(slurm).jobs())]


def test_a_job_that_never_was_is_none(slurm: Sandbox) -> None:
    assert job(slurm, 4_000_000) is None


def test_a_requeued_job_is_another_run(slurm: Sandbox) -> None:
    job_id = submit(slurm, "--requeue")
    first = running(slurm, job_id)
    asyncio.run(client(slurm).requeue(job_id))

    def counted() -> bool:
        found = job(slurm, job_id)
        return found is not None and found.key != first.key

    wait_for(counted, "the job is another run")
    asyncio.run(client(slurm).requeue(4_000_000))
    cancel(slurm, job_id)


def test_a_job_that_refuses_to_be_requeued_is_left_alone(slurm: Sandbox) -> None:
    job_id = submit(slurm, "--no-requeue")
    running(slurm, job_id)
    with pytest.raises(RefusedError, match="does not requeue"):
        asyncio.run(client(slurm).requeue(job_id))
    cancel(slurm, job_id)


def test_a_job_name_of_several_lines_forges_nothing(slurm: Sandbox) -> None:
    name = f"x\n9|0|0|RUNNING|0|1|1|1|{slurm.nodes[0]}|root|main|\nUserId=nobody(1) Restarts=5"
    job_id = submit(slurm, "-J", name, "-w", slurm.nodes[0])
    found = running(slurm, job_id, slurm.nodes[0])
    assert (found.uid, found.key.restart, found.cpus) == (os.getuid(), 0, 1)
    assert 9 not in [each.key.job_id for each in asyncio.run(client(slurm).jobs()) if each.uid != os.getuid()]
    cancel(slurm, job_id)


def test_a_job_name_that_claims_cpus_is_refused(slurm: Sandbox) -> None:
    node = slurm.nodes[0]
    job_id = submit(slurm, "-J", f"Nodes={node} CPU_IDs=0-63 Mem=999999 GRES=", "-w", node)
    running(slurm, job_id)
    with pytest.raises(RefusedError, match="imitates"):
        job(slurm, job_id, node)
    cancel(slurm, job_id)


def test_a_name_is_shown_as_the_user_wrote_it(slurm: Sandbox) -> None:
    job_id = submit(slurm, "-H", "-J", "my | job")
    found = job(slurm, job_id)
    assert found is not None
    (described,) = asyncio.run(client(slurm).described([found]))
    assert described.name == "my | job"
    cancel(slurm, job_id)


def test_draining_twice_keeps_the_first_reason(slurm: Sandbox) -> None:
    node = slurm.nodes[-1]
    for reason in ("carrel: no kvm", "another"):
        asyncio.run(client(slurm).drain(node, reason))
    assert slurm.run(["sinfo", "-h", "-N", "-n", node, "-o", "%E"]).stdout.strip() == "carrel: no kvm"
    slurm.run(["scontrol", "update", f"nodename={node}", "state=resume"])


def test_each_node_has_an_address(slurm: Sandbox) -> None:
    assert set(asyncio.run(client(slurm).addresses())) == set(slurm.nodes)


def test_the_release_is_found(slurm: Sandbox) -> None:
    assert version.installed(settings(slurm)).plugins >= version.OLDEST


def test_a_slurm_without_its_controller_is_unreachable(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\nAuthType=auth/none\nMessageTimeout=1\n"
        "NodeName=n1\nPartitionName=p Nodes=ALL\n"
    )
    with pytest.raises(UnreachableError):
        asyncio.run(SlurmClient(Slurm(conf=str(conf))).jobs())
