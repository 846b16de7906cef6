"""The contract of a driver, as tests: inherit it, say how to make your driver, and run pytest.

::

    class TestFirecracker(carrel.testing.DriverContract):
        def make(self, where: Path) -> Driver:
            return FirecrackerDriver(where)

Each test boots as few guests as it can, since a real one takes seconds. The promises are those of
``carrel.ports.Driver``; a test's name says which.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from carrel.errors import NotFoundError, RefusedError
from carrel.model.guest import Agent, Entry, Guest, GuestSpec
from carrel.model.job import JobKey
from carrel.ports import Driver


class DriverContract:
    """What every driver promises. Override ``make``; the other hooks where the defaults do not fit."""

    time_limit_s: float = 120.0
    """No single test takes longer."""

    def make(self, where: Path) -> Driver:
        """Return a driver whose guests live in ``where``; called again for the same place, as after a restart."""
        raise NotImplementedError

    def spec(self, name: str) -> GuestSpec:
        """Return the spec of a small guest of this name; override it to name a real image."""
        return GuestSpec(
            name=name,
            run=JobKey(cluster="contract", job_id=4711, submit_s=1731000000),
            node="c1",
            host_name="c1",
            image="sha256:contract",
            image_name="contract",
            per="job",
            clone="linked",
            cpus=1,
            memory_bytes=256 * 2**20,
            uid=os.getuid(),
            gid=os.getgid(),
            user="contract",
        )

    async def check_entry(self, driver: Driver, guest: Guest, entry: Entry) -> None:  # noqa: ARG002  # for those that override it
        """Prove that a task could be started through ``entry``; override it to start one."""
        assert isinstance(entry, Agent), "override check_entry for a guest that is entered in another way"
        os.fstat(entry.fd)

    async def check_gone(self, driver: Driver, spec: GuestSpec) -> None:
        """Prove that nothing of a destroyed guest is left; override it to look for processes and files."""

    def test_a_guest_lives_from_ensure_to_destroy_and_each_verb_may_be_repeated(self) -> None:
        self._run(self._life())

    def test_two_that_ask_for_one_guest_at_once_get_the_same_and_it_is_ready(self) -> None:
        self._run(self._concurrent())

    def test_a_new_driver_finds_the_guests_of_the_one_before_it_and_can_end_them(self) -> None:
        self._run(self._restart())

    def test_a_cancelled_ensure_leaves_nothing_that_destroy_cannot_remove(self) -> None:
        self._run(self._cancelled())

    def test_two_guests_are_two_and_one_may_go_without_the_other(self) -> None:
        self._run(self._two())

    def test_an_unknown_guest_can_be_destroyed_but_not_entered_or_read(self) -> None:
        self._run(self._unknown())

    async def _life(self) -> None:
        async with self._driver() as (driver, _):
            spec = self.spec("4711.1.0")
            assert await self._names(driver) == []
            word, why = await driver.check()
            assert word, "check names how guests run here"
            assert why, "check says why so"
            first = await driver.ensure(spec)
            assert first.state == "ready"
            _assert_matches(first, spec)
            again = await driver.ensure(spec)
            assert _identity(again) == _identity(first), "a second ensure made another guest"
            (listed,) = await driver.guests()
            _assert_matches(listed, spec)
            await self._enter_twice(driver, first)
            await self._suspend_twice(driver, spec.name)
            await driver.read(spec.name)
            for _ in range(2):
                await driver.destroy(spec.name)
                assert await self._names(driver) == []
            await self.check_gone(driver, spec)

    async def _enter_twice(self, driver: Driver, guest: Guest) -> None:
        for port in ("a", "b"):
            entry = await driver.enter(guest.name, port)
            try:
                await self.check_entry(driver, guest, entry)
            finally:
                _leave(entry)

    async def _suspend_twice(self, driver: Driver, name: str) -> None:
        for suspended, state in ((True, "suspended"), (False, "ready")):
            for _ in range(2):
                await driver.suspend(name, suspended=suspended)
                assert [guest.state for guest in await driver.guests()] == [state]

    async def _concurrent(self) -> None:
        async with self._driver() as (driver, _):
            spec = self.spec("4711.2.0")
            first, second = await asyncio.gather(driver.ensure(spec), driver.ensure(spec))
            assert (first.state, second.state) == ("ready", "ready")
            assert _identity(first) == _identity(second), "two calls at once made two guests"
            assert await self._names(driver) == [spec.name]

    async def _restart(self) -> None:
        async with self._driver() as (driver, where):
            spec = self.spec("4711.3.0")
            made = await driver.ensure(spec)
            successor = self.make(where)
            (found,) = await successor.guests()
            assert found.state == "ready"
            _assert_matches(found, spec)
            assert _identity(await successor.ensure(spec)) == _identity(made), "the new driver made the guest anew"
            entry = await successor.enter(spec.name, "a")
            try:
                await self.check_entry(successor, found, entry)
            finally:
                _leave(entry)
            await successor.destroy(spec.name)
            assert await self._names(driver) == [], "the old driver still believes in the guest"
            await self.check_gone(successor, spec)

    async def _cancelled(self) -> None:
        async with self._driver() as (driver, _):
            spec = self.spec("4711.4.0")
            making = asyncio.create_task(driver.ensure(spec))
            while not making.done() and not await self._names(driver):  # noqa: ASYNC110  # a driver tells nobody
                await asyncio.sleep(0.001)
            making.cancel()
            with suppress(asyncio.CancelledError):
                await making
            await driver.destroy(spec.name)
            assert await self._names(driver) == []
            await self.check_gone(driver, spec)

    async def _two(self) -> None:
        async with self._driver() as (driver, _):
            one, other = self.spec("4711.5.0"), self.spec("4712.5.0")
            other = msgspec.structs.replace(other, run=msgspec.structs.replace(other.run, job_id=4712))
            made = await asyncio.gather(driver.ensure(one), driver.ensure(other))
            assert _identity(made[0]) != _identity(made[1])
            await driver.destroy(one.name)
            (left,) = await driver.guests()
            _assert_matches(left, other)
            assert left.state == "ready"

    async def _unknown(self) -> None:
        async with self._driver() as (driver, _):
            await driver.destroy("4711.6.0")
            with pytest.raises((NotFoundError, RefusedError)) as refused:
                await driver.enter("4711.6.0", "a")
            assert isinstance(refused.value, NotFoundError), "a guest that does not exist is not found, not refused"
            with pytest.raises(NotFoundError):
                await driver.read("4711.6.0")

    def _run(self, test: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(self.time_limit_s):
                await test  # type: ignore[misc]  # a coroutine of this class

        asyncio.run(bounded())

    @asynccontextmanager
    async def _driver(self) -> AsyncIterator[tuple[Driver, Path]]:
        # A short name: the path of a unix socket has room for 107 bytes.
        with tempfile.TemporaryDirectory(prefix="drv.", ignore_cleanup_errors=True) as directory:
            where = Path(directory)
            driver = self.make(where)
            try:
                yield driver, where
            finally:
                for guest in await self.make(where).guests():
                    await driver.destroy(guest.name)

    async def _names(self, driver: Driver) -> list[str]:
        return [guest.name for guest in await driver.guests()]


def _identity(guest: Guest) -> tuple[str, int, float]:
    return guest.name, guest.pid, guest.started_s


def _assert_matches(guest: Guest, spec: GuestSpec) -> None:
    """The sweep and a new carreld know of a guest only what the driver lists."""
    for field in ("name", "run", "node", "image", "per", "step", "task", "slot", "cpus", "uid"):
        assert getattr(guest, field) == getattr(spec, field), f"{field} of the guest is not that of its spec"
    assert guest.started_s > 0, "a guest without a time cannot be swept by its age"


def _leave(entry: Entry) -> None:
    if isinstance(entry, Agent):
        os.close(entry.fd)
