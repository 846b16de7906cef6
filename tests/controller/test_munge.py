"""Over TCP a caller proves who it is with munge, for one request, once."""

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import uvicorn

from carrel.config import Controller, Placement
from carrel.daemons import api, munge, transport
from carrel.daemons.board import Board
from carrel.daemons.hosts import HostDesk
from carrel.errors import RefusedError, UnreachableError
from carrel.model.guestnode import HostReport, Orders
from carrel.testing.daemons import ControllerProcess, wait_for

pytestmark = pytest.mark.slurm
"""munged comes with Slurm."""

PORT = 22977


@pytest.fixture
def munged() -> Iterator[Path]:
    where = Path(tempfile.mkdtemp(prefix="cmun"))
    where.chmod(0o755)
    key = where / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = [f"--{name}={where / file}" for name, file in (("socket", "s"), ("key-file", "key"), ("pid-file", "pid"))]
    logs = [f"--log-file={where / 'log'}", f"--seed-file={where / 'seed'}"]
    process = subprocess.Popen(["munged", "-F", *files, *logs], stdin=subprocess.DEVNULL)
    try:
        wait_for((where / "s").exists, "munged listens", timeout_s=60)
        yield where
    finally:
        process.kill()  # a SIGTERM that comes just before munged accepts is not noticed until somebody connects
        process.wait(10)
    shutil.rmtree(where)


def test_the_signer_of_a_request_is_known(munged: Path) -> None:
    async def both() -> int:
        signed = await munge.sign("GET", "/v1/guests", b"", socket=str(munged / "s"))
        return await munge.verify(signed, "GET", "/v1/guests", b"", socket=str(munged / "s"))

    assert asyncio.run(both()) == os.geteuid()


@pytest.mark.parametrize(("method", "path", "body"), [("POST", "/a", b"x"), ("GET", "/b", b"x"), ("GET", "/a", b"y")])
def test_a_credential_carries_no_other_request(munged: Path, method: str, path: str, body: bytes) -> None:
    async def both() -> int:
        signed = await munge.sign("GET", "/a", b"x", socket=str(munged / "s"))
        return await munge.verify(signed, method, path, body, socket=str(munged / "s"))

    with pytest.raises(RefusedError, match="another request"):
        asyncio.run(both())


def test_a_credential_works_once(munged: Path) -> None:
    async def twice() -> None:
        signed = await munge.sign("GET", "/a", b"", socket=str(munged / "s"))
        await munge.verify(signed, "GET", "/a", b"", socket=str(munged / "s"))
        with pytest.raises(RefusedError, match="munge refused"):
            await munge.verify(signed, "GET", "/a", b"", socket=str(munged / "s"))

    asyncio.run(twice())


def test_a_munge_that_is_away_tells_nothing_about_the_caller(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        asyncio.run(munge.verify("Munge MUNGE:x:", "GET", "/a", b"", socket=str(tmp_path / "none")))


@contextlib.contextmanager
def _over_tcp(munged: Path) -> Iterator[Controller]:
    extra = f'munge_socket = "{munged / "s"}"'
    controller = ControllerProcess(munged, listen=f"tcp:127.0.0.1:{PORT}", extra=extra)
    controller.start()
    try:
        yield Controller(listen=controller.listen, munge_socket=str(munged / "s"))
    finally:
        controller.kill()


def test_over_tcp_a_signed_request_is_answered_and_an_unsigned_one_is_not(munged: Path) -> None:
    with _over_tcp(munged) as settings:
        answer = asyncio.run(transport.request(settings, "GET", "/v1/guests?job=7"))
        assert transport.decoded(answer) == []
        assert asyncio.run(_unsigned()) == 401


def test_a_header_that_names_another_caller_makes_nobody_root(munged: Path) -> None:
    """Of a proxy on the same host a web server believes it, and ``unix`` with port 0 is how root comes in."""
    with _over_tcp(munged):
        assert asyncio.run(_unsigned("X-Forwarded-For: unix\r\n")) == 401


async def _unsigned(header: str = "") -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(f"GET /v1/guests HTTP/1.1\r\nHost: x\r\n{header}Connection: close\r\n\r\n".encode())
    status = (await reader.readline()).split()[1]
    writer.close()
    return int(status)


@contextlib.asynccontextmanager
async def _hosts_told(
    munged: Path, exchange: Callable[[HostReport, str], Awaitable[Orders]]
) -> AsyncIterator[Controller]:
    """A controller over TCP that tells hosts what ``exchange`` returns."""
    board, placement = Board(), Placement(table=str(munged / "hosts.db"))
    service = api.Service(
        board=board,
        trusted=frozenset({os.geteuid()}),
        addresses=lambda: asyncio.sleep(0, {}),
        changed=lambda: None,
        silent_after_s=60,
        munge_socket=str(munged / "s"),
        hosts=HostDesk(placement, board, silent_after_s=60),
        exchange=exchange,
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api.create(service), lifespan="off", log_level="critical"))
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        port = listening.getsockname()[1]
        yield Controller(listen=f"tcp:127.0.0.1:{port}", munge_socket=str(munged / "s"), user=ME)
        server.should_exit = True
        await serving


async def _orders(_report: HostReport, _digest: str) -> Orders:
    return Orders(digest="d", orders=())


BODY = msgspec.json.encode(HostReport(host="h1", address="10.0.0.1", guests=()))
ME = pwd.getpwuid(os.geteuid()).pw_name
PATH = "/v1/hosts/h1/report?digest=x"


def test_a_host_takes_orders_that_carrelctlds_user_signed(munged: Path) -> None:
    async def ask() -> object:
        async with _hosts_told(munged, _orders) as settings:
            return transport.decoded(await transport.request(settings, "POST", PATH, BODY))

    assert asyncio.run(ask()) == {"digest": "d", "orders": []}


def test_a_host_takes_no_orders_from_another_user_that_listens_there(munged: Path) -> None:
    async def ask() -> None:
        async with _hosts_told(munged, _orders) as settings:
            await transport.request(msgspec.structs.replace(settings, user="nobody"), "POST", PATH, BODY)

    with pytest.raises(RefusedError, match=r"not controller\.user = nobody"):
        asyncio.run(ask())


@pytest.mark.parametrize("told", ["nothing", "another body", "another question"])
def test_a_host_takes_no_orders_that_are_not_signed_for_its_question(munged: Path, told: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        question = next(line.partition(": ")[2] for line in head.splitlines() if line.startswith("Authorization"))
        signed = "Munge another" if told == "another question" else question
        body = b"{}" if told == "another body" else b'{"digest":"d","orders":[]}'
        credential = await munge.sign_answer(signed, body, socket=str(munged / "s"))
        more = "" if told == "nothing" else f"{transport.CREDENTIAL}: {credential}\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\n{more}Content-Length: 26\r\n\r\n".encode() + b'{"digest":"d","orders":[]}')
        await writer.drain()
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            settings = Controller(listen=f"tcp:127.0.0.1:{port}", munge_socket=str(munged / "s"), user=ME)
            await transport.request(settings, "POST", PATH, BODY)

    with pytest.raises(RefusedError, match=r"did not prove to be controller\.user"):
        asyncio.run(ask())
