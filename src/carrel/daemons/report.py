"""Telling carrelctld how this node is: best effort, never in anybody's way.

Each report is the whole state, so only the latest counts and a lost one costs nothing. Events wait, bounded,
until a report with them was taken; a controller that has started anew is told the last ones once more.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec

from carrel.config import Controller
from carrel.daemons import transport
from carrel.errors import CarrelError
from carrel.model.report import Event, NodeReport, ReportAnswer

EVENTS_MAX = 1000
"""The oldest are dropped beyond this: a journal is for people, the node goes on."""

_BACK_OFF_FIRST_S = 0.2
_BACK_OFF_MAX_S = 30.0
_GATHER_S = 0.05
"""Changes come in bursts (eight guests of a job): one report tells of them all."""

_LOG = logging.getLogger("carreld")


class Reporter:
    """Sends the node's state whenever ``poke`` or ``tell`` was called, and each ``period_s`` anyway."""

    def __init__(
        self,
        controller: Controller,
        look: Callable[[], Awaitable[NodeReport]],
        *,
        period_s: float,
        answered: Callable[[ReportAnswer], None] = lambda _: None,
    ) -> None:
        """Keep what is needed; ``run`` does the work.

        Args:
            controller: Where carrelctld listens.
            look: Returns the node's state now; its events are those given to ``tell``.
            period_s: A report is sent at least this often.
            answered: Told what the controller answers.
        """
        self._controller = controller
        self._look = look
        self._period_s = period_s
        self._answered = answered
        self._events: list[Event] = []
        self._told: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._listener = ""
        self._due = asyncio.Event()
        self._failures = 0

    def poke(self) -> None:
        """Something changed: report soon. Returns at once."""
        self._due.set()

    def tell(self, event: Event) -> None:
        """Add to the journal, and report soon. Returns at once."""
        self._events.append(event)
        del self._events[:-EVENTS_MAX]
        self._due.set()

    async def run(self) -> None:
        """Report until cancelled. A controller that is away is tried again, at most every 30 s."""
        self._due.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._due.wait()
            await asyncio.sleep(self._back_off_s())
            self._due.clear()
            try:
                await self.send()
            except Exception:  # noqa: BLE001  # a report that cannot be made is no reason to end the daemon
                _LOG.exception("not reported")
                self._failures += 1

    async def send(self) -> bool:
        """Send one report now; tell whether it was taken."""
        events = tuple(self._events)
        try:
            report = msgspec.structs.replace(await self._look(), events=events, sent_s=time.time())
            body = msgspec.json.encode(report)
            said = transport.decoded(await transport.request(self._controller, "POST", "/v1/reports", body))
            answer = msgspec.convert(said or {}, ReportAnswer)  # one of an older release says nothing
            self._answered(answer)
        except CarrelError as error:
            if not self._failures:
                _LOG.warning("not reported, trying again: %s", error)
            self._failures += 1
            self._due.set()
            return False
        if self._failures:
            _LOG.warning("reported again after %d failures", self._failures)
        self._failures = 0
        for event in events:
            # Events told meanwhile stay; of those sent, some may have been dropped already.
            with contextlib.suppress(ValueError):
                self._events.remove(event)
        self._told.extend(events)
        if self._listener not in {"", answer.controller}:
            self._events = [*self._told, *self._events]
            self._told.clear()
            self._due.set()
        self._listener = answer.controller
        return True

    def _back_off_s(self) -> float:
        if not self._failures:
            return _GATHER_S
        return float(min(_BACK_OFF_FIRST_S * 2 ** min(self._failures, 16), _BACK_OFF_MAX_S))
