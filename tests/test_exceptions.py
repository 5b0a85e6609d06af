"""A refusal is a typed exception with the numbers, and nothing in it is anybody's text."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from datetime import UTC, datetime

import pytest

import ai_budget
from ai_budget import exceptions
from ai_budget.exceptions import (
    AIBudgetError,
    BudgetExceeded,
    CallInsideTransaction,
    FeatureDisabled,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    RateLimited,
    Refusal,
    UnboundedCall,
    UnclassifiedUsage,
    UnpricedEndpoint,
    UnpricedModel,
)

LIMITS = [BudgetExceeded, QuotaExceeded, RateLimited]
OTHERS = [
    FeatureDisabled,
    UnpricedModel,
    UnclassifiedUsage,
    UnboundedCall,
    UnpricedEndpoint,
    LedgerUnavailable,
    CallInsideTransaction,
]
USED_UP = Refusal(
    scope="feature:chat",
    period="day",
    measure="nanousd",
    limit=5_000_000_000,
    spent=4_990_000_000,
    held=5_000_000,
    requested=20_000_000,
    exhausted=True,
    resets_at=datetime(2026, 5, 5, tzinfo=UTC),
    retry_after=43_200,
    delay=43_199.5,
)


# The tree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_that_says_no_is_a_limit_reached(kind: type[Exception]) -> None:
    assert kind.__bases__ == (LimitReached,)


@pytest.mark.parametrize("kind", [LimitReached, *OTHERS])
def test_every_other_error_is_one_of_ours(kind: type[Exception]) -> None:
    assert kind.__bases__ == (AIBudgetError,)


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    defined = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, AIBudgetError)
    }
    drawn = {
        line.split("──")[1].split()[0]
        for line in (exceptions.__doc__ or "").splitlines()
        if "──" in line
    }

    assert drawn | {"AIBudgetError"} == defined


@pytest.mark.parametrize("kind", [*LIMITS, *OTHERS, LimitReached, AIBudgetError])
def test_an_error_is_documented(kind: type[Exception]) -> None:
    assert kind.__doc__


@pytest.mark.parametrize("kind", [*LIMITS, *OTHERS, AIBudgetError])
def test_an_error_is_at_hand_in_the_package(kind: type[Exception]) -> None:
    assert getattr(ai_budget, kind.__name__) is kind


# The numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIMITS)
def test_a_refusal_carries_its_numbers(kind: type[LimitReached]) -> None:
    error = kind(USED_UP)

    carried = {name: getattr(error, name) for name in Refusal.__slots__}
    assert carried == {name: getattr(USED_UP, name) for name in Refusal.__slots__}


def test_what_is_spent_exhausts_a_limit() -> None:
    error = BudgetExceeded(USED_UP)

    assert (error.exhausted, error.saturated) == (True, False)


def test_calls_in_flight_only_saturate_it() -> None:
    error = BudgetExceeded(replace(USED_UP, exhausted=False))

    assert (error.exhausted, error.saturated) == (False, True)


def test_the_message_says_which_limit_and_all_of_its_numbers() -> None:
    assert str(BudgetExceeded(USED_UP)) == (
        "The daily limit of feature:chat has too little left: limit $5.0000, spent $4.9900, held "
        "$0.0050, this call needs up to $0.0200; it resets at 2026-05-05 00:00 UTC."
    )


def test_the_message_of_a_limit_that_is_used_up_says_so() -> None:
    refusal = replace(USED_UP, spent=USED_UP.limit, held=0)

    assert "limit of feature:chat is used up: " in str(BudgetExceeded(refusal))


def test_the_message_of_a_batch_says_how_many_of_its_items_would_fit() -> None:
    refusal = replace(USED_UP, items_fit=1_234)

    message = str(BudgetExceeded(refusal))
    assert "this batch needs up to $0.0200" in message
    assert message.endswith(" 1,234 of its items would fit.")


def test_the_message_of_a_saturated_limit_says_so() -> None:
    refusal = replace(USED_UP, period="month", exhausted=False)

    message = str(BudgetExceeded(refusal))

    assert message.startswith("The monthly limit of feature:chat is held by calls in flight:")


def test_a_limit_of_calls_is_told_in_calls() -> None:
    refusal = replace(USED_UP, measure="calls", limit=1_000, spent=1_000, held=0, requested=1)

    message = str(QuotaExceeded(refusal))

    assert "limit 1,000 calls, spent 1,000 calls, held 0 calls, this call needs up to 1" in message


def test_a_limit_of_requests_is_told_in_requests() -> None:
    refusal = replace(
        USED_UP, period="minute", measure="requests", limit=20, spent=20, held=0, requested=1
    )

    message = str(RateLimited(refusal))

    assert message.startswith("The per-minute limit of feature:chat is used up: limit 20 requests")


def test_a_refusal_that_no_waiting_helps_has_no_delay() -> None:
    error = BudgetExceeded(replace(USED_UP, delay=None))

    assert (error.delay, error.retry_after) == (None, USED_UP.retry_after)


# Across a process border -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIMITS)
def test_a_refusal_survives_pickling(kind: type[LimitReached]) -> None:
    error = pickle.loads(pickle.dumps(kind(USED_UP)))  # noqa: S301 - our own bytes

    assert type(error) is kind
    assert error.refusal == USED_UP
    assert str(error) == str(kind(USED_UP))
    assert (error.retry_after, error.delay) == (USED_UP.retry_after, USED_UP.delay)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_error_survives_pickling(kind: type[AIBudgetError]) -> None:
    error = pickle.loads(pickle.dumps(kind("why")))  # noqa: S301

    assert (type(error), str(error)) == (kind, "why")
