"""``usage``: what is spent and what is left, to show in a product."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser
from django.test import override_settings
from django.utils.functional import SimpleLazyObject

import ai_budget
from ai_budget.conf import conf
from ai_budget.models import CallLog, FeatureBudget, LimitOverride, UserQuota
from ai_budget.testing import AnthropicSimulator, Reply, freeze, override_budget
from tests.factories import UserFactory
from tests.guard.books import only_row, rows, windows

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
MIDNIGHT = datetime(2026, 5, 5, tzinfo=UTC)
JUNE = datetime(2026, 6, 1, tzinfo=UTC)
CENT = Decimal("0.01")
ZERO = Decimal(0)


@pytest.fixture(autouse=True)
def noon() -> Iterator[None]:
    with freeze(NOON):
        yield


@pytest.fixture
def user() -> Any:
    return UserFactory.create()


def spend(api: AnthropicSimulator, **who: Any) -> Decimal:
    """Make one call and return what it cost."""
    return ai_budget.ask("Hello", **{"feature": "chat", **who}).cost


# Users


def test_a_user_has_spent_what_the_calls_cost(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(user=user, daily_limit_usd=CENT, daily_calls=5)

    cost = spend(api, user=user) + spend(api, user=user, feature="search")
    spend(api, user=UserFactory.create())

    found = ai_budget.usage(user)
    assert (found.spent, found.held, found.limit) == (cost, ZERO, CENT)
    assert found.left == CENT - cost
    assert (found.calls, found.calls_left) == (2, 3)
    assert found.resets_at == MIDNIGHT
    assert found.scope == f"user:{user.pk}"


def test_what_calls_in_flight_hold_is_not_left(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(daily_limit_usd=CENT)

    with ai_budget.stream("Hello", feature="chat", user=user) as answer:
        during = ai_budget.usage(user)
        list(answer)

    held = Decimal(only_row().reserved_nanousd).scaleb(-9)
    assert (during.spent, during.held, during.left) == (ZERO, held, CENT - held)
    assert ai_budget.usage(user).held == 0


def test_who_has_asked_nothing_has_spent_nothing(user: Any) -> None:
    found = ai_budget.usage(user)

    assert (found.spent, found.held, found.calls) == (ZERO, ZERO, 0)
    assert (found.limit, found.left, found.calls_left) == (None, None, None)
    assert found.resets_at == MIDNIGHT


@pytest.mark.parametrize(
    ("daily", "monthly", "limit", "resets_at"),
    [
        (1, 30, 1, MIDNIGHT),
        (3, 2, 2, JUNE),
        (None, 2, 2, JUNE),
        (1, None, 1, MIDNIGHT),
        (0, 30, 0, MIDNIGHT),
        (None, None, None, MIDNIGHT),
    ],
)
def test_the_tightest_window_is_told(
    user: Any, daily: int | None, monthly: int | None, limit: int | None, resets_at: datetime
) -> None:
    UserQuota.objects.create(user=user, daily_limit_usd=daily, monthly_limit_usd=monthly)

    found = ai_budget.usage(user)

    assert (found.limit, found.left, found.resets_at) == (limit, limit, resets_at)
    assert (found.day.limit, found.month.limit) == (daily, monthly)
    assert (found.day.resets_at, found.month.resets_at) == (MIDNIGHT, JUNE)


def test_less_than_nothing_is_not_left(api: AnthropicSimulator, user: Any) -> None:
    """A limit may be lowered below what is spent."""
    spend(api, user=user)
    UserQuota.objects.create(user=user, daily_limit_usd=0, daily_calls=0)

    found = ai_budget.usage(user)

    assert (found.left, found.calls_left) == (ZERO, 0)
    assert found.spent > 0


def test_a_user_may_be_lazy_or_a_primary_key(api: AnthropicSimulator, user: Any) -> None:
    cost = spend(api, user=user)

    assert ai_budget.usage(user.pk).spent == cost
    assert ai_budget.usage(str(user.pk)).spent == cost
    assert ai_budget.usage(SimpleLazyObject(lambda: user)).spent == cost


def test_a_users_usage_of_one_feature_has_that_features_quota(
    api: AnthropicSimulator, user: Any
) -> None:
    with override_budget("chat") as chat:
        UserQuota.objects.create(user=user, daily_calls=9)
        UserQuota.objects.create(user=user, feature=chat, daily_calls=3)
        cost = spend(api, user=user)
        spend(api, user=user, feature="search")

        found = ai_budget.usage(user, feature="chat")

    assert (found.spent, found.calls, found.calls_left) == (cost, 1, 2)
    assert ai_budget.usage(user).calls_left == 7


def test_a_subject_has_a_usage_of_its_own(api: AnthropicSimulator) -> None:
    UserQuota.objects.create(daily_calls=9)
    cost = spend(api, subject="acme")

    assert ai_budget.usage(subject="acme").spent == cost
    assert ai_budget.usage(subject="acme", feature="chat").spent == cost
    assert ai_budget.usage(subject="acme").calls_left == 8
    assert ai_budget.usage(subject="other").calls_left == 9


# Features


def test_a_feature_has_what_everybody_spent(api: AnthropicSimulator, user: Any) -> None:
    with override_budget("chat", daily_limit_usd=CENT):
        cost = spend(api, user=user) + spend(api, subject="acme")
        spend(api, feature="search")

        found = ai_budget.usage(feature="chat")

    assert (found.scope, found.spent, found.calls) == ("feature:chat", cost, 2)
    assert found.left == CENT - cost
    assert found.calls_left is None


def test_an_override_counts(api: AnthropicSimulator) -> None:
    with override_budget("chat", monthly_limit_usd=1) as chat:
        LimitOverride.objects.create(
            budget=chat, period="month", amount_usd=5, until=JUNE, reason="launch"
        )

        assert ai_budget.usage(feature="chat").limit == 5


def test_a_category_has_what_its_features_spent(api: AnthropicSimulator) -> None:
    with (
        override_budget("assistants", daily_limit_usd=CENT) as category,
        override_budget("chat", parent=category),
    ):
        cost = spend(api, feature="chat") + spend(api, feature="assistants")

        found = ai_budget.usage(feature="assistants")

    assert (found.scope, found.spent, found.limit) == ("category:assistants", cost, CENT)


@pytest.mark.parametrize("row", [True, False])
def test_the_whole_site_has_a_usage_too(api: AnthropicSimulator, row: bool) -> None:
    if row:
        FeatureBudget.objects.create(name="*", daily_limit_usd=CENT)
    with override_settings(AI_BUDGET={**conf.given, "DAILY_LIMIT_USD": CENT}):
        cost = spend(api, feature="chat") + spend(api, feature="search")
        found = ai_budget.usage(feature="*")

    assert (found.scope, found.spent, found.limit) == ("*", cost, CENT)


# What it leaves alone


def test_asking_writes_and_sends_nothing(api: AnthropicSimulator, user: Any) -> None:
    for who in ({"user": user}, {"feature": "brand-new"}, {"subject": "acme", "feature": "x"}):
        ai_budget.usage(**who)

    assert api.requests == []
    assert rows() == []
    assert not FeatureBudget.objects.exists()
    assert not windows().exists()


def test_a_feature_that_is_misspelt_is_refused_where_its_calls_are() -> None:
    with (
        override_settings(AI_BUDGET={**conf.given, "UNKNOWN_FEATURE": "refuse"}),
        pytest.raises(ai_budget.FeatureDisabled, match="misspelt"),
    ):
        ai_budget.usage(feature="misspelt")


def test_a_user_is_known_where_unknown_features_are_refused(user: Any) -> None:
    with override_settings(AI_BUDGET={**conf.given, "UNKNOWN_FEATURE": "refuse"}):
        assert ai_budget.usage(user).spent == 0


def test_a_charge_around_it_changes_nothing(api: AnthropicSimulator, user: Any) -> None:
    cost = spend(api, user=user)

    with ai_budget.charge(feature="search", subject="acme"):
        assert ai_budget.usage(user).spent == cost


@pytest.mark.parametrize(
    "who",
    [
        {},
        {"user": AnonymousUser()},
        {"user": AnonymousUser(), "feature": "chat"},
    ],
)
def test_somebody_must_be_named(who: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="whose usage"):
        ai_budget.usage(**who)


def test_only_one_is_named_at_a_time(user: Any) -> None:
    with pytest.raises(TypeError, match="not both"):
        ai_budget.usage(user, subject="acme")


def test_a_paused_feature_has_a_usage(api: AnthropicSimulator) -> None:
    with override_budget("chat", enabled=False, daily_limit_usd=1):
        assert ai_budget.usage(feature="chat").left == 1


def test_what_is_booked_to_nobody_is_no_users(api: AnthropicSimulator, user: Any) -> None:
    api.enqueue(Reply(text="Hi"))
    ai_budget.ask("Hello", feature="chat")

    assert CallLog.objects.get().user_id is None
    assert ai_budget.usage(user).spent == 0
