"""Launches by the hundred while clones fail, hosts die and the controller is killed: the real one, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from carrel.config import Addresses, Config, GuestLogs, GuestNodes, Guests, Launches, Placement
from carrel.errors import UnreachableError
from carrel.model.guestnode import HostReport, Orders
from carrel.model.host import Demand, Here
from carrel.testing.fardriver import SILENT_S
from carrel.testing.guestnodes import Site, Trouble
from carrel.testing.guestslurm import MIB
from carrel.testing.virtualtime import VirtualLoop

HOSTS = {f"h{number}": 8 for number in range(1, 7)}
JOBS = 100
END_S = 3600.0
CLEAN_S = 120.0


def site(tmp_path: Path, trouble: Trouble, *, seed: int = 0, addresses: Addresses | None = None) -> Site:
    settings = Config(
        guest_nodes=GuestNodes(hosts="h[1-6]", host_silent_s=10.0),
        placement=Placement(
            table=str(tmp_path / "hosts.db"),
            launches=Launches(backoff_s=1.0, rest_s=5.0, rest_max_s=20.0),
            addresses=addresses or Addresses(),
        ),
    )
    return Site(settings, hosts=HOSTS, names=60, trouble=trouble, seed=seed)


def far_site(tmp_path: Path, trouble: Trouble, *, seed: int) -> Site:
    """Return a site whose hosts carry no carreld, with a slurmd inside each guest."""
    near = site(tmp_path, trouble, seed=seed).settings
    nodes = GuestNodes(remote={"far": "h[1-6]"}, host_silent_s=10.0, join_max_s=30.0)
    guests = Guests(driver="far", logs=GuestLogs(dir=str(tmp_path / "logs")))
    settings = msgspec.structs.replace(near, guest_nodes=nodes, guests=guests)
    return Site(settings, hosts=HOSTS, names=60, trouble=trouble, seed=seed)


def in_virtual_time(work: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())  # type: ignore[arg-type]


async def until(fact: Callable[[], bool], within_s: float) -> bool:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + within_s
    while not fact() and loop.time() < end_s:  # noqa: ASYNC110  # virtual time waits for nobody
        await asyncio.sleep(1.0)
    return fact()


def over(of: Site, job_id: int) -> bool:
    """Tell whether a job has ended, or waits for a person who reads why."""
    return of.slurm.ended(job_id) or of.slurm.jobs[job_id].comment.startswith("no guest after")


async def all_end(of: Site, jobs: list[int], troubles: asyncio.Future[None]) -> None:
    """See that each job ends or waits for a person, that nothing wrong was seen and nothing is left."""
    assert await until(lambda: troubles.done() and all(over(of, job) for job in jobs), END_S), [
        of.slurm.jobs[job] for job in jobs if not over(of, job)
    ]
    for job in jobs:
        if not of.slurm.ended(job):
            await of.slurm.cancel(of.slurm.jobs[job].job)
    assert await until(lambda: not of.leaks(), CLEAN_S), of.leaks()
    assert of.wrong == [], of.wrong
    await of.end()


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(0, True), *(pytest.param(seed, kills, marks=pytest.mark.fuzz) for seed in (1, 2) for kills in (False, True))],
)
def test_a_hundred_launches_among_failures_all_end_and_leave_nothing(tmp_path: Path, seed: int, *, kills: bool) -> None:
    async def work() -> None:
        of = site(tmp_path, Trouble(clone_fails=0.3, clone_slow=0.1), seed=seed)
        of.begin()
        jobs = [
            of.slurm.submit(
                cpus=of.random.randint(1, 4), nodes=of.random.choice((1, 1, 1, 2)), runs_s=of.random.uniform(1, 60)
            )
            for _ in range(JOBS)
        ]
        troubles = asyncio.ensure_future(_troubles(of, kills=kills))
        await all_end(of, jobs, troubles)

    in_virtual_time(work)


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(0, True), *(pytest.param(seed, kills, marks=pytest.mark.fuzz) for seed in (1, 2) for kills in (False, True))],
)
def test_guests_made_from_the_controller_all_end_and_leave_nothing_too(
    tmp_path: Path, seed: int, *, kills: bool
) -> None:
    async def work() -> None:
        of = far_site(tmp_path, Trouble(clone_fails=0.2, clone_slow=0.1), seed=seed)
        of.begin()
        jobs = [
            of.slurm.submit(cpus=of.random.randint(1, 4), nodes=of.random.choice((1, 1, 1, 2)), runs_s=20)
            for _ in range(JOBS // 4)
        ]
        troubles = asyncio.ensure_future(_far_troubles(of, kills=kills))
        await all_end(of, jobs, troubles)

    in_virtual_time(work)


async def _far_troubles(of: Site, *, kills: bool) -> None:
    """Have machines vanish or be switched off, their hypervisor go away, and the controller be killed."""
    for _ in range(20):
        await asyncio.sleep(of.random.uniform(0.2, 8.0))
        match of.random.randrange(3):
            case 0:
                of.hypervisor.lose(of.random.choice(list(of.hosts)))
            case 1:
                of.hypervisor.away = True
                await asyncio.sleep(of.random.uniform(0.5, 2 * SILENT_S))
                of.hypervisor.away = False
        if kills:
            await of.kill_controller(away_s=of.random.uniform(0, 3))


async def _troubles(of: Site, *, kills: bool) -> None:
    """Have hosts lose power, guests die, and the controller be killed, at times that nobody chose."""
    for _ in range(30):
        await asyncio.sleep(of.random.uniform(0.2, 8.0))
        host = of.random.choice(list(of.hosts.values()))
        match of.random.randrange(3):
            case 0:
                host.lose_power()
                asyncio.get_running_loop().call_later(of.random.uniform(1, 60), host.begin)
            case 1:
                host.kill_a_guest()
        if kills:
            await of.kill_controller(away_s=of.random.uniform(0, 3))


def test_a_job_that_never_starts_on_its_nodes_is_held_with_a_reason_after_some_attempts(tmp_path: Path) -> None:
    async def work() -> None:
        of = site(tmp_path, Trouble(nothing_starts=True))
        of.begin()
        job = of.slurm.submit(cpus=1, nodes=1, runs_s=1)
        said = "it had its nodes 5 times and did not start on them"
        assert await until(lambda: said in of.slurm.jobs[job].comment, END_S), of.slurm.jobs[job]
        assert of.slurm.jobs[job].past == ["NODE_FAIL"] * 5
        await asyncio.sleep(600)
        assert of.slurm.jobs[job].job.reason == "JobHeldAdmin"
        assert not of.leaks()
        await of.end()

    in_virtual_time(work)


def test_a_host_that_speaks_again_is_not_told_what_it_carried_before(tmp_path: Path) -> None:
    async def work() -> None:
        of = site(tmp_path, Trouble())
        of.begin()
        job = of.slurm.submit(cpus=1, nodes=1, runs_s=1000)
        assert await until(lambda: of.slurm.jobs[job].job.job.slurm_state == "RUNNING", CLEAN_S)
        (host,) = {host for host, _, _ in of.guests()}
        of.hosts[host].lose_power()
        await asyncio.sleep(2 * of.settings.guest_nodes.host_silent_s)
        await of.slurm.cancel(of.slurm.jobs[job].job)
        await asyncio.sleep(CLEAN_S)
        of.hosts[host].begin()
        for _ in range(100):
            await asyncio.sleep(0.1)
            assert of.guests() == []
        assert await until(lambda: not of.leaks(), CLEAN_S), of.leaks()
        await of.end()

    in_virtual_time(work)


async def _on_two_hosts(of: Site) -> tuple[int, set[str]]:
    """Return a job that runs on guests of two hosts, and the hosts."""
    of.begin()
    job = of.slurm.submit(cpus=max(HOSTS.values()), nodes=2, runs_s=200)
    assert await until(lambda: of.slurm.jobs[job].job.job.slurm_state == "RUNNING", CLEAN_S)
    hosts = {host for host, _, _ in of.guests()}
    assert len(hosts) == 2
    return job, hosts


@pytest.mark.parametrize("killed", [True, False], ids=["a new controller has not heard it yet", "carreld is away"])
def test_a_job_that_runs_keeps_its_guests_while_one_of_its_hosts_is_not_heard(tmp_path: Path, *, killed: bool) -> None:
    async def work() -> None:
        of = site(tmp_path, Trouble())
        job, hosts = await _on_two_hosts(of)
        late, heard = max(hosts), asyncio.Event()
        exchange = of.exchange

        async def held_up(report: HostReport, digest: str) -> Orders:
            if report.host == late and not heard.is_set():
                raise UnreachableError("its way here is cut")
            return await exchange(report, digest)

        of.exchange = held_up  # type: ignore[method-assign]
        if killed:
            await of.kill_controller(away_s=1.0)
        for _ in range(5 if killed else 40):
            await asyncio.sleep(1.0)
            assert {host for host, _, _ in of.guests()} == hosts
        heard.set()
        assert await until(lambda: of.slurm.ended(job), END_S)
        assert of.slurm.jobs[job].past == ["COMPLETED"]
        assert await until(lambda: not of.leaks(), CLEAN_S), of.leaks()
        await of.end()

    in_virtual_time(work)


ORPHAN = "900.1600000000.0"
DEMAND = Demand(cpus=2, memory_bytes=320 * MIB)


def orphaned(tmp_path: Path, host: str) -> tuple[Site, Path]:
    """Return a site whose table and list name runs that Slurm has forgotten; one of them has room on a host."""
    shared = tmp_path / "addresses.csv"
    shared.write_text("#IP;SLURM_JOB_ID;USED\n10.0.0.1;900;USED\n10.0.0.2;901;USED\n10.0.0.3;1;USED\n")
    of = site(tmp_path, Trouble(), addresses=Addresses(list=str(shared)))
    of.table.take(ORPHAN, DEMAND, lambda _: Here((host,)))
    of.table.take_addresses("902.1600000000.0", 1, ["10.1.0.1"])
    of.slurm.submit(cpus=1, nodes=1, runs_s=1000)
    return of, shared


def test_what_runs_took_whose_end_nobody_noticed_is_given_back(tmp_path: Path) -> None:
    async def work() -> None:
        of, shared = orphaned(tmp_path, "h1")
        of.begin()
        assert await until(lambda: not of.table.places(ORPHAN), CLEAN_S)
        assert await until(
            lambda: shared.read_text().splitlines()[1:] == ["10.0.0.1;;", "10.0.0.2;;", "10.0.0.3;1;USED"], CLEAN_S
        ), shared.read_text()
        assert of.table.take_addresses("1.1.0", 1, ["10.1.0.1"]) == ("10.1.0.1",)
        await of.end()

    in_virtual_time(work)


@pytest.mark.parametrize("silent", ["slurm", "host"])
def test_nothing_is_given_back_while_nobody_can_tell(tmp_path: Path, silent: str) -> None:
    async def work() -> None:
        of, shared = orphaned(tmp_path, "h1")
        of.begin()
        of.slurm.answers = silent != "slurm"
        if silent == "host":
            of.hosts["h1"].lose_power()
        await asyncio.sleep(600)
        assert of.table.places(ORPHAN)
        assert "10.0.0.1;900;USED" in shared.read_text()
        of.slurm.answers = True
        of.hosts["h1"].begin()
        assert await until(lambda: not of.table.places(ORPHAN) and "10.0.0.1;;" in shared.read_text(), CLEAN_S)
        await of.end()

    in_virtual_time(work)
