"""The fake driver keeps every promise of a real one."""

import asyncio
import os
from pathlib import Path

import pytest

from carrel.errors import RefusedError
from carrel.model.guest import Agent
from carrel.ports import Driver
from carrel.testing import DriverContract, FakeDriver


class TestFakeDriver(DriverContract):
    def make(self, where: Path) -> Driver:
        return FakeDriver(where)


SPEC = DriverContract().spec("4711.1.0")


def test_a_guest_that_failed_says_why_to_who_wants_in_and_is_made_anew(tmp_path: Path) -> None:
    async def story() -> None:
        driver = FakeDriver(tmp_path)
        await driver.ensure(SPEC)
        driver.fail(SPEC.name, "kernel panic")
        with pytest.raises(RefusedError, match=r"guest 4711\.1\.0 is down: kernel panic"):
            await driver.enter(SPEC.name, "a")
        assert (await driver.ensure(SPEC)).state == "ready"

    asyncio.run(story())


def test_a_guest_that_is_destroyed_while_it_starts_is_not_brought_back(tmp_path: Path) -> None:
    async def story() -> None:
        driver = FakeDriver(tmp_path)
        making = asyncio.create_task(driver.ensure(SPEC))
        await asyncio.sleep(0)
        await driver.destroy(SPEC.name)
        with pytest.raises(RefusedError, match="destroyed while it started"):
            await making
        assert await driver.guests() == ()

    asyncio.run(story())


def test_a_task_is_inside_until_its_end_is_closed_and_its_port_is_its_own_so_long(tmp_path: Path) -> None:
    async def story() -> None:
        driver = FakeDriver(tmp_path)
        await driver.ensure(SPEC)
        entry = await driver.enter(SPEC.name, "a")
        assert isinstance(entry, Agent)
        with pytest.raises(RefusedError, match="living task on port a"):
            await driver.enter(SPEC.name, "a")
        assert [guest.tasks for guest in await driver.guests()] == [1]
        os.close(entry.fd)
        assert [guest.tasks for guest in await driver.guests()] == [0]

    asyncio.run(story())


def test_destroying_a_guest_hangs_up_on_its_tasks(tmp_path: Path) -> None:
    async def story() -> None:
        driver = FakeDriver(tmp_path)
        await driver.ensure(SPEC)
        entry = await driver.enter(SPEC.name, "a")
        assert isinstance(entry, Agent)
        await driver.destroy(SPEC.name)
        assert os.read(entry.fd, 1) == b""
        os.close(entry.fd)

    asyncio.run(story())
