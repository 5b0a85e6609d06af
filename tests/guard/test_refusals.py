"""How a refused call is counted and told: once, where it was refused for good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from django.test import override_settings

import ai_budget
from ai_budget.conf import conf
from ai_budget.models import CallLog, UserQuota
from ai_budget.signals import call_refused
from ai_budget.testing import AnthropicSimulator, override_budget
from tests.factories import UserFactory
from tests.guard.books import ledger_of_the_run, refusals

MODEL = "claude-haiku-5-5"

pytestmark = pytest.mark.django_db


@pytest.fixture
def told() -> Iterator[list[tuple[str, str]]]:
    """The features and kinds of the refusals that listeners heard of."""
    heard: list[tuple[str, str]] = []

    def listen(charge: Any, error: Exception, **kwargs: Any) -> None:
        heard.append((charge.feature, type(error).__name__))

    call_refused.connect(listen)
    yield heard
    call_refused.disconnect(listen)


def ask(**who: Any) -> None:
    with pytest.raises(ai_budget.AIBudgetError):
        ai_budget.ask("Hello", feature="chat", **who)


@pytest.mark.parametrize(
    "limit",
    [{"daily_limit_usd": 0}, {"monthly_limit_usd": 0}, {"requests_per_minute": 0}],
)
@pytest.mark.parametrize(
    ("refusing", "scopes"),
    [
        ("chat", {"feature:chat"}),
        ("assistants", {"feature:chat", "category:assistants"}),
        ("*", {"feature:chat", "*"}),
    ],
)
def test_a_refusal_is_counted_for_the_feature_and_for_what_refused(
    refusing: str, scopes: set[str], limit: dict[str, Any], told: list[tuple[str, str]]
) -> None:
    with (
        override_budget("assistants") as category,
        override_budget("chat", parent=category),
        override_budget(refusing, **limit),
    ):
        ask()

    assert refusals() == dict.fromkeys(scopes, 1)
    assert len(told) == 1


@pytest.mark.parametrize("for_feature", [False, True])
def test_a_refusal_is_counted_for_the_caller(for_feature: bool) -> None:
    user: Any = UserFactory.create()
    with override_budget("chat") as chat:
        UserQuota.objects.create(user=user, feature=chat if for_feature else None, daily_calls=0)
        ask(user=user, subject="acme")

    assert refusals() == {"feature:chat": 1, f"user:{user.pk}": 1, "subject:acme": 1}


def test_a_call_for_a_paused_feature_is_a_refusal(told: list[tuple[str, str]]) -> None:
    with override_budget("*", enabled=False):
        ask(subject="acme")

    assert refusals() == {"feature:chat": 1, "subject:acme": 1}
    assert told == [("chat", "FeatureDisabled")]


@pytest.mark.parametrize(
    "request_", [{"model": "claude-of-tomorrow"}, {"mcp_servers": [{"url": "u"}]}]
)
def test_a_mistake_of_the_code_is_told_and_not_counted(
    api: AnthropicSimulator, told: list[tuple[str, str]], request_: dict[str, Any]
) -> None:
    body = {"extra_body": request_} if "mcp_servers" in request_ else request_
    with pytest.raises(ai_budget.AIBudgetError):
        ai_budget.ask("Hello", feature="chat", **body)

    assert refusals() == {}
    assert len(told) == 1


def test_an_unknown_feature_that_is_refused_is_not_counted(told: list[tuple[str, str]]) -> None:
    with override_settings(AI_BUDGET={**conf.given, "UNKNOWN_FEATURE": "refuse"}):
        ask()

    assert refusals() == {}
    assert told == [("chat", "FeatureDisabled")]


def test_a_refusal_that_cannot_be_counted_is_a_refusal_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(*args: Any) -> None:
        raise ai_budget.LedgerUnavailable("away")

    monkeypatch.setattr(ledger_of_the_run(), "count_refusal", away)
    with (
        override_budget("chat", daily_limit_usd=0),
        pytest.raises(ai_budget.BudgetExceeded) as caught,
    ):
        ai_budget.ask("Hello", feature="chat")

    assert caught.value.__cause__ is None


def test_a_call_that_shadow_mode_lets_pass_is_no_refusal(
    api: AnthropicSimulator, told: list[tuple[str, str]]
) -> None:
    with override_budget("chat", daily_limit_usd=0, enforce=False):
        ai_budget.ask("Hello", feature="chat")

    assert refusals() == {}
    assert told == []


def test_each_refused_call_is_counted(client: anthropic.Anthropic) -> None:
    with override_budget("chat", daily_limit_usd=0):
        for _ in range(3):
            ask()

    assert refusals() == {"feature:chat": 3}


def test_a_body_that_is_nested_too_deeply_to_be_read_is_a_typed_error(
    api: AnthropicSimulator,
) -> None:
    content: Any = "Hello"
    for _ in range(3_000):
        content = [{"type": "tool_result", "tool_use_id": "1", "content": content}]
    body: Any = {"messages": [{"role": "user", "content": content}]}
    client = ai_budget.client(feature="chat")

    for route in (None, "length"):
        with pytest.raises(ai_budget.UnboundedCall, match="nested too deeply"):
            ai_budget.ask(body["messages"], feature="chat", route=route)
    with pytest.raises(ai_budget.UnboundedCall, match="nested too deeply"):
        client.post("/v1/messages", body={"model": MODEL, **body}, cast_to=object)

    assert not api.requests
    assert not CallLog.objects.exists()
