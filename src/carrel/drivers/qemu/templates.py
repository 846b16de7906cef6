"""Templates: guests that were booted once and stopped before they were anybody's, for instant clones to go on from.

::

    <directory>/<digest>/template.json    what it was made of, written last
    <directory>/<digest>/ram              its memory, sparse
    <directory>/<digest>/state            its devices
    <directory>/<digest>/disk             what it wrote to its disk: an overlay on the image
    <directory>/<digest>/empty            an empty overlay on ``disk``, which each clone gets a copy of
    <directory>/.new-<digest>             one that is being made, locked (``flock``) by whoever makes it

A clone maps the memory privately, from a file that nobody can write: a sealed memfd, which carreld fills from ``ram``
once. QEMU 7.2 opens its memory's file for writing whatever it is told, and the seal makes that harmless, so that users
who do not trust each other can have clones of one template. See ``docs/design/0007-instant-clones.md``.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from carrel import config, process
from carrel.drivers.qemu.command import Accelerator
from carrel.drivers.qemu.files import opened
from carrel.errors import CarrelError

SAVE_TIMEOUT_S = 120.0
_DIGEST_DIGITS = 32
_NEW = ".new-"
_PARTS = ("state", "disk", "empty")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class TemplateError(CarrelError):
    """A guest cannot come from this template, and boots instead; the sentence says how that was seen."""

    def __init__(self, sentence: str, *, is_spoilt: bool = True) -> None:
        """Say whether the template is to blame, and goes; one that was only too slow for somebody stays."""
        super().__init__(sentence)
        self.is_spoilt = is_spoilt


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a template's memory depends on. Under other conditions no guest can go on from it."""

    image: str
    """Content hash."""
    kernel: str
    """``KernelFiles.id``, which covers the agent too."""
    cpus: int
    memory_bytes: int
    growth_bytes: int
    """How much memory can be plugged into a clone."""
    ports: int
    """How many its device for tasks and calls has."""
    machine: str
    cpu: str
    accelerator: Accelerator
    qemu: str
    """Which QEMU: its path, size and time of change."""
    command: str
    """Digest of the command line that it was made with: its devices, and the words to its kernel."""
    host: str
    """The host's own CPU where guests see it; empty under emulation."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:_DIGEST_DIGITS]


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in ``template.json``."""

    conditions: Conditions
    image_name: str
    kernel_version: str
    """As ``uname -r`` says it in the guest."""
    created_s: float
    boot_s: float
    """How long it took to boot and stop."""
    ram_bytes: int = 0
    """Memory that it really takes."""
    sizes: tuple[int, ...] = ()
    """Of its files ``ram``, ``state``, ``disk`` and ``empty``, so that one that was cut off is known."""


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Open descriptors for one clone."""

    ram: int
    """A sealed memfd."""
    state: int
    disk: int
    empty: int


class Templates:
    """The templates of one host. Several processes may use one directory at once."""

    def __init__(self, directory: Path, settings: config.Templates) -> None:
        """Look at nothing yet."""
        self.path = directory
        self._settings = settings
        self._loading = threading.Lock()
        self._loaded: dict[tuple[str, float, int], int] = {}

    # -- finding -----------------------------------------------------------------------------------------------

    def find(self, conditions: Conditions) -> Template | None:
        """Return the template for these conditions; None: there is none, or only a part of one."""
        self._let_go()
        return self._read(self.path / conditions.digest)

    def all(self) -> Sequence[Template]:
        """Return all, the one last used first."""
        homes = sorted(self._homes(), key=_used_s, reverse=True)
        return [template for home in homes if (template := self._read(home))]

    def used_s(self, template: Template) -> float:
        """Return when a clone was last made of it: seconds since the epoch."""
        return _used_s(self.path / template.conditions.digest)

    def open(self, template: Template, *, uid: int, stack: contextlib.ExitStack) -> Parts:
        """Return what a clone for this user is made from, open until ``stack`` closes.

        Raises:
            TemplateError: it went away, or is not whole.
        """
        home = self.path / template.conditions.digest
        try:
            # One made anew under the same name has other memory: what is opened here belongs together.
            directory = opened(stack, home, os.O_PATH | os.O_DIRECTORY)
            if os.fstat(directory).st_ino != home.stat().st_ino or self._read(home) != template:
                raise TemplateError("it was made anew meanwhile")
            for name, size in zip(("ram", *_PARTS), template.sizes, strict=True):
                if (found := os.stat(name, dir_fd=directory).st_size) != size:
                    raise TemplateError(f"its {name} has {found} bytes, and had {size}")
            state, disk, empty = (opened(stack, Path(name), os.O_RDONLY, within=directory) for name in _PARTS)
            with self._loading:
                # One of the clone's own: the store may let its own go while QEMU is being started.
                ram = os.dup(self._ram(template, directory, uid if self._settings.share == "user" else -1))
                stack.callback(os.close, ram)
            os.utime(home)
        except OSError as error:
            raise TemplateError(f"its {error.filename or 'memory'}: {error.strerror}") from error
        return Parts(ram=ram, state=state, disk=disk, empty=empty)

    def _ram(self, template: Template, directory: int, whose: int) -> int:
        key = (template.conditions.digest, template.created_s, whose)
        if key not in self._loaded:
            with contextlib.ExitStack() as stack:
                self._loaded[key] = _load(opened(stack, Path("ram"), os.O_RDONLY, within=directory))
        return self._loaded[key]

    # -- making ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def making(self, conditions: Conditions) -> Iterator[Path | None]:
        """Yield an empty directory to make a template in; None: another process is making the same one."""
        self._make_own()
        new = self.path / f"{_NEW}{conditions.digest}"
        new.mkdir(mode=0o700, exist_ok=True)
        with _locked(new) as ours:
            if not ours:
                yield None
                return
            _empty(new)  # what somebody who was killed had made
            try:
                yield new
            finally:
                if ours():
                    shutil.rmtree(new, ignore_errors=True)

    def add(self, template: Template, new: Path, *, ram: int) -> Template:
        """Take over what was made in ``new``, with the memory in the memfd ``ram``, and let it be found; return it.

        Raises:
            CommandError: the disk is full.
            OSError: the same.
        """
        home = self.path / template.conditions.digest
        # Most of what a guest touched while it booted is zero again, and need not be kept.
        process.run(["cp", "--sparse=always", f"/proc/{os.getpid()}/fd/{ram}", new / "ram"], timeout_s=SAVE_TIMEOUT_S)
        (new / "ram").chmod(0o600)
        for name in ("ram", *_PARTS):
            _sync(new / name)
        facts = [(new / name).stat() for name in ("ram", *_PARTS)]
        whole = msgspec.structs.replace(
            template, ram_bytes=facts[0].st_blocks * 512, sizes=tuple(file.st_size for file in facts)
        )
        (new / "template.json").write_bytes(msgspec.json.encode(whole))
        _sync(new / "template.json")
        shutil.rmtree(home, ignore_errors=True)
        new.rename(home)
        return whole

    def _make_own(self) -> None:
        """A template decides what runs in everybody's guests: its directory must be ours alone to write."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = self.path.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise CarrelError(
                f"{self.path}: owned by uid {facts.st_uid} with mode {facts.st_mode & 0o777:o}; templates need a "
                "directory that only carreld may write, see: guests.templates.dir"
            )

    # -- removing ----------------------------------------------------------------------------------------------

    def discard(self, digest: str) -> None:
        """Remove the template whose conditions have this digest. Clones that run keep their memory."""
        self._discard(self.path / digest)

    def prune(self, *, now_s: float | None = None) -> Sequence[Template]:
        """Remove those that are too old, or too many for ``max_bytes``, the longest unused first; return them."""
        now_s = time.time() if now_s is None else now_s
        removed, kept_bytes = [], 0
        for home in sorted(self._homes(), key=_used_s, reverse=True):
            template = self._read(home)
            kept_bytes += template.ram_bytes if template else 0
            unused_s = now_s - _used_s(home)
            if template and unused_s < self._settings.max_age_s and kept_bytes <= self._settings.max_bytes:
                continue
            if template:
                removed.append(template)
                kept_bytes -= template.ram_bytes
            self._discard(home)
        self._sweep()
        return removed

    def keep_only(self, wanted: Callable[[Conditions], bool]) -> Sequence[Template]:
        """Remove those that no guest of this host can be made from any more, and return them."""
        gone = [template for template in self.all() if not wanted(template.conditions)]
        for template in gone:
            self.discard(template.conditions.digest)
        return gone

    def _discard(self, home: Path) -> None:
        (home / "template.json").unlink(missing_ok=True)  # first: half a template is none
        shutil.rmtree(home, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        """Free the memory of templates that are gone or were made anew, by whichever process."""
        with self._loading:
            for key in list(self._loaded):
                template = self._read(self.path / key[0])
                if template is None or template.created_s != key[1]:
                    os.close(self._loaded.pop(key))

    def _sweep(self) -> None:
        """Remove what was begun by processes that were killed."""
        for path in self.path.glob(f"{_NEW}*"):
            with contextlib.suppress(OSError), _locked(path) as ours:
                if ours:
                    shutil.rmtree(path, ignore_errors=True)

    def _homes(self) -> list[Path]:
        return [path for path in self.path.glob("[!.]*") if path.is_dir()] if self.path.is_dir() else []

    def _read(self, home: Path) -> Template | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            template = msgspec.json.decode((home / "template.json").read_bytes(), type=Template)
            return template if template.conditions.digest == home.name and template.sizes else None
        return None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Callable[[], bool] | None]:
    """Yield what tells whether the directory of this name is still the one that was locked; None: it is another's."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # somebody else was quicker to remove it
        yield None
        return

    def ours() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return directory.stat().st_ino == os.fstat(lock).st_ino
        return False

    try:
        yield ours if _lock(lock) and ours() else None
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def new_ram(size_bytes: int) -> int:
    """Return an empty memfd."""
    ram = os.memfd_create("carrel-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(ram, size_bytes)
    return ram


def _seal(ram: int) -> None:
    """Let nobody write to the memory any more, whoever has it open."""
    fcntl.fcntl(ram, fcntl.F_ADD_SEALS, _SEALS)


def _load(source: int) -> int:
    ram = new_ram(os.fstat(source).st_size)
    try:
        _copy(source, ram)
        _seal(ram)
    except BaseException:
        os.close(ram)
        raise
    return ram


def _copy(source: int, target: int) -> None:
    """Copy a sparse file with its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows
            return
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if sent == 0:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            start += sent


def _used_s(home: Path) -> float:
    with contextlib.suppress(OSError):
        return home.stat().st_mtime
    return 0.0


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
