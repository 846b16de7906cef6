"""Files from strangers: what they are, by their own first bytes, and what is in an ext4 disk.

A disk image is parsed by an unprivileged process only, and one that could name another file on this host
(a qcow2 with a backing file) is not accepted at all.
"""

import os
import re
from pathlib import Path

from carrel import process
from carrel.errors import CarrelError, RefusedError
from carrel.images import rootfs
from carrel.images.store import disk_digest

_MAGIC = {
    b"\x1f\x8b": "tar",
    b"\xfd7zXZ": "tar",
    b"\x28\xb5\x2f\xfd": "tar",
    b"QFI\xfb": "a qcow2 disk",
    b"KDMV": "a VMDK disk",
    b"vhdx": "a VHDX disk",
    b"hsqs": "a squashfs",
    b"PK\x03\x04": "a zip archive",
}
_NOBODY = "65534"


def kind_of(path: Path) -> str:
    """Return ``tar``, ``ext4``, or words for what else it is."""
    with path.open("rb") as file:
        head = file.read(0x500)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "tar"
    if head[0x438:0x43A] == b"\x53\xef":
        return "ext4"
    return "a partitioned disk" if head[0x1FE:0x200] == b"\x55\xaa" else "a file of unknown kind"


def look_inside(disk: Path) -> rootfs.Root:
    """Return what an ext4 disk holds.

    Raises:
        RefusedError: it is no root file system, or cannot be read by other users, as guests must.
    """
    listing = _debugfs(disk, "ls -p /")
    names = set(re.findall(r"^/\d+/\d+/\d+/\d+/([^/]+)/", listing, re.MULTILINE))
    if not names & {"bin", "sbin", "usr"}:
        raise RefusedError(f"{disk.name}: not a root file system, it has neither bin, sbin nor usr at its top")
    os_release = _debugfs(disk, "cat /usr/lib/os-release") or _debugfs(disk, "cat /etc/os-release")
    return rootfs.Root(
        digest=disk_digest(disk),
        distribution=rootfs.distribution(os_release),
        packages=rootfs.dpkg_packages(_debugfs(disk, "cat /var/lib/dpkg/status")),
        shell="Inode:" in _debugfs(disk, "stat /bin/sh"),
        content_bytes=disk.stat().st_blocks * 512,
    )


def _debugfs(disk: Path, request: str) -> str:
    """Read from a disk as nobody: its structures may be made to break the program that reads them."""
    drop: list[str] = []
    if os.geteuid() == 0:
        drop = [
            "setpriv",
            "--reuid",
            _NOBODY,
            "--regid",
            _NOBODY,
            "--clear-groups",
            "--no-new-privs",
            "--inh-caps=-all",
        ]
    try:
        return process.run([*drop, "debugfs", "-R", request, disk])
    except CarrelError as error:
        raise RefusedError(f"{disk}: not readable as an ext4 disk by an ordinary user: {error}") from error
