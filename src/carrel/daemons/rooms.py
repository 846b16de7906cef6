"""Which run has room on which host: the one thing about guests-as-nodes that nobody else knows.

Slurm knows the names, a host knows what it carries; that room is promised before either does is written here first.
"""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from carrel.core.placement import place
from carrel.model.host import Answer, Demand, Here, Host, Overcommit, Policy
from carrel.model.job import JobKey
from carrel.model.pool import Place

_SCHEMA = """
CREATE TABLE IF NOT EXISTS room (
    cluster TEXT NOT NULL, job_id INTEGER NOT NULL, submit_s INTEGER NOT NULL, restart INTEGER NOT NULL,
    number INTEGER NOT NULL, host TEXT NOT NULL, cpus INTEGER NOT NULL, memory_bytes INTEGER NOT NULL,
    PRIMARY KEY (cluster, job_id, submit_s, restart, number)
) STRICT
"""
_KEY = "cluster, job_id, submit_s, restart"


class Rooms:
    """Room that runs have, in one SQLite file."""

    def __init__(self, path: Path, *, policy: Policy, overcommit: Overcommit) -> None:
        """Open or make the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._policy, self._overcommit = policy, overcommit
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def all(self) -> tuple[Place, ...]:
        rows = self._database.execute(f"SELECT {_KEY}, number, host, cpus, memory_bytes FROM room")  # noqa: S608  # ours
        return tuple(
            Place(
                run=JobKey(cluster=cluster, job_id=job_id, submit_s=submit_s, restart=restart),
                index=number,
                host=host,
                cpus=cpus,
                memory_bytes=memory_bytes,
            )
            for cluster, job_id, submit_s, restart, number, host, cpus, memory_bytes in rows
        )

    def take(self, run: JobKey, demand: Demand, hosts: Iterable[Host], *, avoid: tuple[str, ...] = ()) -> Answer:
        """Take room for all guests of the demand, or none; hosts in ``avoid`` only where no other has room.

        What is asked and what is taken is one transaction.
        """
        self._database.execute("BEGIN IMMEDIATE")
        try:
            places = self.all()
            used = [_with_used(host, places) for host in hosts]
            answer = place(used, demand, policy=self._policy, overcommit=self._overcommit, without=avoid)
            if avoid and not isinstance(answer, Here):
                answer = place(used, demand, policy=self._policy, overcommit=self._overcommit)
            if isinstance(answer, Here):
                taken = {each.index for each in places if each.run == run}
                free = (number for number in range(len(taken) + demand.count) if number not in taken)
                rows = [
                    (run.cluster, run.job_id, run.submit_s, run.restart, number, host, demand.cpus, demand.memory_bytes)
                    for number, host in zip(free, answer.hosts, strict=True)
                ]
                self._database.executemany("INSERT INTO room VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
        return answer

    def give_back(self, run: JobKey, index: int) -> None:
        """Give one room back; one that is gone is fine."""
        self._database.execute(
            "DELETE FROM room WHERE cluster = ? AND job_id = ? AND submit_s = ? AND restart = ? AND number = ?",
            (run.cluster, run.job_id, run.submit_s, run.restart, index),
        )


def _with_used(host: Host, places: Iterable[Place]) -> Host:
    mine = [place for place in places if place.host == host.name]
    return Host(
        name=host.name,
        cpus=host.cpus,
        memory_bytes=host.memory_bytes,
        cpus_used=sum(place.cpus for place in mine),
        memory_used_bytes=sum(place.memory_bytes for place in mine),
        state=host.state,
        reason=host.reason,
    )
