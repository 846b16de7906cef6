"""Runs that wait for room on a host: the queue of ``carrel.core.queue`` over the table of hosts.

The table remembers what was taken; the queue's own memory comes back from it, and from Slurm, after a restart.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from carrel.config import Launches
from carrel.core import guestdeeds as deeds
from carrel.core.queue import Cancel, Hold, Launch, Outcome, Queue, Waiting
from carrel.daemons.kinds import Kind, Kinds
from carrel.errors import CarrelError
from carrel.hosts.admission import Admission
from carrel.hosts.table import Place as Room
from carrel.model.host import Answer, Demand, Here, NotNow
from carrel.model.job import JobKey
from carrel.model.pool import Look, Place, PoolJob, room_name, run_of_room

NAMED_MAX = 3
"""So many hosts a sentence names."""

_LOG = logging.getLogger("carrelctld")


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What runs have of the hosts and of the shared list of addresses, at one time."""

    mark: int
    rooms: tuple[Room, ...]
    listed: frozenset[int]
    """Jobs of the shared list."""

    def places(self, cluster: str) -> tuple[Place, ...]:
        """Return the rooms that runs of this cluster have."""
        named = ((room, run_of_room(room.run, cluster)) for room in self.rooms)
        return tuple(
            Place(
                run=of[0],
                attempt=of[1],
                host=room.host,
                cpus=room.cpus,
                memory_bytes=room.memory_bytes,
                address=room.address,
            )
            for room, of in named
            if of is not None
        )


