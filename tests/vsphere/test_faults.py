"""What fails at a vCenter costs a try, never a machine, and never makes two of one."""

import asyncio
import re
import signal
import subprocess  # a driver to be killed
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carrel.errors import NodeFaultError, RefusedError, UnreachableError
from carrel.testing import vcsim as at
from carrel.testing.lossy import Hold, LoseAnswer, LoseRequest, LossyVcenter, Refuse, Rewrite
from carrel.testing.vcsim import Certificates, Vcsim

pytestmark = [pytest.mark.vsphere, pytest.mark.timeout(120)]

MakeDriver = Callable[..., Any]
Machines = Callable[[], list[str]]
StartDriver = Callable[[int], "subprocess.Popen[str]"]
SPEC = at.spec("4711.1.0")


def states(driver: Any) -> list[str]:
    async def look() -> list[str]:
        return [guest.state for guest in await driver.guests()]

    return asyncio.run(look())


def test_a_vcenter_that_does_not_answer_is_not_one_without_guests(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines
) -> None:
    driver = make_driver(lossy.port)

    async def story() -> None:
        await driver.ensure(SPEC)
        lossy.gone = True
        with pytest.raises(UnreachableError, match=r"vCenter 127\.0\.0\.1 did not answer"):
            await driver.guests()
        for verb in (driver.destroy, driver.read, lambda name: driver.enter(name, "a")):
            with pytest.raises(UnreachableError):
                await verb(SPEC.name)
        with pytest.raises(NodeFaultError, match="did not answer"):
            await driver.check()
        lossy.gone = False
        assert [guest.state for guest in await driver.guests()] == ["ready"]
        await driver.destroy(SPEC.name)

    asyncio.run(story())
    assert machines() == []


def test_a_vcenter_that_goes_while_it_clones_leaves_a_machine_that_is_found_and_finished(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines
) -> None:
    def go() -> None:
        lossy.gone = True

    driver = make_driver(lossy.port)
    lossy.once("CloneVM_Task", LoseAnswer(done=go))
    with pytest.raises(UnreachableError):
        asyncio.run(driver.ensure(SPEC))
    lossy.gone = False
    assert states(make_driver()) == ["starting"]

    async def again() -> Any:
        return await make_driver().ensure(SPEC)

    assert asyncio.run(again()).state == "ready"
    assert len(machines()) == 1
    asyncio.run(make_driver().destroy(SPEC.name))
    assert machines() == []


def test_a_request_to_clone_that_never_arrived_is_made_again(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines
) -> None:
    driver = make_driver(lossy.port)
    lossy.once("CloneVM_Task", LoseRequest())

    async def story() -> None:
        with pytest.raises(UnreachableError):
            await driver.ensure(SPEC)
        assert machines() == []
        assert (await driver.ensure(SPEC)).state == "ready"
        assert len(machines()) == 1
        await driver.destroy(SPEC.name)

    asyncio.run(story())


@pytest.mark.parametrize("method", ["CustomizeVM_Task", "PowerOnVM_Task", "ReconfigVM_Task"])
@pytest.mark.parametrize("rule", [LoseRequest(), LoseAnswer()])
def test_whatever_is_lost_on_the_way_the_next_try_goes_on_with_the_same_machine(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines, method: str, rule: Any
) -> None:
    driver = make_driver(lossy.port)
    lossy.once(method, rule)

    async def story() -> None:
        with pytest.raises(UnreachableError):
            await driver.ensure(SPEC)
        guest = await driver.ensure(SPEC)
        assert (guest.state, guest.address) == ("ready", SPEC.address)
        assert len(machines()) == 1
        await driver.destroy(SPEC.name)
        assert machines() == []

    asyncio.run(story())


@pytest.mark.parametrize("method", ["PowerOffVM_Task", "Destroy_Task"])
@pytest.mark.parametrize("rule", [LoseRequest(), LoseAnswer()])
def test_a_destruction_of_which_a_part_was_lost_is_finished_by_the_next(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines, method: str, rule: Any
) -> None:
    driver = make_driver(lossy.port)

    async def story() -> None:
        await driver.ensure(SPEC)
        lossy.once(method, rule)
        with pytest.raises(UnreachableError):
            await driver.destroy(SPEC.name)
        await driver.destroy(SPEC.name)
        assert machines() == []

    asyncio.run(story())


@pytest.mark.parametrize("method", ["CustomizeVM_Task", "PowerOnVM_Task", "PowerOffVM_Task", "Destroy_Task"])
def test_a_machine_that_vcenter_is_busy_with_is_waited_for(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines, method: str
) -> None:
    driver = make_driver(lossy.port)
    for _ in range(3):
        lossy.once(method, Refuse("TaskInProgress", more='<task type="Task">task-1</task>'))

    async def story() -> None:
        assert (await driver.ensure(SPEC)).state == "ready"
        await driver.destroy(SPEC.name)
        assert machines() == []

    asyncio.run(story())
    assert len(lossy.bodies(method)) == 4


