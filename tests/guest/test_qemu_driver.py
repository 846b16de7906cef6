"""The qemu driver keeps the promises of every driver, with real guests under emulation."""

import asyncio
import fcntl
import os
import signal
import stat
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from carrel import config
from carrel.drivers.qemu.driver import QemuDriver
from carrel.drivers.qemu.files import GuestDirectory, Record
from carrel.errors import RefusedError
from carrel.images.source import StoreImages
from carrel.model.guest import GuestSpec
from carrel.ports import Driver, DriverContext
from carrel.testing import DriverContract

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(300)]


class TestQemu(DriverContract):
    def make(self, where: Path) -> Driver:
        # Held for the life of the test process, as by a living carreld; else the guards would see an ended job.
        lock = os.open(where / "carreld.lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX) if not _held(where) else os.close(lock)
        settings = config.Config(
            guests=config.Guests(accelerator="tcg"), slurm=config.Slurm(spool_dir=str(where / "spool"))
        )
        context = DriverContext(
            config=settings,
            node="c1",
            directory=where / "guests",
            lock=where / "carreld.lock",
            images=StoreImages(settings.images.path),
        )
        return QemuDriver.from_context(context)

    def spec(self, name: str) -> GuestSpec:
        return msgspec.structs.replace(super().spec(name), image="debian12", image_name="debian12")

    async def check_gone(self, driver: Driver, spec: GuestSpec) -> None:  # noqa: ARG002  # the contract's shape
        assert _processes_of(spec.name) == []

    def test_a_guest_that_died_is_refused_with_the_reason_and_not_made_anew(self) -> None:
        self._run(self._died())

    def test_a_guest_that_a_killed_carreld_had_only_noted_is_made_by_the_next(self) -> None:
        self._run(self._noted())

    async def _noted(self) -> None:
        async with self._driver() as (driver, where):
            spec = self.spec("4711.8.0")
            directory = GuestDirectory(where / "guests" / spec.name)
            directory.make()
            directory.write(Record(spec=spec, accelerator="tcg", accelerator_why="", started_s=1.0))
            assert (await driver.ensure(spec)).state == "ready"

    def test_a_guest_that_could_not_be_started_leaves_nothing_in_the_way_of_the_next_try(self) -> None:
        self._run(self._unstarted())

    async def _unstarted(self) -> None:
        async with self._driver() as (driver, _):
            spec = self.spec("4711.7.0")
            gone = msgspec.structs.replace(spec, job_cgroups=("/sys/fs/cgroup/memory/no-such-job",))
            with pytest.raises(RefusedError, match=r"cannot be started: .*no-such-job"):
                await driver.ensure(gone)
            assert await driver.guests() == []

    def test_a_guest_is_heard_each_time_that_it_goes_on(self) -> None:
        self._run(self._resumed())

    async def _resumed(self) -> None:
        async with self._driver() as (driver, _):
            spec = self.spec("4711.5.0")
            await driver.ensure(spec)
            for _ in range(10):
                async with asyncio.timeout(25):  # one that is not heard costs 30 s
                    await driver.suspend(spec.name, suspended=True)
                    await driver.suspend(spec.name, suspended=False)

    def test_a_console_is_its_users_alone(self) -> None:
        self._run(self._private())

    async def _private(self) -> None:
        async with self._driver() as (driver, _):
            spec = msgspec.structs.replace(self.spec("4711.6.0"), gid=100)
            guest = await driver.ensure(spec)
            facts = await asyncio.to_thread(Path(guest.console).stat)
            assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (spec.uid, 0o400)

    async def _died(self) -> None:
        async with self._driver() as (driver, where):
            spec = self.spec("4711.9.0")
            guest = await driver.ensure(spec)
            pids = GuestDirectory(where / "guests" / spec.name).pids()
            pids["guard"].kill(signal.SIGSTOP)
            os.kill(guest.pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                while pids["qemu"].alive:  # noqa: ASYNC110  # another process makes it so
                    await asyncio.sleep(0.01)
            assert (await driver.guests())[0].state == "ready", "nobody has said yet how it ended"
            pids["guard"].kill(signal.SIGCONT)
            async with asyncio.timeout(60):
                while (await driver.guests())[0].state != "down":  # noqa: ASYNC110  # another process makes it so
                    await asyncio.sleep(0.01)
            assert (await driver.guests())[0].reason == "qemu was killed by signal 9"
            with pytest.raises(RefusedError, match="killed by signal 9"):
                await driver.enter(spec.name, "a")
            with pytest.raises(RefusedError, match="killed by signal 9"):
                await driver.ensure(spec)


def _processes_of(guest: str) -> list[str]:
    named = f"guest={guest},".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if named in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


def _held(where: Path) -> bool:
    probe = os.open(where / "carreld.lock", os.O_RDWR)
    try:
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(probe)
    return False
