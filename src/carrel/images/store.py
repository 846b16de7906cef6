"""The image store: what guests are cloned from, named by content, tagged by people.

::

    <store>/images/<sha256>/root.img      raw, sparse ext4: the root disk, never written again
    <store>/images/<sha256>/image.json    what is known about it
    <store>/tags/<name>                   a line with the hash that the name stands for
    <store>/kernels/, initramfs/          see carrel.images.kernel

Everything appears by rename and is never changed afterwards, so readers need no lock. An image that is removed
stays with those who have it open, as every file on Linux does.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from carrel.errors import CarrelError, NotFoundError, RefusedError, UsageError
from carrel.images import files

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{6,64}")
_BLOCK_BYTES = 65536


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image, as ``image.json`` holds it."""

    hash: str
    """SHA-256 of what is in its root: paths, modes, owners, contents; not of times."""
    name: str
    """The name it was asked for by; empty: nobody tagged it."""
    created: str
    """RFC 3339, UTC."""
    source: str
    """``recipe debian12``, or the path that it was added from."""
    distribution: str = ""
    size_bytes: int = 0
    """Size of the disk, as the guest sees it."""
    disk_bytes: int = 0
    """What it takes in the store."""
    filesystem: str = "ext4"
    packages: tuple[str, ...] = ()
    """Each ``name=version``; empty where the distribution's package list is not known to us."""
    shell: bool = True
    """False: it has no ``/bin/sh``, so a job script cannot run in it."""
    kernel: str = ""
    """The kernel to boot it with; empty: the store's newest."""
    disk_digest: str = ""
    """``disk_digest`` of ``root.img``, for ``verify``."""


