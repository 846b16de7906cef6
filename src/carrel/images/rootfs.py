"""A tree of files becomes a root disk: what is in it, its digest, and the ext4 file system that holds it.

Runs as root, or as "root" of a user namespace, where an ordinary user may own files of many users; then it is
started as ``python -m carrel.images.rootfs``. Nothing here follows a symbolic link out of the tree: the tree may
come from a stranger.
"""

import hashlib
import os
import re
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from carrel import process
from carrel.errors import CarrelError, RefusedError

GIB = 2**30
MINIMUM_BYTES = 2 * GIB
"""Size of an ordinary root disk: sparse, so that what is free costs nothing."""

_LEFT_OUT = ("dev", "proc", "sys", "run", "tmp")
"""Filled anew in every guest; what a source has in them is its own machine's."""

_MAX_LINKS = 40  # as the kernel


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """What a root disk holds."""

    digest: str
    distribution: str
    packages: tuple[str, ...]
    shell: bool
    content_bytes: int


def pack(source: Path, *, tree: Path, disk: Path) -> Root:
    """Unpack ``source``, a directory or a tar, below ``tree`` and make ``disk`` of it.

    Raises:
        RefusedError: it is not a root file system.
        CarrelError: it cannot be unpacked, or does not fit.
    """
    _unpack(source, tree)
    _require_root(tree, source)
    for name in _LEFT_OUT:
        if not (tree / name).is_symlink():
            (tree / name).mkdir(exist_ok=True)
            (tree / name).chmod(0o1777 if name == "tmp" else 0o755)
    tree.chmod(0o755)
    digest, content_bytes, count = survey(tree)
    _make_ext4(tree, disk, digest=digest, content_bytes=content_bytes, count=count)
    return Root(
        digest=digest,
        distribution=distribution(read_inside(tree, "etc/os-release")),
        packages=dpkg_packages(read_inside(tree, "var/lib/dpkg/status")),
        shell=_has_shell(tree),
        content_bytes=content_bytes,
    )


def _unpack(source: Path, tree: Path) -> None:
    tree.mkdir()
    left_out = ["--anchored", *(f"--exclude={prefix}{name}/*" for name in _LEFT_OUT for prefix in ("", "./"))]
    unpack: list[str | Path] = ["tar", "-C", tree, "--numeric-owner", "-p", *left_out, "-xf"]
    if not source.is_dir():
        process.run([*unpack, source], timeout_s=1800)
        return
    packed = tree.with_name("source.tar")
    process.run(["tar", "-C", source, "--one-file-system", *left_out, "-cf", packed, "."], timeout_s=1800)
    process.run([*unpack, packed], timeout_s=1800)
    packed.unlink()


def _require_root(tree: Path, source: Path) -> None:
    if any((tree / name).exists() for name in ("oci-layout", "manifest.json")):
        raise RefusedError(
            f"{source}: an archive of container layers; add the export of a container, a tar of its root"
        )
    if not any((tree / name).is_dir() for name in ("bin", "sbin", "usr")):
        raise RefusedError(f"{source}: not a root file system, it has neither bin, sbin nor usr at its top")


def survey(tree: Path) -> tuple[str, int, int]:
    """Return the digest of all below ``tree``, the bytes they need in blocks, and how many there are.

    Modes, owners and contents count; times do not, so the same packages give the same digest on another day.
    """
    digest = hashlib.sha256()
    content_bytes = count = 0
    for path, name in _walk(tree, ""):
        status = path.lstat()
        about = f"{status.st_mode:o} {status.st_uid} {status.st_gid} {status.st_rdev}"
        digest.update(os.fsencode(name) + b"\0" + about.encode() + b"\0")
        if stat.S_ISLNK(status.st_mode):
            digest.update(os.fsencode(path.readlink()))
        elif stat.S_ISREG(status.st_mode):
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            content_bytes += -(-status.st_size // 4096) * 4096
        digest.update(b"\0")
        count += 1
    return digest.hexdigest(), content_bytes, count


def _walk(directory: Path, prefix: str) -> Iterator[tuple[Path, str]]:
    for name in sorted(os.listdir(directory)):  # noqa: PTH208  # names, without a Path for each
        path = directory / name
        yield path, prefix + name
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, f"{prefix}{name}/")


def _make_ext4(tree: Path, disk: Path, *, digest: str, content_bytes: int, count: int) -> None:
    """No journal: a disk that is never written needs none, and its overlay dies with the job."""
    seed = uuid.UUID(digest[:32])
    size = max(MINIMUM_BYTES, -(-(content_bytes * 3 // 2 + GIB) // GIB) * GIB)
    inodes = max(size // 16384, count * 2)
    options = f"lazy_itable_init=1,nodiscard,hash_seed={seed}"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-N", str(inodes)]
    process.run([*command, "-E", options, "-U", str(seed), "-d", tree, disk, f"{size // 1024}k"], timeout_s=1800)


def inside(tree: Path, path: str) -> Path | None:
    """Return where ``path`` leads when ``tree`` is the root directory; None: nowhere."""
    at: list[str] = []
    rest = [part for part in reversed(path.split("/")) if part not in {"", "."}]
    for _ in range(1000):
        if not rest:
            return tree.joinpath(*at)
        part = rest.pop()
        if part == "..":
            at = at[:-1]
            continue
        here = tree.joinpath(*at, part)
        if here.is_symlink():
            target = str(here.readlink())
            at = [] if target.startswith("/") else at
            rest += [piece for piece in reversed(target.split("/")) if piece not in {"", "."}]
        elif here.exists():
            at.append(part)
        else:
            return None
    return None


def read_inside(tree: Path, path: str) -> str:
    """Return the text of a file of the tree; empty where there is none."""
    found = inside(tree, path)
    return found.read_text(errors="replace") if found and found.is_file() else ""


def _has_shell(tree: Path) -> bool:
    found = inside(tree, "bin/sh")
    return found is not None and found.is_file() and bool(found.stat().st_mode & 0o111)


def distribution(os_release: str) -> str:
    r"""Return how a distribution calls itself.

    >>> distribution('ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    'Debian GNU/Linux 12 (bookworm)'
    """
    for key in ("PRETTY_NAME", "NAME", "ID"):
        if found := re.search(rf"^{key}=[\"']?([^\"'\n]*)", os_release, re.MULTILINE):
            return found[1].strip()
    return ""


def dpkg_packages(status: str) -> tuple[str, ...]:
    r"""Return ``name=version`` of each installed package in dpkg's status file.

    >>> dpkg_packages("Package: dash\nStatus: install ok installed\nVersion: 0.5\n\nPackage: x\n")
    ('dash=0.5',)
    """
    found = []
    for paragraph in status.split("\n\n"):
        field = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Z][^ ]*: ", line))
        if field.get("Status", "").endswith(" installed") and "Version" in field:
            found.append(f"{field['Package']}={field['Version']}")
    return tuple(sorted(found))


def main() -> None:
    """Do ``pack`` in the user namespace that this was started in; the answer is JSON on standard output."""
    source, tree, disk = (Path(word) for word in sys.argv[1:4])
    try:
        root = pack(source, tree=tree, disk=disk)
    except CarrelError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    sys.stdout.buffer.write(msgspec.json.encode(root))


if __name__ == "__main__":
    main()
