from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.review.forecast import Forecast, forecast, forecasts
from ai_budget.review.limits import Allowance

OCTOBER = periods.month(datetime(2026, 10, 15, tzinfo=UTC), UTC)
THIRD_DAY = OCTOBER.start + timedelta(days=3)


def test_a_month_goes_on_as_it_went() -> None:
    tenth = OCTOBER.start + timedelta(days=10)

    assert forecast(100, OCTOBER, now=tenth) == 310


@pytest.mark.parametrize("now", [OCTOBER.start, THIRD_DAY - timedelta(microseconds=1), OCTOBER.end])
def test_it_says_nothing_before_three_days_and_after_the_end(now: datetime) -> None:
    assert forecast(100, OCTOBER, now=now) is None


@given(
    st.integers(0, 2**63),
    st.integers(0, (OCTOBER.end - THIRD_DAY) // timedelta(microseconds=1) - 1),
)
def test_it_is_exact_to_half_a_nano_dollar(spent: int, later: int) -> None:
    now = THIRD_DAY + timedelta(microseconds=later)

    expected = forecast(spent, OCTOBER, now=now)

    assert expected is not None
    passed, whole = (now - OCTOBER.start), (OCTOBER.end - OCTOBER.start)
    tick = timedelta(microseconds=1)
    exact = Fraction(spent) * (whole // tick) / (passed // tick)
    assert abs(expected - exact) <= Fraction(1, 2)
    assert expected >= spent


def test_each_budget_has_its_own_beside_what_it_was_allowed() -> None:
    now = OCTOBER.start + timedelta(days=15, hours=12)  # half of it
    allowed = {"*": Allowance(budget_nanousd=300, plan_nanousd=100)}

    site, chat = forecasts({"chat": 40, "*": 100, "idle": 0}, OCTOBER, now=now, allowed=allowed)

    assert (site.name, site.forecast_nanousd, chat.forecast_nanousd) == ("*", 200, 80)
    assert (site.is_over_plan, site.is_over_budget) == (True, False)
    assert (site.plan_used, site.budget_used) == (Decimal("200.0"), Decimal("66.7"))
    assert (chat.is_over_plan, chat.plan_used) == (False, None)


def test_what_will_be_exactly_its_limit_is_not_over() -> None:
    it = Forecast(name="*", spent_nanousd=1, forecast_nanousd=5, budget_nanousd=5, plan_nanousd=5)

    assert not it.is_over_budget
    assert not it.is_over_plan
