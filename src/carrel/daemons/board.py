"""What the nodes last reported, in memory.

Nothing here is owned: a restart forgets it, and the next reports bring it back.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from carrel.model.guest import Counters, Guest
from carrel.model.report import Event, NodeReport

EVENTS_PER_JOB_MAX = 200
JOBS_MAX = 2000
CONSOLES_MAX = 1000
CONSOLE_BYTES_MAX = 16 * 1024
LATE_MAX_S = 60.0
"""No report is under way for longer; one that seems older still was sent after the node's clock was set back."""

EVERYBODY = -2
"""The caller sees everything: root, or the user that the daemon runs as."""


class Heard(NamedTuple):
    """A node's last report, and when it came by our own clock."""

    report: NodeReport
    at_s: float


class Known(NamedTuple):
    """A guest, and who told of it."""

    guest: Guest
    """Its ``node`` is Slurm's name of the node that it is on, or is."""
    host: str
    """What carries it, where it is a node itself; empty: its node does."""
    counters: Counters | None
    """What it used when that was last read; None: it was not."""


class Board:
    """The last report of each node, the last events of each job, the end of each console; all bounded."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.nodes: dict[str, Heard] = {}
        self._remote: dict[str, list[Known]] = {}
        """Guests on hosts without a carreld, by the driver that found them there."""
        self._events: OrderedDict[int, deque[Event]] = OrderedDict()
        self._consoles: OrderedDict[tuple[str, str], str] = OrderedDict()

    def take(self, report: NodeReport, *, now_s: float) -> bool:
        """Put a report in the place of the node's last one; a late or repeated one only adds events that are new.

        Returns:
            Whether guests may have changed.
        """
        node = report.facts.node
        self._add_events(self._owned(event, report.guests) for event in report.events)
        before = self.nodes.get(node)
        if before is not None and 0 < before.report.sent_s - report.sent_s < LATE_MAX_S:
            return False
        self.nodes[node] = Heard(report, now_s)
        for guest, text in report.consoles.items():
            self._consoles[node, guest] = text[-CONSOLE_BYTES_MAX:]
            self._consoles.move_to_end((node, guest))
        while len(self._consoles) > CONSOLES_MAX:
            self._consoles.popitem(last=False)
        return before is None or before.report.guests != report.guests

    def see(self, driver: str, guests: tuple[Guest, ...]) -> bool:
        """Put what a driver found on hosts without a carreld in the place of what it found last.

        Returns:
            Whether anything has changed.
        """
        before = self._remote.get(driver, [])
        # To its driver, the node is where it was put; to Slurm, it is the node.
        now = [
            Known(msgspec.structs.replace(guest, node=guest.host_name or guest.node), guest.node, None)
            for guest in guests
        ]
        self._remote[driver] = now
        return before != now

    def note(self, event: Event) -> None:
        """Take an event of the controller's own."""
        self._add_events([event])

    def guests(self, *, uid: int = EVERYBODY, job_id: int | None = None) -> list[Guest]:
        """Return the guests that ``uid`` may see, by job where given."""
        return [known.guest for known in self.known(uid=uid, job_id=job_id)]

    def known(self, *, uid: int = EVERYBODY, job_id: int | None = None, name: str | None = None) -> list[Known]:
        """Return what is known of the guests that ``uid`` may see, by job and name where given."""
        return [
            known
            for known in self._all()
            if _may_see(known.guest.uid, uid)
            and (job_id is None or (known.guest.run is not None and known.guest.run.job_id == job_id))
            and (name is None or known.guest.name == name)
        ]

    def events(self, job_id: int, *, uid: int = EVERYBODY) -> list[Event]:
        """Return what happened to a job, oldest first. Job ids come back: each event has its own owner."""
        return sorted(
            (event for event in self._events.get(job_id, ()) if _may_see(event.uid, uid)),
            key=lambda event: event.time_s,
        )

    def starts(self) -> dict[int, list[tuple[float, bool]]]:
        """Return, by job, when a guest of it could not be made (False) and when a task entered one (True)."""
        told = {"guest-failed": False, "node-fault": False, "task-entered": True}
        found = {
            job_id: [(event.time_s, told[event.what]) for event in ring if event.what in told]
            for job_id, ring in self._events.items()
        }
        return {job_id: times for job_id, times in found.items() if any(not entered for _, entered in times)}

    def consoles(self, guest: str, *, uid: int = EVERYBODY) -> list[tuple[str, str]]:
        """Return (node, text) of each console that is held for a guest of this name.

        The owner is that of the guest, or of an event about it, as a guest that went down leaves the list first.
        """
        owners = {(event.node, event.guest): event.uid for ring in self._events.values() for event in ring}
        owners |= {(each.node, each.name): each.uid for each, _, _ in self._all()}
        return [
            (node, text)
            for (node, name), text in self._consoles.items()
            if name == guest and _may_see(owners.get((node, name), -1), uid)
        ]

    def _all(self) -> Iterator[Known]:
        for node in sorted(self.nodes):
            report = self.nodes[node].report
            for guest in report.guests:
                yield Known(guest, node if guest.per == "node" else "", report.counters.get(guest.name))
        for driver in sorted(self._remote):
            yield from self._remote[driver]

    def _owned(self, event: Event, guests: Sequence[Guest]) -> Event:
        """Give an event whose owner was not told that of its guest, or of the job's guest."""
        if event.uid >= 0 or not event.job_id:
            return event
        known = (*guests, *self.guests())
        jobs = {guest.run.job_id: guest.uid for guest in known if guest.run is not None}
        uid = {guest.name: guest.uid for guest in known}.get(event.guest, jobs.get(event.job_id, -1))
        return msgspec.structs.replace(event, uid=uid)

    def _add_events(self, events: Iterable[Event]) -> None:
        for event in events:
            ring = self._events.setdefault(event.job_id, deque(maxlen=EVENTS_PER_JOB_MAX))
            # A report whose answer was lost is sent again, events included.
            if event not in ring:
                ring.append(event)
            self._events.move_to_end(event.job_id)
        while len(self._events) > JOBS_MAX:
            self._events.popitem(last=False)


def _may_see(owner: int, uid: int) -> bool:
    return uid in {EVERYBODY, owner} and (owner >= 0 or uid == EVERYBODY)
