import contextlib
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel import paths, wire
from carrel.images.kernel import ensure_kernel
from carrel.images.store import Store

BOOT_TIMEOUT_S = 100.0
_CONTROL = 13
_HEADER = struct.Struct("<BBHI")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """Sockets have short names."""
    path = Path(tempfile.mkdtemp(prefix="crl", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def _booted(where: Path) -> Iterator[socket.socket]:
    """Boot the image of the store, and yield a connection to the agent's control port."""
    store = Store(paths.image_store())
    kernel = ensure_kernel(store.path, agent=paths.libexec() / "carrel-agent", progress=print)
    disk = store.root_disk(store.resolve("debian12"))
    words = "quiet console=ttyS0 panic=-1 reboot=t no_timer_check tsc=reliable lpj=4000000 mitigations=off"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "control"))
        listener.listen()
        listener.settimeout(BOOT_TIMEOUT_S)
        command: list[str | Path] = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-m", "256"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{where / 'console'}"),
            *("-kernel", kernel.vmlinux, "-initrd", kernel.initramfs),
            *("-append", f"{words} carrel.root=/dev/vda carrel.fstype=ext4"),
            *("-drive", f"if=none,id=d0,file={disk},format=raw,snapshot=on,file.locking=off"),
            *("-device", "virtio-blk-pci,drive=d0"),
            *("-chardev", f"socket,id=control,path={where / 'control'}"),
            *(
                "-device",
                "virtio-serial-pci,id=vs",
                "-device",
                "virtserialport,bus=vs.0,nr=1,chardev=control,name=carrel.0",
            ),
        ]
        guest = subprocess.Popen(command)
        try:
            connection, _ = listener.accept()
            with connection:
                yield connection
        finally:
            guest.kill()
            guest.wait()


def _message(connection: socket.socket, *, until: float) -> wire.Message:
    def exactly(size: int) -> bytes:
        taken = b""
        while len(taken) < size:
            connection.settimeout(max(0.01, until - time.monotonic()))
            piece = connection.recv(size - len(taken))
            assert piece, "the guest closed its control port"
            taken += piece
        return taken

    kind, _, _, length = _HEADER.unpack(exactly(_HEADER.size))
    assert kind == _CONTROL
    return wire.decode(exactly(length))


@pytest.mark.guest
@pytest.mark.timeout(240)
def test_the_debian_image_boots_and_its_agent_says_hello(short_dir: Path) -> None:
    with _booted(short_dir) as connection:
        try:
            hello = _message(connection, until=time.monotonic() + BOOT_TIMEOUT_S)
        except TimeoutError:
            pytest.fail(f"no hello within {BOOT_TIMEOUT_S:g} s; its console:\n{(short_dir / 'console').read_text()}")
    assert hello.get("verb") == "hello"
