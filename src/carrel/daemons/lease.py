"""The lease of ``offline = "open"``: what ``job_submit.lua`` may promise in silence, and what it did promise.

A part of each account is set aside in advance and written down for the Lua, with prices of whole nodes, which are never
too low. What the Lua takes it notes in the journal. When we are back, each of those jobs gets a lien of its own, out of
the money that the lease gives back in the same transaction, and the lease is made anew.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from carrel.bank import queries, runs
from carrel.core.bound import OVERRUN_S
from carrel.core.pricing import price
from carrel.daemons.banking import Bank
from carrel.daemons.counter import SEPARATOR, Counter
from carrel.errors import CarrelError
from carrel.model.cluster import ClusterFacts, PartitionFacts
from carrel.model.ledger import AnyCommand, Balance, Place, Receipt, Void
from carrel.model.price import MILLION, Priced

_LOG = logging.getLogger("carrelctld.bank")
_TTL_S = 30 * 86400
_RENEWED_S = 3600.0
_AT_ONCE = 200
_USER = "carrel-lease"
_PART = 10
"""At most this part of what an account has: a tenth."""


class Lease:
    """Keeps the lease of every account, and replays the journal."""

    def __init__(self, bank: Bank, counter: Counter) -> None:
        """Keep nothing yet."""
        self._bank, self._counter = bank, counter
        self._dir = Path(bank.settings.dir)
        self._renewed_s: float | None = None

    async def keep(self) -> None:
        """Replay what was taken in silence, and renew what that used up.

        Raises:
            UnreachableError: the ledger did not answer; the journal stays.
        """
        journal, taken = self._dir / "journal", self._dir / "journal.taken"
        if journal.exists() and not taken.exists():
            # The Lua begins another; of this one it may still end a line that it has open, which is there at once.
            journal.rename(taken)
        stale = self._renewed_s is None or time.monotonic() - self._renewed_s > _RENEWED_S
        if not (taken.exists() or stale):
            return
        lines = taken.read_text(errors="replace").splitlines() if taken.exists() else []
        await self._renew([command for line in lines if (command := await self._promised(line))])
        taken.unlink(missing_ok=True)
        self._renewed_s = time.monotonic()

    async def _promised(self, line: str) -> Place | None:
        """Return the lien of a job that was taken in silence; one that cannot be read is left to the rounds."""
        _, _, asked = line.partition(f"submit{SEPARATOR}")
        fields = dict(word.partition("=")[::2] for word in asked.split(SEPARATOR))
        try:
            return await self._counter.place(fields, fields.get("token", ""))
        except (CarrelError, ValueError) as error:
            _LOG.warning("a job that was taken in silence has no lien yet: %s", error)
            return None

    async def _renew(self, promised: Sequence[Place]) -> None:
        """Give the old lease back, place what it promised, and set the next one aside, in this order and at once."""
        name, store = self._bank.cluster_name, self._bank.ledger.store
        balances = await asyncio.to_thread(queries.balances, store)
        old = await asyncio.to_thread(runs.open_liens, store, cluster=name)
        number = self._bank.stamp()
        commands: list[AnyCommand] = [
            Void(key=f"v/{name}/{lien.id}", cluster=name, token=lien.token, reason="the lease is renewed")
            for lien in old
            if lien.user == _USER
        ]
        commands += promised
        shares = _shares(balances, self._ceiling())
        commands += [_set_aside(name, project, amount, number) for project, amount in shares.items()]
        granted: dict[str, int] = {}
        for at in range(0, len(commands), _AT_ONCE):
            some = commands[at : at + _AT_ONCE]
            for command, answer in zip(some, await self._bank.ledger.do_all(some), strict=True):
                if isinstance(command, Place) and command.user == _USER and isinstance(answer, Receipt):
                    granted[command.project] = command.amount_micro_su
        await asyncio.to_thread(self._write, number, granted)

    def _ceiling(self) -> int:
        """Return the price of all nodes for as many hours as the site says."""
        nodes = [_node_hour(self._bank, part) * len(part.nodes) for part in self._bank.cluster.partitions.values()]
        return max(nodes, default=0) * self._bank.settings.lease_hours

    def _write(self, number: str, granted: dict[str, int]) -> None:
        cluster = self._bank.cluster
        over = [cluster.over_time_s, *(part.over_time_s for part in cluster.partitions.values())]
        lines = []
        if "unlimited" not in over:
            lines.append(f"number {number} {OVERRUN_S + max(int(each) for each in over if each is not None)}")
            lines += _price_lines(self._bank, cluster)
            lines += [f"account {project} {amount}" for project, amount in granted.items()]
        new = self._dir / "lease.new"
        with new.open("w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._dir / "lease")


def _shares(balances: Iterable[Balance], ceiling: int) -> dict[str, int]:
    """Return how much of each project's money is set aside."""
    found: dict[str, int] = {}
    for each in balances:
        found[each.project] = found.get(each.project, 0) + max(0, each.available_micro_su + each.lien_micro_su)
    return {project: share for project, all_of_it in found.items() if (share := min(ceiling, all_of_it // _PART))}


def _set_aside(cluster: str, project: str, amount: int, number: str) -> Place:
    token = f"lease/{project}/{number}"
    return Place(
        key=f"l/{cluster}/{token}",
        cluster=cluster,
        token=token[:200],
        project=project,
        user=_USER,
        amount_micro_su=amount,
        ttl_s=_TTL_S,
    )


def _price_lines(bank: Bank, cluster: ClusterFacts) -> list[str]:
    lines = []
    for part in cluster.partitions.values():
        if amount := _node_hour(bank, part):
            limit = part.default_time_s or part.max_time_s
            default_s = 0 if limit == "unlimited" else int(limit)
            names = [part.name, "*"] if part.name == cluster.default_partition else [part.name]
            lines += [f"partition {name} {amount} {default_s}" for name in names]
    return lines


def _node_hour(bank: Bank, part: PartitionFacts) -> int:
    """Return what the dearest node costs for an hour, with all that it has, in the dearest QOS; 0: no price."""
    now = datetime.now(UTC)
    version = bank.book.at(now)
    members = [*part.nodes, *([part.hidden] if part.hidden else [])]
    if version is None or (listed := version.list_of(part.name)) is None:
        return 0
    factors = [MILLION, *version.qos_millionths.values(), *listed.qos_millionths.values()]
    dearest = 0
    for node in members:
        gres = {f"gres/{name}": count for name, count in node.gres.items()}
        has = {"cpu": node.cpus, "mem": node.memory_mib, "node": 1, **gres}
        found = price(bank.book, has, partition=part.name, qos="", seconds=3600, moment=now, rounding="up")
        if isinstance(found, Priced):
            dearest = max(dearest, -(-found.amount_micro_su * max(factors) // MILLION))
    return dearest
