"""When carrelctld looks at Slurm's queue after a knock: the real loop, in virtual time, whose seconds are exact."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from carrel.config import Config, GuestNodes, Placement
from carrel.daemons.reconcile import QUIET_PERIOD_S, SOON_S
from carrel.model.pool import Look
from carrel.testing.guestnodes import Site, Trouble
from carrel.testing.virtualtime import VirtualLoop

LOOK_S = 0.04
"""As long as a look takes, of a Slurm that is not idle."""
QUIET_S = 20.0


def in_virtual_time(work: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())  # type: ignore[arg-type]


class Watched(Site):
    """A site in which nothing is to be done, and when it was looked at."""

    def __init__(self, tmp_path: Path) -> None:
        """Have one host and no job."""
        settings = Config(
            guest_nodes=GuestNodes(hosts="h1"), placement=Placement(table=str(tmp_path / "hosts.db"), policy="first")
        )
        super().__init__(settings, hosts={"h1": 8}, names=4, trouble=Trouble(), seed=0)
        self.looks_s: list[float] = []
        self.slurm.look = self._look  # type: ignore[method-assign]

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _look(self) -> Look:
        self.looks_s.append(self.now())
        await asyncio.sleep(LOOK_S)
        return Look(cluster="sim", jobs=(), nodes={}, reservations={})

    def knock(self) -> None:
        assert self.controller is not None
        self.controller.knocked()


@pytest.mark.parametrize("later_s", [0.0, 0.01, LOOK_S / 2, LOOK_S, 0.13, 0.37, 0.77])
def test_a_knock_is_followed_by_a_look_and_another_for_what_slurm_did_not_show_yet(
    tmp_path: Path, later_s: float
) -> None:
    async def work() -> None:
        of = Watched(tmp_path)
        of.begin()
        await asyncio.sleep(QUIET_S)
        before = of.looks_s[-2:]
        assert before[1] - before[0] > 5 * SOON_S, "nothing is to be seen, so looks are rare"
        await asyncio.sleep(before[1] + QUIET_PERIOD_S + LOOK_S - of.now() + later_s)
        knocked_s = of.now()
        of.knock()
        await asyncio.sleep(2 * SOON_S + 2 * LOOK_S)
        since = [look_s - knocked_s for look_s in of.looks_s if look_s >= knocked_s]
        assert len(since) >= 2
        assert since[0] <= SOON_S
        await asyncio.sleep(QUIET_S)
        last = of.looks_s[-2:]
        assert last[1] - last[0] > 5 * SOON_S
        await of.end()

    in_virtual_time(work)


def test_however_many_knock_a_look_follows_no_sooner_than_after_a_pause(tmp_path: Path) -> None:
    async def work() -> None:
        of = Watched(tmp_path)
        of.begin()
        await asyncio.sleep(QUIET_S)
        began_s = of.now()
        for _ in range(5000):
            of.knock()
            await asyncio.sleep(0.002)
        while_knocking = [at_s for at_s in of.looks_s if at_s >= began_s]
        pauses = [later - earlier for earlier, later in pairwise(while_knocking)]
        assert min(pauses) >= SOON_S - 1e-9
        assert len(while_knocking) >= 50, "they are heard all the while"
        await of.end()

    in_virtual_time(work)
