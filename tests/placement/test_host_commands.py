"""``carrel host`` and the REST API behind it, over a real carrelctld: what goes in comes out, and comes back."""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.cli import main
from carrel.config import Controller
from carrel.daemons import transport
from carrel.hosts.table import Facts, HostTable
from carrel.model.host import Demand, Here
from carrel.testing.daemons import ControllerProcess, a_report, wait_for

GIB = 2**30


@pytest.fixture(scope="module")
def daemon() -> Iterator[ControllerProcess]:
    directory = Path(tempfile.mkdtemp(prefix="chst"))
    directory.chmod(0o755)
    process = ControllerProcess(directory, extra="[placement.overcommit]\ncpus = 2.0\n")
    process.start()
    yield process
    process.kill()
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def site(daemon: ControllerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostTable]:
    """The controller's own table, empty again afterwards."""
    monkeypatch.setenv("CARREL_CONFIG", str(daemon.config))
    table = HostTable(daemon.directory / "hosts.db")
    yield table
    table.sweep((), before=table.mark())
    for host in table.hosts():
        table.remove(host.name)
    table.close()


def carrel(*words: str) -> int:
    return main.run(list(words))


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert carrel("host", "list", "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def report(daemon: ControllerProcess, name: str, *, cpus: int, memory_bytes: int) -> None:
    said = a_report(node=name, sent_s=time.time())
    facts = msgspec.structs.replace(said.facts, cpus=cpus, memory_bytes=memory_bytes)
    body = msgspec.json.encode(msgspec.structs.replace(said, facts=facts))
    transport.decoded(asyncio.run(transport.request(Controller(listen=daemon.listen), "POST", "/v1/reports", body)))


def test_a_host_goes_through_its_whole_life_and_the_table_returns_to_its_start(
    site: HostTable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys) == []
    assert carrel("host", "add", "node-no1", "--cpus=8", "--memory=16G") == 0
    (host,) = listed(capsys)
    assert (host["name"], host["cpus"], host["cpus_most"], host["memory_bytes"]) == ("node-no1", 8, 16, 16 * GIB)
    assert carrel("host", "query", "16", "1G") == 0
    assert capsys.readouterr().out == "here: node-no1\n"
    site.take("run", Demand(cpus=10, memory_bytes=GIB), lambda _: Here(("node-no1",)))
    assert carrel("host", "query", "7", "1G") == 1
    assert capsys.readouterr().out.startswith("not now: no room for 7 CPUs and 1 GiB")
    assert carrel("host", "query", "17", "1G") == 4
    assert capsys.readouterr().out.startswith("never: 17 CPUs and 1 GiB fit no host")
    assert carrel("host", "remove", "node-no1") == 4
    assert "'node-no1' carries 1 guest; first: carrel host drain node-no1" in capsys.readouterr().err
    assert carrel("host", "drain", "node-no1", "--reason=new disks") == 0
    assert [(one["state"], one["reason"], one["guests"]) for one in listed(capsys)] == [("drained", "new disks", 1)]
    assert carrel("host", "remove", "node-no1") == 4
    assert "'node-no1' carries 1 guest; its jobs: carrel host show node-no1" in capsys.readouterr().err
    site.give_back("run")
    assert carrel("host", "undrain", "node-no1") == 0
    assert listed(capsys) == [host]
    assert carrel("host", "remove", "node-no1") == 0
    assert listed(capsys) == []


def test_what_is_taken_of_a_host_is_shown_with_who_took_it(site: HostTable, capsys: pytest.CaptureFixture[str]) -> None:
    carrel("host", "add", "h1", "--cpus=8", "--memory=16G", "--cpus-others=2", "--memory-others=1G")
    site.take("7.9.0", Demand(cpus=3, memory_bytes=GIB), lambda _: Here(("h1",)))
    site.take_addresses("7.9.0", 1, ["10.0.0.9"])
    assert carrel("host", "show", "h1") == 0
    shown = capsys.readouterr().out
    assert "cpus        5 of 16 (8 before overcommit; 2 not for guests of jobs)" in shown
    assert "memory      2G of 16G (1G not for guests of jobs)" in shown
    assert [line.split() for line in shown.splitlines()][-1] == ["7.9.0", "0", "3", "1G", "10.0.0.9"]
    assert carrel("host", "list") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][-1] == [
        "h1",
        "up",
        "1",
        "5",
        "16",
        "2G",
        "16G",
    ]


