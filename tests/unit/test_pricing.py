"""What resources cost: exact until the end, rounded once, and never free by accident."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.core.pricing import Rounding, hourly, price, rounded
from carrel.model.price import MILLION, Mode, NoPrice, PriceBook, Priced, PriceList, Rate, Version

START = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 7, 1, tzinfo=UTC)
GPU = {
    "cpu": Rate(MILLION),
    "mem": Rate(250_000, 1024),
    "gres/gpu": Rate(8 * MILLION),
    "gres/gpu:a100": Rate(4 * MILLION),
}
BOOK = PriceBook(
    (
        Version(
            name="first",
            valid_from=START,
            partitions={
                "gpu": PriceList(rates=GPU, qos_millionths={"low": 250_000}),
                "free": PriceList(),
                "max": PriceList(rates=GPU | {"license/matlab": Rate(MILLION)}, mode="max_tres"),
            },
            qos_millionths={"premium": 2 * MILLION, "low": 500_000},
        ),
        Version(name="second", valid_from=LATER, default=PriceList(rates={"cpu": Rate(3)})),
    )
)


def cost(
    resources: dict[str, int],
    *,
    partition: str = "gpu",
    qos: str = "",
    seconds: int = 3600,
    moment: datetime = START,
    rounding: Rounding = "up",
) -> Priced:
    priced = price(BOOK, resources, partition=partition, qos=qos, seconds=seconds, moment=moment, rounding=rounding)
    assert isinstance(priced, Priced), priced
    return priced


def test_all_that_has_a_rate_adds_up() -> None:
    priced = cost({"cpu": 4, "mem": 2048, "node": 1, "gres/gpu": 2, "gres/gpu:a100": 1, "billing": 99})
    assert priced.amount_micro_su == (4 + 0.5 + 16 + 4) * MILLION
    assert [(line.resource, line.amount_micro_su) for line in priced.lines] == [
        ("cpu", 4 * MILLION),
        ("gres/gpu", 16 * MILLION),
        ("gres/gpu:a100", 4 * MILLION),
        ("mem", 500_000),
    ]


def test_the_dearest_alone_counts_where_the_mode_says_so_and_licences_always() -> None:
    priced = cost({"cpu": 4, "mem": 8192, "gres/gpu": 1, "license/matlab": 3}, partition="max")
    assert priced.amount_micro_su == (8 + 3) * MILLION
    assert [line.resource for line in priced.lines if not line.counted] == ["cpu", "mem"]


# The examples are those of slurm.conf(5), TRESBillingWeights: what "billing" is for what was asked and given; and whole
# nodes with a weight of their own.
@pytest.mark.parametrize(
    ("resources", "mode", "billing"),
    [
        ({"cpu": 1, "mem": 1024, "gres/gpu": 0}, "sum", Fraction(5, 4)),
        ({"cpu": 1, "mem": 8192, "gres/gpu": 0}, "sum", Fraction(3)),
        ({"cpu": 1, "mem": 8192}, "max_tres", Fraction(2)),
        ({"cpu": 4, "mem": 2048, "gres/gpu": 0}, "sum", Fraction(9, 2)),
        ({"cpu": 1, "mem": 8192, "gres/gpu": 1}, "max_tres_gres", Fraction(4)),
        ({"cpu": 1, "mem": 8192, "gres/gpu": 1}, "max_tres", Fraction(2)),
        ({"cpu": 4, "node": 1, "gres/gpu": 1}, "max_tres", Fraction(4)),
        ({"cpu": 4, "node": 1, "gres/gpu": 1}, "max_tres_gres", Fraction(6)),
        ({"cpu": 4, "node": 1}, "sum", Fraction(7)),
    ],
)
def test_an_hour_is_what_slurm_bills(resources: dict[str, int], mode: Mode, billing: Fraction) -> None:
    rates = {"cpu": Rate(MILLION), "mem": Rate(250_000, 1024), "gres/gpu": Rate(2 * MILLION), "node": Rate(3 * MILLION)}
    assert hourly(resources, rates, mode) == billing * MILLION


@pytest.mark.parametrize(
    ("partition", "qos", "factor"),
    [("gpu", "premium", 2), ("gpu", "low", 0.25), ("max", "low", 0.5), ("gpu", "unheard", 1), ("gpu", "", 1)],
)
def test_a_qos_has_the_factor_of_its_partition_else_of_the_version(partition: str, qos: str, factor: float) -> None:
    assert cost({"cpu": 4}, partition=partition, qos=qos).amount_micro_su == 4 * factor * MILLION


def test_the_version_in_force_when_the_run_starts_prices_it() -> None:
    assert cost({"cpu": 1}, moment=LATER - timedelta(microseconds=1)).version == "first"
    second = cost({"cpu": 1}, moment=LATER)
    assert (second.version, second.version_number) == ("second", int(LATER.timestamp()))


def test_before_the_first_version_nothing_has_a_price() -> None:
    early = START - timedelta(seconds=1)
    answer = price(BOOK, {"cpu": 1}, partition="gpu", qos="", seconds=1, moment=early, rounding="up")
    assert answer == NoPrice("no price is in force at 2025-12-31T23:59:59Z; see: carrel bank prices show")


def test_a_partition_without_a_price_is_not_free_but_one_with_an_empty_list_is() -> None:
    answer = price(BOOK, {"cpu": 1}, partition="other", qos="", seconds=1, moment=START, rounding="up")
    assert isinstance(answer, NoPrice)
    assert "'other' has no price in version 'first'" in answer.reason
    assert cost({"cpu": 1}, partition="free").amount_micro_su == 0


def test_a_lien_is_rounded_up_and_a_charge_half_up_and_only_once() -> None:
    third = {"cpu": 1}
    assert cost(third, seconds=1200, moment=LATER).amount_micro_su == 1  # exactly one micro-SU
    assert cost(third, seconds=1201, moment=LATER, rounding="up").amount_micro_su == 2
    assert cost(third, seconds=1201, moment=LATER, rounding="half_up").amount_micro_su == 1
    assert cost(third, seconds=1800, moment=LATER, rounding="half_up").amount_micro_su == 2
    assert cost(third, seconds=1799, moment=LATER, rounding="half_up").amount_micro_su == 1


@pytest.mark.parametrize(("resources", "seconds"), [({"cpu": 1}, -1), ({"cpu": -1}, 1)])
def test_a_clock_that_steps_back_is_an_error_and_no_refund(resources: dict[str, int], seconds: int) -> None:
    with pytest.raises(ValueError, match="did the clock of slurmctld step back"):
        cost(resources, seconds=seconds)


_COUNTS = st.fixed_dictionaries({name: st.integers(0, 10**6) for name in GPU})


@given(_COUNTS, _COUNTS, st.integers(0, 10**8), st.integers(0, 10**8), st.sampled_from(["gpu", "max"]))
def test_more_never_costs_less_and_a_charge_never_exceeds_the_lien_of_at_least_as_much(
    some: dict[str, int], more: dict[str, int], seconds: int, longer: int, partition: str
) -> None:
    larger = {name: some[name] + more[name] for name in some}
    charged = cost(some, seconds=seconds, partition=partition, rounding="half_up")
    lien = cost(larger, seconds=seconds + longer, partition=partition, rounding="up")
    assert charged.amount_micro_su <= lien.amount_micro_su


@given(st.fractions(min_value=0, max_value=10**12))
def test_rounding_is_never_more_than_it_says(amount: Fraction) -> None:
    assert 0 <= rounded(amount, "up") - amount < 1
    assert -Fraction(1, 2) < rounded(amount, "half_up") - amount <= Fraction(1, 2)
