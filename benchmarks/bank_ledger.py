"""Measure the ledger on this machine, on SQLite and on PostgreSQL, and print what was seen.

Usage: .venv/bin/python benchmarks/bank_ledger.py [--repeat 5] [--only sqlite]

Every figure is a median of ``--repeat`` measurements with its spread. Nothing is asserted but the sums: after each
measurement the whole ledger is verified. The load generator is in the same process and shares its interpreter.
"""

import argparse
import asyncio
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from carrel.bank.ledger import BATCH, Ledger
from carrel.bank.postgres import PostgresStore
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.model.ledger import AnyCommand, Bind, Deposit, OpenAllocation, OpenProject, Place, Receipt, Settle, Start
from carrel.ports import Store
from carrel.testing.postgres import Postgres, programs

COMMANDS = 20_000
LIENS = 2_000
HOT, SPREAD = 1, 1000


class Figures:
    """Prints rows as they come."""

    def row(self, what: str, values: Sequence[float], unit: str) -> None:
        middle = statistics.median(values)
        print(
            f"{what:<66} {middle:>9.4g} {unit:<10} {min(values):.4g} … {max(values):.4g}  n={len(values)}", flush=True
        )


def accounts(ledger: Ledger, count: int) -> None:
    """Open accounts with money in them."""
    for begin in range(0, count, BATCH):
        commands: list[AnyCommand] = []
        for n in range(begin, min(count, begin + BATCH)):
            commands += [
                OpenProject(key=f"p{n}", project=f"p{n}"),
                OpenAllocation(key=f"a{n}", allocation=f"a{n}", project=f"p{n}"),
                Deposit(key=f"d{n}", allocation=f"a{n}", amount_micro_su=10**15, reason="a benchmark"),
            ]
        ledger.submit(commands).result()


def place(n: int, projects: int) -> Place:
    return Place(
        key=f"l/c/{n:032x}/0",
        cluster="c",
        token=f"{n:032x}",
        project=f"p{n % projects}",
        user=f"u{n % 100}",
        amount_micro_su=1_000_000,
        price_version=1,
        inputs={"cpus": 4, "memory_bytes": 2**33, "seconds": 3600},
    )


def life(n: int, projects: int) -> list[AnyCommand]:
    """Return the four commands of one job."""
    return [
        place(n, projects),
        Bind(key=f"b/c/{n:032x}", cluster="c", token=f"{n:032x}", user=f"u{n % 100}", job_id=n, run=f"s{n}"),
        Start(key=f"s/c/{n}", cluster="c", run=f"s{n}", amount_micro_su=1_000_000, price_version=1),
        Settle(key=f"e/c/{n}", cluster="c", run=f"s{n}", amount_micro_su=400_000, price_version=1),
    ]


def batch(ledger: Ledger, commands: Sequence[AnyCommand]) -> float:
    """Return commands a second, submitted by 256, eight such lots at a time."""
    begun_s = time.monotonic()
    lots = [commands[begin : begin + BATCH] for begin in range(0, len(commands), BATCH)]
    futures = [ledger.submit(lot) for lot in lots]
    done = [answer for future in futures for answer in future.result()]
    took_s = time.monotonic() - begun_s
    if not all(isinstance(answer, Receipt) for answer in done):
        raise SystemExit("bench: a command was refused")
    return len(done) / took_s


def callers(ledger: Ledger, count: int, projects: int) -> tuple[float, float, float]:
    """Return liens a second of so many callers in one event loop, each waiting for its answer; p50 and p99 in ms."""
    waits_ms: list[float] = []
    numbers = iter(range(LIENS))

    async def caller() -> None:
        for n in numbers:
            begun_s = time.monotonic()
            await ledger.do(place(n, projects))
            waits_ms.append((time.monotonic() - begun_s) * 1000)

    async def every() -> None:
        await asyncio.gather(*(caller() for _ in range(count)))

    begun_s = time.monotonic()
    asyncio.run(every())
    took_s = time.monotonic() - begun_s
    waits_ms.sort()
    return LIENS / took_s, waits_ms[len(waits_ms) // 2], waits_ms[len(waits_ms) * 99 // 100]


@contextmanager
def ledger_on(open_store: Callable[[], Store], projects: int) -> Iterator[Ledger]:
    """A new ledger with accounts; what is left of it is sound."""
    with Ledger(open_store()) as ledger:
        accounts(ledger, projects)
        yield ledger
        if broken := verify(ledger.store):
            raise SystemExit(f"bench: {broken[0].invariant}: {broken[0].sentence}")


def measure(name: str, open_store: Callable[[], Store], figures: Figures, repeat: int) -> None:
    for projects, which in ((HOT, "one hot account"), (SPREAD, f"{SPREAD} accounts")):
        only: list[float] = []
        lives: list[float] = []
        for _ in range(repeat):
            with ledger_on(open_store, projects) as ledger:
                only.append(batch(ledger, [place(n, projects) for n in range(COMMANDS)]))
            with ledger_on(open_store, projects) as ledger:
                lives.append(batch(ledger, [one for n in range(COMMANDS // 4) for one in life(n, projects)]))
        figures.row(f"{name}, {which}: liens in batch", only, "commands/s")
        figures.row(f"{name}, {which}: place, bind, start, settle in batch", lives, "commands/s")
    for count in (1, 16, 64):
        seen = []
        for _ in range(repeat):
            with ledger_on(open_store, HOT) as ledger:
                seen.append(callers(ledger, count, HOT))
        rates, middles, slowest = zip(*seen, strict=True)
        figures.row(f"{name}, one hot account: liens of {count} callers, group commit", rates, "liens/s")
        figures.row("  p50", middles, "ms")
        figures.row("  p99", slowest, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one database only")
    arguments = parser.parse_args()
    figures = Figures()
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}")
    where = Path(tempfile.mkdtemp(prefix="carrel-bench."))
    try:
        if arguments.only in (None, "sqlite"):
            number = iter(range(10**6))
            measure("SQLite", lambda: SqliteStore(where / f"{next(number)}.db"), figures, arguments.repeat)
        bin_dir = programs()
        if arguments.only in (None, "postgresql") and bin_dir is not None:
            (where / "pg").mkdir()
            where.chmod(0o755)
            server = Postgres(where / "pg", bin_dir)
            try:
                measure("PostgreSQL", lambda: PostgresStore(server.schema()), figures, arguments.repeat)
            finally:
                server.down()
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
