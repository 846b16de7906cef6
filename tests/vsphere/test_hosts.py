"""What vCenter has becomes the table of hosts, and what others' machines take of it is nobody's to promise."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import main
from carrel.errors import NodeFaultError
from carrel.testing import vcsim as at
from carrel.testing.daemons import ControllerProcess
from carrel.testing.vcsim import Certificates, Vcsim

pytestmark = [pytest.mark.vsphere, pytest.mark.timeout(120)]

MakeDriver = Callable[..., Any]
Admin = Callable[[Callable[[Any], Any]], Any]
MIB = 2**20


def test_each_host_has_its_cores_and_memory_and_others_machines_count_and_guests_do_not(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver()

    async def story() -> None:
        before = {host.name: host for host in await driver.hosts(cluster="DC0_C0")}
        assert set(before) == {"DC0_C0_H0", "DC0_C0_H1"}
        (source,) = [host for host in before.values() if host.cpus_used]
        assert (source.cpus_used, source.memory_used_bytes) == (1, 32 * MIB), "the one machine of the cluster"
        assert all(host.state == "up" and host.cpus > 0 and host.memory_bytes > 0 for host in before.values())
        spec = at.spec("4711.1.0", cpus=1)
        await driver.ensure(spec)
        assert {host.name: host for host in await driver.hosts(cluster="DC0_C0")} == before
        others = {host.name: host for host in await make_driver(owner="theirs").hosts(cluster="DC0_C0")}
        assert others[spec.node].cpus_used == before[spec.node].cpus_used + 1
        await driver.destroy(spec.name)
        assert {"DC0_H0", *before} == {host.name for host in await driver.hosts()}

    asyncio.run(story())


def test_a_host_in_maintenance_is_no_place_for_a_guest(make_driver: MakeDriver, admin: Admin) -> None:
    admin(lambda instance: maintenance(instance, on=True))
    try:
        found = {host.name: host for host in asyncio.run(make_driver().hosts(cluster="DC0_C0"))}
    finally:
        admin(lambda instance: maintenance(instance, on=False))
    assert (found["DC0_C0_H1"].state, found["DC0_C0_H1"].reason) == ("drained", "in maintenance mode")
    assert found["DC0_C0_H0"].state == "up"


def test_a_cluster_that_is_not_there_is_named(make_driver: MakeDriver) -> None:
    with pytest.raises(NodeFaultError, match="has nothing at 'DC0/host/C9'"):
        asyncio.run(make_driver().hosts(cluster="C9"))


def maintenance(instance: Any, *, on: bool) -> None:
    host = instance.content.searchIndex.FindByInventoryPath("DC0/host/DC0_C0/DC0_C0_H1")
    at.done(host.EnterMaintenanceMode_Task(timeout=0) if on else host.ExitMaintenanceMode_Task(timeout=0))


@pytest.fixture
def controller(vcsim: Vcsim, vcenter_certificates: Certificates, tmp_path: Path) -> Iterator[ControllerProcess]:
    directory = Path(tempfile.mkdtemp(prefix="cvsp"))
    directory.chmod(0o755)
    settings = at.settings(tmp_path, vcsim.port, vcenter_certificates)
    words = ("server", "port", "user", "password_file", "ca_file", "owner", "datacenters", "folder", "template_file")
    lines = [f"{word} = {json.dumps(getattr(settings, word))}" for word in words]
    process = ControllerProcess(directory, extra="[drivers.vsphere]\n" + "\n".join(lines) + "\n")
    process.start()
    yield process
    process.kill()
    shutil.rmtree(directory)


@pytest.mark.usefixtures("vcsim")
def test_a_person_imports_them_once_or_again(
    controller: ControllerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARREL_CONFIG", str(controller.config))
    for _ in range(2):
        assert main.run(["host", "import", "--cluster", "DC0_C0"]) == 0
        assert "DC0_C0_H0: 2 CPUs, 4G" in capsys.readouterr().out.replace("4.0G", "4G")
    assert main.run(["host", "list", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"DC0_C0_H0", "DC0_C0_H1"}
    assert sum(row["cpus_others"] for row in rows.values()) == 1
    assert main.run(["host", "import", "--cluster", "C9"]) == 4
    assert "has nothing at 'DC0/host/C9'" in capsys.readouterr().err


def test_what_vcenter_rests_is_drained_until_it_goes_on_and_what_a_person_drained_stays_so(
    controller: ControllerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], admin: Admin
) -> None:
    monkeypatch.setenv("CARREL_CONFIG", str(controller.config))

    def imported() -> dict[str, str]:
        assert main.run(["host", "import", "--cluster", "DC0_C0"]) == 0
        capsys.readouterr()
        assert main.run(["host", "list", "--json"]) == 0
        rows = map(json.loads, capsys.readouterr().out.splitlines())
        return {row["name"]: f"{row['state']} {row['reason']}".strip() for row in rows}

    admin(lambda instance: maintenance(instance, on=True))
    try:
        assert imported() == {"DC0_C0_H0": "up", "DC0_C0_H1": "drained vCenter: in maintenance mode"}
    finally:
        admin(lambda instance: maintenance(instance, on=False))
    assert main.run(["host", "drain", "DC0_C0_H0", "--reason", "new disks"]) == 0
    assert imported() == {"DC0_C0_H0": "drained new disks", "DC0_C0_H1": "up"}
