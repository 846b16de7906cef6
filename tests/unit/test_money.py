"""Amounts are exact, whatever a person writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.errors import UsageError
from carrel.model.money import HELD_MICRO_SU, MOST_MICRO_SU, format_su, parse_su, total


@given(st.integers(-MOST_MICRO_SU, MOST_MICRO_SU))
def test_an_amount_that_is_written_out_reads_as_the_same(amount: int) -> None:
    assert parse_su(format_su(amount)) == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [("0.1", 100_000), ("12.5", 12_500_000), (" +3 ", 3_000_000), ("-0.000001", -1), ("1000000000000", MOST_MICRO_SU)],
)
def test_a_decimal_number_is_read_digit_by_digit(text: str, amount: int) -> None:
    assert parse_su(text) == amount


@pytest.mark.parametrize(
    "text", ["", ".", "1.", ".5", "1e3", "NaN", "inf", "1,5", "1_000", "0.0000001", "\u0661", "--1", "0x1", "1 2"]
)
def test_what_is_no_plain_decimal_is_refused_and_not_rounded(text: str) -> None:
    with pytest.raises(UsageError, match="is no amount of SU"):
        parse_su(text)


@pytest.mark.parametrize("text", ["1000000000000.000001", "9999999999999"])
def test_more_than_the_ledger_takes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="more than the ledger takes"):
        parse_su(text)


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0.00"), (1, "0.000001"), (-12_500_000, "-12.50"), (10**18, "1000000000000.00")]
)
def test_an_amount_has_two_decimals_or_as_many_as_it_needs(amount: int, text: str) -> None:
    assert format_su(amount) == text


def test_a_sum_may_be_all_that_an_account_holds_but_not_one_more() -> None:
    assert total([HELD_MICRO_SU - 1, 1]) == HELD_MICRO_SU
    with pytest.raises(UsageError, match="more than an account can hold"):
        total([HELD_MICRO_SU, 1])


def test_the_bounds_are_those_of_the_databases() -> None:
    assert HELD_MICRO_SU == 9_223_372_036_854_775_807
    assert MOST_MICRO_SU == 1_000_000_000_000_000_000
