"""carrelctld as a process: who may ask what, what it answers, how it ends and comes back."""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel import process
from carrel.config import Controller
from carrel.daemons import transport
from carrel.daemons.report import Reporter
from carrel.daemons.visitors import REQUEST_TIMEOUT_S
from carrel.errors import CarrelError, NotFoundError, RefusedError, UnreachableError
from carrel.model.report import Event, NodeReport, ReportAnswer
from carrel.process import CommandError
from carrel.testing.daemons import ControllerProcess, a_guest, a_report, wait_for


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: a socket's has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="cctl"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def controller() -> Iterator[ControllerProcess]:
    """One for all tests that leave it running; each reports what it looks for itself."""
    directory = Path(tempfile.mkdtemp(prefix="cctl"))
    directory.chmod(0o755)
    daemon = ControllerProcess(directory)
    daemon.start()
    yield daemon
    daemon.kill()
    shutil.rmtree(directory)


@pytest.fixture
def own(place: Path) -> Iterator[ControllerProcess]:
    """One to be ended by the test."""
    daemon = ControllerProcess(place)
    daemon.start()
    yield daemon
    daemon.kill()


def ask(controller: ControllerProcess, path: str, body: bytes = b"") -> Any:
    method = "POST" if body else "GET"
    return transport.decoded(asyncio.run(transport.request(Controller(listen=controller.listen), method, path, body)))


def report(controller: ControllerProcess, said: NodeReport) -> None:
    ask(controller, "/v1/reports", msgspec.json.encode(said))


def test_what_a_node_reports_is_answered_for_the_cluster(controller: ControllerProcess) -> None:
    event = Event(time_s=1795220391.5, node="c1", what="guest-ready", text="ready", job_id=7, uid=1001)
    said = a_report(a_guest(), events=(event,), faults=("no kvm",), sent_s=time.time())
    report(controller, msgspec.structs.replace(said, consoles={"7.1795220388.0": "Linux version 6.1"}))
    (guest,) = ask(controller, "/v1/guests")
    assert (guest["job_id"], guest["ready"], guest["boot_s"]) == (7, "2026-11-21T00:19:51.500000Z", 2.5)
    assert ask(controller, "/v1/guests?job=8") == []
    assert ask(controller, "/v1/guests/7.1795220388.0") == [guest]
    assert ask(controller, "/v1/nodes/c1")["state"] == "faulty"
    assert [node["node"] for node in ask(controller, "/v1/nodes")] == ["c1"]
    assert [each["text"] for each in ask(controller, "/v1/jobs/7/events")] == ["ready"]
    assert [slot["hm"] for slot in ask(controller, "/v1/jobs/7/map")] == ["c1"]
    assert ask(controller, "/v1/consoles/7.1795220388.0?node=c1")[0]["text"] == "Linux version 6.1"
    assert ask(controller, "/v1/health")["guests"] == 1


@pytest.mark.parametrize("path", ["/v1/guests/none", "/v1/nodes/none", "/v1/jobs/9/map", "/v1/consoles/none", "/x"])
def test_what_is_not_known_is_not_found(controller: ControllerProcess, path: str) -> None:
    with pytest.raises(NotFoundError):
        ask(controller, path)


def test_a_report_that_is_none_is_refused_in_a_sentence(controller: ControllerProcess) -> None:
    with pytest.raises(CarrelError, match="validation failed"):
        ask(controller, "/v1/reports", b'{"facts": 1}')


def test_maps_are_written_with_the_guests_and_removed_with_them(controller: ControllerProcess) -> None:
    path = controller.maps / "vm_map7.conf"
    report(controller, a_report(a_guest(), sent_s=time.time()))
    wait_for(path.exists, "the map is written")
    assert 'id="0" hm="c1"' in path.read_text()
    report(controller, a_report(sent_s=time.time()))
    wait_for(lambda: not path.exists(), "the map is removed")


def test_a_controller_that_was_killed_starts_again_on_its_stale_socket(own: ControllerProcess) -> None:
    report(own, a_report(a_guest()))
    path = own.maps / "vm_map7.conf"
    wait_for(path.exists, "the map is written")
    own.kill()
    assert own.socket.exists()
    own.start()
    assert ask(own, "/v1/guests") == []
    assert path.exists(), "whether the guest lives cannot be told before its node reports"
    wait_for(lambda: not path.exists(), "a map that no report claims is swept")


