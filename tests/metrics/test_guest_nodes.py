"""Jobs whose guests are Slurm nodes: sampled by the host that carries them, from outside and from inside."""

import json
import os
import signal
import subprocess  # a job that runs beside the test
from collections.abc import Iterable, Iterator
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
    made.down()


def output(box: Sandbox, user: User, job_id: int | str) -> Path:
    """Return where a job's task says what it used. Other sandboxes have jobs of the same number in the same home."""
    return user.home / f"{box.dir.name}.{job_id}.out"


def start(box: Sandbox, user: User, script: str, *options: str) -> int:
    """Submit a script; return its job id."""
    words = ["sbatch", "--parsable", "-o", str(output(box, user, "%j")), *OPTIONS, *options]
    done = box.run(words, user=user.name, stdin=f"#!/bin/sh\n{script}\n")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def folder_of(box: Sandbox, user: User, job_id: int) -> Path:
    return box.dir / "metrics" / user.name / str(job_id)


def said(box: Sandbox, user: User, job_id: int) -> list[str]:
    path = output(box, user, job_id)
    return path.read_text().splitlines() if path.exists() else []


def ended(box: Sandbox, user: User, job_id: int) -> JobSummary:
    assert await_end(box, job_id) == "COMPLETED", said(box, user, job_id)
    folder = folder_of(box, user, job_id)
    wait_for(lambda: (folder / "summary.json").exists() and not list(folder.glob("*.seg")))
    return msgspec.json.decode((folder / "summary.json").read_bytes(), type=JobSummary)


def seen(summary: JobSummary, view: str) -> list[NodeSummary]:
    return [node for node in summary.nodes if node.view == view]


def increase(folder: Path, metric: str, view: str, node: str) -> float:
    frame = reading.frame(folder)
    series = frame[(frame["view"] == view) & (frame["node"] == node)][metric].dropna()
    return float(series.iloc[-1] - series.iloc[0])


def known_names(folder: Path) -> set[str]:
    """Return the metrics that were seen from inside."""
    about = msgspec.json.decode((folder / "job.json").read_bytes(), type=JobFile)
    return {name for series in about.series if series.view == "guest" for name in (*series.units, *series.constants)}


def rows(box: Sandbox, user: User, job_id: int, view: str) -> int:
    """Return how many samples there are by now of a job that runs."""
    found = folder_of(box, user, job_id).glob("samples.*.seg")
    chosen = [path for path in found if path.name.endswith(".guest.seg") == (view == "guest")]
    return sum(Survey(path, node="x", view="host").rows for path in chosen)


def samples(box: Sandbox, user: User, job_ids: Iterable[int]) -> list[int]:
    return [rows(box, user, job_id, view) for job_id in job_ids for view in ("host", "guest")]


