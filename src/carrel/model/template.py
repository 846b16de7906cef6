"""How guests that are Slurm nodes are made: a section of the template file, with all that it inherits in place.

Every key and its meaning stands in ``docs/reference/template-file.md``.
"""

from typing import Literal

import msgspec

from carrel.model.guest import Clone

Slurmd = Literal["host", "guest"]
"""Where the slurmd of a guest that is a node runs: beside it on its host, or inside."""

Customise = Literal["linuxprep", "cloud-init", "none"]


class GuestTemplate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section, resolved. Empty or None: left to the driver, to the request, or to what is cloned."""

    template: str = ""
    """The VM that is cloned: its name, or its path in the inventory; ``{host}`` stands for the chosen host."""
    clone: Clone = "full"
    cpus: int | None = None
    """For a request that names no CPUs; one that does gets what it names."""
    memory_mib: int | None = None
    datacenter: str = ""
    cluster: str = ""
    host: str = ""
    folder: str = ""
    resource_pool: str = ""
    datastore: str = ""
    port_group: str = ""
    dhcp: bool = True
    address: str = ""
    netmask: str = ""
    gateway: str = ""
    domain: str = ""
    dns: tuple[str, ...] = ()
    host_name: str = ""
    """Empty: the guest's name in Slurm, which is what slurmd expects."""
    cpu_reservation: bool | int = False
    """``true``: all that the guest's CPUs can give; a number: MHz."""
    memory_reservation: bool | int = False
    """``true``: all of the guest's memory; a number: MiB."""
    cpu_shares: int | None = None
    memory_shares: int | None = None
    latency: Literal["normal", "high"] = "normal"
    devices: tuple[str, ...] = ()
    """PCI devices that are passed through, each a kind of device: vendor and device id, ``10de:20b5``."""
    vgpu: str = ""
    sriov_port_group: str = ""
    pvrdma_port_group: str = ""
    customise: Customise = "linuxprep"
    """Who gives a full or linked clone its name and address; an instant one does it itself, see ``guestinfo``."""
    user_data: str = ""
    """A file for the guest's cloud-init, such as a script. Whoever is in the guest can read it."""
    slurm_conf: str = ""
    """A template of the guest's slurm.conf; empty: the built-in one."""
    trusted: bool = False
    """The site's word that no user of a guest made from it can become root there, so that it may hold the munge key."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller must know of a guest before it has a place, where a slurmd runs inside."""

    clone: Clone
    pooled: bool = False
    """It needs an address of the site's pool: neither its network nor its template gives it one."""
    slurm_conf: str = ""
    """A file with the template of its slurm.conf; empty: the built-in one."""
