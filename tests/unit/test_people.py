"""What a user may reach on this host is seen with the user's own rights."""

import asyncio
import os
from pathlib import Path

import pytest

from carrel.daemons import people
from carrel.errors import RefusedError
from carrel.model.guest import Mount
from carrel.model.task import Person
from carrel.testing.sandbox import let_enter

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as somebody else")

ADA = Person(user="ada", uid=64001, gid=64001, groups=((64001, "ada"),))


def reachable(*sources: Path, asked: tuple[Path, ...] = ()) -> list[str]:
    mounts = [Mount(source=str(source), target="/x") for source in sources]
    found = asyncio.run(people.reachable(mounts, ADA, asked=[str(path) for path in asked]))
    return [mount.source for mount in found]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    let_enter(tmp_path)
    for name, mode in (("open", 0o755), ("closed", 0o700), ("listed", 0o744)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "closed" / "below").mkdir()
    return tmp_path


def test_what_the_user_cannot_enter_is_left_out(place: Path) -> None:
    found = reachable(place / "open", place / "closed", place / "listed", place / "closed" / "below", place / "absent")
    assert found == [str(place / "open")]


@pytest.mark.parametrize(
    ("name", "why"),
    [("closed/below", "Permission denied"), ("closed", "Permission denied"), ("absent", "No such file or directory")],
)
def test_what_the_user_asked_for_is_refused_with_the_reason(place: Path, name: str, why: str) -> None:
    with pytest.raises(RefusedError, match=f"^--guest-mount={place / name}: {why}$"):
        reachable(place / "open", place / name, asked=(place / name,))


@pytest.mark.parametrize("name", ["a\\nb", "a\nb", "a b", "$(id)", "-x"])
def test_a_name_is_never_more_than_a_name(place: Path, name: str) -> None:
    (place / name).mkdir()
    assert reachable(place / name) == [str(place / name)]
    (place / name).chmod(0o700)
    assert reachable(place / name, place / "open") == [str(place / "open")]


def test_a_file_system_that_hangs_is_waited_for_only_so_long(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "CHECK_TIMEOUT_S", 0.2)
    slow = tmp_path_factory.mktemp("bin")
    (slow / "setpriv").write_text("#!/bin/sh\nexec sleep 20\n")
    (slow / "setpriv").chmod(0o755)
    monkeypatch.setattr(people, "PATH", str(slow) + ":/usr/bin:/bin")
    with pytest.raises(RefusedError, match=r"cannot see within 0.2 s whether ada may read .*/open: not done after"):
        reachable(place / "open")
