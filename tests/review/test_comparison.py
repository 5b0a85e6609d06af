from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.models import CallLog
from ai_budget.review.comparison import span_before
from ai_budget.review.report import cost_report
from ai_budget.review.spans import Span
from tests.factories import CallLogFactory
from tests.review.conftest import NOW

DOLLAR = 1_000_000_000
UTC_ZONE, BERLIN = ZoneInfo("UTC"), ZoneInfo("Europe/Berlin")
LATER = datetime(2027, 6, 1, tzinfo=UTC)


def month(year: int, number: int, zone: ZoneInfo = UTC_ZONE) -> Span:
    window = periods.month(datetime(year, number, 15, tzinfo=UTC), zone)
    return Span(since=window.start, until=window.end, feature="chat")


def days(first: date, last: date, zone: ZoneInfo = UTC_ZONE) -> Span:
    until = periods.midnight(last + timedelta(days=1), zone)
    return Span(since=periods.midnight(first, zone), until=until)


# Which span ---------------------------------------------------------------------------------------


def test_before_a_month_was_the_month_before() -> None:
    assert span_before(month(2026, 3), now=LATER, zone=UTC_ZONE) == month(2026, 2)


def test_of_a_running_month_the_same_days_are_looked_at() -> None:
    before = span_before(month(2026, 10), now=NOW, zone=UTC_ZONE)

    assert before.since == datetime(2026, 9, 1, tzinfo=UTC)
    assert before.until == datetime(2026, 9, 15, 12, tzinfo=UTC)
    assert before.feature == "chat"


def test_a_shorter_month_before_is_looked_at_as_a_whole() -> None:
    now = datetime(2026, 3, 30, 8, tzinfo=UTC)

    assert span_before(month(2026, 3), now=now, zone=UTC_ZONE) == month(2026, 2)


def test_the_time_of_day_is_that_of_the_clock_on_the_wall() -> None:
    # Clocks went forward on 29 March.
    now = datetime(2026, 4, 10, 10, tzinfo=BERLIN)

    before = span_before(month(2026, 4, BERLIN), now=now, zone=BERLIN)

    assert before.since == datetime(2026, 3, 1, tzinfo=BERLIN)
    assert before.until == datetime(2026, 3, 10, 10, tzinfo=BERLIN)


def test_before_some_days_were_as_many_days() -> None:
    # The day on which clocks go forward is one of them.
    span = days(date(2026, 3, 27), date(2026, 4, 2), BERLIN)

    before = span_before(span, now=LATER, zone=BERLIN)

    assert before == days(date(2026, 3, 20), date(2026, 3, 26), BERLIN)


def test_of_running_days_no_more_than_has_passed() -> None:
    span = days(date(2026, 10, 14), date(2026, 10, 20))

    before = span_before(span, now=NOW, zone=UTC_ZONE)

    assert before.since == datetime(2026, 10, 7, tzinfo=UTC)
    assert before.until == datetime(2026, 10, 8, 12, tzinfo=UTC)


@given(
    st.dates(date(2025, 1, 1), date(2027, 12, 31)),
    st.integers(0, 70),
    st.integers(0, 100 * 86_400),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Havana", "Asia/Kathmandu"]),
)
def test_it_ends_before_the_span_begins_and_is_no_longer(
    first: date, length: int, after: int, zone_name: str
) -> None:
    zone = ZoneInfo(zone_name)
    span = days(first, first + timedelta(days=length), zone)
    now = span.since + timedelta(seconds=after)

    before = span_before(span, now=now, zone=zone)

    assert before.since < before.until <= span.since
    a_clock_change = timedelta(hours=1)
    passed = min(span.until, now) if span.since < now else span.until
    whole_month = periods.month(span.since, zone)
    if (whole_month.start, whole_month.end) != (span.since, span.until):
        difference = (before.until - before.since) - (passed - span.since)
        assert abs(difference) <= a_clock_change


# What is said -------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_features_are_laid_beside_what_they_were_and_what_moved_most_comes_first(
    october: Span,
) -> None:
    for feature, now, before in (("chat", 5, 4), ("search", 1, 9), ("new", 3, 0)):
        CallLogFactory.create(feature__name=feature, cost_nanousd=now)
        if before:
            CallLogFactory.create(
                feature__name=feature,
                cost_nanousd=before,
                reserved_at=datetime(2026, 9, 15, 11, 59, tzinfo=UTC),
            )
    CallLogFactory.create(cost_nanousd=99, reserved_at=datetime(2026, 9, 15, 12, tzinfo=UTC))

    comparison = cost_report(october).comparison

    assert [(it.name, it.spend_nanousd, it.before_nanousd) for it in comparison.features] == [
        ("search", 1, 9),
        ("new", 3, 0),
        ("chat", 5, 4),
    ]
    assert [it.change for it in comparison.features] == [
        Decimal("-88.9"),
        None,
        Decimal("25.0"),
    ]
    assert (comparison.total.spend_nanousd, comparison.total.before_nanousd) == (9, 13)
    assert (comparison.calls, comparison.calls_before) == (3, 2)
    assert (comparison.is_month, comparison.same_days) == (True, True)


@pytest.mark.django_db
def test_a_month_that_is_over_is_laid_beside_the_whole_month_before() -> None:
    span = Span(since=datetime(2026, 9, 1, tzinfo=UTC), until=datetime(2026, 10, 1, tzinfo=UTC))
    CallLogFactory.create(reserved_at=datetime(2026, 8, 31, 23, tzinfo=UTC), cost_nanousd=7)
    CallLogFactory.create(
        reserved_at=datetime(2026, 9, 1, tzinfo=UTC), status=CallLog.Status.RELEASED
    )

    comparison = cost_report(span).comparison

    assert (comparison.total.spend_nanousd, comparison.total.before_nanousd) == (0, 7)
    assert comparison.total.change == Decimal("-100.0")
    assert not comparison.same_days
