"""Which clone each guest of this node becomes, and the templates that instant ones come from."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from carrel.core import clones as decide
from carrel.core.clones import Choice
from carrel.drivers.qemu import freeze
from carrel.drivers.qemu.command import Accelerator, Descriptors, Memory, command_line, cpu_model
from carrel.drivers.qemu.settings import Settings
from carrel.drivers.qemu.templates import Conditions, Parts, Template, Templates
from carrel.errors import CarrelError, NotFoundError
from carrel.model.guest import GuestSpec
from carrel.model.image import ImageFiles, KernelFiles
from carrel.ports import DriverContext

_GIB = 2**30
FAILURE_KEPT_S = 600.0
"""How long nobody tries again what failed: a template that cannot be made costs each time what a guest costs."""

_LOG = logging.getLogger("carreld")


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """That a guest could not come from its template."""

    why: str
    used_s: float
    """When that was tried: one made later is another."""
    is_spoilt: bool
    """Whether the template goes: nobody else can go on from it either."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How one guest comes to be."""

    choice: Choice
    memory: Memory | None
    """A template's, to which the rest is plugged in; None: all from the start."""
    conditions: Conditions
    template: Template | None = None


class Clones:
    """Decides for one node, and makes templates in the background, one at a time."""

    def __init__(self, context: DriverContext, settings: Settings) -> None:
        """Look at nothing yet."""
        self._context = context
        self._settings = settings
        self._limits = context.config.guests.templates
        self.templates = Templates(self._limits.path, self._limits)
        self._failures: dict[str, tuple[float, str]] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def plan(
        self, spec: GuestSpec, *, kernel: KernelFiles, accelerator: Accelerator, broken: Broken | None = None
    ) -> Plan:
        """Return how this guest comes to be.

        Args:
            spec: What was asked for.
            kernel: What a new guest boots now.
            accelerator: What it runs with.
            broken: The template that it was to come from, where that was tried in vain.

        Raises:
            RefusedError: an instant clone was asked for by name, and the site forbids them.
        """
        conditions = self.conditions(
            spec.image, cpus=spec.cpus, memory_bytes=spec.memory_bytes, kernel=kernel, accelerator=accelerator
        )
        fits = decide.fits(spec.memory_bytes, conditions.memory_bytes)
        wanted = spec.clone in {"auto", "instant"} and self._limits.share != "none" and fits
        template = await asyncio.to_thread(self.templates.find, conditions) if wanted and not broken else None
        choice = decide.choose(
            spec.clone,
            share=self._limits.share,
            has_template=template is not None,
            failure=self._failure(conditions),
            broken=broken.why if broken else "",
            is_spoilt=broken is None or broken.is_spoilt,
            fits=fits,
            shape=shape(spec.image_name, conditions),
        )
        memory = Memory(size_bytes=conditions.memory_bytes, growth_bytes=conditions.growth_bytes) if template else None
        return Plan(choice=choice, memory=memory, conditions=conditions, template=template)

    def conditions(
        self, image_hash: str, *, cpus: int, memory_bytes: int, kernel: KernelFiles, accelerator: Accelerator
    ) -> Conditions:
        """Return what the template for a guest of this size depends on, here and now."""
        base_bytes = decide.base_memory(
            memory_bytes,
            least_bytes=self._context.config.guests.memory_min_bytes,
            most_bytes=self._limits.base_max_bytes,
        )
        growth_bytes = _node_memory_bytes()
        ports = decide.ports(base_bytes, cpus=cpus, most=self._settings.ports_max)
        return Conditions(
            image=image_hash,
            kernel=kernel.id,
            cpus=cpus,
            memory_bytes=base_bytes,
            growth_bytes=growth_bytes,
            ports=ports,
            command=_command(
                self._settings, accelerator, cpus, Memory(size_bytes=base_bytes, growth_bytes=growth_bytes), ports
            ),
            machine=self._settings.machine,
            cpu=cpu_model(self._settings, accelerator),
            accelerator=accelerator,
            qemu=_identity(self._settings.binary),
            host=_host_cpu() if accelerator == "kvm" else "",
        )

    def opener(self, plan: Plan, spec: GuestSpec) -> Callable[[ExitStack], Parts] | None:
        """Return what opens the template's parts for this guest; None where it comes from none."""
        template = plan.template
        if template is None:
            return None
        return lambda stack: self.templates.open(template, uid=spec.uid, stack=stack)

    async def remove(self, conditions: Conditions, broken: Broken) -> None:
        """Remove a template that a guest could not come from, unless it was made anew since or is not to blame."""
        if not broken.is_spoilt:
            return
        found = await asyncio.to_thread(self.templates.find, conditions)
        if found is None or found.created_s < broken.used_s:
            _LOG.warning("template %s removed: %s", conditions.digest, broken.why)
            await asyncio.to_thread(self.templates.discard, conditions.digest)

    def make_soon(self, plan: Plan, *, image: ImageFiles, kernel: KernelFiles) -> None:
        """Make the template for the next guest of this shape. A second call changes nothing."""
        digest = plan.conditions.digest
        if digest in self._making:
            return
        task = asyncio.ensure_future(self._make_quietly(plan.conditions, image, kernel))
        self._making[digest] = task
        task.add_done_callback(lambda _: self._making.pop(digest, None))

    async def _make_quietly(self, conditions: Conditions, image: ImageFiles, kernel: KernelFiles) -> None:
        try:
            async with self._one_at_a_time:
                await self.make(conditions, image=image, kernel=kernel)
        except CarrelError as error:
            self._failures[conditions.digest] = time.monotonic(), str(error)
            _LOG.warning("no template for %s: %s", shape(image.name, conditions), error)

    async def make(self, conditions: Conditions, *, image: ImageFiles, kernel: KernelFiles) -> Template | None:
        """Make a template, and let go those that it replaces; None: another process is making the same one.

        Raises:
            CarrelError: it cannot be made.
        """
        made = await freeze.make(
            self.templates,
            conditions,
            settings=self._settings,
            user=self._limits.user,
            image=image,
            kernel=kernel,
            timeout_s=self._context.config.guests.boot_timeout_s,
        )
        self._failures.pop(conditions.digest, None)
        await asyncio.to_thread(self.tidy, kernel)
        return made

    def tidy(self, kernel: KernelFiles) -> None:
        """Remove the templates that no guest can be made from any more, and those that are too many or too old."""

        def wanted(conditions: Conditions) -> bool:
            now = self.conditions(
                conditions.image,
                cpus=conditions.cpus,
                memory_bytes=conditions.memory_bytes,
                kernel=kernel,
                accelerator=conditions.accelerator,
            )
            if now != conditions:
                return False
            try:
                self._context.images.files(conditions.image)
            except NotFoundError:
                return False
            return True

        for template in [*self.templates.keep_only(wanted), *self.templates.prune()]:
            _LOG.info("template %s removed", template.conditions.digest)

    def _failure(self, conditions: Conditions) -> str:
        at_s, why = self._failures.get(conditions.digest, (0.0, ""))
        return why if time.monotonic() - at_s < FAILURE_KEPT_S else ""


def shape(image_name: str, conditions: Conditions) -> str:
    """Return what a template is for, in words."""
    cpus = f"{conditions.cpus} CPU{'s' if conditions.cpus > 1 else ''}"
    return f"{image_name}, {cpus} and from {conditions.memory_bytes // 2**20} MiB"


def _node_memory_bytes() -> int:
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return -(-have // _GIB) * _GIB


def _identity(binary: str) -> str:
    try:
        facts = Path(binary).stat()
    except OSError:
        return binary
    return f"{binary} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns}"


def _command(settings: Settings, accelerator: Accelerator, cpus: int, memory: Memory, ports: int) -> str:
    """Return the digest of a template's command line; it does not change with the numbers of its descriptors."""
    fds = Descriptors(kernel=0, initramfs=1, disk=2, base=3, ram=4, console=5, monitor=6, control=7)
    words = command_line(
        settings=settings, accelerator=accelerator, name="", cpus=cpus, memory=memory, ports=ports, stage="", fds=fds
    )
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _host_cpu() -> str:
    """Return what tells one host CPU from another, of which guests under KVM see every feature."""
    wanted = ("model name", "flags", "microcode")
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    lines = [line for line in first.splitlines() if line.startswith(wanted)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
