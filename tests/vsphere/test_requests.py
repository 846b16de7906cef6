"""What vCenter is asked for a guest: the part of a template that a simulated vCenter ignores, as it goes over the wire.

vcsim has no instant clones and no devices that are passed through, takes reservations and disks of a clone as they
come, and boots nothing. So what it cannot answer for is read from the request that it received.
"""

import asyncio
import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET  # of requests that we made ourselves

import msgspec
import pytest

from carrel.errors import NoAddressError, NodeFaultError, NotFoundError, RefusedError
from carrel.model.guest import GuestSpec
from carrel.testing import vcsim as at
from carrel.testing.lossy import LossyVcenter

pytestmark = [pytest.mark.vsphere, pytest.mark.timeout(120)]

MakeDriver = Callable[..., Any]
_VIM = "{urn:vim25}"
_TYPE = "{http://www.w3.org/2001/XMLSchema-instance}type"

_TOLD = ("slurm_conf", "node_name", "host_name", "domain", "dhcp", "address", "netmask", "gateway", "dns")

MORE = """
[reserved]
inherit = ["static"]
cpu_reservation = true
memory_reservation = true
cpu_shares = 3000
memory_shares = 7
latency = "high"

[some]
inherit = ["static"]
cpu_reservation = 500
memory_reservation = 16

[devices]
inherit = ["static"]
devices = ["10de:20b5"]
vgpu = "grid_p100-2q"
sriov_port_group = "VM Network"
pvrdma_port_group = "DC0_DVPG0"

[switched]
inherit = ["static"]
port_group = "DC0_DVPG0"

[scripted]
inherit = ["static"]
user_data = "{script}"

[doubtful]
inherit = ["static"]
trusted = false

[cloud]
inherit = ["static"]
customise = "cloud-init"

[elsewhere]
inherit = ["static"]
datastore = "no-such-store"

[outside]
inherit = ["static"]
datacenter = "DC7"

[nowhere]
inherit = ["static"]
cluster = ""

[parentless]
inherit = ["static"]
template = "no-such-machine"
"""


@pytest.fixture
def asked(make_driver: MakeDriver, lossy: LossyVcenter, tmp_path: Path) -> Callable[..., Any]:
    """Return what makes and removes a guest of a section, and then gives the request of a method that it took."""
    driver = make_driver(lossy.port)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "guests.toml").write_text(at.TEMPLATES + MORE.replace("{script}", str(script)))

    def ask(section: str, method: str = "CloneVM_Task", **changes: Any) -> ET.Element:
        guest = at.spec("4711.1.0", image_name=section, **changes)
        asyncio.run(_made_and_removed(driver, guest))
        return request(lossy, method)

    return ask


async def _made_and_removed(driver: Any, guest: GuestSpec) -> None:
    try:
        await driver.ensure(guest)
    finally:
        await driver.destroy(guest.name)


def request(lossy: LossyVcenter, method: str) -> ET.Element:
    found = ET.fromstring(lossy.bodies(method)[-1]).find(f".//{_VIM}{method}")  # noqa: S314  # our own request
    assert found is not None
    return found


def text(request: ET.Element, path: str) -> str:
    found = request.find("/".join(f"{_VIM}{word}" for word in path.split(".")))
    assert found is not None, f"{path} is not in the request"
    return found.text or ""


def has(request: ET.Element, path: str) -> bool:
    return request.find("/".join(f"{_VIM}{word}" for word in path.split("."))) is not None


def extra(request: ET.Element, path: str) -> dict[str, str]:
    found = request.findall("/".join(f"{_VIM}{word}" for word in path.split(".")))
    return {text(one, "key"): text(one, "value") for one in found}


def test_a_full_clone_is_a_whole_machine_at_the_named_place_with_the_jobs_size(asked: Callable[..., Any]) -> None:
    clone = asked("static", cpus=3, memory_bytes=(1024 + 3) * 2**20)
    assert text(clone, "name").startswith("carrel-")
    for path in ("folder", "spec.location.pool", "spec.location.host", "spec.location.datastore"):
        assert text(clone, path)
    assert text(clone, "spec.config.numCPUs") == text(clone, "spec.config.numCoresPerSocket") == "3"
    assert text(clone, "spec.config.memoryMB") == "1024", (
        "vSphere takes steps of 4 MiB, and a guest no more than its due"
    )
    assert (text(clone, "spec.powerOn"), text(clone, "spec.template")) == ("false", "false")
    assert not has(clone, "spec.location.diskMoveType")
    assert not has(clone, "spec.snapshot")
    assert not has(clone, "spec.config.cpuAllocation.reservation"), "nobody asked for a reservation"


def test_a_linked_clone_is_a_child_of_the_snapshots_disk_where_that_is(asked: Callable[..., Any]) -> None:
    clone = asked("linked")
    assert text(clone, "spec.location.diskMoveType") == "createNewChildDiskBacking"
    assert text(clone, "spec.snapshot")
    assert not has(clone, "spec.location.datastore")


