"""A guest is ready when it has an address of its own: not an interim one, and not that of what it was cloned from."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from carrel.errors import NoAddressError, RefusedError
from carrel.testing import vcsim as at

pytestmark = [pytest.mark.vsphere, pytest.mark.timeout(120)]

MakeDriver = Callable[..., Any]
Admin = Callable[[Callable[[Any], Any]], Any]
PARENT = "10.8.0.5"
DHCP = at.spec("4711.1.0", image_name="dhcp", address="")


@pytest.fixture
def parent(admin: Admin) -> Iterator[str]:
    """Give what is cloned an address, as a parent that runs has one."""
    path = f"DC0/vm/{at.SOURCE}"
    admin(lambda instance: at.set_address(instance, path, PARENT))
    yield PARENT
    admin(lambda instance: at.set_address(instance, path, ""))


def test_a_guest_waits_for_its_own_address(make_driver: MakeDriver, admin: Admin, parent: str) -> None:
    driver = make_driver()
    path = f"DC0/vm/{at.FOLDER}/carrel-{driver._settings.owner}-{DHCP.name}"

    async def story() -> None:
        making = asyncio.create_task(driver.ensure(DHCP))
        while not await driver.guests():  # noqa: ASYNC110  # vCenter tells nobody
            await asyncio.sleep(0.01)
        for address in ("169.254.3.4", parent, "127.0.0.1"):
            admin(partial(at.set_address, path=path, address=address))
            done, _ = await asyncio.wait([making], timeout=0.2)
            assert not done, f"{address} was taken for the guest's own"
        admin(lambda instance: at.set_address(instance, path, "10.8.0.77"))
        guest = await making
        assert (guest.state, guest.address) == ("ready", "10.8.0.77")
        assert [word for word, _ in guest.phases] == ["clone", "start", "address"]
        (listed,) = await make_driver().guests()
        assert listed == guest, "another process knows something else of it"
        await driver.destroy(DHCP.name)

    asyncio.run(story())


def test_a_guest_that_never_gets_one_is_told_apart_and_can_be_removed(make_driver: MakeDriver) -> None:
    driver = make_driver()

    async def story() -> None:
        with pytest.raises(NoAddressError, match=r"got no address of its own in 5 s .* VMware's tools"):
            await driver.ensure(msgspec.structs.replace(DHCP, boot_timeout_s=5.0))
        assert [guest.state for guest in await driver.guests()] == ["starting"]
        await driver.destroy(DHCP.name)
        assert await driver.guests() == ()

    asyncio.run(story())


def test_an_address_of_the_pool_is_the_guests_and_a_static_template_without_one_is_refused(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver()
    static = at.spec("4711.2.0", address="10.9.200.1")

    async def story() -> None:
        assert (await driver.ensure(static)).address == "10.9.200.1"
        await driver.destroy(static.name)
        with pytest.raises(RefusedError, match=r"static has dhcp = false, and guest 4711\.3\.0 was given no address"):
            await driver.ensure(at.spec("4711.3.0", address=""))
        assert await driver.guests() == ()

    asyncio.run(story())


def test_a_guest_that_was_switched_off_is_down_and_not_made_anew(make_driver: MakeDriver, admin: Admin) -> None:
    driver = make_driver()
    spec = at.spec("4711.4.0")

    async def story() -> None:
        await driver.ensure(spec)
        path = f"DC0/vm/{at.FOLDER}/carrel-{driver._settings.owner}-{spec.name}"
        admin(lambda instance: at.done(instance.content.searchIndex.FindByInventoryPath(path).PowerOffVM_Task()))
        (guest,) = await driver.guests()
        assert (guest.state, guest.reason) == ("down", "its virtual machine is switched off")
        down = pytest.raises(RefusedError, match="is down: its virtual machine is switched off")
        with down:
            await driver.ensure(spec)
        with down:
            await driver.enter(spec.name, "a")
        await driver.destroy(spec.name)

    asyncio.run(story())
