"""The image store as a driver of a long-lived carreld sees it."""

from pathlib import Path

import pytest

from carrel import paths
from carrel.errors import NodeFaultError
from carrel.images import kernel
from carrel.images.source import StoreImages


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "libexec", lambda: tmp_path)
    path = tmp_path / "carrel-agent"
    path.write_bytes(b"\x7fELF\x02\x01\x01".ljust(64, b"\0"))
    return path


def _add_kernel(store: Path, version: str) -> None:
    home = store / "kernels" / f"{version}_1.r{kernel.RECIPE}"
    home.mkdir(parents=True)
    (home / "version").write_text(version)
    for name in ("vmlinux", "order"):
        (home / name).touch()


def test_an_agent_that_was_rebuilt_is_in_the_next_guest(tmp_path: Path, agent: Path) -> None:
    _add_kernel(tmp_path / "store", "6.1.0-1-amd64")
    images = StoreImages(tmp_path / "store")
    before = images.kernel()
    agent.write_bytes(agent.read_bytes() + b"new")
    assert images.kernel().initramfs.read_bytes() != before.initramfs.read_bytes()


def test_a_newer_kernel_is_in_the_next_guest(tmp_path: Path, agent: Path) -> None:
    assert agent.exists()
    _add_kernel(tmp_path / "store", "6.1.0-1-amd64")
    images = StoreImages(tmp_path / "store")
    images.kernel()
    _add_kernel(tmp_path / "store", "6.1.0-2-amd64")
    assert images.kernel().version == "6.1.0-2-amd64"


def test_an_initramfs_that_was_pruned_is_made_again(tmp_path: Path, agent: Path) -> None:
    assert agent.exists()
    _add_kernel(tmp_path / "store", "6.1.0-1-amd64")
    images = StoreImages(tmp_path / "store")
    images.kernel().initramfs.unlink()
    assert images.kernel().initramfs.exists()


def test_a_missing_agent_is_the_nodes_fault(tmp_path: Path, agent: Path) -> None:
    _add_kernel(tmp_path / "store", "6.1.0-1-amd64")
    agent.unlink()
    with pytest.raises(NodeFaultError, match="see: make native"):
        StoreImages(tmp_path / "store").kernel()
