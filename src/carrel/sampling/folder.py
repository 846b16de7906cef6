"""Where a job's samples are: ``<root>/<user>/<job>/``, the user's own, and made by root.

The user may do anything in there at any moment, so no path is walked twice: each component is opened below the one
before it, no symbolic link is followed, and what was opened must be a directory of that user. All names come from
elsewhere (users, nodes, job ids); ``component`` is the only way for one to become a part of a path.
"""

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from typing import Self
from urllib.parse import unquote

from carrel.errors import CarrelError
from carrel.model.job import JobKey
from carrel.model.sample import View

MODE = 0o2750
"""What its owner puts there is for the same group: the tables are made as the user, who is not in it."""
FILE_MODE = 0o640
RUN_FILE = ".run"
"""Holds the run whose directory this is: job ids come back."""
_COMPONENT_MAX = 200
_PLAIN = re.compile(rb"[A-Za-z0-9_.@+-]")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def component(text: str) -> str:
    """Return a name as a part of a path: other than letters, digits and ``_.@+-``, its bytes become ``%XX``.

    Two names never become the same one. A leading dot or dash is escaped too.

    Raises:
        CarrelError: it is empty or too long.

    >>> component("userA"), component("../etc"), component("R&D/é")
    ('userA', '%2E.%2Fetc', 'R%26D%2F%C3%A9')
    """
    raw = text.encode(errors="surrogateescape")
    escaped = "".join(
        chr(byte) if _PLAIN.match(bytes([byte])) and not (at == 0 and byte in b".-") else f"%{byte:02X}"
        for at, byte in enumerate(raw)
    )
    if not 0 < len(escaped) <= _COMPONENT_MAX:
        raise CarrelError(f"{text[:40]!r} cannot name a directory: it has {len(escaped)} letters (at most 200)")
    return escaped


def stem(node: str, view: View) -> str:
    """Return what the files of one node and view are called, less their ends: ``samples.c1``, ``samples.c1.guest``."""
    return f"samples.{component(node).replace('.', '%2E')}" + ("" if view == "host" else f".{view}")


def of_stem(name: str) -> tuple[str, View]:
    """Return whose the files are that ``stem`` named so, whatever they end in.

    >>> of_stem(stem("c1.example", "guest") + ".csv.zst"), of_stem("samples.c1.seg")
    (('c1.example', 'guest'), ('c1', 'host'))
    """
    _, node, *rest = name.split(".")
    return unquote(node, errors="surrogateescape"), "guest" if "guest" in rest[:1] else "host"


