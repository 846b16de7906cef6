"""A process that writes to a ledger until it is killed, and prints each answer once it has it.

Usage: python -m carrel.testing.ledger_writer URL FIRST     (URL: sqlite:PATH or postgresql:CONNINFO)
"""

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec

from carrel.bank.ledger import Ledger
from carrel.bank.postgres import PostgresStore
from carrel.bank.sqlite import SqliteStore
from carrel.model.ledger import Answer, AnyCommand, Place, Refund, Settle, Start
from carrel.ports import Store

IN_FLIGHT = 40


def open_store(url: str) -> Store:
    kind, _, where = url.partition(":")
    return SqliteStore(Path(where)) if kind == "sqlite" else PostgresStore(where)


def commands(n: int) -> Sequence[AnyCommand]:
    """Return all that happens to the n-th run; its amounts are a function of n, so that anybody can add them up."""
    return [
        Place(key=f"l/{n}", cluster="c", token=f"t{n}", project="physics", user="ada", amount_micro_su=100 + n % 7),
        Start(key=f"s/{n}", cluster="c", token=f"t{n}", run=f"r{n}", amount_micro_su=90 + n % 5),
        Settle(key=f"e/{n}", cluster="c", run=f"r{n}", amount_micro_su=50 + n % 11),
        Refund(key=f"r/{n}", cluster="c", run=f"r{n}", amount_micro_su=1 + n % 3, reason="a test"),
    ]


def main() -> None:
    url, first = sys.argv[1], int(sys.argv[2])
    room = threading.Semaphore(IN_FLIGHT)
    with Ledger(open_store(url)) as ledger:
        n = first
        while True:
            room.acquire()
            ledger.submit(commands(n)).add_done_callback(lambda future, n=n: told(n, future, room))  # type: ignore[misc]
            n += 1


def told(n: int, future: "Future[list[Answer]]", room: threading.Semaphore) -> None:
    line = f"{n} {msgspec.json.encode(future.result()).decode()}\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    room.release()


if __name__ == "__main__":
    main()
