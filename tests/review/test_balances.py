"""What budgets have taken of their limits today and this month."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from pytest_django import DjangoAssertNumQueries
from pytest_django.fixtures import Settings

from ai_budget import periods
from ai_budget.models import FeatureBudget
from ai_budget.review.balances import balances_today_and_month
from tests.factories import FeatureBudgetFactory, LimitOverrideFactory, SpendWindowFactory
from tests.review.conftest import NOW

pytestmark = pytest.mark.django_db

DOLLAR = 1_000_000_000


@pytest.fixture(autouse=True)
def ledger(settings: Settings) -> None:
    """Balances of the database, whichever ledger the rest of the tests run with."""
    settings.AI_BUDGET = {}


REDIS_AWAY = {
    "LEDGER": "ai_budget.ledger.redis.RedisLedger",
    "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0",  # where nothing listens
}

# The present ------------------------------------------------------------------------------------


def test_balances_are_those_of_the_windows_that_contain_the_present(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=2)
    category = FeatureBudgetFactory.create(name="product", monthly_limit_usd=10)
    site = FeatureBudgetFactory.create(name="*")
    today, yesterday = date(2026, 10, 15), date(2026, 10, 14)
    SpendWindowFactory.create(
        scope="feature:chat", first_day=today, spent_nanousd=DOLLAR, held_nanousd=DOLLAR // 2
    )
    SpendWindowFactory.create(scope="feature:chat", first_day=yesterday, spent_nanousd=9)
    month = {"period": "month", "first_day": date(2026, 10, 1)}
    SpendWindowFactory.create(scope="category:product", spent_nanousd=DOLLAR, **month)
    SpendWindowFactory.create(scope="*", spent_nanousd=3 * DOLLAR, **month)

    # Balances and overrides, however many budgets.
    with django_assert_num_queries(2):
        uses = balances_today_and_month([chat, category, site])

    today_of_chat = uses["chat"].today
    assert (today_of_chat.spent_nanousd, today_of_chat.held_nanousd) == (DOLLAR, DOLLAR // 2)
    assert (today_of_chat.limit_nanousd, today_of_chat.used) == (2 * DOLLAR, Decimal("75.0"))
    assert uses["chat"].month.limit_nanousd is None
    assert uses["product"].month.used == Decimal("10.0")
    # The settings' own limits: $10 a day and $100 a month.
    assert uses["*"].today.limit_nanousd == 10 * DOLLAR
    assert uses["*"].month.used == Decimal("3.0")


def test_a_name_that_is_category_and_feature_shows_the_fuller_balance() -> None:
    both = FeatureBudgetFactory.create(name="product")
    for scope, spent in (("category:product", 7), ("feature:product", 9)):
        SpendWindowFactory.create(scope=scope, spent_nanousd=spent)

    assert balances_today_and_month([both])["product"].today.spent_nanousd == 9


def test_the_highest_override_in_force_raises_the_limit() -> None:
    chat = FeatureBudgetFactory.create(name="chat", monthly_limit_usd=10)
    for amount in (15, 20, 5):
        LimitOverrideFactory.create(budget=chat, amount_usd=amount)
    LimitOverrideFactory.create(budget=chat, amount_usd=90, until=NOW)
    LimitOverrideFactory.create(budget=chat, amount_usd=80, period="day")

    use = balances_today_and_month([chat])["chat"]

    assert (use.month.limit_nanousd, use.month.raised) == (20 * DOLLAR, True)
    assert (use.today.limit_nanousd, use.today.raised) == (None, False)


@pytest.mark.parametrize("failing", ["refuse", "allow"])
def test_while_redis_is_away_balances_are_those_that_the_tick_copied(
    settings: Settings, failing: str
) -> None:
    chat = FeatureBudgetFactory.create(name="chat")
    SpendWindowFactory.create(scope="feature:chat", spent_nanousd=7, held_nanousd=2)
    settings.AI_BUDGET = {**REDIS_AWAY, "ON_LEDGER_FAILURE": failing}

    use = balances_today_and_month([chat])["chat"]

    assert (use.today.spent_nanousd, use.today.held_nanousd) == (7, 2)
    assert use.month.spent_nanousd == 0


def test_today_is_the_day_of_the_configured_zone(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIME_ZONE": "Pacific/Auckland"}
    chat = FeatureBudgetFactory.create(name="chat")
    SpendWindowFactory.create(scope="feature:chat", first_day=date(2026, 10, 16), spent_nanousd=4)

    assert balances_today_and_month([chat])["chat"].today.spent_nanousd == 4


def test_the_clock_is_read_once() -> None:
    readings = iter([NOW])
    with periods.override_clock(lambda: next(readings)):
        balances_today_and_month([FeatureBudget(name="chat", pk=1)])
