# ruff: noqa: S311  # chance here keeps no secret
"""The table of hosts under many askers and under SIGKILL: nothing is promised twice and nothing stays behind."""

import functools
import multiprocessing
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.core.placement import Hosts, place
from carrel.errors import NotFoundError, RefusedError, UnreachableError
from carrel.hosts.table import Facts, HostTable, Place
from carrel.model.host import Answer, Demand, Here, Host, NotNow
from carrel.testing.daemons import wait_for

ONE = Demand(cpus=1, memory_bytes=1)
CAPACITY = 37
ASKERS = 100

DEEDS = ("take", "take", "give back", "drain", "undrain", "grow")

_fork = multiprocessing.get_context("fork")


def chosen(demand: Demand) -> Callable[[Hosts], Answer]:
    return functools.partial(place, demand=demand, policy="best-fit")


def take(table: HostTable, run: str, demand: Demand = ONE) -> Answer:
    return table.take(run, demand, chosen(demand))


@pytest.fixture
def table(tmp_path: Path) -> HostTable:
    made = HostTable(tmp_path / "hosts.db")
    made.put(Facts(name=f"h{number}", cpus=cpus, memory_bytes=100) for number, cpus in enumerate((20, 10, 7)))
    return made


def test_of_a_hundred_askers_at_once_exactly_as_many_get_a_place_as_there_are(table: HostTable) -> None:
    answers: list[Answer] = []
    go = threading.Barrier(ASKERS)

    def ask(number: int) -> None:
        own = HostTable(table._path)
        go.wait()
        answers.append(take(own, f"run{number}"))
        own.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(ASKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(isinstance(answer, Here) for answer in answers) == CAPACITY
    assert sum(isinstance(answer, NotNow) for answer in answers) == ASKERS - CAPACITY
    assert [host.cpus_used for host in table.hosts()] == [20, 10, 7]


def test_a_table_that_somebody_keeps_locked_loses_no_asker(table: HostTable) -> None:
    answers: list[Answer] = []
    other = sqlite3.connect(table._path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    threads = [
        threading.Thread(target=lambda number=number: answers.append(take(table, f"run{number}")))
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    assert [host.cpus_used for host in table_read(table)] == [0, 0, 0]
    other.execute("ROLLBACK")
    other.close()
    for thread in threads:
        thread.join(60)
    assert [isinstance(answer, Here) for answer in answers] == [True] * 20


def table_read(table: HostTable) -> list[Host]:
    """What another process sees meanwhile: whoever reads waits for no writer."""
    other = HostTable(table._path)
    found = other.hosts()
    other.close()
    return found


def _ask_until_killed(path: Path, number: int) -> None:
    table, random = HostTable(path), Random(number)
    while True:
        guests = random.randint(1, 5)
        run = f"run{number}.{guests}"
        take(table, run, Demand(cpus=2, memory_bytes=1, count=guests))
        if random.random() < 0.7:
            table.give_back(run)


def _is_beyond(table: HostTable, mark: int) -> bool:
    return table.mark() > mark


def test_whoever_is_killed_has_all_places_of_a_run_or_none_and_a_sweep_returns_them(table: HostTable) -> None:
    before, random = table.hosts(), Random(1)
    table.close()
    for number in range(15):
        child = _fork.Process(target=_ask_until_killed, args=(table._path, number), daemon=True)
        child.start()
        wait_for(functools.partial(_is_beyond, table, table.mark()), "the child takes places")
        child.join(random.random() * 0.02)
        child.kill()
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
        hosts = table.hosts()
        assert all(host.cpus_used <= host.cpus for host in hosts)
        by_run: dict[str, list[Place]] = {}
        for one in table.places():
            by_run.setdefault(one.run, []).append(one)
        assert all(len(places) == int(run.rpartition(".")[2]) for run, places in by_run.items())
        assert set(table.sweep((), before=table.mark())) == set(by_run)
        assert table.hosts() == before
        table.close()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_places_taken_or_given_back_twice_are_taken_or_given_back_once(history: list[tuple[int, bool]]) -> None:
    table = HostTable(Path(":memory:"))
    table.put([Facts(name="h", cpus=3, memory_bytes=9)])
    holding: set[int] = set()
    for run, takes in history:
        if not takes:
            table.give_back(str(run))
            holding.discard(run)
        elif isinstance(take(table, str(run)), Here):
            holding.add(run)
        else:
            assert len(holding) == 3
        assert table.hosts()[0].cpus_used == len(holding)
    table.close()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.sampled_from(DEEDS)), max_size=12))
