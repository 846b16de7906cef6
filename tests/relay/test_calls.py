"""Slurm's commands from inside: a stand-in calls the host's command, which runs as a child of the calling task."""

import os
import signal
import socket
import struct
import subprocess  # the agent under test is a long-lived child
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel import wire
from carrel.testing.relay import RelayNode, Reply
from carrel.testing.sandbox import let_enter


class Guest:
    """A guest without a machine: one agent, its stand-ins in a directory, and a host with commands of a few lines."""

    def __init__(self, node: RelayNode) -> None:
        self.node = node
        self.sessions = 0
        self.socket_path = node.directory / "agent"
        self.bin = node.directory / "guest-bin"
        self.host = node.directory / "bin"
        self.bin.mkdir()
        self.host.mkdir()
        for name in ("srun", "squeue"):
            (self.bin / name).symlink_to(node.libexec / "carrel-agent")
        self.agent = subprocess.Popen([node.libexec / "carrel-agent", "--serve", self.socket_path])
        node.answer = self.answer

    def answer(self, node: RelayNode, message: wire.Message) -> Reply:
        if message.get("verb") == "runner":
            return node.ok(), self.connect(f"carrel.r.{message.get('id')}")
        self.sessions += 1
        return node.ok(), self.connect(f"carrel.t.{self.sessions}")

    def connect(self, name: str) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        for _ in range(6000):
            try:
                stream.connect(str(self.socket_path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.01)
        stream.sendall(struct.pack("<BBHI", 14, 0, 0, len(name)) + name.encode())
        return stream

    def on_the_host(self, name: str, script: str) -> None:
        (self.host / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.host / name).chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", "CARREL_AGENT_SOCKET": f"{self.socket_path}.calls"}

    def run(self, script: str, **more: str) -> subprocess.CompletedProcess[bytes]:
        return self.node.enter("sh", "-c", script, env={**self.environment(), **more})

    def close(self) -> None:
        self.agent.kill()
        self.agent.wait(30)


@pytest.fixture
def guest(node: RelayNode) -> Iterator[Guest]:
    """Give a guest whose tasks may call ``srun`` and ``squeue``."""
    guest = Guest(node)
    yield guest
    guest.close()


def test_a_call_runs_the_hosts_command_with_its_words_streams_and_status(guest: Guest) -> None:
    guest.on_the_host("srun", 'echo "on host: $1 $2"; cat; echo oops >&2; exit 5')
    done = guest.run('echo "to host" | srun -N2 "a b"; echo rc $?')
    assert done.stdout == b"on host: -N2 a b\nto host\nrc 5\n"
    assert done.stderr == b"oops\n"


def test_a_call_carries_the_callers_environment_but_not_its_libraries(guest: Guest) -> None:
    guest.on_the_host("srun", "env")
    done = guest.run(
        "export MINE=1 SLURM_CONF=/elsewhere CARREL_ENTER_ARGV0=x; LD_LIBRARY_PATH=/guest srun", SLURM_CONF="/host.conf"
    )
    seen = done.stdout.decode().splitlines()
    assert "MINE=1" in seen
    assert "SLURM_CONF=/host.conf" in seen
    assert "CARREL_GUEST_LD_LIBRARY_PATH=/guest" in seen
    assert not [line for line in seen if line.startswith(("LD_", "CARREL_ENTER_"))]


def test_a_caller_that_lost_its_environment_asks_for_its_tasks_guest_all_the_same(guest: Guest) -> None:
    guest.on_the_host("srun", "env")
    guest.node.extra = {"image": "debian12"}
    srun = f"{guest.bin}/srun"
    said = guest.run(
        f"env -i CARREL_AGENT_SOCKET=$CARREL_AGENT_SOCKET {srun}", SLURM_SPANK_CARREL_JOB_ROOT="yes"
    ).stdout
    assert b"SLURM_SPANK_CARREL_JOB_IMAGE=debian12\n" in said
    assert b"SLURM_SPANK_CARREL_JOB_ROOT=yes\n" in said
    said = guest.run(f"SLURM_SPANK_CARREL_JOB_IMAGE=other {srun}").stdout
    assert said.count(b"SLURM_SPANK_CARREL_JOB_IMAGE=") == 1


def test_a_call_runs_in_the_callers_directory(guest: Guest) -> None:
    guest.on_the_host("squeue", "pwd")
    assert guest.run(f"cd {guest.host} && squeue").stdout.decode() == f"{guest.host}\n"


def test_a_task_starts_in_the_guests_directory_that_srun_handed_on(guest: Guest, tmp_path: Path) -> None:
    let_enter(tmp_path)
    done = guest.node.enter(
        "sh", "-c", "pwd; env | grep -c CARREL_GUEST_CWD", cwd=Path("/tmp"), env={"CARREL_GUEST_CWD": str(tmp_path)}
    )
    assert done.stdout.decode().splitlines() == [str(tmp_path), "0"]


def test_a_large_stream_survives_a_call(guest: Guest) -> None:
    guest.on_the_host("srun", "cat")
    done = guest.run("head -c 5000000 /dev/zero | srun | sha256sum; head -c 5000000 /dev/zero | sha256sum")
    sums = done.stdout.split(b"\n")
    assert sums[0] == sums[1] != b""


def test_several_calls_at_once_do_not_mix(guest: Guest) -> None:
    guest.on_the_host("srun", "cat; exit $1")
    script = "for i in 1 2 3 4; do (echo $i | srun $i > out$i; echo $? >> out$i) & done; wait; cat out1 out2 out3 out4"
    done = guest.run(f"cd {guest.host}; {script}")
    assert done.stdout == b"1\n1\n2\n2\n3\n3\n4\n4\n"


def test_term_to_the_stand_in_reaches_the_hosts_command(guest: Guest) -> None:
    guest.on_the_host("srun", "trap 'echo aborted; exit 137' TERM; echo up; while :; do sleep 0.02; done")
    done = guest.run(
        "srun > f & p=$!; while ! grep -q up f; do sleep 0.02; done; kill $p; wait $p; echo $?; cat f; rm f"
    )
    assert done.stdout == b"137\nup\naborted\n"


def test_a_stand_in_that_is_killed_takes_the_hosts_command_with_it(guest: Guest) -> None:
    pid_file = guest.host / "pid"
    guest.on_the_host("srun", f"echo $$ > {pid_file}; exec sleep 60")
    guest.run(f"srun & p=$!; while ! [ -s {pid_file} ]; do sleep 0.02; done; kill -9 $p; sleep 1")
    pid = int(pid_file.read_text())
    for _ in range(1500):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the host's command is still there")


def test_a_call_that_the_node_refuses_fails_with_its_sentence(guest: Guest) -> None:
    def refuse(node: RelayNode, message: wire.Message) -> Reply:
        if message.get("verb") == "runner":
            return {"status": "refused", "text": "the guest is going away"}, None
        return guest.answer(node, message)

    guest.node.answer = refuse
    done = guest.run("srun true; echo rc $?")
    assert done.stdout == b"rc 1\n"
    assert done.stderr == b"srun: error: carrel: the guest is going away\n"


def test_only_slurms_own_commands_are_passed_on(guest: Guest) -> None:
    (guest.bin / "sh2").symlink_to(guest.node.libexec / "carrel-agent")
    done = guest.run("sh2 -c id; echo rc $?")
    assert b"rc 2" in done.stdout


def test_a_process_of_no_task_may_not_call(guest: Guest) -> None:
    guest.connect("carrel.0").close()
    done = subprocess.run(
        ["srun"], executable=guest.bin / "srun", env=guest.environment(), capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (1, b"srun: error: carrel: this process belongs to no task of a job\n")


def test_the_agent_says_hello_and_answers_a_ping(guest: Guest) -> None:
    with guest.connect("carrel.0") as control:
        control.settimeout(30)
        body = b"verb=ping\0"
        control.sendall(struct.pack("<BBHI", 13, 0, 0, len(body)) + body)
        seen = b""
        while b"verb=pong\0" not in seen:
            seen += control.recv(4096)
    assert b"verb=hello\0version=1\0" in seen


def test_a_session_that_is_killed_fails_its_task_at_once(guest: Guest) -> None:
    with guest.node.spawn("sh", "-c", "echo $PPID; exec sleep 60", env=guest.environment()) as task:
        os.kill(int(task.stdout.readline()), signal.SIGKILL)
        assert task.wait(30) == 1
        assert b"session in the guest died" in task.stderr.read()


def test_a_guest_that_sends_a_script_with_a_call_writes_nothing_on_the_host(guest: Guest, tmp_path: Path) -> None:
    guest.on_the_host("srun", "echo ran")
    precious = tmp_path / "authorized_keys"
    precious.write_text("mine")
    (tmp_path / "call").write_text(
        "import os, socket, struct\n"
        "calls = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "calls.connect(os.environ['CARREL_AGENT_SOCKET'])\n"
        "_, fds, _, _ = socket.recv_fds(calls, 100, 1)\n"
        "stream = socket.socket(fileno=fds[0])\n"
        "stream.setblocking(True)\n"
        f"start = b'argv=srun\\0script=theirs\\0script_path={precious}\\0'\n"
        "stream.sendall(struct.pack('<BBHI', 1, 0, 0, len(start)) + start)\n"
        "kind, _, _, length = struct.unpack('<BBHI', stream.recv(8, socket.MSG_WAITALL))\n"
        "print(kind, stream.recv(length, socket.MSG_WAITALL).decode())\n"
    )
    done = guest.run(f"python3 {tmp_path}/call")
    assert done.stderr == b""
    assert done.stdout == b"9 a Slurm command that is passed on from a guest has no script of its own\n"
    assert precious.read_text() == "mine"


def test_a_call_that_names_no_image_asks_for_the_guests_own(guest: Guest) -> None:
    guest.on_the_host("srun", "env")
    guest.node.extra = {"image": "debian12"}
    said = guest.run("SLURM_SPANK_CARREL_JOB_IMAGE= srun").stdout
    images = [line for line in said.splitlines() if line.startswith(b"SLURM_SPANK_CARREL_JOB_IMAGE=")]
    assert images == [b"SLURM_SPANK_CARREL_JOB_IMAGE=debian12"]
