"""The guests' kernel: Debian's standard one, unpacked for a direct boot, with the few modules a guest needs.

The *standard* kernel, not the cloud one, which has no 9p. ``vmlinux`` instead of ``bzImage``: QEMU enters it by its
PVH note, which saves firmware and decompression. See ``docs/how-to/images.md``.
"""

import hashlib
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from carrel import process
from carrel.errors import CarrelError
from carrel.images import apt, files
from carrel.images.initramfs import ensure_initramfs

Progress = Callable[[str], None]
"""Told the name of each phase as it begins."""

RECIPE = 2
"""Counts changes of what is taken from the package; part of the name of every stored kernel."""

MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_mem",
    "crc32c_generic",  # what ext4 asks for by name when it is mounted; no modprobe answers in a guest
    "ext4",
    "overlay",
    "9pnet_virtio",
    "9p",
)
"""Wanted in a guest, in the order in which they are loaded, each after what it depends on."""

META_PACKAGE = "linux-image-amd64"
NEEDED_BYTES = 700 * 2**20  # the package, what it unpacks to, and the 90 MiB that stay


class GuestKernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that is ready to boot."""

    version: str
    """As ``uname -r`` says it in the guest."""
    vmlinux: Path
    """Uncompressed ELF, for ``-kernel``."""
    bzimage: Path
    """The same kernel as distributed, for a hypervisor that cannot enter by PVH."""
    initramfs: Path
    id: str
    """Changes whenever kernel, modules or agent do: what a snapshot of a booted guest depends on."""


def ensure_kernel(store: Path, *, agent: Path, progress: Progress, refresh: bool = False) -> GuestKernel:
    """Return the newest kernel of the store, with the initramfs of this agent; make what is absent.

    A kernel that is there is taken without asking the network. Two processes may do this at once.

    Args:
        store: The image store.
        agent: ``carrel-agent``; another agent gives another initramfs.
        progress: Told each phase.
        refresh: Ask apt for a newer kernel even where one is there.

    Raises:
        CarrelError: the package cannot be had, or is not what it should be.
        RefusedError: the store is not writable, or full.
    """
    home = unpack_kernel(store, progress=progress, refresh=refresh)
    order = (home / "order").read_text().split()
    modules = [home / "modules" / name for name in order]
    initramfs = ensure_initramfs(store, kernel=home.name, modules=modules, agent=agent)
    digest = hashlib.sha256(f"{home.name} {initramfs.stem}".encode()).hexdigest()
    return GuestKernel(
        version=(home / "version").read_text().strip(),
        vmlinux=home / "vmlinux",
        bzimage=home / "bzimage",
        initramfs=initramfs,
        id=digest,
    )


def unpack_kernel(store: Path, *, progress: Progress, refresh: bool = False) -> Path:
    """Return the directory of the store's newest kernel; fetch it first if there is none. See ``ensure_kernel``."""
    found = kernels(store)
    return found[-1] if found and not refresh else _fetch(store, progress)


def prune_kernels(store: Path) -> list[Path]:
    """Remove all but the newest kernel and initramfs, and return what was removed.

    Guests that run have theirs in memory, and an initramfs that is missed is made again in less than a second.
    """
    of_kernels = [path for path in (store / "kernels").glob("[!.]*") if path not in kernels(store)[-1:]]
    archives = sorted((store / "initramfs").glob("*.cpio"), key=lambda path: path.stat().st_mtime)
    with files.as_sentence(store):
        for path in of_kernels:
            files.remove_tree(path)
        for path in archives[:-1]:
            path.unlink(missing_ok=True)
    return [*of_kernels, *archives[:-1]]


def kernels(store: Path) -> list[Path]:
    """Return the stored kernels of this recipe, oldest version first."""
    found = [path for path in (store / "kernels").glob(f"*.r{RECIPE}") if (path / "vmlinux").exists()]
    return sorted(found, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])


def _fetch(store: Path, progress: Progress) -> Path:
    files.require_space(store, NEEDED_BYTES, what="a kernel")
    with tempfile.TemporaryDirectory(prefix="carrel-kernel-") as temporary:
        scratch = Path(temporary)
        progress("asking apt for the kernel")
        package = apt.package_of(META_PACKAGE)
        home = store / "kernels" / f"{package.removeprefix('linux-image-').replace('=', '_')}.r{RECIPE}"
        if (home / "vmlinux").exists():
            return home
        progress("downloading the kernel")
        process.run(["apt-get", "-q", "download", package], cwd=scratch, timeout_s=900)
        progress("unpacking the kernel")
        deb = next(scratch.glob("*.deb"))
        process.run(["dpkg-deb", "-x", deb, scratch / "root"], timeout_s=300)
        with files.new_directory(home) as new:
            _lay_out(scratch / "root", new)
    return home


