"""The journal: what a row may say, and that it outlives whoever made the call."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction

from ai_budget.models import CallLog
from tests.factories import CallLogFactory, FeatureBudgetFactory, UserFactory

pytestmark = pytest.mark.django_db

HAS_COST = "ai_budget_call_has_cost_once_settled"


# Constraints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "fields"),
    [
        (HAS_COST, {"status": "settled", "cost_nanousd": None}),
        (HAS_COST, {"status": "estimated", "cost_nanousd": None}),
        (HAS_COST, {"status": "reserved", "cost_nanousd": 0}),
        (HAS_COST, {"status": "released", "cost_nanousd": None}),
        (HAS_COST, {"status": "cached", "cost_nanousd": None}),
        ("ai_budget_call_cost_not_negative", {"status": "settled", "cost_nanousd": -1}),
        ("ai_budget_call_reserved_not_negative", {"reserved_nanousd": -1}),
        ("ai_budget_call_released_costs_nothing", {"status": "released", "cost_nanousd": 1}),
        ("ai_budget_call_released_costs_nothing", {"status": "cached", "cost_nanousd": 1}),
    ],
)
def test_a_row_is_refused(constraint: str, fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        CallLogFactory.create(**fields)


@pytest.mark.parametrize("status", CallLog.Status.values)
def test_a_row_of_each_status_is_taken(status: str) -> None:
    CallLogFactory.create(status=status)


@pytest.mark.parametrize("status", ["settled", "estimated"])
def test_an_answer_may_cost_nothing(status: str) -> None:
    CallLogFactory.create(status=status, cost_nanousd=0)


def test_an_update_is_held_to_the_same() -> None:
    CallLogFactory.create(status="reserved")

    with pytest.raises(IntegrityError, match=HAS_COST), transaction.atomic():
        CallLog.objects.update(status="settled")


# Deleting ----------------------------------------------------------------------------------------


def test_deleting_a_user_leaves_the_calls() -> None:
    user = UserFactory.create()
    call: CallLog = CallLogFactory.create(user=user)
    user_id = user.pk

    user.delete()

    call = CallLog.objects.get(pk=call.pk)
    assert call.user_id == user_id
    with pytest.raises(get_user_model().DoesNotExist):
        _ = call.user


def test_a_call_may_be_of_a_user_who_cannot_be_seen_yet() -> None:
    """The ledger's connection does not see a user of the caller's open transaction."""
    user = UserFactory.create()
    user_id = user.pk
    user.delete()

    call: CallLog = CallLogFactory.create(user_id=user_id)

    assert CallLog.objects.get(user_id=user_id).pk == call.pk


def test_a_call_may_be_for_a_feature_that_cannot_be_seen_yet() -> None:
    call: CallLog = CallLogFactory.create(feature=None, feature_id="not-there-yet")

    assert CallLog.objects.get(pk=call.pk).feature_id == "not-there-yet"


# What a row says ---------------------------------------------------------------------------------


def test_amounts_in_dollars_stand_beside_those_in_nano_dollars() -> None:
    call = CallLog(reserved_nanousd=2_000_000, cost_nanousd=1_500_000_001, saved_nanousd=1)

    assert (call.reserved_usd, call.cost_usd, call.saved_usd) == (
        Decimal("0.002"),
        Decimal("1.500000001"),
        Decimal("0.000000001"),
    )


def test_a_reservation_has_no_cost_yet() -> None:
    assert CallLog().cost_usd is None


@pytest.mark.parametrize(("model", "downgraded"), [("opus", False), ("haiku", True)])
def test_a_row_says_whether_another_model_answered(model: str, downgraded: bool) -> None:
    assert CallLog(requested_model="opus", model=model).downgraded is downgraded


def test_a_row_is_called_by_its_feature() -> None:
    FeatureBudgetFactory.create(name="chat")
    call: CallLog = CallLogFactory.create()

    assert str(call) == f"chat #{call.pk}"


def test_the_newest_call_comes_first() -> None:
    first, second = CallLogFactory.create(), CallLogFactory.create()

    assert list(CallLog.objects.all()) == [second, first]
