"""One step takes from every limit of an attempt, or from none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from pytest_django import DjangoAssertNumQueries

from ai_budget.exceptions import BudgetExceeded, LimitReached, QuotaExceeded
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period
from ai_budget.values import SITE, BalanceKey, Balances, Charge, Limit
from tests.ledger.given import (
    CHAT,
    NOON,
    RELEASED,
    ZONE,
    attempt,
    balance,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
    spent_held_calls,
    sums_of_calls,
    sums_of_windows,
)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("clock")]

ALL_KINDS = [
    limit(100),
    limit(1_000, period=Period.MONTH),
    limit(100, "category:support"),
    limit(100, SITE),
    limit(100, "user:7"),
    limit(5, "user:7", calls=True),
    limit(100, "user:7,feature:chat"),
    limit(None, "subject:acme"),
]


def refused(limits: list[Limit], nanousd: int = 10, **fields: Any) -> LimitReached:
    with pytest.raises(LimitReached) as raised:
        reserve(limits, nanousd, **fields)
    return raised.value


# All or nothing ----------------------------------------------------------------------------------


def test_an_amount_is_held_in_every_balance() -> None:
    reserve(ALL_KINDS, 30)

    assert {spent_held_calls(of) for of in ALL_KINDS} == {(0, 30, 1)}


def test_two_limits_of_one_balance_are_counted_in_once() -> None:
    """Money a day and calls a day of a user are one row."""
    reserve(ALL_KINDS, 30)

    assert len({of.key for of in ALL_KINDS}) == len(ALL_KINDS) - 1
    assert SpendWindow.objects.count() == len(ALL_KINDS) - 1


@pytest.mark.parametrize("full", [of for of in ALL_KINDS if of.amount is not None])
def test_where_one_limit_has_no_room_nothing_is_taken(full: Limit) -> None:
    reserve(ALL_KINDS, 0, calls=0)  # so that the balances are there
    fills_up = 1_000 if full.measure == "nanousd" else 0
    reserve([Limit(scope=full.scope, window=full.window)], fills_up, calls=5)
    before = sums_of_windows()

    refused(ALL_KINDS)

    assert sums_of_windows() == before
    assert CallLog.objects.count() == 2


def test_the_order_in_which_limits_are_given_changes_nothing() -> None:
    first, second = reserve(ALL_KINDS), reserve(ALL_KINDS[::-1])

    assert first.balances == second.balances


def test_what_is_held_is_not_there_for_another() -> None:
    reserve([limit(100)], 60)

    assert refused([limit(100)], 41).held == 60


def test_what_is_spent_is_not_there_for_another() -> None:
    settle(reserve([limit(100)], 60), settled(60))

    assert refused([limit(100)], 41).spent == 60


def test_a_limit_can_be_reached_exactly() -> None:
    reserve([limit(100)], 60)

    reserve([limit(100)], 40)

    assert spent_held_calls(limit(100)) == (0, 100, 2)


def test_the_last_nano_dollar_is_the_last() -> None:
    reserve([limit(100)], 100)

    assert refused([limit(100)], 1).limit == 100


@pytest.mark.parametrize("scope", ["feature:chat", SITE, "user:7", "subject:acme"])
def test_a_limit_of_nothing_lets_nothing_through(scope: str) -> None:
    refused([limit(0, scope)], 1)

    assert not CallLog.objects.exists()


def test_a_limit_of_a_months_money_spans_its_days() -> None:
    month = limit(100, period=Period.MONTH)
    settle(reserve([month], 60), settled(60))
    tomorrow = NOON + timedelta(days=1)

    refused([limit(100, period=Period.MONTH, at=tomorrow)], 41, at=tomorrow)


def test_a_new_day_is_a_new_limit() -> None:
    reserve([limit(100)], 100)
    tomorrow = NOON + timedelta(days=1)

    reserve([limit(100, at=tomorrow)], 100, at=tomorrow)

    assert SpendWindow.objects.count() == 2


def test_an_amount_too_large_to_count_is_refused_by_any_limit() -> None:
    refused([limit(2**62)], 2**62 + 1)


# Calls -------------------------------------------------------------------------------------------


def test_calls_a_day_are_counted() -> None:
    of = limit(2, "user:7", calls=True)
    reserve([of], 0)
    reserve([of], 0)

    error = refused([of], 0)

    assert (error.limit, error.spent, error.requested, error.measure) == (2, 2, 1, "calls")


def test_a_repeat_of_a_call_is_not_counted() -> None:
    of = limit(1, "user:7", calls=True)
    reserve([of], 10)

    repeat = reserve([of], 10, calls=0)

    assert spent_held_calls(of) == (0, 20, 1)
    assert row(repeat).counted == 0


def test_a_settled_call_still_counts() -> None:
    of = limit(1, "user:7", calls=True)
    settle(reserve([of], 10), settled(0))

    refused([of], 10)


def test_a_released_call_counts_no_more() -> None:
    of = limit(1, "user:7", calls=True)
    settle(reserve([of], 10), RELEASED)

    reserve([of], 10)


# Who is refused, and how -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "kind"),
    [
        ("feature:chat", BudgetExceeded),
        ("category:support", BudgetExceeded),
        (SITE, BudgetExceeded),
        ("user:7", QuotaExceeded),
        ("user:7,feature:chat", QuotaExceeded),
        ("subject:acme", QuotaExceeded),
    ],
)
def test_a_refusal_is_of_the_kind_of_its_limit(scope: str, kind: type[LimitReached]) -> None:
    error = refused([limit(None), limit(5, scope)])

    assert type(error) is kind
    assert error.scope == scope


def test_a_refusal_has_no_cause_that_the_sdk_would_follow() -> None:
    error = refused([limit(5)])

    assert error.__cause__ is None
    assert error.__suppress_context__


def test_a_refusal_tells_what_is_spent_from_what_is_held() -> None:
    settle(reserve([limit(100)], 60), settled(50))
    reserve([limit(100)], 45)

    error = refused([limit(100)], 10)

    assert (error.spent, error.held, error.requested, error.limit) == (50, 45, 10, 100)
    assert error.saturated
    assert error.retry_after == ledgers.SATURATED_RETRY_SECONDS


def test_an_exhausted_limit_says_when_it_ends() -> None:
    settle(reserve([limit(100)], 100), settled(100))

    error = refused([limit(100)])

    assert error.exhausted
    assert error.resets_at == limit(100).window.end
    assert error.retry_after == 12 * 60 * 60


# Refusals are counted, and are no rows -----------------------------------------------------------

WHO = Charge(feature="chat", user_id=7, subject="acme")


def refusals() -> dict[str, int]:
    return {
        f"{window.scope} {window.period}": window.refused
        for window in SpendWindow.objects.all()
        if window.refused
    }


def test_a_refusal_takes_nothing() -> None:
    refused(limits_of(WHO, daily=5), charge=WHO)

    assert sums_of_windows() == {}
    assert not CallLog.objects.exists()


def test_a_refusal_counts_only_when_it_is_final() -> None:
    """A call that waits for its turn is refused many times, and is one."""
    error = refused(limits_of(WHO, daily=5), charge=WHO)
    before = refusals()

    ledgers.current().count_refusal([limit(None, error.scope).key])

    assert (before, refusals()) == ({}, {"feature:chat day": 1})


def test_refusals_add_up() -> None:
    keys = [limit(None).key, limit(None, "user:7").key]

    ledgers.current().count_refusal(iter(keys))
    ledgers.current().count_refusal(keys)

    assert refusals() == {"feature:chat day": 2, "user:7 day": 2}


def test_a_refusal_of_nobody_is_counted_nowhere() -> None:
    ledgers.current().count_refusal([])

    assert not SpendWindow.objects.exists()


# Shadow mode -------------------------------------------------------------------------------------


def test_shadow_mode_lets_through_and_takes() -> None:
    watched = limit(5, enforce=False)

    reserve([watched], 10)

    assert spent_held_calls(watched) == (0, 10, 1)


def test_shadow_mode_writes_down_what_it_would_have_refused() -> None:
    watched = [limit(5, enforce=False), limit(5, SITE, period=Period.MONTH, enforce=False)]

    reservation = reserve(watched, 10, decision="rung 80 % at 85 %")

    assert row(reservation).decision == (
        "rung 80 % at 85 %; would refuse: feature:chat day, * month"
    )


def test_shadow_mode_writes_nothing_where_there_is_room() -> None:
    assert row(reserve([limit(10, enforce=False)], 10)).decision == ""


def test_shadow_mode_of_one_limit_is_not_that_of_another() -> None:
    error = refused([limit(5, enforce=False), limit(7, SITE)])

    assert error.scope == SITE


# The journal -------------------------------------------------------------------------------------


def test_the_journal_has_all_that_was_decided() -> None:
    user_id = get_user_model()._meta.pk.to_python("7")
    charge = Charge(feature="chat", user_id=user_id, subject="acme", tags={"plan": "free"})
    made = attempt(
        charge,
        number=2,
        category="support",
        speed="fast",
        inference_geo="us",
        decision="rung 80 % at 85 %",
    )

    reservation = reserve(limits_of(charge), 10, charge=charge, **_fields(made))

    found = row(reservation)
    assert found.call_id == made.call_id
    assert (found.attempt, found.counted, found.kind) == (2, 1, "ask")
    assert (found.feature_id, found.category) == ("chat", "support")
    assert (found.user_id, found.subject, found.tags) == (user_id, "acme", {"plan": "free"})
    assert (found.requested_model, found.model) == (made.requested_model, made.model)
    assert (found.provider, found.max_tokens) == ("anthropic", 1024)
    assert (found.speed, found.inference_geo) == ("fast", "us")
    assert (found.decision, found.rates) == (made.decision, made.rates)
    assert (found.reserved_at, found.day, found.deadline) == (
        made.reserved_at,
        made.day,
        made.deadline,
    )


def _fields(made: Any) -> dict[str, Any]:
    return {
        name: getattr(made, name)
        for name in ("call_id", "number", "category", "speed", "inference_geo", "decision")
    }


def test_a_new_row_is_reserved_at_its_amount_and_nothing_else() -> None:
    found = row(reserve([limit(None)], 10))

    assert (found.status, found.reserved_nanousd, found.cost_nanousd) == ("reserved", 10, None)
    assert (found.settled_at, found.latency_ms, found.first_token_ms) == (None, None, None)
    assert (found.input_tokens, found.output_tokens, found.saved_nanousd) == (0, 0, 0)
    assert (found.stop_reason, found.request_id, found.error) == ("", "", "")


def test_a_long_decision_is_cut() -> None:
    assert len(row(reserve([limit(None)], decision="x" * 300)).decision) == 200


def test_the_row_is_valid() -> None:
    row(reserve([limit(None)])).clean_fields(exclude=["feature", "user"])


def test_the_journal_and_the_balances_agree() -> None:
    for charge in (CHAT, WHO):
        reserve(limits_of(charge), 10, charge=charge)

    assert sums_of_windows() == sums_of_calls()


# Balances ----------------------------------------------------------------------------------------


def test_a_balance_that_was_never_counted_in_is_left_out() -> None:
    reserve([limit(None)], 10)

    found = ledgers.current().balances([limit(None).key, limit(None, SITE).key])

    assert dict(found) == {limit(None).key: Balances(held_nanousd=10, calls=1)}


def test_no_balances_are_none(django_assert_num_queries: DjangoAssertNumQueries) -> None:
    with django_assert_num_queries(0):
        assert dict(ledgers.current().balances([])) == {}


def test_balances_are_read_at_once(django_assert_num_queries: DjangoAssertNumQueries) -> None:
    reserve(ALL_KINDS)

    with django_assert_num_queries(1):
        found = ledgers.current().balances(of.key for of in ALL_KINDS)

    assert set(found) == {of.key for of in ALL_KINDS}


def test_a_balance_is_that_of_its_own_day() -> None:
    reserve([limit(None)], 10)

    assert balance(limit(None, at=NOON + timedelta(days=1))) is None


@pytest.mark.parametrize(
    "subject", ["Acme", "acme", "ACME", "ácme", "acme ", "a%", "a_", "a|day|2026-05-04", "'", '"']
)
def test_subjects_are_told_apart_by_their_letters(subject: str) -> None:
    others = {"Acme", "acme", "ACME", "ácme", "acme ", "acmé"} - {subject}
    for other in others:
        reserve([limit(None, f"subject:{other}")], 10)

    reserve([limit(5, f"subject:{subject}")], 5)

    assert spent_held_calls(limit(None, f"subject:{subject}")) == (0, 5, 1)


def test_a_key_is_a_scope_a_period_and_a_day() -> None:
    assert limit(None).key == BalanceKey("feature:chat", Period.DAY, NOON.astimezone(ZONE).date())
