"""Measure liens through REST on this machine, on SQLite and on PostgreSQL, and print what was seen.

Usage: .venv/bin/python benchmarks/bank_rest.py [--seconds 5] [--only sqlite]

A real carrelctld in a process of its own; the load comes from this process over its unix socket, and shares the
machine. After each database the whole ledger is verified. Every lien has a key and a token of its own.
Beside the rate stands what a request cost in CPU time, here and there: the rate of a machine that nobody shares is at
most what one core of carrelctld does.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from carrel.testing.daemons import ControllerProcess
from carrel.testing.desk import BOOK
from carrel.testing.postgres import Postgres, programs

CONNECTIONS = (1, 16, 64)
BATCH = 1000
BATCHES = 20


class Connection:
    """One connection that stays open, as a program's would."""

    def __init__(self, path: Path) -> None:
        """Connect with ``open``."""
        self._path = path

    async def open(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        return self

    async def post(self, path: str, body: Any, key: str = "") -> tuple[int, bytes]:
        """Send a request and return status and body of the answer."""
        sent = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: c\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {key or '-'}\r\nContent-Length: {len(sent)}\r\n\r\n"
        )
        self._writer.write(head.encode() + sent)
        answered = await self._reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in answered.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(answered[9:12]), await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


def lien(name: str) -> dict[str, Any]:
    inputs = {"cpu": 4, "mem": 8192, "seconds": 3600}
    return {"cluster": "c", "token": name, "account": "hot", "user": "ada", "amount_micro_su": 1, "inputs": inputs}


async def opened(controller: ControllerProcess) -> None:
    """Open an account with more in it than all liens take."""
    connection = await Connection(controller.socket).open()
    for path, body in (
        ("/v1/accounts", {"account": "hot"}),
        ("/v1/accounts/hot/allocations", {"allocation": "hot"}),
        ("/v1/accounts/hot/deposits", {"amount_micro_su": 10**17, "reason": "a benchmark"}),
    ):
        status, _ = await connection.post(path, body, path)
        assert status == 201
    connection.close()


class Spent:
    """CPU time of carrelctld and of this process since it was made."""

    def __init__(self, pid: int) -> None:
        """Begin to count."""
        self._stat = Path(f"/proc/{pid}/stat")
        self._server_s, self._client_s = self._now_s()

    def _now_s(self) -> tuple[float, float]:
        fields = self._stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def each(self, count: int) -> str:
        """Say how much of it each of so many things took."""
        server_s, client_s = self._now_s()
        server_us, client_us = (1e6 * s / count for s in (server_s - self._server_s, client_s - self._client_s))
        return f"CPU: carrelctld {server_us:.0f} us, client {client_us:.0f} us each"


async def load(controller: ControllerProcess, count: int, seconds: float) -> list[float]:
    """Return how long each lien took, in ms, asked over ``count`` connections at once."""
    waits_ms: list[float] = []
    until_s = time.monotonic() + seconds

    async def caller(number: int) -> None:
        connection = await Connection(controller.socket).open()
        turn = 0
        while time.monotonic() < until_s:
            turn += 1
            name = f"{count}.{number}.{turn}"
            begun_s = time.monotonic()
            status, _ = await connection.post("/v1/liens", lien(name), name)
            waits_ms.append((time.monotonic() - begun_s) * 1000)
            assert status == 201
        connection.close()

    await asyncio.gather(*(caller(number) for number in range(count)))
    return sorted(waits_ms)


async def batches(controller: ControllerProcess) -> float:
    """Return commands a second through the endpoint that takes many at once."""
    connection = await Connection(controller.socket).open()
    bodies = [
        [
            {"do": "place", "key": f"b{at}.{n}", "cluster": "c", "token": f"b{at}.{n}", "project": "hot", "user": "ada",
             "amount_micro_su": 1} for n in range(BATCH)
        ] for at in range(BATCHES)
    ]  # fmt: skip
    begun_s = time.monotonic()
    for body in bodies:
        status, _ = await connection.post("/v1/commands", body)
        assert status == 200
    took_s = time.monotonic() - begun_s
    connection.close()
    return BATCH * BATCHES / took_s


async def verified(controller: ControllerProcess) -> None:
    connection = await Connection(controller.socket).open()
    _, body = await connection.post("/v1/bank/verify", {})
    connection.close()
    if broken := json.loads(body)["breaks"]:
        raise SystemExit(f"bench: {broken[0]}")


def measure(name: str, database: Callable[[], str], seconds: float) -> None:
    where = Path(tempfile.mkdtemp(prefix="cbench"))
    where.chmod(0o755)
    (where / "prices.toml").write_text(BOOK)
    paths = f'database = "{database() or where / "ledger.db"}"\ndir = "{where}/bank"\nsocket = "{where}/submit.sock"'
    controller = ControllerProcess(where, extra=f"[bank]\nenabled = true\n{paths}")
    controller.start()
    try:
        asyncio.run(opened(controller))
        for count in CONNECTIONS:
            spent = Spent(controller.pid)
            waits = asyncio.run(load(controller, count, seconds))
            p50, p99 = statistics.median(waits), waits[len(waits) * 99 // 100]
            rate = len(waits) / seconds
            figures = f"{rate:>6.0f} liens/s  p50 {p50:.2f} ms  p99 {p99:.2f} ms"
            print(f"{name}, {count:>2} connections: {figures}  {spent.each(len(waits))}", flush=True)
        spent = Spent(controller.pid)
        rate = asyncio.run(batches(controller))
        print(f"{name}, batches of {BATCH}: {rate:.0f} commands/s  {spent.each(BATCH * BATCHES)}", flush=True)
        asyncio.run(verified(controller))
    finally:
        controller.kill()
        shutil.rmtree(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each number of connections")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one database only")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}")
    if arguments.only in (None, "sqlite"):
        measure("SQLite", lambda: "", arguments.seconds)
    bin_dir = programs()
    if arguments.only in (None, "postgresql") and bin_dir is not None:
        where = Path(tempfile.mkdtemp(prefix="cbpg"))
        server = Postgres(where, bin_dir)
        try:
            measure("PostgreSQL", server.schema, arguments.seconds)
        finally:
            server.down()
            shutil.rmtree(where)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
