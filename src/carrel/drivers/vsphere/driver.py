"""The vsphere driver: a guest is a virtual machine of a vCenter, and a Slurm node whose slurmd runs inside.

Everything that is known of a guest stands in its machine (``record``), put there by the request that makes it. So a
driver that is killed between that request and anything else leaves a machine that the next one lists, goes on with, or
destroys; a second request for the same guest is refused by vCenter, for its name is taken.

``node`` of a spec is the host that was chosen for the guest. Nothing is entered: see ``enter``.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
from pyVmomi import vim, vmodl

from carrel import config
from carrel.core import templates
from carrel.core.keys import ImageTrust, refuse_key
from carrel.drivers.vsphere import places as inventory
from carrel.drivers.vsphere import record
from carrel.drivers.vsphere.hosts import read as inventory_of_hosts
from carrel.drivers.vsphere.maker import Maker
from carrel.drivers.vsphere.places import Source
from carrel.drivers.vsphere.settings import Settings, refuse_incomplete
from carrel.drivers.vsphere.vcenter import GoneError, Seen, Vcenter
from carrel.errors import CarrelError, NoAddressError, NodeFaultError, NotFoundError, RefusedError, UnreachableError
from carrel.model.guest import Counters, Entry, Guest, GuestRequest, GuestSpec, IsNode
from carrel.model.host import Host
from carrel.model.template import GuestTemplate, Recipe
from carrel.ports import DriverContext

NAME = "vsphere"
DESTROY_TIMEOUT_S = 300.0
"""How long vCenter may be busy with a machine, such as with its clone, before its destruction counts as failed."""

_MIB = 2**20
_LOOK = (
    "name",
    "config.extraConfig",
    "runtime.powerState",
    "runtime.connectionState",
    "guest.ipAddress",
    "summary.quickStats.hostMemoryUsage",
)
_Power = vim.VirtualMachinePowerState


class VsphereDriver:
    """Guests below ``drivers.vsphere.folder``. See ``carrel.ports.Driver`` for what each verb promises."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet.

        Raises:
            NodeFaultError: a setting without a default is missing.
        """
        refuse_incomplete(settings)
        self._settings = settings
        self._vcenter = Vcenter(settings)
        self._maker = Maker(self._vcenter, settings)
        self._locks: dict[str, asyncio.Lock] = {}
        self._making: dict[str, asyncio.Future[None]] = {}
        """Clones that vCenter was asked for. They go on when their caller is cancelled."""

    @classmethod
    def from_context(cls, context: DriverContext) -> Self:
        return cls(config.driver_settings(context.config, NAME, Settings))

    async def check(self) -> tuple[str, str]:
        try:
            about = await self._vcenter.call(lambda instance: instance.content.about)
            await self._folders()
            self._templates()
        except NodeFaultError:
            raise
        except CarrelError as error:
            raise NodeFaultError(str(error)) from error
        return NAME, f"{about.fullName} at {self._settings.server}"

    async def guests(self) -> Sequence[Guest]:
        """Return the machines with our own mark. A vCenter that does not answer raises; it never looks like none."""
        return tuple(guest for _, guest in await self._found())

    async def ensure(self, spec: GuestSpec) -> Guest:
        async with self._locks.setdefault(spec.name, asyncio.Lock()):
            try:
                return await self._ensure(spec)
            except GoneError as error:
                raise RefusedError(f"guest {spec.name} was destroyed while it started") from error

    async def destroy(self, name: str) -> None:
        try:
            async with asyncio.timeout(DESTROY_TIMEOUT_S):
                if making := self._making.get(name):
                    await asyncio.wait([making])  # vCenter makes it in any case; nobody else would remove it
                for machine, guest in await self._found():
                    if guest.name == name:
                        await self._remove(machine.ref, name)
        except TimeoutError as error:
            raise UnreachableError(
                f"guest {name} is not destroyed after {DESTROY_TIMEOUT_S:g} s; see vCenter"
            ) from error
        self._locks.pop(name, None)

    def recipe(self, request: GuestRequest) -> Recipe:
        """Return how a guest of this request is made, unless it may not hold the key or asks for what is not there."""
        template = self._section(request)
        if request.clone not in {None, "auto", template.clone}:
            raise RefusedError(
                f"--guest-clone={request.clone}: guests of {request.image} are {template.clone} clones; leave it out"
            )
        if request.mounts:
            raise RefusedError("--guest-mount: a guest on vSphere sees no directory of a host; leave it out")
        pooled = not template.dhcp and not template.address
        return Recipe(clone=template.clone, pooled=pooled, slurm_conf=template.slurm_conf)

    async def enter(self, name: str, port: str) -> Entry:  # noqa: ARG002  # every task comes by the guest's own slurmd
        """Return the guest's name in Slurm: no agent of ours is in it, and tasks come in by its own slurmd."""
        _, guest = await self._known(name)
        if guest.state != "ready":
            raise RefusedError(f"guest {name} is {guest.state}: {guest.reason or 'no task can enter it now'}")
        return IsNode(name=guest.host_name)

    async def suspend(self, name: str, *, suspended: bool) -> None:
        """Suspend the machine to its host's disk, or let it run on; its own tools set the clock when it does."""
        machine, guest = await self._known(name)
        if guest.state not in {"ready", "suspended"} or suspended == (guest.state == "suspended"):
            return
        what = f"guest {name} is not {'suspended' if suspended else 'resumed'}"
        begin = machine.ref.SuspendVM_Task if suspended else machine.ref.PowerOnVM_Task
        await self._maker.tolerating(vim.fault.InvalidPowerState, begin, what)

    async def read(self, name: str) -> Counters:
        """Return the memory that its host has given it; what vCenter has of its CPU is a rate, and no counter."""
        machine, _ = await self._known(name)
        used_mib = machine.get("summary.quickStats.hostMemoryUsage")
        return Counters(memory_bytes=used_mib * _MIB if used_mib else None)

    async def hosts(self, *, cluster: str = "") -> Sequence[Host]:
        """Return the hosts that vCenter has, with what machines that are no guests take of them.

        Args:
            cluster: Only those of this cluster: ``C0`` in the first of our datacenters, or ``DC1/C0``.
        """
        ours = [machine.ref for machine, _ in await self._found()]
        named, _, cluster = cluster.rpartition("/")
        centers = self._settings.datacenters if not cluster else [named or self._settings.datacenters[0]]
        found = []
        for center in centers:
            found += await inventory_of_hosts(self._vcenter, center, cluster=cluster, ours=ours)
        return tuple(found)

    def close(self) -> None:
        """Log out of vCenter; a later call logs in again."""
        self._vcenter.close()

    # -- looking -----------------------------------------------------------------------------------------------

    async def _folders(self) -> list[Any]:
        """Return where guests are. One that is missing raises: guests in it would look destroyed."""
        paths = [f"{center}/vm/{self._settings.folder}" for center in self._settings.datacenters]
        return [await self._vcenter.at(path, vim.Folder) for path in paths]

    async def _machines(self) -> list[Seen]:
        found = []
        for folder in await self._folders():
            found += await self._vcenter.below(folder, vim.VirtualMachine, _LOOK)
        return found

    async def _found(self) -> list[tuple[Seen, Guest]]:
        found = []
        for machine in await self._machines():
            guest = record.read(machine.get("config.extraConfig"), owner=self._settings.owner)
            if guest is not None:
                found.append((machine, _now(guest, machine)))
        return sorted(found, key=lambda pair: pair[1].name)

    async def _one(self, name: str) -> tuple[Seen, Guest] | None:
        return next((pair for pair in await self._found() if pair[1].name == name), None)

    async def _known(self, name: str) -> tuple[Seen, Guest]:
        pair = await self._one(name)
        if pair is None:
            raise NotFoundError(f"no guest {name} of {self._settings.owner} at {self._settings.server}")
        return pair

    def _templates(self) -> templates.TemplateFile:
        """Read the template file: what it says now is what the next guest gets."""
        path = Path(self._settings.template_file)
        try:
            return templates.parse(path.read_text(), where=str(path))
        except OSError as error:
            raise NodeFaultError(f"drivers.vsphere.template_file = {path}: {error.strerror}") from error

    # -- starting ----------------------------------------------------------------------------------------------

    async def _ensure(self, spec: GuestSpec) -> Guest:
        deadline_s = asyncio.get_running_loop().time() + spec.boot_timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                pair = await self._one(spec.name)
                if pair and pair[1].state == "down":
                    raise RefusedError(f"guest {spec.name} is down: {pair[1].reason}")
                if pair and pair[1].state in {"ready", "suspended"}:
                    return pair[1]
                template = self._template(spec)
                source = await inventory.source(self._vcenter, self._settings, template)
                machine, guest = pair or await self._clone(spec, template, source)
                cloned_s = time.time()
                await self._maker.start(machine, spec, template)
        except TimeoutError as error:
            raise RefusedError(
                f"guest {spec.name} not there after {spec.boot_timeout_s:g} s (guests.boot_timeout_s); "
                f"see {record.machine_name(self._settings.owner, spec.name)} in vCenter"
            ) from error
        started = msgspec.structs.replace(
            guest, phases=(("clone", cloned_s - guest.started_s), ("start", time.time() - cloned_s))
        )
        try:
            async with asyncio.timeout_at(deadline_s):
                return await self._maker.settle(machine, started, spec, template, source)
        except TimeoutError as error:
            raise NoAddressError(
                f"guest {spec.name} got no address of its own in {spec.boot_timeout_s:g} s (guests.boot_timeout_s); "
                f"are VMware's tools in {source.name}, and is there an address left?"
            ) from error

    def _template(self, spec: GuestSpec) -> GuestTemplate:
        """Return how the guest is made.

        Raises:
            RefusedError: it cannot be, or may not.
        """
        section = self._section(GuestRequest(image=spec.image_name, root=spec.root))
        template = templates.for_guest(section, host=spec.node)
        if not template.dhcp and not (spec.address or template.address):
            raise RefusedError(
                f"{self._where(spec.image_name)} has dhcp = false, and guest {spec.name} was given no address"
            )
        return template

    def _section(self, request: GuestRequest) -> GuestTemplate:
        """Return the section of the template file that a request names.

        Raises:
            RefusedError: its guests may not be: what is cloned has the munge key in it, as its slurmd runs inside.
        """
        template = self._templates().section(request.image)
        templates.refuse_incomplete(template, where=self._where(request.image))
        # The template file is the site's own, and so is the script that it may name.
        trust = ImageTrust(name=request.image, from_site=True, trusted=template.trusted)
        refuse_key(request, trust, slurmd="guest")
        return template

    def _where(self, section: str) -> str:
        return f"{self._settings.template_file}: {section}"

    async def _clone(self, spec: GuestSpec, template: GuestTemplate, source: Source) -> tuple[Seen, Guest]:
        making = self._making.get(spec.name)
        if making is None:
            making = asyncio.ensure_future(self._maker.make(spec, template, source))
            self._making[spec.name] = making
            making.add_done_callback(lambda done: self._made(spec.name, done))
        await asyncio.shield(making)
        while True:
            pair = await self._one(spec.name)
            if pair is not None:
                return pair
            await self._refuse_stranger(spec.name)
            await asyncio.sleep(self._settings.poll_period_s)

    async def _refuse_stranger(self, guest: str) -> None:
        """Tell why a machine that was made, or whose name was taken, is no guest of ours.

        Raises:
            RefusedError: it is none. Else another process had vCenter make it, and it cannot be read yet.
        """
        name = record.machine_name(self._settings.owner, guest)
        machine = next((one for one in await self._machines() if one.get("name") == name), None)
        if machine is None:
            raise RefusedError(f"guest {guest} was destroyed while it started")
        if machine.get("config.extraConfig") is not None:
            raise RefusedError(f"guest {guest}: another machine has its name, {name}, and is no guest; see vCenter")

    def _made(self, name: str, done: "asyncio.Future[None]") -> None:
        self._making.pop(name, None)
        if not done.cancelled():
            done.exception()  # whoever waits has it; where nobody waits, the next one asks again

    # -- ending ------------------------------------------------------------------------------------------------

    async def _remove(self, machine: Any, name: str) -> None:
        """Switch a machine off and destroy it, with its disks. It may vanish, or be busy, at any moment."""
        with contextlib.suppress(GoneError):
            await self._maker.tolerating(
                vim.fault.InvalidPowerState, machine.PowerOffVM_Task, f"guest {name} cannot be switched off"
            )
            await self._maker.tolerating(
                vmodl.fault.ManagedObjectNotFound, machine.Destroy_Task, f"guest {name} cannot be destroyed"
            )


def _now(guest: Guest, machine: Seen) -> Guest:
    """Return a guest as it is now: what was written down when it was ready, and what its machine is doing."""
    power, host = machine.get("runtime.powerState"), machine.get("runtime.connectionState")
    if host not in {None, "connected"}:
        # Not a word about the guest: it may well run on.
        return msgspec.structs.replace(guest, reason=f"its host is {host}, so nothing is known of it")
    if guest.ready_s is None or power in {None, _Power.poweredOn}:
        return guest
    if power == _Power.suspended:
        return msgspec.structs.replace(guest, state="suspended")
    return msgspec.structs.replace(guest, state="down", reason="its virtual machine is switched off")
