"""A file that somebody opens, and who listens for that."""

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from carrel.daemons.knock import Knock

HEARD_S = 60.0


def knock_at(path: Path) -> None:
    """Open it as the Lua does: to read, and read nothing."""
    os.close(os.open(path, os.O_RDONLY))


def listening(path: Path, work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    async def run() -> None:
        heard = asyncio.Event()
        knock = Knock(path, heard.set)
        knock.begin()
        try:
            await work(heard)
        finally:
            knock.end()
            knock.end()

    asyncio.run(run())


def test_to_open_the_file_is_heard_each_time(tmp_path: Path) -> None:
    path = tmp_path / "knock"

    async def work(heard: asyncio.Event) -> None:
        assert not heard.is_set(), "it is its own maker who opened it"
        for _ in range(3):
            knock_at(path)
            async with asyncio.timeout(HEARD_S):
                await heard.wait()
            heard.clear()

    listening(path, work)


def test_a_hundred_thousand_knocks_that_nobody_takes_hold_nobody_up_and_are_heard_as_one(tmp_path: Path) -> None:
    """A carrelctld that is stopped, or busy, is not slurmctld's to wait for."""
    path = tmp_path / "knock"

    async def work(heard: asyncio.Event) -> None:
        for _ in range(100_000):
            knock_at(path)
        async with asyncio.timeout(HEARD_S):
            await heard.wait()
        heard.clear()
        knock_at(path)
        async with asyncio.timeout(HEARD_S):
            await heard.wait()

    listening(path, work)


@pytest.fixture
def _careful_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_careful_umask")
def test_the_next_one_listens_at_the_same_file_and_everybody_may_open_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "knock"
    for _ in range(2):

        async def work(heard: asyncio.Event) -> None:
            knock_at(path)
            async with asyncio.timeout(HEARD_S):
                await heard.wait()

        listening(path, work)
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert path.stat().st_size == 0


def test_a_place_that_cannot_be_is_said(tmp_path: Path) -> None:
    async def work(_: asyncio.Event) -> None:
        """Do nothing: it is not reached."""

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        listening(tmp_path / "file" / "knock", work)