def test_a_clone_that_vcenter_begins_and_fails_is_the_hosts_fault_and_leaves_nothing(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines, admin: Callable[[Any], Any]
) -> None:
    driver = make_driver(lossy.port)

    def without_pool(body: bytes) -> bytes:
        return re.sub(rb"<pool.*?</pool>", b"", body)

    source = f"DC0/vm/{at.SOURCE}"
    lossy.once("CloneVM_Task", Rewrite(without_pool))
    admin(lambda instance: _as_template(instance, source))
    try:
        with pytest.raises(NodeFaultError, match=rf"full clone of {at.SOURCE} failed: .*InvalidArgument"):
            asyncio.run(driver.ensure(SPEC))
        assert machines() == []
        assert asyncio.run(make_driver().ensure(SPEC)).state == "ready"
    finally:
        admin(lambda instance: _as_machine(instance, source))
    asyncio.run(make_driver().destroy(SPEC.name))


def test_a_refusal_of_vcenter_is_told_in_its_own_words(make_driver: MakeDriver, lossy: LossyVcenter) -> None:
    driver = make_driver(lossy.port)
    lossy.once("CloneVM_Task", Refuse("InsufficientResourcesFault", text="the host has no memory left."))
    with pytest.raises(NodeFaultError, match=r"failed: the host has no memory left \(InsufficientResourcesFault\)$"):
        asyncio.run(driver.ensure(SPEC))


def test_a_right_that_is_missing_is_named(make_driver: MakeDriver, lossy: LossyVcenter) -> None:
    more = '<object type="Folder">group-1</object><privilegeId>VirtualMachine.Provisioning.Clone</privilegeId>'
    lossy.once("CloneVM_Task", Refuse("NoPermission", more=more))
    with pytest.raises(NodeFaultError, match=r"carrel@vsphere\.local lacks VirtualMachine\.Provisioning\.Clone at 127"):
        asyncio.run(make_driver(lossy.port).ensure(SPEC))


def test_a_login_that_is_refused_tells_nothing_of_guests(make_driver: MakeDriver, lossy: LossyVcenter) -> None:
    lossy.once("Login", Refuse("InvalidLogin", text="Cannot complete login"))
    with pytest.raises(UnreachableError, match=r"refuses carrel@vsphere\.local: is the password current\?"):
        asyncio.run(make_driver(lossy.port).guests())


def test_a_session_that_ran_out_is_opened_anew(make_driver: MakeDriver, lossy: LossyVcenter) -> None:
    driver = make_driver(lossy.port)

    async def story() -> None:
        assert await driver.guests() == ()
        more = '<object type="Folder">group-1</object><privilegeId>System.View</privilegeId>'
        lossy.once("CreateContainerView", Refuse("NotAuthenticated", more=more))
        lossy.once("CreateContainerView", Refuse("NotAuthenticated", more=more))
        with pytest.raises(UnreachableError, match="ended the session twice"):
            await driver.guests()
        lossy.once("CreateContainerView", Refuse("NotAuthenticated", more=more))
        assert await driver.guests() == ()

    asyncio.run(story())


def test_a_caller_that_goes_while_vcenter_clones_leaves_what_destroy_removes(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines
) -> None:
    driver = make_driver(lossy.port)
    hold = Hold(threading.Event(), threading.Event())
    lossy.once("CloneVM_Task", hold)

    async def story() -> None:
        making = asyncio.create_task(driver.ensure(SPEC))
        assert await asyncio.to_thread(hold.arrived.wait, 60)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        destroying = asyncio.create_task(driver.destroy(SPEC.name))
        done, _ = await asyncio.wait([destroying], timeout=0.2)
        assert not done, "it was not waited for the clone, which vCenter makes in any case"
        hold.release.set()
        await destroying
        assert machines() == []

    asyncio.run(story())


def test_a_guest_that_is_destroyed_while_it_is_cloned_is_not_brought_back(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines
) -> None:
    driver = make_driver(lossy.port)
    hold = Hold(threading.Event(), threading.Event())
    lossy.once("CustomizeVM_Task", hold)

    async def story() -> None:
        making = asyncio.create_task(driver.ensure(SPEC))
        assert await asyncio.to_thread(hold.arrived.wait, 60)
        await make_driver().destroy(SPEC.name)
        hold.release.set()
        with pytest.raises(RefusedError):
            await making
        assert machines() == []

    asyncio.run(story())


