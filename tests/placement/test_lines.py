"""The queue over the table of hosts: what goes wrong on the way to room costs no job its turn, and takes no room."""

from pathlib import Path

import pytest

from carrel.config import Addresses, Config, GuestNodes, Launches, Placement
from carrel.core.guestdeeds import FindRoom
from carrel.core.queue import AGAIN_S, Launch
from carrel.daemons.kinds import Kinds
from carrel.daemons.lines import Lines
from carrel.hosts.admission import Admission
from carrel.hosts.table import Facts
from carrel.model.guest import GuestRequest
from carrel.model.host import Demand
from carrel.model.job import Job, JobKey
from carrel.model.pool import PoolJob, Wish
from carrel.model.template import Recipe

GIB = 2**30


class Far:
    """Hosts whose guests need addresses of the site's pool."""

    hosts = frozenset({"esx"})
    why_silent = ""

    def recipe(self, request: GuestRequest) -> Recipe:
        assert request.image
        return Recipe(clone="full", pooled=True)


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


def lines(directory: Path, addresses: Addresses, clock: list[float]) -> tuple[Lines, Admission]:
    admission = Admission(Placement(table=str(directory / "hosts.db"), addresses=addresses))
    admission.table.put([Facts(name=name, cpus=4, memory_bytes=GIB) for name in ("esx", "h1")])
    settings = Config(guest_nodes=GuestNodes(hosts="h1", remote={"far": "esx"}))
    kinds = Kinds(settings, {"far": Far()}, has_addresses=admission.has_addresses)
    return Lines(admission, Launches(), kinds=kinds, clock=lambda: clock[0]), admission


def seek(of: Lines, job_id: int, driver: str) -> JobKey:
    key = JobKey(cluster="c", job_id=job_id, submit_s=job_id)
    wish = Wish(request=GuestRequest(image="i", per="node", driver=driver), cwd="/", held_by_user=False)
    job = PoolJob(job=Job(key=key, state="held"), nodes=1, cpus=1, memory_bytes=1, wish=wish)
    of.add(job, FindRoom(key, Demand(cpus=1, memory_bytes=1), 0, "it waits for guests"))
    return key


def launched(of: Lines) -> set[JobKey]:
    return {run for run, action in of.launches(()) if isinstance(action, Launch)}


@pytest.mark.parametrize(
    ("addresses", "sentence"),
    [
        (Addresses(static=("10.0.0.9-10.0.0.1",)), "'10.0.0.9-10.0.0.1' is no range of addresses"),
        (Addresses(list="none.csv"), "is it the list of addresses"),
    ],
    ids=["range", "list"],
)
def test_a_pool_that_gives_no_addresses_is_a_reason_to_wait_for_those_alone_who_need_one(
    tmp_path: Path, addresses: Addresses, sentence: str, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of, admission = lines(tmp_path, addresses, clock)
    needs, other = seek(of, 1, "far"), seek(of, 2, "qemu")
    assert launched(of) == {other}
    assert sentence in dict(of.waiting())[needs]
    assert [place.host for place in admission.table.places()] == ["h1"], "room for a guest that cannot begin was kept"
    assert of.taken().listed == frozenset()


def test_an_address_that_another_program_gives_back_is_found_by_whoever_waits(
    tmp_path: Path, clock: list[float]
) -> None:
    shared = tmp_path / "pool.csv"
    shared.write_text("#IP;SLURM_JOB_ID;USED\n10.0.0.1;77;USED\n")
    of, _ = lines(tmp_path, Addresses(list=str(shared)), clock)
    needs = seek(of, 1, "far")
    assert not launched(of)
    assert dict(of.waiting())[needs] == "no address of the site's pool is free"
    shared.write_text("#IP;SLURM_JOB_ID;USED\n10.0.0.1;;\n")  # by another program, and nobody tells us
    clock[0] += AGAIN_S
    assert launched(of) == {needs}
    assert "10.0.0.1;1;" in shared.read_text()
