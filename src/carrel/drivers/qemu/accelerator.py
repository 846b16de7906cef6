"""KVM is probed by booting a guest, never by opening ``/dev/kvm``.

On some hosts the device opens, a VM and a CPU can be made, and no guest ever boots (nested hypervisors without
real nesting). QEMU's own fall-back does not see that either. Only a guest that said hello counts.
"""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import msgspec

from carrel.drivers.qemu import command
from carrel.drivers.qemu.command import Accelerator
from carrel.drivers.qemu.settings import Settings
from carrel.errors import NodeFaultError
from carrel.model.image import KernelFiles
from carrel.ports import DriverContext


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe saw, and under which conditions."""

    conditions: str
    usable: bool
    why: str


async def choose(context: DriverContext, settings: Settings) -> tuple[Accelerator, str]:
    """Return the accelerator to use and why, as the site's setting and this node allow.

    Raises:
        NodeFaultError: the site wants KVM and no guest boots with it here.
    """
    wanted = context.config.guests.accelerator
    if wanted == "tcg":
        return "tcg", 'emulation, as configured (guests.accelerator = "tcg")'
    finding = await _kvm(context, settings)
    if finding.usable:
        return "kvm", finding.why
    if wanted == "auto":
        return "tcg", f'emulation, since guests.accelerator = "auto" and {finding.why}'
    raise NodeFaultError(
        f"node {context.node} has no usable KVM: {finding.why}; "
        'guests.accelerator = "auto" would allow emulation, see: carrel node check'
    )


async def _kvm(context: DriverContext, settings: Settings) -> Finding:
    """Return what the last probe under these conditions saw; probe where there was none."""
    kernel = await asyncio.to_thread(context.images.kernel)
    conditions = f"{_boot_id()} {kernel.id} {settings.binary} {settings.cpu}"
    memory = context.directory.parent / "kvm.json"
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(memory.read_bytes(), type=Finding)
        if known.conditions == conditions:
            return known
    usable, why = await _probe(settings, kernel, context.directory)
    finding = Finding(conditions=conditions, usable=usable, why=why)
    memory.write_bytes(msgspec.json.encode(finding))
    return finding


async def _probe(settings: Settings, kernel: KernelFiles, directory: Path) -> tuple[bool, str]:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return False, f"/dev/kvm: {error.strerror}"
    path = directory.parent / "probe.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        words = command.probe_command_line(
            settings=settings,
            accelerator="kvm",
            kernel=str(kernel.kernel),
            initramfs=str(kernel.initramfs),
            control=listener.fileno(),
        )
        child = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(listener.fileno(),),
        )
    try:
        async with asyncio.timeout(settings.probe_timeout_s):
            return await _first_word(path, child)
    except TimeoutError:
        return False, f"/dev/kvm opens, but a guest did not boot with it within {settings.probe_timeout_s:g} s"
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _first_word(path: Path, child: asyncio.subprocess.Process) -> tuple[bool, str]:
    """Wait for the agent's first byte or for QEMU's end."""
    first = b""
    with contextlib.suppress(OSError):  # it ended before we came, or while we waited
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            first = await reader.read(1)
        finally:
            writer.close()
    if first:
        return True, "a guest booted with KVM on this node"
    stderr = await child.stderr.read() if child.stderr else b""
    last = (stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    return False, f"/dev/kvm opens, but qemu ended: {last}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