def test_sigterm_ends_it_with_0_and_takes_its_socket_along(own: ControllerProcess) -> None:
    assert own.stop() == 0
    assert not own.socket.exists()


def test_sigterm_is_not_held_up_by_a_peer_that_says_nothing(own: ControllerProcess) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(own.socket))
        began_s = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - began_s < REQUEST_TIMEOUT_S - 10, "it was shown out, and only then was there an end"


def test_a_second_controller_says_that_there_is_one(controller: ControllerProcess) -> None:
    command = [sys.executable, "-m", "carrel.cli.main", "serve", "controller"]
    with pytest.raises(CommandError, match="another carrelctld answers there") as error:
        process.run(command, env={"CARREL_CONFIG": str(controller.config)})
    assert error.value.status == 1
    assert ask(controller, "/v1/health")["nodes"] >= 0


@pytest.mark.root
def test_an_ordinary_user_sees_his_own_and_may_not_report(controller: ControllerProcess) -> None:
    report(controller, a_report(a_guest(uid=65534), a_guest(name="8.1.0", uid=1001), sent_s=time.time()))
    os.seteuid(65534)
    try:
        assert [guest["uid"] for guest in ask(controller, "/v1/guests")] == [65534]
        with pytest.raises(NotFoundError):
            ask(controller, "/v1/guests/8.1.0")
        with pytest.raises(RefusedError, match="only root"):
            report(controller, a_report())
    finally:
        os.seteuid(0)


def test_a_reporter_tells_when_the_controller_comes_back(place: Path) -> None:
    daemon = ControllerProcess(place)
    event = Event(time_s=1.0, node="c1", what="guest-ready", text="told while it was away", job_id=7)

    async def look() -> NodeReport:
        return a_report(a_guest())

    async def tell() -> bool:
        reporter = Reporter(Controller(listen=daemon.listen), look, period_s=60)
        reporter.tell(event)
        assert not await reporter.send()
        await asyncio.to_thread(daemon.start)
        return await reporter.send()

    try:
        assert asyncio.run(tell())
        assert [each["text"] for each in ask(daemon, "/v1/jobs/7/events")] == ["told while it was away"]
    finally:
        daemon.kill()


def test_a_controller_that_was_killed_is_told_again_what_it_knew(place: Path) -> None:
    daemon = ControllerProcess(place)
    event = Event(time_s=1.0, node="c1", what="guest-failed", text="told before", job_id=7)

    async def look() -> NodeReport:
        return a_report(a_guest())

    async def tell() -> None:
        reporter = Reporter(Controller(listen=daemon.listen), look, period_s=60)
        reporter.tell(event)
        for _ in range(2):
            await asyncio.to_thread(daemon.start)
            for _ in range(3):
                assert await reporter.send()
            told = await asyncio.to_thread(ask, daemon, "/v1/jobs/7/events")
            assert [each["text"] for each in told] == ["told before"]
            await asyncio.to_thread(daemon.kill)

    asyncio.run(tell())


def test_a_wish_of_a_user_goes_out_with_the_answers_to_reports(place: Path, controller: ControllerProcess) -> None:
    settings = Controller(listen=controller.listen)
    answers: list[ReportAnswer] = []

    async def look() -> NodeReport:
        return a_report(a_guest())

    async def tell() -> None:
        for every in ("0.1", "-1"):
            body = b'{"every_s": %s}' % every.encode()
            answer = await transport.request(settings, "POST", "/v1/jobs/7/sampling", body)
            assert answer.status == (202 if every == "0.1" else 403)
        assert await Reporter(settings, look, period_s=60, answered=answers.append).send()

    asyncio.run(tell())
    (wish,) = answers[0].sampling
    assert (wish.job_id, wish.every_s, wish.uid) == (7, 0.1, 0)


def test_a_controller_that_hangs_is_unreachable_and_not_waited_for(place: Path) -> None:
    path = place / "mute.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(UnreachableError, match="no answer within"):
            asyncio.run(transport.request(Controller(listen=f"unix:{path}"), "GET", "/v1/health", timeout_s=0.1))


@pytest.mark.parametrize("listen", ["", "unix:relative", "tcp:host", "tcp::1", "http://x"])
def test_an_address_that_is_none_is_named(listen: str) -> None:
    with pytest.raises(CarrelError, match=r"controller\.listen"):
        transport.address(listen)
