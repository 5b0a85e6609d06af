"""What the tables of budgets refuse, on every database, whoever writes to them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import DataError, IntegrityError, transaction
from django.db.models import ProtectedError

from ai_budget.models import DowngradeRung, FeatureBudget, LimitOverride
from tests.factories import (
    CallLogFactory,
    DowngradeRungFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    UserFactory,
)

pytestmark = pytest.mark.django_db


def site() -> FeatureBudget:
    return FeatureBudgetFactory.create(name="*")


def category(name: str = "support") -> FeatureBudget:
    """A budget that another has for its category."""
    parent = FeatureBudgetFactory.create(name=name)
    FeatureBudgetFactory.create(parent=parent)
    return parent


# Constraints of the database ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "fields"),
    [
        ("ai_budget_feature_daily_not_negative", {"daily_limit_usd": "-0.000000001"}),
        ("ai_budget_feature_monthly_not_negative", {"monthly_limit_usd": "-0.000000001"}),
        ("ai_budget_feature_plan_not_negative", {"monthly_plan_usd": "-0.000000001"}),
        ("ai_budget_feature_plan_share_percent", {"plan_share": 101}),
        ("ai_budget_feature_max_tokens_positive", {"max_tokens": 0}),
    ],
)
def test_a_budget_is_refused(constraint: str, fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        FeatureBudget.objects.create(name="chat", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"daily_limit_usd": 0, "monthly_limit_usd": 0, "monthly_plan_usd": 0},
        {"daily_limit_usd": None, "monthly_limit_usd": None, "monthly_plan_usd": None},
        {"plan_share": 0},
        {"plan_share": 100},
        {"max_tokens": 1},
        {"requests_per_minute": 0, "tokens_per_minute": 0},
    ],
)
def test_a_budget_is_taken(fields: dict[str, Any]) -> None:
    FeatureBudget.objects.create(name="chat", **fields)


@pytest.mark.parametrize("field", ["plan_share", "requests_per_minute", "tokens_per_minute"])
def test_a_count_is_not_negative(field: str) -> None:
    with pytest.raises((IntegrityError, DataError)), transaction.atomic():
        FeatureBudget.objects.create(name="chat", **{field: -1})


def test_an_update_is_held_to_the_same() -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)

    with pytest.raises(IntegrityError), transaction.atomic():
        FeatureBudget.objects.update(daily_limit_usd=-1)


def test_a_name_is_taken_once() -> None:
    FeatureBudget.objects.create(name="chat")

    with pytest.raises(IntegrityError), transaction.atomic():
        FeatureBudget.objects.create(name="chat")


@pytest.mark.parametrize("percent", [0, 100, 101])
def test_a_rung_is_at_a_share_between_nothing_and_all(percent: int) -> None:
    with pytest.raises(IntegrityError, match="ai_budget_rung_percent"), transaction.atomic():
        DowngradeRungFactory.create(at_percent=percent)


@pytest.mark.parametrize("percent", [1, 99])
def test_a_rung_is_taken(percent: int) -> None:
    DowngradeRungFactory.create(at_percent=percent)


def test_a_budget_has_one_rung_at_a_share() -> None:
    rung: DowngradeRung = DowngradeRungFactory.create(at_percent=80)

    with pytest.raises(IntegrityError), transaction.atomic():
        DowngradeRungFactory.create(budget=rung.budget, at_percent=80, model="another")


def test_two_budgets_have_rungs_at_the_same_share() -> None:
    DowngradeRungFactory.create(at_percent=80)
    DowngradeRungFactory.create(at_percent=80)

    assert DowngradeRung.objects.count() == 2


def test_an_override_is_not_negative() -> None:
    with (
        pytest.raises(IntegrityError, match="ai_budget_override_not_negative"),
        transaction.atomic(),
    ):
        LimitOverrideFactory.create(amount_usd="-0.01")


def test_an_override_of_nothing_is_taken() -> None:
    LimitOverrideFactory.create(amount_usd=0)


# Validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "Chat-2", "chat.v2_beta", "*", "c" * 64, "7"])
def test_a_name_is_valid(name: str) -> None:
    FeatureBudget(name=name).full_clean()


@pytest.mark.parametrize(
    "name", ["", "my chat", "chat*", "**", "chat\n", "a|b", "a,b", "a:b", "käse", "c" * 65, "a\0b"]
)
def test_a_name_is_not_valid(name: str) -> None:
    with pytest.raises(ValidationError) as raised:
        FeatureBudget(name=name).full_clean()

    assert "name" in raised.value.message_dict


def test_a_name_cannot_be_changed() -> None:
    budget: FeatureBudget = FeatureBudgetFactory.create(name="chat")
    budget.name = "talk"

    with pytest.raises(ValidationError) as raised:
        budget.full_clean()

    assert set(raised.value.message_dict) == {"name"}


def test_everything_else_can_be_changed() -> None:
    budget: FeatureBudget = FeatureBudgetFactory.create(name="chat")
    budget.daily_limit_usd = Decimal(5)
    budget.parent = category()

    budget.full_clean()


def test_a_feature_is_in_a_category() -> None:
    FeatureBudget(name="chat", parent=FeatureBudgetFactory.create(name="support")).full_clean()


def refused_parent(budget: FeatureBudget) -> bool:
    with pytest.raises(ValidationError) as raised:
        budget.full_clean()
    return set(raised.value.message_dict) == {"parent"}


def test_a_category_is_in_no_category() -> None:
    budget, other = category(), FeatureBudgetFactory.create(name="company")
    budget.parent = other

    assert refused_parent(budget)


def test_what_is_in_a_category_is_no_category() -> None:
    child = FeatureBudgetFactory.create(parent=FeatureBudgetFactory.create(name="support"))

    assert refused_parent(FeatureBudget(name="chat", parent=child))


def test_a_budget_is_not_its_own_category() -> None:
    budget: FeatureBudget = FeatureBudgetFactory.create(name="chat")
    budget.parent = budget

    assert refused_parent(budget)


def test_the_site_is_in_no_category() -> None:
    assert refused_parent(
        FeatureBudget(name="*", parent=FeatureBudgetFactory.create(name="support"))
    )


def test_the_site_is_no_category() -> None:
    assert refused_parent(FeatureBudget(name="chat", parent=site()))


@pytest.mark.parametrize("percent", [0, 100])
def test_a_rung_outside_of_a_share_is_not_valid(percent: int) -> None:
    budget = FeatureBudgetFactory.create()

    with pytest.raises(ValidationError):
        DowngradeRung(budget=budget, at_percent=percent, model="claude-haiku-5-5").full_clean()


# Deleting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["reserved", "settled", "released", "cached"])
def test_a_feature_with_calls_is_not_deleted(status: str) -> None:
    call = CallLogFactory.create(status=status)

    with pytest.raises(ProtectedError):
        call.feature.delete()

    assert FeatureBudget.objects.filter(name=call.feature_id).exists()


def test_a_category_with_features_is_not_deleted() -> None:
    with pytest.raises(ProtectedError):
        category().delete()


def test_a_feature_without_calls_goes_with_all_that_is_its_own() -> None:
    budget: FeatureBudget = FeatureBudgetFactory.create()
    DowngradeRungFactory.create(budget=budget)
    LimitOverrideFactory.create(budget=budget)

    budget.delete()

    assert (DowngradeRung.objects.count(), LimitOverride.objects.count()) == (0, 0)


def test_an_override_outlives_the_user_who_made_it() -> None:
    user = UserFactory.create()
    override: LimitOverride = LimitOverrideFactory.create(created_by=user)

    user.delete()

    override.refresh_from_db()
    assert override.created_by is None


# For people --------------------------------------------------------------------------------------


def test_what_they_are_called() -> None:
    rung: DowngradeRung = DowngradeRungFactory.build(at_percent=80, model="claude-haiku-5-5")
    override: LimitOverride = LimitOverrideFactory.build(period="day", amount_usd=20)

    assert str(FeatureBudget(name="chat")) == "chat"
    assert str(rung) == "80 %: claude-haiku-5-5"
    assert str(override) == "Daily limit: $20.00"
