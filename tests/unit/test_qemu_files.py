"""What a guest's directory says, also when a user, a guest or a full table of files had a hand in it."""

import asyncio
import os
from pathlib import Path

import pytest

from carrel.config import Config
from carrel.drivers.qemu.driver import QemuDriver
from carrel.drivers.qemu.files import LOG_MAX_BYTES, TAIL_BYTES, GuestDirectory, Record
from carrel.model.guest import Guest, GuestSpec
from carrel.ports import DriverContext, ImageSource
from carrel.testing import DriverContract

SPEC = DriverContract().spec("4711.1.0")


class NoImages(ImageSource):
    """A store that is not asked."""


def a_driver(where: Path) -> QemuDriver:
    context = DriverContext(
        config=Config(),
        node="c1",
        directory=where / "guests",
        lock=where / "lock",
        images=NoImages(),  # type: ignore[abstract]  # not asked
    )
    return QemuDriver(context)


def a_directory(where: Path) -> GuestDirectory:
    directory = GuestDirectory(where / "guests" / SPEC.name)
    directory.path.mkdir(parents=True)
    return directory


def test_a_record_that_cannot_be_read_is_not_a_guest_that_nobody_owns(tmp_path: Path) -> None:
    (a_directory(tmp_path).path / "guest.json").mkdir()  # reading it fails, as it does without a free descriptor
    with pytest.raises(OSError, match="Is a directory"):
        asyncio.run(a_driver(tmp_path).guests())


def test_a_record_is_not_for_other_users(tmp_path: Path) -> None:
    directory = a_directory(tmp_path)
    directory.write(Record(spec=SPEC, accelerator="tcg", accelerator_why="", started_s=1.0))
    assert (directory.path / "guest.json").stat().st_mode & 0o077 == 0


def test_an_unfinished_record_is_a_guest_that_nobody_owns(tmp_path: Path) -> None:
    (a_directory(tmp_path).path / "guest.json").write_text('{"spec": ')
    (guest,) = asyncio.run(a_driver(tmp_path).guests())
    assert (guest.run, guest.state) == (None, "down")


def test_an_end_may_hold_any_byte(tmp_path: Path) -> None:
    directory = a_directory(tmp_path)
    directory.end_file.write_bytes(b"exited\nqemu exited with 1: \xff\xfe\n")
    assert directory.end() == ("exited", "qemu exited with 1: \ufffd\ufffd")


def test_of_a_console_that_a_user_made_huge_only_the_end_is_read(tmp_path: Path) -> None:
    directory = a_directory(tmp_path)
    with directory.console.open("wb") as file:
        os.truncate(file.fileno(), 2**40)
        file.seek(0, os.SEEK_END)
        file.write(b"\nKernel panic - not syncing: no \xff root\n")
    assert directory.panic() == "its kernel panicked: no \ufffd root"
    assert directory.console.stat().st_size > TAIL_BYTES


def test_a_guest_is_not_made_while_the_one_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    async def story() -> None:
        driver = a_driver(tmp_path)
        goes = asyncio.Event()

        async def destroy(name: str) -> None:
            steps.append(f"destroys {name}")
            await goes.wait()
            steps.append("destroyed")

        async def ensure(spec: GuestSpec) -> Guest:
            steps.append(f"makes {spec.name}")
            return Guest(name=spec.name, node="c1", driver="qemu", state="ready")

        monkeypatch.setattr(driver, "_destroy", destroy)
        monkeypatch.setattr(driver, "_ensure", ensure)
        hook = asyncio.ensure_future(driver.destroy("a"))
        await asyncio.sleep(0)
        hook.cancel()  # it waited long enough; what it began goes on
        again = asyncio.ensure_future(driver.destroy("a"))
        making = asyncio.ensure_future(driver.ensure(DriverContract().spec("a")))
        await asyncio.sleep(0.01)
        goes.set()
        await asyncio.gather(again, making)

    asyncio.run(story())
    assert steps == ["destroys a", "destroyed", "makes a"]


def test_a_guest_that_makes_qemu_complain_for_ever_fills_no_disk(tmp_path: Path) -> None:
    log = a_directory(tmp_path).path / "guard.log"
    with log.open("ab") as qemu:
        qemu.write(b"virtio: bogus descriptor\n" * (LOG_MAX_BYTES // 20))
        qemu.flush()
        asyncio.run(a_driver(tmp_path).guests())
        assert log.stat().st_size <= TAIL_BYTES
        qemu.write(b"the last word\n")
    assert log.read_text().endswith("bogus descriptor\nthe last word\n")
