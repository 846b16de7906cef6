"""The sandbox keeps its promise: a real Slurm, and nothing left. What is found by its own directory name is its own."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carrel.errors import CarrelError, RefusedError, UsageError
from carrel.process import run
from carrel.sandbox import descendants
from carrel.sandbox.cluster import Remote, Sandbox
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = pytest.mark.slurm

CARREL = [sys.executable, "-m", "carrel.cli.main"]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def eventually(fact: Callable[[], bool], *, timeout_s: float = 60.0) -> bool:
    """Wait for a fact, bounded."""
    deadline = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def leftovers(root: Path) -> list[str]:
    """Return what is left of the sandbox in ``root``, and of any cgroup or namespace of its daemons."""
    found = [str(root)] if root.exists() else []
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {root}/" in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and descendants.alive(int(entry.name)):
            try:
                command = (entry / "cmdline").read_bytes()
                belongs = str(root).encode() in (entry / "environ").read_bytes() + command
            except OSError:
                continue
            if belongs:
                found.append(f"{entry.name}: {command!r}")
    return found


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory name that nobody uses; whatever a test leaves there fails it."""
    path = Path(f"/tmp/carrel-t{secrets.token_hex(3)}")  # no number of a process: those come back
    yield path
    assert leftovers(path) == []


