"""Which samples to remove: those that are too old, and a user's oldest beyond what one user may keep."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A job's directory."""

    user: str
    name: str
    ended_s: float
    """When something was last written there."""
    size_bytes: int
    finished: bool
    """Nothing is being sampled there."""


def doomed(kept: Iterable[Kept], *, now_s: float, keep_s: float, user_bytes_max: int) -> tuple[Kept, ...]:
    """Return what to remove, oldest first. What is not finished is never removed, but counted.

    Args:
        kept: All directories.
        now_s: The time.
        keep_s: What ended longer ago goes; 0: nothing goes for its age.
        user_bytes_max: A user's oldest go until so much is left; 0: nothing goes for its size.
    """
    users: dict[str, list[Kept]] = defaultdict(list)
    for one in kept:
        users[one.user].append(one)
    found: list[Kept] = []
    for theirs in users.values():
        total = sum(one.size_bytes for one in theirs)
        for one in sorted(theirs, key=lambda one: (one.ended_s, one.name)):
            old = 0 < keep_s < now_s - one.ended_s
            if one.finished and (old or 0 < user_bytes_max < total):
                found.append(one)
                total -= one.size_bytes
    return tuple(sorted(found, key=lambda one: (one.ended_s, one.user)))
