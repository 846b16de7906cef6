"""From a source to an image of the store: unpack, look inside, make the disk, move it into place."""

import contextlib
import datetime as dt
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from carrel import process
from carrel.errors import CarrelError, RefusedError
from carrel.images import disks, files, rootfs
from carrel.images.store import Image, Store, check_name, disk_digest

Progress = Callable[[str], None]

ACCEPTED = "a root as tar, tar.gz, tar.xz or tar.zst, a directory, or a raw ext4 disk"
_IN_NAMESPACE = ("unshare", "--map-auto", "--map-root-user", "--")
"""How an ordinary user becomes one that may own files of many users, from the ranges in ``/etc/subuid``."""


def from_tree(store: Store, source: Path, *, name: str, told: str, progress: Progress) -> Image:
    """Make an image of a directory or a tar, and tag it.

    Args:
        store: Where it goes.
        source: The directory or tar.
        name: What to call it.
        told: What ``Image.source`` says.
        progress: Told each phase.

    Raises:
        RefusedError: it is not a root file system, or the store or this user cannot take it.
        CarrelError: it cannot be unpacked.
    """
    check_name(name)
    with _staged(store) as staged, scratch() as work:
        progress("making the root disk")
        disk = staged / "root.img"
        root = _pack(source, tree=work / "tree", disk=disk)
        progress("storing the image")
        return _store(store, staged, root, name=name, told=told)


def from_disk(store: Store, source: Path, *, name: str, progress: Progress) -> Image:
    """Make an image of a raw disk that holds an ext4 file system, and tag it.

    Raises:
        RefusedError: it is not ext4, or the store cannot take it.
    """
    check_name(name)
    with _staged(store) as staged:
        progress("copying the disk")
        disk = staged / "root.img"
        process.run(["cp", "--sparse=always", "--no-preserve=mode", "--", source, disk], timeout_s=1800)
        disk.chmod(0o644)
        progress("looking inside")
        root = disks.look_inside(disk)
        progress("storing the image")
        return _store(store, staged, root, name=name, told=str(source))


def add(store: Store, source: Path, *, name: str, progress: Progress) -> Image:
    """Make an image of whatever ``source`` is, and tag it.

    Raises:
        RefusedError: it is nothing that we accept; the sentence names what is.
        CarrelError: it cannot be read.
    """
    check_name(name)
    source = source.absolute()
    try:
        kind = "directory" if source.is_dir() else disks.kind_of(source)
    except OSError as error:
        raise CarrelError(f"{source}: {error.strerror}; accepted: {ACCEPTED}") from error
    match kind:
        case "directory" | "tar":
            size = _size_of(source)
            files.require_space(store.path, size * 3, what="this image")
            files.require_space(Path(tempfile.gettempdir()), size * 4, what="unpacking it", hint="TMPDIR")
            return from_tree(store, source, name=name, told=str(source), progress=progress)
        case "ext4":
            files.require_space(store.path, source.stat().st_blocks * 512 * 2, what="this image")
            return from_disk(store, source, name=name, progress=progress)
        case _:
            raise RefusedError(f"{source}: {kind} is not accepted; accepted: {ACCEPTED}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty private directory, removed at the end also where other users' files are in it."""
    work = Path(tempfile.mkdtemp(prefix="carrel-image-"))
    try:
        yield work
    finally:
        if os.geteuid() != 0:
            with contextlib.suppress(CarrelError):
                process.run([*_IN_NAMESPACE, "rm", "-rf", "--", work / "tree"], timeout_s=300)
        files.remove_tree(work)


def require_subordinate_ids() -> None:
    """Refuse early where an ordinary user has no range of user ids to own an image's files with.

    Raises:
        RefusedError: there is none; the sentence says how root makes one.
    """
    if os.geteuid() == 0:
        return
    user = pwd.getpwuid(os.geteuid()).pw_name
    for path in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = path.read_text().splitlines() if path.exists() else []
        if not any(line.split(":")[0] in {user, str(os.geteuid())} for line in lines):
            raise RefusedError(
                f"{path} has no line for {user}; root adds it with: "
                f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            )
    if not shutil.which("newuidmap"):
        raise RefusedError("newuidmap: not found; root installs it with: apt-get install uidmap")


@contextlib.contextmanager
def _staged(store: Store) -> Iterator[Path]:
    """The disk is written inside the store, so that it need only be renamed."""
    with files.as_sentence(store.path):
        files.make_public(store.path / "images")
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=store.path / "images"))
        staged.chmod(0o755)
    try:
        yield staged
    finally:
        files.remove_tree(staged)


def _pack(source: Path, *, tree: Path, disk: Path) -> rootfs.Root:
    if os.geteuid() == 0:
        return rootfs.pack(source, tree=tree, disk=disk)
    require_subordinate_ids()
    command: list[str | Path] = [*_IN_NAMESPACE, sys.executable, "-m", "carrel.images.rootfs", source, tree, disk]
    try:
        answer = process.run(command, timeout_s=3600)
    except process.CommandError as error:
        if error.status == RefusedError.exit_code:
            raise RefusedError(error.stderr.strip()) from error
        raise
    return msgspec.json.decode(answer, type=rootfs.Root)


def _store(store: Store, staged: Path, root: rootfs.Root, *, name: str, told: str) -> Image:
    disk = staged / "root.img"
    disk.chmod(0o644)
    status = disk.stat()
    image = Image(
        hash=root.digest,
        name=name,
        created=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        source=told,
        distribution=root.distribution,
        size_bytes=status.st_size,
        disk_bytes=status.st_blocks * 512,
        packages=root.packages,
        shell=root.shell,
        disk_digest=disk_digest(disk),
    )
    return store.add(image, staged)


def _size_of(source: Path) -> int:
    if not source.is_dir():
        return source.stat().st_size
    return sum(path.lstat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())
