"""Settings of the qemu driver: ``[drivers.qemu]``."""

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Declared once, here; decoded by ``config.driver_settings``."""

    binary: str = "/usr/bin/qemu-system-x86_64"
    img: str = "/usr/bin/qemu-img"
    machine: str = "pc-q35-7.2"
    """A versioned machine: a guest looks the same after QEMU was upgraded."""
    cpu: str = ""
    """QEMU's CPU model; empty: ``host`` under KVM, ``max`` under emulation."""
    probe_timeout_s: float = 15.0
    """How long a guest may take to boot before KVM counts as unusable on this node."""
    resume_timeout_s: float = 15.0
    """How long an instant clone may take to speak before its template counts as broken, and the guest is booted."""
    translation_cache_bytes: int = 64 * 2**20
    """Translated code that is kept under emulation; QEMU's own default, an eighth of the node up to 1 GiB, would not
    fit beside the guest in a job's memory. Part of ``guests.memory_reserve_bytes``."""
    ports_max: int = 511
    """Most ports of a guest: one for each task inside, and each call of one to Slurm. Small guests have fewer, see
    ``carrel.core.clones.ports``; the device takes no more than 511."""
