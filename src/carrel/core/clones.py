"""Which kind of clone a guest becomes, of how much memory the template is that it comes from, and with what ways in."""

from typing import Literal

import msgspec

from carrel.errors import RefusedError
from carrel.model.guest import Clone, CloneWish

_MIB = 2**20
_STEP_BYTES = 4 * _MIB
"""What a guest's kernel can be given at least: the largest block of its page allocator."""

_PORT_BYTES = 8 * _MIB
"""Memory that a guest has for each of its ports. An open one takes 4 MiB of it under QEMU 10, and 0.5 MiB under 7.2:
where all are open, half is left. See ``docs/design/0065-ways-in-go-by-the-guests-size.md``."""

_PORTS_NOT_FOR_TASKS = 2
"""The first, which virtio keeps for a console, and carreld's own."""

_GROWTH_TIMES_MAX = 8
"""How often a template's memory can be plugged into its clone. The clone's kernel keeps account of it, a 64th of it, in
what it has already; and it takes time. See ``docs/design/0007-instant-clones.md``."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest becomes."""

    clone: Clone
    why: str
    make_template: bool = False
    """Make one when this guest is ready, for the next."""


def choose(
    wish: CloneWish,
    *,
    share: Literal["all", "user", "none"],
    has_template: bool,
    failure: str = "",
    broken: str = "",
    is_spoilt: bool = True,
    fits: bool = True,
    shape: str,
) -> Choice:
    """Return the kind of clone that a guest becomes, and why.

    Args:
        wish: What the user or the site asked for.
        share: The site's ``guests.templates.share``.
        has_template: One for a guest of this shape is there.
        failure: Why the last attempt to make one failed, lately; empty: it did not.
        broken: Why this guest could not come from the one that was there; empty: that was not tried.
        is_spoilt: Where it could not, that no other guest can either.
        fits: So much memory as this guest lacks in a template can be plugged in.
        shape: What the template is for, in words.

    Raises:
        RefusedError: an instant clone was asked for by name, and the site forbids them.
    """
    if wish in {"full", "linked"}:
        return Choice(clone="full" if wish == "full" else "linked", why="as asked for")
    if share == "none":
        if wish == "instant":
            raise RefusedError(
                "--guest-clone=instant: this site lets no guests share memory (guests.templates.share = none); "
                "use --guest-clone=linked, or leave it out"
            )
        return Choice(clone="linked", why="this site lets no guests share memory (guests.templates.share = none)")
    if not fits:
        return Choice(
            clone="linked",
            why=f"to plug in what it has beyond {shape} takes longer than a boot (guests.templates.base_max_bytes)",
        )
    if broken:
        return Choice(
            clone="linked",
            why=f"the template for {shape} was of no use{' and is made anew' if is_spoilt else ''}: {broken}",
            make_template=is_spoilt,
        )
    if has_template:
        return Choice(clone="instant", why=f"from a template for {shape}")
    if failure:
        return Choice(clone="linked", why=f"no template for {shape}: {failure}")
    return Choice(clone="linked", why=f"the first for {shape}: a template is made for the next", make_template=True)


def base_memory(memory_bytes: int, *, least_bytes: int, most_bytes: int) -> int:
    """Return the memory of the template for a guest of ``memory_bytes``: the largest of a few sizes that fits in it.

    The rest is plugged in, which takes time by the amount; so it is at most half of the guest's memory up to
    ``most_bytes``. See ``docs/design/0007-instant-clones.md`` for what was measured.

    >>> [base_memory(mib * 2**20, least_bytes=160 * 2**20, most_bytes=4 * 2**30) // 2**20
    ...  for mib in (160, 255, 256, 700, 1888, 100000)]
    [160, 160, 256, 512, 1024, 4096]
    """
    size = 256 * _MIB
    if memory_bytes < size or most_bytes < size:
        return least_bytes
    while size * 2 <= min(memory_bytes, most_bytes):
        size *= 2
    return size


def ports(base_bytes: int, *, cpus: int, most: int) -> int:
    """Return how many ports a guest's device has: one for each 8 MiB of its template, and two at least for each CPU.

    Two let a task on each CPU call Slurm from inside. It goes by the template's memory also where the guest boots, so
    that a job which has room for its tasks once has it always.

    Args:
        base_bytes: Memory of its template, see ``base_memory``.
        cpus: CPUs of the guest.
        most: The site's, or the device's own.

    >>> [ports(mib * 2**20, cpus=1, most=511) for mib in (160, 256, 1024, 4096)], ports(2**28, cpus=64, most=511)
    ([20, 32, 128, 511], 130)
    """
    return min(most, max(base_bytes // _PORT_BYTES, 2 * cpus + _PORTS_NOT_FOR_TASKS))


def ways_in(ports: int) -> int:
    """Return how many tasks and calls may be inside at once by this many ports."""
    return ports - _PORTS_NOT_FOR_TASKS


def fits(memory_bytes: int, base_bytes: int) -> bool:
    """Tell whether a guest of this memory can come from a template of ``base_bytes`` in less than the time of a boot.

    >>> [fits(gib * 2**30, 4 * 2**30) for gib in (1, 36, 37)]
    [True, True, False]
    """
    return growth(memory_bytes, base_bytes) <= _GROWTH_TIMES_MAX * base_bytes


def growth(memory_bytes: int, base_bytes: int) -> int:
    """Return how much a clone of a template of ``base_bytes`` is given on top: whole steps, so up to 4 MiB too little.

    >>> growth(259 * 2**20, 256 * 2**20), growth(262 * 2**20, 256 * 2**20) // 2**20
    (0, 4)
    """
    return max(0, memory_bytes - base_bytes) // _STEP_BYTES * _STEP_BYTES
