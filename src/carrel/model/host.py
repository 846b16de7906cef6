"""A host carries guests that are Slurm nodes of their own; Slurm itself does not schedule it."""

from typing import Literal

import msgspec

HostState = Literal["up", "drained", "down"]
Fault = Literal["host", "image", "unknown"]
"""Who made a clone fail, where that can be told."""
Policy = Literal["first", "random", "best-fit", "least-loaded"]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has and what of it is taken, by our guests and by whatever else runs there."""

    name: str
    cpus: int
    memory_bytes: int
    cpus_used: int = 0
    memory_used_bytes: int = 0
    cpus_others: int = 0
    """How many of ``cpus_used`` are not of our guests, so that no end of a job gives them back."""
    memory_others_bytes: int = 0
    state: HostState = "up"
    """``drained``: a person took it out; ``down``: nobody can be asked about it. Neither gets another guest."""
    reason: str = ""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a job needs of the hosts: ``count`` guests, each of this size."""

    cpus: int
    memory_bytes: int
    count: int = 1
    apart: bool = False
    """Each guest on a host of its own."""

    def __post_init__(self) -> None:
        if self.cpus < 1 or self.memory_bytes < 0 or self.count < 1:
            raise ValueError(f"{self} asks for no guest; at least 1 guest of 1 CPU")

    def __str__(self) -> str:
        one = f"{_counted(self.cpus, 'CPU')} and {in_words(self.memory_bytes)}"
        if self.count == 1:
            return one
        return f"{self.count} guests of {one} each" + (", each on a host of its own" if self.apart else "")


class Overcommit(msgspec.Struct, frozen=True, kw_only=True):
    """How often a CPU, or a byte of memory, may be promised."""

    cpus: float = 1.0
    memory: float = 1.0

    def __post_init__(self) -> None:
        # The comparison is also false for a NaN.
        if not (0 < self.cpus < float("inf") and 0 < self.memory < float("inf")):
            raise ValueError(f"overcommit of {self.cpus} for CPUs and {self.memory} for memory; both are above 0")

    def capacity(self, host: Host) -> tuple[int, int]:
        """Return the CPUs and bytes that guests on this host may have together.

        >>> Overcommit(cpus=2.0).capacity(Host(name="h", cpus=8, memory_bytes=100))
        (16, 100)
        >>> Overcommit(cpus=1.15).capacity(Host(name="h", cpus=100, memory_bytes=100))
        (115, 100)
        """
        # 100 * 1.15 is a little less than 115 to a float, and a person means 115.
        return int(round(host.cpus * self.cpus, 6)), int(round(host.memory_bytes * self.memory, 6))


class Here(msgspec.Struct, frozen=True, tag="here", tag_field="answer"):
    """There is room, on these hosts."""

    hosts: tuple[str, ...]
    """One for each guest of the demand, in their order; a host may come more than once."""


class NotNow(msgspec.Struct, frozen=True, tag="not-now", tag_field="answer"):
    """There is no room, and there may be later. Also the answer where nobody can tell."""

    reason: str
    frees: bool = False
    """There is room once enough of our guests end; else something else has to change first."""


class Never(msgspec.Struct, frozen=True, tag="never", tag_field="answer"):
    """There would be no room if all hosts were up and empty."""

    reason: str


Answer = Here | NotNow | Never


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_words(memory_bytes: int) -> str:
    """Return an amount of memory as it stands in a sentence.

    >>> in_words(320 * 2**20), in_words(3 * 2**29), in_words(5 * 2**40)
    ('320 MiB', '1.5 GiB', '5 TiB')
    """
    if memory_bytes >= 2**40:
        return f"{memory_bytes / 2**40:.4g} TiB"
    return f"{memory_bytes / 2**30:.4g} GiB" if memory_bytes >= 2**30 else f"{memory_bytes // 2**20} MiB"
