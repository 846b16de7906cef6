"""What one user says at carreld's door harms no other: each test is an ill-meaning peer."""

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from carrel import wire
from carrel.config import Config
from carrel.daemons import peers
from carrel.daemons.door import Door
from carrel.daemons.journal import Journal
from carrel.daemons.peers import Peers
from carrel.errors import NodeFaultError, RefusedError
from carrel.model.guest import Agent
from carrel.model.report import Event
from carrel.testing.daemons import a_guest, a_report


class ANode:
    """As much of a node as a peer sees before it has proved to be a task."""

    def __init__(self) -> None:
        self.name = "c1"
        self.config = Config()
        self.told: list[Event] = []
        self.journal = Journal("c1", self.told.append)

    async def report(self) -> Any:
        return a_report()

    def driver(self, name: str) -> Any:
        if name != "qemu":
            raise NodeFaultError(f"node c1 has no guest driver '{name}'; known: qemu")


def visit(story: Callable[[socket.socket, ANode], Coroutine[Any, Any, None]], *, limit: int = 10) -> None:
    """Let ``story`` be the peer on one connection."""

    async def both() -> None:
        node: Any = ANode()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with theirs:
            Door(node, Peers(limit)).answer(ours)
            await story(theirs, node)

    asyncio.run(both())


async def answer(peer: socket.socket) -> wire.Message:
    async with asyncio.timeout(5):
        message = await wire.receive(peer)
    assert message is not None
    return message


def test_a_failure_that_nobody_foresaw_is_one_sentence_and_not_the_end_of_the_daemon() -> None:
    async def story(peer: socket.socket, node: Any) -> None:
        node.report = lambda: 1 / 0
        await wire.send(peer, {"verb": "list"})
        said = await answer(peer)
        assert said.get("status") == "refused"
        assert "carreld failed: ZeroDivisionError" in said.get("text")

    visit(story)


@pytest.mark.parametrize("verb", ["\udcff\udcfe", "x" * 50_000, "a\nb"])
def test_a_verb_that_is_none_is_refused(verb: str) -> None:
    async def story(peer: socket.socket, node: Any) -> None:  # the shape of every story
        await wire.send(peer, {"verb": verb})
        assert (await answer(peer)).get("text").startswith("carreld knows no verb '")

    visit(story)


def test_who_is_no_task_of_a_job_is_refused_before_slurm_is_asked() -> None:
    async def story(peer: socket.socket, node: Any) -> None:  # it has no facts to ask
        await wire.send(peer, {"verb": "enter", "job": "7", "step": "0"})
        assert re.match(rf"process {os.getpid()} is (no task of|in) job", (await answer(peer)).get("text"))

    visit(story)


def test_a_driver_that_only_the_user_wants_is_his_fault_and_not_the_nodes() -> None:
    async def story(peer: socket.socket, node: Any) -> None:  # asked directly
        door = Door(node, Peers(1))
        with pytest.raises(RefusedError, match="--guest-driver=nonsense: node c1 has no guest driver") as refused:
            door._require_driver("nonsense")
        assert not isinstance(refused.value, NodeFaultError)

    visit(story)


def test_a_peer_that_does_not_listen_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_TIMEOUT_S", 0.1)

    async def story() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs, pytest.raises(ConnectionError, match=r"read nothing for 0\.1 s"):
            await peers.tell(ours, {"json": "x" * 1_000_000})

    asyncio.run(story())


def test_a_peer_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REQUEST_TIMEOUT_S", 0.05)

    async def story(peer: socket.socket, node: Any) -> None:  # the shape of every story
        async with asyncio.timeout(5):
            assert await wire.receive(peer) is None

    visit(story)


def test_one_user_cannot_take_all_connections_and_root_is_never_without() -> None:
    limited = Peers(2)
    with contextlib.ExitStack() as stack:
        for uid in (1001, 1001, 1002, 0, 0, 0):
            stack.enter_context(limited.admitted(uid))
        with pytest.raises(RefusedError, match="uid 1001 has 2 connections"), limited.admitted(1001):
            pass
    with limited.admitted(1001), limited.admitted(1001):
        pass


def test_an_event_is_one_line_of_plain_text_whatever_a_user_wrote_into_it() -> None:
    told: list[Event] = []
    Journal("c1", told.append).add("refused", "no image 'a\nguest-gone: \x1b[2J\udcff\u202e é'" + "x" * 5000)
    text = told[0].text
    assert text.isprintable()
    assert text.startswith(r"no image 'a\nguest-gone: \x1b[2J\udcff\u202e é'")
    assert len(text) < 1100


def test_a_peer_that_speaks_on_counts_as_gone_or_reading_it_would_take_every_turn() -> None:
    async def story(peer: socket.socket, node: Any) -> None:
        waiting = asyncio.ensure_future(Door(node, Peers(1))._until_gone(peer))
        await asyncio.sleep(0)
        assert not waiting.done()
        node.other.send(b"x")
        async with asyncio.timeout(5):
            await waiting

    async def both() -> None:
        node: Any = ANode()
        ours, node.other = socket.socketpair()
        ours.setblocking(False)
        with ours, node.other:
            await story(ours, node)

    asyncio.run(both())


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_counts_as_inside_while_it_enters_and_no_longer_when_it_could_not(fails: bool) -> None:
    seen: list[set[int]] = []

    class Everything:
        """The driver, and who is inside."""

        def __init__(self) -> None:
            self.pids: set[int] = set()
            self.name = "c1"
            self.inside = self

        def driver(self, _: str) -> "Everything":
            return self

        def add(self, _: str, pid: int) -> None:
            self.pids.add(pid)

        def remove(self, _: str, pid: int) -> None:
            self.pids.discard(pid)

        async def enter(self, name: str, port: str) -> Agent:
            seen.append(set(self.pids))
            if fails:
                raise RefusedError(f"guest {name} takes no port {port}")
            return Agent(fd=-1)

    async def story() -> set[int]:
        node: Any = Everything()
        with contextlib.suppress(RefusedError):
            await Door(node, Peers(1))._entry(a_guest(), 7)
        return set(node.pids)

    assert asyncio.run(story()) == (set() if fails else {7})
    assert seen == [{7}]
