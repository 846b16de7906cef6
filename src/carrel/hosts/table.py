"""The table of hosts, and the places on them that runs have taken: one SQLite file of the controller.

To ask where a run goes and to take the place is one transaction, so that two askers never get the last place both, and
whoever is killed has taken all places of a run or none. What is used of a host is the sum over its places: it is
stored nowhere, so it cannot drift from them. What a process keeps in memory, sorted for the site's policy, follows its
own transactions and is thrown away when SQLite tells of another's, or when one of its own fails.

A place is named by its run and the number of its guest. Taken again, it is the same place; given back again, nothing.
"""

import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from carrel.core.placement import Hosts
from carrel.errors import NotFoundError, RefusedError, UnreachableError
from carrel.model.host import Answer, Demand, Here, Host, in_words

BUSY_TIMEOUT_S = 30.0
"""How long to wait for a writer in another process; its transaction takes milliseconds."""

_NAME = re.compile(r"[^\s,\x00-\x1f\x7f]+")
_VERSION = 1
_TABLES = """
CREATE TABLE host (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    cpus INTEGER NOT NULL CHECK (cpus > 0),
    memory_bytes INTEGER NOT NULL CHECK (memory_bytes > 0),
    cpus_others INTEGER NOT NULL DEFAULT 0,
    memory_others_bytes INTEGER NOT NULL DEFAULT 0,
    reports INTEGER NOT NULL DEFAULT 0,
    drained INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE place (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    guest INTEGER NOT NULL,
    host TEXT NOT NULL REFERENCES host (name),
    cpus INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    UNIQUE (run, guest)
) STRICT;
CREATE INDEX place_host ON place (host);
CREATE TABLE address (
    address TEXT PRIMARY KEY,
    run TEXT NOT NULL,
    guest INTEGER NOT NULL,
    UNIQUE (run, guest)
) STRICT;
"""
_HOSTS = """
SELECT host.name, host.cpus, host.memory_bytes, host.cpus_others, host.memory_others_bytes, host.drained, host.reason,
       coalesce(sum(place.cpus), 0), coalesce(sum(place.memory_bytes), 0)
FROM host LEFT JOIN place ON place.host = host.name GROUP BY host.number ORDER BY host.number
"""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has, and what of it others than our guests use."""

    name: str
    cpus: int
    memory_bytes: int
    cpus_others: int = 0
    memory_others_bytes: int = 0
    reports: bool = False
    """Its carreld said so; while that is silent, the host gets no guest."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What one guest of a run has taken."""

    run: str
    guest: int
    """0 for the first guest of the run."""
    host: str
    cpus: int
    memory_bytes: int
    address: str = ""


