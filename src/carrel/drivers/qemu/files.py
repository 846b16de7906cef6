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
from collections.abc import Iterator
from pathlib import Path

import msgspec

from carrel.drivers.qemu.command import Accelerator, Memory
from carrel.model.guest import Clone, GuestSpec
from carrel.process import Pid

TAIL_BYTES = 64 * 1024
LOG_MAX_BYTES = 1024 * 1024


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in ``guest.json``."""

    spec: GuestSpec
    accelerator: Accelerator
    accelerator_why: str
    started_s: float
    clone: Clone = "linked"
    clone_why: str = ""
    memory: Memory | None = None
    """None: all that the spec says, from the start."""
    ports: int = 0
    """How many its device for tasks and calls has; 0 in what an earlier Carrel wrote, whose QEMU knows."""
    template: str = ""
    """Digest of the template that it goes on from; empty: it boots."""
    state: int = -1
    """Number of QEMU's descriptor of that template's state."""
    phases: tuple[tuple[str, float], ...] = ()
    kernel: str = ""
    ready_s: float | None = None
    failure: str = ""
    """Why it did not start: what every later step of its job is told too."""


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
        """Return the record; None where it was never completed, so that nobody knows whose guest it is.

        Raises:
            OSError: it could not be read, which is not the same: such a guest must not be swept.
        """
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode((self.path / "guest.json").read_bytes(), type=Record)
        return None

    def write(self, record: Record) -> None:
        """Replace the record. Not flushed to the disk: after a power cut there is no guest to know of either."""
        temporary = self.path / ".guest.json"
        temporary.touch(mode=0o600)  # what a user mounts is nobody else's business
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(self.path / "guest.json")

    def pids(self) -> dict[str, Pid]:
        """Return the processes ``guard`` and ``qemu``, as far as the guard wrote them down."""
        try:
            lines = (self.path / "pids").read_text().splitlines()
        except FileNotFoundError:
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
            # QEMU, and who is in it, have a say in the sentence: it may hold any byte.
            word, _, sentence = self.end_file.read_text(errors="replace").strip().partition("\n")
        except FileNotFoundError:
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
            lines = _tail(self.path / "guard.log").strip().splitlines()
        except FileNotFoundError:
            return ""
        return lines[-1] if lines else ""

    def bound_log(self) -> None:
        """Keep the end of a log that grew too long: QEMU complains of what a guest does as often as it does it."""
        log = self.path / "guard.log"
        with contextlib.suppress(OSError):
            if log.stat().st_size > LOG_MAX_BYTES:
                end = _tail(log)
                with log.open("ab") as file:  # QEMU appends too, and goes on where we cut
                    file.truncate(0)
                    file.write(end.encode())

    def panic(self) -> str:
        """Return the kernel's last words, where it panicked."""
        with contextlib.suppress(OSError):
            for line in _tail(self.console).splitlines():
                _, found, words = line.partition("Kernel panic - not syncing: ")
                if found:
                    return f"its kernel panicked: {words.strip()}"
        return ""

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


def opened(stack: contextlib.ExitStack, path: Path, flags: int, *, within: int | None = None) -> int:
    """Return a descriptor that is closed with ``stack``; a file that this makes is its maker's alone.

    Args:
        stack: What closes it.
        path: The file; relative to ``within``, a descriptor of a directory, where there is one.
        flags: As ``os.open`` takes them.
        within: See ``path``.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=within)
    stack.callback(os.close, descriptor)
    return descriptor


def _tail(path: Path) -> str:
    """Return the end of a file that others write, however long they made it."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read(TAIL_BYTES).decode(errors="replace")
