import lzma
import struct
import subprocess
from pathlib import Path

import pytest

from carrel.errors import CarrelError
from carrel.images import kernel
from carrel.images.initramfs import Entry, cpio, ensure_initramfs

_SEGMENT_LOAD = 1
_SEGMENT_INTERPRETER = 3


def _program(*segments: int) -> bytes:
    """The header of a 64-bit ELF program, and its program headers."""
    head = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return head + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in segments)


def _bzimage(payload: bytes, size: int) -> bytes:
    setup_sectors, offset = 3, 64
    image = bytearray((setup_sectors + 1) * 512 + offset)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    image[0x248:0x250] = struct.pack("<II", offset, len(payload) + 4)
    return bytes(image) + payload + struct.pack("<I", size) + b"what follows is not the kernel's"


def _modules(tree: Path, depends: dict[str, str], built_in: str = "") -> Path:
    tree.mkdir()
    for name, others in depends.items():
        (tree / f"{name}.ko").write_bytes(f"\x7fELF\0license=GPL\0depends={others}\0name=x\0".encode())
    (tree / "modules.builtin").write_text(built_in)
    return tree


def _names(order: list[Path]) -> list[str]:
    return [path.stem for path in order]


def test_a_module_comes_after_all_that_it_depends_on(tmp_path: Path) -> None:
    depends = {"virtio_pci": "virtio,virtio_ring", "virtio": "virtio_ring", "virtio_ring": "", "unwanted": ""}
    order = kernel.load_order(_modules(tmp_path / "m", depends), ["virtio_pci"])
    assert _names(order) == ["virtio_ring", "virtio", "virtio_pci"]


def test_a_module_that_two_others_need_is_loaded_once(tmp_path: Path) -> None:
    tree = _modules(tmp_path / "m", {"a": "c", "b": "c", "c": ""})
    assert _names(kernel.load_order(tree, ["a", "b"])) == ["c", "a", "b"]


def test_dash_and_underscore_name_the_same_module(tmp_path: Path) -> None:
    tree = _modules(tmp_path / "m", {"virtio-rng": "rng_core", "rng-core": ""})
    assert _names(kernel.load_order(tree, ["virtio_rng"])) == ["rng-core", "virtio-rng"]


def test_a_module_that_is_built_in_is_left_out(tmp_path: Path) -> None:
    tree = _modules(tmp_path / "m", {"ext4": "crc16"}, built_in="kernel/lib/crc16.ko\n")
    assert _names(kernel.load_order(tree, ["ext4"])) == ["ext4"]


def test_a_missing_module_is_named_with_the_one_that_needs_it(tmp_path: Path) -> None:
    tree = _modules(tmp_path / "m", {"9p": "9pnet"})
    with pytest.raises(CarrelError, match=r"no module 9pnet \(needed by 9p\)"):
        kernel.load_order(tree, ["9p"])


def test_modules_in_a_circle_are_an_error_and_not_a_hang(tmp_path: Path) -> None:
    tree = _modules(tmp_path / "m", {"a": "b", "b": "a"})
    with pytest.raises(CarrelError, match="in a circle: a b a"):
        kernel.load_order(tree, ["a"])


def test_a_kernel_compressed_with_xz_is_unpacked(tmp_path: Path) -> None:
    plain = b"\x7fELF" + bytes(5000)
    (tmp_path / "bz").write_bytes(_bzimage(lzma.compress(plain), len(plain)))
    kernel.extract_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == plain


@pytest.mark.parametrize("command", [["lz4", "-lqc"], ["zstd", "-qc"]], ids=["lz4", "zstd"])
def test_a_kernel_compressed_otherwise_is_unpacked_too(tmp_path: Path, command: list[str]) -> None:
    plain = b"\x7fELF" + bytes(range(256)) * 40
    packed = subprocess.run(command, input=plain, capture_output=True, check=True).stdout
    (tmp_path / "bz").write_bytes(_bzimage(packed, len(plain)))
    kernel.extract_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == plain


def test_a_file_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bz").write_bytes(bytes(4096))
    with pytest.raises(CarrelError, match="not a Linux kernel image"):
        kernel.extract_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")


