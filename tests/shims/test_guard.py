"""carrel-guard with small programs in QEMU's place: what it gives them, and what it leaves when they are gone."""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from carrel import paths

pytestmark = pytest.mark.root

USER = 64242
"""A user id that exists nowhere: the guard needs a number, not a name."""
LONGER_THAN_THE_GUARDS_PATIENCE_S = 6.5
CGROUPS = Path("/sys/fs/cgroup")


def until(fact: Callable[[], object], *, bound_s: float = 30) -> None:
    deadline = time.monotonic() + bound_s
    while not fact():
        assert time.monotonic() < deadline, f"still not so after {bound_s} s"
        time.sleep(0.01)


def stays(fact: Callable[[], object], *, for_s: float) -> None:
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        assert fact()
        time.sleep(0.05)


class Guarded:
    """A guest directory, and a guard in it whose "QEMU" is any command."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dir = root / "guests" / "g1"
        self.dir.mkdir(parents=True)
        os.chown(self.dir, USER, USER)
        self.job_dir = root / "job_7"
        self.lock = (root / "carreld.lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.guard: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, watch: str = "", options: list[str] | None = None) -> subprocess.Popen[bytes]:
        watching = ["--step-sockets", watch] if watch else ["--job-dir", str(self.job_dir)]
        keep = [int(value) for name, value in pairwise(options or []) if name == "--keep-fd"]
        with (self.dir / "guard.log").open("ab") as log:
            self.guard = subprocess.Popen(
                [paths.libexec() / "carrel-guard", "--dir", self.dir, "--uid", str(USER), "--gid", str(USER),
                 "--groups", f"{USER},{USER + 1}", "--lock", self.root / "carreld.lock",
                 *watching, *(options or []), "--", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=keep,
            )  # fmt: skip
        return self.guard

    def run(self, *command: str, options: list[str] | None = None) -> str:
        """Run ``command`` to its end and return what it wrote."""
        self.start(*command, options=options).wait(30)
        return self.log

    @property
    def log(self) -> str:
        return (self.dir / "guard.log").read_text()

    @property
    def end(self) -> list[str]:
        return (self.dir / "end").read_text().splitlines()

    @property
    def qemu(self) -> int:
        until((self.dir / "pids").exists)
        lines = dict(line.split("=") for line in (self.dir / "pids").read_text().splitlines())
        return int(lines["qemu"].split()[0])

    def carreld_dies(self) -> None:
        self.lock.close()


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    # pytest's own directories are closed to the user that the guard becomes.
    root = Path(tempfile.mkdtemp(prefix="cg", dir="/tmp"))
    root.chmod(0o755)
    made = Guarded(root)
    yield made
    made.lock.close()
    if made.guard and made.guard.poll() is None:
        made.guard.terminate()
        made.guard.wait(30)
    shutil.rmtree(root)


@pytest.fixture
def job_cgroup() -> Iterator[Path]:
    controller = CGROUPS / "memory"
    if not controller.is_dir():
        pytest.skip("no cgroup v1 memory controller on this machine")
    top = controller / f"slurm_guard{secrets.token_hex(4)}"
    guest = top / f"uid_{USER}" / "job_7" / "carrel"
    guest.mkdir(parents=True)
    yield guest
    for directory in (guest, guest.parent, guest.parent.parent, top):
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fields(status: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


def step_process(job_dir: Path) -> Path:
    """Make ``job_dir`` look as a cgroup does while a step has a process; return the file that says so."""
    procs = job_dir / "step_batch" / "task_0" / "cgroup.procs"
    procs.parent.mkdir(parents=True)
    procs.write_text("1\n")
    return procs


def test_a_shutdown_is_recorded_as_stopped(guarded: Guarded) -> None:
    guarded.run("/bin/true")
    assert guarded.end == ["stopped", "the guest was shut down"]


def test_a_failure_is_recorded_with_its_code_and_its_last_line(guarded: Guarded) -> None:
    guarded.run("/bin/sh", "-c", "echo first; echo 'no /dev/kvm here' >&2; exit 7")
    assert guarded.end == ["exited", "qemu exited with 7: no /dev/kvm here"]


def test_a_death_by_signal_is_recorded_with_the_signal(guarded: Guarded) -> None:
    guard = guarded.start("/bin/sleep", "60")
    os.kill(guarded.qemu, signal.SIGKILL)
    assert guard.wait(30) == 0
    assert guarded.end == ["killed", "qemu was killed by signal 9"]


def test_a_command_that_cannot_be_started_is_recorded_and_the_guard_fails(guarded: Guarded) -> None:
    guarded.run("/no/such/qemu")
    assert guarded.guard
    assert guarded.guard.returncode == 5
    assert guarded.end == ["exited", "/no/such/qemu: No such file or directory"]
    assert not (guarded.dir / "pids").exists()


def test_sigterm_to_the_guard_destroys_the_guest(guarded: Guarded) -> None:
    guard = guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    guard.terminate()
    assert guard.wait(30) == 0
    assert not alive(qemu)
    assert guarded.end == ["destroyed", "the guest was destroyed"]


def test_the_end_can_be_read_by_everybody(guarded: Guarded) -> None:
    guarded.run("/bin/true")
    assert (guarded.dir / "end").stat().st_mode & 0o777 == 0o644


def test_qemu_runs_as_the_user_with_no_way_back(guarded: Guarded) -> None:
    status = fields(guarded.run("/bin/cat", "/proc/self/status"))
    assert status["Uid"].split() == [str(USER)] * 4
    assert status["Gid"].split() == [str(USER)] * 4
    assert status["Groups"].split() == [str(USER), str(USER + 1)]
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_qemu_has_every_signal_blocked(guarded: Guarded) -> None:
    status = fields(guarded.run("/bin/cat", "/proc/self/status"))
    blocked = {number for number in range(1, 65) if int(status["SigBlk"], 16) >> (number - 1) & 1}
    # 32 and 33 are glibc's own, and KILL and STOP cannot be blocked.
    assert blocked == set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}


def test_qemu_survives_the_signals_that_slurm_sends(guarded: Guarded) -> None:
    guarded.start("/bin/sleep", "60")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT, signal.SIGTSTP):
        os.kill(guarded.qemu, number)
    until(lambda: "State:\tS" in Path(f"/proc/{guarded.qemu}/status").read_text())  # it may only just begin


def test_qemu_gets_the_descriptors_it_was_promised_and_no_other(guarded: Guarded) -> None:
    reading, writing = os.pipe()
    other = os.dup(reading)
    guarded.run("/bin/ls", "-1", "/proc/self/fd", options=["--keep-fd", str(writing)])
    for descriptor in (reading, writing, other):
        os.close(descriptor)
    opened_by_ls = {3}
    assert {int(line) for line in guarded.log.split()} - opened_by_ls == {0, 1, 2, writing} - opened_by_ls


def test_the_guard_keeps_none_of_qemus_descriptors(guarded: Guarded) -> None:
    reading, writing = os.pipe()
    guarded.start("/bin/sleep", "60", options=["--keep-fd", str(writing)])
    os.close(writing)
    os.kill(guarded.qemu, signal.SIGKILL)
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b"", "the pipe must end with QEMU"
    os.close(reading)


def test_qemu_dies_with_a_guard_that_is_killed(guarded: Guarded) -> None:
    guard = guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    guard.kill()
    guard.wait(30)
    until(lambda: not alive(qemu))


def test_the_pids_file_names_both_with_their_start_times(guarded: Guarded) -> None:
    guard = guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    lines = dict(line.split("=") for line in (guarded.dir / "pids").read_text().splitlines())
    for name, pid in (("guard", guard.pid), ("qemu", qemu)):
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert lines[name] == f"{pid} {started}"


def test_a_directory_is_shared_without_a_trace_on_the_host(guarded: Guarded) -> None:
    shared = guarded.root / "data"
    shared.mkdir()
    (shared / "f").write_text("hello")
    script = f"cat {guarded.dir}/stage/0/f; exec sleep 60"
    guarded.start("/bin/sh", "-c", script, options=["--bind", f"0:rw:{shared}"])
    until(lambda: guarded.log == "hello")
    assert not list((guarded.dir / "stage").iterdir())
    assert str(guarded.dir) not in Path("/proc/self/mountinfo").read_text()
    mounts = Path(f"/proc/{guarded.qemu}/mountinfo").read_text()
    (mount,) = [line for line in mounts.splitlines() if f"{guarded.dir}/stage/0 " in line]
    assert {"nosuid", "nodev", "rw"} <= set(mount.split()[5].split(","))


def test_a_single_file_can_be_shared(guarded: Guarded) -> None:
    (guarded.root / "one.txt").write_text("one file\n")
    stage = guarded.dir / "stage"
    assert guarded.run("/bin/cat", f"{stage}/7", options=["--bind", f"7:ro:{guarded.root}/one.txt"]) == "one file\n"


def test_a_read_only_share_is_read_only_also_where_something_is_mounted_below_it(guarded: Guarded) -> None:
    shared = guarded.root / "data"
    (shared / "below").mkdir(parents=True)
    shared.chmod(0o777)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0777", "x", shared / "below"], check=True)
    try:
        stage = guarded.dir / "stage"
        script = f"touch {stage}/0/a; touch {stage}/0/below/b"
        said = guarded.run("/bin/sh", "-c", script, options=["--bind", f"0:ro:{shared}"])
        assert said.count("Read-only file system") == 2
    finally:
        subprocess.run(["umount", shared / "below"], check=True)


@pytest.mark.parametrize("closed", ["closed", "closed/inside"])
def test_what_the_user_may_not_reach_is_refused(guarded: Guarded, closed: str) -> None:
    (guarded.root / "closed" / "inside").mkdir(parents=True)
    (guarded.root / "closed").chmod(0o700)
    said = guarded.run("/bin/true", options=["--bind", f"0:rw:{guarded.root}/{closed}"])
    assert f"mount source {guarded.root}/{closed}: Permission denied" in said
    assert guarded.guard
    assert guarded.guard.returncode == 4
    assert guarded.end == ["exited", f"mount source {guarded.root}/{closed}: Permission denied"]


def test_a_missing_cgroup_is_named(guarded: Guarded) -> None:
    said = guarded.run("/bin/true", options=["--cgroup", "/sys/fs/cgroup/memory/no_such"])
    assert "cgroup /sys/fs/cgroup/memory/no_such: No such file or directory" in said
    assert guarded.guard
    assert guarded.guard.returncode == 3


def test_qemu_sits_in_the_jobs_cgroup_and_all_are_removed_afterwards(guarded: Guarded, job_cgroup: Path) -> None:
    guard = guarded.start("/bin/sleep", "60", options=["--cgroup", str(job_cgroup)])
    assert str(guarded.qemu) in (job_cgroup / "cgroup.procs").read_text().split()
    os.kill(guarded.qemu, signal.SIGKILL)
    guard.wait(30)
    assert not job_cgroup.parent.parent.exists()
    assert job_cgroup.parent.parent.parent.exists(), "the node's own directory is Slurm's"


def test_a_jobs_cgroup_that_still_has_a_step_is_left(guarded: Guarded, job_cgroup: Path) -> None:
    step = job_cgroup.parent / "step_0"
    step.mkdir()
    guarded.run("/bin/true", options=["--cgroup", str(job_cgroup)])
    assert not job_cgroup.exists()
    assert step.exists()
    step.rmdir()


def test_a_jobs_cgroup_is_left_while_slurmstepd_makes_another_one(guarded: Guarded, job_cgroup: Path) -> None:
    held = os.open(CGROUPS / "memory", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    guarded.run("/bin/true", options=["--cgroup", str(job_cgroup)])
    os.close(held)
    assert not job_cgroup.exists()
    assert job_cgroup.parent.exists()


def test_a_guest_over_the_jobs_memory_is_recorded_as_oom_with_the_jobs_limit(
    guarded: Guarded, job_cgroup: Path
) -> None:
    (job_cgroup.parent / "memory.limit_in_bytes").write_text(str(40 << 20))
    hog = "x = bytearray(200 << 20)"
    guarded.run("/usr/bin/python3", "-c", hog, options=["--cgroup", str(job_cgroup)])
    sentence = "the guest needed more memory than the job has (40 MiB); ask for more with --mem"
    assert guarded.end == ["oom", sentence]
    assert not job_cgroup.exists()


def test_the_guard_leaves_the_guest_to_carreld_while_carreld_lives(guarded: Guarded) -> None:
    step = step_process(guarded.job_dir)
    guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    step.write_text("")
    stays(lambda: alive(qemu), for_s=LONGER_THAN_THE_GUARDS_PATIENCE_S)


@pytest.mark.parametrize("how", ["no process in any step", "no directory of the job"])
def test_the_guard_ends_the_guest_when_carreld_is_dead_and_the_job_is_gone(guarded: Guarded, how: str) -> None:
    step = step_process(guarded.job_dir)
    guard = guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    guarded.carreld_dies()
    if how == "no process in any step":
        step.write_text("")
    else:
        shutil.rmtree(guarded.job_dir)
    assert guard.wait(30) == 0
    assert not alive(qemu)
    assert guarded.end == ["destroyed", "the job is gone and carreld is not running"]


def test_a_job_that_lives_keeps_its_guest_while_carreld_is_dead(guarded: Guarded) -> None:
    step_process(guarded.job_dir)
    guarded.start("/bin/sleep", "60")
    qemu = guarded.qemu
    guarded.carreld_dies()
    stays(lambda: alive(qemu), for_s=LONGER_THAN_THE_GUARDS_PATIENCE_S)


def test_without_cgroups_a_job_lives_as_long_as_slurmstepd_answers(guarded: Guarded) -> None:
    with socket.socket(socket.AF_UNIX) as stepd:
        stepd.bind(str(guarded.root / "c1_7.0"))
        stepd.listen(64)
        guard = guarded.start("/bin/sleep", "60", watch=f"{guarded.root}/c1_7.")
        qemu = guarded.qemu
        guarded.carreld_dies()
        stays(lambda: alive(qemu), for_s=LONGER_THAN_THE_GUARDS_PATIENCE_S)
    # The socket's file stays, as after kill -9 of slurmstepd.
    assert guard.wait(30) == 0
    assert guarded.end[0] == "destroyed"


def test_a_user_of_many_groups_keeps_them_all(guarded: Guarded) -> None:
    groups = ",".join(str(200_000 + number) for number in range(600))
    said = guarded.run("/usr/bin/id", "-G", options=["--groups", groups])
    assert set(groups.split(",")) < set(said.split())
