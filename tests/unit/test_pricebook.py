"""The price book's file, and the books made of what a site has."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.core import imports, pricebook
from carrel.errors import CarrelError
from carrel.model.price import MILLION, PriceBook, PriceList, Rate, Version

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
HEAD = '[[version]]\nname = "a"\nvalid_from = 2026-01-01\n'
TEXT = (
    HEAD
    + """
qos = { premium = 2, low = 0.5 }
[version.default]
rates = { cpu = 0 }
[version.partition.gpu]
mode = "max_tres"
rates = { cpu = 1.25, mem = "0.25G", "gres/gpu:a100" = 4, guest = 0.000001, "bb/dw" = "1T" }
[[version]]
name = "b"
valid_from = 2025-07-01T02:00:00+02:00
"""
)


def test_a_book_is_read_with_its_versions_in_order() -> None:
    book = pricebook.parse(TEXT, where="x")
    assert [(version.name, version.valid_from) for version in book.versions] == [
        ("b", datetime(2025, 7, 1, tzinfo=UTC)),
        ("a", MOMENT),
    ]
    newest = book.versions[1]
    assert newest.qos_millionths == {"premium": 2 * MILLION, "low": 500_000}
    assert newest.default == PriceList(rates={"cpu": Rate(0)})
    assert newest.partitions["gpu"] == PriceList(
        mode="max_tres",
        rates={
            "cpu": Rate(1_250_000),
            "mem": Rate(250_000, 1024),
            "gres/gpu:a100": Rate(4 * MILLION),
            "guest": Rate(1),
            "bb/dw": Rate(MILLION, 2**20),
        },
    )


def test_what_is_written_reads_the_same() -> None:
    book = pricebook.parse(TEXT, where="x")
    assert pricebook.parse(pricebook.text(book), where="y") == book


@given(st.integers(0, 10**15), st.sampled_from(["", "G", "T", "P"]), st.text(min_size=1))
def test_any_price_and_any_name_survive_the_file(micro_su: int, suffix: str, name: str) -> None:
    each = pricebook.rate("mem", f"{Decimal(micro_su).scaleb(-6)}{suffix}", where="x")
    listed = PriceList(rates={"mem": each})
    book = PriceBook((Version(name=name, valid_from=MOMENT, partitions={name: listed}),))
    assert pricebook.parse(pricebook.text(book), where="y") == book


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "x: no [[version]], so nothing has a price"),
        ("version = 1", "x: no [[version]]"),
        ("[[version]", "x: not TOML"),
        ("[[version]]\nvalid_from = 2026-01-01\n", "x: version 1: no name"),
        ('[[version]]\nname = "a"\n', "x: version 1: valid_from must be a date"),
        ('[[version]]\nname = "a"\nvalid_from = 2026-01-01T00:00:00\n', "has no offset; write 2026-01-01T00:00:00Z"),
        ('[[version]]\nname = "a"\nvalid_from = 2026-01-01T00:00:00.5Z\n', "must be a whole second"),
        (HEAD + HEAD, "x: versions 'a' and 'a' are valid from the same moment"),
        (HEAD + HEAD.replace("2026", "2027"), "x: two versions have one name"),
        (HEAD + "price = 1\n", "x: version 1: unknown key price; known: name"),
        (HEAD + "[version.default]\nmode = 'min'\n", "x: version 1: default: mode 'min'; known: sum, max_tres"),
        (HEAD + "[version.default]\nrates = { gpu = 1 }\n", "'gpu' has no price of its own; priced are cpu, mem"),
        (HEAD + "[version.default]\nrates = { energy = 1 }\n", "'energy' has no price of its own"),
        (HEAD + "[version.default]\nrates = { cpu = '1G' }\n", "only mem and bb/NAME have a unit"),
        (HEAD + "[version.default]\nrates = { cpu = -1 }\n", "-1 is no price; it must be 0 or more"),
        (HEAD + "[version.default]\nrates = { cpu = nan }\n", "is no price; it must be 0 or more, and finite"),
        (HEAD + "[version.default]\nrates = { cpu = inf }\n", "is no price; it must be 0 or more, and finite"),
        (HEAD + "[version.default]\nrates = { cpu = 1e999999 }\n", "more than 12 digits on one side"),
        (HEAD + "[version.default]\nrates = { cpu = 1e-13 }\n", "more than 12 digits on one side"),
        (HEAD + "[version.default]\nrates = { cpu = true }\n", "True is no number"),
        (HEAD + "[version.default]\nrates = { cpu = 'x' }\n", "'x' is no number"),
        (HEAD + "[version.default]\nrates = 1\n", "must be a table, not 1"),
        (HEAD + "qos = { a = 0.0000001 }\n", "more than six decimals"),
    ],
)
def test_a_wrong_book_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(CarrelError) as refused:
        pricebook.parse(text, where="x")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("weight", "resource", "rate"),
    [
        ("CPU=1.5", "cpu", Rate(1_500_000)),
        ("cpu=2K", "cpu", Rate(2 * MILLION, 1024)),
        ("Mem=0.25G", "mem", Rate(250_000, 1024)),
        ("mem=1T", "mem", Rate(MILLION, 2**20)),
        ("mem=1p", "mem", Rate(MILLION, 2**30)),
        ("Mem=1M", "mem", Rate(MILLION)),
        ("Mem=1K", "mem", Rate(MILLION)),
        ("Mem=0.5", "mem", Rate(500_000)),
        ("GRES/gpu:a100=3", "gres/gpu:a100", Rate(3 * MILLION)),
        ("license/Matlab=1e-1", "license/Matlab", Rate(100_000)),
        ("BB/dw=1G", "bb/dw", Rate(MILLION, 1024)),
        ("node=0", "node", Rate(0)),
    ],
)
def test_a_weight_means_what_it_means_to_slurm(weight: str, resource: str, rate: Rate) -> None:
    assert imports.weights(weight, where="x") == {resource: rate}


@pytest.mark.parametrize("weight", ["cpu", "cpu=", "cpu=-1", "cpu=1X", "energy=1", "cpu=nan", "=1", "cpu=1..2"])
def test_a_weight_that_has_no_price_is_refused(weight: str) -> None:
    with pytest.raises(CarrelError, match=r"^x: "):
        imports.weights(weight, where="x")


def test_a_partition_without_weights_is_billed_by_its_cpus() -> None:
    book = imports.from_weights(
        {"a": "", "b": "Mem=1G"}, priority_flags="MAX_TRES", su=Decimal("0.1"), name="n", valid_from=MOMENT
    )
    assert book.versions[0].partitions == {
        "a": PriceList(rates={"cpu": Rate(100_000)}, mode="max_tres"),
        "b": PriceList(rates={"mem": Rate(100_000, 1024)}, mode="max_tres"),
    }


@pytest.mark.parametrize(
    ("flags", "mode"), [("", "sum"), ("DEPTH_OBLIVIOUS,MAX_TRES", "max_tres"), ("MAX_TRES_GRES", "max_tres_gres")]
)
def test_the_priority_flags_are_the_mode(flags: str, mode: str) -> None:
    assert imports.mode(flags) == mode


MYBRC = """
[Enable]
enable_job_submit_plugin = true
enable_spank_plugin = false
[PartitionPrice]
savio = 0.75
savio2_gpu = 2.67
free = 0
[QosMultiplier]
low = 0.5
[API]
url = "https://bank.example/api"
token = "Token 0123"
"""


def test_a_bank_config_keeps_its_prices_and_switches() -> None:
    found = imports.mybrc(MYBRC, where="x")
    assert (found.at_submit, found.at_start, found.at_end) == (True, False, False)
    assert (found.url, found.token) == ("https://bank.example/api", "Token 0123")
    version = imports.from_mybrc(found, unlisted="refuse", name="m", valid_from=MOMENT).versions[0]
    assert {name: listed.rates["cpu"] for name, listed in version.partitions.items()} == {
        "savio": Rate(750_000),
        "savio2_gpu": Rate(2_670_000),
        "free": Rate(0),
    }
    assert version.qos_millionths == {"low": 500_000}
    assert version.list_of("unlisted") is None


def test_an_unlisted_partition_is_free_only_where_the_site_says_so() -> None:
    found = imports.mybrc(MYBRC, where="x")
    version = imports.from_mybrc(found, unlisted="free", name="m", valid_from=MOMENT).versions[0]
    assert version.list_of("unlisted") == PriceList()


def test_a_bank_config_without_switches_enables_nothing_and_needs_no_factors() -> None:
    found = imports.mybrc("[PartitionPrice]\na = 1\n", where="x")
    assert (found.at_submit, found.at_start, found.at_end) == (False, False, False)
    assert (found.factors, found.url, found.token) == ({}, "http://localhost:8080", "")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x", "x: not TOML"),
        ("PartitionPrice = 1", "PartitionPrice must be a table"),
        ("[PartitionPrice]\na = 'b'", "PartitionPrice.a must be a number"),
        ("[PartitionPrice]\na = true", "PartitionPrice.a must be a number"),
        ("[Enable]\nenable_spank_plugin = 'yes'", "must be true or false"),
    ],
)
def test_a_wrong_bank_config_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(CarrelError) as refused:
        imports.mybrc(text, where="x")
    assert sentence in str(refused.value)