def sandbox_run(root: Path, *options: str, command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*CARREL, "sandbox", "run", "--no-guests", "--dir", str(root), *options, "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


LONG_JOB = 'srun -N3 sh -c "setsid sleep 301 & sleep 302" </dev/null & srun echo begun && exec sleep 303'
"""A job with a background child in a session of its own, and a command that lives on."""


def begin_long_job(root: Path) -> "subprocess.Popen[str]":
    child = sandbox_run(root, command=["sh", "-c", LONG_JOB])
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    return child


def test_the_exit_status_is_the_commands_and_so_are_its_streams(root: Path) -> None:
    child = sandbox_run(root, command=["sh", "-c", "cat; srun -N3 echo 3; echo oops >&2; exit 37"])
    out, err = child.communicate("fed\n", timeout=60)
    assert (child.returncode, out, err) == (37, "fed\n3\n3\n3\n", "oops\n")


def test_settings_of_a_file_go_over_those_of_the_sandbox(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[metrics]\nsinks = ["csv"]\n[sinks.csv]\ndir = "/elsewhere"\n')
    show = ["sh", "-c", "carrel config show --json | grep -E 'sinks|metrics.root'"]
    out, err = sandbox_run(root, "--nodes", "1", "--settings", str(file), command=show).communicate(timeout=60)
    assert err == ""
    shown = {one["name"]: one["value"] for one in map(json.loads, out.splitlines())}
    assert (shown["metrics.sinks"], shown["sinks.csv.dir"]) == (["csv"], "/elsewhere")
    assert shown["metrics.root"] == str(root / "metrics"), "what the file does not name stays"


@pytest.mark.parametrize(("text", "sentence"), [("[metrics\n", "is it TOML?"), (None, "No such file or directory")])
def test_settings_that_cannot_be_read_start_nothing(
    root: Path, tmp_path: Path, text: str | None, sentence: str
) -> None:
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    child = sandbox_run(root, "--settings", str(file), command=["true"])
    _, err = child.communicate(timeout=60)
    assert (child.returncode, sentence in err) == (2, True), err
    assert not root.exists()


def test_a_command_that_a_signal_ended_counts_as_128_plus_the_signal(root: Path) -> None:
    child = sandbox_run(root, command=["sh", "-c", "kill -SEGV $$"])
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGSEGV


def test_a_command_that_is_not_there_is_one_sentence_and_127(root: Path) -> None:
    child = sandbox_run(root, command=["no-such-command"])
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (127, "carrel: no-such-command: not found\n")


def test_ctrl_c_ends_the_command_and_leaves_nothing(root: Path) -> None:
    child = begin_long_job(root)
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT


def test_sigterm_to_the_cli_ends_the_command_and_leaves_nothing(root: Path) -> None:
    child = begin_long_job(root)
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM


def test_sigkill_to_the_cli_leaves_nothing(root: Path) -> None:
    child = begin_long_job(root)
    child.kill()
    child.communicate(timeout=60)
    assert eventually(lambda: not leftovers(root)), leftovers(root)


HOLDER = """
import pathlib, sys, time
from carrel.sandbox.cluster import Sandbox
box = Sandbox(dir=pathlib.Path(sys.argv[1]), guests=False)
box.up()
print(box.run(["sbatch", "--output=/dev/null", "--wrap", "sleep 300"]).returncode, flush=True)
time.sleep(300)
"""


def test_sigkill_while_it_starts_leaves_nothing(root: Path) -> None:
    child = sandbox_run(root, "--nodes", "20", command=["true"])
    assert eventually((root / "log/slurmctld.stderr").exists)
    child.kill()
    child.communicate(timeout=60)
    assert eventually(lambda: not leftovers(root)), leftovers(root)


def test_a_sandbox_within_a_sandbox_ends_with_it_and_leaves_nothing(root: Path) -> None:
    inner = Path(f"{root}i")
    nested = [*CARREL, "sandbox", "run", "--no-guests", "--dir", str(inner), "--", "sh", "-c", "echo begun; sleep 304"]
    child = sandbox_run(root, command=nested)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.kill()
    child.communicate(timeout=60)
    assert eventually(lambda: not leftovers(root) and not leftovers(inner)), (leftovers(root), leftovers(inner))


def test_sigkill_to_the_process_that_holds_a_sandbox_leaves_nothing(root: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "0\n"
        holder.kill()
    assert eventually(lambda: not leftovers(root)), leftovers(root)


def test_a_sandbox_whose_harness_was_killed_is_still_ended_and_removed(root: Path) -> None:
    box = Sandbox(dir=root, guests=False)
    box.up()
    job = box.run(
        ["sbatch", "--output=/dev/null", "--parsable", "--wrap", "setsid sleep 300 & sleep 301"]
    ).stdout.strip()
    assert eventually(lambda: box.run(["squeue", "-h", "-j", job, "-o", "%T"]).stdout == "RUNNING\n")
    os.kill(box.facts().pid, signal.SIGKILL)
    box.down()
    assert leftovers(root) == []


def test_what_is_mounted_below_a_sandbox_is_unmounted_and_its_files_stay(root: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: to mount")
    (tmp_path / "precious").write_text("mine")
    with Sandbox(dir=root, nodes=1, guests=False) as box:
        (box.dir / "nodes/c1/mnt").mkdir()
        run(["mount", "--bind", str(tmp_path), str(box.dir / "nodes/c1/mnt")])
    assert (tmp_path / "precious").read_text() == "mine"
    assert leftovers(root) == []


def test_a_directory_that_is_not_empty_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(CarrelError, match="not an empty directory") as caught:
        Sandbox(dir=tmp_path, guests=False).up()
    assert caught.value.exit_code == RefusedError.exit_code
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_directory_too_long_for_sockets_is_refused_with_the_length(tmp_path: Path) -> None:
    with pytest.raises(CarrelError, match="no room for unix sockets"):
        Sandbox(dir=tmp_path / ("x" * 80), guests=False).up()


def test_a_daemon_that_exits_at_once_is_one_sentence_with_the_end_of_its_log(root: Path) -> None:
    with pytest.raises(
        CarrelError, match=r"slurmctld exited with 1 before it was ready; it said: .*NoSuchKey"
    ) as caught:
        Sandbox(dir=root, guests=False, extra_conf="NoSuchKey=1").up()
    assert "\n" not in str(caught.value)


def test_zero_nodes_are_refused() -> None:
    with pytest.raises(UsageError, match="--nodes 0"):
        Sandbox(dir=Path("/tmp/carrel-never"), nodes=0)


def test_two_sandboxes_side_by_side_do_not_meet(slurm: Sandbox, sandbox_factory: MakeSandbox) -> None:
    other = sandbox_factory(nodes=2, guests=False)
    assert slurm.run(["sbatch", "--output=/dev/null", "--job-name=mine", "--hold", "--wrap", "true"]).returncode == 0
    assert slurm.run(["squeue", "-h", "-o", "%j"]).stdout == "mine\n"
    assert other.run(["squeue", "-h", "-o", "%j"]).stdout == ""
    assert other.run(["srun", "-N2", "printenv", "SLURM_CLUSTER_NAME"]).stdout == f"{other.cluster}\n" * 2
    other.down()
    assert slurm.run(["srun", "-N3", "true"]).returncode == 0


def test_killing_the_controller_leaves_a_job_running_and_a_new_one_takes_it_over(sandbox_factory: MakeSandbox) -> None:
    # A cluster of its own: after a crash Slurm keeps the nodes from new jobs for half a minute.
    box = sandbox_factory(nodes=1, guests=False)
    job = box.run(["sbatch", "--output=/dev/null", "--parsable", "--wrap", "sleep 300"]).stdout.strip()

    def state() -> str:
        return box.run(["squeue", "-h", "-j", job, "-o", "%T"]).stdout.strip()

    assert eventually(lambda: state() == "RUNNING")
    # slurmctld writes its state some seconds after a change; what is younger than that is forgotten by a crash.
    saved = box.dir / "state" / "job_state"
    started_ns = time.time_ns()
    assert box.run(["scontrol", "update", f"JobId={job}", "Comment=runs"]).returncode == 0
    assert eventually(lambda: saved.exists() and saved.stat().st_mtime_ns > started_ns)
    old = box.pid("slurmctld")
    box.kill("slurmctld")
    assert box.pid("slurmctld") == 0
    box.start("slurmctld")
    assert box.pid("slurmctld") not in {0, old}
    assert state() == "RUNNING"
    box.down()


def test_an_ordinary_user_of_a_roots_sandbox_runs_jobs(slurm: Sandbox, user: User) -> None:
    done = slurm.run(["srun", "-N3", "id", "-un"], user=user.name)
    assert (done.returncode, done.stdout) == (0, f"{user.name}\n" * 3)


def test_an_ordinary_user_has_a_sandbox_of_their_own_and_reads_what_is_missing(root: Path, user: User) -> None:
    script = [*CARREL, "sandbox", "run", "--dir", str(root), "--", "srun", "-N3", "id", "-un"]
    become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups", "--"]
    checkout = Path(sys.modules["carrel"].__path__[0])
    if subprocess.run([*become, "sh", "-c", 'test -r "$1"', "sh", checkout], check=False).returncode != 0:
        pytest.skip(f"an ordinary user cannot read {checkout}, so cannot run this checkout's carrel")
    done = subprocess.run(
        [*become, *script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=user.home,
        env={**os.environ, "HOME": str(user.home), "USER": user.name, "LOGNAME": user.name},
        check=False,
    )
    assert done.stderr == "carrel: guests are off: carreld needs root\n"
    assert (done.returncode, done.stdout) == (0, f"{user.name}\n" * 3)


@needs_root
def test_nodes_with_namespaces_have_their_own_host_names_and_addresses(root: Path) -> None:
    with Sandbox(dir=root, netns=True, guests=False) as box:
        names = box.run(["srun", "-N3", "sh", "-c", "hostname; hostname -I"])
        assert set(names.stdout.split()) == {"c1", "c2", "c3", "10.77.0.11", "10.77.0.12", "10.77.0.13"}
        ours = box.netns.removesuffix("-ctl")
        assert {path.name for path in Path("/run/netns").glob(f"{ours}-*")} == {
            f"{ours}-{who}" for who in ("ctl", "c1", "c2", "c3")
        }
    assert not list(Path("/run/netns").glob(f"{ours}-*"))


@needs_root
def test_a_job_that_is_suspended_in_the_freezer_ends_with_its_sandbox(root: Path) -> None:
    with Sandbox(dir=root, nodes=1, proctrack="cgroup", guests=False) as box:
        assert box.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 305"]).stdout == "1\n"
        freezer = Path(f"/sys/fs/cgroup/freezer/slurm_{box.nodes[0]}")
        assert eventually(lambda: box.run(["scontrol", "suspend", "1"]).returncode == 0)
        assert eventually(lambda: any(state.read_text() == "FROZEN\n" for state in freezer.rglob("freezer.state")))
    assert not freezer.exists()


@needs_root
def test_jobs_under_cgroups_are_confined_and_the_cgroups_are_removed(root: Path) -> None:
    with Sandbox(dir=root, nodes=2, proctrack="cgroup", guests=False) as box:
        done = box.run(["srun", "-N1", "--mem=50", "cat", "/proc/self/cgroup"])
        assert f"/slurm_{box.nodes[0]}/uid_" in done.stdout
        nodes = box.nodes
    assert [path for node in nodes for path in Path("/sys/fs/cgroup").glob(f"*/slurm_{node}")] == []


def test_with_slurmdbd_sacct_remembers_the_job_and_its_account(sandbox_factory: MakeSandbox) -> None:
    box = sandbox_factory(nodes=1, slurmdbd=True, guests=False)
    assert box.run(["srun", "--account=demo", "--job-name=kept", "sh", "-c", "exit 3"]).returncode == 3

    def seen() -> list[str]:
        return box.run(["sacct", "-nPX", "--format=JobName,Account,State,ExitCode"]).stdout.split()

    assert eventually(lambda: seen() == ["kept|demo|FAILED|3:0"]), seen()
    box.down()
    assert leftovers(box.dir) == []


HELLO = r"""
#include <mpi.h>
#include <stdio.h>
int main(int argc, char **argv)
{
	int rank, size, sum = 0;
	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
	printf("%d of %d: %d\n", rank, size, sum);
	return MPI_Finalize();
}
"""


def test_open_mpi_runs_over_all_nodes_with_pmix(slurm: Sandbox, tmp_path: Path) -> None:
    offered = slurm.run(["srun", "--mpi=list"])
    if "pmix" not in offered.stdout + offered.stderr:
        pytest.skip("this Slurm was built without PMIx; see: srun --mpi=list")
    (tmp_path / "hello.c").write_text(HELLO)
    run(["mpicc", "-o", tmp_path / "hello", tmp_path / "hello.c"])
    # Open MPI 5 believes the node names, takes the nodes for machines apart, and does not look for those on loopback.
    env = {"OMPI_MCA_btl_tcp_if_include": "lo"}
    done = slurm.run(["srun", "--mpi=pmix", "-N3", "-n3", tmp_path / "hello"], env=env)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["0 of 3: 3", "1 of 3: 3", "2 of 3: 3"]), done


def test_up_stays_until_down(root: Path) -> None:
    where = ["--dir", str(root)]
    assert f"--dir {root}" in run([*CARREL, "sandbox", "up", "--no-guests", "--nodes", "1", *where])
    facts = json.loads(run([*CARREL, "sandbox", "status", "--json", *where]))
    assert facts["nodes"] == ["c1"]
    assert [daemon["name"] for daemon in facts["daemons"] if daemon["pid"]] == ["munged", "slurmctld", "slurmd@c1"]
    assert run(["srun", "echo", "hello"], env={"SLURM_CONF": str(root / "etc/slurm.conf")}) == "hello\n"
    with pytest.raises(CarrelError, match="not an empty directory"):
        run([*CARREL, "sandbox", "up", "--no-guests", *where])
    assert run(["srun", "echo", "still"], env={"SLURM_CONF": str(root / "etc/slurm.conf")}) == "still\n"
    run([*CARREL, "sandbox", "down", *where])


def test_down_without_up_says_so(root: Path) -> None:
    with pytest.raises(CarrelError, match=f"no sandbox in {root}; see: carrel sandbox up"):
        Remote(root).down()


def test_our_own_daemons_are_ended_and_started_by_name(sandbox: Sandbox) -> None:
    for name in ("carreld@c1", "carrelctld"):
        old = sandbox.pid(name)
        sandbox.kill(name)
        assert sandbox.pid(name) == 0
        with pytest.raises(CarrelError, match="killed by SIGKILL"):
            sandbox.kill(name)
        sandbox.start(name)
        assert sandbox.pid(name) not in {0, old}
    with pytest.raises(CarrelError, match="no daemon carreld@c9"):
        sandbox.pid("carreld@c9")


@pytest.mark.guest
def test_a_running_guest_is_ended_with_its_sandbox(root: Path) -> None:
    with Sandbox(dir=root, nodes=1) as box:
        if "debian12" not in box.run(["carrel", "image", "list"]).stdout:
            pytest.skip("no image debian12; see: make image")
        begun = ["srun", "--guest=debian12", "sh", "-c", "echo begun; exec sleep 300"]
        with subprocess.Popen(begun, stdout=subprocess.PIPE, text=True, env={**os.environ, **box.env}) as job:
            assert job.stdout is not None
            assert job.stdout.readline() == "begun\n"
            assert any("qemu" in line for line in leftovers(root))
            box.down()
    assert leftovers(root) == []
