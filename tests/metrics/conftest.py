"""A program whose use of everything is known: what samples say of it can be right or wrong."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.testing.sandbox import User

SOURCE = Path(__file__).with_name("known.c")


@pytest.fixture(scope="module")
def known(user: User) -> Iterator[Path]:
    """Compile it where the user and a guest can run it."""
    path = user.home / f"known.{os.getpid()}"
    subprocess.run(["cc", "-O1", "-static", "-pthread", "-o", path, SOURCE], check=True)
    yield path
    path.unlink()
