"""What becomes of a workload on a site: discrete events around the very queue and placement that the controller runs.

A job waits, takes its places, has its guests cloned, runs for as long as its trace says, and gives the places back.
Simulated are arrivals, clones, failures of clones, and ends; every decision between them is
``carrel.core.queue`` and ``carrel.core.placement``.

Not simulated: that clones disturb each other, that CPUs promised twice are slower, that Slurm takes its time.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

import msgspec

from carrel.config import Launches
from carrel.core.placement import Hosts
from carrel.core.queue import Cancel, Hold, Launch, Outcome, Queue, Release, Waiting
from carrel.core.workload import Arrival
from carrel.model.guest import Clone
from carrel.model.host import Answer, Host, Overcommit, Policy

_SHORT_S = 10.0
"""A shorter job counts as one of this length in the bounded slow-down, or one second's wait would be a disaster."""
_BINS_MAX = 1024
_NEVER_S = float("inf")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A site and how it is run."""

    hosts: tuple[Host, ...]
    policy: Policy
    clone: Clone
    clone_s: float
    """From its place until its guests are there."""
    launches: Launches
    overcommit: Overcommit = Overcommit()
    failures: float = 0.0
    """The part of clones that fail."""
    seed: int = 0


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How an amount is spread over jobs."""

    mean: float
    median: float
    p95: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    policy: Policy
    clone: Clone
    clone_s: float
    jobs: int
    done: int
    cancelled: int
    held: int
    launches: int
    makespan_s: float
    """From the first submission to the last end."""
    utilisation: float
    """CPU time in which jobs ran, of what the hosts' CPUs have within the makespan."""
    cloning: float
    """The same of the time in which places waited for their guests."""
    throughput_per_h: float
    wait_s: Spread
    slowdown: Spread
    """(wait + run) / run, bounded."""
    events: int
    busy: tuple[float, ...]
    """The utilisation over time, in bins of ``bin_s``."""
    bin_s: float


class Busy:
    """CPUs in use over time: its integral, in bins that become wider as time goes on, so that a year fits too."""

    def __init__(self, began_s: float) -> None:
        """Begin with nothing in use."""
        self.bin_s = 1.0
        self.bins: list[float] = []
        self._began_s = began_s
        self._at_s = 0.0
        self._cpus = 0

    def change(self, cpus: int, now_s: float) -> None:
        """Note that so many CPUs more are in use from now on."""
        self._until(now_s - self._began_s)
        self._cpus += cpus

    def cpu_s(self) -> float:
        return sum(self.bins)

    def _until(self, to_s: float) -> None:
        while self._at_s < to_s:
            at = int(self._at_s / self.bin_s)
            if at >= _BINS_MAX:
                self.bins = [sum(self.bins[pair : pair + 2]) for pair in range(0, len(self.bins), 2)]
                self.bin_s *= 2
                continue
            # Where rounding puts the end of this bin at its very beginning, time would stand still.
            next_s = max(min(to_s, (at + 1) * self.bin_s), math.nextafter(self._at_s, math.inf))
            self.bins += [0.0] * (at + 1 - len(self.bins))
            self.bins[at] += self._cpus * (next_s - self._at_s)
            self._at_s = next_s


