"""What a guest promises it promises as every kind of clone: each module here runs once for each kind that it names.

A module names them with ``pytest.mark.clones("instant", "linked")``; without the mark it is ``instant``, the default of
a site. All its sandboxes then make clones of this kind unless a test asks for another, and a guest that silently became
another fails its test. Where it matters whether a guest booted or went on from a template (its identity, its mounts,
its memory, and what happens meanwhile) a module names ``linked`` too, and the shortest also ``full``. What a command
meets once it runs is the same for all: to run those modules twice would double the longest part of ``make test``.
"""

import asyncio
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from carrel import config
from carrel.drivers.qemu.clones import Clones
from carrel.drivers.qemu.settings import Settings
from carrel.images.source import StoreImages
from carrel.ports import DriverContext
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE

MakeSandbox = Callable[..., Sandbox]
MIB = 2**20

SHAPES = ((1, 160), (1, 256), (1, 512), (2, 160), (2, 512), (3, 160), (4, 160), (4, 512))
"""CPUs and MiB of the templates that the tests' guests come from. A new test with another shape adds it here."""

TEMPLATE_TIMEOUT_S = 120.0

_WISH = re.compile(r"^guest-starting: (\w+) clone of .* guest=(\S+)$", re.MULTILINE)
_BECAME = re.compile(r"^guest-ready: ((\w+) clone .*) job=\d+ guest=(\S+)$", re.MULTILINE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a sandbox once for each kind of clone that its module names."""
    if "clone" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("clones")
        metafunc.parametrize("clone", mark.args if mark else ("instant",), scope="module", indirect=True)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Give a directory that daemons and users can enter; pytest's own are closed to others."""
    path = Path(mkdtemp(prefix="cr", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def clone(request: pytest.FixtureRequest) -> str:
    """Name the kind of clone of this run of the module; templates for instant ones are there."""
    kind: str = request.param
    if kind == "instant":
        make_templates()
    return kind


@pytest.fixture(scope="module")
def sandboxes(clone: str) -> list[Sandbox]:  # a list for each kind
    """Hold those of this run of the module."""
    return []


@pytest.fixture(scope="module")
def sandbox_factory(sandbox_factory: MakeSandbox, clone: str, sandboxes: list[Sandbox]) -> MakeSandbox:
    """Make sandboxes as everywhere, whose guests are clones of this kind."""

    def make(*, carrel_conf: str = "", **arguments: object) -> Sandbox:
        box = sandbox_factory(carrel_conf=_with_clone(carrel_conf, clone), **arguments)
        sandboxes.append(box)
        return box

    return make


@pytest.fixture(autouse=True)
def clones_are_what_was_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose guests became another kind of clone than they were to be."""
    yield
    if "sandboxes" in request.fixturenames:
        found = [line for box in request.getfixturevalue("sandboxes") for line in _others(box)]
        assert not found, found


def make_templates() -> None:
    """Make those templates that are not there; the processes of a test run share them out among themselves."""
    settings = config.Config(guests=config.Guests(accelerator="tcg"))
    images = _images(settings.images.path)
    here = Path()
    context = DriverContext(config=settings, node="c1", directory=here, lock=here, images=images)
    clones = Clones(context, Settings())
    image, kernel = images.files(IMAGE), images.kernel()
    wanted = [
        clones.conditions(image.hash, cpus=cpus, memory_bytes=mib * MIB, kernel=kernel, accelerator="tcg")
        for cpus, mib in SHAPES
    ]
    waiting_s = time.monotonic()
    while missing := [conditions for conditions in wanted if clones.templates.find(conditions) is None]:
        # What is missing now may be there, or be made by another process, when its turn comes.
        for conditions in missing:
            made = clones.templates.find(conditions) or asyncio.run(clones.make(conditions, image=image, kernel=kernel))
            if made is not None:
                waiting_s = time.monotonic()
        assert time.monotonic() - waiting_s < TEMPLATE_TIMEOUT_S, f"others do not finish {len(missing)} templates"
        time.sleep(0.2)


@cache
def _images(store: Path) -> StoreImages:
    """Return the store of this checkout: the same one each time, since its first look costs most."""
    return StoreImages(store)


def _with_clone(conf: str, kind: str) -> str:
    """Return configuration lines in which guests are of this kind, unless they say otherwise themselves."""
    if re.search(r"^clone = ", conf, re.MULTILINE):
        return conf
    line = f'clone = "{kind}"'
    return (
        re.sub(r"^\[guests\]$", f"[guests]\n{line}", conf, flags=re.MULTILINE)
        if "[guests]" in conf
        else (f"{conf}\n[guests]\n{line}\n")
    )


def _others(box: Sandbox) -> list[str]:
    """Return, of a sandbox that is up, what its nodes say of guests that are not as they were asked for."""
    logs = "\n".join(path.read_text(errors="replace") for path in box.dir.glob("log/carreld.*.log"))
    wishes = {guest: kind for kind, guest in _WISH.findall(logs)}
    return [
        f"{guest} was to be {wishes[guest]}: {text}"
        for text, kind, guest in _BECAME.findall(logs)
        if wishes.get(guest, "auto") not in {"auto", kind}
    ]
