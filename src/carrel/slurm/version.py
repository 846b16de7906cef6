"""What differs between Slurm's releases, in one place. Everything else is written for 22.05 and later alike."""

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from carrel import process
from carrel.config import Slurm
from carrel.errors import CarrelError

OLDEST = (22, 5)


class Version(NamedTuple):
    """A release: Slurm's interfaces change with the second number, never with the third."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        """Return it as Slurm writes it: ``22.05.8``."""
        return f"{self.major}.{self.minor:02}.{self.micro}"

    @property
    def plugins(self) -> tuple[int, int]:
        """The part that a plug-in must have been built for; Slurm refuses another."""
        return self.major, self.minor


def parse(text: str) -> Version:
    """Read ``slurm 24.11.5`` or Debian's ``slurm-wlm 22.05.8``.

    Raises:
        CarrelError: no release stands in ``text``.
    """
    match = re.search(r"\b(\d+)\.(\d+)\.(\d+)", text)
    if not match:
        raise CarrelError(f"no slurm release in {text.strip()!r}; what does squeue --version print?")
    return Version(*(int(part) for part in match.groups()))


def installed(slurm: Slurm) -> Version:
    """Return the release of the commands on this host."""
    # Even for this, squeue wants its configuration first.
    env = {"SLURM_CONF": slurm.conf} if slurm.conf else {}
    return parse(process.run([Path(slurm.bin_dir) / "squeue", "--version"], timeout_s=10, env=env))


def built_for(plugin: Path) -> Version:
    """Return the release that a SPANK plug-in was compiled for, as Slurm itself finds it out.

    Raises:
        CarrelError: the file is missing or is no SPANK plug-in.
    """
    try:
        # Its functions are Slurm's to bind; only a number is read, so nothing of it runs.
        library = ctypes.CDLL(str(plugin), mode=1)
        number = ctypes.c_uint.in_dll(library, "plugin_version").value
    except (OSError, ValueError) as error:
        raise CarrelError(f"{plugin}: not a SPANK plug-in: {error}; build it: make native") from error
    return Version(number >> 16 & 0xFF, number >> 8 & 0xFF, number & 0xFF)


def gives_whole_nodes(partition: Mapping[str, str]) -> bool:
    """Tell whether each job of a partition has its nodes to itself, by the words of ``scontrol show partition``.

    >>> gives_whole_nodes({"OverSubscribe": "EXCLUSIVE"})  # to 24.11
    True
    >>> gives_whole_nodes({"OverSubscribe": "NO", "Exclusive": "NODE"})  # 26.05
    True
    """
    return partition.get("OverSubscribe", "").startswith("EXCLUSIVE") or partition.get("Exclusive") == "NODE"