def test_two_such_jobs_on_one_host_are_each_seen_rightly_in_both_views(box: Sandbox, user: User, known: Path) -> None:
    going = user.home / f"going.{os.getpid()}"
    going.touch()
    shapes = {20: 1500, 60: 1000}
    begun = {
        mib: start(box, user, f"exec {known} {burn} {mib} 0 0 - 0 {going}", "--carrel-report")
        for mib, burn in shapes.items()
    }
    wait_for(lambda: min(samples(box, user, begun.values())) > 4)
    before = samples(box, user, begun.values())
    box.restart(f"carreld@{box.facts().hosts[0]}", signal.SIGKILL)  # the next one goes on with both
    asked = box.run(["carrel", "job", "sample", str(begun[60]), "--every", "0.1"], user=user.name)
    assert asked.returncode == 0, asked.stderr
    assert "sampling fault" not in box.run(["carrel", "node", "show", box.facts().hosts[0]]).stdout
    wait_for(lambda: all(now > then + 2 for now, then in zip(samples(box, user, begun.values()), before, strict=True)))
    going.unlink()
    summaries = {mib: ended(box, user, job_id) for mib, job_id in begun.items()}
    assert len({node.node for summary in summaries.values() for node in summary.nodes}) == 2
    for mib, summary in summaries.items():
        job_id, folder = begun[mib], folder_of(box, user, begun[mib])
        (guest,), (host,) = seen(summary, "guest"), seen(summary, "host")
        assert host.node in box.facts().pool
        assert summary.complete
        assert (summary.job.nodes, summary.job.name) == ((host.node,), "sbatch")
        used_s = int(said(box, user, job_id)[0].split()[0]) / 1e6
        assert guest.cpu_s == pytest.approx(used_s, rel=0.05, abs=0.1)
        assert guest.memory_peak_bytes == pytest.approx(mib * MIB, rel=0.05, abs=MIB)
        # From outside, what the guest used before its job began is not the job's; the kernel's two accounts agree.
        counted_s = increase(folder, "processes.cpu_ns", "host", host.node) / 1e9
        assert host.cpu_s == pytest.approx(counted_s, rel=0.05, abs=0.2)
        assert host.cpu_s == pytest.approx(increase(folder, "job.cpu_ns", "host", host.node) / 1e9, abs=0.001)
        assert (host.cpu_s or 0) > increase(folder, "guest.vcpu_ns", "host", host.node) / 1e9 > 0
        assert (host.memory_peak_bytes or 0) > mib * MIB
        assert (host.cpus, host.memory_limit_bytes) == (1, 320 * MIB)
        assert "disk.vda.written_sectors" in known_names(folder)
        wait_for(lambda job_id=job_id: any("CPU" in line for line in said(box, user, job_id)[1:]))  # type: ignore[misc]
        output(box, user, job_id).unlink()
    about = msgspec.json.decode((folder_of(box, user, begun[60]) / "job.json").read_bytes(), type=JobFile)
    assert all({"gap", "interval"} <= {note.what for note in series.notes} for series in about.series)


def test_a_job_on_two_guests_of_one_host_is_their_sum(box: Sandbox, user: User, known: Path) -> None:
    script = f"exec {known} 800 $((20 * (1 + SLURM_PROCID))) 0 0 - 1500"
    words = ["srun", "-Q", *OPTIONS, "--nodes=2", "--ntasks-per-node=1", "sh", "-c", script]
    folders = box.dir / "metrics" / user.name
    known_jobs = {path.name for path in folders.glob("*")}
    with subprocess.Popen(
        ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups", *words],
        env={**os.environ, **box.env, "HOME": str(user.home)},
        stdout=subprocess.PIPE,
        text=True,
        cwd=user.home,
    ) as child:
        wait_for(lambda: bool({path.name for path in folders.glob("*")} - known_jobs))
        (job_id,) = (int(path.name) for path in folders.glob("*") if path.name not in known_jobs)
        wait_for(lambda: rows(box, user, job_id, "host") > 2)
        watched = box.run(["carrel", "job", "watch", str(job_id), "--json"], user=user.name, timeout_s=180)
        assert watched.returncode == 0, watched.stderr
        out, _ = child.communicate(timeout=180)
    summary = ended(box, user, job_id)
    inside = seen(summary, "guest")
    assert len(inside) == len(seen(summary, "host")) == 2
    used_s = sum(int(line.split()[0]) for line in out.splitlines()) / 1e6
    assert sum(node.cpu_s or 0 for node in inside) == pytest.approx(used_s, rel=0.05, abs=0.2)
    peaks = sorted(node.memory_peak_bytes or 0 for node in inside)
    for peak, mib in zip(peaks, (20, 40), strict=True):
        assert peak == pytest.approx(mib * MIB, rel=0.05, abs=MIB)
    report = json.loads(box.run(["carrel", "job", "report", str(job_id), "--json"], user=user.name).stdout)
    assert report["cpu_s"] == pytest.approx(sum(node.cpu_s or 0 for node in seen(summary, "host")))
    plot = box.run(["carrel", "job", "plot", str(job_id)], user=user.name)
    assert plot.returncode == 0, plot.stderr
    assert all(node.node in plot.stdout for node in inside)


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
    output(box, user, job_id).unlink()
