"""Which waiting job gets guests next, and what becomes of it then. The controller and the simulator run this code.

It knows no clock, no Slurm and no driver: the time is passed in, and where a job goes is asked of ``admit``, which also
takes the place (a transaction over the host table, or ``carrel.core.placement.Hosts``). All it remembers is in memory.
After a restart the caller adds again what waits and adopts what was begun; attempts and suspicions begin anew.

==============  ================================================  ===========================================
result          means                                             action
==============  ================================================  ===========================================
``ready``       the guests are there                              Release: the job runs
``not-now``     the host had no room after all                    Wait: asked again; it is no failure
``failed``      a guest could not be made                         Retry after a while, elsewhere; then Hold
``never``       no host could ever carry it                       Cancel
``no-address``  the guest got no address                          Cancel
==============  ================================================  ===========================================

All but Release first unmake what there is of the guests and give the place back.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import msgspec

from carrel.config import Launches
from carrel.core.breaker import Breakers
from carrel.core.pacing import Pace, backoff_s
from carrel.model.guest import Clone
from carrel.model.host import Answer, Demand, Fault, Here, Never, NotNow

Result = Literal["ready", "not-now", "failed", "never", "no-address"]
Admit = Callable[["Waiting", frozenset[str]], Answer]
"""Take a place for a job, not on these hosts; it is taken when the answer is ``Here``, and only then."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A job that waits for its guests."""

    key: str
    """Its run."""
    clone: Clone
    image: str
    demand: Demand
    driver: str = ""
    """Which of the site's hosts it may go to; empty: any."""
    since_s: float
    """Its place in the queue; a retry keeps it."""
    attempts: int = 0
    """Failures so far."""
    without: frozenset[str] = frozenset()
    """Hosts where it failed; they are tried again only after all others."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a launch."""

    result: Result
    reason: str = ""
    """A sentence for the user."""
    host: str = ""
    """Where it failed; empty: not known, or on the only one."""
    fault: Fault = "unknown"


class Launch(msgspec.Struct, frozen=True):
    """Make these guests now; ``result`` shall hear how it went."""

    waiting: Waiting
    here: Here


class Release(msgspec.Struct, frozen=True):
    """Let the job run on its guests."""

    key: str


class Wait(msgspec.Struct, frozen=True):
    """The job waits on."""

    key: str
    reason: str


class Retry(msgspec.Struct, frozen=True):
    """The job is launched again, not before ``at_s``."""

    key: str
    at_s: float
    reason: str


class Hold(msgspec.Struct, frozen=True):
    """The site's fault, and too often: the job stays held until somebody looks at it."""

    key: str
    reason: str


class Cancel(msgspec.Struct, frozen=True):
    """It can never run: the job ends with the sentence."""

    key: str
    reason: str


Action = Release | Wait | Retry | Hold | Cancel
_Kind = tuple[Clone, str, Demand, str]
_NEVER_S = float("inf")
AGAIN_S = 15.0
"""When a job is asked about again that waits for what no end of a guest brings: nobody tells the queue of it."""


