"""Looking around: what no hook told. A lost prolog, epilog or goodbye makes a step late here, never missing.

Slurm is asked only when something looks wrong, or once a minute while there are guests: ten thousand nodes that
ask every two seconds would be a load of their own.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carrel.core import guests as decide
from carrel.daemons import console
from carrel.errors import UnreachableError
from carrel.model.guest import Guest
from carrel.model.job import Job
from carrel.slurm import cgroups

if TYPE_CHECKING:
    from carrel.daemons.node import Node

GRACE_S = 10.0
LOOK_MAX_S = 30.0
LOOK_MIN_S = 4.0

_LOG = logging.getLogger("carreld")


class Sweep:
    """The look-around of one node."""

    def __init__(self, node: "Node") -> None:
        """Look around ``node``."""
        self._node = node
        self._asked_s = 0.0
        self._pause_s = LOOK_MIN_S
        self._following: dict[str, asyncio.Task[None]] = {}
        """Guests that are being stopped or continued just now: theirs may take its time, the others' may not wait."""
        self._followed: set[str] = set()
        """Guests that this process once told whether they are suspended; the one before it may have died over that."""

    async def run(self) -> None:
        """Look around until cancelled; a look that fails is told and repeated."""
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  # one odd guest must not end the look at all others
                _LOG.exception("a look around failed")
                self._node.journal.add("sweep-failed", str(error))
            await asyncio.sleep(self._node.config.node.sweep_period_s)

    async def look(self) -> None:
        """Look once."""
        guests = (await self._node.report()).guests
        limit_bytes = self._node.config.guests.console_bytes
        for guest in guests:
            if guest.console:
                console.bound(Path(guest.console), limit_bytes)
        self._follow_suspensions(guests)
        self._node.metrics.look_at(guests)
        for name in set(self._node.inside.guests()) - {guest.name for guest in guests}:
            self._node.inside.forget(name)
        await self._ask_slurm(guests)

    async def _ask_slurm(self, guests: tuple[Guest, ...]) -> None:
        marked = self._node.requests.all()
        unsure = self._node.metrics.suspicious()
        if not guests and not marked and not unsure:
            self._pause_s = LOOK_MIN_S
            return
        suspicious = unsure or any(guest.tasks == 0 and guest.state != "starting" for guest in guests)
        now_s = time.monotonic()
        if now_s - self._asked_s < (self._pause_s if suspicious else LOOK_MAX_S):
            return
        self._asked_s = now_s
        try:
            jobs = await self._node.scheduler.jobs()
        except UnreachableError:
            return  # cannot tell: nothing is swept on that
        self._node.metrics.compare(jobs)
        swept = await self._sweep(jobs)
        alive = {job.key.job_id for job in jobs if decide.living(job) or job.state in {"pending", "held"}}
        for job_id in set(marked) - alive:
            self._node.requests.remove(job_id)
        self._pause_s = LOOK_MIN_S if swept or not suspicious else min(LOOK_MAX_S, self._pause_s * 2)

    async def _sweep(self, jobs: Sequence[Job]) -> bool:
        guests = (await self._node.report()).guests  # after Slurm was looked at, or a new guest would lack its job
        names = decide.orphans(guests, jobs, now_s=time.time(), grace_s=GRACE_S)
        orphans = [guest for guest in guests if guest.name in names]
        ends = await asyncio.gather(*(self._destroy(guest) for guest in orphans), return_exceptions=True)
        for guest, end in zip(orphans, ends, strict=True):
            if isinstance(end, Exception):
                self._say("sweep-failed", f"{end}", guest)
        return bool(orphans)

    async def _destroy(self, guest: Guest) -> None:
        await self._node.end(guest)
        self._say("guest-gone", "swept: no living job owns it", guest)

    def _follow_suspensions(self, guests: tuple[Guest, ...]) -> None:
        """Stop the guests of suspended jobs. Slurm suspends the tasks; QEMU stands beside them."""
        self._followed &= {guest.name for guest in guests}
        for guest in guests:
            tasks = self._node.inside.living(guest.name)
            if guest.state not in {"ready", "suspended"} or not tasks or guest.name in self._following:
                continue
            wanted = all(cgroups.suspended(task.number) for task in tasks)
            if wanted != (guest.state == "suspended") or guest.name not in self._followed:
                self._following[guest.name] = asyncio.ensure_future(self._suspend(guest, suspended=wanted))

    async def _suspend(self, guest: Guest, *, suspended: bool) -> None:
        try:
            await self._node.driver(guest.driver).suspend(guest.name, suspended=suspended)
        except Exception as error:  # noqa: BLE001  # a user may stop or disturb his own QEMU
            self._say("sweep-failed", f"not {'suspended' if suspended else 'resumed'} yet: {error}", guest)
            return
        finally:
            del self._following[guest.name]
        self._followed.add(guest.name)
        if suspended != (guest.state == "suspended"):
            what, text = ("suspended", "its job is suspended") if suspended else ("resumed", "its job goes on")
            self._say(f"guest-{what}", text, guest)

    def _say(self, what: str, text: str, guest: Guest) -> None:
        job_id = guest.run.job_id if guest.run else 0
        self._node.journal.add(what, text, job_id=job_id, guest=guest.name, uid=guest.uid)
        self._node.reporter.poke()
