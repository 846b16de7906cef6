"""Drivers at a simulated vCenter, straight or by way of a stand-in that loses what it is told to lose."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.testing import vcsim as at
from carrel.testing.lossy import LossyVcenter
from carrel.testing.vcsim import Certificates, Vcsim

MakeDriver = Callable[..., Any]


@pytest.fixture
def lossy(vcsim: Vcsim, vcenter_certificates: Certificates) -> Iterator[LossyVcenter]:
    with LossyVcenter(vcsim.port, vcenter_certificates).serving() as stand_in:
        yield stand_in


@pytest.fixture
def make_driver(vcsim: Vcsim, vcenter_certificates: Certificates, tmp_path: Path) -> MakeDriver:
    """Return a maker of drivers; all of one test have the same guests."""
    from carrel.drivers.vsphere.driver import VsphereDriver  # noqa: PLC0415  # an extra

    def make(port: int = 0, **changes: Any) -> Any:
        return VsphereDriver(at.settings(tmp_path, port or vcsim.port, vcenter_certificates, **changes))

    return make


@pytest.fixture
def admin(vcsim: Vcsim, vcenter_certificates: Certificates) -> Callable[[Callable[[Any], Any]], Any]:
    """Do something at vCenter beside the driver, as its administrator would."""
    return lambda work: at.with_admin(vcsim.port, vcenter_certificates, work)


@pytest.fixture
def machines(admin: Callable[[Callable[[Any], Any]], Any], tmp_path: Path) -> Callable[[], list[str]]:
    """Name the machines of this test's guests that vCenter has, whether the driver knows of them or not."""
    mark = f"-{at.owner_of(tmp_path)}-"

    def look(instance: Any) -> list[str]:
        folder = instance.content.searchIndex.FindByInventoryPath(f"DC0/vm/{at.FOLDER}")
        return sorted(machine.name for machine in folder.childEntity if mark in machine.name)

    return lambda: admin(look)
