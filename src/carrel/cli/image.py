"""``carrel image``: what guests are cloned from.

``build`` makes one of a distribution's packages, ``add`` takes one from elsewhere; both only ever add to the store.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from carrel import config, paths
from carrel.cli import output, templates
from carrel.cli.progress import progress
from carrel.images import make
from carrel.images.build import build as build_image
from carrel.images.build import built, recipe_of
from carrel.images.kernel import ensure_kernel, prune_kernels, unpack_kernel
from carrel.images.store import Image, Store

app = App(name="image", help="Images that guests are cloned from.")
app.command(templates.warm)
app.command(templates.templates)

Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON: one object per line.")
]
Name = Annotated[str, Parameter(help="A name, a hash, or at least six digits that only one hash begins with.")]

_MIB = 2**20


def _store() -> Store:
    return Store(config.load().images.path)


@app.command
def build(
    recipe: Annotated[str, Parameter(help="What to build: debian12.")],
    *,
    name: Annotated[str, Parameter(show_default=False, help="What to call it; the recipe's name by default.")] = "",
    include: Annotated[
        str, Parameter(show_default=False, help="More packages of the distribution, separated by commas.")
    ] = "",
    force: Annotated[
        bool, Parameter(negative="", show_default=False, help="Build again, with the packages of today.")
    ] = False,
) -> None:
    """Build an image from a distribution's packages, and fetch the guests' kernel. Does nothing if it is there."""
    store, what = _store(), recipe_of(recipe)
    packages = tuple(package for package in include.split(",") if package)
    name = name or what.name
    image = None if force else built(store, what, name=name, include=packages)
    with progress(name) as tell:
        _kernel(store, tell, refresh=force)
        if image:
            state = "is there"
        else:
            image = build_image(store, what, name=name, include=packages, progress=tell)
            state = "built"
    print(f"{name} {state}: {_in_words(image)}")


@app.command
def add(
    name: Annotated[str, Parameter(help="What to call it.")],
    source: Annotated[Path, Parameter(help="A root as tar (also .gz, .xz, .zst), a directory, or a raw ext4 disk.")],
) -> None:
    """Add an image from a file or a directory. Nothing need be installed in it for Carrel."""
    with progress(name) as tell:
        image = make.add(_store(), source, name=name, progress=tell)
    without = "" if image.shell else "; it has no /bin/sh, so job scripts cannot run in it"
    print(f"{name} added: {_in_words(image)}{without}")


@app.command(name="list")
def list_(*, as_json: Json = False) -> None:
    """List the images."""
    images = _store().list()
    if as_json:
        output.objects(images)
        return
    rows = [
        (
            *(image.name or "-", image.hash[:12], f"{image.disk_bytes // _MIB} MiB"),
            *(image.created, image.distribution or "-"),
        )
        for image in images
    ]
    output.table(("NAME", "HASH", "SIZE", "CREATED", "DISTRIBUTION"), rows)


@app.command
def show(name: Name, *, as_json: Json = False) -> None:
    """Show what is known about an image."""
    store = _store()
    image = store.resolve(name)
    found = templates.of_image(image.hash)
    if as_json:
        output.objects([msgspec.to_builtins(image) | {"templates": found}])
        return
    rows = {
        "name": image.name or "-",
        "hash": image.hash,
        "created": image.created,
        "source": image.source,
        "distribution": image.distribution or "-",
        "size": f"{image.size_bytes // _MIB} MiB, {image.disk_bytes // _MIB} MiB stored",
        "filesystem": image.filesystem,
        "shell": "yes" if image.shell else "no /bin/sh: job scripts cannot run in it",
        "kernel": image.kernel or "the newest of the store",
        "templates": templates.in_words(found),
        "disk": str(store.root_disk(image)),
        "packages": " ".join(image.packages) or "-",
    }
    output.fields(rows.items())


@app.command
def verify(name: Name) -> None:
    """Read an image again and compare it with what was stored."""
    image = _store().verify(name)
    print(f"{name}: {image.hash[:12]} is as it was stored")


@app.command
def remove(name: Name) -> None:
    """Remove an image, and its templates on this node. Guests that run from it keep it until they end."""
    image = _store().remove(name)
    gone = templates.forget([image.hash])
    print(f"{name} removed ({image.hash[:12]}), with {gone}; guests that run from it keep it until they end")


@app.command
def prune() -> None:
    """Remove images without a name, their templates on this node, and kernels that a newer one replaced.

    Guests that run keep theirs.
    """
    store = _store()
    images = store.prune()
    kernels = prune_kernels(store.path)
    freed = sum(image.disk_bytes for image in images)
    gone = templates.forget([image.hash for image in images])
    print(f"removed {len(images)} images ({freed // _MIB} MiB), {gone} and {len(kernels)} files of older kernels")


def _in_words(image: Image) -> str:
    distribution = output.printable(image.distribution or "unknown")  # the image says so itself
    return f"{image.hash[:12]}, {image.disk_bytes // _MIB} MiB, {distribution}"


def _kernel(store: Store, tell: Callable[[str], None], *, refresh: bool) -> None:
    """Without the agent there is only half to do: its initramfs is made when it is first needed."""
    agent = paths.libexec() / "carrel-agent"
    if agent.exists():
        ensure_kernel(store.path, agent=agent, progress=tell, refresh=refresh)
    else:
        unpack_kernel(store.path, progress=tell, refresh=refresh)
