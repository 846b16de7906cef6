"""Jobs that wait for a guest that is a node, at a carrelctld that was given no hosts for any: they are told so.

``job_submit.lua`` refuses such jobs where it can read the same settings. One that was submitted before these changed,
or where they cannot be read, would be held for ever without a word.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from carrel.config import Config
from carrel.errors import UnreachableError
from carrel.model.job import JobKey
from carrel.model.report import Event
from carrel.slurm.pool import SlurmPool

LOOK_PERIOD_S = 30.0
WHY = (
    "carrelctld was given no hosts for guests that are nodes; an administrator sets guest_nodes.hosts "
    "in carrel.toml and restarts it"
)

_LOG = logging.getLogger("carrelctld")


class Unserved:
    """It tells them why they wait, and does nothing else: hosts may be set at any time."""

    def __init__(self, settings: Config, *, tell: Callable[[Event], None], pool: SlurmPool | None = None) -> None:
        """Ask nobody yet.

        Args:
            settings: The site's.
            tell: Takes what happened, for ``carrel job show``.
            pool: Slurm; that of the settings, if none is given.
        """
        self._pool = pool or SlurmPool(settings.slurm, settings.guest_nodes.partition)
        self._tell = tell
        self._told: frozenset[JobKey] = frozenset()

    async def run(self) -> None:
        """Look now and then until cancelled."""
        while True:
            try:
                await self.look()
            except UnreachableError as error:  # most sites have no such partition
                _LOG.debug("guests as nodes: %s", error)
            await asyncio.sleep(LOOK_PERIOD_S)

    async def look(self) -> None:
        """Tell those that were not told yet.

        Raises:
            UnreachableError: Slurm did not answer, or has no such partition.
        """
        names = await self._pool.names()
        if not any("CLOUD" in node.state for node in names.values()):
            return  # a partition of that name whose nodes are machines is none of ours
        look = await self._pool.look()
        waiting = {job.key: job for job in look.jobs if job.wish is not None and job.job.state == "held"}
        for run in waiting.keys() - self._told:
            job = waiting[run]
            await self._pool.tell(job, WHY)
            _LOG.warning("job-waits: %s job=%d", WHY, run.job_id)
            self._tell(
                Event(
                    time_s=time.time(),
                    node="carrelctld",
                    what="job-waits",
                    text=WHY,
                    job_id=run.job_id,
                    uid=job.job.uid,
                )
            )
        self._told = frozenset(waiting)
