"""What a host hears when it asks what it shall carry."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from carrel.core.guesthosts import orders
from carrel.daemons.hostorders import HELD_S, HostOrders
from carrel.errors import UnreachableError
from carrel.model.guestnode import HostReport, NodeOrder
from carrel.testing.guestworlds import guest, ready
from carrel.testing.virtualtime import VirtualLoop

REPORT = HostReport(host="h1", address="10.0.0.1")
WANTED: dict[str, tuple[NodeOrder, ...]] = {"h1": orders(ready())["h1"]}
SILENT_S = 60.0


def looks_of(work: Callable[[HostOrders], Awaitable[None]]) -> list[float]:
    """Do this in virtual time; return when a look was asked for."""
    looks: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        await work(HostOrders(silent_s=SILENT_S, changed=lambda: looks.append(loop.time())))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())
    return looks


def test_a_host_is_not_told_to_carry_nothing_before_slurm_was_seen() -> None:
    async def work(hosts: HostOrders) -> None:
        with pytest.raises(UnreachableError, match="slurm was not seen yet"):
            await hosts.exchange(REPORT, "")

    assert looks_of(work) == [0.0]


def test_a_question_is_answered_when_the_orders_change_and_otherwise_after_a_while_with_the_same() -> None:
    async def work(hosts: HostOrders) -> None:
        loop = asyncio.get_running_loop()
        asking = asyncio.ensure_future(hosts.exchange(REPORT, ""))
        await asyncio.sleep(1.0)
        hosts.publish(WANTED)
        answer = await asking
        assert (answer.orders, loop.time()) == (WANTED["h1"], 1.0)
        assert await hosts.exchange(REPORT, answer.digest) == answer
        assert loop.time() == 1.0 + HELD_S
        assert hosts.settled({"h1"}) == {"h1"}
        hosts.publish({"h1": ()})
        assert hosts.settled({"h1"}) == set()

    looks_of(work)


def test_what_a_silent_host_carried_last_is_known_and_what_it_was_told_is_not() -> None:
    async def work(hosts: HostOrders) -> None:
        hosts.publish(WANTED)
        report = HostReport(host="h1", address="10.0.0.1", guests=(guest(),))
        digest = (await hosts.exchange(report, "")).digest
        await hosts.exchange(report, digest)
        await asyncio.sleep(SILENT_S)
        assert hosts.reports() == {}
        assert hosts.lost(hosts.reports()) == {"v1"}
        assert hosts.have_spoken({"h1"})
        hosts.publish({})
        with pytest.raises(UnreachableError):
            await hosts.exchange(report, digest)

    assert looks_of(work) == [0.0, 0.0]  # asking the same again is no news
