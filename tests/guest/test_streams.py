"""Row 5: what a task reads and writes passes through the guest byte for byte, all of it, each stream for itself."""

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, outcome, same_as_bare, wait_for
from carrel.testing.leaks import pid_of

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

GUEST = [f"--guest={IMAGE}"]
MIB = 1 << 20
GB_TIMEOUT_S = 600.0


@pytest.fixture(scope="module")
def job(sandbox: Sandbox) -> Iterator[list[str]]:
    """Options of a step of one task in a job without a guest of its own, so that its steps can be compared."""
    with allocation(sandbox, "-N1", "-n1", "--mem=1024") as job_id:
        yield [f"--jobid={job_id}", "--overlap"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 1 MB in which every byte value occurs and no page repeats."""
    path = tmp_path_factory.mktemp("streams") / "noise"
    path.write_bytes(random.Random(5).randbytes(1_000_000))  # noqa: S311  # reproducible is what it must be
    return path


def piped(box: Sandbox, words: Sequence[str], *, source: Path) -> "subprocess.CompletedProcess[bytes]":
    """Run srun with a file at its standard input."""
    with source.open("rb") as stdin:
        return subprocess.run(
            box.command(["srun", *words], netns=box.netns),
            stdin=stdin,
            capture_output=True,
            timeout=GUEST_TIMEOUT_S,
            env={**os.environ, **box.env},
            check=False,
        )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_output(box: Sandbox, words: Sequence[str], *, timeout_s: float) -> str:
    """Run srun and return the SHA-256 of what it wrote, without holding it."""
    digest = hashlib.sha256()
    with subprocess.Popen(
        ["timeout", str(timeout_s), *box.command(["srun", *words], netns=box.netns)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **box.env},
    ) as srun:
        assert srun.stdout is not None
        while part := srun.stdout.read(MIB):
            digest.update(part)
    assert srun.returncode == 0
    return digest.hexdigest()


def test_what_is_compared_here_did_run_in_a_guest(sandbox: Sandbox, job: list[str]) -> None:
    guest, bare = (outcome(sandbox, ["srun", *job, *options, "uname", "-r"]) for options in (GUEST, []))
    assert guest.status == bare.status == 0
    assert guest.stdout != bare.stdout


def test_a_megabyte_on_standard_input_arrives(sandbox: Sandbox, job: list[str], noise: Path) -> None:
    seen = piped(sandbox, [*job, *GUEST, "sha256sum"], source=noise)
    assert seen.stdout.decode().split()[0] == sha256(noise.read_bytes())


def test_a_megabyte_passes_through_a_task_and_back(sandbox: Sandbox, job: list[str], noise: Path) -> None:
    assert piped(sandbox, [*job, *GUEST, "cat"], source=noise).stdout == noise.read_bytes()


def test_a_task_that_reads_nothing_of_its_input_ends_as_bare(sandbox: Sandbox, job: list[str], noise: Path) -> None:
    for options in ([], GUEST):
        seen = piped(sandbox, [*job, *options, "sh", "-c", "exit 3"], source=noise)
        assert seen.returncode == 3, seen.stderr


def test_every_task_of_a_node_reads_the_whole_input(sandbox: Sandbox, job: list[str], noise: Path) -> None:
    seen = piped(sandbox, [*job, "--overcommit", "-n4", *GUEST, "sha256sum"], source=noise)
    assert seen.stdout.decode().split() == [sha256(noise.read_bytes()), "-"] * 4


def test_a_closed_input_is_the_end_of_the_file(sandbox: Sandbox, job: list[str]) -> None:
    assert same_as_bare(sandbox, ["cat"], options=[*job, "--input=none"]).stdout == ""


def test_output_and_errors_stay_apart(sandbox: Sandbox, job: list[str]) -> None:
    script = "for i in $(seq 2000); do echo out $i; echo err $i >&2; done"
    seen = same_as_bare(sandbox, ["bash", "-c", script], options=job)
    assert seen.stdout.splitlines() == [f"out {i}" for i in range(1, 2001)]
    assert seen.stderr.splitlines() == [f"err {i}" for i in range(1, 2001)]


def test_a_task_can_open_its_output_and_errors_by_name(sandbox: Sandbox, job: list[str]) -> None:
    script = "echo out > /dev/stdout; echo err > /dev/stderr"
    assert same_as_bare(sandbox, ["bash", "-c", script], options=job).stdout == "out\n"


def test_a_task_can_close_its_output_and_go_on(sandbox: Sandbox, job: list[str]) -> None:
    script = "echo first; exec >&-; sleep 0.2; echo last >&2"
    seen = same_as_bare(sandbox, ["bash", "-c", script], options=job)
    assert (seen.stdout, seen.stderr) == ("first\n", "last\n")


def test_a_child_that_stays_behind_does_not_delay_the_end_and_does_not_outlive_it(
    sandbox: Sandbox, job: list[str]
) -> None:
    seen = outcome(sandbox, ["srun", *job, *GUEST, "bash", "-c", "sleep 600 & echo $!"])
    assert seen.status == 0
    ask = ["srun", *job, *GUEST, "kill", "-0", seen.stdout.strip()]
    wait_for(lambda: "No such process" in outcome(sandbox, ask).stderr)


def test_eight_tasks_are_labelled_as_they_are(sandbox: Sandbox) -> None:
    options = ["-Q", "-wc1,c2", "-n8", "-l", "--mem=1024", "--overcommit"]  # the same nodes for both
    script = "echo $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME; echo $SLURM_PROCID >&2"
    bare, guest = (outcome(sandbox, ["srun", *options, *more, "bash", "-c", script]) for more in ([], GUEST))
    assert sorted(guest.stdout.splitlines()) == sorted(bare.stdout.splitlines())
    assert sorted(guest.stderr.splitlines()) == [f"{task}: {task}" for task in range(8)]


def test_output_goes_to_the_files_that_srun_names(sandbox: Sandbox, job: list[str], tmp_path: Path) -> None:
    files = [f"--output={tmp_path}/%t.out", f"--error={tmp_path}/%t.err"]
    outcome(sandbox, ["srun", *job, *GUEST, *files, "bash", "-c", "echo out; echo err >&2"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0.out": "out\n", "0.err": "err\n"}


def test_a_task_that_ends_at_once_loses_nothing_of_what_it_wrote(sandbox: Sandbox, job: list[str]) -> None:
    """The last bytes race the end of the task, twenty times."""
    script = "seq 1 20000; seq 20001 20100 >&2; exit 0"
    for _ in range(20):
        seen = outcome(sandbox, ["srun", *job, *GUEST, "bash", "-c", script])
        assert seen.stdout == "".join(f"{i}\n" for i in range(1, 20001))
        assert seen.stderr == "".join(f"{i}\n" for i in range(20001, 20101))


def test_a_task_that_is_over_before_its_output_is_read_loses_nothing(sandbox: Sandbox) -> None:
    with allocation(sandbox, "-n1", f"--guest={IMAGE}") as job_id, ThreadPoolExecutor() as pool:
        srun = ["srun", f"--jobid={job_id}"]
        assert outcome(sandbox, [*srun, "true"]).status == 0  # the guest is up
        for _ in range(3):
            done = pool.submit(outcome, sandbox, [*srun, "sh", "-c", "sleep 1; head -c 240000 /dev/zero"])
            wait_for(lambda: pid_of(sandbox, job_id, "enter") is not None)
            enter = pid_of(sandbox, job_id, "enter")
            assert enter
            time.sleep(0.7)
            enter.kill(signal.SIGSTOP)
            time.sleep(1)
            enter.kill(signal.SIGCONT)
            assert (len(done.result().stdout), done.result().status) == (240_000, 0)


def test_a_script_that_is_killed_loses_nothing_of_what_it_wrote(sandbox: Sandbox, tmp_path: Path) -> None:
    """A script, since srun itself drops what is under way when a task dies by a signal, with a guest or without."""
    words = ["sbatch", "--wait", "--mem=1024", f"--output={tmp_path}/%j", "--wrap=seq 20000; kill -KILL $$"]
    bare, guest = (outcome(sandbox, [*words, *options]).status for options in ([], GUEST))
    assert guest == bare != 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["".join(f"{i}\n" for i in range(1, 20001))] * 2


def test_many_tasks_that_write_at_once_lose_nothing(sandbox: Sandbox, job: list[str]) -> None:
    words = ["srun", *job, "--overcommit", "-n8", "-l", *GUEST, "bash", "-c", "seq 10000"]
    by_task: dict[str, list[str]] = {}
    for line in outcome(sandbox, words).stdout.splitlines():
        label, _, text = line.partition(": ")
        by_task.setdefault(label, []).append(text)
    assert by_task == {str(task): [str(i) for i in range(1, 10001)] for task in range(8)}


@pytest.mark.timeout(2 * GB_TIMEOUT_S)
def test_a_gigabyte_of_output_arrives_bit_for_bit(sandbox: Sandbox, job: list[str], noise: Path) -> None:
    """Numbered copies of noise, so that no two pieces of any length are the same; counting by lines would be slow."""
    unit = 16 * noise.read_bytes()
    copies = 63
    expected = hashlib.sha256()
    for number in range(1, copies + 1):
        expected.update(b"%d\n" % number + unit)
    assert copies * len(unit) > 10**9
    piped(sandbox, [*job, *GUEST, "sh", "-c", "cd /tmp; cat > noise; cat $(yes noise | head -16) > unit"], source=noise)
    script = f"for i in $(seq {copies}); do echo $i; cat /tmp/unit; done"
    seen = digest_of_output(sandbox, [*job, *GUEST, "sh", "-c", script], timeout_s=GB_TIMEOUT_S)
    assert seen == expected.hexdigest()
