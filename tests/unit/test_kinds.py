"""Which hosts a job's guests may go to: those of the driver that it asked for."""

import pytest

from carrel.config import Config, GuestNodes, Guests
from carrel.daemons.kinds import Kind, Kinds
from carrel.errors import RefusedError
from carrel.model.guest import GuestRequest
from carrel.model.template import Recipe

FULL = Recipe(clone="full")


class Far:
    """Hosts that one driver reaches."""

    hosts = frozenset({"esx-1", "esx-2"})
    why_silent = ""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def recipe(self, request: GuestRequest) -> Recipe:
        assert request.image
        return self._recipe


def site(
    *, hosts: str = "h[1-2]", recipe: Recipe = FULL, driver: str = "qemu", has_addresses: bool = False
) -> tuple[Kinds, Far]:
    settings = Config(
        guest_nodes=GuestNodes(hosts=hosts, remote={"vsphere": "esx-[1-2]"}), guests=Guests(driver=driver)
    )
    far = Far(recipe)
    return Kinds(settings, {"vsphere": far}, has_addresses=has_addresses), far


def asks(driver: str = "") -> GuestRequest:
    return GuestRequest(image="i", driver=driver)


def test_a_job_goes_to_the_hosts_of_its_driver_alone() -> None:
    kinds, _ = site()
    assert kinds.of(asks("vsphere")) == Kind(driver="vsphere", clone="full")
    assert kinds.of(asks()) == kinds.of(asks("qemu")) == Kind(driver="", clone="instant")
    theirs, others = kinds.only("vsphere"), kinds.only("")
    assert theirs
    assert others
    assert [theirs(host) for host in ("h1", "esx-1")] == [False, True]
    assert [others(host) for host in ("h1", "esx-1", "added-by-hand")] == [True, False, True]


def test_without_a_word_it_goes_where_the_site_says_or_where_there_are_hosts_at_all() -> None:
    assert site(driver="vsphere")[0].driver(asks()) == "vsphere"
    assert site(hosts="")[0].driver(asks()) == "vsphere"
    assert site(hosts="")[0].driver(asks("qemu")) == ""
    assert site()[0].driver(asks()) == ""


def test_guests_without_an_address_are_refused_where_the_site_has_no_pool() -> None:
    pooled = Recipe(clone="linked", pooled=True)
    with pytest.raises(RefusedError, match=r"guests of i have no address of their own.* placement\.addresses"):
        site(recipe=pooled)[0].of(asks("vsphere"))
    assert site(recipe=pooled, has_addresses=True)[0].of(asks("vsphere")).pooled


def test_hosts_of_a_driver_that_cannot_tell_are_silent_at_once() -> None:
    kinds, far = site()
    assert kinds.hosts == {"h1", "h2", "esx-1", "esx-2"}
    assert not kinds.silent()
    far.why_silent = "vCenter did not answer"
    assert kinds.silent() == {"esx-1", "esx-2"}
    assert kinds.why_silent("vsphere") == "vCenter did not answer"


def test_where_all_hosts_have_a_carreld_nobody_asks_which_they_are() -> None:
    plain = Kinds(Config(guest_nodes=GuestNodes(hosts="h1")), {}, has_addresses=False)
    assert plain.only(plain.driver(asks("anything"))) is None


def test_a_driver_of_which_there_is_no_host_is_refused_and_nobody_waits_for_one() -> None:
    with pytest.raises(RefusedError, match="no host makes guests with driver 'qemu'; known: vsphere"):
        site(hosts="")[0].of(asks("qemu"))
    assert site()[0].of(asks("podman")).driver == "", "its hosts know which drivers they have"
