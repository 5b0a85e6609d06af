from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.models import FeatureBudget
from ai_budget.review.limits import Budgets
from ai_budget.review.pace import Against, Pace, Week, weekly_pace
from ai_budget.review.report import cost_report
from ai_budget.review.spans import Span
from tests.factories import CallLogFactory, FeatureBudgetFactory, LimitOverrideFactory
from tests.review.conftest import NOW

DOLLAR = 1_000_000_000
OCTOBER = Span(since=datetime(2026, 10, 1, tzinfo=UTC), until=datetime(2026, 11, 1, tzinfo=UTC))
LATER = datetime(2027, 1, 1, tzinfo=UTC)


def budgets(*rows: FeatureBudget, zone: str = "UTC") -> Budgets:
    site = FeatureBudget(name="*")
    return Budgets(rows={"*": site, **{row.name: row for row in rows}}, zone=ZoneInfo(zone))


def week(spend: int, expected: int) -> Week:
    first = date(2026, 10, 1)
    return Week(since=first, until=first, spend_nanousd=spend, expected_nanousd=expected)


@pytest.mark.parametrize(
    ("spend", "expected", "pace"),
    [
        (110, 100, Pace.ON_TRACK),
        (111, 100, Pace.OVER),
        (90, 100, Pace.ON_TRACK),
        (89, 100, Pace.UNDER),
        (0, 0, Pace.ON_TRACK),
        (1, 0, Pace.OVER),
    ],
)
def test_a_week_is_on_track_within_a_tenth_of_its_share(
    spend: int, expected: int, pace: Pace
) -> None:
    assert week(spend, expected).pace is pace