def test_what_others_do_to_the_table_is_seen_by_whoever_keeps_it_sorted(history: list[tuple[int, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "hosts.db"
        tables = (HostTable(path), HostTable(path))
        tables[0].put([Facts(name="h0", cpus=3, memory_bytes=9), Facts(name="h1", cpus=2, memory_bytes=9)])
        for who, run, deed in history:
            match deed:
                case "take":
                    take(tables[who], str(run), Demand(cpus=1 + run % 2, memory_bytes=1))
                case "give back":
                    tables[who].give_back(str(run))
                case "drain":
                    tables[who].drain("h0", "a disk")
                case "undrain":
                    tables[who].undrain("h0")
                case "grow":
                    tables[who].put([Facts(name=f"h{run}", cpus=4 + run, memory_bytes=9)])
            fresh = HostTable(path)
            assert [table.hosts() for table in tables] == [fresh.hosts()] * 2
            fresh.close()
        for table in tables:
            table.close()


def test_a_place_that_could_not_be_written_is_not_taken_in_memory_either(table: HostTable) -> None:
    before = table.hosts()
    with pytest.raises(UnreachableError, match="FOREIGN KEY"):
        table.take("run", Demand(cpus=1, memory_bytes=1, count=2), lambda _: Here(("h0", "nosuch")))
    assert table.hosts() == before
    assert table.places() == []


def test_a_run_that_asks_again_gets_the_same_places(table: HostTable) -> None:
    demand = Demand(cpus=6, memory_bytes=1, count=3)
    first = take(table, "run", demand)
    assert isinstance(first, Here)
    assert take(table, "run", demand) == first
    assert [one.host for one in table.places("run")] == list(first.hosts)


def test_a_run_does_not_grow_beyond_what_it_was_admitted_with(table: HostTable) -> None:
    take(table, "run", ONE)
    with pytest.raises(RefusedError, match="was admitted with other guests than 2 CPUs"):
        take(table, "run", Demand(cpus=2, memory_bytes=1))


def test_a_sweep_spares_what_was_taken_after_its_look_began(table: HostTable) -> None:
    take(table, "old")
    mark = table.mark()
    take(table, "young")
    assert table.sweep((), before=mark) == ["old"]
    assert [one.run for one in table.places()] == ["young"]


def test_a_sweep_frees_addresses_whose_run_has_no_place(table: HostTable) -> None:
    table.take_addresses("gone", 1, ("10.0.0.1",))
    table.sweep((), before=table.mark())
    assert table.take_addresses("other", 1, ("10.0.0.1",)) == ("10.0.0.1",)


def test_hosts_keep_the_order_in_which_they_were_added_also_when_refreshed(table: HostTable) -> None:
    table.put([Facts(name="h1", cpus=11, memory_bytes=100, cpus_others=4)])
    assert [(host.name, host.cpus, host.cpus_used) for host in table.hosts()] == [
        ("h0", 20, 0),
        ("h1", 11, 4),
        ("h2", 7, 0),
    ]


def test_a_drained_host_gets_no_further_guest_and_keeps_those_it_has(table: HostTable) -> None:
    take(table, "run", Demand(cpus=15, memory_bytes=1))
    table.drain("h0", "new disks")
    assert (table.hosts()[0].state, table.hosts()[0].reason) == ("drained", "new disks")
    assert isinstance(take(table, "other", Demand(cpus=12, memory_bytes=1)), NotNow)
    assert [one.run for one in table.places()] == ["run"]
    table.undrain("h0")
    assert table.hosts()[0].state == "up"


def test_a_host_that_carries_guests_is_not_removed(table: HostTable) -> None:
    take(table, "run", Demand(cpus=15, memory_bytes=1))
    with pytest.raises(RefusedError, match="'h0' carries 1 guest;"):
        table.remove("h0")
    table.give_back("run")
    table.remove("h0")
    assert [host.name for host in table.hosts()] == ["h1", "h2"]


def test_a_host_that_is_not_there_is_not_found(table: HostTable) -> None:
    for deed in (table.remove, table.undrain, lambda name: table.drain(name, "why")):
        with pytest.raises(NotFoundError, match="no host 'x'; see: carrel host list"):
            deed("x")


def test_a_host_of_nothing_is_refused(table: HostTable) -> None:
    with pytest.raises(RefusedError, match="carry nothing"):
        table.put([Facts(name="x", cpus=0, memory_bytes=1)])


def test_addresses_are_one_guests_each_until_its_run_gives_back(table: HostTable) -> None:
    pool = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    take(table, "a", Demand(cpus=1, memory_bytes=1, count=2))
    assert table.take_addresses("a", 1, pool) == ("10.0.0.1",)
    assert table.take_addresses("a", 2, pool) == ("10.0.0.1", "10.0.0.2")
    take(table, "b")
    assert table.take_addresses("b", 2, pool) is None
    assert table.take_addresses("b", 1, pool) == ("10.0.0.3",)
    assert [one.address for one in table.places()] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    table.give_back("a")
    assert table.take_addresses("c", 2, pool) == ("10.0.0.1", "10.0.0.2")


def test_a_file_that_is_no_database_or_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hosts.db"
    path.write_text("no database, but somebody's text " * 99)
    with pytest.raises(UnreachableError, match="not a database"):
        HostTable(path).hosts()
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UnreachableError, match="version 99 is of a later Carrel"):
        HostTable(path).hosts()
