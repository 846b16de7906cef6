"""Jobs whose guests are Slurm nodes: sampled by the host that carries them, from outside and from inside."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from carrel.model.sample import JobFile, JobSummary, NodeSummary
from carrel.sampling import reading
from carrel.sampling.tables import Survey
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, await_end, job_state, wait_for
from carrel.testing.leaks import nothing_left
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.guest]

OPTIONS = (f"--guest={IMAGE}", "--guest-per=node", "--mem=320")
"""A guest of 160 MiB: one of the shapes that a template is there for."""
MIB = 2**20


@pytest.fixture(scope="module")
def box(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    """One host that carries guests; at the end nothing of them is left, and no control group."""
    if not Path("/sys/fs/cgroup/cpuacct/cgroup.procs").exists():
        pytest.skip("no cgroup v1 cpuacct controller on this machine")
    made = sandbox_factory(nodes=1, hosts=1, proctrack="cgroup", carrel_conf="[metrics]\nperiod_s = 0.25\n")
    yield made
    nothing_left(made)
    wait_for(lambda: not [*Path("/sys/fs/cgroup").glob(f"*/slurm_{made.facts().pool[0][:-1]}*")])


def start(box: Sandbox, user: User, script: str, *options: str) -> int:
    """Submit a script; return its job id. What it says is in the user's ``known.<job>.out``."""
    words = ["sbatch", "--parsable", "-o", f"{user.home}/known.%j.out", *OPTIONS, *options]
    done = box.run(words, user=user.name, stdin=f"#!/bin/sh\n{script}\n")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def folder_of(box: Sandbox, user: User, job_id: int) -> Path:
    return box.dir / "metrics" / user.name / str(job_id)


def said(user: User, job_id: int) -> list[str]:
    return (user.home / f"known.{job_id}.out").read_text().splitlines()


def ended(box: Sandbox, user: User, job_id: int) -> JobSummary:
    assert await_end(box, job_id) == "COMPLETED", said(user, job_id)
    folder = folder_of(box, user, job_id)
    wait_for(lambda: (folder / "summary.json").exists() and not list(folder.glob("*.seg")))
    return msgspec.json.decode((folder / "summary.json").read_bytes(), type=JobSummary)


def seen(summary: JobSummary, view: str) -> list[NodeSummary]:
    return [node for node in summary.nodes if node.view == view]


def increase(folder: Path, metric: str, view: str, node: str) -> float:
    frame = reading.frame(folder)
    series = frame[(frame["view"] == view) & (frame["node"] == node)][metric].dropna()
    return float(series.iloc[-1] - series.iloc[0])


def rows(box: Sandbox, user: User, job_id: int, view: str) -> int:
    """Return how many samples there are by now of a job that runs."""
    end = ".guest.seg" if view == "guest" else ".seg"
    found = [
        path
        for path in folder_of(box, user, job_id).glob(f"samples.*{end}")
        if path.name.count(".") == end.count(".") + 1
    ]
    return sum(Survey(path, node="x", view="host").rows for path in found)