class HostTable:
    """The file. Safe for threads and for processes; the file is made when it is first needed.

    Every method raises ``UnreachableError`` where the file cannot be read or written.
    """

    def __init__(self, path: Path, sort: Callable[[Iterable[Host]], Hosts] = Hosts) -> None:
        """Open nothing yet. ``sort`` prepares the hosts for whoever chooses among them."""
        self._path = path
        self._sort = sort
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None
        self._sorted: Hosts | None = None
        """The hosts as the last transaction left them; None: to be read anew."""
        self._others = 0
        """SQLite's number of other connections' commits, as of then."""

    def hosts(self) -> list[Host]:
        """Return all hosts, in the order in which they were added."""
        with self._transaction("DEFERRED") as db:
            return list(self._hosts(db))

    def reporting(self) -> frozenset[str]:
        """Return the hosts of whom their carreld tells what they have."""
        with self._transaction("DEFERRED") as db:
            return frozenset(name for (name,) in db.execute("SELECT name FROM host WHERE reports"))

    def put(self, facts: Iterable[Facts]) -> None:
        """Add hosts, or change what is known of them; whoever is drained stays so."""
        with self._transaction() as db:
            self._sorted = None
            for one in facts:
                _refuse(one)
                row = (one.name, one.cpus, one.memory_bytes, one.cpus_others, one.memory_others_bytes, one.reports)
                db.execute(
                    "INSERT INTO host (name, cpus, memory_bytes, cpus_others, memory_others_bytes, reports)"
                    " VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET cpus = excluded.cpus, memory_bytes = excluded.memory_bytes,"
                    " cpus_others = excluded.cpus_others, memory_others_bytes = excluded.memory_others_bytes,"
                    " reports = excluded.reports",
                    row,
                )

    def remove(self, name: str) -> None:
        """Forget a host.

        Raises:
            NotFoundError: there is none of this name.
            RefusedError: it carries guests.
        """
        with self._transaction() as db:
            self._sorted = None
            (guests,) = db.execute("SELECT count(*) FROM place WHERE host = ?", (name,)).fetchone()
            if guests:
                drained = db.execute("SELECT 1 FROM host WHERE name = ? AND drained", (name,)).fetchone()
                then = f"its jobs: carrel host show {name}" if drained else f"first: carrel host drain {name}"
                raise RefusedError(f"host {name!r} carries {guests} guest{'s' if guests > 1 else ''}; {then}")
            if not db.execute("DELETE FROM host WHERE name = ?", (name,)).rowcount:
                raise _no_host(name)

    def drain(self, name: str, reason: str) -> None:
        """Let a host have no further guest; those that are there stay.

        Raises:
            NotFoundError: there is none of this name.
        """
        self._set_drained(name, drained=True, reason=reason)

    def undrain(self, name: str) -> None:
        """Let a host have guests again; one that is not drained stays as it is.

        Raises:
            NotFoundError: there is none of this name.
        """
        self._set_drained(name, drained=False, reason="")

    def take(self, run: str, demand: Demand, choose: Callable[[Hosts], Answer]) -> Answer:
        """Take places for the guests of a run where ``choose`` says; one that has them keeps them.

        ``choose`` is called within the transaction, so it decides and does nothing: it leaves the hosts as they are.

        Raises:
            RefusedError: the run has taken places of another size: an admitted job does not grow.
        """
        with self._transaction() as db:
            mine = _places(db, run)
            if mine:
                sizes = [(place.cpus, place.memory_bytes) for place in mine]
                if sizes != [(demand.cpus, demand.memory_bytes)] * demand.count:
                    raise RefusedError(f"run {run} was admitted with other guests than {demand}; submit a new job")
                return Here(tuple(place.host for place in mine))
            hosts = self._hosts(db)
            answer = choose(hosts)
            if isinstance(answer, Here):
                db.executemany(
                    "INSERT INTO place (run, guest, host, cpus, memory_bytes) VALUES (?, ?, ?, ?, ?)",
                    [(run, guest, host, demand.cpus, demand.memory_bytes) for guest, host in enumerate(answer.hosts)],
                )
                for host in answer.hosts:
                    hosts.take(host, cpus=demand.cpus, memory_bytes=demand.memory_bytes)
            return answer

    def take_addresses(self, run: str, count: int, pool: Iterable[str]) -> tuple[str, ...] | None:
        """Return an address for each guest of a run until it gives back; None: too few of ``pool`` are free."""
        with self._transaction() as db:
            query = "SELECT address FROM address WHERE run = ? ORDER BY guest"
            mine = [address for (address,) in db.execute(query, (run,))]
            if len(mine) < count:
                taken = {address for (address,) in db.execute("SELECT address FROM address")}
                free = [address for address in pool if address not in taken][: count - len(mine)]
                if len(mine) + len(free) < count:
                    return None
                rows = [(address, run, guest) for guest, address in enumerate(free, len(mine))]
                db.executemany("INSERT INTO address VALUES (?, ?, ?)", rows)
                mine += free
            return tuple(mine[:count])

    def give_back(self, run: str) -> None:
        """Return all places and addresses of a run. It may have none."""
        with self._transaction() as db:
            self._forget(db, run)

    def places(self, run: str | None = None) -> list[Place]:
        """Return what is taken, by this run or by all, the oldest first."""
        with self._transaction("DEFERRED") as db:
            return _places(db, run)

    def mark(self) -> int:
        """Return a point in the table's history: take it before you look which runs live."""
        with self._transaction("DEFERRED") as db:
            (number,) = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'place'").fetchone()
            return int(number)

    def sweep(self, live: Collection[str], *, before: int) -> list[str]:
        """Give back what was taken before the mark by runs that do not live; return those runs.

        A place that was taken after the mark may be of a run that the look came too early for.
        """
        with self._transaction() as db:
            query = "SELECT run, max(number) FROM place GROUP BY run HAVING max(number) <= ? ORDER BY 2"
            dead = [run for run, _ in db.execute(query, (before,)).fetchall() if run not in live]
            for run in dead:
                self._forget(db, run)
            # A run takes its places first, so that an address without any is nobody's.
            db.execute("DELETE FROM address WHERE run NOT IN (SELECT run FROM place)")
            return dead

    def close(self) -> None:
        """Let go of the file; a further call opens it again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = self._sorted = None

    def _set_drained(self, name: str, *, drained: bool, reason: str) -> None:
        with self._transaction() as db:
            self._sorted = None
            words = (drained, reason, name)
            if not db.execute("UPDATE host SET drained = ?, reason = ? WHERE name = ?", words).rowcount:
                raise _no_host(name)

    def _hosts(self, db: sqlite3.Connection) -> Hosts:
        if self._sorted is None:
            self._sorted = self._sort(_hosts(db))
        return self._sorted

    def _forget(self, db: sqlite3.Connection, run: str) -> None:
        if self._sorted is not None:
            for place in _places(db, run):
                self._sorted.take(place.host, cpus=-place.cpus, memory_bytes=-place.memory_bytes)
        for table in ("place", "address"):
            db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))  # noqa: S608  # our own names

    @contextlib.contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Begin as the only writer, or, deferred, as a reader of the last commit, who waits for nobody."""
        try:
            with self._lock:
                db = self._opened = self._opened or self._open()
                db.execute(f"BEGIN {kind}")
                try:
                    self._notice_others(db)
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    self._sorted = None
                    raise
                finally:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UnreachableError(f"{self._path}: {error}; is it writable, and is the disk not full?") from error

    def _notice_others(self, db: sqlite3.Connection) -> None:
        """Forget what was sorted before another process, or another thread's table, has written."""
        (others,) = db.execute("PRAGMA data_version").fetchone()
        if others != self._others:
            self._others, self._sorted = others, None

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                db.execute(f"PRAGMA {pragma}")
            self._make_tables(db)
        except BaseException:
            db.close()
            raise
        return db

    def _make_tables(self, db: sqlite3.Connection) -> None:
        if self._version(db) == _VERSION:
            return  # who only reads waits for no writer
        db.execute("BEGIN IMMEDIATE")
        if self._version(db) < _VERSION:
            for statement in _TABLES.split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_VERSION}")
        db.execute("COMMIT")

    def _version(self, db: sqlite3.Connection) -> int:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise UnreachableError(f"{self._path}: version {version} is of a later Carrel; this one reads {_VERSION}")
        return int(version)


