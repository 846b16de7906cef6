"""A server that cannot show that it is vCenter gets neither the password nor a request."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from carrel.errors import NodeFaultError, UnreachableError
from carrel.testing.lossy import LossyVcenter
from carrel.testing.vcsim import Certificates

pytestmark = [pytest.mark.vsphere, pytest.mark.timeout(60)]

MakeDriver = Callable[..., Any]


def test_a_certificate_that_leads_to_the_named_authority_is_accepted(make_driver: MakeDriver) -> None:
    word, why = asyncio.run(make_driver().check())
    assert word == "vsphere"
    assert "at 127.0.0.1" in why


def test_one_of_another_authority_is_refused_also_on_this_machine(
    make_driver: MakeDriver, lossy: LossyVcenter, vcenter_certificates: Certificates
) -> None:
    driver = make_driver(lossy.port, ca_file=str(vcenter_certificates.other_ca))
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1 is not trusted: .*; set drivers\.vsphere\.ca_file"):
        asyncio.run(driver.guests())
    assert lossy.requests == [], "something was told to a server that is not trusted"


def test_one_that_this_machine_does_not_know_is_refused_where_no_authority_is_named(
    make_driver: MakeDriver, lossy: LossyVcenter
) -> None:
    with pytest.raises(NodeFaultError, match="is not trusted"):
        asyncio.run(make_driver(lossy.port, ca_file="").check())
    assert lossy.requests == []


def test_one_for_another_name_is_refused(make_driver: MakeDriver, lossy: LossyVcenter) -> None:
    with pytest.raises(UnreachableError, match=r"localhost is not trusted: .*[Hh]ostname mismatch"):
        asyncio.run(make_driver(lossy.port, server="localhost").guests())
    assert lossy.requests == []


def test_a_file_that_holds_no_certificate_is_named(make_driver: MakeDriver, vcenter_certificates: Certificates) -> None:
    for path in (vcenter_certificates.key, vcenter_certificates.key.with_name("absent")):
        with pytest.raises(NodeFaultError, match=rf"drivers\.vsphere\.ca_file = {path}: "):
            asyncio.run(make_driver(ca_file=str(path)).guests())


def test_nobody_at_the_port_is_nobody_who_answers(make_driver: MakeDriver) -> None:
    with pytest.raises(UnreachableError, match=r"did not answer: .*refused"):
        asyncio.run(make_driver(1).guests())
