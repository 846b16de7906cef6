"""Before there is a guest, and after it is gone: a task waits, gives up or ends, and says why in one sentence."""

import signal
import subprocess  # what a finished command looks like
import threading
from pathlib import Path

import pytest

from carrel import wire
from carrel.testing.relay import RelayNode, Reply


def silent(node: RelayNode) -> threading.Event:
    """Let the node answer `wait` only; the event tells that it was asked."""
    asked = threading.Event()

    def answer(self: RelayNode, message: wire.Message) -> Reply:
        asked.set()
        return {"status": "wait", "text": "the guest boots"}, None

    node.answer = answer
    return asked


def with_a_stream(node: RelayNode) -> threading.Event:
    """Let the node answer with a stream whose other end is the test's; the event tells that it did."""
    asked = threading.Event()

    def answer(self: RelayNode, message: wire.Message) -> Reply:
        reply = self.with_an_open_end(message)
        asked.set()
        return reply

    node.answer = answer
    return asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_wait_for_the_guest_ends_by_the_signal_that_ends_tasks(node: RelayNode, number: signal.Signals) -> None:
    asked = silent(node)
    with node.spawn("true") as task:
        assert asked.wait(30)
        task.send_signal(number)
        assert task.wait(30) == -number


def test_usr1_that_comes_while_the_guest_boots_reaches_the_command(node: RelayNode) -> None:
    asked, go = threading.Event(), threading.Event()

    def answer(self: RelayNode, message: wire.Message) -> Reply:
        asked.set()
        go.wait(30)
        return self.with_an_agent(message)

    node.answer = answer
    with node.spawn("sh", "-c", "while :; do sleep 0.02; done") as task:
        assert asked.wait(30)
        task.send_signal(signal.SIGUSR1)
        go.set()
        # Nothing in the guest handles it: the command dies by it, the task did not die before.
        assert task.wait(30) == -signal.SIGUSR1
    assert len(node.agents) == 1


def test_a_refusal_is_one_sentence_and_never_success(node: RelayNode) -> None:
    node.answer = lambda _self, _message: ({"status": "refused", "text": "image 'x' is not there; see: y"}, None)
    done = node.enter("true")
    assert (done.returncode, done.stderr) == (1, b"carrel: image 'x' is not there; see: y\n")


def test_without_carreld_the_command_is_not_run_and_the_reason_is_told(node: RelayNode) -> None:
    marker = node.directory / "ran"
    done = node.enter("touch", str(marker), env={"CARREL_ENTER_SOCKET": "/etc/passwd/carreld.sock"})
    assert done.returncode == 1
    assert done.stderr == (
        b"carrel: carreld does not answer on /etc/passwd/carreld.sock: Not a directory; see: carrel node check\n"
    )
    assert not marker.exists()


def test_a_carreld_that_comes_a_moment_later_is_waited_for(node: RelayNode) -> None:
    later = node.directory / "later"
    timer = threading.Timer(0.3, lambda: later.symlink_to(node.socket_path))
    timer.start()
    assert node.enter("echo", "hi", env={"CARREL_ENTER_SOCKET": str(later)}).stdout == b"hi\n"
    timer.join()


def test_a_carreld_that_is_started_again_is_asked_again(node: RelayNode) -> None:
    def answer(self: RelayNode, message: wire.Message) -> Reply:
        return self.with_an_agent(message) if len(self.questions) > 1 else ({}, None)

    node.answer = answer
    assert node.enter("echo", "hi").stdout == b"hi\n"
    assert len(node.questions) == 2


def under_a_shell(node: RelayNode, command: str) -> "subprocess.Popen[bytes]":
    """Start a task whose parent stands for slurmstepd."""
    words: list[str | Path] = ["sh", "-c", '"$@" & wait', "sh", *node.command(["sh", "-c", command])]
    return subprocess.Popen(words, stdout=subprocess.PIPE, env=node.environment("sh"))


def test_a_task_ends_with_the_slurmstepd_that_started_it(node: RelayNode) -> None:
    with under_a_shell(node, "echo begun; exec sleep 60") as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        parent.kill()
        assert node.task_ended.wait(30)
        node.agents[0].wait(30)


def test_a_wait_for_the_guest_ends_with_the_slurmstepd_that_started_it(node: RelayNode) -> None:
    asked = silent(node)
    with under_a_shell(node, "true") as parent:
        assert asked.wait(30)
        parent.kill()
        assert node.task_ended.wait(30)


def test_a_guest_that_ran_out_of_memory_kills_its_task_and_says_so(node: RelayNode) -> None:
    asked = with_a_stream(node)
    (node.directory / "end").write_text("oom\njob 7 used more than 400 MB\n")
    with node.spawn("true") as task:
        assert asked.wait(30)
        node.ends[0].close()
        assert task.stderr.read() == b"carrel: out of memory: job 7 used more than 400 MB\n"
        assert task.wait(30) == -signal.SIGKILL


def test_a_guest_that_goes_fails_its_task_with_the_guards_sentence(node: RelayNode) -> None:
    asked = with_a_stream(node)
    with node.spawn("true") as task:
        assert asked.wait(30)
        node.ends[0].close()
        (node.directory / "end.new").write_text("exited\nqemu exited with 1\n")
        (node.directory / "end.new").rename(node.directory / "end")
        assert task.stderr.read() == b"carrel: the guest is gone: qemu exited with 1\n"
        assert task.wait(30) == 1


def test_a_sentence_from_the_agent_is_passed_on(node: RelayNode) -> None:
    asked = with_a_stream(node)
    with node.spawn("true") as task:
        assert asked.wait(30)
        text = b"no process can be started in the guest"
        node.ends[0].sendall(bytes([9, 0, 0, 0]) + len(text).to_bytes(4, "little") + text)
        assert task.stderr.read() == b"carrel: " + text + b"\n"
        assert task.wait(30) == 1


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"\xff" * 8,
        bytes(65544),
        bytes([2, 0, 0, 0, 1, 0, 0, 0, 0]),
        bytes([2, 200, 0, 0, 1, 0, 0, 0, 0]),
        bytes([4, 0, 0, 0, 4, 0, 0, 0, 255, 255, 255, 255]),
        bytes([7, 0, 0, 0, 0, 0, 0, 0]),
        bytes([1, 0, 0, 0, 0, 0, 0, 0]),
    ],
    ids=["too long", "abort", "stdin sent back", "no such channel", "credit not owed", "exit without status", "start"],
)
def test_a_guest_that_breaks_the_protocol_fails_its_task(node: RelayNode, bytes_sent: bytes) -> None:
    asked = with_a_stream(node)
    with node.spawn("true") as task:
        assert asked.wait(30)
        node.ends[0].sendall(bytes_sent)
        assert task.stderr.read().startswith(b"carrel: the guest's agent broke off: it sent ")
        assert task.wait(30) == 1


def test_started_by_hand_it_says_who_starts_it(programs: Path) -> None:
    done = subprocess.run([programs / "carrel-enter", "ls"], capture_output=True, check=False, timeout=30, env={})
    assert done.returncode == 1
    assert b"started by Slurm" in done.stderr


def test_the_programs_say_their_version(programs: Path) -> None:
    for name in ("carrel-enter", "carrel-agent"):
        said = subprocess.run([programs / name, "--version"], capture_output=True, check=True, timeout=30).stdout
        assert b"relay protocol 1" in said
