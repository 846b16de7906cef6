"""What carrelctld says of itself while it can do nothing for jobs that wait: the real loop, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from carrel.config import Config, GuestNodes, Placement
from carrel.model.pool import PoolJob
from carrel.testing.guestnodes import Site, Trouble
from carrel.testing.virtualtime import VirtualLoop

END_S = 300.0
SILENT_S = 10.0


def site(tmp_path: Path, *hosts: str) -> Site:
    """Return a site that is set up for h1 and h2, and has these hosts in its table."""
    settings = Config(
        guest_nodes=GuestNodes(hosts="h[1-2]", host_silent_s=SILENT_S),
        placement=Placement(table=str(tmp_path / "hosts.db"), policy="first"),
    )
    return Site(settings, hosts=dict.fromkeys(hosts, 8), names=8, trouble=Trouble(), seed=0)


def in_virtual_time(work: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())  # type: ignore[arg-type]


async def until(fact: Callable[[], bool]) -> bool:
    end_s = asyncio.get_running_loop().time() + END_S
    while not fact() and asyncio.get_running_loop().time() < end_s:  # noqa: ASYNC110  # virtual time waits for nobody
        await asyncio.sleep(0.5)
    return fact()


def said(of: Site) -> str:
    assert of.controller is not None
    return of.controller.trouble


def test_that_slurm_does_not_answer_is_said_until_it_does(tmp_path: Path) -> None:
    async def work() -> None:
        of = site(tmp_path, "h1", "h2")
        of.slurm.answers = False
        of.begin()
        assert await until(lambda: said(of) == "slurmctld does not answer")
        of.slurm.answers = True
        assert await until(lambda: not said(of))
        await of.end()

    in_virtual_time(work)


def test_a_host_that_never_spoke_is_named_and_not_waited_for_beyond_the_bound(tmp_path: Path) -> None:
    async def work() -> None:
        of = site(tmp_path, "h1", "h2")
        absent = of.hosts.pop("h2")
        job_id = of.slurm.submit(cpus=1, nodes=1, runs_s=1.0)
        of.begin()
        assert await until(lambda: said(of) == f"waits for the first words of h2, {SILENT_S:g} s at most")
        assert await until(lambda: of.slurm.ended(job_id))
        assert not said(of)
        assert of.controller is not None
        assert of.controller.silent == ("h2",)
        absent.lose_power()
        await of.end()

    in_virtual_time(work)


def test_a_slurm_that_lets_carrelctld_hold_nothing_is_said_and_not_asked_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def hold(_: PoolJob) -> str:
        nonlocal asked
        asked += 1
        return "Access/permission denied"

    async def work() -> None:
        of = site(tmp_path, "h1", "h2")
        monkeypatch.setattr(of.slurm, "hold", hold)
        of.slurm.submit(cpus=1, nodes=1, runs_s=1.0)
        of.begin()
        assert await until(lambda: said(of).startswith("slurm does not let carrelctld hold job 1; it must run as"))
        before = asked
        await asyncio.sleep(60.0)
        assert 0 < asked - before <= 60.0 / 0.1
        monkeypatch.undo()
        assert await until(lambda: not said(of))
        await of.end()

    in_virtual_time(work)


def test_no_guest_goes_to_a_host_of_the_table_that_the_settings_do_not_name(tmp_path: Path) -> None:
    """It reports, as a compute node that was added by mistake does, and nobody tells it to carry anything."""

    async def work() -> None:
        of = site(tmp_path, "c1", "h1", "h2")
        of.hosts.pop("c1")
        first = [of.slurm.submit(cpus=8, nodes=1, runs_s=30.0) for _ in range(2)]
        waiting = of.slurm.submit(cpus=8, nodes=1, runs_s=1.0)
        of.begin()
        why = "guest_nodes names no host c1, which carrel host list shows"
        assert await until(lambda: of.slurm.jobs[waiting].comment.endswith(why)), of.slurm.jobs[waiting]
        assert {place.host for place in of.table.places()} == {"h1", "h2"}
        assert await until(lambda: all(of.slurm.ended(job) for job in (*first, waiting)))
        await of.end()

    in_virtual_time(work)