def test_reservations_and_shares_are_asked_for_in_full_or_by_amount(asked: Callable[..., Any]) -> None:
    whole = asked("reserved", cpus=2, memory_bytes=64 * 2**20)
    assert int(text(whole, "spec.config.cpuAllocation.reservation")) >= 2 * 1000, "MHz of two CPUs of the host"
    assert text(whole, "spec.config.memoryAllocation.reservation") == "64"
    assert text(whole, "spec.config.memoryReservationLockedToMax") == "true"
    assert text(whole, "spec.config.cpuAllocation.shares.shares") == "3000"
    assert text(whole, "spec.config.cpuAllocation.shares.level") == "custom"
    assert text(whole, "spec.config.memoryAllocation.shares.shares") == "7"
    assert text(whole, "spec.config.latencySensitivity.level") == "high"
    part = asked("some")
    assert text(part, "spec.config.cpuAllocation.reservation") == "500"
    assert text(part, "spec.config.memoryAllocation.reservation") == "16"
    assert not has(part, "spec.config.memoryReservationLockedToMax")


def test_the_machine_carries_whose_it_is_and_the_guest_reads_only_what_is_for_it(asked: Callable[..., Any]) -> None:
    clone = asked("scripted", facts={"slurm_conf": "ClusterName=physics\n"})
    found = extra(clone, "spec.config.extraConfig")
    assert set(found) == {
        "carrel.owner",
        "carrel.guest",
        "guestinfo.userdata",
        "guestinfo.userdata.encoding",
        *(
            f"guestinfo.carrel.{name}"
            for name in (
                "slurm_conf",
                "node_name",
                "host_name",
                "domain",
                "dhcp",
                "address",
                "netmask",
                "gateway",
                "dns",
            )
        ),
    }
    assert found["guestinfo.carrel.slurm_conf"] == "ClusterName=physics\n"
    assert found["guestinfo.carrel.address"] == at.spec("4711.1.0").address
    assert gzip.decompress(base64.b64decode(found["guestinfo.userdata"])) == b"#!/bin/sh\necho hello\n"
    assert at.PASSWORD not in ET.tostring(clone, encoding="unicode")


def test_a_guest_is_customised_with_its_name_in_slurm_and_its_address(asked: Callable[..., Any]) -> None:
    spec = asked("static", "CustomizeVM_Task")
    want = at.spec("4711.1.0")
    assert text(spec, "spec.identity.hostName.name") == want.host_name
    assert text(spec, "spec.identity.domain") == "example.org"
    assert text(spec, "spec.nicSettingMap.adapter.ip.ipAddress") == want.address
    assert text(spec, "spec.nicSettingMap.adapter.subnetMask") == "255.255.0.0"
    assert text(spec, "spec.nicSettingMap.adapter.gateway") == "10.9.0.1"
    assert text(spec, "spec.globalIPSettings.dnsServerList") == "10.9.0.1"


def test_a_guest_with_cloud_init_is_told_who_it_is_and_vcenter_customises_nothing(
    asked: Callable[..., Any], lossy: LossyVcenter
) -> None:
    with pytest.raises(NoAddressError):  # it boots nothing, so nobody takes the address
        asked("cloud", boot_timeout_s=5.0)
    found = extra(request(lossy, "CloneVM_Task"), "spec.config.extraConfig")
    assert found["guestinfo.metadata.encoding"] == "gzip+base64"
    told = json.loads(gzip.decompress(base64.b64decode(found["guestinfo.metadata"])))
    want = at.spec("4711.1.0")
    assert (told["instance-id"], told["local-hostname"]) == (want.name, want.host_name)
    card = told["network"]["ethernets"]["first"]
    assert (card["dhcp4"], card["addresses"]) == (False, [f"{want.address}/16"])
    assert card["routes"] == [{"to": "0.0.0.0/0", "via": "10.9.0.1"}]
    assert card["nameservers"] == {"addresses": ["10.9.0.1"], "search": ["example.org"]}
    assert not lossy.bodies("CustomizeVM_Task")


def test_the_first_card_is_put_into_the_port_group_of_either_kind_of_switch(asked: Callable[..., Any]) -> None:
    plain = asked("static")
    assert text(plain, "spec.config.deviceChange.operation") == "edit"
    assert text(plain, "spec.config.deviceChange.device.backing.deviceName") == "VM Network"
    distributed = asked("switched")
    for word in ("portgroupKey", "switchUuid"):
        assert text(distributed, f"spec.config.deviceChange.device.backing.port.{word}")


