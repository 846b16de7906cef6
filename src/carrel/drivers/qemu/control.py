"""The control port: carreld's own conversation with carrel-agent in one guest.

Frames and verbs are in ``docs/reference/relay-protocol.md``. The agent says hello whenever the port is opened, so
a carreld that starts later may take up the conversation at any time.
"""

import asyncio
import secrets
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from carrel import wire
from carrel.errors import RefusedError, UnreachableError
from carrel.model.guest import GuestSpec

_HEADER = struct.Struct("<BBHI")
CONTROL = 13
FRAME_MAX_BYTES = 65536
KERNEL_MAX = 64


class Control:
    """One connection to one agent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use a connected stream."""
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path) -> "Control":
        """Connect to the socket on which QEMU listens for us.

        Raises:
            UnreachableError: QEMU is not there.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError as error:
            raise UnreachableError(f"the guest's control socket: {error.strerror}") from error
        return cls(reader, writer)

    def close(self) -> None:
        self._writer.close()

    async def hello(self) -> wire.Message:
        """Wait for the agent's hello and return it. The caller bounds the wait."""
        return await self._expect("hello")

    async def ask(self, fields: Mapping[str, str | Sequence[str]], *, answer: str, timeout_s: float) -> wire.Message:
        """Send one request and return the agent's ``answer``.

        Raises:
            RefusedError: the agent answered that it failed, with its sentence.
            UnreachableError: no answer within ``timeout_s``.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.tell(fields)
                    return await self._expect(answer)
            except TimeoutError as error:
                raise UnreachableError(f"carrel-agent did not answer within {timeout_s:g} s") from error
            except OSError as error:
                raise UnreachableError(f"carrel-agent: {error.strerror}") from error

    async def tell(self, fields: Mapping[str, str | Sequence[str]]) -> None:
        """Send what has no answer."""
        body = wire.encode(fields)[4:]
        self._writer.write(_HEADER.pack(CONTROL, 0, 0, len(body)) + body)
        await self._writer.drain()

    async def _expect(self, verb: str) -> wire.Message:
        while True:
            message = await self._receive()
            match message.get("verb"):
                case "failed":
                    raise RefusedError(message.get("text", "carrel-agent gave no reason"))
                case found if found == verb:
                    return message
                case _:
                    continue  # a hello that crossed our request, or an answer to an earlier connection's

    async def _receive(self) -> wire.Message:
        try:
            kind, _, _, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            if length > FRAME_MAX_BYTES:
                raise UnreachableError(f"carrel-agent sent a frame of {length} bytes")
            body = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise UnreachableError("the guest closed its control port") from error
        if kind != CONTROL:
            raise UnreachableError(f"carrel-agent sent a frame of kind {kind} on its control port")
        return wire.decode(body)


def kernel_of(hello: wire.Message) -> str:
    """Return the guest's kernel version as the agent tells it, fit to be shown."""
    return "".join(letter for letter in hello.get("kernel") if letter.isprintable())[:KERNEL_MAX]


def identity(spec: GuestSpec) -> dict[str, str | Sequence[str]]:
    """Return what the agent is told: who the guest is and for whom it is."""
    return {
        "verb": "identity",
        "host_name": spec.host_name,
        "machine_id": secrets.token_hex(16),
        "boot_id": str(uuid.uuid4()),
        "clock_ns": str(time.time_ns()),
        "entropy": secrets.token_hex(64),
        "passwd": spec.passwd,
        "group": spec.group,
        "mount": [
            f"{index}:{'ro' if mount.read_only else 'rw'}:{mount.target}" for index, mount in enumerate(spec.mounts)
        ],
        "home": spec.home,
        "uid": str(spec.uid),
        "gid": str(spec.gid),
    }
