"""Settings: what a file may say, and the sentence for what it may not."""

from pathlib import Path

import msgspec
import pytest

from carrel import config, paths
from carrel.errors import CarrelError


class Emulator(msgspec.Struct, frozen=True):
    """Settings of some driver."""

    binary: str = "/usr/bin/emulator"
    machine: str = "q35"


@pytest.fixture
def write(tmp_path: Path) -> "Writer":
    return Writer(tmp_path / "carrel.toml")


class Writer:
    """Writes the configuration of one test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> Path:
        self.path.write_text(text)
        return self.path


def test_without_a_file_all_is_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "config_file", lambda: None)
    assert config.load() == config.Config()


def test_a_file_is_read_and_named_as_the_source(write: Writer) -> None:
    path = write('[guests]\naccelerator = "tcg"\nboot_timeout_s = 7\n[images]\nstore = "/images"\n')
    loaded = config.load(path)
    assert (loaded.guests.accelerator, loaded.guests.boot_timeout_s) == ("tcg", 7.0)
    assert loaded.images.path == Path("/images")
    assert loaded.source == str(path)
    assert loaded.guests.memory_reserve_bytes == config.Guests().memory_reserve_bytes


def test_the_file_that_the_environment_names_is_the_one(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARREL_CONFIG", str(write("[node]\nsweep_period_s = 9\n")))
    assert config.load().node.sweep_period_s == 9.0


def test_the_file_beside_slurms_own_is_found(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARREL_CONFIG", raising=False)
    monkeypatch.setenv("SLURM_CONF", str(write("").with_name("slurm.conf")))
    assert config.load().source == str(write.path)


def test_a_file_that_the_environment_names_and_that_is_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(CarrelError, match=r"gone\.toml: No such file or directory; is it readable by you"):
        config.load()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[guests]\nboot_timout_s = 1\n", "unknown key guests.boot_timout_s (did you mean guests.boot_timeout_s?)"),
        ("[guest]\n", "unknown key guest (did you mean guests?)"),
        ("zzz = 1\n", "unknown key zzz; known: "),
        ("source = 'x'\n", "unknown key source"),
        ('[guests]\nboot_timeout_s = "long"\n', "Expected float, got str - at $.guests.boot_timeout_s"),
        ('[guests]\nper = "node"\n', "guests.per = 'node'; give job, task"),
        ("guests = 1\n", "Expected object, got int - at $.guests"),
        ("[guests\n", "not TOML: "),
        ("[node]\nsweep_period_s = 0\n", "node.sweep_period_s = 0: must be above 0"),
        ("[placement.launches]\nattempts = 0\n", "Expected int >= 1 - at $.placement.launches.attempts"),
        ("[placement.launches.rate]\nfull = 0\n", "Expected int >= 1 - at $.placement.launches.rate.full"),
        ("[guests]\nboot_timeout_s = nan\n", "guests.boot_timeout_s = nan: must be above 0"),
        ("[guests.logs]\nuser_bytes_max = -1\n", "guests.logs.user_bytes_max = -1: must be 0 or more"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_that_names_it(write: Writer, text: str, sentence: str) -> None:
    path = write(text)
    with pytest.raises(CarrelError) as refused:
        config.load(path)
    assert str(refused.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(refused.value)


def test_a_drivers_settings_are_its_own(write: Writer) -> None:
    loaded = config.load(write('[drivers.emulator]\nmachine = "pc"\n'))
    assert config.driver_settings(loaded, "emulator", Emulator) == Emulator(machine="pc")
    assert config.driver_settings(loaded, "another", Emulator) == Emulator()


def test_an_unknown_key_of_a_driver_names_the_file_and_the_driver(write: Writer) -> None:
    path = write('[drivers.emulator]\nmachin = "pc"\n')
    with pytest.raises(CarrelError) as refused:
        config.driver_settings(config.load(path), "emulator", Emulator)
    assert str(refused.value) == f"{path}: drivers.emulator: unknown key machin (did you mean machine?)"


def test_a_nodes_directory_carries_its_name() -> None:
    assert config.Node(dir="/run/carrel/{node}").path("c1") == Path("/run/carrel/c1")
