"""Over TCP a caller proves who it is with munge, for one request, once."""

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.config import Controller
from carrel.daemons import munge, transport
from carrel.errors import RefusedError, UnreachableError
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


def test_over_tcp_a_signed_request_is_answered_and_an_unsigned_one_is_not(munged: Path) -> None:
    extra = f'munge_socket = "{munged / "s"}"'
    controller = ControllerProcess(munged, listen=f"tcp:127.0.0.1:{PORT}", extra=extra)
    controller.start()
    settings = Controller(listen=controller.listen, munge_socket=str(munged / "s"))
    try:
        answer = asyncio.run(transport.request(settings, "GET", "/v1/guests?job=7"))
        assert transport.decoded(answer) == []
        assert asyncio.run(_unsigned()) == 401
    finally:
        controller.kill()


async def _unsigned() -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(b"GET /v1/guests HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    status = (await reader.readline()).split()[1]
    writer.close()
    return int(status)
