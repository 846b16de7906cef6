"""A session of the agent against a peer that is not carrel-enter: slow, odd or hostile."""

import contextlib
import os
import random
import socket
import struct
import subprocess  # the session under test is a long-lived child
from collections.abc import Iterator
from pathlib import Path

import pytest

START, DATA, EOF, CREDIT, SIGNAL, EXIT, ERROR, BROKEN = 1, 2, 3, 4, 5, 7, 9, 10
WINDOW = 262144


def frame(kind: int, channel: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("<BBHI", kind, channel, 0, len(payload)) + payload


class Session:
    """The host's end of one session, byte by byte."""

    def __init__(self, libexec: Path) -> None:
        self.stream, theirs = socket.socketpair()
        self.stream.settimeout(30)
        self.agent = subprocess.Popen(
            [libexec / "carrel-agent", "--session", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def start(self, *argv: str) -> None:
        records = [f"uid={os.getuid()}", f"gid={os.getgid()}", "cwd=/", f"env=PATH={os.environ['PATH']}"]
        body = "".join(f"{record}\0" for record in [*records, *(f"argv={word}" for word in argv)]).encode()
        self.stream.sendall(frame(START, 0, body))

    def frame(self) -> tuple[int, int, bytes]:
        kind, channel, _, length = struct.unpack("<BBHI", self._exactly(8))
        return kind, channel, self._exactly(length)

    def frame_of(self, *kinds: int) -> tuple[int, int, bytes]:
        while (got := self.frame())[0] not in kinds:
            pass
        return got

    def is_closed(self) -> bool:
        """Read to the end; true when the session ended the stream."""
        with contextlib.suppress(ConnectionResetError):
            while self.stream.recv(65536):
                pass
        return self.agent.wait(30) in {0, 1}

    def close(self) -> None:
        self.stream.close()
        self.agent.wait(30)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.stream.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data


@pytest.fixture
def session(programs: Path) -> Iterator[Session]:
    """A session that has not been told what to start."""
    session = Session(programs)
    yield session
    session.close()


def test_no_more_than_a_window_is_sent_without_credit(session: Session) -> None:
    session.start("sh", "-c", "head -c 1000000 /dev/zero; exec sleep 60")
    received = 0
    while received < WINDOW:
        received += len(session.frame_of(DATA)[2])
    session.stream.settimeout(0.2)
    with pytest.raises(TimeoutError):
        session.frame()
    session.stream.settimeout(30)
    session.stream.sendall(frame(CREDIT, 1, struct.pack("<I", 1000)))
    assert len(session.frame_of(DATA)[2]) == 1000


def test_a_peer_that_reads_nothing_is_still_listened_to(session: Session) -> None:
    session.start("sh", "-c", "yes & cat >/dev/null; kill $!; exit 6")
    sent = 0
    while sent < 100 * 1000:
        session.stream.sendall(frame(DATA, 0, bytes(1000)))
        sent += 1000
    session.stream.sendall(frame(EOF, 0))
    while True:
        kind, channel, payload = session.frame()
        if kind == DATA:
            with contextlib.suppress(BrokenPipeError):  # its end may be on the way to us already
                session.stream.sendall(frame(CREDIT, channel, struct.pack("<I", len(payload))))
        if kind == EXIT:
            break
    assert struct.unpack("<I", payload)[0] >> 8 == 6


def test_exit_comes_after_all_output_and_the_stream_is_its_readers_to_end(session: Session) -> None:
    session.start("sh", "-c", "head -c 200000 /dev/zero; echo end >&2; (sleep 60)&")
    seen = {1: b"", 2: b""}
    while True:
        kind, channel, payload = session.frame()
        if kind == EXIT:
            break
        if kind == DATA:
            seen[channel] += payload
    assert (len(seen[1]), seen[2], payload) == (200000, b"end\n", bytes(4))
    session.stream.settimeout(0.2)
    with pytest.raises(TimeoutError):
        session.frame()
    session.stream.settimeout(30)
    session.stream.shutdown(socket.SHUT_WR)
    assert session.is_closed()


def test_a_start_in_pieces_is_one_start(session: Session) -> None:
    body = f"uid={os.getuid()}\0gid={os.getgid()}\0cwd=/\0argv=/bin/echo\0argv=".encode() + b"x" * 100_000 + b"\0"
    for at in range(0, len(body), 30_000):
        more = 1 if at + 30_000 < len(body) else 0
        session.stream.sendall(frame(START, more, body[at : at + 30_000]))
    received = b""
    while len(received) < 100_001:
        received += session.frame_of(DATA)[2]
    assert received == b"x" * 100_000 + b"\n"


def test_a_closed_stdin_is_told_to_the_peer(session: Session) -> None:
    session.start("sh", "-c", "exec 0<&-; echo closed; exec sleep 60")
    session.frame_of(DATA)
    session.stream.sendall(frame(DATA, 0, b"x"))
    assert session.frame_of(BROKEN)[1] == 0


def test_a_start_without_a_command_is_answered_with_a_sentence(session: Session) -> None:
    session.stream.sendall(frame(START, 0, b"uid=0\0"))
    assert session.frame_of(ERROR)[2] == b"the request to start a command cannot be read"


@pytest.mark.parametrize(
    "bytes_sent",
    [
        struct.pack("<BBHI", DATA, 0, 0, 65537),
        frame(99),
        frame(DATA, 0, b"x"),
        frame(DATA, 255, b"x"),
        frame(EXIT, 0, bytes(4)),
        frame(SIGNAL, 0, struct.pack("<I", 65)),
        frame(SIGNAL, 0, b"x"),
        frame(CREDIT, 1, struct.pack("<I", 1)),
        frame(CREDIT, 1, struct.pack("<I", 0xFFFFFFFF)),
        frame(START, 1, bytes(65536)) * 257,
    ],
    ids=[
        "too long",
        "unknown",
        "data before start",
        "no such channel",
        "an exit from the host",
        "signal 65",
        "half a signal",
        "credit not owed",
        "credit that overflows",
        "an endless start",
    ],
)
def test_a_frame_that_has_no_place_ends_the_session(session: Session, bytes_sent: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        session.stream.sendall(bytes_sent)
    assert session.is_closed()


def test_more_data_than_the_window_ends_the_session(session: Session) -> None:
    session.start("sleep", "60")
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012  # which of the writes fails is open
        for _ in range(100):
            session.stream.sendall(frame(DATA, 0, bytes(65536)))
    assert session.is_closed()


def test_no_bytes_make_a_session_crash_or_hang(programs: Path) -> None:
    chance = random.Random(4711)  # noqa: S311  # reproducible on purpose
    for _ in range(30):
        session = Session(programs)
        session.start("cat")
        noise = bytearray(frame(DATA, 0, b"abc") + frame(CREDIT, 1, struct.pack("<I", 3)) + frame(EOF, 0)) * 20
        for _ in range(chance.randrange(1, 20)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        with contextlib.suppress(OSError):
            session.stream.sendall(noise)
            session.stream.shutdown(socket.SHUT_WR)
        assert session.is_closed()
        session.close()
