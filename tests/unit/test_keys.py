"""No guest in which a user can be root, or whose image a user brought, holds the munge key."""

import itertools

import pytest

from carrel.core.keys import ImageTrust, may_hold_key, refuse_key
from carrel.errors import RefusedError
from carrel.model.guest import GuestRequest

SITES = ImageTrust(name="rocky9-node", from_site=True, trusted=True)


def test_the_sites_trusted_image_may_hold_it_where_slurmd_runs_inside() -> None:
    assert may_hold_key(GuestRequest(image="rocky9-node"), SITES, slurmd="guest").allowed
    refuse_key(GuestRequest(image="rocky9-node"), SITES, slurmd="guest")


@pytest.mark.parametrize(
    ("request_", "image", "sentence"),
    [
        (GuestRequest(image="i", root=True), SITES, "--guest-root: root in a guest .* leave out --guest-root"),
        (
            GuestRequest(image="i"),
            ImageTrust(name="mine", from_site=False, trusted=True),
            "image mine was brought by a user",
        ),
        (GuestRequest(image="i"), ImageTrust(name="i", from_site=True, trusted=False), "write trusted = true"),
        (
            GuestRequest(image="i"),
            ImageTrust(name="i", from_site=True, trusted=True, user_data=True),
            "runs a script of the request as root",
        ),
    ],
)
def test_a_guest_that_could_give_it_away_is_refused_with_a_sentence(
    request_: GuestRequest, image: ImageTrust, sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence):
        refuse_key(request_, image, slurmd="guest")


def test_one_fact_against_it_is_enough_whatever_the_others_say() -> None:
    for root, from_site, trusted, script in itertools.product((True, False), repeat=4):
        image = ImageTrust(name="i", from_site=from_site, trusted=trusted, user_data=script)
        allowed = may_hold_key(GuestRequest(image="i", root=root), image, slurmd="guest").allowed
        assert allowed == (not root and from_site and trusted and not script)


def test_beside_its_host_s_slurmd_no_guest_holds_it_and_none_is_refused() -> None:
    for root, trusted in itertools.product((True, False), repeat=2):
        image = ImageTrust(name="i", from_site=trusted, trusted=trusted)
        assert not may_hold_key(GuestRequest(image="i", root=root), image, slurmd="host").allowed
        refuse_key(GuestRequest(image="i", root=root), image, slurmd="host")
