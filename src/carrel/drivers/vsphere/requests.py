"""What vCenter is asked for a guest, as pure functions of its template and its spec."""

import ipaddress
from collections.abc import Sequence
from typing import Any

from pyVmomi import vim

from carrel.drivers.vsphere.places import Places, Source
from carrel.errors import RefusedError
from carrel.model.guest import GuestSpec
from carrel.model.template import GuestTemplate

_MIB = 2**20
_Device = vim.vm.device
_Add = _Device.VirtualDeviceSpec.Operation.add
_Edit = _Device.VirtualDeviceSpec.Operation.edit


def size(spec: GuestSpec) -> tuple[int, int]:
    """Return CPUs and MiB of a guest; vSphere takes memory in steps of 4 MiB, and a guest gets no more than its due."""
    return spec.cpus, spec.memory_bytes // _MIB // 4 * 4


def clone(
    template: GuestTemplate, spec: GuestSpec, places: Places, source: Source, extra: Sequence[Any]
) -> vim.vm.CloneSpec:
    """Return what ``CloneVM_Task`` is given for a full or a linked clone. It stays off until it is customised."""
    cpus, memory_mib = size(spec)
    changes = [*network_changes(places, source), *device_changes(template, places)]
    config = vim.vm.ConfigSpec(
        numCPUs=cpus,
        numCoresPerSocket=cpus,
        memoryMB=memory_mib,
        extraConfig=list(extra),
        cpuAllocation=_allocation(template.cpu_reservation, cpus * places.host_mhz, template.cpu_shares),
        memoryAllocation=_allocation(template.memory_reservation, memory_mib, template.memory_shares),
        memoryReservationLockedToMax=_locks_memory(template),
        latencySensitivity=vim.LatencySensitivity(level=template.latency),
        deviceChange=changes,
    )
    linked = template.clone == "linked"
    location = vim.vm.RelocateSpec(
        pool=places.pool,
        host=places.host,
        datastore=None if linked else places.datastore,  # its disk is a child of the source's
        diskMoveType="createNewChildDiskBacking" if linked else None,
    )
    return vim.vm.CloneSpec(
        location=location,
        config=config,
        powerOn=False,
        template=False,
        snapshot=source.snapshot if linked else None,
    )


def instant(
    name: str, spec: GuestSpec, places: Places, source: Source, extra: Sequence[Any]
) -> vim.vm.InstantCloneSpec:
    """Return what ``InstantClone_Task`` is given. The clone has its parent's size, and runs at once.

    Raises:
        RefusedError: the parent is smaller than the guest.
    """
    cpus, memory_mib = size(spec)
    if source.cpus < cpus or source.memory_mib < memory_mib:
        raise RefusedError(
            f"an instant clone has the size of its parent {source.name}, {source.cpus} CPUs and "
            f"{source.memory_mib} MiB, and {cpus} CPUs and {memory_mib} MiB were asked for; ask for less, or for "
            "another clone"
        )
    location = vim.vm.RelocateSpec(
        folder=places.folder, pool=places.pool, host=places.host, deviceChange=network_changes(places, source)
    )
    return vim.vm.InstantCloneSpec(name=name, location=location, config=list(extra))


def customisation(template: GuestTemplate, spec: GuestSpec, cards: int) -> vim.vm.customization.Specification:
    """Return what a guest's own tools make of it before its first boot: name, domain, addresses.

    Args:
        template: The guest's, its ranges put in.
        spec: Its name in Slurm, and its address where one was taken from a pool.
        cards: Network cards of the machine; the first gets the address, the others ask for one.
    """
    kinds = vim.vm.customization
    dns = list(template.dns)
    first = kinds.IPSettings(ip=kinds.DhcpIpGenerator(), dnsServerList=dns, dnsDomain=template.domain or None)
    if not template.dhcp:
        first = kinds.IPSettings(
            ip=kinds.FixedIp(ipAddress=spec.address or template.address),
            subnetMask=str(ipaddress.ip_network(f"0.0.0.0/{template.netmask}").netmask),
            gateway=[template.gateway] if template.gateway else [],
            dnsServerList=dns,
            dnsDomain=template.domain or None,
        )
    others = [kinds.IPSettings(ip=kinds.DhcpIpGenerator()) for _ in range(1, cards)]
    return kinds.Specification(
        identity=kinds.LinuxPrep(
            hostName=kinds.FixedName(name=template.host_name or spec.host_name), domain=template.domain
        ),
        globalIPSettings=kinds.GlobalIPSettings(
            dnsServerList=dns, dnsSuffixList=[template.domain] if template.domain else []
        ),
        nicSettingMap=[kinds.AdapterMapping(adapter=one) for one in (first, *others)],
    )