def _lay_out(root: Path, home: Path) -> None:
    bzimage = next((root / "boot").glob("vmlinuz-*"))
    version = bzimage.name.removeprefix("vmlinuz-")
    shutil.copyfile(bzimage, home / "bzimage")
    extract_vmlinux(home / "bzimage", home / "vmlinux")
    tree = next(path for path in (root / "lib/modules", root / "usr/lib/modules") if path.is_dir()) / version
    order = load_order(tree, MODULES)
    (home / "modules").mkdir()
    for module in order:
        shutil.copyfile(module, home / "modules" / module.name)
        process.run(["strip", "-g", home / "modules" / module.name])
    (home / "order").write_text("".join(f"{module.name}\n" for module in order))
    (home / "version").write_text(f"{version}\n")


def extract_vmlinux(bzimage: Path, vmlinux: Path) -> None:
    """Decompress the kernel that is inside a ``bzImage`` (Documentation/x86/boot.rst of Linux: the setup header).

    Raises:
        CarrelError: it is not a bzImage, or compressed in a way not known here.
    """
    image = bzimage.read_bytes()
    if image[0x202:0x206] != b"HdrS":
        raise CarrelError(f"{bzimage}: not a Linux kernel image (no HdrS at 0x202)")
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length - 4]  # the last four bytes are the size when decompressed
    size = int.from_bytes(image[start + length - 4 : start + length], "little")
    kernel = _decompress(payload, bzimage)
    if len(kernel) != size or not kernel.startswith(b"\x7fELF"):
        raise CarrelError(f"{bzimage}: unpacked to {len(kernel)} bytes, its header says {size} bytes of ELF")
    vmlinux.write_bytes(kernel)


def _decompress(payload: bytes, source: Path) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.decompress(payload)
    for magic, command in {b"\x02\x21\x4c\x18": ["lz4", "-qdf"], b"\x28\xb5\x2f\xfd": ["zstd", "-qdfo"]}.items():
        if payload.startswith(magic):
            return _decompress_by(command, payload)
    raise CarrelError(f"{source}: compressed in an unknown way (starts with {payload[:4].hex()}); known: xz, lz4, zstd")


def _decompress_by(command: Sequence[str], payload: bytes) -> bytes:
    with tempfile.TemporaryDirectory(prefix="carrel-kernel-") as temporary:
        packed, plain = Path(temporary, "packed"), Path(temporary, "plain")
        packed.write_bytes(payload)
        paths = [plain, packed] if command[-1].endswith("o") else [packed, plain]
        process.run([*command, *paths])
        return plain.read_bytes()


def load_order(tree: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the module files below ``tree`` that ``wanted`` needs, each after all that it depends on.

    The modules themselves say what they depend on, so a kernel that moves a function from one module to another
    (as ``virtio`` came to need ``virtio_ring``) needs no change here. A module that is built in is left out.

    Raises:
        CarrelError: a module is neither there nor built in, or modules depend on each other in a circle.
    """
    by_name = {_module_name(path.name): path for path in tree.rglob("*.ko")}
    listing = tree / "modules.builtin"
    built_in = {_module_name(line) for line in listing.read_text().split()} if listing.exists() else set()
    order: list[Path] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise CarrelError(f"{tree}: modules depend on each other in a circle: {' '.join((*above, name))}")
        if name not in by_name:
            if name in built_in:
                return
            needed_by = f" (needed by {above[-1]})" if above else ""
            raise CarrelError(f"{tree}: no module {name}{needed_by}; is this Debian's standard kernel?")
        for dependency in module_depends(by_name[name].read_bytes()):
            visit(_module_name(dependency), (*above, name))
        if by_name[name] not in order:
            order.append(by_name[name])

    for name in wanted:
        visit(_module_name(name), ())
    return order


def module_depends(module: bytes) -> list[str]:
    r"""Return what a module file says it depends on.

    >>> module_depends(b"license=GPL\0depends=virtio,virtio_ring\0intree=Y\0")
    ['virtio', 'virtio_ring']
    """
    found = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    return [name.decode() for name in found[1].split(b",") if name] if found else []


def _module_name(path: str) -> str:
    """The kernel treats ``-`` and ``_`` in a module's name as one; files are named with either."""
    return path.rsplit("/", 1)[-1].removesuffix(".ko").replace("-", "_")
