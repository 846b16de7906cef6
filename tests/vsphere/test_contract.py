"""The vsphere driver keeps the promises of every driver, at a simulated vCenter."""

from pathlib import Path
from typing import Any

import pytest

from carrel.model.guest import Entry, Guest, GuestSpec, IsNode
from carrel.ports import Driver
from carrel.testing import DriverContract
from carrel.testing import vcsim as at
from carrel.testing.vcsim import Certificates, Vcsim, with_admin

pytestmark = pytest.mark.vsphere


class TestVsphere(DriverContract):
    @pytest.fixture(autouse=True)
    def _at(self, vcsim: Vcsim, vcenter_certificates: Certificates) -> None:
        self.port, self.certificates = vcsim.port, vcenter_certificates

    def make(self, where: Path) -> Driver:
        from carrel.drivers.vsphere.driver import VsphereDriver  # noqa: PLC0415  # an extra

        return VsphereDriver(at.settings(where, self.port, self.certificates))

    def spec(self, name: str) -> GuestSpec:
        return at.spec(name)

    async def check_entry(self, driver: Driver, guest: Guest, entry: Entry) -> None:  # noqa: ARG002  # the contract's shape
        assert entry == IsNode(name=guest.host_name), "such a guest is a node: its tasks come in by its own slurmd"

    async def check_gone(self, driver: Driver, spec: GuestSpec) -> None:  # noqa: ARG002  # the contract's shape
        names = with_admin(self.port, self.certificates, _machines)
        assert not [name for name in names if name.endswith(spec.name)]


def _machines(instance: Any) -> list[str]:
    folder = instance.content.searchIndex.FindByInventoryPath(f"DC0/vm/{at.FOLDER}")
    return [machine.name for machine in folder.childEntity]