def network_changes(places: Places, source: Source) -> list[Any]:
    """Return how the first network card comes into the template's port group; one is added where there is none."""
    if places.network is None:
        return []
    card = next((device for device in source.devices if isinstance(device, _Device.VirtualEthernetCard)), None)
    if card is None:
        return [_added(_Device.VirtualVmxnet3(key=-1, backing=_backing(places.network)), -1)]
    edited = type(card)(key=card.key, backing=_backing(places.network), macAddress=card.macAddress)
    edited.connectable = _Device.VirtualDevice.ConnectInfo(startConnected=True, connected=True, allowGuestControl=True)
    return [_Device.VirtualDeviceSpec(operation=_Edit, device=edited)]


def device_changes(template: GuestTemplate, places: Places) -> list[Any]:
    """Return what is added besides: passed-through devices, a virtual GPU, SR-IOV and RDMA cards."""
    through = _Device.VirtualPCIPassthrough
    added: list[Any] = [
        through(backing=through.DynamicBackingInfo(deviceName="", allowedDevice=[_kind(name)]))
        for name in template.devices
    ]
    if template.vgpu:
        added.append(through(backing=through.VmiopBackingInfo(vgpu=template.vgpu)))
    if places.sriov_network is not None:
        added.append(
            _Device.VirtualSriovEthernetCard(
                backing=_backing(places.sriov_network),
                sriovBacking=_Device.VirtualSriovEthernetCard.SriovBackingInfo(),  # vCenter picks the function
            )
        )
    if places.pvrdma_network is not None:
        added.append(_Device.VirtualVmxnet3Vrdma(backing=_backing(places.pvrdma_network)))
    return [_added(device, -10 - number) for number, device in enumerate(added)]


def card_count(devices: Sequence[Any]) -> int:
    return sum(isinstance(device, _Device.VirtualEthernetCard) for device in devices)


def _kind(name: str) -> Any:
    vendor, _, device = name.partition(":")
    return _Device.VirtualPCIPassthrough.AllowedDevice(vendorId=_short(vendor), deviceId=_short(device))


def _short(digits: str) -> int:
    """Return four hexadecimal digits as the signed number of 16 bits that vSphere's API has for them."""
    number = int(digits, 16)
    return number - 0x10000 if number >= 0x8000 else number


def _locks_memory(template: GuestTemplate) -> bool | None:
    # A device that writes to the guest's memory by itself needs it to stay where it is.
    needs = template.devices or template.vgpu or template.sriov_port_group or template.latency == "high"
    return True if needs or template.memory_reservation is True else None


def _allocation(reservation: bool | int, whole: int, shares: int | None) -> vim.ResourceAllocationInfo:
    amount = whole if reservation is True else int(reservation)
    level = vim.SharesInfo(level="custom", shares=shares) if shares is not None else None
    return vim.ResourceAllocationInfo(reservation=amount or None, shares=level)


def _added(device: Any, key: int) -> Any:
    device.key = key
    return _Device.VirtualDeviceSpec(operation=_Add, device=device)


def _backing(network: Any) -> Any:
    if isinstance(network, vim.dvs.DistributedVirtualPortgroup):
        port = vim.dvs.PortConnection(portgroupKey=network.key, switchUuid=network.config.distributedVirtualSwitch.uuid)
        return _Device.VirtualEthernetCard.DistributedVirtualPortBackingInfo(port=port)
    return _Device.VirtualEthernetCard.NetworkBackingInfo(network=network, deviceName=network.name)
