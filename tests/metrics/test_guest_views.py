"""Which guests are looked into, and which not again."""

import asyncio
import os
import pwd
import socket
from pathlib import Path

import pytest

from carrel.config import Metrics
from carrel.daemons.inside import TRIES, GuestViews
from carrel.model.guest import Agent, Entry, IsNode
from carrel.model.job import Job, JobKey
from carrel.testing.daemons import a_guest

ME = pwd.getpwuid(os.getuid())


class ADriver:
    """Its guests are entered by what ``entry`` makes."""

    def __init__(self, *, is_node: bool) -> None:
        self.entered: list[str] = []
        self._is_node = is_node

    async def enter(self, name: str, port: str) -> Entry:
        assert port.startswith("carrel.m.")
        self.entered.append(name)
        if self._is_node:
            return IsNode(name=name)
        ours, theirs = socket.socketpair()
        theirs.close()  # an agent that knows no such port
        return Agent(fd=ours.detach())


@pytest.mark.parametrize(("is_node", "times"), [(True, 1), (False, TRIES)])
def test_a_guest_that_cannot_be_looked_into_is_not_asked_for_ever(tmp_path: Path, is_node: bool, times: int) -> None:
    driver = ADriver(is_node=is_node)
    key = JobKey(cluster="k", job_id=7, submit_s=1795220388)
    job = Job(key=key, state="running", user=ME.pw_name, uid=ME.pw_uid, gid=ME.pw_gid)
    failures: list[str] = []

    async def scenario() -> None:
        views = GuestViews(
            Metrics(root=str(tmp_path)),
            lambda _: driver,  # type: ignore[arg-type,return-value]  # as far as it is asked
            lambda guest: (job, None) if guest.run == key else None,
            failed=lambda what, _: failures.append(what),
        )
        for _ in range(TRIES + 2):
            views.look([a_guest(run=key), a_guest(name="other", run=None), a_guest(name="young", state="starting")])
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait([task])
        await views.stop()

    asyncio.run(scenario())
    assert len(driver.entered) == times
    assert failures == ([] if is_node else ["guest"] * TRIES)
