"""The password for vCenter is read only where nobody else can read it."""

import os
import re
import subprocess  # a fresh interpreter
import sys
from pathlib import Path

import msgspec
import pytest

from carrel import config
from carrel.drivers.vsphere.settings import PASSWORD_VARIABLE, Settings, password, refuse_incomplete
from carrel.errors import CarrelError, NodeFaultError

WHOLE = Settings(server="vc", user="carrel", owner="physics", datacenters=("DC0",), folder="carrel")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.touch(0o600)
    path.write_text(" with blanks \n")
    return path


def reads(path: Path) -> str:
    return password(msgspec.structs.replace(WHOLE, password_file=str(path)))


def test_a_file_that_its_owner_alone_can_read_is_read_without_its_newline(secret: Path) -> None:
    assert reads(secret) == " with blanks "


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(NodeFaultError, match=rf"has mode {mode:04o}; run: chmod 600 {secret}"):
        reads(secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: cannot give a file away")
def test_a_file_of_somebody_else_is_refused(secret: Path) -> None:
    os.chown(secret, 65534, -1)
    with pytest.raises(NodeFaultError, match="belongs to uid 65534; chown it to root"):
        reads(secret)


def test_a_file_that_is_missing_or_empty_is_named(secret: Path) -> None:
    secret.write_text("\n")
    with pytest.raises(NodeFaultError, match="is empty"):
        reads(secret)
    secret.unlink()
    with pytest.raises(NodeFaultError, match=r"password_file = .*password: No such file"):
        reads(secret)


def test_without_a_file_the_environment_has_it_and_else_the_sentence_names_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "from outside")
    assert password(WHOLE) == "from outside"
    monkeypatch.delenv(PASSWORD_VARIABLE)
    with pytest.raises(NodeFaultError, match=rf"password_file, or {PASSWORD_VARIABLE} in the environment"):
        password(WHOLE)


def test_a_file_wins_over_the_environment(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "from outside")
    assert reads(secret) == " with blanks "


@pytest.mark.parametrize("key", ["server", "user", "owner", "datacenters", "folder"])
def test_a_setting_without_a_default_must_be_there(key: str) -> None:
    with pytest.raises(NodeFaultError, match=rf"drivers\.vsphere\.{key} is not set"):
        refuse_incomplete(msgspec.structs.replace(WHOLE, **{key: () if key == "datacenters" else ""}))


@pytest.mark.parametrize("owner", ["two words", "a/b", "x" * 32, "ümlaut"])
def test_an_owner_that_no_machine_could_be_named_after_is_refused(owner: str) -> None:
    with pytest.raises(NodeFaultError, match=r"drivers\.vsphere\.owner = .*at most 31"):
        refuse_incomplete(msgspec.structs.replace(WHOLE, owner=owner))


def test_there_is_no_switch_that_lets_any_server_pass_for_vcenter() -> None:
    for key in ("insecure", "verify", "verify_tls", "thumbprint"):
        with pytest.raises(CarrelError, match=rf"unknown key {key}"):
            config.driver_settings(config.Config(drivers={"vsphere": {key: True}}), "vsphere", Settings)


def test_neither_the_nodes_daemon_nor_the_command_line_loads_what_talks_to_vcenter() -> None:
    code = "import carrel.daemons.node, carrel.cli.main, sys; print([m for m in sys.modules if 'pyVmomi' in m])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_every_setting_is_in_the_how_to() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "vsphere.md").read_text()
    words = set(re.findall(r"\w+", page))
    assert {field.name for field in msgspec.structs.fields(Settings)} <= words
