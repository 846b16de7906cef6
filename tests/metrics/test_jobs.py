"""Real jobs of known behaviour under a real Slurm: what they used is what their samples say."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from carrel.model.sample import JobFile, JobSummary, NodeSummary
from carrel.sampling import reading
from carrel.sampling.tables import Survey
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import await_end, wait_for
from carrel.testing.leaks import nothing_left
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.root, pytest.mark.slurm]

MIB = 2**20


class Job(NamedTuple):
    """A job that has ended, and what it said of each of its tasks."""

    job_id: int
    used_s: list[float]
    summary: JobSummary

    @property
    def host(self) -> NodeSummary:
        (host,) = [node for node in self.summary.nodes if node.view == "host"]
        return host

    @property
    def guest(self) -> NodeSummary:
        (guest,) = [node for node in self.summary.nodes if node.view == "guest"]
        return guest


@pytest.fixture(scope="module")
def box(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """Three nodes with a network and control groups of their own."""
    if not Path("/sys/fs/cgroup/cpuacct/cgroup.procs").exists():
        pytest.skip("no cgroup v1 cpuacct controller on this machine")
    made = sandbox_factory(netns=True, proctrack="cgroup", carrel_conf="[metrics]\nperiod_s = 0.25\n")
    yield made
    nothing_left(made)
    made.down()


def folder_of(box: Sandbox, user: str, job_id: int) -> Path:
    return box.dir / "metrics" / user / str(job_id)


def output(box: Sandbox, user: User, job_id: int | str) -> Path:
    """Return where a job's tasks say what they used. Other sandboxes have jobs of the same number in the same home."""
    return user.home / f"{box.dir.name}.{job_id}.out"


@pytest.fixture
def going(box: Sandbox, user: User) -> Iterator[Path]:
    """A file for as long as which a program holds what it holds."""
    path = user.home / f"{box.dir.name}.going"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def start(box: Sandbox, user: User, script: str, *options: str) -> int:
    """Submit a script; return its job id."""
    words = ["sbatch", "--parsable", "-o", str(output(box, user, "%j")), *options]
    done = box.run(words, user=user.name, stdin=f"#!/bin/sh\n{script}\n")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def ended(box: Sandbox, user: User, job_id: int) -> Job:
    assert await_end(box, job_id) == "COMPLETED"
    folder = folder_of(box, user.name, job_id)
    wait_for(lambda: (folder / "summary.json").exists() and not list(folder.glob("*.seg")))
    said = output(box, user, job_id)
    used_s = [int(line.split()[0]) / 1e6 for line in said.read_text().splitlines()]
    said.unlink()
    return Job(job_id, used_s, msgspec.json.decode((folder / "summary.json").read_bytes(), type=JobSummary))


def increase(box: Sandbox, user: User, job_id: int, metric: str, view: str = "host") -> float:
    frame = reading.frame(folder_of(box, user.name, job_id))
    series = frame[frame["view"] == view][metric].dropna()
    return float(series.iloc[-1] - series.iloc[0])


def last(box: Sandbox, user: User, job_id: int, metric: str) -> float:
    frame = reading.frame(folder_of(box, user.name, job_id))
    return float(frame[frame["view"] == "host"][metric].dropna().iloc[-1])


def close_to(expected: float) -> object:
    return pytest.approx(expected, rel=0.05)


def shown(box: Sandbox, words: Sequence[str], *, user: str | None = None) -> str:
    done = box.run(words, user=user)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_memory_writes_and_network_of_a_job_are_right(box: Sandbox, user: User, known: Path) -> None:
    node = box.nodes[0]
    where = f"{user.home}/{box.dir.name}.data"
    job = ended(box, user, start(box, user, f"exec {known} 1500 300 200 50 {where}", "-w", node, "-c2", "--mem=800"))
    assert job.host.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.05)
    assert job.host.memory_peak_bytes == close_to(300 * MIB)
    assert job.host.written_bytes == close_to(200 * MIB)
    assert increase(box, user, job.job_id, "net.lo.tx_bytes") == close_to(50 * MIB)
    assert (job.host.cpus, job.host.memory_limit_bytes) == (2, 800 * MIB)
    assert job.summary.complete


