"""Which of many hosts a guest goes to, without looking at each: the four policies over structures that stay sorted.

A host is a position in the order in which hosts were given, and what is free on it. A policy's answer is exact: it is
the host that a look at all of them would choose, as ``tests/placement/test_placement.py`` sees by doing that.

==============  =============================================================  ==================================
policy          takes, among the hosts with room                               looks at
==============  =============================================================  ==================================
first           the one that was given first                                   a path down a tree of maxima
least-loaded    the one whose scarcer resource is least used, then ``first``   few paths down the same tree
random          any, each as likely as another                                 a few hosts, or those with room
best-fit        the one that keeps fewest CPUs, then fewest bytes, then first  a bisection for each number of CPUs
==============  =============================================================  ==================================
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from random import Random
from typing import Protocol

import msgspec

from carrel.model.host import Policy

_TRIES = 16
"""Draws before ``random`` gathers the hosts with room; where one in four has room, so many draws miss once in 100."""


class Room(msgspec.Struct, frozen=True):
    """What is free on a host; negative where it gets no guest."""

    cpus: int
    memory_bytes: int
    load: float
    """The larger of the parts of its CPUs and of its memory that are taken."""


CLOSED = Room(-1, -1, float("inf"))
"""The room of a host that gets no guest."""


class Picker(Protocol):
    """One policy over all hosts. The position of a host never changes."""

    def moved(self, position: int, room: Room) -> None:
        """Note that this much is free there now."""
        ...

    def pick(self, cpus: int, memory_bytes: int) -> int | None:
        """Return the position of the policy's choice; None: nowhere is so much free."""
        ...


def picker(policy: Policy, rooms: list[Room], random: Random) -> Picker:
    """Return the policy over hosts with these rooms."""
    match policy:
        case "first":
            return First(rooms)
        case "least-loaded":
            return LeastLoaded(rooms)
        case "random":
            return Anywhere(rooms, random)
        case "best-fit":
            return BestFit(rooms)


class First:
    """A tree whose leaves are the hosts in order; each node knows the most CPUs and the most memory below it.

    The two maxima may be of two hosts, so a path can end at nothing; then the next one is tried.
    """

    def __init__(self, rooms: list[Room]) -> None:
        """Build the tree over all hosts."""
        nodes = _nodes(rooms)
        self._leaves = nodes // 2
        self._cpus = [CLOSED.cpus] * nodes
        self._memory = [CLOSED.memory_bytes] * nodes
        for position, room in enumerate(rooms):
            self._cpus[self._leaves + position] = room.cpus
            self._memory[self._leaves + position] = room.memory_bytes
        for node in range(self._leaves - 1, 0, -1):
            self._sum_up(node)

    def moved(self, position: int, room: Room) -> None:
        node = self._leaves + position
        self._cpus[node], self._memory[node] = room.cpus, room.memory_bytes
        node //= 2
        while node and self._sum_up(node):
            node //= 2

    def pick(self, cpus: int, memory_bytes: int) -> int | None:
        return next(self.fitting(cpus, memory_bytes), None)

    def fitting(self, cpus: int, memory_bytes: int) -> Iterator[int]:
        """Yield the positions of all hosts with so much room, in order."""
        stack = [1]
        while stack:
            node = stack.pop()
            if self._cpus[node] < cpus or self._memory[node] < memory_bytes:
                continue
            if node >= self._leaves:
                yield node - self._leaves
            else:
                stack += (2 * node + 1, 2 * node)

    def fits(self, position: int, cpus: int, memory_bytes: int) -> bool:
        leaf = self._leaves + position
        return self._cpus[leaf] >= cpus and self._memory[leaf] >= memory_bytes

    def _sum_up(self, node: int) -> bool:
        """Compute a node from its two below; return whether it changed, for else none above it does."""
        left, right = 2 * node, 2 * node + 1
        cpus = max(self._cpus[left], self._cpus[right])
        memory = max(self._memory[left], self._memory[right])
        changed = cpus != self._cpus[node] or memory != self._memory[node]
        self._cpus[node], self._memory[node] = cpus, memory
        return changed


