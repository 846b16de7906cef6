"""All that decisions on guests as nodes rest on: what Slurm, the hosts and the host table say, by run and by name."""

from collections.abc import Collection, Mapping
from functools import cached_property

import msgspec

from carrel.core import standing
from carrel.model.guestnode import GuestNode, HostReport
from carrel.model.job import JobKey
from carrel.model.pool import Look, Place, PoolNode, reservation_name


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The site's bounds."""

    configuring_max_s: float
    start_max_s: float
    join_max_s: float


class World(msgspec.Struct, frozen=True, kw_only=True, dict=True):  # dict: for what is computed once
    """Everything that the decision rests on."""

    look: Look
    places: tuple[Place, ...]
    hosts: Mapping[str, HostReport]
    """Those that were heard lately."""
    settled: Collection[str]
    """Those of them that answered under the orders in force: any other may be making a guest that it was told of, and
    what it says it lacks may be there in a moment."""
    lost: Collection[str] = ()
    """Names that hosts carried when they were last heard, too long ago."""
    begun: Collection[JobKey]
    """Runs for which the queue has found room; their guests are made, unless they failed."""
    given_up: Mapping[JobKey, str]
    """Runs whose guests failed too often, and the last reason; forgotten by a restart, on purpose."""
    resting: Mapping[JobKey, str] = {}
    """Runs that Slurm did not start although their guests were there, until they are tried again; and why."""
    ready_since_s: Mapping[JobKey, float] = {}
    """Since when released runs were seen to have all that they need."""
    now_s: float
    limits: Limits
    complete: bool = True
    """Whether every host could have spoken: one that may at any moment is not one that carries nothing."""

    def run_places(self, run: JobKey) -> tuple[Place, ...]:
        """Return the room of the run's newest attempt; none where a host of it does not answer."""
        found = self.newest_places(run)
        return found if all(place.host in self.hosts for place in found) else ()

    def newest_places(self, run: JobKey) -> tuple[Place, ...]:
        """Return the room of the run's newest attempt, whether its hosts answer or not."""
        mine = self._places_by_run.get(run, [])
        newest = max((place.attempt for place in mine), default=None)
        return tuple(place for place in mine if place.attempt == newest)

    def idle_attempts(self, run: JobKey) -> list[int]:
        """Return the attempts for which the run has room on hosts that all answered, and carry nothing of it."""
        hosts: dict[int, set[str]] = {}
        for place in self._places_by_run.get(run, []):
            hosts.setdefault(place.attempt, set()).add(place.host)
        carriers = self._carriers.get(run, set())
        return [attempt for attempt, its in hosts.items() if its <= self._settled and its.isdisjoint(carriers)]

    def run_nodes(self, run: JobKey) -> tuple[PoolNode, ...]:
        """Return the names that the run has."""
        reserved = self.look.reservations.get(reservation_name(run))
        names = reserved.nodes if reserved else ()
        return tuple(self.look.nodes[name] for name in names if name in self.look.nodes)

    def carried(self, run: JobKey) -> dict[str, GuestNode]:
        """Return, by name, what hosts carry of the run."""
        return self._guests_by_run.get(run, {})

    def host_of(self, run: JobKey, node: PoolNode) -> str:
        """Return the host that a name of this run is on; empty: on none that was heard lately."""
        report = self.hosts.get(node.host_name)
        if report and standing.of(report).is_on(node, report):
            return report.host
        # When slurmd registers, newer releases (24.11) put what it says of itself in place of what they were told.
        return "" if node.resting else self._host_by_guest.get((run, node.name), "")

    def address_of(self, run: JobKey, node: PoolNode) -> str:
        """Return where the slurmd of a name is that is on a host; empty: nobody knows yet."""
        report = self.hosts[self.host_of(run, node)]
        if report.host != node.host_name:  # its slurmd has registered, and said by itself where it is
            return node.address
        return standing.of(report).address(report, self.carried(run).get(node.name))

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Names that are in use."""
        return frozenset(name for reservation in self.look.reservations.values() for name in reservation.nodes)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Names that a guest may have now."""
        carried = {guest.node for report in self.hosts.values() for guest in report.guests}
        used = self.reserved | carried | set(self.lost)
        nodes = self.look.nodes.values()
        return tuple(
            node.name for node in nodes if node.resting and node.closed and not node.parting and node.name not in used
        )

    @cached_property
    def _settled(self) -> frozenset[str]:
        return frozenset(self.settled)

    @cached_property
    def _places_by_run(self) -> dict[JobKey, list[Place]]:
        found: dict[JobKey, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.run, []).append(place)
        return found

    @cached_property
    def _host_by_guest(self) -> dict[tuple[JobKey, str], str]:
        return {(guest.run, guest.node): report.host for report in self.hosts.values() for guest in report.guests}

    @cached_property
    def _carriers(self) -> dict[JobKey, set[str]]:
        found: dict[JobKey, set[str]] = {}
        for report in self.hosts.values():
            for guest in report.guests:
                found.setdefault(guest.run, set()).add(report.host)
        return found

    @cached_property
    def _guests_by_run(self) -> dict[JobKey, dict[str, GuestNode]]:
        found: dict[JobKey, dict[str, GuestNode]] = {}
        for report in self.hosts.values():
            for guest in report.guests:
                found.setdefault(guest.run, {})[guest.node] = guest
        return found
