"""A sampler in its thread, and another one when it dies."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import msgspec

from carrel.daemons.ldms import LdmsSampler
from carrel.model.sample import SamplerStatus
from carrel.sampling.loop import Sampler

ANSWER_TIMEOUT_S = 30.0
RETRY_S = 30.0
STUCK_S = 120.0
"""A sampler looks at the time once a minute at least."""

_LOG = logging.getLogger("carreld")
_T = TypeVar("_T")

JobSampler = Sampler | LdmsSampler
"""Whichever samples the jobs of this node; both are asked in the same way."""
_S = TypeVar("_S", bound=JobSampler)


class SamplerThread(Generic[_S]):
    """Keeps one sampler running."""

    def __init__(self, make: Callable[[], _S], *, failed: Callable[[str, Exception], None]) -> None:
        """Start nothing yet.

        Args:
            make: Returns a new sampler.
            failed: Told why one ended, in its thread.
        """
        self._make = make
        self._failed = failed
        self._thread: threading.Thread | None = None
        self._restart_at_s = 0.0
        self.sampler: _S | None = None
        """None: there is none now."""

    def mind(self) -> bool:
        """Start one where none runs; tell whether it is a new one, that samples nothing yet."""
        if self._thread is not None and self._thread.is_alive():
            return False
        if time.monotonic() < self._restart_at_s:
            return False
        self._restart_at_s = time.monotonic() + RETRY_S
        self.sampler = sampler = self._make()
        self._thread = threading.Thread(target=self._run, args=(sampler,), name="carrel-sampler", daemon=True)
        self._thread.start()
        return True

    def _run(self, sampler: _S) -> None:
        try:
            sampler.run()
        except Exception as error:  # noqa: BLE001  # the next one starts in RETRY_S, and people are told
            _LOG.exception("the sampler has ended")
            self._failed("sampler", error)

    async def stop(self) -> None:
        """End it; one that hangs is left behind."""
        if self.sampler and self._thread:
            self.sampler.stop()
            await asyncio.to_thread(self._thread.join, ANSWER_TIMEOUT_S)

    def status(self) -> SamplerStatus:
        """Return how it is doing, and whether it still does anything."""
        if self.sampler is None:
            return SamplerStatus()
        found = self.sampler.status()
        silent_s = time.time() - found.awake_s
        if found.awake_s and silent_s > STUCK_S:
            return msgspec.structs.replace(found, fault=f"the sampler hangs since {silent_s:.0f} s")
        return found


async def answer(future: "Future[_T]") -> _T:
    """Return what a sampler answers.

    Raises:
        TimeoutError: it did not in time; it may still do what it was asked for.
    """
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        # The sampler's own future is never cancelled: it could not be answered then.
        return await asyncio.shield(asyncio.wrap_future(future))
