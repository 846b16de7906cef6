"""PMI-1 and PMI-2: a socket to slurmstepd that a task inherits and its command in the guest finds."""

import os
import socket
import subprocess  # carrel-enter with a descriptor of its own

from carrel.testing.relay import RelayNode

CLIENT = """
import os, socket
pmi = socket.socket(fileno=int(os.environ["PMI_FD"]))
pmi.sendall(b"cmd=init\\n")
answer = pmi.recv(100)
pmi.shutdown(socket.SHUT_WR)
print(answer.decode(), end="", flush=True)
"""


def test_a_command_talks_with_the_pmi_server_of_its_task_and_never_half_closes(node: RelayNode) -> None:
    server, theirs = socket.socketpair()
    server.settimeout(30)
    with server, theirs:
        environment = node.environment("python3", {"PMI_FD": str(theirs.fileno()), "PMI_RANK": "0"})
        task = subprocess.Popen(
            [*node.command(["python3"]), "-c", CLIENT],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert server.recv(100) == b"cmd=init\n"
        server.sendall(b"rc=0\n")
        assert task.communicate(timeout=30)[0] == b"rc=0\n"
        assert task.returncode == 0
        # Our own copy of the task's end is still open: an end that is seen here was a half-close.
        server.setblocking(False)
        try:
            half_closed = server.recv(1) == b""
        except BlockingIOError:
            half_closed = False
    assert not half_closed


def test_a_descriptor_that_is_no_socket_is_not_taken_for_a_pmi_server(node: RelayNode) -> None:
    done = node.enter("sh", "-c", 'echo "$PMI_FD"; ls /proc/$$/fd', env={"PMI_FD": str(os.devnull)})
    assert done.stdout.split() == [b"/dev/null", b"0", b"1", b"2"]
