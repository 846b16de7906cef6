"""What a driver needs of an image and of the guests' kernel: files, and what is known of them."""

from pathlib import Path

import msgspec


class ImageFiles(msgspec.Struct, frozen=True, kw_only=True):
    """One image, ready to be cloned."""

    hash: str
    name: str
    root: Path
    """The root file system: a raw disk, never written."""
    filesystem: str = "ext4"
    has_shell: bool = True


class KernelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel that guests boot, with the initramfs that holds ``carrel-agent``."""

    version: str
    kernel: Path
    initramfs: Path
    id: str
    """Changes whenever kernel, modules or agent do."""