def test_devices_are_asked_for_and_keep_the_guests_memory_in_place(
    make_driver: MakeDriver, lossy: LossyVcenter, asked: Callable[..., Any]
) -> None:
    try:
        clone = asked("devices")
    except NodeFaultError:  # vcsim knows no such devices; what it was asked for is there all the same
        clone = request(lossy, "CloneVM_Task")
    devices = clone.findall(f"{_VIM}spec/{_VIM}config/{_VIM}deviceChange/{_VIM}device")
    assert [device.get(_TYPE) for device in devices] == [
        "VirtualE1000",
        "VirtualPCIPassthrough",
        "VirtualPCIPassthrough",
        "VirtualSriovEthernetCard",
        "VirtualVmxnet3Vrdma",
    ]
    assert text(devices[1], "backing.allowedDevice.vendorId") == str(0x10DE)
    assert text(devices[1], "backing.allowedDevice.deviceId") == str(0x20B5)
    assert text(devices[2], "backing.vgpu") == "grid_p100-2q"
    assert len({text(device, "key") for device in devices}) == len(devices)
    assert text(clone, "spec.config.memoryReservationLockedToMax") == "true"


def test_an_instant_clone_is_asked_for_with_all_that_it_must_be_told_which_vcsim_cannot_do(
    asked: Callable[..., Any], lossy: LossyVcenter
) -> None:
    with pytest.raises(NodeFaultError, match=rf"instant clone of {at.SOURCE} failed: "):
        asked("instant", facts={"slurmd": "slurmd -N vm47"})
    clone = request(lossy, "InstantClone_Task")
    assert text(clone, "spec.name").startswith("carrel-")
    for path in ("spec.location.folder", "spec.location.pool", "spec.location.host"):
        assert text(clone, path)
    assert text(clone, "spec.location.deviceChange.device.backing.deviceName") == "VM Network"
    found = extra(clone, "spec.config")
    assert found["guestinfo.carrel.node_name"] == at.spec("4711.1.0").host_name
    assert found["guestinfo.carrel.slurmd"] == "slurmd -N vm47"
    assert "carrel.guest" in found
    assert not lossy.bodies("CloneVM_Task")
    assert not lossy.bodies("PowerOnVM_Task")


def test_an_instant_clone_larger_than_its_parent_is_refused_before_it_is_asked_for(
    asked: Callable[..., Any], lossy: LossyVcenter
) -> None:
    with pytest.raises(RefusedError, match=r"has the size of its parent .*, 1 CPUs and 32 MiB, and 2 CPUs"):
        asked("instant", cpus=2)
    assert not lossy.bodies("InstantClone_Task")


@pytest.mark.parametrize(
    ("section", "error", "sentence"),
    [
        ("elsewhere", NodeFaultError, r"has nothing at 'DC0/datastore/no-such-store'; is it its name"),
        ("outside", NodeFaultError, r"datacenter 'DC7' .* is not in drivers\.vsphere\.datacenters: DC0"),
        ("parentless", NodeFaultError, r"has nothing at 'DC0/vm/no-such-machine'"),
        ("nowhere", NodeFaultError, r"has nothing at 'DC0/host/DC0_C0_H0/DC0_C0_H0'"),
        ("smal", NotFoundError, r"no guest template 'smal' in .*guests\.toml"),
    ],
)
def test_what_a_template_names_and_vcenter_has_not_is_named(
    asked: Callable[..., Any], lossy: LossyVcenter, section: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        asked(section)
    assert not lossy.bodies("CloneVM_Task")


@pytest.mark.parametrize(
    ("section", "root", "sentence"),
    [
        ("static", True, r"--guest-root: root in a guest that is a node could read the munge key"),
        ("doubtful", False, r"users cannot become root in guests of doubtful; .*write trusted = true"),
    ],
)
def test_what_holds_the_munge_key_is_cloned_for_nobody_who_could_read_it(
    asked: Callable[..., Any], lossy: LossyVcenter, section: str, *, root: bool, sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence):
        asked(section, root=root)
    assert not lossy.bodies("CloneVM_Task")


def test_a_source_without_a_snapshot_makes_no_linked_clone_and_one_that_is_off_no_instant_one(
    make_driver: MakeDriver, lossy: LossyVcenter, tmp_path: Path
) -> None:
    driver = make_driver(lossy.port)
    source = at.spec("4711.9.0")

    async def story() -> None:
        await driver.ensure(source)
        await driver.suspend(source.name, suspended=True)
        name = f"{at.FOLDER}/carrel-{driver._settings.owner}-{source.name}"
        file = tmp_path / "guests.toml"
        file.write_text(re.sub(r"(?m)^template = .*", f'template = "{name}"', file.read_text()))
        for section, sentence in (
            ("linked", "has no snapshot, and a linked clone"),
            ("instant", "does not run, and an"),
        ):
            with pytest.raises(NodeFaultError, match=sentence):
                await driver.ensure(msgspec.structs.replace(at.spec("4711.8.0"), image_name=section))
        await driver.destroy(source.name)

    asyncio.run(story())
    assert len(lossy.bodies("CloneVM_Task")) == 1
