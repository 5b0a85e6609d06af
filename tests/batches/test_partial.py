"""``allow_partial``: as many items as fit, each in its turn, and the others refused by name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model

from ai_budget.exceptions import BudgetExceeded, QuotaExceeded, RateLimited
from ai_budget.guard.batch import preparing
from ai_budget.models import Batch, FeatureBudget, UserQuota
from ai_budget.money import to_usd
from ai_budget.testing import AnthropicSimulator, override_budget
from ai_budget.values import Amounts
from tests.batches.submitted import (
    FEATURE,
    HAIKU,
    assert_nothing_left,
    differences,
    items,
    keys,
    most,
    reservation,
    statuses_of,
    submit,
    work_off,
)
from tests.guard.books import ledger_of_the_run, refusals, site

pytestmark = pytest.mark.django_db

LONG = 5_000
"""Tokens of an answer that costs many times what the others do."""


def prompt(max_tokens: int = 100) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    return {"model": HAIKU, "max_tokens": max_tokens, "messages": messages}


def room_for(count: int) -> Decimal:
    """Dollars that so many short prompts need, and a little more."""
    return to_usd(count * most(prompt()) + 1)


def test_as_many_items_as_fit_are_taken_in_their_order(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=room_for(3)):
        batch = submit([prompt()] * 5, allow_partial=True)

    assert statuses_of(batch) == ["open", "open", "open", "refused", "refused"]
    assert (batch.total, batch.refused, batch.open) == (5, 2, 3)
    assert batch.held_nanousd == batch.reserved_nanousd == 3 * most(prompt())
    assert (site().held_nanousd, site().calls) == (batch.held_nanousd, 3)
    assert reservation(batch).counted == 3


def test_what_does_not_fit_holds_up_nothing_that_does(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=room_for(2)):
        batch = submit([("a", prompt()), ("b", prompt(LONG)), ("c", prompt())], allow_partial=True)

    refused = [item.key for item in items(batch) if item.status == "refused"]
    assert refused == ["b"]


def test_refused_items_are_not_sent_and_can_be_submitted_later(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=room_for(1)):
        batch = work_off(submit([("a", prompt()), ("b", prompt())], allow_partial=True))

    assert statuses_of(batch) == ["succeeded", "refused"]
    assert [result.status for result in batch.results()] == ["succeeded", "refused"]
    assert len((api.requests[0].body or {})["requests"]) == 1
    assert keys(batch.resubmit()) == ["b"]


def test_where_all_fits_nothing_is_refused(api: AnthropicSimulator) -> None:
    batch = submit([prompt()] * 3, allow_partial=True)

    assert statuses_of(batch) == ["open"] * 3
    assert refusals() == {}


def test_where_nothing_fits_the_batch_is_refused(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=0), pytest.raises(BudgetExceeded) as error:
        submit([prompt()] * 3, allow_partial=True)

    assert error.value.items_fit == 0
    assert refusals()[f"feature:{FEATURE}"] == 1
    assert_nothing_left(api)


def test_a_part_is_no_refusal(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=room_for(1)):
        submit([prompt()] * 3, allow_partial=True)

    assert refusals() == {}


def test_the_narrowest_limit_decides(api: AnthropicSimulator) -> None:
    jobs = FeatureBudget.objects.create(name="jobs", monthly_limit_usd=room_for(2))
    FeatureBudget.objects.create(name=FEATURE, parent=jobs, daily_limit_usd=room_for(3))
    user = get_user_model().objects.create_user("ada")
    UserQuota.objects.create(user=user, daily_calls=4)

    batch = submit([prompt()] * 5, allow_partial=True, user=user)

    assert statuses_of(batch).count("open") == 2


def test_a_limit_of_calls_takes_as_many_items(api: AnthropicSimulator) -> None:
    UserQuota.objects.create(daily_calls=2)

    batch = submit([prompt()] * 3, allow_partial=True, subject="tenant")

    assert statuses_of(batch) == ["open", "open", "refused"]
    with pytest.raises(QuotaExceeded):
        submit([prompt()], allow_partial=True, subject="tenant")


def test_limits_in_shadow_mode_leave_nothing_out(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, daily_limit_usd=0, enforce=False):
        batch = submit([prompt()] * 3, allow_partial=True)

    assert statuses_of(batch) == ["open"] * 3


def test_limits_in_shadow_mode_make_no_part_smaller(api: AnthropicSimulator) -> None:
    with (
        override_budget("*", daily_limit_usd=room_for(2)),
        override_budget(FEATURE, daily_limit_usd=room_for(1), enforce=False),
    ):
        batch = submit([prompt()] * 3, allow_partial=True)

    assert statuses_of(batch) == ["open", "open", "refused"]


def test_a_rate_takes_a_batch_or_none(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, requests_per_minute=0), pytest.raises(RateLimited):
        submit([prompt()] * 3, allow_partial=True)

    assert_nothing_left(api)


def test_a_submission_of_which_nothing_fits_is_none(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_ITEMS", 2)

    with override_budget(FEATURE, daily_limit_usd=room_for(3)):
        batch = submit([prompt()] * 6, allow_partial=True)

    assert [it.items_count for it in batch.submissions.order_by("number")] == [2, 1]
    assert work_off(batch).succeeded == 3


def test_what_others_take_at_the_same_moment_leaves_a_smaller_part(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of_the_run()
    reserve = ledger.reserve
    amounts: list[Amounts] = []

    def reserve_after_another(self: Any, limits: Any, wanted: Amounts, attempt: Any) -> Any:
        amounts.append(wanted)
        if len(amounts) == 2:
            with monkeypatch.context() as plain:
                plain.setattr(ledger, "reserve", reserve)
                submit([prompt()])
        return reserve(self, limits, wanted, attempt)

    with override_budget(FEATURE, daily_limit_usd=room_for(3)):
        monkeypatch.setattr(ledger, "reserve", reserve_after_another)
        batch = submit([prompt()] * 5, allow_partial=True)

    assert [it.calls for it in amounts] == [5, 3, 2]
    assert statuses_of(batch).count("open") == 2
    assert site().held_nanousd == sum(it.held_nanousd for it in Batch.objects.all())
    assert differences(batch) == []
