"""An hour is out of the ordinary beside the same hours of the days before it, or it is not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.money import NANO_PER_USD as USD
from ai_budget.review import spikes

BERLIN = ZoneInfo("Europe/Berlin")
STEADY = [10 * USD] * 14
VARIED = [(8 + day % 5) * USD for day in range(14)]
"""8, 9, 10, 11 and 12 dollars: a median of 10 and a median deviation of 1."""
QUIET = [0] * 14


def is_spike(spent: int, before: list[int], *, calls: int = 100, days: int = 14) -> bool:
    return spikes.is_spike(spent, before, calls=calls, days_with_spend=days)


def test_an_hour_like_the_others_is_none() -> None:
    assert not is_spike(12 * USD, VARIED)


def test_an_hour_far_above_the_others_is_one() -> None:
    assert is_spike(40 * USD, VARIED)


def test_it_has_to_be_so_many_deviations_above_the_median() -> None:
    # 0.6745 * (spent - 10) / 5 > 3.5, so from 35.945... on.
    wide = [(day % 3) * 5 * USD + 5 * USD for day in range(14)]

    assert spikes.usual(wide) == 10 * USD
    assert not is_spike(35_945 * USD // 1000, wide)
    assert is_spike(35_946 * USD // 1000, wide)


def test_of_a_steady_feature_it_has_to_be_twice_what_is_usual() -> None:
    assert not is_spike(20 * USD - 1, STEADY)
    assert is_spike(20 * USD, STEADY)


def test_it_has_to_be_worth_a_dollar() -> None:
    assert not is_spike(USD - 1, QUIET)
    assert is_spike(USD, QUIET)


def test_one_dear_call_is_none() -> None:
    assert not is_spike(50 * USD, QUIET, calls=spikes.LEAST_CALLS - 1)
    assert is_spike(50 * USD, QUIET, calls=spikes.LEAST_CALLS)


def test_a_new_feature_has_nothing_usual() -> None:
    assert not is_spike(50 * USD, QUIET, days=spikes.LEAST_DAYS - 1)
    assert is_spike(50 * USD, QUIET, days=spikes.LEAST_DAYS)


def test_spikes_of_the_days_before_hide_no_other() -> None:
    before = [*VARIED[:11], *[500 * USD] * 3]

    assert is_spike(60 * USD, before)


def test_what_happens_on_most_days_is_usual() -> None:
    nightly = [0, 0, *[30 * USD] * 12]

    assert not is_spike(33 * USD, nightly)


@given(
    spent=st.integers(0, 10**15),
    before=st.lists(st.integers(0, 10**15), min_size=14, max_size=14),
    more=st.integers(0, 10**15),
)
def test_more_is_never_less_of_a_spike(spent: int, before: list[int], more: int) -> None:
    assert is_spike(spent + more, before) or not is_spike(spent, before)


@pytest.mark.parametrize(
    ("values", "median"), [([], 0), ([5], 5), ([9, 1], 5), ([3, 1, 2], 2), ([1, 2], 1)]
)
def test_the_usual_is_the_median(values: list[int], median: int) -> None:
    assert spikes.usual(values) == median


def test_the_same_hours_are_those_of_the_clock_on_the_wall() -> None:
    start = datetime(2026, 10, 28, 8, tzinfo=UTC)  # 9:00 in winter time, which began on the 25th

    hours = spikes.same_hours(start, BERLIN)

    assert len(hours) == spikes.DAYS
    assert hours[0] == start - timedelta(days=1)
    assert hours[-1] == datetime(2026, 10, 14, 7, tzinfo=UTC)
    assert {hour.astimezone(BERLIN).hour for hour in hours} == {9}


@pytest.mark.parametrize(
    ("zone", "hour"),
    [("UTC", (12, 0)), ("Asia/Kolkata", (11, 30)), ("Asia/Kathmandu", (12, 15))],
)
def test_an_hour_begins_where_the_zones_does(zone: str, hour: tuple[int, int]) -> None:
    at = datetime(2026, 10, 15, 12, 20, 5, 7, tzinfo=UTC)

    start = spikes.hour_of(at, ZoneInfo(zone))

    assert start == datetime(2026, 10, 15, *hour, tzinfo=UTC)
