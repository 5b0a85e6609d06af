"""Money is whole nano-dollars inside, exact decimals at the edges, and never a float."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.money import (
    MAX_NANOUSD,
    NANO_PER_USD,
    ceil_div,
    format_usd,
    parse_usd,
    to_usd,
)

amounts = st.integers(min_value=-MAX_NANOUSD, max_value=MAX_NANOUSD)


# Dollars to nano-dollars -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dollars", "nanousd"),
    [
        ("1", 1_000_000_000),
        (1, 1_000_000_000),
        (Decimal("0.000000001"), 1),
        ("-0.5", -500_000_000),
        ("1e-9", 1),
        ("1E+3", 1_000_000_000_000),
        ("  2.50 ", 2_500_000_000),
        ("1.100000000000", 1_100_000_000),
        ("-0", 0),
        (Decimal("0.1") + Decimal("0.2"), 300_000_000),
        ("9223372036.854775807", MAX_NANOUSD),
        ("-9223372036.854775807", -MAX_NANOUSD),
    ],
    ids=str,
)
def test_dollars_are_parsed_exactly(dollars: Decimal | int | str, nanousd: int) -> None:
    assert parse_usd(dollars) == nanousd


@given(nanousd=amounts)
def test_every_amount_survives_the_way_there_and_back(nanousd: int) -> None:
    assert parse_usd(to_usd(nanousd)) == nanousd
    assert parse_usd(str(to_usd(nanousd))) == nanousd
    assert parse_usd(format(to_usd(nanousd), "f")) == nanousd


@given(dollars=st.decimals(min_value=-(10**9), max_value=10**9, places=9))
def test_every_amount_of_nine_decimals_survives_the_way_back_and_there(dollars: Decimal) -> None:
    assert to_usd(parse_usd(dollars)) == dollars


@given(dollars=st.integers(min_value=-(10**9), max_value=10**9))
def test_whole_dollars_are_the_same_in_every_form(dollars: int) -> None:
    assert parse_usd(dollars) == parse_usd(str(dollars)) == parse_usd(Decimal(dollars))


@given(nanousd=amounts, precision=st.integers(min_value=19, max_value=60))
def test_the_callers_precision_changes_no_amount(nanousd: int, precision: int) -> None:
    dollars = to_usd(nanousd)

    with localcontext() as context:
        context.prec = precision
        assert parse_usd(dollars) == nanousd
        assert to_usd(nanousd) == dollars


@pytest.mark.parametrize(
    "value", [0.1, 1.0, float("nan"), True, False, None, b"1", [1], Fraction(1, 2)], ids=repr
)
def test_what_has_no_exact_dollars_is_no_amount(value: Any) -> None:
    with pytest.raises(TypeError):
        parse_usd(value)


@pytest.mark.parametrize(
    "value",
    ["", "abc", "1,000", "$1", "1 2", "0x10", "--1", "1e", "\u0663\u066b\u0665"],
)
def test_text_that_is_no_number_is_no_amount(value: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of dollars"):
        parse_usd(value)


@pytest.mark.parametrize("value", ["nan", "NaN", "sNaN", "inf", "-Infinity", Decimal("NaN")])
def test_an_amount_is_finite(value: str | Decimal) -> None:
    with pytest.raises(ValueError, match="not a finite amount"):
        parse_usd(value)


@pytest.mark.parametrize("value", ["0.0000000001", "1.1234567891", "1e-10", "1e-999999"])
def test_more_than_nine_decimals_are_refused_not_rounded(value: str) -> None:
    with pytest.raises(ValueError, match="more than nine decimals"):
        parse_usd(value)


@given(nanousd=amounts, beyond=st.decimals(min_value="0.01", max_value="0.99", places=2))
def test_a_fraction_of_a_nano_dollar_is_refused(nanousd: int, beyond: Decimal) -> None:
    with localcontext() as context:
        context.prec = 40
        dollars = (Decimal(nanousd) + beyond).scaleb(-9)

    with pytest.raises(ValueError, match=r"decimals|more than can be stored"):
        parse_usd(dollars)


@pytest.mark.parametrize(
    "value",
    [
        "9223372036.854775808",
        "-9223372036.854775809",
        10**10,
        "1e20",
        "1e999999",
        "-1e999999",
        Decimal(10) ** 400,
    ],
    ids=lambda value: str(value)[:20],
)
def test_more_than_a_bigint_holds_is_refused(value: Decimal | int | str) -> None:
    with pytest.raises(ValueError, match="more than can be stored"):
        parse_usd(value)


# Nano-dollars to dollars -------------------------------------------------------------------------


def test_nano_dollars_are_dollars_of_nine_decimals() -> None:
    assert to_usd(1) == Decimal("0.000000001")
    assert to_usd(-1_500_000_000) == Decimal("-1.5")
    assert to_usd(0) == 0


@given(nanousd=amounts)
def test_dollars_are_exact(nanousd: int) -> None:
    assert Fraction(to_usd(nanousd)) == Fraction(nanousd, NANO_PER_USD)


# Rounding ----------------------------------------------------------------------------------------


@given(numerator=amounts, denominator=st.integers(min_value=1, max_value=10**15))
def test_division_rounds_up(numerator: int, denominator: int) -> None:
    assert ceil_div(numerator, denominator) == ceil(Fraction(numerator, denominator))


def test_division_is_exact_far_beyond_what_a_float_holds() -> None:
    assert ceil_div(10**30 + 1, 10**6) == 10**24 + 1
    assert ceil_div(10**30, 10**6) == 10**24


# For people --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanousd", "decimals", "shown"),
    [
        (0, 2, "$0.00"),
        (1_234_500_000_000, 2, "$1,234.50"),
        (-1_234_500_000_000, 2, "-$1,234.50"),
        (5_000_000, 2, "$0.01"),
        (4_999_999, 2, "<$0.01"),
        (1, 2, "<$0.01"),
        (1, 9, "$0.000000001"),
        (999_995_000_000, 2, "$1,000.00"),
        (1_500_000_000, 0, "$2"),
        (400_000_000, 0, "<$1"),
        (123_456_789, 6, "$0.123457"),
        (MAX_NANOUSD, 2, "$9,223,372,036.85"),
    ],
)
def test_amounts_are_shown_with_grouping_and_never_as_a_false_zero(
    nanousd: int, decimals: int, shown: str
) -> None:
    assert format_usd(nanousd, decimals=decimals) == shown


@given(nanousd=amounts, decimals=st.integers(min_value=0, max_value=9))
def test_what_is_shown_is_within_half_a_unit(nanousd: int, decimals: int) -> None:
    shown = format_usd(nanousd, decimals=decimals)

    figure = Fraction(shown.replace("$", "").replace(",", "").replace("<", ""))
    unit = Fraction(1, 10**decimals)
    if shown.startswith("<"):
        assert 0 < abs(Fraction(nanousd, NANO_PER_USD)) < unit / 2
    else:
        assert abs(figure - Fraction(nanousd, NANO_PER_USD)) <= unit / 2


@pytest.mark.parametrize("amount", ["1e999999999", "-1e999999999", "1e-999999999"])
def test_the_most_extreme_amounts_are_refused_like_others(amount: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        parse_usd(Decimal(amount))
