"""When a limit says no, and which numbers it says it with; without any store."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from django.test import override_settings

from ai_budget.exceptions import BudgetExceeded, LimitReached, QuotaExceeded
from ai_budget.ledger import base
from ai_budget.ledger.base import SATURATED_RETRY_SECONDS, Ledger, breaches, refusal
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.periods import Period
from ai_budget.values import Amounts, Balances, Limit
from tests.ledger.given import MIDNIGHT, NOON, limit

TEN = Amounts(nanousd=10)


def refused(
    of: Limit,
    *,
    spent: int = 0,
    held: int = 0,
    calls: int = 0,
    amounts: Amounts = TEN,
    at: Any = NOON,
) -> LimitReached | None:
    """What one limit says to an attempt, over this balance."""
    balances = {of.key: Balances(spent_nanousd=spent, held_nanousd=held, calls=calls)}
    found = breaches([of], amounts, balances)
    return refusal(found, at) if found else None


# Whether -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "held", "room"),
    [(0, 0, True), (90, 0, True), (0, 90, True), (45, 45, True), (91, 0, False), (0, 91, False)],
)
def test_a_limit_holds_what_fits_exactly(spent: int, held: int, room: bool) -> None:
    assert (refused(limit(100), spent=spent, held=held) is None) is room


@pytest.mark.parametrize(("calls", "room"), [(0, True), (4, True), (5, False), (6, False)])
def test_a_limit_of_calls_holds_as_many(calls: int, room: bool) -> None:
    assert (refused(limit(5, calls=True), calls=calls) is None) is room


def test_a_repeat_is_no_further_call() -> None:
    assert refused(limit(5, calls=True), calls=5, amounts=Amounts(nanousd=10, calls=0)) is None


def test_a_limit_of_nothing_holds_nothing() -> None:
    assert refused(limit(0), amounts=Amounts(nanousd=1)) is not None
    assert refused(limit(0, calls=True)) is not None


def test_no_limit_holds_anything() -> None:
    assert refused(limit(None), spent=10**18) is None


def test_every_limit_that_has_no_room_is_named() -> None:
    limits = [limit(5), limit(50, "*"), limit(5, "user:7"), limit(0, "user:7", calls=True)]
    balances = {of.key: Balances() for of in limits}

    found = breaches(limits, TEN, balances)

    assert [breach.limit for breach in found] == [limits[0], limits[2], limits[3]]


# With which numbers ------------------------------------------------------------------------------


def numbers(error: LimitReached | None) -> tuple[int, int, int, int]:
    assert error is not None
    return error.limit, error.spent, error.held, error.requested


def test_a_refusal_has_the_numbers_of_its_limit() -> None:
    error = refused(limit(100), spent=60, held=35)

    assert numbers(error) == (100, 60, 35, 10)
    assert error is not None
    assert (error.scope, error.period, error.measure) == ("feature:chat", "day", "nanousd")


def test_a_refusal_of_calls_has_the_numbers_of_calls() -> None:
    error = refused(limit(5, "user:7", calls=True), spent=60, held=35, calls=5)

    assert numbers(error) == (5, 5, 0, 1)
    assert error is not None
    assert error.measure == "calls"


def test_what_is_spent_exhausts_a_limit_until_its_window_ends() -> None:
    error = refused(limit(100), spent=91)

    assert error is not None
    assert error.exhausted
    assert error.resets_at == MIDNIGHT
    assert error.retry_after == 12 * 60 * 60


def test_a_month_ends_later_than_a_day() -> None:
    error = refused(limit(100, period=Period.MONTH), spent=91)

    assert error is not None
    assert error.retry_after == (27 * 24 + 12) * 60 * 60


def test_calls_in_flight_saturate_a_limit_for_a_moment() -> None:
    error = refused(limit(100), spent=90, held=1)

    assert error is not None
    assert error.saturated
    assert error.resets_at == MIDNIGHT
    assert error.retry_after == SATURATED_RETRY_SECONDS


def test_a_call_that_never_fits_is_not_told_to_try_again() -> None:
    error = refused(limit(9), held=1)

    assert error is not None
    assert error.exhausted


@pytest.mark.parametrize(
    ("left", "spent", "held", "retry_after"),
    [
        (timedelta(milliseconds=1), 91, 0, 1),
        (timedelta(seconds=1.5), 91, 0, 2),
        (timedelta(seconds=1), 0, 91, 1),
        (timedelta(0), 91, 0, 1),
        (timedelta(seconds=-5), 91, 0, 1),
    ],
)
def test_retrying_is_never_in_the_past(
    left: timedelta, spent: int, held: int, retry_after: int
) -> None:
    error = refused(limit(100), spent=spent, held=held, at=MIDNIGHT - left)

    assert error is not None
    assert error.retry_after == retry_after


# Which of several --------------------------------------------------------------------------------


def worst(*full: tuple[Limit, Balances]) -> LimitReached:
    found = [breach for of, balances in full for breach in breaches([of], TEN, {of.key: balances})]
    return refusal(found, NOON)


EXHAUSTED, SATURATED = Balances(spent_nanousd=100), Balances(held_nanousd=100)


@pytest.mark.parametrize("order", [1, -1])
def test_the_limit_that_lasts_longest_is_named(order: int) -> None:
    found: Sequence[tuple[Limit, Balances]] = [
        (limit(100), EXHAUSTED),
        (limit(100, "*", period=Period.MONTH), EXHAUSTED),
    ]

    assert worst(*found[::order]).scope == "*"


@pytest.mark.parametrize("order", [1, -1])
def test_an_exhausted_day_is_named_before_a_saturated_month(order: int) -> None:
    found: Sequence[tuple[Limit, Balances]] = [
        (limit(100), EXHAUSTED),
        (limit(100, "*", period=Period.MONTH), SATURATED),
    ]

    assert worst(*found[::order]).scope == "feature:chat"


@pytest.mark.parametrize(
    ("scope", "kind"),
    [
        ("*", BudgetExceeded),
        ("feature:chat", BudgetExceeded),
        ("category:support", BudgetExceeded),
        ("user:7", QuotaExceeded),
        ("user:7,feature:chat", QuotaExceeded),
        ("subject:acme", QuotaExceeded),
        ("subject:acme,feature:chat", QuotaExceeded),
    ],
)
def test_a_callers_limit_is_a_quota(scope: str, kind: type[LimitReached]) -> None:
    assert type(worst((limit(100, scope), EXHAUSTED))) is kind


# Which ledger ------------------------------------------------------------------------------------


class OtherLedger(DatabaseLedger):
    """Another ledger, to be named by the settings."""


def test_the_settings_name_the_ledger() -> None:
    assert type(base.current()) is DatabaseLedger

    with override_settings(AI_BUDGET={"LEDGER": f"{__name__}.{OtherLedger.__name__}"}):
        assert type(base.current()).__name__ == OtherLedger.__name__

    assert type(base.current()) is DatabaseLedger


def test_a_process_has_one_ledger() -> None:
    ledger: Ledger = base.current()

    assert base.current() is ledger
