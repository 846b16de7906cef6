"""From a guest's description to QEMU's command line: pure, and cut by device.

QEMU runs as the job's user and may open next to nothing itself. What it needs is opened by carreld and inherited:
each ``fd`` below is a number in the process that becomes QEMU.
"""

from typing import Literal

import msgspec

from carrel.drivers.qemu.settings import Settings

Accelerator = Literal["kvm", "tcg"]


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of the inherited descriptors; None: this guest has no such part."""

    kernel: int | None = None
    initramfs: int | None = None
    """None, as the kernel: the guest goes on from a template."""
    disk: int
    base: int | None
    """The shared image below an overlay; None for a full clone."""
    layer: int | None = None
    """What a template wrote, between the image and its clone's own disk."""
    ram: int | None = None
    """A memfd."""
    state: int | None = None
    """A template's devices, to go on from."""
    console: int
    monitor: int
    """A listening socket."""
    control: int
    """A listening socket."""

    def all(self) -> list[int]:
        return [number for number in msgspec.structs.astuple(self) if number is not None]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's memory, as its machine is built."""

    size_bytes: int
    growth_bytes: int = 0
    """How much can be plugged into it while it runs; only a template and its clones have this."""
    shared: bool = False
    """Write to ``Descriptors.ram`` itself, as a template does; else to a private copy."""


def command_line(
    *,
    settings: Settings,
    accelerator: Accelerator,
    name: str,
    cpus: int,
    memory: Memory,
    ports: int,
    stage: str,
    fds: Descriptors,
) -> list[str]:
    """Return QEMU's whole command line: for a cold boot, or to wait for a template's state where there is one."""
    return [
        settings.binary,
        *_machine(settings, accelerator, name, cpus),
        *_memory(memory, fds),
        *_confinement(),
        *_start(accelerator, fds),
        *_disk(fds),
        *_monitor(fds),
        *_console(fds),
        *_channel(accelerator, ports, fds),
        *_stage(stage),
    ]


def probe_command_line(
    *, settings: Settings, accelerator: Accelerator, kernel: str, initramfs: str, control: int
) -> list[str]:
    """Return the command line of the smallest guest that says hello: no disk, no share."""
    return [
        settings.binary,
        *_machine(settings, accelerator, "carrel-probe", 1),
        *("-m", "256M"),
        *_confinement(),
        *("-kernel", kernel, "-initrd", initramfs, "-append", " ".join(_kernel_words(accelerator))),
        *("-chardev", f"socket,id=control,fd={control},server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=vs"),
        *("-device", "virtserialport,bus=vs.0,nr=1,chardev=control,name=carrel.0"),
    ]


def _machine(settings: Settings, accelerator: Accelerator, name: str, cpus: int) -> list[str]:
    cache_mib = settings.translation_cache_bytes // 2**20
    return [
        *("-name", f"guest={name},debug-threads=on"),
        *("-machine", f"{settings.machine},vmport=off"),
        *("-accel", {"kvm": "kvm", "tcg": f"tcg,thread=multi,tb-size={cache_mib}"}[accelerator]),
        *("-cpu", cpu_model(settings, accelerator)),
        *("-smp", str(cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"),
        "-no-reboot",  # a panic ends QEMU, and the guard says so
    ]


def cpu_model(settings: Settings, accelerator: Accelerator) -> str:
    """Return the CPU that guests see."""
    # Emulated, five-level tables only cost time, and a kernel that sees erms copies byte by byte: thrice as slow.
    # QEMU 10 emulates fsrm too, and Linux 6.1 that sees it without erms hangs in its first second.
    return settings.cpu or {"kvm": "host", "tcg": "max,la57=off,erms=off,fsrm=off"}[accelerator]


def _memory(memory: Memory, fds: Descriptors) -> list[str]:
    mib = memory.size_bytes // 2**20
    if fds.ram is None:
        return ["-m", f"{mib}M"]
    # What is plugged later is not the template's: no page of it exists before a clone's guest asks for it.
    growth_mib = memory.growth_bytes // 2**20
    share = "on" if memory.shared else "off"
    return [
        *("-m", f"{mib}M,maxmem={mib + growth_mib}M"),
        *("-object", f"memory-backend-file,id=ram,size={mib}M,mem-path=/proc/self/fd/{fds.ram},share={share}"),
        *("-machine", "memory-backend=ram"),
        *("-object", f"memory-backend-ram,id=growth-ram,size={growth_mib}M,reserve=off"),
        *("-device", "virtio-mem-pci,id=growth,memdev=growth-ram,requested-size=0"),
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
        "memhp_default_state=online",
        # Where memory may one day lie beyond 4 GiB, 64 MiB are set aside to copy for devices that do not reach there.
        # Ours do, and a template of 160 MiB would run out of memory while it boots, depending on where its kernel lies.
        "swiotlb=noforce",
    ]
    if accelerator == "tcg":
        # Calibration takes long on an emulated clock, and an emulated CPU speculates nothing.
        words += ["tsc=reliable", "lpj=4000000", "mitigations=off"]
        # With the first control group whose kernel memory is counted, Linux rewrites its page allocator as it runs. Of
        # several emulated CPUs, QEMU 7.2 let some go on for ever with what stood there for a moment.
        words += ["cgroup.memory=nokmem,nosocket"]
    return words


def _start(accelerator: Accelerator, fds: Descriptors) -> list[str]:
    if fds.state is not None:
        return ["-incoming", "defer"]
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
        return [*words, "-device", "virtio-blk-pci,drive=disk"]
    words += ["-add-fd", f"fd={fds.base},set={fds.base}"]
    words += ["-blockdev", file.format(name="base", fd=fds.base) + ",read-only=on"]
    words += ["-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on"]
    below = "base"
    if fds.layer is not None:
        words += ["-add-fd", f"fd={fds.layer},set={fds.layer}"]
        words += ["-blockdev", file.format(name="layer", fd=fds.layer) + ",read-only=on"]
        words += ["-blockdev", "driver=qcow2,node-name=layer,file=layer-file,read-only=on,backing=base"]
        below = "layer"
    words += ["-blockdev", file.format(name="disk", fd=fds.disk)]
    words += ["-blockdev", f"driver=qcow2,node-name=disk,file=disk-file,backing={below},discard=unmap"]
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


def _channel(accelerator: Accelerator, ports: int, fds: Descriptors) -> list[str]:
    # An emulated CPU is a thread like any other: to wake another one for each of its writes costs more than the write.
    eventfd = "off" if accelerator == "tcg" else "on"
    return [
        *("-device", f"virtio-serial-pci,id=vs,max_ports={ports},ioeventfd={eventfd}"),
        *("-chardev", f"socket,id=control,fd={fds.control},server=on,wait=off"),
        *("-device", "virtserialport,bus=vs.0,nr=1,chardev=control,name=carrel.0"),
    ]


def _stage(stage: str) -> list[str]:
    return [
        *("-fsdev", f"local,id=stage,path={stage},security_model=none,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=stage,mount_tag=carrel"),
    ]
