"""What a command inside sees, and what its task's caller sees: the same as without a guest."""

import contextlib
import hashlib
import os
import resource
import signal
import subprocess  # what a finished command looks like
import time
from pathlib import Path

import pytest

from carrel import wire
from carrel.testing.relay import RelayNode, Reply

MIB = 1 << 20


@pytest.mark.parametrize("code", [0, 1, 37, 255])
def test_a_task_ends_with_the_exit_code_of_its_command(node: RelayNode, code: int) -> None:
    assert node.enter("sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_task_dies_by_the_signal_that_killed_its_command(node: RelayNode, number: signal.Signals) -> None:
    assert node.enter("sh", "-c", f"kill -{number.value} $$").returncode == -number


def test_a_missing_command_reads_and_ends_as_under_slurmstepd(node: RelayNode) -> None:
    done = node.enter("no-such-command")
    assert done.stderr == b"slurmstepd: error: execve(): no-such-command: No such file or directory\n"
    assert done.returncode == 2


def test_a_file_that_may_not_be_executed_reads_and_ends_as_under_slurmstepd(node: RelayNode) -> None:
    done = node.enter("/etc/passwd")
    assert done.stderr == b"slurmstepd: error: execve(): /etc/passwd: Permission denied\n"
    assert done.returncode == 13


def test_a_missing_interpreter_is_named(node: RelayNode) -> None:
    script = node.directory / "s"
    script.write_text("#!/no/such/sh\n")
    script.chmod(0o755)
    done = node.enter(str(script))
    assert b"bad interpreter(/no/such/sh): No such file or directory" in done.stderr
    assert done.returncode == 2


def test_a_command_is_found_on_the_path_of_the_task(node: RelayNode) -> None:
    tool = node.directory / "mytool"
    tool.write_text("#!/bin/sh\necho mine\n")
    tool.chmod(0o755)
    assert node.enter("mytool", env={"PATH": f"/nowhere:{node.directory}:/bin:/usr/bin"}).stdout == b"mine\n"


def test_arguments_arrive_as_they_were(node: RelayNode) -> None:
    words = ["", " a  b ", "--", "ä\n", "*", "x=y"]
    done = node.enter("sh", "-c", 'printf "<%s>" "$@"', "sh", *words)
    assert done.stdout.decode() == "".join(f"<{word}>" for word in words)


def test_the_environment_is_the_tasks_without_carrels_own(node: RelayNode) -> None:
    done = node.enter("env", "-0", env={"A": "1\n2", "EMPTY": "", "CARREL_GUEST_LD_PRELOAD": "/x.so"})
    seen = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0")[:-1])
    assert seen == {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "A": "1\n2",
        "EMPTY": "",
        "LD_PRELOAD": "/x.so",
    }


def test_a_command_starts_in_the_directory_of_its_task(node: RelayNode) -> None:
    assert node.enter("pwd", cwd=node.directory).stdout.decode() == f"{node.directory}\n"


def test_a_directory_that_the_guest_lacks_is_named_and_tmp_taken(node: RelayNode) -> None:
    gone = node.directory / "gone"
    gone.mkdir()

    def without_the_directory(self: RelayNode, message: wire.Message) -> Reply:
        gone.rmdir()
        return self.with_an_agent(message)

    node.answer = without_the_directory
    done = node.enter("pwd", cwd=gone)
    assert done.stdout == b"/tmp\n"
    assert done.stderr == (
        f"slurmstepd: error: couldn't chdir to `{gone}': No such file or directory: going to /tmp instead\n".encode()
    )
    assert done.returncode == 0


def test_umask_groups_and_limits_are_the_tasks(node: RelayNode) -> None:
    def lower() -> None:
        os.umask(0o027)
        resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    done = subprocess.run(
        [*node.command(["sh"]), "-c", "umask; ulimit -n; ulimit -Hn; ulimit -c; id -G"],
        env=node.environment("sh"),
        capture_output=True,
        check=True,
        timeout=30,
        preexec_fn=lower,  # nothing else lowers the limits of a child alone
    )
    groups = " ".join(str(group) for group in dict.fromkeys([os.getgid(), *os.getgroups()]))
    assert done.stdout.decode().splitlines() == ["0027", "123", "456", "0", groups]


def test_no_signal_is_blocked_or_ignored_in_a_command(node: RelayNode) -> None:
    status = node.enter("cat", "/proc/self/status").stdout.decode()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["SigBlk"], 16) == 0
    # glibc keeps signals 32 and 33 to itself, and its posix_spawn, which make uses, leaves them ignored in a child.
    glibcs = 0b11 << 31
    assert int(facts["SigIgn"], 16) & ~glibcs == 0


def test_a_command_sees_no_descriptor_but_its_own_three(node: RelayNode) -> None:
    listing = node.enter("sh", "-c", "ls /proc/$$/fd").stdout.split()
    assert listing == [b"0", b"1", b"2"]


def test_stdin_arrives_whole_and_its_end_too(node: RelayNode) -> None:
    data = os.urandom(MIB)
    done = node.enter("sha256sum", stdin=data)
    assert done.stdout.decode().split()[0] == hashlib.sha256(data).hexdigest()


