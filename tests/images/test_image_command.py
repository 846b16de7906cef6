import json
from pathlib import Path

import pytest

from carrel.cli.main import run
from carrel.images.store import Image, Store, disk_digest

_HASH = "ab" * 32


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one image, which is the one that the command uses."""
    (tmp_path / "carrel.toml").write_text("")
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "carrel.toml"))
    monkeypatch.setenv("CARREL_IMAGE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CARREL_TEMPLATE_STORE", str(tmp_path / "templates"))
    staged = tmp_path / "store/staged"
    staged.mkdir(parents=True)
    (staged / "root.img").write_bytes(b"root")
    store = Store(tmp_path / "store")
    store.add(
        Image(
            hash=_HASH,
            name="debian12",
            created="2026-01-01T00:00:00Z",
            source="recipe debian12",
            distribution="Debian GNU/Linux 12 (bookworm)",
            packages=("dash=0.5.12",),
            disk_digest=disk_digest(staged / "root.img"),
        ),
        staged,
    )
    return store


def test_list_shows_a_line_for_each_image(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.tag("also", _HASH)
    assert run(["image", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "also", "debian12"]
    assert lines[1].endswith("Debian GNU/Linux 12 (bookworm)")


def test_list_as_json_is_one_object_per_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.tag("also", _HASH)
    assert run(["image", "list", "--json"]) == 0
    images = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(image["name"], image["hash"]) for image in images] == [("also", _HASH), ("debian12", _HASH)]


def test_show_as_json_is_one_object(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "show", _HASH[:6], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"] == ["dash=0.5.12"]


def test_an_unknown_image_exits_with_3_and_one_sentence(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "show", "foo"]) == 3
    assert capsys.readouterr().err == "carrel: no image 'foo'; known: debian12; see: carrel image list\n"


def test_an_unknown_recipe_exits_with_2_and_names_the_known(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "build", "debain12"]) == 2
    assert "no recipe 'debain12'; known: debian12" in capsys.readouterr().err


def test_a_removed_image_is_gone(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "remove", "debian12"]) == 0
    assert "guests that run from it keep it" in capsys.readouterr().out
    assert store.list() == []


def test_a_changed_disk_exits_with_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "verify", "debian12"]) == 0
    store.root_disk(store.resolve("debian12")).write_bytes(b"r00t")
    assert run(["image", "verify", "debian12"]) == 1


@pytest.mark.root
def test_a_directory_is_added_and_found_again(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "root/bin").mkdir(parents=True)
    assert run(["image", "add", "toy", str(tmp_path / "root")]) == 0
    assert "no /bin/sh, so job scripts cannot run in it" in capsys.readouterr().out
    assert run(["image", "show", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shell"] is False