@pytest.mark.guest
def test_a_job_in_a_guest_is_seen_rightly_from_inside_and_from_outside(
    box: Sandbox, user: User, known: Path, going: Path
) -> None:
    node = box.nodes[0]
    words = ["-w", node, "-c2", "--mem=900", "--guest=debian12", "--guest-clone=linked"]
    job_id = start(box, user, f"exec {known} 1500 300 100 20 /tmp/known.data 5000 {going}", *words)
    segment = folder_of(box, user.name, job_id) / f"samples.{node}.guest.seg"

    def written_bytes() -> int:
        summary = Survey(segment, node=node, view="guest").summary
        return (summary.written_bytes if summary else None) or 0

    wait_for(lambda: segment.exists() and Survey(segment, node=node, view="guest").rows > 2)
    box.restart(f"carreld@{node}", signal.SIGKILL)  # the next one looks into the same guest
    # Processes are looked at less often than groups, so it goes on for five seconds in which it uses nothing.
    wait_for(lambda: written_bytes() >= 100 * MIB)
    going.unlink()
    job = ended(box, user, job_id)
    assert job.guest.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.1)
    assert job.guest.memory_peak_bytes == close_to(300 * MIB)
    assert job.guest.written_bytes == close_to(100 * MIB)
    assert increase(box, user, job_id, "net.lo.tx_bytes", "guest") == close_to(20 * MIB)
    # From outside: the two accounts that the kernel keeps of QEMU agree, and hold what the guest's CPUs ran. Both begin
    # with the job; the first sample may come when QEMU has already used something.
    assert job.host.cpu_s == pytest.approx(last(box, user, job_id, "processes.cpu_ns") / 1e9, rel=0.05, abs=0.2)
    assert (job.host.cpu_s or 0) > increase(box, user, job_id, "guest.vcpu_ns") / 1e9 > 0
    assert job.host.written_bytes == pytest.approx(100 * MIB, rel=0.05, abs=4 * MIB)
    assert (job.host.memory_peak_bytes or 0) > 300 * MIB
    assert (job.summary.job.memory_bytes, job.host.cpus, job.guest.cpus) == (900 * MIB, 2, 2)


def test_two_jobs_on_one_node_do_not_see_each_other(box: Sandbox, user: User, known: Path, going: Path) -> None:
    node = box.nodes[0]
    shapes = {100: "600", 250: "1200"}
    begun = {
        mib: start(box, user, f"exec {known} {burn} {mib} 0 0 - 0 {going}", "-w", node, "--mem=600")
        for mib, burn in shapes.items()
    }

    def held(mib: int) -> bool:
        segment = folder_of(box, user.name, begun[mib]) / f"samples.{node}.seg"
        summary = Survey(segment, node=node, view="host").summary if segment.exists() else None
        return summary is not None and (summary.memory_peak_bytes or 0) >= mib * MIB

    wait_for(lambda: all(map(held, shapes)))
    going.unlink()
    jobs = {mib: ended(box, user, job_id) for mib, job_id in begun.items()}
    times = [(job.host.first_s, job.host.last_s) for job in jobs.values()]
    assert max(first for first, _ in times) < min(last for _, last in times), "they were not there at once"
    for mib, job in jobs.items():
        assert job.host.memory_peak_bytes == close_to(mib * MIB)
        assert job.host.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.05)


def test_jobs_of_two_seconds_have_a_first_and_a_last_sample_and_right_totals(
    box: Sandbox, user: User, known: Path
) -> None:
    node = box.nodes[1]
    begun = [start(box, user, f"exec {known} 400 20 0 0 - 1500", "-w", node, "--mem=200") for _ in range(4)]
    for job_id in begun:
        job = ended(box, user, job_id)
        assert job.host.samples >= 2
        assert job.host.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.05)


def test_a_job_on_three_nodes_has_sums_and_each_nodes_own_peak(box: Sandbox, user: User, known: Path) -> None:
    script = f"srun sh -c 'exec {known} 300 $((100 * (1 + SLURM_PROCID))) 0 0 - 1000'"
    job = ended(box, user, start(box, user, script, "-N3", "--ntasks-per-node=1", "--mem=700"))
    peaks = sorted(node.memory_peak_bytes or 0 for node in job.summary.nodes)
    assert len(peaks) == 3
    for peak, mib in zip(peaks, (100, 200, 300), strict=True):
        assert peak == pytest.approx(mib * MIB, rel=0.05, abs=8 * MIB)  # the batch script's own shell and srun
    report = json.loads(shown(box, ["carrel", "job", "report", str(job.job_id), "--json"], user=user.name))
    assert report["cpu_s"] == pytest.approx(sum(job.used_s), rel=0.05, abs=0.2)
    assert report["memory_peak_bytes"] == peaks[-1]
    assert report["memory_limit_bytes"] == 700 * MIB


def test_what_a_user_calls_a_job_leads_nowhere_else(box: Sandbox, user: User, known: Path) -> None:
    name = '../../../etc/$(touch /tmp/x)\n"\x1b[2J'
    before = sorted(path.name for path in (box.dir / "metrics").iterdir())
    job = ended(box, user, start(box, user, f"exec {known} 10 1 0 0", "-J", name))
    about = msgspec.json.decode((folder_of(box, user.name, job.job_id) / "job.json").read_bytes(), type=JobFile)
    assert about.job.name.startswith("../../../etc/$(touch /tmp/x)")
    assert set(before) | {user.name} == {path.name for path in (box.dir / "metrics").iterdir()}
    assert "\x1b" not in shown(box, ["carrel", "job", "report", str(job.job_id)], user=user.name)