class Anywhere(First):
    """Draws until a host has room; where few have, gathers those and draws once. Both are as likely for each."""

    def __init__(self, rooms: list[Room], random: Random) -> None:
        """Build the tree; ``random`` is the caller's, so that a seed repeats a history."""
        super().__init__(rooms)
        self._random = random
        self._count = len(rooms)

    def pick(self, cpus: int, memory_bytes: int) -> int | None:
        if next(self.fitting(cpus, memory_bytes), None) is None:
            return None
        for _ in range(_TRIES):
            # randrange takes three times as long, and no host count is near the 2**53 where this would be uneven.
            position = int(self._random.random() * self._count)
            if self.fits(position, cpus, memory_bytes):
                return position
        return self._random.choice(list(self.fitting(cpus, memory_bytes)))


class LeastLoaded(First):
    """The same tree with the least load below each node, so that whole branches are known to hold nothing better."""

    def __init__(self, rooms: list[Room]) -> None:
        """Build the tree with loads."""
        self._load = [CLOSED.load] * _nodes(rooms)
        for position, room in enumerate(rooms):
            self._load[len(self._load) // 2 + position] = room.load
        super().__init__(rooms)

    def moved(self, position: int, room: Room) -> None:
        self._load[self._leaves + position] = room.load
        super().moved(position, room)

    def pick(self, cpus: int, memory_bytes: int) -> int | None:
        best, found = float("inf"), 0
        levels = self._leaves.bit_length()
        stack = [1]
        while stack:
            node = stack.pop()
            load = self._load[node]
            if load > best or self._cpus[node] < cpus or self._memory[node] < memory_bytes:
                continue
            # Of equal loads the first host is taken, and a branch with a less loaded host was looked at before.
            if load == best and node << (levels - node.bit_length()) > found:
                continue
            if node < self._leaves:
                left, right = 2 * node, 2 * node + 1
                stack += (right, left) if self._load[left] <= self._load[right] else (left, right)
            else:
                best, found = load, node
        return found - self._leaves if found else None

    def _sum_up(self, node: int) -> bool:
        load = min(self._load[2 * node], self._load[2 * node + 1])
        changed = load != self._load[node]
        self._load[node] = load
        return super()._sum_up(node) or changed


class BestFit:
    """Hosts by free CPUs, of which there are few different numbers, and within each sorted by free memory."""

    def __init__(self, rooms: list[Room]) -> None:
        """Sort all hosts."""
        self._rooms = rooms.copy()
        self._shelves: dict[int, list[tuple[int, int]]] = {}
        for position, room in enumerate(rooms):
            self._shelves.setdefault(room.cpus, []).append((room.memory_bytes, position))
        for shelf in self._shelves.values():
            shelf.sort()
        self._numbers = sorted(self._shelves)

    def moved(self, position: int, room: Room) -> None:
        before, self._rooms[position] = self._rooms[position], room
        shelf = self._shelves[before.cpus]
        del shelf[bisect_left(shelf, (before.memory_bytes, position))]
        if not shelf:
            del self._shelves[before.cpus], self._numbers[bisect_left(self._numbers, before.cpus)]
        if room.cpus not in self._shelves:
            self._shelves[room.cpus] = []
            insort(self._numbers, room.cpus)
        insort(self._shelves[room.cpus], (room.memory_bytes, position))

    def pick(self, cpus: int, memory_bytes: int) -> int | None:
        for number in self._numbers[bisect_left(self._numbers, cpus) :]:
            shelf = self._shelves[number]
            if shelf[-1][0] >= memory_bytes:
                return shelf[bisect_left(shelf, (memory_bytes,))][1]
        return None


def _nodes(rooms: Sequence[Room]) -> int:
    """Return how many nodes a tree with a leaf for each host has: all of its branches are equally long."""
    return 2 << len(rooms).bit_length()
