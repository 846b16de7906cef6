"""``carrel image warm`` and ``carrel image templates``: what instant clones are made from.

Templates belong to a node, not to the image store: each command is about the node that it runs on.
"""

import asyncio
import itertools
import os
import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from carrel import config
from carrel.cli import api, output
from carrel.cli.progress import progress
from carrel.config import Config
from carrel.core.guests import guest_memory
from carrel.daemons.views import moment
from carrel.errors import NodeFaultError, RefusedError, UsageError
from carrel.images.kernel import kernels
from carrel.images.source import StoreImages
from carrel.model.image import KernelFiles
from carrel.ports import DriverContext

if TYPE_CHECKING:
    from carrel.drivers.qemu.stock import Made, Standing, Stock
    from carrel.drivers.qemu.templates import Template

Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON: one object per line.")
]

_SIZE = re.compile(r"([0-9]+)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


class TemplateView(msgspec.Struct, frozen=True, kw_only=True):
    """A template of this node."""

    digest: str
    image: str
    image_name: str
    """As it was called when the template was made."""
    cpus: int
    memory_bytes: int
    """Memory of the smallest guest that comes from it."""
    ram_bytes: int
    """Memory, and space on the disk, that it takes."""
    accelerator: str
    kernel: str
    created: datetime | None
    used: datetime | None
    boot_s: float
    """How long it took to make."""
    usable: bool
    why_not: str
    """Why no guest will be made from it any more."""


class WarmView(msgspec.Struct, frozen=True, kw_only=True):
    """What came of making one template ahead."""

    shape: str
    state: str
    digest: str
    ram_bytes: int
    boot_s: float


def warm(
    image: Annotated[str, Parameter(help="Name or hash of the image.")],
    *,
    cpus: Annotated[str, Parameter(help="CPUs of the jobs to come, as in --cpus-per-task: numbers and commas.")] = "1",
    memory: Annotated[
        str, Parameter(help="Memory of the jobs to come, as in --mem: MiB, or with K, M, G, T; separated by commas.")
    ] = "1G",
    as_json: Json = False,
) -> None:
    """Make templates ahead on this node, so that already the first job of a size has an instant clone. Root only.

    There is one for each number of CPUs and each memory, as far as one template does not serve several. Templates
    belong to a node: run this on each. A second call finds them there.
    """
    settings = config.load()
    if os.geteuid() != 0:
        raise RefusedError("templates decide what runs in everybody's guests; make them as root")
    sizes = _sizes(cpus, memory, settings)
    with progress("template") as tell:
        shown = (lambda _: None) if as_json else _tell_made
        asyncio.run(_warm(stock(settings), image, sizes, tell=tell, shown=shown, as_json=as_json))
    output.say(f"these are templates of this node, {api.nodes_here(settings)[0]}; other nodes have their own")


async def _warm(
    of_node: "Stock",
    image: str,
    sizes: Sequence[tuple[int, int]],
    *,
    tell: Callable[[str], None],
    shown: Callable[["Made"], None],
    as_json: bool,
) -> None:
    made = []
    async for one in of_node.warm(image, sizes, progress=tell):
        made.append(one)
        shown(one)
        if as_json:
            output.objects([_warm_view(one)])
    if gone := of_node.missing(made):
        raise RefusedError(
            f"{len(gone)} of {len(made)} had to make room for the others ({'; '.join(gone)}); "
            "see: guests.templates.max_bytes"
        )


def templates(
    *,
    remove: Annotated[
        str, Parameter(show_default=False, help="Remove the template with this digest; six digits of it will do.")
    ] = "",
    prune: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Remove those that no guest will be made from any more, that are too old or too many.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the templates of this node, which instant clones are made from, or remove some. Root only.

    Clones that run keep their memory. A template that was removed is made again when the next guest of its size starts.
    """
    of_node = stock(config.load())
    if remove or prune:
        if remove and prune:
            raise UsageError("--remove and --prune exclude each other")
        _print_removed([of_node.remove(remove)] if remove else of_node.prune())
        return
    found = [template_view(one) for one in of_node.all()]
    if as_json:
        output.objects(found)
        return
    titles = ("DIGEST", "IMAGE", "CPUS", "MEMORY", "TAKES", "CREATED", "USED", "USABLE")
    rows = [
        (
            *(one.digest[:12], one.image_name, one.cpus, f"from {output.size(one.memory_bytes)}"),
            *(output.size(one.ram_bytes), output.ago(one.created), output.ago(one.used)),
            one.why_not or "yes",
        )
        for one in found
    ]
    output.table(titles, rows)


def of_image(image_hash: str) -> list[TemplateView] | None:
    """Return this node's templates of an image; None: only root may look."""
    of_node = stock(config.load())
    if not of_node.readable:
        return None
    return [template_view(one) for one in of_node.all() if one.template.conditions.image == image_hash]


def in_words(found: Sequence[TemplateView] | None) -> str:
    """Return an image's templates for a person."""
    if found is None:
        return "known to root alone"
    if not found:
        return "none on this node"
    shapes = (
        f"{one.cpus} CPU{'s' if one.cpus > 1 else ''} from {output.size(one.memory_bytes)}"
        + ("" if one.usable else ", not usable any more")
        for one in found
    )
    taken = sum(one.ram_bytes for one in found) // 2**20
    return f"{len(found)} on this node, {taken} MiB of memory: {'; '.join(shapes)}"


def forget(images: Collection[str]) -> str:
    """Let the templates of images go that are gone, as far as the caller may; say how many went."""
    return _counted(stock(config.load()).forget(images))


def stock(settings: Config) -> "Stock":
    """Return the templates of this node."""
    # What it needs of QEMU is loaded only for those who ask.
    from carrel.drivers.qemu.stock import Stock  # noqa: PLC0415

    node = api.nodes_here(settings)[0]
    directory = settings.node.path(node)
    return Stock(
        DriverContext(
            config=settings,
            node=node,
            directory=directory / "guests",
            lock=directory / "carreld.lock",
            images=_Images(settings.images.path),
        )
    )


class _Images(StoreImages):
    """Images whose kernel is not fetched from a mirror because somebody looks at templates."""

    def kernel(self) -> KernelFiles:
        if not kernels(self._path):
            raise NodeFaultError(f"no kernel for guests in {self._path}; see: carrel image build")
        return super().kernel()


def template_view(one: "Standing") -> TemplateView:
    template, conditions = one.template, one.template.conditions
    return TemplateView(
        digest=conditions.digest,
        image=conditions.image,
        image_name=template.image_name,
        cpus=conditions.cpus,
        memory_bytes=conditions.memory_bytes,
        ram_bytes=template.ram_bytes,
        accelerator=conditions.accelerator,
        kernel=template.kernel_version,
        created=moment(template.created_s),
        used=moment(one.used_s),
        boot_s=template.boot_s,
        usable=not one.why_not,
        why_not=one.why_not,
    )


def parse_sizes(text: str) -> list[int]:
    """Return the amounts of memory in ``text``, in bytes, each as Slurm's ``--mem`` has it.

    >>> [size // 2**20 for size in parse_sizes("512,2G")]
    [512, 2048]
    """
    found = []
    for word in text.split(","):
        match = _SIZE.fullmatch(word.strip())
        if not match or not int(match[1]):
            raise UsageError(f"--memory={text}: {word!r} is no amount of memory; as in --mem: 512, 512M or 2G")
        found.append(int(match[1]) * _UNITS[match[2].upper()])
    return found


def parse_cpus(text: str) -> list[int]:
    """Return the numbers in ``text``.

    >>> parse_cpus("1,2,4")
    [1, 2, 4]
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UsageError(f"--cpus={text}: write numbers with commas between them, as in 1,2,4")
    return [int(word) for word in words]


def _sizes(cpus: str, memory: str, settings: Config) -> list[tuple[int, int]]:
    """Return each number of CPUs with each guest's memory, which is less than its job's."""
    many, sizes = parse_cpus(cpus), parse_sizes(memory)
    return [
        (count, guest_memory(size, cpus=count, job_cpus=count, settings=settings.guests))
        for count, size in itertools.product(many, sizes)
    ]


def _warm_view(one: "Made") -> WarmView:
    template = one.template
    return WarmView(
        shape=one.shape,
        state=one.state,
        digest=template.conditions.digest if template else "",
        ram_bytes=template.ram_bytes if template else 0,
        boot_s=template.boot_s if template else 0.0,
    )


def _tell_made(one: "Made") -> None:
    if one.template is None:
        print(f"{one.shape}: is being made by another process")
        return
    how = f"made in {one.template.boot_s:.1f} s" if one.state == "made" else "is there"
    print(f"{one.shape}: {how}, {one.template.ram_bytes // 2**20} MiB")


def _print_removed(gone: Sequence["Template"]) -> None:
    freed = sum(one.ram_bytes for one in gone) // 2**20
    print(f"removed {_counted(gone)} ({freed} MiB); clones that run keep their memory")


def _counted(gone: Sequence["Template"]) -> str:
    return f"{len(gone)} template{'' if len(gone) == 1 else 's'}"
