"""What people see of real jobs: while they run, when they have ended, and of the jobs of others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import await_end, wait_for
from carrel.testing.leaks import nothing_left
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.root, pytest.mark.slurm]

BUSY = "timeout 1 sh -c 'while :; do :; done'; true"
STEM = f"people.{os.getpid()}"
"""Of outputs: another run of the tests may use the same home."""
CARREL = [sys.executable, "-m", "carrel.cli.main"]


@pytest.fixture(autouse=True)
def outputs(user: User) -> Iterator[None]:
    """Leave no output behind: job ids come back, in the next sandbox."""
    yield
    for path in user.home.glob(f"{STEM}.*.out"):
        path.unlink()


@pytest.fixture(scope="module")
def box(sandbox_factory: MakeSandbox) -> Iterator[Sandbox]:
    made = sandbox_factory(nodes=2, carrel_conf="[metrics]\nperiod_s = 0.1\nreaders = 'games'\n")
    yield made
    nothing_left(made)
    made.down()


def submit(box: Sandbox, user: User, script: str, *options: str) -> int:
    words = ["sbatch", "--parsable", "-o", f"{user.home}/{STEM}.%j.out", *options]
    done = box.run(words, user=user.name, stdin=f"#!/bin/sh\n{script}\n")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def output(user: User, job: int) -> Path:
    return user.home / f"{STEM}.{job}.out"


def finished(box: Sandbox, user: User, job: int, state: str = "COMPLETED") -> Path:
    assert await_end(box, job) == state
    folder = box.dir / "metrics" / user.name / str(job)
    wait_for(lambda: (folder / "summary.json").exists() and not list(folder.glob("*.seg")))
    return folder


def carrel(box: Sandbox, *words: str, who: str | None = None, groups: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command as root, as a user, or as nobody with a further group."""
    command = [*CARREL, *words]
    if groups:
        command = ["setpriv", "--reuid=65534", "--regid=65534", f"--groups={groups}", *command]
    return box.run(command, user=who)


def test_a_batch_job_that_asks_for_it_finds_its_report_in_its_output(box: Sandbox, user: User) -> None:
    job = submit(box, user, f"echo mine; {BUSY}", "--carrel-report", "-J", "solve", "-t", "10")
    finished(box, user, job)
    wait_for(lambda: "more: carrel job plot" in output(user, job).read_text())
    lines = output(user, job).read_text().splitlines()
    assert lines[:2] == ["mine", ""]
    assert lines[3].startswith(f"job {job} solve: ")
    assert any(line.startswith("  CPU ") for line in lines)
    assert any(line.startswith("  time limit ") and "of 10:00 min" in line for line in lines)
    assert output(user, job).stat().st_uid == user.uid


def test_a_job_that_does_not_ask_or_has_no_output_gets_none(box: Sandbox, user: User) -> None:
    """Of the second, which removed its output, the report comes too late: no file appears, and nobody fails."""
    quiet = submit(box, user, "echo mine", "--comment=x")
    gone = submit(box, user, f"rm {user.home}/{STEM}.$SLURM_JOB_ID.out", "--carrel-report")
    last = submit(box, user, "true", "--carrel-report")
    for job in (quiet, gone, last):
        finished(box, user, job)
    wait_for(lambda: "more: carrel job plot" in output(user, last).read_text())
    assert output(user, quiet).read_text() == "mine\n"
    assert not output(user, gone).exists()


def test_an_output_that_became_a_link_to_a_file_of_root_is_not_written(
    box: Sandbox, user: User, tmp_path: Path
) -> None:
    target = tmp_path / "precious"
    target.write_text("root's\n")
    target.chmod(0o644)
    job = submit(box, user, f"ln -sf {target} {user.home}/{STEM}.$SLURM_JOB_ID.out", "--carrel-report")
    last = submit(box, user, "true", "--carrel-report")
    for each in (job, last):
        finished(box, user, each)
    wait_for(lambda: "more: carrel job plot" in output(user, last).read_text())
    assert target.read_text() == "root's\n"


def test_a_running_job_can_be_watched_to_its_end_and_plotted(box: Sandbox, user: User) -> None:
    go = user.home / f"{STEM}.go"
    job = submit(box, user, f"srun -N2 -n2 sh -c 'until [ -e {go} ]; do sleep 0.1; done'", "-N2", "-c1")
    folder = box.dir / "metrics" / user.name / str(job)
    wait_for(lambda: len(list(folder.glob("*.seg"))) == 2)
    plotted = carrel(box, "job", "plot", str(job), "cpu", "meminfo.MemFree", who=user.name)
    assert plotted.returncode == 0, plotted.stderr
    assert ", so far" in plotted.stdout.splitlines()[0]
    assert plotted.stdout.count("CPUs busy") + plotted.stdout.count("meminfo.MemFree") == 4
    command = box.command(
        [*CARREL, "job", "watch", str(job), "--every", "0.2", "--json"], netns=box.netns, user=user.name
    )
    with subprocess.Popen(command, env={**os.environ, **box.env}, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        moments: list[dict[str, Any]] = [json.loads(watching.stdout.readline()) for _ in range(6)]
        go.touch()
        watching.stdout.read()
        assert watching.wait(timeout=60) == 0
    go.unlink()
    assert {moment["node"] for moment in moments} == set(box.facts().nodes)
    assert len({(moment["node"], moment["time"]) for moment in moments}) == 6
    finished(box, user, job)
    again = carrel(box, "job", "watch", str(job), who=user.name)
    assert (again.returncode, again.stderr) == (3, f"carrel: job {job} has ended; see: carrel job report {job}\n")


def test_the_tasks_of_an_array_are_reported_together(box: Sandbox, user: User) -> None:
    array = submit(box, user, "true", "--array=3,5-6", "-J", "sweep")
    assert await_end(box, array) == "COMPLETED"

    def told() -> dict[str, Any]:
        done = carrel(box, "job", "report", str(array), "--json", who=user.name)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    wait_for(lambda: told().get("tasks") == 3 and told()["running"] == 0)
    assert told()["array_job_id"] == array
    one = carrel(box, "job", "report", f"{array}_5", who=user.name)
    assert one.stdout.startswith("job "), one.stderr
    refused = carrel(box, "job", "plot", str(array), who=user.name)
    assert refused.returncode == 2
    assert f"is an array of 3 tasks; name one of them, such as {array}_3" in refused.stderr


@pytest.mark.parametrize("verb", ["report", "plot", "watch"])
def test_samples_are_for_their_owner_root_and_the_readers(box: Sandbox, user: User, verb: str) -> None:
    job = submit(box, user, "sleep 300" if verb == "watch" else "true")
    folder = box.dir / "metrics" / user.name / str(job)
    wait_for(folder.exists)
    try:
        if verb != "watch":
            finished(box, user, job)
            for about in ({"who": None}, {"who": user.name}, {"groups": "games"}):
                done = carrel(box, "job", verb, str(job), **about)
                assert done.returncode == 0, done.stderr
        done = carrel(box, "job", verb, str(job), groups="mail")
        assert done.returncode == 4
        assert done.stderr == (
            f"carrel: job {job} is {user.name}'s: only {user.name}, root and the group games"
            " may read its samples (metrics.readers)\n"
        )
    finally:
        box.run(["scancel", str(job)])
    if verb == "watch":
        finished(box, user, job, "CANCELLED")  # or its files would be replaced while they are looked at
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir() if not path.name.startswith(".")}
    assert modes <= {0o640}
    assert {path.stat().st_gid for path in folder.iterdir()} <= {os.stat(folder).st_gid, 0}  # noqa: PTH116