def test_guests_that_must_be_apart_are_never_placed_where_there_are_too_few_hosts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b"):
        carrel("host", "add", name, "--cpus=8", "--memory=16G")
    assert carrel("host", "query", "1", "1G", "--guests=2", "--apart", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"answer": "here", "hosts": ["a", "b"]}
    assert carrel("host", "query", "1", "1G", "--guests=3", "--apart") == 4
    said = (
        "never: all 2 hosts of this site together cannot carry 3 guests of 1 CPU and 1 GiB each, each on a host of its"
    )
    assert capsys.readouterr().out.startswith(said)


def test_a_host_with_a_carreld_is_added_and_refreshed_from_its_reports_and_is_down_while_that_is_silent(
    daemon: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carrel("host", "add", "c7") == 4
    assert "'c7' has not reported what it has" in capsys.readouterr().err
    report(daemon, "c7", cpus=4, memory_bytes=GIB)
    assert carrel("host", "add", "c7") == 0
    report(daemon, "c7", cpus=6, memory_bytes=GIB)
    assert carrel("host", "refresh") == 0
    (host,) = listed(capsys)
    assert (host["cpus"], host["reports"]) == (6, True)
    wait_for(lambda: listed(capsys)[0]["state"] == "down", "a silent host is down")
    assert listed(capsys)[0]["reason"].startswith("its carreld has not reported for ")
    assert carrel("host", "query", "1", "1M") == 1
    assert "1 of 1 hosts take no guests" in capsys.readouterr().out

    def has_room_again() -> bool:
        report(daemon, "c7", cpus=6, memory_bytes=GIB)  # good for a second
        return carrel("host", "query", "1", "1M") == 0

    wait_for(has_room_again, "a host that speaks again takes guests")


def test_a_host_that_never_reported_to_this_controller_is_down_and_says_so(
    site: HostTable, capsys: pytest.CaptureFixture[str]
) -> None:
    site.put([Facts(name="h9", cpus=4, memory_bytes=GIB, reports=True)])  # as a controller before this one left it
    (host,) = listed(capsys)
    assert (host["state"], host["reason"]) == ("down", "its carreld has not reported since carrelctld was started")


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("show", "x"), 3, "no host 'x'; known: none"),
        (("remove", "x"), 3, "no host 'x'; see: carrel host list"),
        (("drain", "x", "--reason=r"), 3, "no host 'x'"),
        (("refresh", "x"), 3, "no host 'x'"),
        (("add", "x", "--cpus=4"), 2, "give both --cpus and --memory"),
        (("add", "x", "--cpus=4", "--memory=lots"), 2, "'lots' is no amount of memory like 512M or 4G"),
        (("add", "x", "--cpus=-4", "--memory=1G"), 4, "host 'x': -4 CPUs and 1 GiB carry nothing"),
        (("add", "x", "--cpus=4", "--memory=1G", "--cpus-others=-8"), 4, "what is not for guests of jobs is below 0"),
        (("add", "x y", "--cpus=4", "--memory=1G"), 4, "host 'x y': a host has a name without blanks and commas"),
        (("add", "", "--cpus=4", "--memory=1G"), 4, "host '': a host has a name without blanks and commas"),
        (("drain", "x"), 2, "parameter --reason requires an argument; see: carrel host drain --help"),
        (("query", "0", "1G"), 2, "asks for no guest"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    words: tuple[str, ...], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carrel("host", *words) == status
    assert sentence in capsys.readouterr().err


@pytest.mark.root
def test_an_ordinary_user_looks_and_changes_nothing(site: HostTable, capsys: pytest.CaptureFixture[str]) -> None:
    carrel("host", "add", "h1", "--cpus=8", "--memory=16G")
    site.take("run", Demand(cpus=3, memory_bytes=GIB), lambda _: Here(("h1",)))
    os.seteuid(65534)
    try:
        (host,) = listed(capsys)
        assert (host["guests"], host["places"]) == (1, [])
        for words in (("add", "h2", "--cpus=1", "--memory=1G"), ("remove", "h1"), ("drain", "h1", "--reason=r")):
            assert carrel("host", *words) == 4
            assert "only an administrator changes hosts" in capsys.readouterr().err
    finally:
        os.seteuid(0)
