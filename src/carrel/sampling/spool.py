"""Which segments the sinks have yet to take: a small file for each, in a directory of root's on the node's own disk.

The segment itself stays where it is, in its user's directory. At the job's end, when it has become tables, it is not
removed but hidden (``kept``) for as long as a sink is not through with it; only who ships removes it then.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from carrel.model.job import Job
from carrel.model.sample import View
from carrel.model.shipping import SpoolEntry
from carrel.sampling.folder import JobFolder, component, stem

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_GONE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO}


def live(stem: str) -> str:
    """Return what a segment is called while it grows, and until it has become tables."""
    return f"{stem}.seg"


def kept(stem: str) -> str:
    """Return what it is called from then on, until all sinks are through: no reader of samples looks for that."""
    return f".{stem}.seg"


class Spool:
    """The list of one node. The sampler adds to it, who ships removes from it."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``, the node's; it is made when there is something to put into it."""
        self.directory = directory
        self._entries = directory / "entries"
        self._known: dict[str, tuple[int, SpoolEntry]] = {}

    def enlist(self, job: Job, folder: JobFolder, *, node: str, view: View, since_us: int) -> None:
        """Have the sinks take a segment that exists. A second call keeps what is better known of the job now.

        Raises:
            OSError: it cannot be written.
        """
        name = _name(job, stem(node, view))
        known = self._read(self._entries / name)
        entry = SpoolEntry(
            job=msgspec.structs.replace(job, uid=folder.uid, gid=folder.gid),
            node=node,
            view=view,
            directory="/".join(folder.path.parts[-2:]),
            stem=stem(node, view),
            since_us=known.since_us if known else since_us,
        )
        if known != entry:
            self._entries.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace(self._entries / name, msgspec.json.encode(entry))

    def holds(self, folder: JobFolder, stem: str) -> bool:
        """Say whether a segment is to be kept when it has become tables."""
        directory = "/".join(folder.path.parts[-2:])
        return any((one.directory, one.stem) == (directory, stem) for one in self.entries().values())

    def entries(self) -> dict[str, SpoolEntry]:
        """Return all entries by name, the oldest first. What cannot be read is left out, and stays."""
        found: dict[str, tuple[int, SpoolEntry]] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._entries) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    changed_ns = file.stat().st_mtime_ns
                    before = self._known.get(file.name)
                    if before and before[0] == changed_ns:
                        found[file.name] = before
                    elif not file.name.startswith(".") and (entry := self._read(Path(file.path))):
                        found[file.name] = changed_ns, entry
        self._known = found
        return {name: one for name, (_, one) in sorted(found.items(), key=lambda item: item[1][1].since_us)}

    @staticmethod
    def _read(path: Path) -> SpoolEntry | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=SpoolEntry)
        except (OSError, msgspec.MsgspecError):
            return None

    def remove(self, name: str, root: Path) -> None:
        """Forget a segment that all sinks are through with, and remove it where it was only kept for them.

        Killed in between, the next call finds all it needs; a second one changes nothing.

        Raises:
            OSError: it cannot be removed now.
        """
        entry = self._read(self._entries / name)
        if entry is not None:
            with contextlib.suppress(FileNotFoundError), _opened(root, entry) as directory:
                os.unlink(kept(entry.stem), dir_fd=directory)
        (self._entries / name).unlink(missing_ok=True)


def open_segment(root: Path, entry: SpoolEntry) -> tuple[BinaryIO, bool]:
    """Return the open segment, and whether nothing will be added to it.

    The directory is its user's, who may put anything there: what is opened is a plain file of theirs, or nothing.

    Raises:
        FileNotFoundError: its owner has moved it away.
        OSError: it cannot be told.
    """
    with _opened(root, entry) as directory:
        for name, final in ((live(entry.stem), False), (kept(entry.stem), True)):
            try:
                descriptor = os.open(name, _FILE, dir_fd=directory)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_uid == entry.job.uid:
                return os.fdopen(descriptor, "rb"), final
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "no segment", f"{entry.directory}/{entry.stem}")


def is_live(root: Path, entry: SpoolEntry) -> bool:
    """Say whether more may be added to a segment; yes where that cannot be told."""
    try:
        with _opened(root, entry) as directory:
            os.stat(live(entry.stem), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def replace(path: Path, data: bytes) -> None:
    """Write a file whole: after a kill or a power cut it has the old contents or the new.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _name(job: Job, stem: str) -> str:
    return f"{component(job.key.cluster)}.{job.key}.{stem}"


@contextlib.contextmanager
def _opened(root: Path, entry: SpoolEntry) -> Iterator[int]:
    """Give a descriptor of the job's directory, reached through no link.

    Raises:
        FileNotFoundError: its owner has removed it, or put something else in its place.
        OSError: it cannot be told. No user can remove the directory above: without it, the root is not mounted.
    """
    user, job = entry.directory.split("/")
    try:
        users = os.open(root / user, _DIRECTORY)
    except FileNotFoundError as error:
        raise OSError(errno.ESTALE, f"{root / user} is missing; is {root} mounted?") from error
    try:
        directory = os.open(job, _DIRECTORY, dir_fd=users)
    except OSError as error:
        if error.errno in _GONE:
            raise FileNotFoundError(errno.ENOENT, "no directory", str(root / entry.directory)) from error
        raise
    finally:
        os.close(users)
    try:
        yield directory
    finally:
        os.close(directory)