class Simulation:
    """One history. ``run`` is called once."""

    def __init__(self, setting: Setting) -> None:
        """Build the site."""
        self._setting = setting
        self._random = Random(setting.seed)  # noqa: S311  # it keeps no secret
        self.hosts = Hosts(setting.hosts, policy=setting.policy, overcommit=setting.overcommit, random=self._random)
        self._queue = Queue(setting.launches)
        self._events: list[tuple[float, int, str]] = []
        """When, in which order, and whose guests are there, or whose job ends."""
        self._pushed = 0
        self._arrived = 0
        self._jobs: dict[str, Arrival] = {}
        self._launched: dict[str, Launch] = {}
        self._running: set[str] = set()
        self._busy = Busy(0.0)
        self._counts = Counter[str]()
        self._cloning_cpu_s = 0.0
        self._waits: list[float] = []
        self._slowdowns: list[float] = []

    def run(
        self, arrivals: Iterable[Arrival], *, tell: Callable[[int], None] | None = None, tell_every: int = 10_000
    ) -> Summary:
        """Let all jobs come and go; ``tell`` hears how many have ended, whenever so many more have.

        The arrivals come in the order of their submission.
        """
        coming = iter(arrivals)
        following = next(coming, None)
        first_s = now_s = following.at_s if following else 0.0
        self._busy = Busy(first_s)
        told = 0
        while (next_s := self._next_s(following)) != _NEVER_S:
            now_s = max(now_s, next_s)
            while following is not None and following.at_s <= now_s:
                self._arrive(following)
                following = next(coming, None)
            while self._events and self._events[0][0] <= now_s:
                self._happens(heapq.heappop(self._events)[2], now_s)
            for decision in self._queue.launches(now_s, self._admit):
                self._decided(decision, now_s)
            if tell is not None and self._arrived - len(self._jobs) >= told + tell_every:
                told = self._arrived - len(self._jobs)
                tell(told)
        if self._jobs:
            raise AssertionError(f"{len(self._jobs)} jobs have neither ended nor anything to wait for")
        return self._summary(now_s - first_s)

    def _next_s(self, following: Arrival | None) -> float:
        wake_s = self._queue.wake_s() if len(self._queue) else None
        return min(
            following.at_s if following else _NEVER_S,
            self._events[0][0] if self._events else _NEVER_S,
            _NEVER_S if wake_s is None else wake_s,
        )

    def _admit(self, waiting: Waiting, without: frozenset[str]) -> Answer:
        return self.hosts.admit(waiting.demand, without=without)

    def _arrive(self, arrival: Arrival) -> None:
        self._arrived += 1
        key = str(self._arrived)
        self._jobs[key] = arrival
        clone = self._setting.clone
        self._queue.add(Waiting(key=key, clone=clone, image="", demand=arrival.demand, since_s=arrival.at_s))

    def _decided(self, decision: Launch | Cancel, now_s: float) -> None:
        if isinstance(decision, Cancel):
            self._leave(decision.key, "cancelled")
            return
        key = decision.waiting.key
        self._counts["launches"] += 1
        self._launched[key] = decision
        self._cloning_cpu_s += self._setting.clone_s * _cpus(decision)
        self._push(now_s + self._setting.clone_s, key)

    def _happens(self, key: str, now_s: float) -> None:
        """A job's guests are there, or failed; or it ends."""
        self._counts["events"] += 1
        launch = self._launched[key]
        if key in self._running:
            self._running.remove(key)
            self._busy.change(-_cpus(launch), now_s)
            self._leave(key, "done")
        else:
            failed = self._random.random() < self._setting.failures
            outcome = Outcome(result="failed", reason="the clone failed") if failed else Outcome(result="ready")
            action = self._queue.result(key, outcome, now_s)
            if isinstance(action, Release):
                self._start(key, launch, now_s)
                return
            if isinstance(action, Hold):
                self._leave(key, "held")
        del self._launched[key]
        self.hosts.give_back(launch.here, launch.waiting.demand)
        self._queue.freed()

    def _start(self, key: str, launch: Launch, now_s: float) -> None:
        arrival = self._jobs[key]
        wait_s = now_s - arrival.at_s
        self._waits.append(wait_s)
        self._slowdowns.append(max(1.0, (wait_s + arrival.run_s) / max(arrival.run_s, _SHORT_S)))
        self._running.add(key)
        self._busy.change(_cpus(launch), now_s)
        self._push(now_s + arrival.run_s, key)

    def _leave(self, key: str, how: str) -> None:
        del self._jobs[key]
        self._counts[how] += 1

    def _push(self, at_s: float, key: str) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (at_s, self._pushed, key))

    def _summary(self, makespan_s: float) -> Summary:
        setting = self._setting
        cpus = sum(host.cpus for host in setting.hosts)
        whole_cpu_s = cpus * makespan_s or 1.0
        done = self._counts["done"]
        return Summary(
            policy=setting.policy,
            clone=setting.clone,
            clone_s=setting.clone_s,
            jobs=self._arrived,
            done=done,
            cancelled=self._counts["cancelled"],
            held=self._counts["held"],
            launches=self._counts["launches"],
            makespan_s=makespan_s,
            utilisation=self._busy.cpu_s() / whole_cpu_s,
            cloning=self._cloning_cpu_s / whole_cpu_s,
            throughput_per_h=done * 3600 / (makespan_s or 1.0),
            wait_s=_spread(self._waits),
            slowdown=_spread(self._slowdowns),
            events=self._counts["events"] + self._arrived,
            busy=tuple(cpu_s / (self._busy.bin_s * cpus) for cpu_s in self._busy.bins),
            bin_s=self._busy.bin_s,
        )


def _cpus(launch: Launch) -> int:
    return launch.waiting.demand.cpus * launch.waiting.demand.count


def _spread(values: list[float]) -> Spread:
    if not values:
        return Spread(mean=0.0, median=0.0, p95=0.0)
    ordered = sorted(values)
    at = [ordered[min(int(part * len(ordered)), len(ordered) - 1)] for part in (0.5, 0.95)]
    return Spread(mean=sum(ordered) / len(ordered), median=at[0], p95=at[1])