class JobFolder:
    """An open directory of one run. It stays the same one whatever happens to its name."""

    def __init__(self, descriptor: int, path: Path, *, uid: int, gid: int) -> None:
        """Take over an open directory."""
        self.descriptor = descriptor
        self.path = path
        """Where it was when it was opened, for people."""
        self.uid = uid
        self.gid = gid

    @classmethod
    def make(cls, root: Path, run: JobKey, *, user: str, uid: int, gid: int) -> Self:
        """Return the directory of a run, made if need be; a second call, also on another node, returns the same one.

        It is called after the job id, or after the whole run where an earlier run has that name.

        Raises:
            CarrelError: what is there is not the user's own directory.
            OSError: the root cannot be written.
        """
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        owner = (uid, gid)
        path = root / component(user)
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            users = _users(top, path.name, path, owner)
            try:
                for job in (str(run.job_id), str(run)):
                    _make(top, users, job, owner, run)
                    descriptor = _opened(users, job, path / job, uid=uid)
                    if _run_of(descriptor) == _named(run):
                        return cls(descriptor, path / job, uid=uid, gid=os.fstat(descriptor).st_gid)
                    os.close(descriptor)
            finally:
                os.close(users)
        finally:
            os.close(top)
        raise CarrelError(f"{path / str(run)}: is of another run than {run}; was it renamed by its owner?")

    @classmethod
    def found(cls, root: Path, path: Path) -> Self:
        """Return a directory that ``make`` made once, below ``root``; whose it is, the file system says.

        Raises:
            OSError: it is gone, or a link.
        """
        users = os.open(root / path.parent.name, _DIRECTORY)
        try:
            descriptor = os.open(path.name, _DIRECTORY, dir_fd=users)
        finally:
            os.close(users)
        about = os.fstat(descriptor)
        return cls(descriptor, path, uid=about.st_uid, gid=about.st_gid)

    def create(self, name: str) -> int:
        """Return a new or existing file of the user's, open to be read and appended to.

        Raises:
            CarrelError: something else has the name.
            OSError: it cannot be made.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.descriptor)
        except FileExistsError:
            return self._existing(name, flags)
        os.fchmod(descriptor, FILE_MODE)
        os.fchown(descriptor, self.uid, self.gid)
        os.fsync(self.descriptor)  # its name must outlive a power cut as its contents do
        return descriptor

    def _existing(self, name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except OSError as error:
            raise CarrelError(f"{self.path / name}: {error.strerror}; it must be a plain file") from error
        found = os.fstat(descriptor)
        # A second name of a file is how a user would have root write to one that is not theirs.
        if not stat.S_ISREG(found.st_mode) or found.st_uid != self.uid or found.st_nlink != 1:
            os.close(descriptor)
            raise CarrelError(f"{self.path / name}: not a file of uid {self.uid} with one name; remove it")
        return descriptor

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole: it has the old contents or the new, also after a power cut.

        Raises:
            CarrelError: something that is no file has the temporary name.
            OSError: it cannot be written.
        """
        # Its owner may have put anything under the temporary name.
        temporary = f".{name}.{os.getpid()}"
        try:
            os.unlink(temporary, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CarrelError(f"{self.path / temporary}: {error.strerror}; remove it") from error
        descriptor = self.create(temporary)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def _named(run: JobKey) -> str:
    return f"{run.cluster}.{run}"


def _opened(parent: int, name: str, path: Path, *, uid: int) -> int:
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise CarrelError(f"{path}: not a directory, or a symbolic link; remove it") from error
        raise
    owner = os.fstat(descriptor).st_uid
    if owner != uid:
        os.close(descriptor)
        raise CarrelError(f"{path}: belongs to uid {owner}, not to {uid}; remove or chown it")
    return descriptor


def _users(top: int, name: str, path: Path, owner: tuple[int, int]) -> int:
    """Return the user's directory, made if need be. Only root can put anything into the one above it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=top)
    descriptor = os.open(name, _DIRECTORY, dir_fd=top)
    found = os.fstat(descriptor).st_uid
    if found == os.geteuid():
        # Made just now, by us or by another node that has not yet come to this line.
        os.fchmod(descriptor, MODE)
        os.fchown(descriptor, *owner)
    elif found != owner[0]:
        os.close(descriptor)
        raise CarrelError(f"{path}: belongs to uid {found}, not to {owner[0]}; remove or chown it")
    return descriptor


def _make(top: int, parent: int, name: str, owner: tuple[int, int], run: JobKey) -> None:
    """Make a directory that is the user's and says whose run it is from its first moment; one that is there stays.

    It is made in the root, where nobody else can touch it, and renamed to its place: onto an absent or an empty
    directory only, so of two nodes the first one wins, and wins whole.
    """
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        return
    temporary = f".new.{os.urandom(8).hex()}"
    os.mkdir(temporary, 0o700, dir_fd=top)
    made = os.open(temporary, _DIRECTORY, dir_fd=top)
    try:
        _mark(made, run, owner)
        os.fchmod(made, MODE)
        os.fchown(made, *owner)
        try:
            os.rename(temporary, name, src_dir_fd=top, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            os.unlink(RUN_FILE, dir_fd=made)
            os.rmdir(temporary, dir_fd=top)
    finally:
        os.close(made)


def _mark(directory: int, run: JobKey, owner: tuple[int, int]) -> None:
    marker = os.open(RUN_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o440, dir_fd=directory)
    try:
        os.write(marker, _named(run).encode(errors="surrogateescape"))
        os.fchown(marker, *owner)
        os.fsync(marker)
    finally:
        os.close(marker)


def _run_of(descriptor: int) -> str:
    try:
        marker = os.open(RUN_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError:
        return ""
    try:
        return os.read(marker, 4096).decode(errors="surrogateescape")
    except OSError:
        return ""
    finally:
        os.close(marker)
