"""What guests use, read as rarely as those who ask allow: for a guest's memory the kernel walks all of its pages.

See ``docs/reference/clones.md`` for what a reading costs.
"""

import time
from collections.abc import Callable, Sequence

from carrel.errors import CarrelError
from carrel.model.guest import Counters, Guest
from carrel.ports import Driver


class Measures:
    """The last reading of each guest of a node."""

    def __init__(self, driver: Callable[[str], Driver]) -> None:
        """Read through the driver of a guest, found by its name."""
        self._driver = driver
        self._seen: dict[str, tuple[float, Counters]] = {}

    async def of(self, guests: Sequence[Guest], *, max_age_s: float) -> dict[str, Counters]:
        """Return the counters of those that can be read, none of them older than this.

        A guest younger than ``max_age_s`` is left out: while it starts, it has better things to do.
        """
        living = {guest.name: guest for guest in guests if guest.state in {"ready", "suspended"}}
        self._seen = {name: seen for name, seen in self._seen.items() if name in living}
        for name, guest in living.items():
            if self._due(guest, max_age_s):
                try:
                    self._seen[name] = time.time(), await self._driver(guest.driver).read(name)
                except CarrelError:  # it ended meanwhile
                    self._seen.pop(name, None)
        return {name: counters for name, (_, counters) in self._seen.items() if counters != Counters()}

    def _due(self, guest: Guest, max_age_s: float) -> bool:
        read_s, _ = self._seen.get(guest.name, (guest.ready_s or 0.0, None))
        age_s = time.time() - read_s
        return age_s >= max_age_s or age_s < 0  # the clock was set back
