"""A node's templates for its administrator: made ahead, looked through, removed. carreld finds what is done here."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import Literal

import msgspec

from carrel import config
from carrel.core import clones as decide
from carrel.drivers.qemu import accelerator
from carrel.drivers.qemu.clones import Clones, shape
from carrel.drivers.qemu.driver import NAME
from carrel.drivers.qemu.settings import Settings
from carrel.drivers.qemu.templates import Conditions, Template
from carrel.errors import CarrelError, NotFoundError, RefusedError, UsageError
from carrel.model.image import KernelFiles
from carrel.ports import DriverContext

_DIGITS_MIN = 6

_CHANGED = {
    "qemu": "QEMU was replaced",
    "kernel": "the guests' kernel or agent is another now",
    "machine": "drivers.qemu.machine is another now",
    "cpu": "drivers.qemu.cpu is another now",
    "host": "this node's CPU or its microcode is another now",
    "growth_bytes": "this node's memory is another now",
    "memory_bytes": "no guest begins with so much memory now (guests.templates.base_max_bytes)",
    "ports": "guests have another number of ports now (drivers.qemu.ports_max)",
    "command": "guests have other devices, or their kernel is told other words, now",
}


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A template, and what became of it."""

    template: Template
    used_s: float
    why_not: str = ""
    """Why no guest will be made from it any more; empty: the next one of its shape will."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What came of making one template ahead."""

    shape: str
    state: Literal["made", "there", "being made"]
    """``being made``: by another process, just now."""
    template: Template | None


class Stock:
    """The templates of one node."""

    def __init__(self, context: DriverContext) -> None:
        """Look at nothing yet."""
        self._context = context
        self._limits = context.config.guests.templates
        self._settings = config.driver_settings(context.config, NAME, Settings)
        self._clones = Clones(context, self._settings)
        self._templates = self._clones.templates

    @property
    def readable(self) -> bool:
        """Whether the caller may look at them; where there are none, there is nothing to hide."""
        try:
            self._templates.path.stat()
        except FileNotFoundError:
            return True
        except PermissionError:
            return False
        return os.access(self._templates.path, os.R_OK | os.X_OK)

    async def warm(
        self, name: str, sizes: Iterable[tuple[int, int]], *, progress: Callable[[str], None]
    ) -> AsyncIterator[Made]:
        """Make a template of the image for guests of each of these sizes (CPUs, memory in bytes), and yield it.

        Sizes that one template serves are one. A second call finds all of them there.

        Raises:
            CarrelError: the image, the kernel or a template cannot be had.
        """
        if self._limits.share == "none":
            raise RefusedError("this site lets no guests share memory (guests.templates.share = none)")
        image = self._context.images.files(name)
        if not image.has_shell:
            raise RefusedError(f"image {name} has no /bin/sh, so no command can run in it; see: carrel image show")
        kernel = await asyncio.to_thread(self._context.images.kernel)
        self._context.directory.mkdir(parents=True, exist_ok=True)
        kind, _ = await accelerator.choose(self._context, self._settings)
        wanted: dict[Conditions, None] = {}
        for cpus, size in sizes:
            conditions = self._clones.conditions(
                image.hash, cpus=cpus, memory_bytes=size, kernel=kernel, accelerator=kind
            )
            if not decide.fits(size, conditions.memory_bytes):
                raise RefusedError(
                    f"a guest of {size // 2**20} MiB boots quicker than it comes from a template, of "
                    f"{conditions.memory_bytes // 2**20} MiB at most; see: guests.templates.base_max_bytes"
                )
            wanted[conditions] = None
        for conditions in wanted:
            words = shape(image.name, conditions)
            if found := self._templates.find(conditions):
                yield Made(shape=words, state="there", template=found)
                continue
            progress(words)
            try:
                made = await self._clones.make(conditions, image=image, kernel=kernel)
            except CarrelError as error:
                raise CarrelError(f"no template for {words}: {error}") from error
            yield Made(shape=words, state="made" if made else "being made", template=made)

    def missing(self, made: Iterable[Made]) -> list[str]:
        """Return the shapes of those that were made and already had to go, since others took their room."""
        return [one.shape for one in made if one.template and not self._templates.find(one.template.conditions)]

    def all(self) -> Sequence[Standing]:
        """Return all templates, the one last used first.

        Raises:
            RefusedError: only root may look.
        """
        self._require_readable()
        found = self._templates.all()
        kernel = self._kernel() if found else None
        return [
            Standing(template=one, used_s=self._templates.used_s(one), why_not=self._why_not(one.conditions, kernel))
            for one in found
        ]

    def remove(self, digest: str) -> Template:
        """Remove one, by its digest or by the first six digits or more. Clones that run keep their memory.

        Raises:
            NotFoundError: there is none.
            UsageError: several begin so.
        """
        self._require_readable()
        found = [one for one in self._templates.all() if one.conditions.digest.startswith(digest)]
        if len(digest) < _DIGITS_MIN or not found:
            raise NotFoundError(f"no template {digest!r} on this node; see: carrel image templates")
        if len(found) > 1:
            known = ", ".join(one.conditions.digest for one in found)
            raise UsageError(f"{digest} begins {len(found)} templates; give more digits of one of: {known}")
        self._templates.discard(found[0].conditions.digest)
        return found[0]

    def prune(self) -> Sequence[Template]:
        """Remove those that no guest will be made from any more, that are too old or too many; return them."""
        useless = {one.template.conditions.digest for one in self.all() if one.why_not}
        gone = self._templates.keep_only(lambda conditions: conditions.digest not in useless)
        return [*gone, *self._templates.prune()]

    def forget(self, images: Collection[str]) -> Sequence[Template]:
        """Remove those of these images, by their hashes, as far as the caller may and the images are gone."""
        if not os.access(self._templates.path, os.R_OK | os.W_OK | os.X_OK):
            return []
        gone = {digest for digest in images if not self._has_image(digest)}
        return self._templates.keep_only(lambda conditions: conditions.image not in gone)

    def _require_readable(self) -> None:
        if not self.readable:
            raise RefusedError(f"{self._templates.path}: only root may look at the templates of a node")

    def _kernel(self) -> KernelFiles | CarrelError:
        try:
            return self._context.images.kernel()
        except CarrelError as error:
            return error

    def _why_not(self, conditions: Conditions, kernel: KernelFiles | CarrelError | None) -> str:
        """Return why guests that begin now will not go on from a template of these conditions."""
        wish = self._context.config.guests.accelerator
        if self._limits.share == "none":
            return "this site lets no guests share memory (guests.templates.share = none)"
        if not self._has_image(conditions.image):
            return "its image is gone"
        if not isinstance(kernel, KernelFiles):
            return str(kernel)
        if wish not in ("auto", conditions.accelerator):
            return f'guests.accelerator = "{wish}", and it was made with {conditions.accelerator}'
        now = self._clones.conditions(
            conditions.image,
            cpus=conditions.cpus,
            memory_bytes=conditions.memory_bytes,
            kernel=kernel,
            accelerator=conditions.accelerator,
        )
        return next((why for name, why in _CHANGED.items() if getattr(now, name) != getattr(conditions, name)), "")

    def _has_image(self, digest: str) -> bool:
        try:
            self._context.images.files(digest)
        except NotFoundError:
            return False
        return True
