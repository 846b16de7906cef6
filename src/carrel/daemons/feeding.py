"""The process that feeds the sinks, as carreld starts it: again whenever it has ended, and at the lowest priority.

It dies with carreld; where it cannot be started, samples wait in their segments, and no job waits for anything.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import msgspec

from carrel import config
from carrel.daemons import sinks
from carrel.model.shipping import ShippingStatus, SinkStatus

RESTART_MIN_S = 1.0
RESTART_MAX_S = 60.0
STEADY_S = 60.0
"""What has run for so long was well: it is started again at once."""
STOP_TIMEOUT_S = 10.0
STUCK_S = 60.0
"""Its status is written each second; the first one comes when it has started."""

# The lowest priority; and the kernel ends it with carreld, which would otherwise start a second one. It is not started
# by the command ``carrel serve sinks``, which needs 10 MB for its own reading of the command line.
_CHILD = ("nice", "-n", "19", "setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "carrel.daemons.sinks")
_ENV = {"MALLOC_ARENA_MAX": "1"}
"""A heap for each of librdkafka's threads, which do little with it, would be 2 MB more."""
_LOG = logging.getLogger("carreld")


class Feeding:
    """Keeps the process of one node alive."""

    def __init__(self, settings: config.Config, node: str) -> None:
        """Start nothing yet."""
        self._settings = settings
        self._node = node
        self._last_words = ""
        self._began_s = time.time()

    async def run(self) -> None:
        """Keep it alive until cancelled; without sinks, only until what earlier ones left is tidied up."""
        pause_s = RESTART_MIN_S
        while self._wanted():
            began_s = time.monotonic()
            try:
                await self._once()
            except OSError as error:
                self._last_words = str(error)
            if time.monotonic() - began_s > STEADY_S:
                pause_s = RESTART_MIN_S
            _LOG.warning("the process that feeds the sinks has ended (%s); again in %g s", self._last_words, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RESTART_MAX_S)
        await asyncio.Event().wait()

    def _wanted(self) -> bool:
        entries = sinks.directory(self._settings, self._node) / "entries"
        return bool(self._settings.metrics.sinks) or any(_names(entries))

    async def _once(self) -> None:
        child = await asyncio.create_subprocess_exec(
            *_CHILD, self._node, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=os.environ | _ENV
        )
        try:
            await self._listen(child)
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                try:
                    await asyncio.wait_for(child.wait(), STOP_TIMEOUT_S)
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):  # it ended just now
                        child.kill()
                    await child.wait()

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        """Pass on to the log what it says, and keep the last line: it says why it ended."""
        lines = child.stderr
        while lines is not None:
            try:
                line = await lines.readline()
            except ValueError:  # longer than any line should be
                continue
            if not line:
                break
            self._last_words = line.decode(errors="replace").strip()
            print(self._last_words, file=sys.stderr, flush=True)  # noqa: T201  # the service's log
        await child.wait()

    def status(self) -> tuple[SinkStatus, ...]:
        """Return how the sinks are doing; each has an error while nobody feeds it."""
        names = self._settings.metrics.sinks
        if not names:
            return ()
        found = sinks.load_status(self._settings, self._node)
        fault = self._fault(found)
        known = {one.name: one for one in found.sinks} if found else {}
        return tuple(_with_fault(known.get(name, SinkStatus(name=name)), fault) for name in names)

    def _fault(self, found: ShippingStatus | None) -> str:
        if time.time() - max(found.time_s if found else 0.0, self._began_s) < STUCK_S:
            return ""
        return f"no process feeds the sinks; the last one said: {self._last_words or 'nothing'}"


def _with_fault(status: SinkStatus, fault: str) -> SinkStatus:
    return msgspec.structs.replace(status, error=fault) if fault else status


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  # an iterator would stay open
    except OSError:
        return []