def test_a_kernel_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    plain = b"\x7fELF" + bytes(5000)
    (tmp_path / "bz").write_bytes(_bzimage(lzma.compress(plain), len(plain) + 1))
    with pytest.raises(CarrelError, match="unpacked to 5004 bytes, its header says 5005"):
        kernel.extract_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")


def test_gnu_cpio_reads_what_we_pack(tmp_path: Path) -> None:
    entries = [
        Entry(path="modules", mode=0o040755),
        Entry(path="modules/order", mode=0o100644, data=b"virtio.ko\n"),
        Entry(path="init", mode=0o100755, data=b"odd length!"),
    ]
    subprocess.run(["cpio", "-idm", "--quiet"], input=cpio(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "modules/order").read_text() == "virtio.ko\n"
    assert (tmp_path / "init").read_bytes() == b"odd length!"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


def _initramfs(store: Path, program: bytes) -> Path:
    module, agent = store / "virtio.ko", store / "agent"
    module.write_bytes(b"module")
    agent.write_bytes(program)
    return ensure_initramfs(store, kernel="6.1", modules=[module], agent=agent)


def test_the_same_agent_gives_the_same_initramfs_and_another_agent_another(tmp_path: Path) -> None:
    first = _initramfs(tmp_path, _program(_SEGMENT_LOAD))
    again = _initramfs(tmp_path, _program(_SEGMENT_LOAD))
    other = _initramfs(tmp_path, _program(_SEGMENT_LOAD, _SEGMENT_LOAD))
    assert first == again != other
    assert first.exists()
    assert first.stat().st_mode & 0o777 == 0o644


def test_an_initramfs_lists_its_modules_in_load_order(tmp_path: Path) -> None:
    archive = _initramfs(tmp_path, _program(_SEGMENT_LOAD)).read_bytes()
    command = ["cpio", "-i", "--quiet", "--to-stdout", "modules/order"]
    listed = subprocess.run(command, input=archive, capture_output=True, check=True).stdout
    assert listed == b"virtio.ko\n"


def test_an_agent_that_is_linked_dynamically_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CarrelError, match="must be static"):
        _initramfs(tmp_path, _program(_SEGMENT_INTERPRETER, _SEGMENT_LOAD))


def test_a_missing_agent_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(CarrelError, match=r"No such file or directory; was it built\? see: make native"):
        ensure_initramfs(tmp_path, kernel="6.1", modules=[], agent=tmp_path / "absent")


def _stored_kernel(store: Path, name: str) -> Path:
    home = store / "kernels" / f"{name}.r{kernel.RECIPE}"
    (home / "modules").mkdir(parents=True)
    (home / "vmlinux").write_text("")
    (home / "order").write_text("")
    (home / "version").write_text(f"{name}\n")
    return home


def test_the_newest_kernel_is_taken_by_number_and_not_by_letter(tmp_path: Path) -> None:
    _stored_kernel(tmp_path, "6.1.0-100-amd64")
    _stored_kernel(tmp_path, "6.1.0-56-amd64")
    agent = tmp_path / "agent"
    agent.write_bytes(_program(_SEGMENT_LOAD))
    assert kernel.ensure_kernel(tmp_path, agent=agent, progress=print).version == "6.1.0-100-amd64"


def test_pruning_keeps_the_newest_kernel(tmp_path: Path) -> None:
    newest = _stored_kernel(tmp_path, "6.1.0-100-amd64")
    older = _stored_kernel(tmp_path, "6.1.0-56-amd64")
    assert kernel.prune_kernels(tmp_path) == [older]
    assert newest.exists()
    assert not older.exists()


def test_a_kernel_changes_its_id_with_the_agent(tmp_path: Path) -> None:
    _stored_kernel(tmp_path, "6.1.0-56-amd64")
    agent, ids = tmp_path / "agent", set()
    for segments in ([_SEGMENT_LOAD], [_SEGMENT_LOAD], [_SEGMENT_LOAD, _SEGMENT_LOAD]):
        agent.write_bytes(_program(*segments))
        ids.add(kernel.ensure_kernel(tmp_path, agent=agent, progress=print).id)
    assert len(ids) == 2
