"""Connections to carrelctld: each user and each other machine has a share of them, and nobody one for nothing.

The socket is open to everybody, who is known only by what they ask. So one user could hold all descriptors of the
daemon with connections that never ask anything, and then no job could be submitted.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Hashable
from http import HTTPStatus
from typing import Any, ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from carrel.daemons import callers
from carrel.daemons.views import ErrorView
from carrel.wire import peer

SHARE_MAX = 1024
REQUEST_TIMEOUT_S = 30.0
"""So long may a request take to arrive, from its first byte, or from the beginning of the connection, to its last."""


class Visitor(HttpToolsProtocol):
    """One connection. Tells the application which user is at the other end of a unix socket, as the kernel says."""

    limit: ClassVar[int]
    trusted: ClassVar[frozenset[int]]
    """Uids that may have as many as they like, on the unix socket."""
    request_timeout_s: ClassVar[float]
    held: ClassVar[Counter[Hashable]]

    def connection_made(self, opened: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own type
        super().connection_made(opened)
        sock = opened.get_extra_info("socket")
        self._who: Hashable = self.client[0] if self.client else ""
        if sock.family == socket.AF_UNIX:
            _, uid, _ = peer(sock)
            self.client = (callers.UNIX, uid)
            self._who = None if uid in self.trusted else uid
        self._late: asyncio.TimerHandle | None = None
        self.held[self._who] += 1
        if self._who is not None and self.held[self._who] > self.limit:
            self._refuse(opened)
        else:
            self._wait_for_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.held[self._who] -= 1
        if not self.held[self._who]:
            del self.held[self._who]
        self._has_asked()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._wait_for_a_request()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._has_asked()
        super().on_message_complete()

    def _wait_for_a_request(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.request_timeout_s, self.transport.close)

    def _has_asked(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, opened: asyncio.Transport) -> None:
        whose = f"uid {self._who}" if isinstance(self._who, int) else self._who
        body = msgspec.json.encode(
            ErrorView(error=f"{whose} has {self.limit} connections to carrelctld already, and may have no more")
        )
        status = HTTPStatus.SERVICE_UNAVAILABLE
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        opened.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        opened.close()


def visitors(
    *, limit: int, trusted: frozenset[int], request_timeout_s: float = REQUEST_TIMEOUT_S
) -> type[HttpToolsProtocol]:
    """Return the protocol of one server, for uvicorn to make its connections with."""
    facts: dict[str, Any] = {"limit": limit, "trusted": trusted, "request_timeout_s": request_timeout_s}
    return type("Visitor", (Visitor,), {**facts, "held": Counter()})
