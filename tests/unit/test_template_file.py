"""The template file of guests that are nodes: inheritance, ranges, and the sentence for what is wrong."""

import re
from pathlib import Path

import msgspec
import pytest

from carrel.core import templates
from carrel.errors import CarrelError, NotFoundError
from carrel.model.template import GuestTemplate

FILE = """
[base]
template = "debian12-node"
cluster = "C0"
datastore = "ds{1:2}"
cpus = 2
memory_mib = 2048
dns = ["10.0.0.1"]

[static]
dhcp = false
netmask = "255.255.255.0"
gateway = "10.0.0.1"

[large]
inherit = ["base", "static"]
cpus = 16
clone = "linked"
trusted = true

[guests."vm{01:04}"]
inherit = ["large"]
host = "esx-{{1:2}}.example.org"
address = "10.0.0.{11:14}"
memory_reservation = true

[guests.vm-gpu]
inherit = ["base"]
vgpu = "grid_p100-2q"
cpu_reservation = 4000
"""


SHARED = """
[s]
template = "t"
dhcp = false
netmask = "255.0.0.0"
[guests."a{1:2}"]
inherit = ["s"]
address = "10.0.0.{1:2}"
[guests.b]
inherit = ["s"]
address = "10.0.0.2"
"""


def parse(text: str) -> templates.TemplateFile:
    return templates.parse(text, where="t.toml")


def test_a_section_has_what_it_inherits_and_its_own_keys_win() -> None:
    assert parse(FILE).section("large") == GuestTemplate(
        template="debian12-node",
        cluster="C0",
        datastore="ds{1:2}",
        cpus=16,
        memory_mib=2048,
        dns=("10.0.0.1",),
        dhcp=False,
        netmask="255.255.255.0",
        gateway="10.0.0.1",
        clone="linked",
        trusted=True,
    )


def test_ranges_of_named_guests_are_put_in_in_turn_or_in_blocks() -> None:
    rows = [(g.name, g.template.host, g.template.datastore, g.template.address) for g in parse(FILE).guests]
    assert rows == [
        ("vm01", "esx-1.example.org", "ds1", "10.0.0.11"),
        ("vm02", "esx-1.example.org", "ds2", "10.0.0.12"),
        ("vm03", "esx-2.example.org", "ds1", "10.0.0.13"),
        ("vm04", "esx-2.example.org", "ds2", "10.0.0.14"),
        ("vm-gpu", "", "ds1", ""),
    ]


def test_a_reservation_is_all_or_an_amount() -> None:
    by_name = {guest.name: guest.template for guest in parse(FILE).guests}
    assert by_name["vm01"].memory_reservation is True
    assert by_name["vm-gpu"].cpu_reservation == 4000


def test_of_two_parents_the_later_one_wins() -> None:
    text = '[a]\ncpus = 1\nfolder = "f"\n[b]\ncpus = 2\n[ab]\ninherit = ["a", "b"]\n[ba]\ninherit = ["b", "a"]\n'
    found = parse(text)
    assert (found.section("ab").cpus, found.section("ba").cpus) == (2, 1)
    assert found.section("ab").folder == "f"


def test_a_grandparent_counts_as_its_child_does() -> None:
    text = '[a]\ncpus = 1\n[b]\ninherit = ["a"]\nfolder = "f"\n[c]\ncpus = 9\n[d]\ninherit = ["c", "b"]\n'
    assert parse(text).section("d").cpus == 1


def test_blocks_that_do_not_come_out_even_leave_nobody_without() -> None:
    assert [templates.nth("h{{1:2}}", index, 5) for index in range(5)] == ["h1", "h1", "h1", "h2", "h2"]


