"""Who is at the door, and how to talk with whom nobody trusts.

Each user has a share of carreld's descriptors, so that none can take them from all others; and neither one who says
nothing nor one who does not listen is waited for.
"""

import asyncio
import contextlib
import resource
import socket
from collections import Counter
from collections.abc import Iterator

import msgspec

from carrel import wire
from carrel.errors import RefusedError

REQUEST_TIMEOUT_S = 10.0
REQUEST_MAX_BYTES = 128 * 1024  # a path may have 4 KiB, and a request some of them
ANSWER_TIMEOUT_S = 10.0

SHARES = 8
"""No user has more than one of so many parts."""
DESCRIPTORS_PER_PEER = 4
"""A task at the door costs its connection and, for a moment, both ends of its stream and a look at a file."""


class Peers:
    """Counts the connections of each user; root's are not limited."""

    def __init__(self, limit: int) -> None:
        """Let each user have ``limit`` connections at once."""
        self._limit = limit
        self._counts: Counter[int] = Counter()

    @contextlib.contextmanager
    def admitted(self, uid: int) -> Iterator[None]:
        """Count one more connection of ``uid`` while the context lasts.

        Raises:
            RefusedError: the user has as many as one may have.
        """
        if uid and self._counts[uid] >= self._limit:
            raise RefusedError(f"uid {uid} has {self._limit} connections to carreld already, and may have no more")
        self._counts[uid] += 1
        try:
            yield
        finally:
            self._counts[uid] -= 1
            if not self._counts[uid]:
                del self._counts[uid]


def share() -> int:
    """Return how many connections one user may have, once this process may have as many descriptors as it can."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard // SHARES // DESCRIPTORS_PER_PEER)


async def heard(connection: socket.socket) -> wire.Message | None:
    """Return what the peer asks; None where it never does. No verb takes a descriptor."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return await wire.receive(connection, limit_bytes=REQUEST_MAX_BYTES, with_fd=False)
    except TimeoutError:
        return None


async def tell(connection: socket.socket, fields: wire.Fields, *, fd: int | None = None) -> None:
    """Send an answer. A peer that does not read it counts as gone.

    Raises:
        ConnectionError: it is gone.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await wire.send(connection, fields, fd=fd)
    except TimeoutError as error:
        raise BrokenPipeError(f"the peer read nothing for {ANSWER_TIMEOUT_S:g} s") from error


async def refuse(connection: socket.socket, sentence: str) -> None:
    """Send a sentence in place of what was asked for."""
    with contextlib.suppress(ConnectionError):
        await tell(connection, {"status": "refused", "text": sentence})


async def tell_json(connection: socket.socket, value: object) -> None:
    """Send what was asked for, as JSON."""
    await tell(connection, {"status": "ok", "json": msgspec.json.encode(value).decode()})
