"""What the tasks of an array cost the rounds: each its own lien, and no look at those of the others."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from carrel.bank import queries, runs
from carrel.bank.postgres import PostgresStore
from carrel.bank.sqlite import SqliteStore
from carrel.bank.verify import verify
from carrel.config import Bank as BankSettings
from carrel.config import Config, Prices, Slurm
from carrel.daemons import banking
from carrel.daemons.banking import Bank
from carrel.daemons.rounds import Rounds
from carrel.model.cluster import ClusterFacts, NodeFacts, PartitionFacts
from carrel.model.ledger import Deposit, OpenAllocation, OpenProject, Place
from carrel.model.run import mark_of
from carrel.ports import Reading, Store, Writing

PRICES = '[[version]]\nname = "v"\nvalid_from = 2020-01-01\n[version.default]\nrates = { cpu = 3600 }\n'
NODE = NodeFacts(name="c1", cpus=4, for_jobs=4, memory_mib=1000)
CLUSTER = ClusterFacts(partitions={"main": PartitionFacts(name="main", nodes=(NODE,))}, default_partition="main")
SQUEUE = r"""#!/bin/sh
for word; do
    case "$word" in JobID:*) part=${word#JobID:} part=${part%%,*} ;; esac
done
awk -v part="$part" '{ gsub(/[|]/, part); print }' "$(dirname "$0")/queue"
"""
"""As far as it is asked: the lines of a file, with the word between the fields that the question brings."""
TOKEN = "f" * 32
ARRAY, MICRO_SU = 100, 60_000_000
SHORT, LONG = 4, 24


class Counted:
    """A store that counts the rows it reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rows = 0

    def migrate(self) -> int:
        return self._store.migrate()

    @contextmanager
    def writing(self) -> Iterator[Writing]:
        with self._store.writing() as session:
            yield CountedSession(session, self)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        with self._store.reading() as session:
            yield CountedReading(session, self)

    def close(self) -> None:
        self._store.close()


class CountedReading:
    def __init__(self, session: Reading, store: Counted) -> None:
        self._reading, self._counted = session, store

    def rows(self, sql: str, *values: Any) -> Iterator[Sequence[Any]]:
        for row in self._reading.rows(sql, *values):
            self._counted.rows += 1
            yield row

    def unguarded(self) -> set[str]:
        return self._reading.unguarded()


class CountedSession(CountedReading):
    def __init__(self, session: Writing, store: Counted) -> None:
        super().__init__(session, store)
        self._writing = session

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        self._writing.insert(table, rows)

    def update(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        self._writing.update(table, rows)


class Site:
    """A bank's rounds over a queue that is a file, with an array in it that runs one task at a time."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, tasks: int, database: str = "") -> None:
        """Place the lien of all its tasks."""
        root.mkdir()
        (root / "prices.toml").write_text(PRICES)
        (root / "squeue").write_text(SQUEUE)
        (root / "squeue").chmod(0o755)
        self._queue = root / "queue"
        settings = BankSettings(
            enabled=True,
            database=database or str(root / "ledger.db"),
            dir=str(root),
            prices=Prices(book=str(root / "prices.toml")),
        )
        opened = banking.open_store
        monkeypatch.setattr(banking, "open_store", lambda settings: Counted(opened(settings)))
        config = Config(bank=settings, slurm=Slurm(bin_dir=str(root)))
        self.bank = Bank(config)
        monkeypatch.undo()
        assert isinstance(self.bank.ledger.store, Counted)
        self._store = self.bank.ledger.store
        self.bank.learn(CLUSTER, {"ClusterName": "k"})
        self._rounds = Rounds(self.bank, config.slurm)
        self._tasks, self._submit_s = tasks, int(time.time())
        for command in (
            OpenProject(key="p", project="physics"),
            OpenAllocation(key="a", allocation="physics", project="physics"),
            Deposit(key="d", allocation="physics", amount_micro_su=10**12, reason="test"),
            Place(
                key="l",
                cluster="k",
                token=TOKEN,
                project="physics",
                user="ada",
                amount_micro_su=MICRO_SU,
                units=tasks,
            ),
        ):
            self.bank.ledger.call(command)

    def look(self, task: int, state: str) -> int:
        """Look while this task runs or has ended and the later ones wait; return how many rows that read."""
        lines = [self._line(ARRAY + task, str(task), state)]
        if task < self._tasks:
            lines.append(self._line(ARRAY, f"{task + 1}-{self._tasks}", "PENDING"))
        self._queue.write_text("\n".join(lines) + "\n")
        before = self._store.rows
        asyncio.run(self._rounds.round())
        return self._store.rows - before

    def run_through(self) -> list[int]:
        """Let all tasks run; return what the looks at each, as it began and as it ended, read."""
        return [self.look(task, "RUNNING") + self.look(task, "COMPLETED") for task in range(1, self._tasks + 1)]

    def charged(self) -> list[int]:
        return [lien.charged_micro_su for lien in queries.liens(self._store)]

    def _line(self, job_id: int, tasks: str, state: str) -> str:
        begun = state != "PENDING"
        when = f"{self._submit_s}|{self._submit_s}" if begun else "N/A|N/A"
        placed = "c1" if begun else ""
        return (
            f"{job_id}|{ARRAY}|{tasks}|ada|{state}|0|{self._submit_s}|{when}|0:10|1:00|main|normal|"
            f"cpu=1,mem=1M,node=1|10|{placed}|1|{mark_of(TOKEN)}|physics|"
        )


def _a_task_costs_no_more_in_a_long_array(short: Site, long: Site) -> None:
    reads = {}
    for site in (short, long):
        reads[site] = site.run_through()
        assert site.charged() == [10_000_000] * len(reads[site])
        assert verify(site.bank.ledger.store) == []
        site.bank.ledger.close()
    assert max(reads[long]) == max(reads[short])


def _looks_tasks_up_in_their_index(store: Store, *before: str) -> None:
    """Or each look would read the whole table, and return as few rows."""
    with store.reading() as session:
        for sql in before:
            session.rows(sql)
        query = f"SELECT id FROM lien WHERE {runs.JOB_OF_RUN} IN ({{texts}}) AND run_ref IS NOT NULL"  # noqa: S608  # ours
        plan = list(session.rows(f"EXPLAIN {'' if before else 'QUERY PLAN'} {query}", ["k/1."]))
    store.close()
    assert "lien_task" in str(plan)


def test_a_task_of_a_long_array_reads_as_many_rows_as_one_of_a_short_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _a_task_costs_no_more_in_a_long_array(
        Site(tmp_path / "short", monkeypatch, tasks=SHORT), Site(tmp_path / "long", monkeypatch, tasks=LONG)
    )


def test_tasks_are_looked_up_in_their_index(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db")
    store.migrate()
    _looks_tasks_up_in_their_index(store)


@pytest.mark.postgres
def test_tasks_are_looked_up_in_their_index_in_postgresql(postgres: str) -> None:
    store = PostgresStore(postgres)
    store.migrate()
    # Of a table as small as this one PostgreSQL would rather read all.
    _looks_tasks_up_in_their_index(store, "SET LOCAL enable_seqscan = off")


@pytest.mark.postgres
def test_a_task_of_a_long_array_reads_as_many_rows_as_one_of_a_short_array_in_postgresql(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: str
) -> None:
    _a_task_costs_no_more_in_a_long_array(
        Site(tmp_path / "short", monkeypatch, tasks=SHORT),
        Site(tmp_path / "long", monkeypatch, tasks=LONG, database=postgres),
    )