def test_the_chosen_host_stands_in_for_its_placeholder_and_for_the_sections_own() -> None:
    made = templates.for_guest(GuestTemplate(template="{host}.t", host="esx-{1:4}"), host="esx-9")
    assert (made.template, made.host) == ("esx-9.t", "esx-9")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[a]\ncpuz = 1\n", r"unknown key a\.cpuz \(did you mean cpus\?\)"),
        ("[a]\nmemory = 4\n", r"unknown key a\.memory \(write memory_mib\)"),
        ('[a]\nguest_password = "x"\n', r"unknown key a\.guest_password \(nobody logs in"),
        ("cpus = 4\n", r"cpus must be a table"),
        ("[a]\ninherit = ['b']\n[bb]\n", r"a\.inherit: no section 'b' \(did you mean bb\?\)"),
        ("[a]\ninherit = ['b']\n[b]\ninherit = ['a']\n", r"a inherits from b inherits from a; break the circle"),
        ("[a]\ninherit = 'b'\n[b]\n", r"a\.inherit must be a list"),
        ("[a]\ncpus = 'two'\n", r"t\.toml: a: Expected `?int"),
        ("[a]\nclone = 'linkd'\n", r"t\.toml: a: clone = 'linkd'; give full, linked, instant"),
        ("[a]\nfolder = 'f{1:2}'\n", r"a\.folder = 'f\{1:2\}' holds a range; only host, datastore"),
        ("[a]\nhost = 'h{4:2}'\n", r"a\.host: .* a range goes up"),
        ("[a]\nhost = 'h{1:2}{1:2}'\n", r"has 2 ranges, and may have one"),
        ("[a]\nhost = 'h{1:99999999999999999999}'\n", r"by at most 65536 values"),
        ("[a]\naddress = '10.0.0.300'\n", r"address = '10\.0\.0\.300' is no address"),
        ("[a]\naddress = '10.0.0.{250:260}'\n", r"address = '10\.0\.0\.256' is no address"),
        ("[a]\nnetmask = 'wide'\n", r"netmask = 'wide' is no netmask"),
        (
            "[guests.'vm{1:3}']\ntemplate='t'\ndhcp=false\nnetmask='255.0.0.0'\naddress='10.0.0.{1:2}'\n",
            r"address has 2 values for 3 guests, and each needs its own",
        ),
        ("[guests.'vm_1']\ntemplate='t'\n", r"'vm_1' is no host name"),
        ("[guests.'a{1:2}']\ntemplate='t'\n[guests.a2]\ntemplate='t'\n", r"guest a2 is there twice"),
        (
            SHARED,
            r"address 10\.0\.0\.2 is there twice",
        ),
        ("[guests.'a{1:3}']\ntemplate='t'\nhost_name='n{1:2}'\n", r"host_name has 2 values for 3 guests"),
        ("[a]\ngateway = 'door'\n", r"gateway = 'door' is no address"),
        ("[a]\ndns = ['10.0.0.1', 'name']\n", r"dns = 'name' is no address"),
        ("[a]\nhost = 'h{0:65536}'\n", r"by at most 65536 values"),
        ("[guests.a]\n", r"guests\.\"a\": no template; name the VM"),
        ("[guests.a]\ntemplate='t'\naddress='10.0.0.1'\n", r"exclude each other; write dhcp = false"),
        ("[guests.a]\ntemplate='t'\ndhcp=false\n", r"dhcp = false and no netmask"),
        ("[a]\ndevices=['0000:3b:00.0']\n", r"a\.devices: '0000:3b:00\.0' is no vendor and device id"),
        ("[a", r"t\.toml: not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_the_next_step(text: str, sentence: str) -> None:
    with pytest.raises(CarrelError, match=sentence):
        parse(text)


def test_an_unknown_section_is_not_found_and_the_known_ones_are_named() -> None:
    with pytest.raises(
        NotFoundError, match=r"no guest template 'lrge' in t\.toml \(did you mean large\?\); known: base"
    ):
        parse(FILE).section("lrge")


def test_every_key_has_its_row_in_the_reference_and_the_reference_has_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "template-file.md").read_text()
    rows = [line.split("|")[1] for line in page.partition("## Keys")[2].partition("\n\nNot here")[0].splitlines()[2:]]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert named == {"inherit", *(field.name for field in msgspec.structs.fields(GuestTemplate))}


KEPT = (
    *("template", "datacenter", "cluster", "host", "resource_pool", "datastore", "port_group", "netmask", "gateway"),
    *("domain", "dns", "latency", "cpu_reservation", "memory_reservation", "cpu_shares", "memory_shares", "vgpu"),
    *("sriov_port_group", "pvrdma_port_group"),
)
ELSEWHERE = (
    *("cpu", "memory", "vm_folder", "linked", "instant", "is_dhcp", "ip", "guest_hostname", "device", "pf", "power"),
    *("guest_username", "guest_password", "script", "sequence", "barrier"),
)


def test_most_keys_of_cluster_config_are_the_same_here() -> None:
    assert set(KEPT) <= {field.name for field in msgspec.structs.fields(GuestTemplate)}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_others_of_its_keys_are_told_what_there_is_instead(key: str) -> None:
    with pytest.raises(CarrelError, match=rf"unknown key a\.{key} \((?!did you mean)"):
        parse(f"[a]\n{key} = 'x'\n")


def test_host_names_may_be_ranges_and_each_guest_gets_its_own() -> None:
    found = parse("[guests.'a{1:2}']\ntemplate = 't'\nhost_name = 'n{09:10}'\n").guests
    assert [one.template.host_name for one in found] == ["n09", "n10"]


def test_a_range_may_have_so_many_values_and_not_one_more() -> None:
    assert len(templates.expand("h{1:65536}")) == templates.COUNT_MAX
    assert templates.expand("h{3:3}") == ("h3",)


def test_one_guest_of_a_section_takes_the_first_of_each_range() -> None:
    made = templates.for_guest(GuestTemplate(host="h{{1:2}}", datastore="d{1:2}"))
    assert (made.host, made.datastore) == ("h1", "d1")


def test_a_device_is_named_by_vendor_and_kind() -> None:
    assert parse('[a]\ndevices = ["10de:20B5"]\n').section("a").devices == ("10de:20B5",)


def test_a_file_without_sections_says_so() -> None:
    with pytest.raises(NotFoundError, match=r"known: none$"):
        parse("").section("a")
