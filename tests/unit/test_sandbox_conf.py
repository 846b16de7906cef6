"""What a sandbox writes is what Slurm and Carrel can read."""

from pathlib import Path

import pytest

from carrel import config
from carrel.errors import RefusedError, UsageError
from carrel.sandbox import slurmconf
from carrel.sandbox.layout import Layout
from carrel.sandbox.slurmconf import Place
from carrel.sandbox.spec import Spec


def place(root: Path, **asked: object) -> Place:
    return Place(layout=Layout(root), spec=Spec(dir=str(root), **asked), user="ada", host="box", base_port=20000)  # type: ignore[arg-type]  # a test names only what it is about


def settings(root: Path, **asked: object) -> config.Config:
    path = root / "carrel.toml"
    path.write_text(slurmconf.carrel_toml(place(root, **asked), Path("/store")))
    return config.load(path)


def test_carrel_toml_is_one_that_carrel_reads(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert found.guests.accelerator == "tcg"
    assert found.images.path == Path("/store")
    assert found.node.path("c2") == Layout(tmp_path).node("c2")


def test_a_callers_key_overrides_ours_and_leaves_its_neighbours(tmp_path: Path) -> None:
    found = settings(tmp_path, carrel_conf='[guests]\nboot_timeout_s = 5\n[drivers.qemu]\nmachine = "q35"\n')
    assert found.guests.boot_timeout_s == 5
    assert found.guests.accelerator == "tcg"
    assert found.drivers == {"qemu": {"machine": "q35"}}


def test_a_callers_line_comes_before_the_nodes_and_after_ours(tmp_path: Path) -> None:
    text = slurmconf.slurm_conf(place(tmp_path, extra_conf="KillWait=9"))
    assert text.index("KillWait=3") < text.index("KillWait=9") < text.index("NodeName=")


def test_without_guests_slurm_loads_nothing_of_carrel(tmp_path: Path) -> None:
    assert "Prolog=" not in slurmconf.slurm_conf(place(tmp_path, guests=False))
    assert "Prolog=" in slurmconf.slurm_conf(place(tmp_path))


def test_under_cgroups_node_names_belong_to_one_sandbox_of_the_machine(tmp_path: Path) -> None:
    assert place(tmp_path).nodes == ("c1", "c2", "c3")
    assert place(tmp_path, proctrack="cgroup").nodes[0] == "s20000c1"
    assert place(tmp_path, proctrack="cgroup", prefix="mine").nodes[0] == "mine1"


def test_a_link_is_no_directory_for_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RefusedError, match="not an empty directory"):
        Layout(tmp_path / "link").check(guests=False)


def test_a_path_on_which_sockets_would_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no room for unix sockets"):
        Layout(Path("/tmp") / ("x" * 60)).check(guests=True)
