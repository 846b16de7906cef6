"""The look around a node: one odd guest keeps it from nothing that the others need."""

import asyncio
import time
from typing import Any

import pytest

from carrel.config import Config
from carrel.daemons.journal import Journal
from carrel.daemons.sweep import Sweep
from carrel.errors import CarrelError, UnreachableError
from carrel.model.guest import Guest
from carrel.model.report import Event
from carrel.process import Pid
from carrel.testing.daemons import a_guest, a_report


class ANode:
    """A node with two guests of ended jobs and one of a living task; it is its own driver, scheduler and records."""

    def __init__(self) -> None:
        self.config = Config()
        self.told: list[Event] = []
        self.journal = Journal("c1", self.told.append)
        self.guests = [a_guest(name=name, started_s=time.time() - 60) for name in ("1.1.0", "2.1.0", "3.1.0")]
        self.destroyed: list[str] = []
        self.suspending: list[tuple[str, bool]] = []
        self.fails: Exception | None = None
        self.hangs = asyncio.Event()
        self.scheduler = self.requests = self.inside = self.reporter = self.metrics = self

    async def report(self) -> Any:
        return a_report(*self.guests)

    def driver(self, _: str) -> "ANode":
        return self

    async def end(self, guest: Guest) -> None:
        await self.destroy(guest.name)

    async def destroy(self, name: str) -> None:
        if self.fails:
            failure, self.fails = self.fails, None
            raise failure
        self.destroyed.append(name)

    async def suspend(self, name: str, *, suspended: bool) -> None:
        self.suspending.append((name, suspended))
        await self.hangs.wait()
        raise UnreachableError("qemu's monitor: no answer")

    def suspicious(self) -> bool:
        return False

    def look_at(self, guests: Any) -> None:
        """None of them is looked into."""

    def compare(self, jobs: list[Any]) -> None:
        """No job is sampled."""

    async def jobs(self) -> list[Any]:
        return []

    def all(self) -> list[int]:
        return []

    def living(self, name: str) -> list[Pid]:
        return [Pid(1, 1)] if name == "3.1.0" else []

    def poke(self) -> None: ...

    def forget(self, name: str) -> None: ...

    def names(self) -> list[str]:
        return [guest.name for guest in self.guests]


def looks(node: ANode, count: int = 1) -> Sweep:
    looker: Any = node
    around = Sweep(looker)

    async def story() -> None:
        for _ in range(count):
            await around.look()
            await asyncio.sleep(0)
        node.hangs.set()
        await asyncio.gather(*around._following.values())

    node.inside = type("Inside", (), {"guests": node.names, "living": node.living, "forget": node.forget})()
    asyncio.run(story())
    return around


@pytest.fixture
def node() -> ANode:
    return ANode()


def test_a_guest_whose_qemu_does_not_answer_holds_up_no_sweep(node: ANode) -> None:
    looks(node)
    assert node.destroyed == ["1.1.0", "2.1.0", "3.1.0"]
    assert node.suspending == [("3.1.0", False)]
    assert [event.text for event in node.told if event.what == "sweep-failed"] == [
        "not resumed yet: qemu's monitor: no answer"
    ]


def test_a_guest_that_is_asked_already_is_not_asked_again_meanwhile(node: ANode) -> None:
    looks(node, 3)
    assert node.suspending == [("3.1.0", False)]


@pytest.mark.parametrize("failure", [CarrelError("processes [7] do not end"), KeyError("odd"), OSError("busy")])
def test_a_guest_that_cannot_be_destroyed_keeps_no_other_alive(node: ANode, failure: Exception) -> None:
    node.fails = failure
    looks(node)
    assert node.destroyed == ["2.1.0", "3.1.0"]
    assert str(failure) in [event.text for event in node.told if event.guest == "1.1.0"]


def test_a_look_that_fails_is_not_the_last_one(node: ANode, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()

    async def story() -> None:
        around = Sweep(node)  # type: ignore[arg-type]  # as much of a node as it needs

        async def look() -> None:
            if not node.told:
                raise ValueError("what nobody foresaw")
            looked.set()

        monkeypatch.setattr(around, "look", look)
        running = asyncio.ensure_future(around.run())
        async with asyncio.timeout(10):
            await looked.wait()
        running.cancel()

    monkeypatch.setattr(node, "config", Config(node=sweep_often()))
    asyncio.run(story())
    assert node.told[0].text == "what nobody foresaw"


def sweep_often() -> Any:
    return type(Config().node)(sweep_period_s=0.01)