class Store:
    """The images below one directory. Needs no lock, and may be on a file system shared by all nodes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def root_disk(self, image: Image) -> Path:
        """Return the raw ext4 root disk; it is never written."""
        return self._home(image.hash) / "root.img"

    def resolve(self, name: str) -> Image:
        """Return the image of a name, of a hash, or of the only hash that begins with these 6 digits or more.

        Raises:
            NotFoundError: there is none; the sentence names those there are.
            UsageError: several hashes begin so.
        """
        if _NAME.fullmatch(name) and (image := self._tagged(name)):
            return image
        if _PREFIX.fullmatch(name):
            found = [path.name for path in (self.path / "images").glob(f"{name}*") if _HASH.fullmatch(path.name)]
            if len(found) > 1:
                raise UsageError(f"{name} begins {len(found)} hashes; give more digits of one of: {', '.join(found)}")
            if found and (image := self._read(found[0])):
                return image
        known = ", ".join(self.names())
        if known:
            raise NotFoundError(f"no image {name!r}; known: {known}; see: carrel image list")
        raise NotFoundError(f"no image {name!r}; {self.path} has none; see: carrel image build debian12")

    def names(self) -> list[str]:
        """Return all names, sorted."""
        tags = self.path / "tags"
        return sorted(path.name for path in tags.glob("*") if _NAME.fullmatch(path.name)) if tags.is_dir() else []

    def list(self) -> Sequence[Image]:
        """Return an image for each name, then those without one."""
        tagged = [image for name in self.names() if (image := self._tagged(name))]
        return [*tagged, *self.untagged()]

    def untagged(self) -> Sequence[Image]:
        """Return the images that no name stands for."""
        used = {image.hash for name in self.names() if (image := self._tagged(name))}
        homes = sorted(path.name for path in (self.path / "images").glob("*") if _HASH.fullmatch(path.name))
        return [image for digest in homes if digest not in used and (image := self._read(digest))]

    def tag(self, name: str, digest: str) -> None:
        """Let ``name`` stand for an image, and no longer for the one before."""
        files.write(self.path / "tags" / check_name(name), f"{digest}\n".encode())

    def add(self, image: Image, staged: Path) -> Image:
        """Move ``root.img`` from the directory ``staged`` of this store into its place, and tag it.

        Where the same content is there already, that one stays, and only the name is new.
        """
        image = msgspec.structs.replace(image, name=check_name(image.name))
        home = self._home(image.hash)
        if self._read(image.hash) is None:
            with files.new_directory(home) as new:
                files.sync(staged / "root.img")
                (staged / "root.img").rename(new / "root.img")
                (new / "root.img").chmod(0o644)
                files.write(new / "image.json", msgspec.json.format(msgspec.json.encode(image), indent=2) + b"\n")
        self.tag(image.name, image.hash)
        return self.resolve(image.name)

    def remove(self, name: str) -> Image:
        """Remove a name, and the image if no other name stands for it. Guests that run from it keep it.

        Raises:
            NotFoundError: there is no such image.
            RefusedError: it was named by its hash and has a name, or the store is not ours to write.
        """
        image = self.resolve(name)
        names = [other.name for other in self.list() if other.name and other.hash == image.hash]
        if names and not image.name:
            raise RefusedError(f"{name} is the image {', '.join(names)}; remove it by name")
        with files.as_sentence(self.path):
            if image.name:
                (self.path / "tags" / image.name).unlink(missing_ok=True)
            if names in ([], [image.name]):
                self._discard(image.hash)
        return image

    def prune(self) -> Sequence[Image]:
        """Remove the images that no name stands for, and return them; also what killed builds left a day ago."""
        unused = self.untagged()
        with files.as_sentence(self.path):
            for image in unused:
                self._discard(image.hash)
            for directory in ("images", "tags", "kernels", "initramfs"):
                files.sweep(self.path / directory)
        return unused

    def verify(self, name: str) -> Image:
        """Read the whole disk again.

        Raises:
            CarrelError: its bytes are not those that were stored.
        """
        image = self.resolve(name)
        found = disk_digest(self.root_disk(image))
        if found != image.disk_digest:
            raise CarrelError(
                f"image {name!r}: {self.root_disk(image)} has digest {found[:12]}, stored was "
                f"{image.disk_digest[:12]}; remove the image and build or add it again"
            )
        return image

    def _home(self, digest: str) -> Path:
        return self.path / "images" / digest

    def _tagged(self, name: str) -> Image | None:
        try:
            digest = (self.path / "tags" / name).read_text().strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RefusedError(
                f"{self.path / 'tags' / name}: {error.strerror}; is the store readable by you?"
            ) from error
        image = self._read(digest)
        return msgspec.structs.replace(image, name=name) if image else None

    def _read(self, digest: str) -> Image | None:
        """The name in ``image.json`` is the first it had; only a tag says what it is called now."""
        path = self._home(digest) / "image.json"
        try:
            image = msgspec.json.decode(path.read_bytes(), type=Image)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RefusedError(f"{path}: {error.strerror}; is the store readable by you?") from error
        except msgspec.DecodeError as error:
            raise CarrelError(f"{path}: {error}; remove the image and build or add it again") from error
        return msgspec.structs.replace(image, name="")

    def _discard(self, digest: str) -> None:
        """Out of sight by one rename first, so that nobody sees half an image."""
        gone = self.path / "images" / f".gone-{digest}"
        with contextlib.suppress(FileNotFoundError):
            self._home(digest).rename(gone)
        files.remove_tree(gone)


def check_name(name: str) -> str:
    """Return ``name`` if an image may be called so.

    Raises:
        UsageError: it is not a plain word, or looks like a hash.
    """
    if not _NAME.fullmatch(name) or _HASH.fullmatch(name):
        raise UsageError(
            f"image name {name!r}: use 1 to 64 letters, digits, '.', '_', '-', beginning with a letter or digit"
        )
    return name


def disk_digest(disk: Path) -> str:
    """Return a SHA-256 over the blocks of a disk that are not all zeros, each with its offset.

    A root disk is mostly holes; reading those would take a quarter of a minute instead of a second, and a copy
    that fills them in is the same disk.
    """
    digest = hashlib.sha256()
    size = disk.stat().st_size
    with disk.open("rb", buffering=0) as file:
        offset = 0
        while offset < size:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA) // _BLOCK_BYTES * _BLOCK_BYTES
            except OSError:  # ENXIO: nothing but a hole follows
                break
            block = os.pread(file.fileno(), _BLOCK_BYTES, offset)
            if block.strip(b"\0"):
                digest.update(offset.to_bytes(8, "little") + block)
            offset += _BLOCK_BYTES
    return digest.hexdigest()