def test_two_such_jobs_on_one_host_are_each_seen_rightly_in_both_views(box: Sandbox, user: User, known: Path) -> None:
    shapes = {20: 1200, 60: 600}
    begun = {
        mib: start(box, user, f"exec {known} {burn} {mib} 0 0 - 3000", "--carrel-report")
        for mib, burn in shapes.items()
    }
    for job_id in begun.values():
        wait_for(lambda job_id=job_id: rows(box, user, job_id, "host") > 2 and rows(box, user, job_id, "guest") > 2)  # type: ignore[misc]
    box.restart(f"carreld@{box.facts().hosts[0]}", signal.SIGKILL)  # the next one goes on with both
    asked = box.run(["carrel", "job", "sample", str(begun[60]), "--every", "0.1"], user=user.name)
    assert asked.returncode == 0, asked.stderr
    summaries = {mib: ended(box, user, job_id) for mib, job_id in begun.items()}
    assert len({node.node for summary in summaries.values() for node in summary.nodes}) == 2
    for mib, summary in summaries.items():
        job_id, folder = begun[mib], folder_of(box, user, begun[mib])
        (guest,), (host,) = seen(summary, "guest"), seen(summary, "host")
        assert host.node in box.facts().pool
        assert summary.complete
        assert (summary.job.nodes, summary.job.name) == ((host.node,), "sbatch")
        used_s = int(said(user, job_id)[0].split()[0]) / 1e6
        assert guest.cpu_s == pytest.approx(used_s, rel=0.05, abs=0.1)
        assert guest.memory_peak_bytes == pytest.approx(mib * MIB, rel=0.05, abs=MIB)
        # From outside, what the guest used before its job began is not the job's; the kernel's two accounts agree.
        counted_s = increase(folder, "processes.cpu_ns", "host", host.node) / 1e9
        assert host.cpu_s == pytest.approx(counted_s, rel=0.05, abs=0.2)
        assert host.cpu_s == pytest.approx(increase(folder, "job.cpu_ns", "host", host.node) / 1e9, abs=0.001)
        assert (host.cpu_s or 0) > increase(folder, "guest.vcpu_ns", "host", host.node) / 1e9 > 0
        assert (host.memory_peak_bytes or 0) > mib * MIB
        assert (host.cpus, host.memory_limit_bytes) == (1, 320 * MIB)
        wait_for(lambda job_id=job_id: any("CPU" in line for line in said(user, job_id)[1:]))  # type: ignore[misc]
        (user.home / f"known.{job_id}.out").unlink()
    about = msgspec.json.decode((folder_of(box, user, begun[60]) / "job.json").read_bytes(), type=JobFile)
    assert all({"gap", "interval"} <= {note.what for note in series.notes} for series in about.series)


def test_a_job_on_two_guests_of_one_host_is_their_sum(box: Sandbox, user: User, known: Path) -> None:
    script = f"srun sh -c 'exec {known} 400 $((20 * (1 + SLURM_PROCID))) 0 0 - 1500'"
    job_id = start(box, user, script, "--nodes=2", "--ntasks-per-node=1")
    wait_for(lambda: rows(box, user, job_id, "host") > 2)
    watched = box.run(["carrel", "job", "watch", str(job_id), "--json"], user=user.name, timeout_s=180)
    assert watched.returncode == 0, watched.stderr
    summary = ended(box, user, job_id)
    inside = seen(summary, "guest")
    assert len(inside) == len(seen(summary, "host")) == 2
    used_s = sum(int(line.split()[0]) for line in said(user, job_id)) / 1e6
    assert sum(node.cpu_s or 0 for node in inside) == pytest.approx(
        used_s, rel=0.05, abs=0.3
    )  # srun itself is inside too
    peaks = sorted(node.memory_peak_bytes or 0 for node in inside)
    assert peaks[1] - peaks[0] > 10 * MIB
    report = json.loads(box.run(["carrel", "job", "report", str(job_id), "--json"], user=user.name).stdout)
    assert report["cpu_s"] == pytest.approx(sum(node.cpu_s or 0 for node in seen(summary, "host")), rel=0.05)
    plot = box.run(["carrel", "job", "plot", str(job_id)], user=user.name)
    assert plot.returncode == 0, plot.stderr
    assert all(node.node in plot.stdout for node in inside)
    (user.home / f"known.{job_id}.out").unlink()


def test_a_job_that_ends_while_no_carreld_lives_has_the_total_of_its_guest(
    box: Sandbox, user: User, known: Path
) -> None:
    job_id = start(box, user, f"exec {known} 600 20 0 0 - 1000")
    wait_for(lambda: "task-entered" in box.run(["carrel", "job", "events", str(job_id)]).stdout)
    node = box.run(["squeue", "-h", "-o", "%N", "-j", str(job_id)]).stdout.strip()
    (host,) = box.facts().hosts
    box.kill(f"carreld@{host}")
    wait_for(lambda: job_state(box, job_id) not in {"PENDING", "RUNNING"})
    kernels_ns = int(Path(f"/sys/fs/cgroup/cpuacct/slurm_{node}/cpuacct.usage").read_text())
    box.start(f"carreld@{host}")
    ended(box, user, job_id)
    frame = reading.frame(folder_of(box, user, job_id))
    # The guest is there until the next carreld hears that its job has ended, and idles.
    assert frame[frame["view"] == "host"]["job.cpu_ns"].max() == pytest.approx(kernels_ns, rel=0.05, abs=0.3e9)
    (user.home / f"known.{job_id}.out").unlink()