class Queue:
    """Jobs in the order in which they came. One that finds no room is passed by others, until its patience ends.

    Jobs that ask for the same thing form a line, and only its first is asked about: a queue of a million jobs has
    few different demands.
    """

    def __init__(self, settings: Launches) -> None:
        """Begin with nobody waiting."""
        self._settings = settings
        self._jobs: dict[str, Waiting] = {}
        """All that are here; in a line or a heap, whatever is not the very same object is a shadow of one that left."""
        self._lines: dict[_Kind, deque[Waiting]] = {}
        self._open: list[tuple[float, int, _Kind]] = []
        """The lines to ask about, by when their first came."""
        self._shut: dict[_Kind, None] = {}
        """The lines not to ask about before something changes; no set, for a run must repeat itself."""
        self._whys: dict[_Kind, str] = {}
        """Why a line waited when it was last asked about."""
        self._delayed: list[tuple[float, int, Waiting]] = []
        self._launched: dict[str, Launch] = {}
        self._reasons: dict[str, str] = {}
        """Of those that failed."""
        self._order = itertools.count()
        """What came first is first among equals."""
        self._wake_s = _NEVER_S
        self._impatient: _Kind | None = None
        rates = msgspec.structs.asdict(settings.rate)
        self._paces: dict[Clone, Pace] = {clone: Pace(rates[clone], settings.window_s) for clone in get_args(Clone)}
        self._breakers = Breakers(failures=settings.failures, rest_s=settings.rest_s, rest_max_s=settings.rest_max_s)

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    def __len__(self) -> int:
        """Return how many wait; those that are being launched do not."""
        return len(self._jobs) - len(self._launched)

    def add(self, waiting: Waiting) -> None:
        """Let a job wait; one that is here already stays as it is."""
        if waiting.key not in self._jobs:
            self._enter(waiting)

    def adopt(self, waiting: Waiting, here: Here) -> None:
        """Take over a launch that was begun before a restart."""
        self._jobs[waiting.key] = waiting
        self._launched[waiting.key] = Launch(waiting, here)

    def remove(self, key: str) -> Launch | None:
        """Forget a job; return its launch, which the caller unmakes. Absent before is fine."""
        waiting = self._jobs.pop(key, None)
        self._reasons.pop(key, None)
        if waiting is not None and _kind(waiting) == self._impatient:
            self.freed()  # whom it kept from passing may go
        launch = self._launched.pop(key, None)
        if launch is not None:
            self._breakers.gave_up(launch.here.hosts, launch.waiting.image)
        return launch

    def freed(self) -> None:
        """Note that there is room again, or a host more: everybody is asked about anew."""
        self._impatient = None
        for kind in self._shut:
            self._push(kind)
        self._shut.clear()

    def reason(self, key: str) -> str:
        """Return why a job waits, as a sentence for its user; empty: it does not."""
        waiting = self._jobs.get(key)
        if waiting is None or key in self._launched:
            return ""
        return self._whys.get(_kind(waiting)) or self._reasons.get(key) or "waits for its turn"

    def wake_s(self) -> float | None:
        """Return when to ask for launches again though nothing was added or freed; None: then nothing will be new."""
        at_s = min(self._wake_s, self._delayed[0][0]) if self._delayed else self._wake_s
        return None if at_s == _NEVER_S else at_s

    def launches(self, now_s: float, admit: Admit) -> Iterator[Launch | Cancel]:
        """Yield what begins now and what can never begin, until nothing more can be done now.

        The place is taken when a launch is yielded; it is the caller's, who makes the guests and tells ``result``.
        """
        self._wake(now_s)
        while self._open and self._impatient is None:
            since_s, _, kind = heapq.heappop(self._open)
            first = self._first(kind)
            if first is None or kind in self._shut:
                continue
            if first.since_s > since_s:  # whoever was asked about in this place has left
                self._push(kind)
                continue
            if why := self._obstacle(first, now_s):
                self._shut_line(kind, why)
                continue
            try:
                answer = self._ask(first, now_s, admit)
            except BaseException:
                self._push(kind)  # it was not asked about
                raise
            if isinstance(answer, NotNow):
                self._shut_line(kind, answer.reason)
                if answer.frees and now_s - first.since_s >= self._settings.patience_s:
                    self._impatient = kind
                continue
            self._lines[kind].popleft()
            self._push(kind)
            yield self._launch(first, answer, now_s) if isinstance(answer, Here) else self._never(first, answer)

    def result(self, key: str, outcome: Outcome, now_s: float) -> Action | None:
        """Return what to do with a launched job; None: it left meanwhile, so its guests are unmade and that is all."""
        launch = self._launched.pop(key, None)
        if launch is None:
            return None
        waiting, hosts = launch.waiting, launch.here.hosts
        if outcome.result == "failed":
            return self._failed(launch, outcome, now_s)
        if outcome.result == "not-now":
            self._breakers.gave_up(hosts, waiting.image)
            self._delay(waiting, now_s + self._settings.backoff_s, outcome.reason)
            return Wait(key, outcome.reason)
        del self._jobs[key]
        self._reasons.pop(key, None)
        if outcome.result == "ready":
            if self._breakers.succeeded(hosts, waiting.image):
                self.freed()  # what was left out is trusted again
            return Release(key)
        self._breakers.gave_up(hosts, waiting.image)
        return Cancel(key, outcome.reason)

    def _failed(self, launch: Launch, outcome: Outcome, now_s: float) -> Retry | Hold:
        waiting, hosts = launch.waiting, launch.here.hosts
        host = outcome.host or (hosts[0] if len(set(hosts)) == 1 else "")
        self._breakers.failed(host, waiting.image, fault=outcome.fault, now_s=now_s)
        # It tells nothing of its other hosts, nor of an image that is not at fault: theirs was no trial.
        self._breakers.gave_up(hosts, waiting.image)
        attempts = waiting.attempts + 1
        if attempts >= self._settings.attempts:
            del self._jobs[waiting.key]
            self._reasons.pop(waiting.key, None)
            return Hold(waiting.key, f"no guest after {attempts} attempts; the last: {outcome.reason}")
        wait_s = backoff_s(attempts, first_s=self._settings.backoff_s, most_s=self._settings.backoff_max_s)
        without = waiting.without | {host} if host else waiting.without
        again = msgspec.structs.replace(waiting, attempts=attempts, without=without)
        self._delay(again, now_s + wait_s, outcome.reason)
        return Retry(waiting.key, now_s + wait_s, outcome.reason)

    def _launch(self, waiting: Waiting, here: Here, now_s: float) -> Launch:
        self._paces[waiting.clone].note(waiting.demand.count, now_s)
        self._breakers.tried(here.hosts, waiting.image)
        self._launched[waiting.key] = launch = Launch(waiting, here)
        return launch

    def _never(self, waiting: Waiting, answer: Never) -> Cancel:
        del self._jobs[waiting.key]
        self._reasons.pop(waiting.key, None)
        return Cancel(waiting.key, answer.reason)

    def _ask(self, waiting: Waiting, now_s: float, admit: Admit) -> Answer:
        resting = self._breakers.resting_hosts(now_s)
        if resting:
            self._wake_at(self._breakers.next_s(now_s))
        answer = admit(waiting, resting | waiting.without)
        if isinstance(answer, NotNow) and waiting.without:
            answer = admit(waiting, resting)
        if isinstance(answer, NotNow) and resting:
            rest = f"{answer.reason}; {', '.join(sorted(resting))} must rest after failures"
            return msgspec.structs.replace(answer, reason=rest)
        if isinstance(answer, NotNow) and not answer.frees:
            self._wake_at(now_s + AGAIN_S)
        return answer

    def _obstacle(self, waiting: Waiting, now_s: float) -> str:
        """Return why the job is not even asked about."""
        if self._breakers.image_rests(waiting.image, now_s):
            self._wake_at(self._breakers.next_s(now_s))
            return f"image {waiting.image!r} rests after failures on several hosts"
        wait_s = self._paces[waiting.clone].wait_s(waiting.demand.count, now_s)
        if wait_s > 0:
            self._wake_at(now_s + wait_s)
            return f"as many {waiting.clone} clones were begun as the site allows in {self._settings.window_s:g} s"
        return ""

    def _wake(self, now_s: float) -> None:
        while self._delayed and self._delayed[0][0] <= now_s:
            _, _, waiting = heapq.heappop(self._delayed)
            if self._jobs.get(waiting.key) is waiting:
                self._enter(waiting)
        if self._wake_s <= now_s:
            self._wake_s = _NEVER_S
            self.freed()

    def _wake_at(self, at_s: float | None) -> None:
        if at_s is not None:
            self._wake_s = min(self._wake_s, at_s)

    def _delay(self, waiting: Waiting, at_s: float, reason: str) -> None:
        self._jobs[waiting.key] = waiting
        self._reasons[waiting.key] = reason
        heapq.heappush(self._delayed, (at_s, next(self._order), waiting))

    def _enter(self, waiting: Waiting) -> None:
        self._jobs[waiting.key] = waiting
        kind = _kind(waiting)
        line = self._lines.setdefault(kind, deque())
        at = len(line)
        while at and line[at - 1].since_s > waiting.since_s:
            at -= 1
        line.insert(at, waiting)
        if at == 0:
            self._push(kind)

    def _first(self, kind: _Kind) -> Waiting | None:
        """Return the first of a line that has not left; an empty line ends."""
        line = self._lines.get(kind)
        while line:
            if self._jobs.get(line[0].key) is line[0]:
                return line[0]
            line.popleft()
        self._lines.pop(kind, None)
        self._whys.pop(kind, None)
        return None

    def _shut_line(self, kind: _Kind, why: str) -> None:
        self._shut[kind] = None
        self._whys[kind] = why

    def _push(self, kind: _Kind) -> None:
        first = self._first(kind)
        if first is not None:
            heapq.heappush(self._open, (first.since_s, next(self._order), kind))


def _kind(waiting: Waiting) -> _Kind:
    return waiting.clone, waiting.image, waiting.demand, waiting.driver
