"""Making one guest: the clone with its mark, its customisation, its first start, its address."""

import asyncio
import ipaddress
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
from pyVmomi import vim

from carrel.drivers.vsphere import places as inventory
from carrel.drivers.vsphere import record, requests
from carrel.drivers.vsphere.places import Source
from carrel.drivers.vsphere.settings import Settings
from carrel.drivers.vsphere.vcenter import Seen, TaskError, Vcenter
from carrel.errors import NodeFaultError
from carrel.model.guest import Guest, GuestSpec
from carrel.model.template import GuestTemplate


class Maker:
    """The deeds of ``ensure``, each of which may be done again."""

    def __init__(self, vcenter: Vcenter, settings: Settings) -> None:
        self._vcenter = vcenter
        self._settings = settings

    async def make(self, spec: GuestSpec, template: GuestTemplate, source: Source) -> None:
        """Let vCenter make the machine, with the mark that tells whose it is. One that is there already is it.

        Raises:
            NodeFaultError: it cannot; another host might.
        """
        places = await inventory.find(self._vcenter, self._settings, template)
        name = record.machine_name(self._settings.owner, spec.name)
        extra = [
            *record.marks(self._settings.owner, _new(spec, template)),
            *record.told({**_introduction(spec, template), **spec.facts}),
            *(record.cloud_init("userdata", _script(template)) if template.user_data else ()),
            *(record.cloud_init("metadata", _metadata(spec, template)) if template.customise == "cloud-init" else ()),
        ]
        begin: Callable[[], Any]
        if template.clone == "instant":
            instant = requests.instant(name, spec, places, source, extra)
            begin = lambda: source.ref.InstantClone_Task(spec=instant)  # noqa: E731  # one of two
        else:
            copy = requests.clone(template, spec, places, source, extra)
            begin = lambda: source.ref.CloneVM_Task(folder=places.folder, name=name, spec=copy)  # noqa: E731
        # A taken name: another process asked for the same guest before us, and died or is at it. Theirs is it.
        what = f"guest {spec.name}: {template.clone} clone of {source.name} failed"
        await self.tolerating(vim.fault.DuplicateName, begin, what)

    async def start(self, machine: Seen, spec: GuestSpec, template: GuestTemplate) -> None:
        """Customise and switch on what is off. An instant clone runs from its first moment."""
        ref = machine.ref
        now = await self._vcenter.look(ref, ("runtime.powerState", "config.hardware.device"))
        if now.get("runtime.powerState") != vim.VirtualMachinePowerState.poweredOff:
            return
        if template.customise == "linuxprep":
            wanted = requests.customisation(
                template, spec, requests.card_count(now.get("config.hardware.device") or ())
            )
            await self.tolerating(  # one that is on by now was customised by whoever switched it on
                (vim.fault.CustomizationPending, vim.fault.InvalidPowerState),
                lambda: ref.CustomizeVM_Task(spec=wanted),
                f"guest {spec.name} cannot be customised",
            )
        await self.tolerating(
            vim.fault.InvalidPowerState, ref.PowerOnVM_Task, f"guest {spec.name} cannot be switched on"
        )

    async def settle(
        self, machine: Seen, guest: Guest, spec: GuestSpec, template: GuestTemplate, source: Source
    ) -> Guest:
        """Wait for the guest's own address, and write down that it is ready. The caller sets the bound."""
        began_s = time.time()
        wanted = "" if template.dhcp else spec.address or template.address
        while True:
            address = (await self._vcenter.look(machine.ref, ("guest.ipAddress",))).get("guest.ipAddress") or ""
            if _is_its_own(address, wanted=wanted, parents=source.addresses):
                break
            await asyncio.sleep(self._settings.poll_period_s)
        now_s = time.time()
        phases = (*guest.phases, ("address", now_s - began_s))
        ready = msgspec.structs.replace(guest, state="ready", address=address, ready_s=now_s, phases=phases)
        marks = vim.vm.ConfigSpec(extraConfig=record.marks(self._settings.owner, ready))
        await self._vcenter.done(
            lambda _: machine.ref.ReconfigVM_Task(spec=marks), f"guest {guest.name} cannot be marked as ready"
        )
        return ready

    async def tolerating(self, fault: type | tuple[type, ...], begin: Callable[[], Any], what: str) -> None:
        """Do a task of vCenter, once another task has let go of the machine; ``fault`` says that it was done before.

        Raises:
            NodeFaultError: it failed otherwise.
            GoneError: the machine is not there any more.
        """
        while True:
            try:
                await self._vcenter.done(lambda _: begin(), what)
            except TaskError as error:
                if isinstance(error.fault, vim.fault.TaskInProgress):
                    await asyncio.sleep(self._settings.poll_period_s)
                    continue
                if not isinstance(error.fault, fault):
                    raise
            return


def _is_its_own(address: str, *, wanted: str, parents: Collection[str]) -> bool:
    """Tell whether a guest has the address that it shall have, and not, for a moment, that of what it was cloned from.

    >>> [_is_its_own(a, wanted="", parents={"10.0.0.5"}) for a in ("", "169.254.7.7", "10.0.0.5", "10.0.0.6")]
    [False, False, False, True]
    """
    if not address or wanted:
        return address == wanted != ""
    found = ipaddress.ip_address(address)
    return address not in parents and not found.is_link_local and not found.is_loopback and not found.is_unspecified


def _introduction(spec: GuestSpec, template: GuestTemplate) -> dict[str, str]:
    """Return what each guest is told: an instant clone has nobody else to learn from who it is."""
    facts = {
        "node_name": spec.host_name,
        "host_name": template.host_name or spec.host_name,
        "domain": template.domain,
        "dhcp": "yes" if template.dhcp else "no",
        "address": "" if template.dhcp else spec.address or template.address,
        "netmask": template.netmask,
        "gateway": template.gateway,
        "dns": " ".join(template.dns),
    }
    return {name: text for name, text in facts.items() if text}


def _metadata(spec: GuestSpec, template: GuestTemplate) -> str:
    """Return who the guest is in the form of cloud-init's data source for VMware."""
    first: dict[str, Any] = {"match": {"name": "e*"}, "dhcp4": template.dhcp}
    if not template.dhcp:
        width = ipaddress.ip_network(f"0.0.0.0/{template.netmask}").prefixlen
        first["addresses"] = [f"{spec.address or template.address}/{width}"]
        if template.gateway:
            first["routes"] = [{"to": "0.0.0.0/0", "via": template.gateway}]
    if template.dns:
        search = [template.domain] if template.domain else []
        first["nameservers"] = {"addresses": list(template.dns), "search": search}
    return json.dumps(
        {
            "instance-id": spec.name,
            "local-hostname": template.host_name or spec.host_name,
            "network": {"version": 2, "ethernets": {"first": first}},
        }
    )


def _script(template: GuestTemplate) -> str:
    try:
        return Path(template.user_data).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NodeFaultError(f"user_data = {template.user_data!r} of the template cannot be read: {error}") from error


def _new(spec: GuestSpec, template: GuestTemplate) -> Guest:
    return Guest(
        name=spec.name,
        node=spec.node,
        driver="vsphere",
        state="starting",
        run=spec.run,
        image_name=spec.image_name,
        image=spec.image,
        per=spec.per,
        clone=template.clone,
        clone_why="as the template file says",
        step=spec.step,
        task=spec.task,
        slot=spec.slot,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        uid=spec.uid,
        user=spec.user,
        host_name=spec.host_name,
        accelerator="vsphere",
        started_s=time.time(),
    )
