"""Messages on carreld's unix socket: short, self-describing, easy to write from C.

A message is a little-endian u32 length, then that many bytes of ``key=value`` records, each ended by a NUL.
A key may repeat. At most one file descriptor rides on a message (``SCM_RIGHTS``, with its first byte).
The verbs are in ``docs/reference/node-socket.md``; ``guest/wire.h`` is the same in C.
"""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from carrel.errors import CarrelError, UnreachableError

MESSAGE_MAX_BYTES = 1 << 20
_PART_MAX_BYTES = 1 << 16
"""Read at once: whoever sends a long message byte by byte must not cost us its whole length each time."""
_LENGTH = struct.Struct("<I")

Fields = Mapping[str, str | Iterable[str]]


class Message:
    """Records of one message, in order; ``get`` takes the first of a key, ``all`` every one."""

    def __init__(self, records: list[tuple[str, str]], fd: int | None = None) -> None:
        """Keep ``records``; the receiver owns ``fd``."""
        self.records = records
        self.fd = fd

    def get(self, key: str, default: str = "") -> str:
        return next((value for name, value in self.records if name == key), default)

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.records if name == key]


def encode(fields: Fields) -> bytes:
    """Return the bytes of a message, length included."""
    body = b"".join(
        f"{key}={item}".encode(errors="surrogateescape") + b"\0"
        for key, value in fields.items()
        for item in ([value] if isinstance(value, str) else value)
    )
    if len(body) > MESSAGE_MAX_BYTES:
        raise CarrelError(f"message of {len(body)} bytes; at most {MESSAGE_MAX_BYTES} fit")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes, fd: int | None = None) -> Message:
    """Return the message in ``body`` (without its length)."""
    records = []
    for record in body.split(b"\0"):
        key, separator, value = record.decode(errors="surrogateescape").partition("=")
        if separator:
            records.append((key, value))
    return Message(records, fd)


async def receive(sock: socket.socket, *, limit_bytes: int = MESSAGE_MAX_BYTES, with_fd: bool = True) -> Message | None:
    """Return the next message on a non-blocking socket, or None when the peer closed it.

    Args:
        sock: Where it comes from.
        limit_bytes: A longer one is refused before it is read.
        with_fd: Take a descriptor that rides on it; else the kernel drops it.

    Raises:
        CarrelError: it is longer than ``limit_bytes``.
    """
    fds: list[int] = []
    try:
        head = await _receive_exactly(sock, _LENGTH.size, fds if with_fd else None)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > limit_bytes:
            raise CarrelError(f"message of {length} bytes; at most {limit_bytes} are taken")
        body = await _receive_exactly(sock, length)
        return None if body is None else decode(body, fds.pop(0) if fds else None)
    finally:
        for unclaimed in fds:  # also those of a message that never came, or came in part
            os.close(unclaimed)


async def send(sock: socket.socket, fields: Fields, *, fd: int | None = None) -> None:
    """Send one message on a non-blocking socket; ``fd`` stays the caller's to close."""
    data = encode(fields)
    if fd is not None:
        sent = 0
        while not sent:
            try:
                sent = socket.send_fds(sock, [data], [fd])
            except BlockingIOError:
                await _writable(sock)
        data = data[sent:]
    await asyncio.get_running_loop().sock_sendall(sock, data)


def call(path: Path, fields: Fields, *, timeout_s: float = 5.0) -> Message:
    """Ask the daemon at ``path`` one question and return its last answer (blocking; for commands, not daemons).

    Raises:
        UnreachableError: nobody listens, or no answer came within ``timeout_s``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            sock.sendall(encode(fields))
            head = _read(sock, _LENGTH.size)
            return decode(_read(sock, _LENGTH.unpack(head)[0]))
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            raise UnreachableError(f"carreld at {path}: {reason}; is it running? see: carrel node check") from error


def answer(message: Message) -> object:
    """Return the JSON value that an answer carries, or raise what it says went wrong."""
    if message.get("status") != "ok":
        raise CarrelError(message.get("text", "carreld gave no reason"))
    return json.loads(message.get("json", "null"))


def peer(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process that connected, as the kernel says."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid, gid


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError("it closed the connection")
        data += part
    return data


async def _receive_exactly(sock: socket.socket, count: int, fds: list[int] | None = None) -> bytes | None:
    """Return the next ``count`` bytes; what descriptors ride on them is added to ``fds``, where it is a list."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        wanted = min(count - len(data), _PART_MAX_BYTES)
        if fds is None:
            part = await loop.sock_recv(sock, wanted)
        else:
            try:
                part, found, _, _ = socket.recv_fds(sock, wanted, 1)
            except BlockingIOError:
                await _readable(sock)
                continue
            fds += found
        if not part:
            return None
        data += part
    return bytes(data)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(sock)
