"""Templates as their administrator sees them, where no guest has to boot for it."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.cli import main
from carrel.cli.templates import parse_cpus, parse_sizes
from carrel.drivers.qemu.templates import Conditions, Template
from carrel.errors import UsageError
from carrel.images.store import Image, Store

IMAGE = "ab" * 32
GONE = "cd" * 32
MIB = 2**20


def conditions(**changes: Any) -> Conditions:
    known = Conditions(
        image=IMAGE,
        kernel="6.1",
        cpus=2,
        memory_bytes=512 * MIB,
        growth_bytes=2**34,
        ports=20,
        machine="pc-q35-7.2",
        cpu="max",
        accelerator="tcg",
        qemu="/usr/bin/qemu",
        command="",
        host="",
    )
    return msgspec.structs.replace(known, **changes)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with one image, and with a template of it that was used later than one of an image that is gone."""
    config = tmp_path / "carrel.toml"
    config.write_text(f'[node]\ndir = "{tmp_path}/nodes/{{node}}"\n[guests]\naccelerator = "tcg"\n')
    monkeypatch.setenv("CARREL_CONFIG", str(config))
    monkeypatch.setenv("CARREL_IMAGE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CARREL_TEMPLATE_STORE", str(tmp_path / "templates"))
    staged = tmp_path / "store/staged"
    staged.mkdir(parents=True)
    (staged / "root.img").write_bytes(b"root")
    Store(tmp_path / "store").add(
        Image(hash=IMAGE, name="debian12", created="2026-01-01T00:00:00Z", source="test"), staged
    )
    put(tmp_path, conditions(image=GONE), name="debian11", used_s=1795220000.0)
    put(tmp_path, conditions(), name="debian12", used_s=1795220391.0)
    return tmp_path


def put(place: Path, what: Conditions, *, name: str, used_s: float) -> None:
    home = place / "templates" / what.digest
    home.mkdir(parents=True)
    template = Template(
        conditions=what,
        image_name=name,
        kernel_version="6.1.0",
        created_s=1795210000.0,
        boot_s=2.5,
        ram_bytes=80 * MIB,
        sizes=(1, 1, 1, 1),
    )
    (home / "template.json").write_bytes(msgspec.json.encode(template))
    os.utime(home, (used_s, used_s))


def listed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    assert main.run(["image", "templates", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_templates_are_listed_the_last_used_first_and_say_why_they_are_of_no_use(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = listed(capsys)
    assert (first["image_name"], first["cpus"], first["memory_bytes"]) == ("debian12", 2, 512 * MIB)
    assert (first["ram_bytes"], first["used"]) == (80 * MIB, "2026-11-21T00:19:51Z")
    assert (last["usable"], last["why_not"]) == (False, "its image is gone")
    # This store has the image, and no kernel to boot it with.
    assert not first["usable"]
    assert "no kernel for guests" in first["why_not"]


def test_a_template_is_removed_by_six_digits_of_its_digest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = conditions().digest
    assert main.run(["image", "templates", "--remove", digest[:5]]) == 3
    assert main.run(["image", "templates", "--remove", digest[:6]]) == 0
    assert capsys.readouterr().out.startswith("removed 1 template (80 MiB)")
    assert [one["image_name"] for one in listed(capsys)] == ["debian11"]
    assert main.run(["image", "templates", "--remove", digest]) == 3


def test_prune_removes_what_no_guest_will_be_made_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["image", "templates", "--prune"]) == 0
    assert capsys.readouterr().out.startswith("removed 2 templates (160 MiB)")
    assert listed(capsys) == []


def test_an_image_shows_its_templates(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["image", "show", "debian12"]) == 0
    assert "1 on this node, 80 MiB of memory: 2 CPUs from 512M" in capsys.readouterr().out
    assert main.run(["image", "show", "debian12", "--json"]) == 0
    assert [one["digest"] for one in json.loads(capsys.readouterr().out)["templates"]] == [conditions().digest]


def test_an_image_takes_its_templates_along_and_no_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(place / "store")
    store.tag("also", IMAGE)
    assert main.run(["image", "remove", "also"]) == 0
    assert "with 0 templates" in capsys.readouterr().out
    assert main.run(["image", "remove", "debian12"]) == 0
    assert "with 1 template;" in capsys.readouterr().out
    assert [one["image_name"] for one in listed(capsys)] == ["debian11"]


def test_amounts_of_memory_are_written_as_for_slurm() -> None:
    assert [size // MIB for size in parse_sizes("512,2G,300m,1T,2048K")] == [512, 2048, 300, 2**20, 2]
    for text in ("", "512,", "2X", "-1", "0", "1.5G"):
        with pytest.raises(UsageError, match="no amount of memory"):
            parse_sizes(text)


def test_numbers_of_cpus_are_whole_and_not_nothing() -> None:
    assert parse_cpus("1,2,4") == [1, 2, 4]
    for text in ("", "0", "1,,2", "two", "-1"):
        with pytest.raises(UsageError, match="write numbers"):
            parse_cpus(text)


@pytest.mark.root
def test_a_site_without_sharing_has_nothing_to_warm(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (place / "carrel.toml").open("a") as config:
        config.write('[guests.templates]\nshare = "none"\n')
    assert main.run(["image", "warm", "debian12"]) == 4
    assert "guests.templates.share = none" in capsys.readouterr().err


@pytest.mark.root
def test_a_job_too_small_for_a_guest_is_not_warmed_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["image", "warm", "debian12", "--memory", "200"]) == 4
    assert "--mem=320M or more" in capsys.readouterr().err
