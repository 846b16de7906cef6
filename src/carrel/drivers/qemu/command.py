"""From a guest's description to QEMU's command line: pure, and cut by device.

QEMU runs as the job's user and may open next to nothing itself. What it needs is opened by carreld and inherited:
each ``fd`` below is a number in the process that becomes QEMU.
"""

from typing import Literal

import msgspec

from carrel.drivers.qemu.settings import Settings

Accelerator = Literal["kvm", "tcg"]


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of the inherited descriptors."""

    kernel: int
    initramfs: int
    disk: int
    base: int | None
    """The shared image below a linked clone; None for a full clone."""
    console: int
    monitor: int
    """A listening socket."""
    control: int
    """A listening socket."""

    def all(self) -> list[int]:
        numbers = [self.kernel, self.initramfs, self.disk, self.console, self.monitor, self.control]
        return numbers if self.base is None else [*numbers, self.base]


def command_line(
    *,
    settings: Settings,
    accelerator: Accelerator,
    name: str,
    cpus: int,
    memory_bytes: int,
    stage: str,
    fds: Descriptors,
) -> list[str]:
    """Return QEMU's whole command line for a cold boot."""
    return [
        settings.binary,
        *_machine(settings, accelerator, name, cpus, memory_bytes),
        *_confinement(),
        *_kernel(accelerator, fds),
        *_disk(fds),
        *_monitor(fds),
        *_console(fds),
        *_channel(settings, accelerator, fds),
        *_stage(stage),
    ]


def probe_command_line(
    *, settings: Settings, accelerator: Accelerator, kernel: str, initramfs: str, control: int
) -> list[str]:
    """Return the command line of the smallest guest that says hello: no disk, no share."""
    return [
        settings.binary,
        *_machine(settings, accelerator, "carrel-probe", 1, 256 * 2**20),
        *_confinement(),
        *("-kernel", kernel, "-initrd", initramfs, "-append", " ".join(_kernel_words(accelerator))),
        *("-chardev", f"socket,id=control,fd={control},server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=vs"),
        *("-device", "virtserialport,bus=vs.0,nr=1,chardev=control,name=carrel.0"),
    ]


def _machine(settings: Settings, accelerator: Accelerator, name: str, cpus: int, memory_bytes: int) -> list[str]:
    cache_mib = settings.translation_cache_bytes // 2**20
    # Emulated, five-level tables only cost time, and a kernel that sees erms copies byte by byte: thrice as slow.
    cpu = settings.cpu or {"kvm": "host", "tcg": "max,la57=off,erms=off"}[accelerator]
    return [
        *("-name", f"guest={name},debug-threads=on"),
        *("-machine", f"{settings.machine},vmport=off"),
        *("-accel", {"kvm": "kvm", "tcg": f"tcg,thread=multi,tb-size={cache_mib}"}[accelerator]),
        *("-cpu", cpu),
        *("-smp", str(cpus)),
        *("-m", f"{memory_bytes // 2**20}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"),
        "-no-reboot",  # a panic ends QEMU, and the guard says so
    ]


def _confinement() -> list[str]:
    return ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def _kernel_words(accelerator: Accelerator) -> list[str]:
    words = [
        "console=ttyS0",
        "quiet",
        "loglevel=4",
        "panic=-1",
        "reboot=t",
        "no_timer_check",
        "random.trust_cpu=on",
        "random.trust_bootloader=on",
        "rcupdate.rcu_expedited=1",
        "cryptomgr.notests",
    ]
    if accelerator == "tcg":
        # Calibration takes long on an emulated clock, and an emulated CPU speculates nothing.
        words += ["tsc=reliable", "lpj=4000000", "mitigations=off"]
    return words


def _kernel(accelerator: Accelerator, fds: Descriptors) -> list[str]:
    words = [*_kernel_words(accelerator), "carrel.root=/dev/vda", "carrel.fstype=ext4"]
    return [
        *("-kernel", f"/proc/self/fd/{fds.kernel}"),
        *("-initrd", f"/proc/self/fd/{fds.initramfs}"),
        *("-append", " ".join(words)),
    ]


def _disk(fds: Descriptors) -> list[str]:
    # The disk dies with the job, so nothing needs to reach the platter: flushes are ignored.
    file = "driver=file,node-name={name}-file,filename=/dev/fdset/{fd},locking=off,cache.no-flush=on"
    words = ["-add-fd", f"fd={fds.disk},set={fds.disk}"]
    if fds.base is None:
        words += ["-blockdev", file.format(name="disk", fd=fds.disk)]
        words += ["-blockdev", "driver=raw,node-name=disk,file=disk-file,discard=unmap"]
    else:
        words += ["-add-fd", f"fd={fds.base},set={fds.base}"]
        words += ["-blockdev", file.format(name="base", fd=fds.base) + ",read-only=on"]
        words += ["-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on"]
        words += ["-blockdev", file.format(name="disk", fd=fds.disk)]
        words += ["-blockdev", "driver=qcow2,node-name=disk,file=disk-file,backing=base,discard=unmap"]
    return [*words, "-device", "virtio-blk-pci,drive=disk"]


def _monitor(fds: Descriptors) -> list[str]:
    return [
        *("-chardev", f"socket,id=monitor,fd={fds.monitor},server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
    ]


def _console(fds: Descriptors) -> list[str]:
    return [
        *("-add-fd", f"fd={fds.console},set={fds.console}"),
        *("-chardev", f"file,id=console,path=/dev/fdset/{fds.console},append=on"),
        *("-device", "isa-serial,chardev=console"),
    ]


def _channel(settings: Settings, accelerator: Accelerator, fds: Descriptors) -> list[str]:
    # An emulated CPU is a thread like any other: to wake another one for each of its writes costs more than the write.
    eventfd = "off" if accelerator == "tcg" else "on"
    return [
        *("-device", f"virtio-serial-pci,id=vs,max_ports={settings.ports_max},ioeventfd={eventfd}"),
        *("-chardev", f"socket,id=control,fd={fds.control},server=on,wait=off"),
        *("-device", "virtserialport,bus=vs.0,nr=1,chardev=control,name=carrel.0"),
    ]


def _stage(stage: str) -> list[str]:
    return [
        *("-fsdev", f"local,id=stage,path={stage},security_model=none,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=stage,mount_tag=carrel"),
    ]
