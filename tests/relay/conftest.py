"""The two ends of the relay on one machine: a real carrel-enter and a real carrel-agent, see carrel.testing.relay."""

import subprocess  # what `make` is started with before there is anything to test
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel import paths
from carrel.testing.relay import RelayNode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def programs() -> Path:
    """Return the directory of the C programs, built from what is in the tree."""
    # One of several processes of a test run makes what is old; the others wait, and find it made.
    (ROOT / "build").mkdir(exist_ok=True)
    words: list[str | Path] = ["flock", ROOT / "build" / "guest.lock", "make", "-s"]
    subprocess.run([*words, "-C", ROOT / "guest", f"BUILD={ROOT / 'build'}"], check=True)
    return paths.libexec()


@pytest.fixture
def node(programs: Path) -> Iterator[RelayNode]:
    """Give a carreld whose guests are agents on this machine."""
    node = RelayNode(programs)
    yield node
    node.close()