class Lines:
    """Who waits, who was begun, and who was given up."""

    def __init__(
        self, admission: Admission, settings: Launches, *, kinds: Kinds, clock: Callable[[], float] = time.time
    ) -> None:
        """Begin with nobody; ``adopt`` finds those of before."""
        self._admission = admission
        self._queue = Queue(settings)
        self._kinds = kinds
        self._clock = clock
        self._runs: dict[str, JobKey] = {}
        """Of those in the queue, by name."""
        self._attempts: dict[JobKey, int] = {}
        self._made: dict[JobKey, Kind] = {}
        """How the guests of those are made."""
        self._begun: set[JobKey] = set()
        self._given_up: dict[JobKey, str] = {}
        self._strangers: frozenset[str] = frozenset()
        """Hosts of the table that the settings do not name: nobody speaks for them, and none would begin a guest."""
        self._hosts: object = None
        """What was known of hosts when room was last looked for."""

    def begun(self) -> frozenset[JobKey]:
        """Return the runs that were let through and did not fail since."""
        return frozenset(self._begun)

    def given_up(self) -> dict[JobKey, str]:
        return dict(self._given_up)

    def taken(self) -> Taken:
        """Return what is taken. Blocks for a look at the table.

        Ask before you look at Slurm: a run takes nothing before Slurm knows it, so what is here then and not there is
        over. The other way round it may be a run that another controller has just let through.
        """
        table = self._admission.table
        mark, rooms = table.mark(), tuple(table.places())
        try:
            listed = frozenset(self._admission.listed_jobs())
        except CarrelError:  # those who need an address are told so, and nothing of it is given back meanwhile
            listed = frozenset()
        return Taken(mark=mark, rooms=rooms, listed=listed)

    def adopt(self, look: Look, places: Sequence[Place]) -> None:
        """Take over what an earlier controller let through."""
        jobs = {job.key: job for job in look.jobs if job.alive}
        taken: dict[tuple[JobKey, int], list[str]] = {}
        for place in places:
            taken.setdefault((place.run, place.attempt), []).append(place.host)
        for (run, attempt), hosts in sorted(taken.items()):
            known = str(run) in self._queue or run in self._begun or run in self._given_up
            if run in jobs and not known:
                try:
                    waiting = self._waiting(jobs[run])
                except CarrelError:  # its recipe has changed meanwhile: whoever makes its guests says what follows
                    continue
                self._queue.adopt(waiting, Here(tuple(hosts)))
                self._begin(run, attempt)

    def add(self, job: PoolJob, action: deeds.FindRoom) -> None:
        """Let a run stand in line; one that stands there already stays where it is. May read a file.

        Raises:
            CarrelError: no guests are made for such a request; the job's owner reads the sentence.
        """
        if job.key in self._begun:  # what was taken for it is lost, or was of another size
            self._begun.discard(job.key)
            self._queue.remove(str(job.key))
        if str(job.key) not in self._queue:
            waiting = self._waiting(job)
            self._runs[str(job.key)] = job.key
            self._queue.add(waiting)
        self._attempts[job.key] = action.attempt

    def launches(self, silent: Collection[str]) -> list[tuple[JobKey, Launch | Cancel]]:
        """Take room for those whose turn it is. Blocks for transactions, or for a site's placement command."""

        def admit(waiting: Waiting, without: frozenset[str]) -> Answer:
            return self._admit(waiting, without.union(silent, self._strangers))

        # A host that was added, or speaks again, or is drained no more, is room that nobody gave back.
        whys = tuple(self._kinds.why_silent(driver) for driver in sorted({one.driver for one in self._made.values()}))
        known = tuple((each.name, each.state, each.cpus) for each in self._admission.table.hosts())
        self._strangers = frozenset(name for name, *_ in known) - self._kinds.hosts
        hosts = (frozenset(silent), whys, known)
        if hosts != self._hosts:
            self._hosts = hosts
            self._queue.freed()
        found = []
        for action in self._queue.launches(self._clock(), admit):
            key = action.waiting.key if isinstance(action, Launch) else action.key
            run = self._runs[key]
            if isinstance(action, Launch):
                self._begin(run, self._attempts[run])
            found.append((run, action))
        return found

    def _admit(self, waiting: Waiting, without: frozenset[str]) -> Answer:
        run = self._runs[waiting.key]
        name, kind = room_name(run, self._attempts[run]), self._made[run]
        answer = self._admission.take(name, waiting.demand, without=without, only=self._kinds.only(kind.driver))
        if isinstance(answer, Here) and kind.pooled:
            if why := self._without_addresses(name, waiting.demand.count):
                with contextlib.suppress(CarrelError):  # its room goes first, and a sweep finds the rest
                    self._admission.give_back(name)
                return NotNow(why, frees=not self._admission.shares_addresses)
        elif isinstance(answer, NotNow):
            whys = filter(None, (answer.reason, self._kinds.why_silent(kind.driver), self._why_strange()))
            return NotNow("; ".join(whys), frees=answer.frees)
        return answer

    def _without_addresses(self, name: str, count: int) -> str:
        """Take addresses for a run; return why it has none, or an empty string."""
        try:
            found = self._admission.take_addresses(name, count)
        except CarrelError as error:  # of those who need none, others may go on
            return str(error)
        return "no address of the site's pool is free" if found is None else ""

    def _why_strange(self) -> str:
        names = ", ".join(sorted(self._strangers)[:NAMED_MAX])
        return f"guest_nodes names no host {names}, which carrel host list shows" if names else ""

    def waiting(self) -> Iterator[tuple[JobKey, str]]:
        """Yield those who wait, each with a sentence for its owner."""
        for key, run in self._runs.items():
            if why := self._queue.reason(key):
                yield run, why

    def leave(self, run: JobKey) -> None:
        """Let a run stand in no line; one that was let through is none of them."""
        if run not in self._begun and str(run) in self._runs:
            del self._runs[str(run)]
            self._queue.remove(str(run))
            self._attempts.pop(run, None)
            self._made.pop(run, None)

    def failed(self, run: JobKey, host: str, why: str) -> None:
        """Note that a run's guests could not be made; the queue knows whether and when it is tried again."""
        self._begun.discard(run)
        action = self._queue.result(str(run), Outcome(result="failed", reason=why, host=host), self._clock())
        if isinstance(action, Hold):
            self._given_up[run] = action.reason

    def ready(self, run: JobKey) -> None:
        """Note that a run's guests are there. A second time changes nothing."""
        self._queue.result(str(run), Outcome(result="ready"), self._clock())

    def give_back(self, run: JobKey, attempt: int) -> None:
        """Give back what an attempt took; absent before is fine. Blocks for a transaction."""
        self._admission.table.give_back(room_name(run, attempt))
        if run in self._begun:
            self._begun.discard(run)
            self._queue.remove(str(run))
        self._queue.freed()

    def sweep(self, taken: Taken, over: Collection[tuple[JobKey, int]], living_jobs: Collection[int]) -> None:
        """Give back what is left of runs whose end nobody noticed. Blocks for transactions.

        A name that is not of a run stays: somebody else put it there.

        Args:
            taken: As it was before Slurm was looked at.
            over: Attempts of runs that Slurm does not know and that no host carries anything of.
            living_jobs: All that Slurm knows, of whatever partition: the shared list is not for guests alone.
        """
        rooms = {room_name(run, attempt) for run, attempt in over}
        live = {room.run for room in taken.rooms} - rooms
        if swept := self._admission.table.sweep(live, before=taken.mark):
            _LOG.warning("room of runs whose end went unnoticed was given back: %s", ", ".join(swept))
        carried = {int(name.partition(".")[0]) for name in live if name.partition(".")[0].isdigit()}
        self._admission.free_listed(taken.listed - set(living_jobs) - carried)

    def keep_only(self, alive: Collection[JobKey]) -> None:
        """Forget the runs that are over."""
        for key, run in list(self._runs.items()):
            if run not in alive:
                self._queue.remove(key)
                del self._runs[key]
                self._attempts.pop(run, None)
                self._made.pop(run, None)
        self._begun &= set(alive)
        self._given_up = {run: why for run, why in self._given_up.items() if run in alive}

    def _begin(self, run: JobKey, attempt: int) -> None:
        self._runs[str(run)] = run
        self._attempts[run] = attempt
        self._begun.add(run)

    def _waiting(self, job: PoolJob) -> Waiting:
        wish = job.wish.request if job.wish else None
        kind = self._made[job.key] = self._kinds.of(wish)
        return Waiting(
            key=str(job.key),
            clone=kind.clone,
            driver=kind.driver,
            image=wish.image if wish else "",
            demand=Demand(cpus=job.cpus, memory_bytes=job.memory_bytes, count=job.nodes),
            since_s=job.key.submit_s,
        )
