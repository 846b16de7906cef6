"""Which hosts carry the guests of a job: here, not now, or never.

*Never* cancels a job, so it is said only of what would not fit if every host were up and empty. A host that is drained,
down, full or suspected is a reason to wait, and so is a table without any host.

The guests of one demand are alike, so each takes one place of its size wherever it goes: choosing one host after
another fails only where every choice does.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from random import Random

import msgspec

from carrel.core import picking
from carrel.model.host import Answer, Demand, Here, Host, HostState, Never, NotNow, Overcommit, Policy, in_words

ONCE = Overcommit()
"""Nothing is promised twice."""


def place(
    hosts: Iterable[Host],
    demand: Demand,
    *,
    policy: Policy = "first",
    overcommit: Overcommit = ONCE,
    without: Collection[str] = (),
    random: Random | None = None,
) -> Answer:
    """Return where the demand goes. Nothing is taken: but for ``random``, equal questions have equal answers.

    Args:
        hosts: In the order of ``first``; names are unique.
        demand: What is asked for.
        policy: See ``carrel.core.picking``.
        overcommit: How often CPUs and memory may be promised.
        without: Hosts that are left out now; they still count for *never*.
        random: What the policy ``random`` draws from; a seeded one repeats its choices.

    >>> h1, h2 = Host(name="h1", cpus=8, memory_bytes=2**30, cpus_used=6), Host(name="h2", cpus=8, memory_bytes=2**30)
    >>> place([h1, h2], Demand(cpus=2, memory_bytes=2**20), policy="best-fit")
    Here(hosts=('h1',))
    >>> place([h1, h2], Demand(cpus=9, memory_bytes=2**20))
    Never(reason='9 CPUs and 1 MiB fit no host; the largest gives a guest 8 CPUs and 1 GiB')
    """
    return Hosts(hosts, policy=policy, overcommit=overcommit, random=random).place(demand, without=without)


def confirm(
    hosts: Iterable[Host],
    demand: Demand,
    here: Here,
    *,
    overcommit: Overcommit = ONCE,
    without: Collection[str] = (),
) -> Here | NotNow:
    """Return a choice that somebody else made, if it is one for the demand and there is room; nothing is taken.

    A wrong choice says nothing about the demand, so it is never a reason to cancel a job.
    """
    if len(here.hosts) != demand.count:
        return NotNow(f"{len(here.hosts)} hosts were chosen for {demand}")
    known = {host.name: host for host in hosts}
    for name, guests in Counter(here.hosts).items():
        host = known.get(name)
        if host is None:
            return NotNow(f"host {name!r} was chosen, which is not in the table; see: carrel host list")
        if guests > 1 and demand.apart:
            return NotNow(f"host {name!r} was chosen {guests} times for {demand}")
        if name in without or host.state != "up":
            return NotNow(f"host {name!r} was chosen, which takes no guests now")
        cpus, memory_bytes = overcommit.capacity(host)
        cpus_after = host.cpus_used + guests * demand.cpus
        if cpus_after > cpus or host.memory_used_bytes + guests * demand.memory_bytes > memory_bytes:
            return NotNow(f"host {name!r} was chosen, which has no room for {demand} now")
    return here


class Hosts:
    """Many hosts, kept sorted for one policy: for whoever asks often, a question costs far less than a look at all.

    One per thread. A ``ValueError`` is the caller's bug: it gives back what was not taken, or names no host.
    """

    def __init__(
        self,
        hosts: Iterable[Host],
        *,
        policy: Policy = "first",
        overcommit: Overcommit = ONCE,
        random: Random | None = None,
    ) -> None:
        """Sort the hosts; each keeps its place in the order of ``first``."""
        self._hosts = list(hosts)
        self._at = {host.name: position for position, host in enumerate(self._hosts)}
        if len(self._at) < len(self._hosts):
            ((name, times),) = Counter(host.name for host in self._hosts).most_common(1)
            raise ValueError(f"host {name!r} is there {times} times; a host has one name")
        self._capacities = [overcommit.capacity(host) for host in self._hosts]
        # Sites have few kinds of host: what an empty site could hold is computed from those.
        self._kinds = Counter(self._capacities)
        self._open_kinds: Counter[tuple[int, int]] = Counter()
        """What our guests could have of the hosts that are open."""
        self._cpus_used = [host.cpus_used for host in self._hosts]
        self._memory_used = [host.memory_used_bytes for host in self._hosts]
        self._closed = [True] * len(self._hosts)
        self._closed_count = len(self._hosts)
        for position, host in enumerate(self._hosts):
            self._set_closed(position, closed=host.state != "up")
        rooms = [self._room(position) for position in range(len(self._hosts))]
        # The policy spreads load and keeps no secret.
        self._picker = picking.picker(policy, rooms, random or Random())  # noqa: S311

    def __iter__(self) -> Iterator[Host]:
        return (self[host.name] for host in self._hosts)

    def __getitem__(self, name: str) -> Host:
        position = self._position(name)
        used = {"cpus_used": self._cpus_used[position], "memory_used_bytes": self._memory_used[position]}
        return msgspec.structs.replace(self._hosts[position], **used)

    def place(self, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where the demand goes, and take nothing."""
        answer = self.admit(demand, without=without)
        if isinstance(answer, Here):
            self.give_back(answer, demand)
        return answer

    def admit(self, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where the demand goes, and take it."""
        with self._left_out(without):
            return self._admit(demand)

    def take(self, name: str, *, cpus: int, memory_bytes: int) -> None:
        """Note that so much of a host is taken, whether or not there is room: what exists, exists."""
        self._change(self._position(name), cpus, memory_bytes)

    def give_back(self, here: Here, demand: Demand) -> None:
        """Note that the guests of an admitted demand are gone."""
        for name in here.hosts:
            position = self._position(name)
            if self._cpus_used[position] < demand.cpus or self._memory_used[position] < demand.memory_bytes:
                raise ValueError(f"host {name!r} has less taken than the {demand} that are given back")
            self._change(position, -demand.cpus, -demand.memory_bytes)

    def set_state(self, name: str, state: HostState, reason: str = "") -> None:
        """Open or close a host for further guests."""
        position = self._position(name)
        self._hosts[position] = msgspec.structs.replace(self._hosts[position], state=state, reason=reason)
        self._set_closed(position, closed=state != "up")
        self._picker.moved(position, self._room(position))

    def _admit(self, demand: Demand) -> Answer:
        positions = self._pick_all(demand)
        if len(positions) == demand.count:
            return Here(tuple(self._hosts[position].name for position in positions))
        for position in positions:
            self._change(position, -demand.cpus, -demand.memory_bytes)
        return self._refusal(demand)

    def _pick_all(self, demand: Demand) -> list[int]:
        """Take places one after another, and return those that could be had."""
        positions: list[int] = []
        for _ in range(demand.count):
            position = self._picker.pick(demand.cpus, demand.memory_bytes)
            if position is None:
                break
            positions.append(position)
            self._change(position, demand.cpus, demand.memory_bytes)
            if demand.apart:
                self._picker.moved(position, picking.CLOSED)
        if demand.apart:
            for position in positions:
                self._picker.moved(position, self._room(position))
        return positions

    @contextlib.contextmanager
    def _left_out(self, names: Collection[str]) -> Iterator[None]:
        positions = [self._at[name] for name in names if name in self._at and not self._closed[self._at[name]]]
        for position in positions:
            self._set_closed(position, closed=True)
            self._picker.moved(position, picking.CLOSED)
        yield
        for position in positions:
            self._set_closed(position, closed=False)
            self._picker.moved(position, self._room(position))

    def _refusal(self, demand: Demand) -> NotNow | Never:
        if not self._hosts:
            return NotNow("there is no host; see: carrel host add")
        if _places(self._kinds, demand) < demand.count:
            cpus, memory_bytes = max(self._kinds)
            largest = f"the largest gives a guest {cpus} CPUs and {in_words(memory_bytes)}"
            if demand.count == 1:
                return Never(f"{demand} fit no host; {largest}")
            count = len(self._hosts)
            together = f"all {count} hosts of this site together" if count > 1 else "the only host of this site"
            return Never(f"{together} cannot carry {demand}; {largest}")
        closed = self._closed_count
        shut = f", and {closed} of {len(self._hosts)} hosts take no guests" if closed else ""
        frees = _places(self._open_kinds, demand) >= demand.count
        return NotNow(f"no room for {demand} on the hosts now{shut}", frees=frees)

    def _set_closed(self, position: int, *, closed: bool) -> None:
        if closed == self._closed[position]:
            return
        self._closed[position] = closed
        self._closed_count += 1 if closed else -1
        host, (cpus, memory_bytes) = self._hosts[position], self._capacities[position]
        kind = (max(cpus - host.cpus_others, 0), max(memory_bytes - host.memory_others_bytes, 0))
        self._open_kinds[kind] += -1 if closed else 1

    def _change(self, position: int, cpus: int, memory_bytes: int) -> None:
        self._cpus_used[position] += cpus
        self._memory_used[position] += memory_bytes
        if not self._closed[position]:
            self._picker.moved(position, self._room(position))

    def _room(self, position: int) -> picking.Room:
        if self._closed[position]:
            return picking.CLOSED
        cpus, memory_bytes = self._capacities[position]
        cpus_used, memory_used = self._cpus_used[position], self._memory_used[position]
        load = max(cpus_used / (cpus or 1), memory_used / (memory_bytes or 1))
        return picking.Room(cpus - cpus_used, memory_bytes - memory_used, load)

    def _position(self, name: str) -> int:
        try:
            return self._at[name]
        except KeyError:
            raise ValueError(f"no host {name!r} among {len(self._hosts)}") from None


def _places(kinds: Counter[tuple[int, int]], demand: Demand) -> int:
    """Return how many guests of the demand the hosts could hold if all were empty."""
    total = 0
    for (cpus, memory_bytes), hosts in kinds.items():
        places = cpus // demand.cpus
        if demand.memory_bytes:
            places = min(places, memory_bytes // demand.memory_bytes)
        total += hosts * (min(places, 1) if demand.apart else places)
    return total
