"""A balance has one row, found by what it is for; and so has a bucket."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from django.db import IntegrityError, transaction

from ai_budget.models import RateBucket, SpendWindow
from tests.factories import SpendWindowFactory

pytestmark = pytest.mark.django_db

FIRST = date(2026, 5, 1)


@pytest.mark.parametrize("field", ["spent_nanousd", "held_nanousd", "calls", "refused"])
def test_no_balance_is_negative(field: str) -> None:
    with pytest.raises(IntegrityError, match="ai_budget_window_not_negative"), transaction.atomic():
        SpendWindowFactory.create(**{field: -1})


@pytest.mark.parametrize("field", ["spent_nanousd", "held_nanousd", "calls"])
def test_no_balance_becomes_negative(field: str) -> None:
    SpendWindowFactory.create()

    with pytest.raises(IntegrityError, match="ai_budget_window_not_negative"), transaction.atomic():
        SpendWindow.objects.update(**{field: -1})


def test_a_balance_has_one_row() -> None:
    SpendWindowFactory.create(first_day=FIRST)

    with pytest.raises(IntegrityError), transaction.atomic():
        SpendWindowFactory.create(first_day=FIRST)


def test_a_balance_that_is_there_already_is_left_alone() -> None:
    SpendWindowFactory.create(first_day=FIRST, spent_nanousd=5)

    SpendWindow.objects.bulk_create(
        [SpendWindow(scope="feature:chat", period="day", first_day=FIRST)], ignore_conflicts=True
    )

    assert SpendWindow.objects.get().spent_nanousd == 5


def test_the_first_day_and_the_first_month_are_two_balances() -> None:
    SpendWindowFactory.create(first_day=FIRST, period="day")
    SpendWindowFactory.create(first_day=FIRST, period="month")

    assert SpendWindow.objects.count() == 2


def test_a_row_is_found_by_what_it_is_for() -> None:
    window: SpendWindow = SpendWindowFactory.create(scope="user:7", period="month", first_day=FIRST)

    assert window.pk == SpendWindow.key_for("user:7", "month", FIRST)
    assert SpendWindow.objects.get(pk=window.pk).scope == "user:7"


def test_the_longest_scope_fits() -> None:
    scope = f"subject:{'s' * 100},feature:{'f' * 64}"

    window: SpendWindow = SpendWindowFactory.create(scope=scope, period="month", first_day=FIRST)

    window.refresh_from_db()
    assert window.scope == scope


def test_amounts_in_dollars_stand_beside_those_in_nano_dollars() -> None:
    window = SpendWindow(spent_nanousd=1_500_000_001, held_nanousd=1)

    assert (window.spent_usd, window.held_usd) == (Decimal("1.500000001"), Decimal("0.000000001"))


def test_a_balance_is_called_by_what_it_is_for() -> None:
    assert str(SpendWindow(scope="*", period="day", first_day=FIRST)) == "* day 2026-05-01"


# Buckets -----------------------------------------------------------------------------------------


def test_a_bucket_is_full_until_it_is_used() -> None:
    RateBucket.objects.create(key=RateBucket.key_for("feature:chat", "requests", 60))

    assert RateBucket.objects.values_list("used", "at_ms").get() == (0, 0)


@pytest.mark.parametrize(
    "other",
    [
        ("feature:Chat", "requests", 60),
        ("feature:chat", "tokens", 60),
        ("feature:chat", "requests", 6),
        ("feature:chat|requests", "60", 60),
    ],
)
def test_buckets_for_something_else_are_others(other: tuple[str, str, int]) -> None:
    assert RateBucket.key_for(*other) != RateBucket.key_for("feature:chat", "requests", 60)


def test_a_bucket_does_not_tell_whom_it_is_for() -> None:
    """It may be for the address of a visitor."""
    row = RateBucket(key=RateBucket.key_for("view:login:192.0.2.1", "requests", 60))

    assert "192.0.2.1" not in str(vars(row)) + str(row)
