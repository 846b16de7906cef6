"""Messages on carreld's socket: whole, in order, with at most one descriptor, and bounded."""

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from carrel import wire
from carrel.errors import CarrelError, UnreachableError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with closing(ours), closing(theirs):
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def test_the_bytes_are_those_that_c_writes() -> None:
    body = b"verb=enter\0mount=/a\0mount=/b\0"
    assert wire.encode({"verb": "enter", "mount": ["/a", "/b"]}) == bytes([len(body), 0, 0, 0]) + body


def test_records_keep_their_order_and_may_repeat() -> None:
    message = wire.decode(b"verb=enter\0mount=/a=b\0mount=\0")
    assert message.records == [("verb", "enter"), ("mount", "/a=b"), ("mount", "")]
    assert message.all("mount") == ["/a=b", ""]
    assert (message.get("mount"), message.get("absent"), message.get("absent", "x")) == ("/a=b", "", "x")


def test_what_is_no_record_is_passed_over() -> None:
    assert wire.decode(b"\0noise\0a=1").records == [("a", "1")]


def test_bytes_that_are_not_utf8_come_back_as_they_were() -> None:
    name = os.fsdecode(b"/home/\xff")
    assert wire.decode(wire.encode({"cwd": name})[4:]).get("cwd") == name


def test_a_message_beyond_the_limit_is_not_sent() -> None:
    with pytest.raises(CarrelError, match="at most 1048576 fit"):
        wire.encode({"a": "x" * wire.MESSAGE_MAX_BYTES})


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    async def exchange() -> None:
        long = "x" * (wire.MESSAGE_MAX_BYTES - 100)
        sending = asyncio.create_task(wire.send(pair[0], {"n": "1", "long": long}))
        first = await wire.receive(pair[1])
        await sending
        await wire.send(pair[0], {"n": "2"})
        second = await wire.receive(pair[1])
        assert first is not None
        assert second is not None
        assert (first.get("n"), first.get("long"), first.fd) == ("1", long, None)
        assert second.get("n") == "2"

    asyncio.run(exchange())


def test_a_descriptor_rides_on_a_message(pair: Pair) -> None:
    async def exchange() -> None:
        reading, writing = os.pipe()
        await wire.send(pair[0], {"status": "ok"}, fd=writing)
        os.close(writing)
        message = await wire.receive(pair[1])
        assert message is not None
        assert message.fd is not None
        os.write(message.fd, b"hello")
        os.close(message.fd)
        assert os.read(reading, 9) == b"hello"
        os.close(reading)

    asyncio.run(exchange())


def test_a_message_that_dribbles_in_is_put_together(pair: Pair) -> None:
    async def exchange() -> None:
        receiving = asyncio.create_task(wire.receive(pair[1]))
        for byte in wire.encode({"verb": "list"}):
            pair[0].send(bytes([byte]))
            await asyncio.sleep(0)
        message = await receiving
        assert message is not None
        assert message.get("verb") == "list"

    asyncio.run(exchange())


@pytest.mark.parametrize("sent", [b"", b"\x05\0", b"\x05\0\0\0a="])
def test_a_peer_that_leaves_at_any_point_has_sent_nothing(pair: Pair, sent: bytes) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    assert asyncio.run(wire.receive(pair[1])) is None


@pytest.mark.parametrize("sent", [b"\x05\0\0", b"\x05\0\0\0a=", b"\xff\xff\xff\xff"])
def test_a_descriptor_of_a_message_that_never_came_is_closed(pair: Pair, sent: bytes) -> None:
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [sent], [writing])
    os.close(writing)
    pair[0].close()
    with contextlib.suppress(CarrelError):
        assert asyncio.run(wire.receive(pair[1])) is None
    assert os.read(reading, 1) == b"", "somebody still holds the other end"
    os.close(reading)


def test_a_descriptor_is_closed_when_nobody_waits_any_longer_for_its_message(pair: Pair) -> None:
    async def wait() -> None:
        async with asyncio.timeout(0.01):
            await wire.receive(pair[1])

    reading, writing = os.pipe()
    socket.send_fds(pair[0], [b"\x05\0\0\0"], [writing])
    os.close(writing)
    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert os.read(reading, 1) == b"", "somebody still holds the other end"
    os.close(reading)


def test_a_descriptor_that_nobody_wants_is_not_taken(pair: Pair) -> None:
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [wire.encode({"verb": "list"})], [writing])
    os.close(writing)
    message = asyncio.run(wire.receive(pair[1], with_fd=False))
    assert message is not None
    assert (message.get("verb"), message.fd) == ("list", None)
    assert os.read(reading, 1) == b"", "somebody still holds the other end"
    os.close(reading)


def test_a_message_that_claims_to_be_huge_is_refused_before_it_is_read(pair: Pair) -> None:
    pair[0].sendall(struct.pack("<I", wire.MESSAGE_MAX_BYTES + 1))
    with pytest.raises(CarrelError, match="message of 1048577 bytes"):
        asyncio.run(wire.receive(pair[1]))


def test_a_peer_is_who_the_kernel_says(pair: Pair) -> None:
    assert wire.peer(pair[0]) == (os.getpid(), os.getuid(), os.getgid())


def serve_once(path: Path, answer: bytes) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_command_asks_and_is_answered(tmp_path: Path) -> None:
    thread = serve_once(tmp_path / "s", wire.encode({"status": "ok", "json": '{"a": 1}'}))
    message = wire.call(tmp_path / "s", {"verb": "status"})
    thread.join()
    assert wire.answer(message) == {"a": 1}


def test_a_refusal_is_raised_as_the_sentence_it_carries() -> None:
    with pytest.raises(CarrelError, match=r"^no guest x on this node$"):
        wire.answer(wire.decode(b"status=refused\0text=no guest x on this node\0"))


def test_an_answer_without_a_value_is_none() -> None:
    assert wire.answer(wire.decode(b"status=ok\0")) is None


def test_a_daemon_that_is_not_there_is_unreachable_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file or directory; is it running"):
        wire.call(tmp_path / "s", {"verb": "status"})


def test_a_daemon_that_hangs_up_is_unreachable(tmp_path: Path) -> None:
    thread = serve_once(tmp_path / "s", b"\x05\0")
    with pytest.raises(UnreachableError, match="it closed the connection"):
        wire.call(tmp_path / "s", {"verb": "status"})
    thread.join()


def test_a_daemon_that_says_nothing_is_unreachable_in_time(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(UnreachableError, match="timed out"):
            wire.call(tmp_path / "s", {"verb": "status"}, timeout_s=0.05)