def test_a_command_that_ignores_its_stdin_ends_when_it_wants(node: RelayNode) -> None:
    assert node.enter("sh", "-c", "exit 3", stdin=bytes(50 * MIB)).returncode == 3


def test_stdin_that_nobody_reads_does_not_keep_a_signal_out(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.02; done") as task:
        task.stdout.readline()
        os.set_blocking(task.stdin.fileno(), False)
        written = 0
        with contextlib.suppress(BlockingIOError):
            while written < 50 * MIB:
                written += os.write(task.stdin.fileno(), bytes(MIB))
        task.send_signal(signal.SIGTERM)
        assert task.wait(30) == 9


def test_stdout_and_stderr_stay_apart_and_whole(node: RelayNode) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' a; head -c 2000000 /dev/zero | tr '\\0' b >&2"
    done = node.enter("sh", "-c", script)
    assert done.stdout == b"a" * 3_000_000
    assert done.stderr == b"b" * 2_000_000


def test_a_hundred_megabytes_go_through_and_back(node: RelayNode) -> None:
    chunk = os.urandom(MIB)
    with node.spawn("cat") as task:
        if os.fork() == 0:
            for _ in range(100):
                task.stdin.write(chunk)
            os._exit(0)
        task.stdin.close()
        seen, count = hashlib.sha256(), 0
        while part := task.stdout.read(MIB):
            seen.update(part)
            count += len(part)
        os.wait()
        assert task.wait(30) == 0
    assert count == 100 * MIB
    assert seen.digest() == hashlib.sha256(chunk * 100).digest()


def test_a_full_stdout_does_not_keep_stderr_back(node: RelayNode) -> None:
    script = "head -c 4000000 /dev/zero & sleep 0.05; echo here >&2; wait"
    with node.spawn("sh", "-c", script, stdin=subprocess.DEVNULL) as task:
        assert task.stderr.readline() == b"here\n"
        assert len(task.stdout.read()) == 4_000_000
        assert task.wait(30) == 0


def test_a_reader_that_leaves_stops_the_writer(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "yes; echo $? >&2", stdin=subprocess.DEVNULL) as task:
        task.stdout.read(10)
        task.stdout.close()
        assert task.stderr.read().splitlines()[-1] == b"141"
        assert task.wait(30) == 0


def test_a_child_left_behind_delays_nothing_and_is_ended(node: RelayNode) -> None:
    began = time.monotonic()
    done = node.enter("sh", "-c", "setsid sh -c 'trap \"\" TERM; sleep 60; :' & echo $!")
    assert time.monotonic() - began < 30
    assert_ends(int(done.stdout))


def assert_ends(pid: int) -> None:
    for _ in range(1500):
        state = Path(f"/proc/{pid}/stat")
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_everything_of_a_task_ends_when_its_carrel_enter_is_killed(node: RelayNode) -> None:
    with node.spawn("sh", "-c", "trap '' TERM HUP; sh -c 'trap \"\" TERM HUP; sleep 60' & echo $!; wait") as task:
        pid = int(task.stdout.readline())
        task.send_signal(signal.SIGKILL)
        assert_ends(pid)


def test_a_batch_script_runs_under_its_own_path_with_its_arguments(node: RelayNode) -> None:
    script = node.directory / "job00007" / "slurm_script"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\ncat <<END\n$0 <$1> <$2>\nEND\nexit 5\n")
    done = node.enter(str(script), "a  b", "", env={"SLURM_STEP_ID": "3"})
    assert done.stdout.decode() == f"{script} <a  b> <>\n"
    assert done.returncode == 5
    assert node.questions[0].get("step") == "batch"


def test_carreld_is_told_what_the_user_asked_for(node: RelayNode) -> None:
    wishes = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SPANK_CARREL_JOB_IMAGE": "debian12",
        "SLURM_SPANK_CARREL_JOB_PER": "task",
        "SLURM_SPANK_CARREL_JOB_MOUNT": "/a:/b\n/c:/d:ro",
        "SLURM_SPANK_CARREL_JOB_ROOT": "yes",
    }
    node.enter("true", cwd=node.directory, env=wishes)
    question = node.questions[0]
    assert dict(question.records) == {
        "verb": "enter",
        "job": "7",
        "step": "0",
        "task": "3",
        "ntasks": "8",
        "cpus_per_task": "2",
        "cwd": str(node.directory),
        "image": "debian12",
        "per": "task",
        "mount": "/c:/d:ro",
        "root": "yes",
    }
    assert question.all("mount") == ["/a:/b", "/c:/d:ro"]


def test_the_words_after_two_dashes_are_the_command_where_slurm_prepends(node: RelayNode) -> None:
    environment = {key: value for key, value in node.environment("x").items() if key != "CARREL_ENTER_ARGV0"}
    command = [node.command(["x"])[0], "--", "echo", "--", "hi"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=30)
    assert done.stdout == b"-- hi\n"


def test_carreld_hears_of_the_end_of_a_task(node: RelayNode) -> None:
    node.enter("true")
    assert node.task_ended.wait(30)