def test_nobody_else_reads_the_samples_of_a_user(box: Sandbox, user: User, known: Path) -> None:
    job = ended(box, user, start(box, user, f"exec {known} 10 1 0 0"))
    refused = box.run(["carrel", "job", "report", str(job.job_id)], user="nobody", cwd=Path("/"))
    assert refused.returncode == 4
    assert f"job {job.job_id} is {user.name}'s: only {user.name} and root may read its samples" in refused.stderr
    folder = folder_of(box, user.name, job.job_id)
    assert {path.stat().st_mode & 0o007 for path in [folder.parent, folder, *folder.iterdir()]} == {0}
    assert {path.stat().st_uid for path in [folder.parent, folder, *folder.iterdir()]} == {user.uid}


def test_a_killed_carreld_loses_no_total_and_goes_on_with_the_same_samples(
    box: Sandbox, user: User, known: Path, going: Path
) -> None:
    node = box.nodes[2]
    job_id = start(box, user, f"exec {known} 500 50 0 0 - 0 {going}", "-w", node, "--mem=200")
    segment = folder_of(box, user.name, job_id) / f"samples.{node}.seg"
    wait_for(lambda: segment.exists() and Survey(segment, node=node, view="host").rows > 4)
    box.kill(f"carreld@{node}")
    # A power cut tears the last row: what is before it can be read all the same.
    whole = Survey(segment, node=node, view="host").rows
    os.truncate(segment, segment.stat().st_size - 3)
    report = json.loads(shown(box, ["carrel", "job", "report", str(job_id), "--json"], user=user.name))
    assert not report["complete"]
    assert Survey(segment, node=node, view="host").rows == whole - 1
    box.start(f"carreld@{node}")
    wait_for(lambda: Survey(segment, node=node, view="host").rows > whole)
    shown(box, ["carrel", "job", "sample", str(job_id), "--every", "0.1"], user=user.name)
    wait_for(lambda: b"sampled every 0.1 s" in segment.read_bytes())  # it is asked for at the next report
    going.unlink()
    job = ended(box, user, job_id)
    assert job.host.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.05)
    about = msgspec.json.decode((folder_of(box, user.name, job_id) / "job.json").read_bytes(), type=JobFile)
    assert {"gap", "interval"} <= {note.what for note in about.series[0].notes}


def test_a_job_that_ends_while_no_carreld_lives_has_its_total(
    box: Sandbox, user: User, known: Path, going: Path
) -> None:
    node = box.nodes[2]
    job_id = start(box, user, f"exec {known} 400 50 0 0 - 0 {going}", "-w", node, "--mem=200")
    segment = folder_of(box, user.name, job_id) / f"samples.{node}.seg"
    wait_for(
        lambda: segment.exists() and b"job.cpu_ns" in segment.read_bytes().replace(b'"name":"cpu_ns"', b"job.cpu_ns")
    )
    box.kill(f"carreld@{node}")
    going.unlink()
    assert await_end(box, job_id) == "COMPLETED"
    box.start(f"carreld@{node}")
    job = ended(box, user, job_id)
    assert job.host.cpu_s == pytest.approx(job.used_s[0], rel=0.05, abs=0.05)


def test_a_full_disk_costs_samples_and_no_job(box: Sandbox, user: User, known: Path) -> None:
    node = box.nodes[0]
    # Each node has mounts of its own, and on a machine in a directory a root directory too.
    inside = ["nsenter", "-m", "-r", "-t", str(box.pid(f"carreld@{node}")), "--"]
    root = str(box.dir / "metrics")
    Path(root).mkdir(exist_ok=True)
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=16k,mode=755", "none", root], check=True)
    try:
        job_id = start(box, user, f"exec {known} 100 1 0 0", "-w", node)
        assert await_end(box, job_id) == "COMPLETED"
        wait_for(lambda: "sampling failed" in box.run(["carrel", "node", "check", node]).stdout)
        wait_for(lambda: "No space left" in shown(box, ["carrel", "node", "show", node]))
        assert "drain" not in shown(box, ["sinfo", "-h", "-n", node, "-o", "%T"])
    finally:
        subprocess.run([*inside, "umount", "--lazy", root], check=True)
    output(box, user, job_id).unlink()


def test_a_carreld_that_hangs_delays_no_job(box: Sandbox, user: User, known: Path) -> None:
    node = box.nodes[0]
    box.kill(f"carreld@{node}", signal.SIGSTOP)
    try:
        job_id = start(box, user, f"exec {known} 100 1 0 0", "-w", node)
        assert await_end(box, job_id, timeout_s=60) == "COMPLETED"
    finally:
        box.kill(f"carreld@{node}", signal.SIGCONT)
    output(box, user, job_id).unlink()
