from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from ai_budget import periods
from ai_budget.models import CallLog
from ai_budget.review.present import Present, present
from ai_budget.review.spans import Span, ever
from ai_budget.review.sums import reading
from tests.factories import CallLogFactory, FeatureBudgetFactory, UserFactory
from tests.review.conftest import NOW

pytestmark = pytest.mark.django_db

DOLLAR = 1_000_000_000
SITE = Span(since=NOW, until=NOW + timedelta(days=1))


def standing(**about: Any) -> Present:
    span = Span(since=SITE.since, until=SITE.until, **about)
    with reading() as at_once:
        return present(at_once, span)


def spend(at: datetime, nanousd: int, **values: Any) -> None:
    CallLogFactory.create(reserved_at=at, cost_nanousd=nanousd, **values)


def test_today_this_week_and_this_month_are_laid_beside_as_much_of_those_before() -> None:
    # NOW is Thursday noon.
    for days_ago, nanousd in ((0, 1), (1, 10), (3, 100), (7, 1_000), (10, 10_000), (30, 100_000)):
        spend(NOW - timedelta(days=days_ago, minutes=1), nanousd)
        spend(NOW - timedelta(days=days_ago) + timedelta(hours=1), 7_000_000)

    it = standing()

    late = 7_000_000
    assert (it.today.spend_nanousd, it.today.before_nanousd) == (1 + late, 10)
    assert it.week.since == datetime(2026, 10, 12, tzinfo=UTC)
    assert (it.week.spend_nanousd, it.week.before_nanousd) == (111 + 3 * late, 11_000 + late)
    # What comes later on the day than now belongs to this month, and not to the same days before.
    assert it.month.spend_nanousd == 11_111 + 5 * late
    assert it.month.before_nanousd == 100_000
    assert it.month.before_until == datetime(2026, 9, 15, 12, tzinfo=UTC)


def test_each_is_laid_against_its_share() -> None:
    FeatureBudgetFactory.create(
        name="chat", monthly_limit_usd=310, daily_limit_usd=25, monthly_plan_usd=31
    )
    spend(NOW, DOLLAR)

    it = standing(feature="chat")

    assert (it.today.budget_nanousd, it.today.plan_nanousd) == (25 * DOLLAR, DOLLAR)
    assert (it.week.budget_nanousd, it.week.plan_nanousd) == (70 * DOLLAR, 7 * DOLLAR)
    assert (it.month.budget_nanousd, it.month.plan_nanousd) == (310 * DOLLAR, 31 * DOLLAR)
    assert it.today.plan_used == Decimal("100.0")
    assert it.month.budget_used == Decimal("0.3")


def test_a_day_without_a_limit_of_its_own_has_its_share_of_the_months() -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=310)

    assert standing(feature="chat").today.budget_nanousd == 10 * DOLLAR


def test_one_users_part_is_laid_against_no_budget() -> None:
    user = UserFactory.create()
    FeatureBudgetFactory.create(name="*", monthly_limit_usd=310, monthly_plan_usd=31)
    spend(NOW, 5, user=user)
    spend(NOW, 7)

    it = standing(user_id=user.pk)

    assert it.month.spend_nanousd == 5
    assert (it.month.budget_nanousd, it.month.plan_nanousd) == (None, None)
    assert it.forecast is not None
    assert it.forecast.plan_nanousd is None


def test_a_feature_that_nobody_knows_stands_at_nothing() -> None:
    it = standing(feature="unheard-of")

    assert (it.month.spend_nanousd, it.month.budget_nanousd, it.forecast) == (0, None, None)


def test_the_forecast_is_that_of_the_running_month() -> None:
    half = datetime(2026, 10, 16, 12, tzinfo=UTC)
    spend(datetime(2026, 10, 1, tzinfo=UTC), 100)
    spend(datetime(2026, 9, 30, 23, tzinfo=UTC), 7)
    with periods.override_clock(lambda: half):
        it = standing()

    assert it.forecast is not None
    assert (it.forecast.name, it.forecast.forecast_nanousd) == ("*", 200)
    assert [(one.name, one.forecast_nanousd) for one in it.forecasts] == [("chat", 200)]


def test_in_the_first_days_of_a_month_there_is_none() -> None:
    spend(datetime(2026, 10, 1, tzinfo=UTC), 100)
    with periods.override_clock(lambda: datetime(2026, 10, 3, 12, tzinfo=UTC)):
        it = standing()

    assert (it.forecast, it.forecasts) == (None, ())


def test_what_is_in_flight_counts_whenever_it_began() -> None:
    for at in (NOW, NOW - timedelta(days=60)):
        CallLogFactory.create(
            status=CallLog.Status.RESERVED, reserved_nanousd=5, reserved_at=at, category="product"
        )
    CallLogFactory.create(
        status=CallLog.Status.RESERVED, reserved_nanousd=1, feature__name="search"
    )

    assert (standing().held_nanousd, standing().in_flight) == (11, 3)
    product = standing(feature="product")
    assert (product.held_nanousd, product.in_flight) == (10, 2)


def test_a_span_of_everything_holds_everything() -> None:
    assert ever().since < NOW < ever().until
    assert not ever().is_narrow
