"""The lock of a node: one carreld at a time, and a guard that only looks is not one."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from carrel.daemons import node
from carrel.errors import CarrelError


def _held(path: Path, kind: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, kind)
    return descriptor


def test_a_guard_that_looks_whether_carreld_lives_does_not_keep_the_next_one_from_starting(tmp_path: Path) -> None:
    guard = _held(tmp_path / "lock", fcntl.LOCK_SH)
    looked = threading.Timer(0.1, os.close, [guard])
    looked.start()
    os.close(node._locked(tmp_path / "lock"))  # a whole Node needs Slurm
    looked.join()


def test_a_second_carreld_of_a_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "LOCK_TIMEOUT_S", 0.05)
    first = _held(tmp_path / "lock", fcntl.LOCK_EX)
    with pytest.raises(CarrelError, match="another carreld serves this node"):
        node._locked(tmp_path / "lock")
    os.close(first)
