"""The directory of one guest: all that a carreld which starts later needs to know of it.

==============  =====================================================================================
``guest.json``  the spec, and what was learnt while it started (written by carreld)
``pids``        pid and start time of carrel-guard and of QEMU (written by carrel-guard)
``end``         why the guest is gone: a word and a sentence (written by carrel-guard)
``disk``        its disk
``console.log`` its console, bounded
``suspended``   there while the guest's CPUs are stopped
``guard.log``   what carrel-guard and QEMU had to say
==============  =====================================================================================
"""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from carrel.drivers.qemu.command import Accelerator
from carrel.model.guest import GuestSpec
from carrel.process import Pid


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in ``guest.json``."""

    spec: GuestSpec
    accelerator: Accelerator
    accelerator_why: str
    started_s: float
    kernel: str = ""
    ready_s: float | None = None


class GuestDirectory:
    """Reads and writes one guest's directory."""

    def __init__(self, path: Path) -> None:
        """Name it; nothing is made yet."""
        self.path = path
        self.name = path.name

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o755)
        (self.path / "stage").mkdir(exist_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def end_file(self) -> Path:
        return self.path / "end"

    def read(self) -> Record | None:
        """Return the record; None where it was never completed, so that nobody knows whose guest it is."""
        try:
            return msgspec.json.decode((self.path / "guest.json").read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, record: Record) -> None:
        _write_whole(self.path / "guest.json", msgspec.json.encode(record))

    def pids(self) -> dict[str, Pid]:
        """Return the processes ``guard`` and ``qemu``, as far as the guard wrote them down."""
        try:
            lines = (self.path / "pids").read_text().splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            name, _, numbers = line.partition("=")
            pid, _, start = numbers.partition(" ")
            if pid.isdigit() and start.isdigit():
                found[name] = Pid(int(pid), int(start))
        return found

    def end(self) -> tuple[str, str] | None:
        """Return (word, sentence) once the guest is gone."""
        try:
            word, _, sentence = self.end_file.read_text().strip().partition("\n")
        except OSError:
            return None
        return word, sentence.strip() or word

    @property
    def suspended(self) -> bool:
        return (self.path / "suspended").exists()

    def mark_suspended(self, suspended: bool) -> None:  # it reads as it says
        """Note what QEMU was told, so that looking does not take its monitor."""
        if suspended:
            (self.path / "suspended").touch()
        else:
            (self.path / "suspended").unlink(missing_ok=True)

    def guard_log(self) -> str:
        """Return the last line that the guard or QEMU said."""
        try:
            lines = (self.path / "guard.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    @contextlib.contextmanager
    def short(self) -> Iterator[Path]:
        """Yield a short name of the directory: a unix socket's path may have 107 bytes only."""
        descriptor = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def listen(self, name: str) -> socket.socket:
        """Return a listening socket at ``name``, for root alone; an old one is replaced."""
        (self.path / name).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self.short() as short:
            sock.bind(str(short / name))
        (self.path / name).chmod(0o600)
        sock.listen(4)
        return sock


def _write_whole(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
