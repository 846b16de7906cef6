"""Finding what a template names in vCenter's inventory, once for each guest, with a sentence for what is not there."""

from typing import Any

import msgspec
from pyVmomi import vim

from carrel.drivers.vsphere.settings import Settings
from carrel.drivers.vsphere.vcenter import Seen, Vcenter
from carrel.errors import NodeFaultError
from carrel.model.template import GuestTemplate


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The virtual machine that is cloned."""

    ref: Any
    name: str
    cpus: int
    memory_mib: int
    devices: tuple[Any, ...]
    addresses: frozenset[str]
    """What it is reached at itself; an instant clone has these until it gave itself its own."""
    snapshot: Any
    powered_on: bool


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where a guest goes. None: vCenter decides."""

    folder: Any
    pool: Any
    host: Any
    host_mhz: int
    """What one CPU of the host gives."""
    datastore: Any
    network: Any
    sriov_network: Any
    pvrdma_network: Any


_SOURCE = ("name", "config.hardware", "guest.ipAddress", "guest.net", "snapshot", "runtime.powerState")


def datacenter(settings: Settings, template: GuestTemplate) -> str:
    """Return the datacenter of a template.

    Raises:
        NodeFaultError: its guests would not be found again there.
    """
    name = template.datacenter or settings.datacenters[0]
    if name not in settings.datacenters:
        known = ", ".join(settings.datacenters)
        raise NodeFaultError(f"datacenter {name!r} of the template is not in drivers.vsphere.datacenters: {known}")
    return name


async def source(vcenter: Vcenter, settings: Settings, template: GuestTemplate) -> Source:
    """Return what is cloned: a name of a machine anywhere in the datacenter's root folder, or a path below it."""
    path = f"{datacenter(settings, template)}/vm/{template.template}"
    machine = await vcenter.at(path, vim.VirtualMachine)
    found = _source(await vcenter.look(machine, _SOURCE))
    if template.clone == "linked" and found.snapshot is None:
        raise NodeFaultError(f"{path} has no snapshot, and a linked clone needs one; take one, or clone it in full")
    if template.clone == "instant" and not found.powered_on:
        raise NodeFaultError(f"{path} does not run, and an instant clone goes on from a running machine; start it")
    return found


async def find(vcenter: Vcenter, settings: Settings, template: GuestTemplate) -> Places:
    """Return where a guest of this template goes."""
    center = datacenter(settings, template)
    host = await _host(vcenter, center, template)
    folder = "/".join(word for word in (center, "vm", settings.folder, template.folder) if word)

    async def network(name: str) -> Any:
        return await vcenter.at(f"{center}/network/{name}", vim.Network) if name else None

    return Places(
        folder=await vcenter.at(folder, vim.Folder),
        pool=await _pool(vcenter, center, template, host),
        host=host,
        host_mhz=await vcenter.call(lambda _: host.summary.hardware.cpuMhz) if host else 0,
        datastore=await vcenter.at(f"{center}/datastore/{template.datastore}", vim.Datastore)
        if template.datastore
        else None,
        network=await network(template.port_group),
        sriov_network=await network(template.sriov_port_group),
        pvrdma_network=await network(template.pvrdma_port_group),
    )


async def _host(vcenter: Vcenter, center: str, template: GuestTemplate) -> Any:
    if not template.host:
        return None
    compute = template.cluster or template.host  # a host outside a cluster is in a folder of its own name
    return await vcenter.at(f"{center}/host/{compute}/{template.host}", vim.HostSystem)


async def _pool(vcenter: Vcenter, center: str, template: GuestTemplate, host: Any) -> Any:
    compute = template.cluster or template.host
    if not compute:
        raise NodeFaultError(
            f"template of {template.template!r} names neither cluster nor host, so no guest has a place"
        )
    if template.resource_pool:
        return await vcenter.at(f"{center}/host/{compute}/Resources/{template.resource_pool}", vim.ResourcePool)
    resource = (
        await vcenter.call(lambda _: host.parent)
        if host
        else await vcenter.at(f"{center}/host/{compute}", vim.ComputeResource)
    )
    return await vcenter.call(lambda _: resource.resourcePool)


def _source(machine: Seen) -> Source:
    """Return what is known of a machine that is cloned; one that has never run has no addresses."""
    addresses = {machine.get("guest.ipAddress")} if machine.get("guest.ipAddress") else set()
    for card in machine.get("guest.net") or ():
        addresses |= set(card.ipAddress or ())
    hardware, snapshot = machine.get("config.hardware"), machine.get("snapshot")
    return Source(
        ref=machine.ref,
        name=machine.get("name"),
        cpus=hardware.numCPU,
        memory_mib=hardware.memoryMB,
        devices=tuple(hardware.device),
        addresses=frozenset(addresses),
        snapshot=snapshot.currentSnapshot if snapshot else None,
        powered_on=machine.get("runtime.powerState") == vim.VirtualMachinePowerState.poweredOn,
    )
