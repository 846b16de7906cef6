"""The hosts that a vCenter has, and what machines that are no guests of ours take of them: for the table of hosts."""

from collections import Counter
from collections.abc import Collection
from typing import Any

from pyVmomi import vim

from carrel.drivers.vsphere.vcenter import Seen, Vcenter, key_of
from carrel.model.host import Host

_HOST = (
    "name",
    "summary.hardware.numCpuCores",
    "summary.hardware.memorySize",
    "runtime.connectionState",
    "runtime.inMaintenanceMode",
)
_MACHINE = ("runtime.host", "runtime.powerState", "summary.config.numCpu", "summary.config.memorySizeMB")
_MIB = 2**20


async def read(vcenter: Vcenter, datacenter: str, *, cluster: str, ours: Collection[Any]) -> list[Host]:
    """Return the hosts of a datacenter, or of one of its clusters.

    Args:
        vcenter: Where.
        datacenter: Its name.
        cluster: Only this cluster's; empty: all.
        ours: Machines whose places the table of hosts has already.
    """
    below = f"{datacenter}/host/{cluster}" if cluster else f"{datacenter}/host"
    top = await vcenter.at(below, vim.ManagedEntity)
    machines = await vcenter.below(await vcenter.at(f"{datacenter}/vm", vim.Folder), vim.VirtualMachine, _MACHINE)
    cpus, memory = _taken(machines, ours={key_of(one) for one in ours})
    found = [_host(seen, cpus=cpus, memory=memory) for seen in await vcenter.below(top, vim.HostSystem, _HOST)]
    return sorted(found, key=lambda host: host.name)


def _taken(machines: Collection[Seen], *, ours: Collection[str]) -> tuple[Counter[str], Counter[str]]:
    """Return CPUs and bytes that others' machines take, by host. One that is off takes nothing until it is on."""
    cpus: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for machine in machines:
        host, off = machine.get("runtime.host"), vim.VirtualMachinePowerState.poweredOff
        if host is None or machine.get("runtime.powerState") == off or key_of(machine.ref) in ours:
            continue
        cpus[key_of(host)] += machine.get("summary.config.numCpu") or 0
        memory[key_of(host)] += (machine.get("summary.config.memorySizeMB") or 0) * _MIB
    return cpus, memory


def _host(seen: Seen, *, cpus: Counter[str], memory: Counter[str]) -> Host:
    link, key = seen.get("runtime.connectionState"), key_of(seen.ref)
    down = link != "connected"
    resting = bool(seen.get("runtime.inMaintenanceMode"))
    return Host(
        name=seen.get("name"),
        # pyVmomi has integers of its own, which nothing else knows.
        cpus=int(seen.get("summary.hardware.numCpuCores") or 0),
        memory_bytes=int(seen.get("summary.hardware.memorySize") or 0),
        cpus_used=cpus[key],
        memory_used_bytes=memory[key],
        state="down" if down else "drained" if resting else "up",
        reason=f"{link}" if down else "in maintenance mode" if resting else "",
    )
