"""Images built from a distribution's packages, by mmdebstrap, with the mirrors that this machine itself uses."""

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from carrel import process
from carrel.errors import CarrelError, UsageError
from carrel.images import apt, files, make
from carrel.images.make import Progress
from carrel.images.recipes import RECIPES, Recipe
from carrel.images.store import Image, Store

TIMEOUT_S = 3600.0
_PHASE = re.compile(r"I: ((?:running apt-get|downloading|extracting|installing|cleaning|creating).*?)(?:\.\.\.)?$")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UsageError: there is none; the sentence names those there are.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise UsageError(f"no recipe {name!r}; known: {', '.join(RECIPES)}; other roots: carrel image add") from None


def source_of(recipe: Recipe, include: Sequence[str]) -> str:
    """Return what ``Image.source`` says of a build: the same words, the same contents asked for."""
    extra = "".join(f" +{package}" for package in sorted(set(include) - set(recipe.packages)))
    return f"recipe {recipe.name}{extra}"


def built(store: Store, recipe: Recipe, *, name: str, include: Sequence[str]) -> Image | None:
    """Return the image if ``name`` already stands for what this build would make."""
    if name not in store.names():
        return None
    image = store.resolve(name)
    return image if image.source == source_of(recipe, include) else None


def build(store: Store, recipe: Recipe, *, name: str, include: Sequence[str], progress: Progress) -> Image:
    """Build the image and tag it; what the name stood for before stays in the store until it is pruned.

    Raises:
        UsageError: a package cannot be called so.
        RefusedError: no room, no subordinate ids, or no Debian mirror is known to apt.
        CarrelError: mmdebstrap failed; the sentence has its last line.
    """
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise UsageError(f"package {package!r}: not a name of a Debian package")
    files.require_space(store.path, recipe.needed_bytes, what="this image")
    temporary = Path(tempfile.gettempdir())
    files.require_space(temporary, recipe.scratch_bytes, what="building it", hint="TMPDIR")
    make.require_subordinate_ids()
    with make.scratch() as work:
        progress("asking apt for its mirrors")
        tar = work / "root.tar"
        _mmdebstrap(_command(recipe, include, work=work, tar=tar), recipe=recipe, progress=progress)
        return make.from_tree(store, tar, name=name, told=source_of(recipe, include), progress=progress)


def _command(recipe: Recipe, include: Sequence[str], *, work: Path, tar: Path) -> list[str]:
    apt_options = work / "apt.conf"
    # A proxy is this machine's own business: needed while building, and removed from the image below.
    apt_options.write_text('APT::Install-Recommends "0";\n' + apt.proxies())
    left_out = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
    private = ("etc/hostname", "etc/resolv.conf", "etc/apt/apt.conf.d/99mmdebstrap")
    return [
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        f"--include={','.join(sorted({*recipe.packages, *include}))}",
        f"--aptopt={apt_options}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in left_out),
        f'--customize-hook=cd "$1" && rm -f {" ".join(private)}',
        recipe.suite,
        str(tar),
        *apt.sources(recipe.suite),
    ]


def _mmdebstrap(command: Sequence[str], *, recipe: Recipe, progress: Progress) -> None:
    """Run it and tell what it is at. It removes its own directories when it is ended."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": str(recipe.epoch_s)},
        )
    except FileNotFoundError as error:
        raise CarrelError("mmdebstrap: not found; install it with: apt-get install mmdebstrap") from error
    bound = threading.Timer(TIMEOUT_S, child.terminate)
    bound.start()
    said: list[str] = []
    try:
        for line in child.stderr or ():
            if phase := _PHASE.match(line):
                progress(phase[1])
            said.append(line)
        status = child.wait()
    finally:
        bound.cancel()
        if child.poll() is None:
            child.terminate()
            child.wait()
    if status != 0:
        errors = [line for line in said if line.startswith("E: ")]
        raise process.CommandError(command, status=status, stderr="".join(errors[:1] or said))
