"""One quota for one purpose: who and what it is for is unique, on every database."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.db import DataError, IntegrityError, transaction

from ai_budget.models import UserQuota
from tests.factories import FeatureBudgetFactory, UserFactory, UserQuotaFactory

pytestmark = pytest.mark.django_db


def quota(**fields: Any) -> UserQuota:
    """Everyone's default, unless ``fields`` say otherwise."""
    made: UserQuota = UserQuotaFactory.create(**{"user": None, **fields})
    return made


def for_everyone() -> dict[str, Any]:
    return {}


def for_everyone_and_a_feature() -> dict[str, Any]:
    return {"feature": FeatureBudgetFactory.create(name="chat")}


def for_a_user() -> dict[str, Any]:
    return {"user": UserFactory.create()}


def for_a_user_and_a_feature() -> dict[str, Any]:
    return {"user": UserFactory.create(), "feature": FeatureBudgetFactory.create(name="chat")}


def for_a_group() -> dict[str, Any]:
    return {"group": Group.objects.create(name="staff")}


PURPOSES = [
    for_everyone,
    for_everyone_and_a_feature,
    for_a_user,
    for_a_user_and_a_feature,
    for_a_group,
]


# Once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_second_quota_for_the_same_is_refused(purpose: Any) -> None:
    same = purpose()
    quota(**same)

    with pytest.raises(IntegrityError), transaction.atomic():
        quota(**same, daily_calls=5)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_second_quota_for_the_same_is_not_valid(purpose: Any) -> None:
    same = purpose()
    quota(**same)

    with pytest.raises(ValidationError, match="There is a quota for this already"):
        UserQuota(**same).full_clean()


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_second_quota_for_the_same_is_refused_in_bulk(purpose: Any) -> None:
    same = purpose()

    with pytest.raises(IntegrityError), transaction.atomic():
        UserQuota.objects.bulk_create([UserQuota(**same), UserQuota(**same)])


def test_a_quota_that_becomes_anothers_is_refused() -> None:
    quota()
    own = quota(**for_a_user())
    own.user = None

    with pytest.raises(IntegrityError), transaction.atomic():
        own.save()


def test_quotas_for_different_purposes_stand_side_by_side() -> None:
    feature, user = FeatureBudgetFactory.create(name="chat"), UserFactory.create()

    quota()
    quota(feature=feature)
    quota(user=user)
    quota(user=user, feature=feature)
    quota(user=UserFactory.create(), feature=feature)
    quota(**for_a_group())

    assert UserQuota.objects.count() == 6


def test_a_quota_can_be_saved_and_validated_again() -> None:
    own = quota(**for_a_user())

    own.full_clean()
    own.save()

    assert UserQuota.objects.count() == 1


# Constraints -------------------------------------------------------------------------------------


def test_a_quota_is_not_for_a_user_and_a_group() -> None:
    both = {**for_a_user(), **for_a_group()}

    with (
        pytest.raises(IntegrityError, match="ai_budget_quota_user_or_group"),
        transaction.atomic(),
    ):
        quota(**both)


def test_a_quota_for_a_user_and_a_group_is_not_valid() -> None:
    with pytest.raises(ValidationError, match="for a user or for a group, not both"):
        UserQuota(**for_a_user(), **for_a_group()).full_clean()


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        ("ai_budget_quota_daily_not_negative", "daily_limit_usd"),
        ("ai_budget_quota_monthly_not_negative", "monthly_limit_usd"),
    ],
)
def test_a_limit_is_not_negative(constraint: str, field: str) -> None:
    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        quota(**{field: "-0.000000001"})


@pytest.mark.parametrize("field", ["daily_calls", "requests_per_minute", "tokens_per_minute"])
def test_a_count_is_not_negative(field: str) -> None:
    with pytest.raises((IntegrityError, DataError)), transaction.atomic():
        quota(**{field: -1})


def test_zero_is_a_limit() -> None:
    quota(daily_calls=0, daily_limit_usd=0, monthly_limit_usd=0)


# Deleting ----------------------------------------------------------------------------------------


def test_a_users_quota_goes_with_the_user() -> None:
    own = quota(**for_a_user())
    assert own.user is not None

    own.user.delete()

    assert not UserQuota.objects.exists()


def test_a_features_quota_goes_with_the_feature() -> None:
    own = quota(**for_everyone_and_a_feature())
    assert own.feature is not None

    own.feature.delete()

    assert not UserQuota.objects.exists()


# For people --------------------------------------------------------------------------------------


def test_what_they_are_called() -> None:
    feature = FeatureBudgetFactory.create(name="chat")
    user = UserFactory.create(username="ada")

    assert str(quota()) == "everyone"
    assert str(quota(user=user)) == "ada"
    assert str(quota(user=user, feature=feature)) == "ada, chat"
    assert str(quota(feature=feature)) == "everyone, chat"
