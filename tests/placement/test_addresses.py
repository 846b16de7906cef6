"""Addresses of guests: ranges, the list that others share, and a clone that still has its parent's."""

import fcntl
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.config import Addresses, Placement
from carrel.core.addresses import expand, guest_address
from carrel.errors import CarrelError, UnreachableError
from carrel.hosts.admission import Admission
from carrel.hosts.sharedlist import SharedList
from carrel.hosts.table import Facts
from carrel.model.host import Demand
from carrel.testing.daemons import wait_for

TITLE = "#IP;SLURM_JOB_ID;USED"
ADDRESSES = [f"192.168.0.{number}" for number in range(1, 253)]

_fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "addresses.csv"
    made.write_text("\n".join([TITLE, *(f"{address};;" for address in ADDRESSES)]) + "\n")
    return made


def test_each_of_252_takers_at_once_gets_an_address_of_its_own_and_the_253rd_gets_none(path: Path) -> None:
    before = path.read_text()
    taken: list[tuple[str, ...] | None] = []

    def take(first: int) -> None:
        mine = SharedList(path)
        taken.extend(mine.take(job_id, 1) for job_id in range(first, first + 21))

    threads = [threading.Thread(target=take, args=(first,)) for first in range(1, 253, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(address for found in taken if found for address in found) == sorted(ADDRESSES)
    assert SharedList(path).take(253, 1) is None
    SharedList(path).free(range(1, 253))
    assert path.read_text() == before


def test_a_taken_line_names_its_job_as_other_programs_expect(path: Path) -> None:
    shared = SharedList(path)
    assert shared.take(4711, 2) == ("192.168.0.1", "192.168.0.2")
    assert path.read_text().splitlines()[:4] == [
        TITLE,
        "192.168.0.1;4711;USED",
        "192.168.0.2;4711;USED",
        "192.168.0.3;;",
    ]
    assert shared.take(4711, 2) == ("192.168.0.1", "192.168.0.2")
    assert shared.take(4711, 1) == ("192.168.0.1",)
    assert shared.jobs() == {4711}


def test_lines_of_dead_jobs_are_freed_and_those_of_a_person_stay(path: Path) -> None:
    text = f"{TITLE}\n10.0.0.1;;USED\n10.0.0.2;8;USED\n10.0.0.3;9;USED\nwhat is this\n10.0.0.4;eight;USED\n"
    path.write_text(text)
    shared = SharedList(path)
    assert shared.take(1, 1) is None
    shared.free({8, 77})
    assert path.read_text() == text.replace("10.0.0.2;8;USED", "10.0.0.2;;")
    assert shared.take(1, 1) == ("10.0.0.2",)


def test_the_list_keeps_its_owner_and_mode(path: Path) -> None:
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1001, 1001)
    before = path.stat()
    SharedList(path).take(1, 1)
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_list_that_somebody_keeps_locked_is_asked_again_later_and_then_gives(path: Path) -> None:
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnreachableError, match=r"locked by somebody else for 0\.1 s"):
            SharedList(path, lock_timeout_s=0.1).take(1, 1)
        found: list[tuple[str, ...] | None] = []
        waiter = threading.Thread(target=lambda: found.append(SharedList(path).take(1, 1)))
        waiter.start()
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiter.join(30)
    assert found == [("192.168.0.1",)]


def test_a_list_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="is it the list of addresses"):
        SharedList(tmp_path / "none.csv").take(1, 1)
    with pytest.raises(UnreachableError, match="can this user write there"):
        SharedList(tmp_path / "no" / "none.csv").take(1, 1)


def _take_until_killed(path: Path) -> None:
    shared = SharedList(path)
    while True:
        shared.take(7, 5)
        shared.free({7})