_DRIVER = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from carrel.drivers.vsphere.driver import VsphereDriver
from carrel.testing import vcsim as at
where, port, ca = sys.argv[1:]
driver = VsphereDriver(at.settings(Path(where), int(port), SimpleNamespace(ca=ca)))
guest = asyncio.run(driver.ensure(at.spec("4711.1.0")))
print(guest.state, guest.started_s, flush=True)
"""


@pytest.fixture
def start(make_driver: MakeDriver, tmp_path: Path, vcenter_certificates: Certificates) -> StartDriver:
    """Return what starts a process that makes the guest."""
    make_driver()  # writes the files that the process reads

    def start(port: int) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", _DRIVER, str(tmp_path), str(port), str(vcenter_certificates.ca)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("method", ["CloneVM_Task", "CustomizeVM_Task", "PowerOnVM_Task", "ReconfigVM_Task"])
def test_a_driver_that_is_killed_at_any_request_leaves_one_machine_and_the_next_goes_on_with_it(
    make_driver: MakeDriver, lossy: LossyVcenter, machines: Machines, start: StartDriver, method: str
) -> None:
    done = threading.Event()

    def kill() -> None:
        victim.send_signal(signal.SIGKILL)
        done.set()

    lossy.once(method, LoseAnswer(done=kill))
    with start(lossy.port) as victim:
        assert done.wait(60)
        victim.wait()
    assert victim.returncode == -signal.SIGKILL

    async def story() -> None:
        driver = make_driver()
        (left,) = await driver.guests()
        assert (left.name, left.run, left.uid) == (SPEC.name, SPEC.run, SPEC.uid), "nobody could tell whose it is"
        guest = await driver.ensure(SPEC)
        assert (guest.state, guest.started_s) == ("ready", left.started_s)
        assert len(machines()) == 1
        await driver.destroy(SPEC.name)
        assert machines() == []

    asyncio.run(story())


def test_two_controllers_that_want_one_guest_get_one_machine(
    make_driver: MakeDriver, machines: Machines, start: StartDriver, vcsim: Vcsim
) -> None:
    with start(vcsim.port) as one, start(vcsim.port) as other:
        said = {one.communicate()[0], other.communicate()[0]}
    assert len(said) == 1, "they made two guests"
    assert said.pop().startswith("ready ")
    assert len(machines()) == 1
    asyncio.run(make_driver().destroy(SPEC.name))


def test_only_what_carries_our_own_mark_is_listed_or_destroyed(
    make_driver: MakeDriver, machines: Machines, admin: Callable[[Any], Any]
) -> None:
    ours, theirs = make_driver(), make_driver(owner="theirs")
    name = f"carrel-{ours._settings.owner}-4799.1.0"

    async def story() -> None:
        await ours.ensure(SPEC)
        await theirs.ensure(SPEC)
        assert [guest.name for guest in await ours.guests()] == [SPEC.name]
        await ours.destroy(SPEC.name)
        assert [guest.state for guest in await theirs.guests()] == ["ready"]
        await theirs.destroy(SPEC.name)
        admin(lambda instance: _copy(instance, name, {}))
        await ours.destroy("4799.1.0")
        assert await ours.guests() == ()
        assert machines() == [name], "a machine without our mark was destroyed for its name"
        with pytest.raises(RefusedError, match="another machine has its name"):
            await ours.ensure(at.spec("4799.1.0"))
        admin(lambda instance: _mark(instance, name, {"carrel.owner": ours._settings.owner, "carrel.guest": "{]"}))
        assert await ours.guests() == (), "a mark that cannot be read is nobody's to sweep"

    try:
        asyncio.run(story())
    finally:
        admin(lambda instance: _destroy(instance, name))


def _find(instance: Any, path: str) -> Any:
    return instance.content.searchIndex.FindByInventoryPath(path)


def _as_template(instance: Any, path: str) -> None:
    machine = _find(instance, path)
    at.done(machine.PowerOffVM_Task())
    machine.MarkAsTemplate()


def _as_machine(instance: Any, path: str) -> None:
    machine = _find(instance, path)
    machine.MarkAsVirtualMachine(pool=_find(instance, "DC0/host/DC0_C0/Resources"))
    at.done(machine.PowerOnVM_Task())


def _copy(instance: Any, name: str, marks: dict[str, str]) -> None:
    from pyVmomi import vim  # noqa: PLC0415  # an extra

    extra = [vim.option.OptionValue(key=key, value=value) for key, value in marks.items()]
    whole = vim.vm.CloneSpec(location=vim.vm.RelocateSpec(), config=vim.vm.ConfigSpec(extraConfig=extra))
    folder = _find(instance, f"DC0/vm/{at.FOLDER}")
    at.done(_find(instance, f"DC0/vm/{at.SOURCE}").CloneVM_Task(folder=folder, name=name, spec=whole))


def _mark(instance: Any, name: str, marks: dict[str, str]) -> None:
    from pyVmomi import vim  # noqa: PLC0415  # an extra

    extra = [vim.option.OptionValue(key=key, value=value) for key, value in marks.items()]
    at.done(_find(instance, f"DC0/vm/{at.FOLDER}/{name}").ReconfigVM_Task(vim.vm.ConfigSpec(extraConfig=extra)))


def _destroy(instance: Any, name: str) -> None:
    machine = _find(instance, f"DC0/vm/{at.FOLDER}/{name}")
    if machine is not None:
        at.done(machine.Destroy_Task())
