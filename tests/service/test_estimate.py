"""``estimate``: what a call would cost, without making it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.test import override_settings

import ai_budget
from ai_budget.conf import conf
from ai_budget.models import CallLog, FeatureBudget
from ai_budget.testing import AnthropicSimulator, Reply, override_budget
from tests.guard.books import only_row, rows, windows

pytestmark = pytest.mark.django_db


def test_an_estimate_spends_nothing(api: AnthropicSimulator) -> None:
    estimate = ai_budget.estimate("Hello there", feature="chat")

    assert 0 < estimate.expected <= estimate.most
    assert api.requests == []
    assert not CallLog.objects.exists()
    assert not windows().exists()
    assert not FeatureBudget.objects.exists()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"system": "Be brief."},
        {"max_tokens": 7},
        {"model": "claude-opus-5-5", "max_tokens": 3_000},
        {"tools": [{"name": "t", "input_schema": {"type": "object"}}]},
        {"inference_geo": "us"},
        {"extra_headers": {"x-test": "1"}},
        {"extra_body": {"metadata": {"user_id": "u"}}},
        {"timeout": 3},
    ],
    ids=[
        "nothing",
        "system",
        "max_tokens",
        "model",
        "tools",
        "geography",
        "headers",
        "body",
        "timeout",
    ],
)
def test_the_most_is_what_the_same_call_reserves(
    api: AnthropicSimulator, asked: dict[str, Any]
) -> None:
    estimate = ai_budget.estimate("Hello there", feature="chat", **asked)
    ai_budget.ask("Hello there", feature="chat", **asked)

    row = only_row()
    assert estimate.most_nanousd == row.reserved_nanousd
    assert estimate.model == row.model


def test_what_is_expected_follows_the_features_recent_answers(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(output_tokens=2), Reply(output_tokens=900))
    ai_budget.ask("Hello", feature="short", max_tokens=1_000)
    ai_budget.ask("Hello", feature="long", max_tokens=1_000)

    short = ai_budget.estimate("Hello", feature="short", max_tokens=1_000)
    long = ai_budget.estimate("Hello", feature="long", max_tokens=1_000)

    assert short.expected < long.expected < long.most == short.most


def test_an_estimate_knows_of_fast_mode(api: AnthropicSimulator) -> None:
    usual = ai_budget.estimate("Hello", model="claude-opus-5-5")
    fast = ai_budget.estimate("Hello", model="claude-opus-5-5", speed="fast")

    assert fast.most > fast.expected > usual.expected * Decimal("1.9")


def test_an_estimate_of_what_cannot_be_bounded_says_so(api: AnthropicSimulator) -> None:
    with pytest.raises(ai_budget.UnboundedCall, match="max_uses"):
        ai_budget.estimate("Hi", tools=[{"type": "web_search_20250305", "name": "web_search"}])


def test_an_estimate_of_a_model_without_a_price_says_so(api: AnthropicSimulator) -> None:
    with pytest.raises(ai_budget.UnpricedModel):
        ai_budget.estimate("Hi", model="claude-of-tomorrow")


def test_an_estimate_is_made_where_the_money_is_gone(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=0):
        assert ai_budget.estimate("Hi", feature="chat").most > 0

    assert rows() == []


def test_an_estimate_is_for_the_payer_around_it(api: AnthropicSimulator) -> None:
    with override_budget("chat", model="claude-opus-5-5"), ai_budget.charge(feature="chat"):
        assert ai_budget.estimate("Hi").model == "claude-opus-5-5"


def test_an_estimate_for_an_unknown_feature_is_refused_where_its_calls_are(
    api: AnthropicSimulator,
) -> None:
    with (
        override_settings(AI_BUDGET={**conf.given, "UNKNOWN_FEATURE": "refuse"}),
        pytest.raises(ai_budget.FeatureDisabled, match="misspelt"),
    ):
        ai_budget.estimate("Hi", feature="misspelt")


@pytest.mark.parametrize("mode", ["5m", "1h", "auto"])
def test_what_writing_to_the_prompt_cache_may_cost_is_in_the_most(
    api: AnthropicSimulator, mode: str
) -> None:
    asked: dict[str, Any] = {"feature": "chat", "system": "Answer from the manual. " * 400}
    with override_budget("chat", prompt_cache=mode):
        expected = ai_budget.estimate("Why?", **asked)
        ai_budget.ask("Why?", **asked)

    assert expected.most_nanousd >= only_row().reserved_nanousd
    assert mode == "auto" or expected.most_nanousd == only_row().reserved_nanousd