def test_a_taker_that_is_killed_leaves_a_whole_list_and_no_lock(path: Path) -> None:
    whole = path.read_text()
    for _ in range(8):
        inode = path.stat().st_ino
        child = _fork.Process(target=_take_until_killed, args=(path,), daemon=True)
        child.start()
        wait_for(lambda before=inode: path.stat().st_ino != before, "the child changes the list")  # type: ignore[misc]
        child.kill()
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
        assert path.read_text() in (whole, whole.replace(";;\n", ";7;USED\n", 5))
        SharedList(path).free({7})
        assert path.read_text() == whole
    SharedList(path).take(7, 1)
    assert sorted(each.name for each in path.parent.iterdir()) == ["addresses.csv", "addresses.csv.lock"]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=20),
    st.integers(0, 6),
)
def test_no_address_of_a_range_is_of_two_runs(history: list[tuple[int, int]], size: int) -> None:
    settings = Placement(
        table=":memory:", addresses=Addresses(static=(f"10.0.0.1-10.0.0.{size}",) if size else ("10.0.0.1",))
    )
    admission = Admission(settings)
    holding: dict[int, tuple[str, ...]] = {}
    for run, count in history:
        if count == 0:
            admission.give_back(f"{run}.9.0")
            holding.pop(run, None)
            continue
        found = admission.take_addresses(f"{run}.9.0", count)
        if found is not None:
            assert len(found) == count
            assert set(holding.get(run, ())) <= set(found) or len(holding[run]) > count
            holding[run] = max(found, holding.get(run, ()), key=len)
        else:
            others = sum(len(each) for other, each in holding.items() if other != run)
            assert others + count > max(size, 1)
        given_away = [address for each in holding.values() for address in each]
        assert len(given_away) == len(set(given_away))
    admission.table.close()


def test_a_run_gives_its_places_and_its_addresses_back_together(path: Path, tmp_path: Path) -> None:
    before = path.read_text()
    admission = Admission(Placement(table=str(tmp_path / "hosts.db"), addresses=Addresses(list=str(path))))
    admission.table.put([Facts(name="h", cpus=4, memory_bytes=9)])
    admission.take("4711.9.0", Demand(cpus=1, memory_bytes=1))
    assert admission.take_addresses("4711.9.0", 1) == ("192.168.0.1",)
    assert admission.listed_jobs() == {4711}
    admission.give_back("4711.9.0")
    assert (admission.table.places(), path.read_text()) == ([], before)
    admission.take_addresses("5.9.0", 1)
    admission.free_listed({5})
    assert path.read_text() == before


def test_a_site_without_a_pool_gives_no_addresses(tmp_path: Path) -> None:
    assert Admission(Placement(table=str(tmp_path / "hosts.db"))).take_addresses("1.9.0", 3) == ()


def test_ranges_are_expanded_in_order_and_each_address_comes_once() -> None:
    assert expand(["10.0.0.2", "10.0.0.1 - 10.0.0.3", "10.0.1.0/30"]) == (
        *("10.0.0.2", "10.0.0.1", "10.0.0.3"),
        *("10.0.1.1", "10.0.1.2"),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.9-10.0.0.1", "its end comes before its beginning"),
        ("10.0.0.0/8", "a pool has 65536 at most"),
        ("10.0.0.1-10.9.0.1", "a pool has 65536 at most"),
        ("10.0.0.7/24", "host bits set"),
        ("fd00::1", "Expected 4 octets"),
        ("", "is no range"),
    ],
)
def test_what_is_no_range_is_named(text: str, why: str) -> None:
    with pytest.raises(CarrelError, match=why):
        expand([text])


@pytest.mark.parametrize(
    ("seen", "own"),
    [
        (["10.0.0.5"], None),
        (["127.0.0.1", "169.254.3.4", "fe80::1", "0.0.0.0", "no address"], None),  # noqa: S104  # nobody listens
        (["10.0.0.5", "10.0.0.6/24"], "10.0.0.6"),
        ([], None),
    ],
)
def test_a_clone_has_its_own_address_only_when_it_is_not_its_parents(seen: list[str], own: str | None) -> None:
    assert guest_address(seen, parents={"10.0.0.5"}) == own
