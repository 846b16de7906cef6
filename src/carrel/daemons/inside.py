"""The second view of a guest's job: what its own kernel counts, sampled beside what is seen from outside.

Each guest has a sampler and a thread of its own: one that is slow, stopped or malicious delays nobody's samples but
its own. The tables are made with those of the first view, when the job has ended.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from carrel.config import Metrics
from carrel.daemons.sampler_thread import SamplerThread, answer
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.guest import Agent, Guest
from carrel.model.job import Job, JobKey
from carrel.ports import Driver
from carrel.sampling.inside import GuestFiles
from carrel.sampling.loop import Sampler
from carrel.sampling.spool import Spool

EXCHANGE_TIMEOUT_S = 5.0
END_TIMEOUT_S = 2.0
"""An epilog waits no longer for a last sample from inside."""
TRIES = 3
"""A guest that has an older agent, or none that answers, is not asked for ever."""
GUESTS_MAX = 64
"""Threads; those beyond are seen from outside alone."""


class Seen(NamedTuple):
    """A guest that is looked into."""

    run: JobKey
    files: GuestFiles
    thread: SamplerThread[Sampler]


class GuestViews:
    """Looks into all guests of a node that let themselves be looked into."""

    def __init__(
        self,
        settings: Metrics,
        driver: Callable[[str], Driver],
        job: Callable[[Guest], tuple[Job, float | None] | None],
        *,
        spool: Spool | None = None,
        failed: Callable[[str, Exception], None],
    ) -> None:
        """Look at nobody yet.

        Args:
            settings: The site's.
            driver: Returns the driver of this name.
            job: Returns a guest's run if it is sampled, and the interval that was chosen for it; None: it is not.
            spool: Where sinks find what they have to take; None: there are none.
            failed: Told of what went wrong.
        """
        self._settings = settings
        self._driver = driver
        self._job = job
        self._spool = spool
        self._failed = failed
        self._seen: dict[str, Seen] = {}
        self._beginning: dict[str, asyncio.Task[None]] = {}
        self._closing: dict[str, tuple[JobKey, asyncio.Task[None]]] = {}
        self._tries: Counter[str] = Counter()
        self._without: set[str] = set()
        """Guests that cannot be looked into, now and for ever."""

    def look(self, guests: Sequence[Guest]) -> None:
        """Begin with those that are ready, and let go of those that are gone. Returns at once."""
        names = {guest.name for guest in guests}
        self._without &= names
        for name in self._seen.keys() - names:
            self._let_go(name)
        for guest in guests:
            seen = self._seen.get(guest.name)
            if seen and seen.files.gone and guest.name not in self._beginning:
                self._let_go(guest.name)
            self.begin(guest)

    def begin(self, guest: Guest) -> None:
        """Look into a guest that is ready. A second call changes nothing. Returns at once."""
        known = guest.name in self._seen or guest.name in self._beginning or guest.name in self._without
        if known or guest.state != "ready" or guest.run is None or len(self._seen) >= GUESTS_MAX:
            return
        found = self._job(guest)
        if found is not None:
            task = asyncio.ensure_future(self._begin(guest, *found))
            self._beginning[guest.name] = task
            task.add_done_callback(lambda _: self._beginning.pop(guest.name, None))

    async def _begin(self, guest: Guest, job: Job, interval_s: float | None) -> None:
        try:
            entry = await self._driver(guest.driver).enter(guest.name, f"carrel.m.{secrets.token_hex(4)}")
            if not isinstance(entry, Agent):
                self._without.add(guest.name)
                return
            self._seen[guest.name] = seen = self._made(guest, job.key, entry.fd)
            await asyncio.to_thread(seen.thread.mind)
            if seen.files.gone:
                raise UnreachableError(f"guest {guest.name} cannot be looked into: {seen.files.why}")
            if seen.thread.sampler is not None:
                inside = msgspec.structs.replace(job, cpus=guest.cpus, memory_bytes=guest.memory_bytes)
                await answer(seen.thread.sampler.add(inside, interval_s=interval_s))
                del self._tries[guest.name]
        except RefusedError:
            self._without.add(guest.name)  # it is down already, or its samples are finished
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("guest", error)
            self._tries[guest.name] += 1
            if self._tries[guest.name] >= TRIES:
                self._without.add(guest.name)

    def _made(self, guest: Guest, run: JobKey, descriptor: int) -> Seen:
        files = GuestFiles(descriptor, timeout_s=EXCHANGE_TIMEOUT_S)
        name = guest.node if guest.per != "task" else f"{guest.node}:{guest.step}.{guest.task}"

        def sampler() -> Sampler:
            try:
                return Sampler(self._settings, name, view="guest", inside=files, spool=self._spool)
            except BaseException:
                files.close()
                raise

        return Seen(run, files, SamplerThread(sampler, failed=self._failed))

    def _let_go(self, name: str) -> None:
        seen = self._seen.pop(name)
        seen.files.abandon()
        asyncio.ensure_future(seen.thread.stop())  # noqa: RUF006  # it ends by itself, within a bound

    async def end(self, name: str) -> None:
        """Take the last sample of a guest that shall end now, if it has one to give in time; the disk comes later."""
        if beginning := self._beginning.get(name):
            await asyncio.wait([beginning], timeout=END_TIMEOUT_S)
        if name not in self._seen:
            return
        seen = self._seen[name]
        try:
            if seen.thread.sampler is not None and not seen.files.gone:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await answer(seen.thread.sampler.sample(seen.run))
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("guest", error)
        if self._seen.get(name) is seen:
            del self._seen[name]
            seen.files.abandon()
            self._closing[name] = seen.run, asyncio.ensure_future(self._close(name, seen))

    async def _close(self, name: str, seen: Seen) -> None:
        try:
            if seen.thread.sampler is not None:
                (await answer(seen.thread.sampler.remove(seen.run))).close()
        except (OSError, CarrelError, TimeoutError) as error:
            self._failed("guest", error)
        await seen.thread.stop()
        self._closing.pop(name, None)

    async def end_run(self, run: JobKey) -> None:
        """End the views of all guests of a run."""
        await asyncio.gather(*(self.end(name) for name, seen in list(self._seen.items()) if seen.run == run))
        await asyncio.gather(*(closing for other, closing in list(self._closing.values()) if other == run))

    async def closed(self, name: str) -> None:
        """Return when the samples of a guest that has ended are on the disk."""
        if closing := self._closing.get(name):
            await closing[1]

    async def sample_every(self, run: JobKey, seconds: float) -> None:
        """Change how often the guests of a run are sampled.

        Raises:
            TimeoutError: one does not answer.
        """
        for seen in list(self._seen.values()):
            if seen.run == run and seen.thread.sampler is not None and run in seen.thread.sampler.runs():
                await answer(seen.thread.sampler.interval(run, seconds))

    async def stop(self) -> None:
        """Let go of all; the next carreld looks into them again."""
        for task in list(self._beginning.values()):
            task.cancel()
        threads = [seen.thread for seen in self._seen.values()]
        for name in list(self._seen):
            self._seen.pop(name).files.abandon()
        await asyncio.gather(*(thread.stop() for thread in threads))
