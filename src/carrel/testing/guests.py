"""What tests of guests share: to wait for a fact, to ask Slurm for a job, and to compare a task with a bare one.

*Bare* is the reference for almost everything a guest promises: the same command, in the same job, without ``--guest``.
"""

import os
import re
import secrets
import shutil
import subprocess  # as in carrel.sandbox.cluster: a test wants to see a status
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from carrel import paths
from carrel.sandbox.cluster import Sandbox
from carrel.testing.sandbox import User

IMAGE = "debian12"
POLL_S = 0.1

_NOT_ENDED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"}

# A cold boot takes seconds on an idle machine; this bounds a hang, and is no promise of speed.
GUEST_TIMEOUT_S = 180.0


class Outcome(msgspec.Struct, frozen=True):
    """What a user sees of a command that ended."""

    status: int
    stdout: str
    stderr: str


def wait_for(fact: Callable[[], bool], timeout_s: float = GUEST_TIMEOUT_S) -> None:
    """Return when the fact is true.

    Raises:
        AssertionError: it was not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s: {fact}"
        time.sleep(POLL_S)


def job_state(box: Sandbox, job_id: int) -> str:
    """Return Slurm's word for the state of a job, as ``RUNNING``; ``UNKNOWN`` where Slurm does not know it."""
    return _squeue(box, job_id, "%T") or "UNKNOWN"


def _squeue(box: Sandbox, job_id: int, columns: str) -> str:
    """Return the first line that squeue has of a job; empty: it has none."""
    done = box.run(["squeue", "--noheader", "--states=all", f"--format={columns}", f"--jobs={job_id}"])
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


@contextmanager
def allocation(box: Sandbox, *options: str, user: str | None = None) -> Iterator[int]:
    """Have a job that waits for steps: ``srun --jobid=ID``. Boots at most one guest a node, whatever runs in it.

    It is there when its Prologs are done. ``salloc`` waits for that too, but asks only once every 3 s.
    """
    words = box.command(["salloc", "--no-shell", *options], netns=box.netns, user=user)
    with (
        NamedTemporaryFile() as said,
        subprocess.Popen(words, env={**os.environ, **box.env}, cwd="/", stderr=said) as salloc,
    ):
        try:
            job_id = _granted(salloc, Path(said.name))
            try:
                wait_for(lambda: not {"PENDING", "CONFIGURING", "Prolog"} & {*_squeue(box, job_id, "%T %r").split()})
                yield job_id
            finally:
                box.run(["scancel", str(job_id)])
                wait_for(lambda: job_state(box, job_id) not in _NOT_ENDED)
        finally:
            salloc.kill()


def _granted(salloc: "subprocess.Popen[bytes]", said: Path) -> int:
    """Return the id of the job that salloc was given."""
    found: list[str] = []

    def answered() -> bool:
        ended = salloc.poll() is not None
        found[:] = re.findall(r"Granted job allocation (\d+)", said.read_text())
        return ended or bool(found)

    wait_for(answered)
    assert found, said.read_text()
    return int(found[0])


def submit(box: Sandbox, script: str, *options: str, user: User, arguments: Sequence[str] = ()) -> tuple[int, Path]:
    """Submit a batch script from a new directory in the user's home; return job id and that directory.

    The directory becomes the job's working directory; its output is ``out`` there.
    """
    place = user.home / f"batch-{secrets.token_hex(4)}"
    place.mkdir()
    (place / "script.sh").write_text(script)
    for path in (place, place / "script.sh"):
        os.chown(path, user.uid, user.gid)
    words = ["sbatch", "--parsable", "--output=out", *options, "script.sh", *arguments]
    done = box.run(words, user=user.name, cwd=place, timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), place


def await_end(box: Sandbox, job_id: int, timeout_s: float = GUEST_TIMEOUT_S) -> str:
    """Return the state in which a job ended; of an array, when all of its tasks have, that of one of them."""
    seen: set[str] = set()

    def ended() -> bool:
        done = box.run(["squeue", "--noheader", "--states=all", "--array", "--format=%T", f"--jobs={job_id}"])
        seen.clear()
        seen.update(done.stdout.split())
        return bool(seen) and not seen & _NOT_ENDED

    wait_for(ended, timeout_s)
    return min(seen)


def outcome(
    box: Sandbox,
    words: Sequence[str | Path],
    *,
    user: str | None = None,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a command of the cluster and return what its user sees, without what differs from run to run."""
    done = box.run(words, user=user, timeout_s=GUEST_TIMEOUT_S, stdin=stdin, cwd=cwd, env=env)
    return Outcome(done.returncode, normal(done.stdout), srun_last(normal(done.stderr)))


def normal(text: str) -> str:
    """Return text without the words that differ from run to run: ids of jobs and steps, process ids, times.

    Slurm 26.05 begins a step's complaints with the time, earlier releases with the name of its manager.

    >>> normal("slurmstepd-c1: error: *** STEP 12.0 ON c1 CANCELLED AT 2026-11-21T00:31:06 ***")
    'slurmstepd: error: *** STEP J.S ON c1 CANCELLED AT T ***'
    >>> normal("[2026-11-21T00:31:06.123] error: execve(): x: No such file or directory")
    'slurmstepd: error: execve(): x: No such file or directory'
    """
    text = re.sub(
        r"^(?:slurmstepd-\S+:|\[\d{4}-\d\d-\d\dT[\d:.]+\]) error: ", "slurmstepd: error: ", text, flags=re.MULTILINE
    )
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "T", text)
    text = re.sub(r"\b(StepId=|step )\d+\.(\w+)", r"\1J.S", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(job |jobid |allocation |JobId=)\d+", r"\1J", text, flags=re.IGNORECASE)
    return re.sub(r"\b(pid )\d+", r"\1P", text, flags=re.IGNORECASE)


def srun_last(stderr: str) -> str:
    r"""Return stderr with srun's own lines after those of the task: which come first is a race, also when bare.

    >>> srun_last("srun: error: c1: task 0: Exited with exit code 3\noops\n")
    'oops\nsrun: error: c1: task 0: Exited with exit code 3\n'
    """
    lines = stderr.splitlines(keepends=True)
    return "".join(sorted(lines, key=lambda line: line.startswith("srun: ")))


def same_as_bare(
    box: Sandbox,
    words: Sequence[str | Path],
    *,
    options: Sequence[str] = (),
    guest_options: Sequence[str] = (f"--guest={IMAGE}",),
    user: str | None = None,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``srun OPTIONS WORDS`` bare and in a guest; assert that a user sees the same, and return what that is.

    Args:
        box: Where.
        words: The command.
        options: Options of ``srun`` that both get. ``--jobid`` of a job without a guest is the quickest:
            the guest that its first step makes serves the later ones.
        guest_options: What only the one in a guest gets.
        user: Whom to run as.
        stdin: Text for the standard input.
        cwd: Directory of ``srun``.
        env: More variables of ``srun``.
    """
    bare = outcome(box, ["srun", *options, *words], user=user, stdin=stdin, cwd=cwd, env=env)
    guest = outcome(box, ["srun", *options, *guest_options, *words], user=user, stdin=stdin, cwd=cwd, env=env)
    assert guest == bare
    return guest


def store_like_ours(path: Path) -> Path:
    """Make an image store that has what the machine's has, and can be spoiled."""
    ours = paths.image_store()
    (path / "images").mkdir(parents=True)
    for image in (ours / "images").iterdir():
        (path / "images" / image.name).symlink_to(image)
    shutil.copytree(ours / "tags", path / "tags")
    (path / "kernels").symlink_to(ours / "kernels")
    (path / "initramfs").mkdir()
    return path