def test_a_month_has_weeks_of_seven_days_and_what_is_left() -> None:
    chat = FeatureBudget(name="chat", monthly_plan_usd=31)
    spent = {(date(2026, 10, day), "chat", ""): DOLLAR for day in range(1, 32)}

    (_site, pace) = weekly_pace(OCTOBER, spent=spent, budgets=budgets(chat), now=LATER)

    assert (pace.name, pace.against) == ("chat", Against.PLAN)
    assert [(it.since.day, it.until.day) for it in pace.weeks] == [
        (1, 8), (8, 15), (15, 22), (22, 29), (29, 1)
    ]  # fmt: skip
    assert [it.spend_nanousd // DOLLAR for it in pace.weeks] == [7, 7, 7, 7, 3]
    assert [it.expected_nanousd for it in pace.weeks] == [it.spend_nanousd for it in pace.weeks]
    assert not any(it.running for it in pace.weeks)


def test_a_running_week_is_measured_by_what_has_passed_of_it() -> None:
    chat = FeatureBudget(name="chat", monthly_plan_usd=31)
    spent = {(date(2026, 10, 15), "chat", ""): DOLLAR}

    (_site, pace) = weekly_pace(OCTOBER, spent=spent, budgets=budgets(chat), now=NOW)

    assert len(pace.weeks) == 3
    assert pace.weeks[-1].running
    assert pace.weeks[-1].expected_nanousd == DOLLAR // 2  # twelve hours of a day


def test_without_a_plan_the_limit_counts_and_without_either_there_is_no_pace() -> None:
    monthly = FeatureBudget(name="monthly", monthly_limit_usd=310)
    daily = FeatureBudget(name="daily", daily_limit_usd=2)
    free = FeatureBudget(name="free")
    spent = {(date(2026, 10, 1), name, ""): 1 for name in ("monthly", "daily", "free")}

    found = weekly_pace(OCTOBER, spent=spent, budgets=budgets(monthly, daily, free), now=LATER)

    by_name = {it.name: it for it in found}
    assert by_name.keys() == {"*", "monthly", "daily"}
    assert by_name["monthly"].against is Against.LIMIT
    assert by_name["monthly"].weeks[0].expected_nanousd == 70 * DOLLAR
    assert by_name["daily"].weeks[0].expected_nanousd == 14 * DOLLAR


def test_the_site_comes_first_and_then_the_dearest() -> None:
    product = FeatureBudget(name="product", monthly_plan_usd=1)
    chat = FeatureBudget(name="chat", monthly_plan_usd=1)
    search = FeatureBudget(name="search", monthly_plan_usd=1)
    day = date(2026, 10, 1)
    spent = {(day, "chat", "product"): 2, (day, "search", "product"): 5}

    found = weekly_pace(OCTOBER, spent=spent, budgets=budgets(product, chat, search), now=LATER)

    assert [(it.name, it.weeks[0].spend_nanousd) for it in found] == [
        ("*", 7),
        ("product", 7),
        ("search", 5),
        ("chat", 2),
    ]


def test_a_feature_alone_is_not_laid_against_its_category() -> None:
    product = FeatureBudget(name="product", monthly_plan_usd=1)
    chat = FeatureBudget(name="chat", monthly_plan_usd=1)
    span = Span(since=OCTOBER.since, until=OCTOBER.until, feature="chat")
    spent = {(date(2026, 10, 1), "chat", "product"): 2}

    found = weekly_pace(span, spent=spent, budgets=budgets(product, chat), now=LATER)

    assert [it.name for it in found] == ["chat"]


def test_what_is_longer_than_a_year_has_no_weeks() -> None:
    span = Span(since=datetime(2020, 1, 1, tzinfo=UTC), until=OCTOBER.until)

    assert weekly_pace(span, spent={}, budgets=budgets(), now=LATER) == ()


@given(
    st.integers(0, 10**15),
    st.dates(date(2026, 1, 1), date(2027, 12, 31)),
    st.integers(0, 40),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]),
)
def test_the_weeks_of_a_month_share_its_plan(
    plan: int, day: date, days: int, zone_name: str
) -> None:
    zone = ZoneInfo(zone_name)
    month = periods.month(periods.midnight(day, zone), zone)
    chat = FeatureBudget(name="chat", monthly_plan_usd=dollars(plan))
    span = Span(since=month.start, until=month.end)

    found = weekly_pace(
        span,
        spent={(day, "chat", ""): 1},
        budgets=budgets(chat, zone=zone_name),
        now=month.end + timedelta(days=days),
    )

    (pace,) = (it for it in found if it.name == "chat")
    shared = sum(it.expected_nanousd for it in pace.weeks)
    # Each is rounded down on its own.
    assert plan - len(pace.weeks) < shared <= plan
    assert sum(it.spend_nanousd for it in pace.weeks) == 1
    assert pace.weeks[0].since == month.first_day
    assert pace.weeks[-1].until == periods.next_month(month.first_day)


def dollars(nanousd: int) -> str:
    return f"{nanousd // DOLLAR}.{nanousd % DOLLAR:09}"


@pytest.mark.django_db
def test_a_limit_that_was_raised_counts_as_raised() -> None:
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    override = LimitOverrideFactory.create(
        budget=chat, period="day", amount_usd=3, until=datetime(2026, 10, 3, tzinfo=UTC)
    )
    chat.overrides.filter(pk=override.pk).update(created_at=OCTOBER.since)
    CallLogFactory.create(cost_nanousd=1)

    found = {it.name: it for it in cost_report(OCTOBER).weeks}

    # Two days at three dollars, five at one.
    assert found["chat"].weeks[0].expected_nanousd == 11 * DOLLAR


@pytest.mark.django_db
def test_a_report_of_one_model_is_laid_against_no_plan() -> None:
    FeatureBudgetFactory.create(name="chat", monthly_plan_usd=1)
    call = CallLogFactory.create()

    report = cost_report(Span(since=OCTOBER.since, until=OCTOBER.until, model=call.model))

    assert report.weeks == ()
    assert report.total.plan_nanousd is None
    assert report.total.spend_nanousd == call.cost_nanousd
