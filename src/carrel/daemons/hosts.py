"""The hosts as the controller sees them: its table, and beside it what their carrelds last reported.

The methods block for a transaction, or for a site's placement command: call them in a thread.
"""

import time
from collections.abc import Collection, Sequence
from typing import Annotated

import msgspec

from carrel.config import Placement
from carrel.daemons.board import Board
from carrel.errors import NotFoundError, RefusedError
from carrel.hosts.admission import Admission
from carrel.hosts.table import Facts, Place
from carrel.model.host import Answer, Demand, Host, HostState

Count = Annotated[int, msgspec.Meta(le=2**31)]
Bytes = Annotated[int, msgspec.Meta(le=2**62)]


class HostWish(msgspec.Struct, frozen=True, kw_only=True):
    """A host to be added, or to be changed; without CPUs and memory, its carreld says what it has."""

    name: str
    cpus: Count = 0
    memory_bytes: Bytes = 0
    cpus_others: Count = 0
    """What others than guests of the site's jobs use of it."""
    memory_others_bytes: Bytes = 0


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a host gets no further guest."""

    drained: bool
    reason: str = ""


class PlaceView(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest of a run has taken of a host."""

    run: str
    guest: int
    cpus: int
    memory_bytes: int
    address: str


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host, what it has, and what is taken of it."""

    name: str
    state: HostState
    reason: str
    cpus: int
    cpus_most: int
    """With overcommit."""
    cpus_used: int
    cpus_others: int
    """How many of those used are not of guests of the site's jobs."""
    memory_bytes: int
    memory_most_bytes: int
    memory_used_bytes: int
    memory_others_bytes: int
    reports: bool
    """Its carreld tells what it has; while that is silent, the host gets no guest."""
    guests: int
    places: tuple[PlaceView, ...]
    """For administrators."""


class HostDesk:
    """Answers about hosts, and changes their table."""

    def __init__(self, settings: Placement, board: Board, *, silent_after_s: float) -> None:
        """Open nothing yet."""
        self.admission = Admission(settings)
        self._settings = settings
        self._board = board
        self._silent_after_s = silent_after_s

    def silent(self) -> frozenset[str]:
        """Return the hosts whose carreld should report and does not: nobody can tell what is there."""
        since_s = time.time() - self._silent_after_s
        heard = {name for name, heard in self._board.nodes.items() if heard.at_s >= since_s}
        return self.admission.table.reporting() - heard

    def take(self, run: str, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where the guests of a run go, and take the places; a second call returns the same ones."""
        return self.admission.take(run, demand, without=self.silent().union(without))

    def query(self, demand: Demand) -> Answer:
        """Return where such guests would go now."""
        return self.admission.query(demand, without=self.silent())

    def views(self, *, with_places: bool) -> list[HostView]:
        """Return all hosts, in the order of the policy ``first``."""
        table = self.admission.table
        reporting, silent = table.reporting(), self.silent()
        places: dict[str, list[Place]] = {}
        for place in table.places():
            places.setdefault(place.host, []).append(place)
        return [
            self._view(host, places.get(host.name, ()), host.name in reporting, host.name in silent, with_places)
            for host in table.hosts()
        ]

    def add(self, wish: HostWish) -> None:
        """Put a host into the table, or change it.

        Raises:
            RefusedError: neither the wish nor a report says what it has.
        """
        if wish.cpus or wish.memory_bytes:
            self.admission.table.put([Facts(**msgspec.structs.asdict(wish))])
            return
        told = self._told(wish.name)
        if told is None:
            raise RefusedError(
                f"host {wish.name!r} has not reported what it has; start its carreld, or give --cpus and --memory"
            )
        others = {"cpus_others": wish.cpus_others, "memory_others_bytes": wish.memory_others_bytes}
        self.admission.table.put([msgspec.structs.replace(told, **others)])

    def refresh(self, name: str = "") -> None:
        """Read anew what hosts have, from their reports; what was given by hand stays.

        Raises:
            NotFoundError: there is no host of this name.
        """
        table = self.admission.table
        hosts = {host.name: host for host in table.hosts()}
        if name and name not in hosts:
            raise NotFoundError(f"no host {name!r}; see: carrel host list")
        for host in table.reporting() & ({name} if name else hosts.keys()):
            told = self._told(host)
            if told is not None:
                known = hosts[host]
                others = {"cpus_others": known.cpus_others, "memory_others_bytes": known.memory_others_bytes}
                table.put([msgspec.structs.replace(told, **others)])

    def _told(self, name: str) -> Facts | None:
        heard = self._board.nodes.get(name)
        if heard is None or not heard.report.facts.cpus:
            return None
        facts = heard.report.facts
        return Facts(name=name, cpus=facts.cpus, memory_bytes=facts.memory_bytes, reports=True)

    def _view(self, host: Host, places: Sequence[Place], reports: bool, silent: bool, with_places: bool) -> HostView:
        cpus_most, memory_most_bytes = self._settings.overcommit.capacity(host)
        down = silent and host.state == "up"
        heard = host.name in self._board.nodes
        silence = f"for {self._silent_after_s:g} s" if heard else "since carrelctld was started"
        return HostView(
            name=host.name,
            state="down" if down else host.state,
            reason=f"its carreld has not reported {silence}" if down else host.reason,
            cpus=host.cpus,
            cpus_most=cpus_most,
            cpus_used=host.cpus_used,
            cpus_others=host.cpus_others,
            memory_bytes=host.memory_bytes,
            memory_most_bytes=memory_most_bytes,
            memory_used_bytes=host.memory_used_bytes,
            memory_others_bytes=host.memory_others_bytes,
            reports=reports,
            guests=len(places),
            places=tuple(_place(place) for place in places) if with_places else (),
        )


def _place(place: Place) -> PlaceView:
    return PlaceView(
        run=place.run,
        guest=place.guest,
        cpus=place.cpus,
        memory_bytes=place.memory_bytes,
        address=place.address,
    )
