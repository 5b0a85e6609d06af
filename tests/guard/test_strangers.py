"""Whatever a stranger names in a call that is refused leaves at most a count behind."""

from __future__ import annotations

from typing import Any

import pytest

import ai_budget
from ai_budget.guard.body import is_larger_than
from ai_budget.models import CallLog, FeatureBudget, SpendWindow
from ai_budget.testing import AnthropicSimulator, override_budget
from tests.factories import FeatureBudgetFactory
from tests.guard.books import refusals, windows

pytestmark = pytest.mark.django_db


def refused(*, feature: str = "chat", subject: str) -> None:
    with pytest.raises(ai_budget.LimitReached):
        ai_budget.ask("Hello", feature=feature, subject=subject, tags={"from": subject})


@pytest.mark.parametrize("limit", [{"daily_limit_usd": 0}, {"requests_per_minute": 0}])
def test_a_refused_call_of_a_new_subject_makes_no_balance(
    anthropic_api: AnthropicSimulator, limit: dict[str, Any]
) -> None:
    FeatureBudgetFactory.create(name="chat")
    with override_budget("*", **limit):
        for number in range(3):
            refused(subject=f"stranger-{number}")

        assert (
            {row.scope for row in windows()}
            == set(refusals())
            == {
                *("*", "feature:chat"),
                *(f"subject:stranger-{number}" for number in range(3)),
            }
        )
    assert not CallLog.objects.exists()


def test_a_refused_call_for_a_new_feature_makes_no_budget(
    anthropic_api: AnthropicSimulator,
) -> None:
    with override_budget("*", daily_limit_usd=0):
        refused(feature="of-a-stranger", subject="stranger")
        assert [row.name for row in FeatureBudget.objects.exclude(name="*")] == []

    ai_budget.ask("Hello", feature="of-a-friend")
    assert [row.name for row in FeatureBudget.objects.exclude(name="*")] == ["of-a-friend"]


def test_a_large_prompt_is_not_bounded_where_it_is_sure_to_be_refused(
    anthropic_api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounded(*given: object, **options: object) -> None:
        raise AssertionError("the bound was worked out")

    monkeypatch.setattr("ai_budget.guard.deciding.bound", bounded)
    large = "a\u0301\u0327" * 20_000
    with override_budget("*", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        ai_budget.ask(large, feature="chat")
    assert refusals() == {"feature:chat": 1, "*": 1}

    with pytest.raises(AssertionError):
        ai_budget.ask(large, feature="chat")
    assert anthropic_api.requests == []


@pytest.mark.parametrize(
    ("body", "larger"),
    [
        ("x" * 101, True),
        ("x" * 90, False),
        ({"a": ["x" * 30] * 3}, False),
        ({"a": ["x" * 30] * 4}, True),
        ([[]] * 101, True),
        ([1, None, 2.5, True] * 20, False),
        ({str(number): 0 for number in range(60)}, True),
    ],
)
def test_how_large_a_body_is(body: object, larger: bool) -> None:
    assert is_larger_than(100, body) is larger


def test_what_was_only_looked_at_makes_no_budget(anthropic_api: AnthropicSimulator) -> None:
    ai_budget.estimate("Hello", feature="looked-at")
    ai_budget.usage(feature="looked-at")

    assert not FeatureBudget.objects.exclude(name="*").exists()
    assert not SpendWindow.objects.exists()
