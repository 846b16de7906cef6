"""Looking around: what no hook told. A lost prolog, epilog or goodbye makes a step late here, never missing.

Slurm is asked only when something looks wrong, or once a minute while there are guests: ten thousand nodes that
ask every two seconds would be a load of their own.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carrel.core import guests as decide
from carrel.daemons import console
from carrel.errors import CarrelError, UnreachableError
from carrel.model.guest import Guest
from carrel.model.job import Job
from carrel.slurm import cgroups

if TYPE_CHECKING:
    from carrel.daemons.node import Node

GRACE_S = 10.0
LOOK_MAX_S = 30.0
LOOK_MIN_S = 4.0


class Sweep:
    """The look-around of one node."""

    def __init__(self, node: "Node") -> None:
        """Look around ``node``."""
        self._node = node
        self._asked_s = 0.0
        self._pause_s = LOOK_MIN_S

    async def run(self) -> None:
        """Look around until cancelled; a look that fails is told and repeated."""
        while True:
            try:
                await self.look()
            except (CarrelError, OSError) as error:
                self._node.journal.add("sweep-failed", str(error))
            await asyncio.sleep(self._node.config.node.sweep_period_s)

    async def look(self) -> None:
        """Look once."""
        guests = (await self._node.report()).guests
        limit_bytes = self._node.config.guests.console_bytes
        for guest in guests:
            if guest.console:
                console.bound(Path(guest.console), limit_bytes)
        await self._follow_suspensions(guests)
        for name in set(self._node.inside.guests()) - {guest.name for guest in guests}:
            self._node.inside.forget(name)
        await self._ask_slurm(guests)

    async def _ask_slurm(self, guests: tuple[Guest, ...]) -> None:
        marked = self._node.requests.all()
        if not guests and not marked:
            self._pause_s = LOOK_MIN_S
            return
        suspicious = any(guest.tasks == 0 and guest.state != "starting" for guest in guests)
        now_s = time.monotonic()
        if now_s - self._asked_s < (self._pause_s if suspicious else LOOK_MAX_S):
            return
        self._asked_s = now_s
        try:
            jobs = await self._node.scheduler.jobs()
        except UnreachableError:
            return  # cannot tell: nothing is swept on that
        swept = await self._sweep(jobs)
        alive = {job.key.job_id for job in jobs if decide.living(job) or job.state in {"pending", "held"}}
        for job_id in set(marked) - alive:
            self._node.requests.remove(job_id)
        self._pause_s = LOOK_MIN_S if swept or not suspicious else min(LOOK_MAX_S, self._pause_s * 2)

    async def _sweep(self, jobs: Sequence[Job]) -> bool:
        guests = (await self._node.report()).guests  # after Slurm was looked at, or a new guest would lack its job
        names = decide.orphans(guests, jobs, now_s=time.time(), grace_s=GRACE_S)
        for guest in guests:
            if guest.name in names:
                await self._node.driver(guest.driver).destroy(guest.name)
                self._node.inside.forget(guest.name)
                job_id = guest.run.job_id if guest.run else 0
                text = "swept: no living job owns it"
                self._node.journal.add("guest-gone", text, job_id=job_id, guest=guest.name, uid=guest.uid)
                self._node.reporter.poke()
        return bool(names)

    async def _follow_suspensions(self, guests: tuple[Guest, ...]) -> None:
        """Stop the guests of suspended jobs. Slurm suspends the tasks; QEMU stands beside them."""
        for guest in guests:
            tasks = self._node.inside.living(guest.name)
            if guest.state not in {"ready", "suspended"} or not tasks:
                continue
            wanted = all(cgroups.suspended(task.number) for task in tasks)
            if wanted == (guest.state == "suspended"):
                continue
            await self._node.driver(guest.driver).suspend(guest.name, suspended=wanted)
            self._say_suspended(guest, suspended=wanted)

    def _say_suspended(self, guest: Guest, *, suspended: bool) -> None:
        what, text = ("guest-suspended", "its job is suspended") if suspended else ("guest-resumed", "its job goes on")
        job_id = guest.run.job_id if guest.run else 0
        self._node.journal.add(what, text, job_id=job_id, guest=guest.name, uid=guest.uid)
        self._node.reporter.poke()
