import os
import tarfile
from pathlib import Path
from typing import Literal

import pytest

from carrel.errors import CarrelError, RefusedError
from carrel.images import apt, build, disks, make, recipes, rootfs
from carrel.images.store import Store
from carrel.process import run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The smallest root: a shell behind a merged /usr, a release, a package, and a machine's own clutter."""
    root = tmp_path / "root"
    for name in ("usr/bin", "usr/lib", "etc", "var/lib/dpkg", "dev", "run"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/dash").write_text("#!")
    (root / "usr/bin/dash").chmod(0o755)
    (root / "usr/bin/sh").symlink_to("dash")
    (root / "usr/lib/os-release").write_text('PRETTY_NAME="Toy 1"\n')
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "var/lib/dpkg/status").write_text("Package: dash\nStatus: install ok installed\nVersion: 0.5.12\n")
    (root / "dev/console").write_text("not for a guest")
    (root / "run/pid").write_text("1")
    return root


def _pack(source: Path, work: Path) -> rootfs.Root:
    work.mkdir()
    return rootfs.pack(source, tree=work / "tree", disk=work / "root.img")


def test_a_directory_becomes_a_disk_and_is_described(tree: Path, tmp_path: Path) -> None:
    root = _pack(tree, tmp_path / "work")
    assert (root.distribution, root.packages, root.shell) == ("Toy 1", ("dash=0.5.12",), True)
    disk = tmp_path / "work/root.img"
    assert disk.stat().st_size == rootfs.MINIMUM_BYTES
    assert disks.kind_of(disk) == "ext4"
    assert "Toy 1" in run(["debugfs", "-R", "cat /usr/lib/os-release", disk])


def test_what_a_machine_has_in_dev_and_run_is_left_out(tree: Path, tmp_path: Path) -> None:
    _pack(tree, tmp_path / "work")
    listing = run(["debugfs", "-R", "ls /dev", tmp_path / "work/root.img"])
    assert "console" not in listing
    assert "." in listing


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz"])
def test_a_tar_and_the_directory_it_was_made_of_are_the_same_image(
    tree: Path, tmp_path: Path, mode: Literal["w:", "w:gz", "w:xz"]
) -> None:
    packed = tmp_path / "root.tar"
    with tarfile.open(packed, mode) as tar:
        tar.add(tree, arcname=".")
    assert _pack(packed, tmp_path / "a").digest == _pack(tree, tmp_path / "b").digest


def test_times_do_not_change_an_image_but_contents_and_modes_do(tree: Path) -> None:
    before = rootfs.survey(tree)[0]
    os.utime(tree / "usr/bin/dash", (1, 1))
    assert rootfs.survey(tree)[0] == before
    (tree / "usr/bin/dash").chmod(0o700)
    other_mode = rootfs.survey(tree)[0]
    (tree / "usr/bin/dash").write_text("!#")
    assert len({before, other_mode, rootfs.survey(tree)[0]}) == 3


def test_a_file_renamed_into_its_neighbour_is_another_image(tree: Path) -> None:
    before = rootfs.survey(tree)[0]
    (tree / "usr/bin/dash").rename(tree / "usr/bin/dasha")
    assert rootfs.survey(tree)[0] != before


def test_a_root_without_a_shell_is_known_to_have_none(tree: Path, tmp_path: Path) -> None:
    (tree / "usr/bin/dash").unlink()
    assert not _pack(tree, tmp_path / "work").shell


def test_a_link_that_leads_out_of_the_tree_is_read_inside_it(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('PRETTY_NAME="the host\'s own"\n')
    (tree / "etc/os-release").unlink()
    (tree / "etc/os-release").symlink_to(tmp_path / "secret")
    assert _pack(tree, tmp_path / "work").distribution == ""


def test_links_in_a_circle_lead_nowhere(tree: Path) -> None:
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("a")
    assert rootfs.inside(tree, "a") is None


def test_dots_cannot_climb_above_the_root(tree: Path) -> None:
    assert rootfs.inside(tree, "../../../usr/lib/os-release") == tree / "usr/lib/os-release"


def test_a_directory_that_is_no_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(RefusedError, match="neither bin, sbin nor usr"):
        _pack(tmp_path / "photos", tmp_path / "work")


def test_an_archive_of_container_layers_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "oci").mkdir()
    (tmp_path / "oci/oci-layout").write_text("{}")
    with pytest.raises(RefusedError, match="export of a container"):
        _pack(tmp_path / "oci", tmp_path / "work")


def test_a_qcow2_disk_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(RefusedError, match="a qcow2 disk is not accepted; accepted: a root as tar"):
        make.add(Store(tmp_path / "store"), tmp_path / "disk", name="x", progress=print)


def test_a_source_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CarrelError, match="No such file or directory; accepted:"):
        make.add(Store(tmp_path / "store"), tmp_path / "absent", name="x", progress=print)


def test_a_refused_source_leaves_nothing_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "photos").mkdir()
    with pytest.raises(RefusedError):
        make.add(Store(tmp_path / "store"), tmp_path / "photos", name="x", progress=print)
    assert list((tmp_path / "store/images").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_only_the_mirrors_of_this_machine_are_used_for_another_suite() -> None:
    targets = """\
Packages|Debian|trixie|http://mirror/debian/|trixie|main
Packages|Debian|trixie-security|http://mirror/security/|trixie-security|main
Packages|Debian|trixie|http://mirror/debian/|trixie|non-free
Packages|Debian Backports|trixie-backports|http://mirror/debian/|trixie-backports|main
DEP-11|Debian|trixie|http://mirror/debian/|trixie|main
Packages|Somebody|x|http://elsewhere/|x|main
"""
    assert apt.mirrors(targets, suite="bookworm") == [
        "deb http://mirror/debian bookworm main",
        "deb http://mirror/security bookworm-security main",
    ]


def test_an_image_with_more_packages_is_not_the_one_without() -> None:
    recipe = recipes.RECIPES["debian12"]
    assert build.source_of(recipe, ["vim", "procps"]) == "recipe debian12 +vim"
    assert build.source_of(recipe, []) == "recipe debian12"
