"""Connections that ask nothing, or too many of one caller's, cost nobody else's answer."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from carrel.daemons.visitors import visitors

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def _answer(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@contextlib.asynccontextmanager
async def _served(tmp_path: Path, *, app: Any = _answer, tcp: bool = False, **facts: Any) -> AsyncIterator[Any]:
    """Serve; yields what opens a connection."""
    protocol = visitors(**{"limit": 2, "trusted": frozenset(), "request_timeout_s": 60.0, **facts})
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    config.load()
    loop = asyncio.get_running_loop()

    def made() -> asyncio.Protocol:
        return protocol(config=config, server_state=server.server_state, app_state={})

    if tcp:
        listening = await loop.create_server(made, "127.0.0.1", 0)
        opened = partial(asyncio.open_connection, "127.0.0.1", listening.sockets[0].getsockname()[1])
    else:
        listening = await loop.create_unix_server(made, str(tmp_path / "s"))
        opened = partial(asyncio.open_unix_connection, str(tmp_path / "s"))
    writers = []

    async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await opened()
        writers.append(writer)
        return reader, writer

    try:
        async with asyncio.timeout(60):
            yield connected
    finally:
        listening.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        while server.server_state.connections:  # noqa: ASYNC110  # the server's ends close a turn later
            await asyncio.sleep(0)


def test_one_caller_has_a_share_of_the_connections_and_gets_it_back(tmp_path: Path) -> None:
    async def run(*, tcp: bool) -> None:
        async with _served(tmp_path, tcp=tcp) as opened:
            first, second, third = [await opened() for _ in range(3)]
            said = await third[0].read()
            assert b" 503 " in said
            assert b"has 2 connections to carrelctld already" in said
            first[1].write(REQUEST)
            assert b" 204 " in await first[0].readline()
            second[1].close()
            await second[1].wait_closed()
            while True:
                reader, writer = await opened()
                writer.write(REQUEST)
                if b" 204 " in await reader.readline():
                    return

    for tcp in (False, True):
        asyncio.run(run(tcp=tcp))


def test_root_and_the_daemons_own_user_have_as_many_as_they_like(tmp_path: Path) -> None:
    async def run() -> None:
        async with _served(tmp_path, trusted=frozenset({os.geteuid()})) as opened:
            for reader, writer in [await opened() for _ in range(4)]:
                writer.write(REQUEST)
                assert b" 204 " in await reader.readline()

    asyncio.run(run())


def test_a_connection_that_never_asks_whole_is_ended(tmp_path: Path) -> None:
    async def run(beginning: bytes) -> None:
        async with _served(tmp_path, request_timeout_s=0.05) as opened:
            reader, writer = await opened()
            writer.write(beginning)
            assert await reader.read() == b""

    for beginning in (b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"):
        asyncio.run(run(beginning))


def test_one_whose_answer_takes_long_is_not_ended(tmp_path: Path) -> None:
    async def slow(_scope: Any, _receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> None:
        async with _served(tmp_path, app=slow, request_timeout_s=0.05) as opened:
            reader, writer = await opened()
            writer.write(REQUEST)
            assert b" 204 " in await reader.readline()

    asyncio.run(run())
