"""The initramfs: ``carrel-agent`` as the first process of a guest, and the modules it loads, packed reproducibly.

Written here instead of by ``cpio``, so that the same agent and kernel give the same bytes, and so that a rebuilt
agent costs a fraction of a second and no root.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from carrel.errors import CarrelError
from carrel.images import files

RECIPE = 1
"""Counts changes of the layout below; part of the name of every initramfs."""

_DIRECTORIES = ("dev", "modules", "proc", "root", "run", "sys", "tmp")
_S_IFDIR = 0o040000
_S_IFREG = 0o100000
_ELF_X86_64 = b"\x7fELF\x02\x01"
_PT_INTERP = 3


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory of an archive; a directory has no data."""

    path: str
    mode: int
    data: bytes = b""


def cpio(entries: Iterable[Entry]) -> bytes:
    """Pack ``entries`` in the given order as a *newc* archive: owner root, no times.

    >>> cpio([Entry(path="init", mode=0o100755, data=b"x")])[:6]
    b'070701'
    """
    packed = bytearray()
    for number, entry in enumerate([*entries, Entry(path="TRAILER!!!", mode=0)], start=1):
        name = entry.path.encode() + b"\0"
        links = 2 if entry.mode & _S_IFDIR and not entry.mode & _S_IFREG else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        packed += bytes(-len(packed) % 4)
        packed += entry.data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


def ensure_initramfs(store: Path, *, kernel: str, modules: Sequence[Path], agent: Path) -> Path:
    """Return the initramfs of this kernel and this agent; make it first if it is absent.

    Args:
        store: The image store.
        kernel: Name of the kernel that the modules belong to.
        modules: Module files in load order.
        agent: ``carrel-agent``, statically linked.

    Raises:
        CarrelError: the agent is missing or is not a static program, or the store cannot be written.
    """
    program = _static_program(agent)
    digest = hashlib.sha256(f"{RECIPE} {kernel}\n".encode())
    for module in modules:
        digest.update(f"{module.name}\n".encode())
    digest.update(program)
    path = store / "initramfs" / f"{digest.hexdigest()}.cpio"
    if not path.exists():
        files.write(path, cpio(_entries(program, modules)))
    return path


def _entries(program: bytes, modules: Sequence[Path]) -> list[Entry]:
    order = "".join(f"{module.name}\n" for module in modules)
    return [
        *(Entry(path=name, mode=_S_IFDIR | 0o755) for name in _DIRECTORIES),
        Entry(path="init", mode=_S_IFREG | 0o755, data=program),
        Entry(path="modules/order", mode=_S_IFREG | 0o644, data=order.encode()),
        *(Entry(path=f"modules/{module.name}", mode=_S_IFREG | 0o644, data=module.read_bytes()) for module in modules),
    ]


def _static_program(agent: Path) -> bytes:
    """A dynamically linked first process would panic the guest's kernel with an error that names neither."""
    try:
        program = agent.read_bytes()
    except OSError as error:
        raise CarrelError(f"{agent}: {error.strerror}; was it built? see: make native") from error
    if not program.startswith(_ELF_X86_64):
        raise CarrelError(f"{agent}: not a 64-bit ELF program; see: make native")
    offset = int.from_bytes(program[32:40], "little")
    size, count = (int.from_bytes(program[at : at + 2], "little") for at in (54, 56))
    kinds = (int.from_bytes(program[at : at + 4], "little") for at in range(offset, offset + size * count, size or 1))
    if _PT_INTERP in kinds:
        raise CarrelError(f"{agent}: linked dynamically, a guest's first process must be static; see: make native")
    return program
