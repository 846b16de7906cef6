"""What guests use is read when somebody asks, and not while they start."""

import asyncio
import time
from collections.abc import Sequence

from carrel.daemons.measure import Measures
from carrel.errors import NotFoundError
from carrel.model.guest import Counters, Guest
from carrel.testing import FakeDriver
from carrel.testing.daemons import a_guest


class Meter(FakeDriver):
    """Counts how often it was read."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.gone = False

    async def read(self, name: str) -> Counters:
        self.reads.append(name)
        if self.gone:
            raise NotFoundError("gone")
        return Counters(memory_pss_bytes=len(self.reads))


def used(measures: Measures, guests: Sequence[Guest], *, max_age_s: float) -> dict[str, int | None]:
    found = asyncio.run(measures.of(guests, max_age_s=max_age_s))
    return {name: counters.memory_pss_bytes for name, counters in found.items()}


def test_a_reading_serves_all_who_accept_its_age() -> None:
    meter = Meter()
    measures = Measures(lambda _: meter)
    assert [used(measures, [a_guest()], max_age_s=60) for _ in range(2)] == [{a_guest().name: 1}] * 2
    assert used(measures, [a_guest()], max_age_s=0) == {a_guest().name: 2}


def test_a_guest_that_has_only_just_started_is_left_alone() -> None:
    meter = Meter()
    new = a_guest(ready_s=time.time())
    assert used(Measures(lambda _: meter), [new, a_guest(name="8.1.0", state="starting")], max_age_s=60) == {}
    assert meter.reads == []


def test_a_guest_that_ends_while_it_is_read_has_no_counters() -> None:
    meter = Meter()
    measures = Measures(lambda _: meter)
    used(measures, [a_guest()], max_age_s=0)
    meter.gone = True
    assert used(measures, [a_guest()], max_age_s=0) == {}
