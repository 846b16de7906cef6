"""What a guest that does not go on from its template says of the template, which is everybody's."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from carrel.drivers.qemu.control import Control
from carrel.drivers.qemu.files import GuestDirectory, Record
from carrel.drivers.qemu.monitor import Monitor
from carrel.drivers.qemu.templates import TemplateError
from carrel.drivers.qemu.wake import wake
from carrel.testing import DriverContract


async def _never(directory: GuestDirectory) -> Control | Monitor:
    raise AssertionError(await asyncio.Future())


def _blamed(where: Path, *, resume_timeout_s: float, boot_timeout_s: float) -> bool:
    spec = msgspec.structs.replace(DriverContract().spec("g"), boot_timeout_s=boot_timeout_s)
    record = Record(spec=spec, accelerator="tcg", accelerator_why="", started_s=0.0, clone="instant", template="7c80")
    with pytest.raises(TemplateError, match="no word from it after") as caught:
        asyncio.run(
            wake(
                GuestDirectory(where),
                record,
                control=_never,  # type: ignore[arg-type]
                monitor=_never,  # type: ignore[arg-type]
                resume_timeout_s=resume_timeout_s,
            )
        )
    return caught.value.is_spoilt


def test_a_template_that_says_nothing_for_as_long_as_the_site_waits_is_spoilt(tmp_path: Path) -> None:
    assert _blamed(tmp_path, resume_timeout_s=0.01, boot_timeout_s=60.0)


def test_a_template_that_is_too_slow_for_the_time_that_one_job_allows_is_not(tmp_path: Path) -> None:
    assert not _blamed(tmp_path, resume_timeout_s=15.0, boot_timeout_s=0.02)