def _refuse(host: Facts) -> None:
    if not _NAME.fullmatch(host.name):
        raise RefusedError(f"host {host.name!r}: a host has a name without blanks and commas")
    if host.cpus < 1 or host.memory_bytes < 1:
        raise RefusedError(
            f"host {host.name!r}: {host.cpus} CPUs and {in_words(host.memory_bytes)} carry nothing; "
            f"see: carrel host add --help"
        )
    if host.cpus_others < 0 or host.memory_others_bytes < 0:
        raise RefusedError(
            f"host {host.name!r}: what is not for guests of jobs is below 0; see: carrel host add --help"
        )


def _hosts(db: sqlite3.Connection) -> list[Host]:
    return [
        Host(
            name=name,
            cpus=cpus,
            memory_bytes=memory_bytes,
            cpus_used=cpus_others + cpus_taken,
            memory_used_bytes=memory_others_bytes + memory_taken,
            cpus_others=cpus_others,
            memory_others_bytes=memory_others_bytes,
            state="drained" if drained else "up",
            reason=reason,
        )
        for (
            name,
            cpus,
            memory_bytes,
            cpus_others,
            memory_others_bytes,
            drained,
            reason,
            cpus_taken,
            memory_taken,
        ) in db.execute(_HOSTS)
    ]


def _places(db: sqlite3.Connection, run: str | None) -> list[Place]:
    query = (
        "SELECT place.run, place.guest, host, cpus, memory_bytes, coalesce(address, '') FROM place"
        " LEFT JOIN address ON address.run = place.run AND address.guest = place.guest"
        " WHERE ?1 IS NULL OR place.run = ?1 ORDER BY number"
    )
    return [
        Place(run=of, guest=guest, host=host, cpus=cpus, memory_bytes=memory_bytes, address=address)
        for of, guest, host, cpus, memory_bytes, address in db.execute(query, (run,))
    ]


def _no_host(name: str) -> NotFoundError:
    return NotFoundError(f"no host {name!r}; see: carrel host list")
