"""Limits, quotas and caps as callers of a guarded client meet them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import anthropic
import pytest
from django.contrib.auth import get_user_model
from django.test import override_settings

import ai_budget
from ai_budget.conf import conf
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.signals import call_settled
from ai_budget.testing import AnthropicSimulator, Fail, Reply, override_budget
from tests.guard.books import (
    MODEL,
    assert_balanced,
    assert_exact,
    balance,
    in_db,
    only_row,
    refusals,
    rows,
    statuses,
    windows,
)

pytestmark = pytest.mark.django_db

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello there"}],
}


@pytest.fixture
def user(db: None) -> Any:
    return get_user_model().objects.create_user("ada")


def ai_budget_settings(**changes: Any) -> Any:
    """Override keys of the one setting, and leave the address of the local API."""
    return override_settings(AI_BUDGET={**conf.given, **changes})


# max_tokens and model


def test_max_tokens_comes_from_the_call(api: AnthropicSimulator) -> None:
    with override_budget("chat", max_tokens=300):
        ai_budget.ask("Hello", feature="chat", max_tokens=70)

    assert (api.requests[0].body or {})["max_tokens"] == 70
    assert only_row().max_tokens == 70


def test_max_tokens_comes_from_the_feature_where_the_call_says_none(
    api: AnthropicSimulator,
) -> None:
    with override_budget("chat", max_tokens=300):
        ai_budget.ask("Hello", feature="chat")

    assert (api.requests[0].body or {})["max_tokens"] == 300
    assert only_row().decision == ""


def test_max_tokens_comes_from_the_setting_where_nobody_says_one(api: AnthropicSimulator) -> None:
    with ai_budget_settings(DEFAULT_MAX_TOKENS=222):
        ai_budget.ask("Hello", feature="chat")

    assert (api.requests[0].body or {})["max_tokens"] == 222


@pytest.mark.parametrize("way", ["ask", "client", "beta", "stream"])
def test_the_features_max_tokens_is_a_cap_and_lowering_is_recorded(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    asked = {**ASKED, "max_tokens": 5_000}
    with override_budget("chat", max_tokens=40):
        match way:
            case "ask":
                ai_budget.ask("Hello", feature="chat", max_tokens=5_000)
            case "client":
                client.messages.create(**asked)
            case "beta":
                client.beta.messages.create(**asked)
            case _:
                list(client.messages.create(**asked, stream=True))

    assert (api.requests[0].body or {})["max_tokens"] == 40
    row = only_row()
    assert (row.max_tokens, row.decision) == (40, "max_tokens 5000 to 40")


def test_the_cap_reaches_the_models_that_may_take_over(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    others = [{"model": "claude-sonnet-5-5", "max_tokens": 9_000}, {"model": "claude-opus-5-5"}]
    with override_budget("chat", max_tokens=40):
        client.messages.create(**ASKED, extra_body={"fallbacks": others})

    sent = (api.requests[0].body or {})["fallbacks"]
    assert sent == [{"model": "claude-sonnet-5-5", "max_tokens": 40}, {"model": "claude-opus-5-5"}]


@pytest.mark.parametrize(
    ("asked", "feature", "setting", "model"),
    [
        ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-4-5", "claude-opus-5-5"),
        (None, "claude-sonnet-5-5", "claude-haiku-4-5", "claude-sonnet-5-5"),
        (None, "", "claude-haiku-4-5", "claude-haiku-4-5"),
    ],
    ids=["call", "feature", "setting"],
)
def test_the_model_comes_from_the_call_then_the_feature_then_the_setting(
    api: AnthropicSimulator, asked: str | None, feature: str, setting: str, model: str
) -> None:
    with override_budget("chat", model=feature), ai_budget_settings(DEFAULT_MODEL=setting):
        answer = ai_budget.ask("Hello", feature="chat", model=asked)

    assert answer.model == answer.requested_model == model
    assert not answer.downgraded


def test_a_model_without_a_price_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with pytest.raises(ai_budget.UnpricedModel, match="claude-of-tomorrow"):
        client.messages.create(**{**ASKED, "model": "claude-of-tomorrow"})

    assert api.requests == []
    assert rows() == []


# Features


def test_an_unknown_feature_is_created(api: AnthropicSimulator) -> None:
    ai_budget.ask("Hello", feature="brand-new")

    assert FeatureBudget.objects.filter(name="brand-new").exists()
    assert_exact(api)


def test_an_unknown_feature_is_refused_where_the_setting_says_so(api: AnthropicSimulator) -> None:
    with (
        ai_budget_settings(UNKNOWN_FEATURE="refuse"),
        pytest.raises(ai_budget.FeatureDisabled, match="misspelt"),
    ):
        ai_budget.ask("Hello", feature="misspelt")

    assert not FeatureBudget.objects.filter(name="misspelt").exists()
    assert api.requests == []


def test_a_call_outside_any_charge_is_booked_to_the_default_feature(
    api: AnthropicSimulator,
) -> None:
    with ai_budget_settings(DEFAULT_FEATURE="misc"):
        ai_budget.ask("Hello")

    assert only_row().feature_id == "misc"


@pytest.mark.parametrize("paused", ["chat", "*"])
def test_a_paused_budget_refuses(
    api: AnthropicSimulator, client: anthropic.Anthropic, paused: str
) -> None:
    with override_budget(paused, enabled=False), pytest.raises(ai_budget.FeatureDisabled):
        client.messages.create(**ASKED)

    assert api.requests == []
    assert rows() == []


def test_a_paused_category_refuses_its_features(api: AnthropicSimulator) -> None:
    with (
        override_budget("assistants", enabled=False) as category,
        override_budget("chat", parent=category),
        pytest.raises(ai_budget.FeatureDisabled, match="assistants"),
    ):
        ai_budget.ask("Hello", feature="chat")


# Limits of money


def assert_refused(error: ai_budget.LimitReached, scope: str, period: str = "day") -> None:
    assert (error.scope, error.period) == (scope, period)
    assert error.retry_after > 0
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize("way", ["ask", "create", "stream", "stream=True", "raw", "count"])
def test_a_feature_without_money_is_refused_whatever_the_way(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    def call() -> None:
        match way:
            case "ask":
                ai_budget.ask("Hello", feature="chat")
            case "create":
                client.messages.create(**ASKED)
            case "stream":
                with client.messages.stream(**ASKED):
                    pass
            case "stream=True":
                client.messages.create(**ASKED, stream=True)
            case "raw":
                client.messages.with_raw_response.create(**ASKED)
            case _:
                client.messages.count_tokens(model=MODEL, messages=ASKED["messages"])
                client.messages.create(**ASKED)

    with (
        override_budget("chat", monthly_limit_usd=0),
        pytest.raises(ai_budget.BudgetExceeded) as caught,
    ):
        call()

    assert_refused(caught.value, "feature:chat", "month")
    assert caught.value.exhausted
    assert api.billed == []
    assert rows() == []
    assert refusals() == {"feature:chat": 1}


@pytest.mark.django_db(transaction=True)
async def test_an_async_call_without_money_is_refused_once(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    await FeatureBudget.objects.acreate(name="chat", daily_limit_usd=0)

    with pytest.raises(ai_budget.BudgetExceeded) as caught:
        await async_client.messages.create(**ASKED)

    assert_refused(caught.value, "feature:chat")
    assert await in_db(refusals) == {"feature:chat": 1}
    assert api.requests == []


def test_a_refusal_after_a_failed_attempt_is_final(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def take_the_money_away(**kwargs: Any) -> None:
        FeatureBudget.objects.filter(name="chat").update(daily_limit_usd=0)

    api.enqueue(Fail(status=529, retry_after=0.001))
    call_settled.connect(take_the_money_away)
    try:
        with pytest.raises(ai_budget.BudgetExceeded) as caught:
            client.messages.create(**ASKED)
    finally:
        call_settled.disconnect(take_the_money_away)

    assert_refused(caught.value, "feature:chat")
    assert [row.error for row in rows()] == ["HTTP 529"]
    assert len(api.requests) == 1


def test_a_category_is_a_limit_of_all_its_features(api: AnthropicSimulator) -> None:
    with (
        override_budget("assistants", daily_limit_usd=Decimal("0.001")) as category,
        override_budget("chat", parent=category),
        override_budget("search", parent=category),
    ):
        api.enqueue(Reply(output_tokens=900))
        ai_budget.ask("Hello", feature="chat", max_tokens=900)
        assert only_row().category == "assistants"
        with pytest.raises(ai_budget.BudgetExceeded) as caught:
            ai_budget.ask("Hello", feature="search", max_tokens=1_000)

    assert_refused(caught.value, "category:assistants")
    assert caught.value.spent == only_row().cost_nanousd
    assert_balanced()


def test_the_limit_of_the_site_comes_from_the_settings(api: AnthropicSimulator) -> None:
    with (
        ai_budget_settings(DAILY_LIMIT_USD="0.0001"),
        pytest.raises(ai_budget.BudgetExceeded) as caught,
    ):
        ai_budget.ask("Hello", feature="chat")

    assert_refused(caught.value, "*")
    assert caught.value.limit == 100_000


def test_the_budget_of_the_site_wins_over_the_settings(api: AnthropicSimulator) -> None:
    with ai_budget_settings(DAILY_LIMIT_USD=0), override_budget("*", daily_limit_usd=1):
        ai_budget.ask("Hello", feature="chat")

    assert_exact(api)


def test_a_shadow_budget_records_what_it_would_refuse(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=0, enforce=False):
        ai_budget.ask("Hello", feature="chat")

    assert assert_exact(api).decision == "would refuse: feature:chat day"


def test_a_limit_held_by_a_call_in_flight_is_saturated(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with override_budget("chat", daily_limit_usd=Decimal("0.00009")):
        stream = client.messages.create(**ASKED, stream=True)
        with pytest.raises(ai_budget.BudgetExceeded) as caught:
            client.messages.create(**ASKED)
        list(stream)
        client.messages.create(**ASKED)

    assert caught.value.saturated
    assert not caught.value.exhausted
    assert caught.value.retry_after < 60
    assert statuses() == ["settled", "settled"]
    assert_balanced()


# Quotas


@pytest.mark.parametrize("whose", ["own", "everyone's"])
def test_a_user_has_so_many_calls_a_day(api: AnthropicSimulator, user: Any, whose: str) -> None:
    UserQuota.objects.create(user=user if whose == "own" else None, daily_calls=2)

    for _ in range(2):
        ai_budget.ask("Hello", feature="chat", user=user)
    with pytest.raises(ai_budget.QuotaExceeded) as caught:
        ai_budget.ask("Hello", feature="chat", user=user)

    assert_refused(caught.value, f"user:{user.pk}")
    assert (caught.value.measure, caught.value.limit, caught.value.spent) == ("calls", 2, 2)
    assert len(api.billed) == 2
    assert refusals() == {"feature:chat": 1, f"user:{user.pk}": 1}
    ai_budget.ask("Hello", feature="chat")  # nobody's


def test_retries_do_not_use_up_a_users_calls(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(user=user, daily_calls=1)
    api.enqueue(Fail(status=529, retry_after=0.001), Fail(status=529, retry_after=0.001))

    ai_budget.ask("Hello", feature="chat", user=user)

    assert statuses() == ["settled"] * 3
    assert balance(f"user:{user.pk}").calls == 1


def test_a_call_that_never_left_does_not_use_up_a_users_calls(user: Any) -> None:
    UserQuota.objects.create(user=user, daily_calls=1)

    for _ in range(2):
        with pytest.raises(anthropic.APIConnectionError):
            ai_budget.client(
                user=user, max_retries=0, base_url="http://127.0.0.1:9"
            ).messages.create(**ASKED)

    assert balance(f"user:{user.pk}").calls == 0


def test_a_user_has_so_many_dollars(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(user=user, daily_limit_usd=Decimal("0.0003"))
    api.enqueue(Reply(output_tokens=400))

    ai_budget.ask("Hello", feature="chat", user=user, max_tokens=400)
    with pytest.raises(ai_budget.QuotaExceeded) as caught:
        ai_budget.ask("Hello", feature="search", user=user, max_tokens=400)

    assert_refused(caught.value, f"user:{user.pk}")
    assert caught.value.spent == only_row().cost_nanousd


def test_a_users_quota_for_one_feature_leaves_the_others(
    api: AnthropicSimulator, user: Any
) -> None:
    with override_budget("chat") as chat:
        UserQuota.objects.create(user=user, feature=chat, daily_calls=0)

        with pytest.raises(ai_budget.QuotaExceeded) as caught:
            ai_budget.ask("Hello", feature="chat", user=user)
        ai_budget.ask("Hello", feature="search", user=user)

    assert_refused(caught.value, f"user:{user.pk},feature:chat")


def test_each_subject_has_a_quota_of_its_own(api: AnthropicSimulator, user: Any) -> None:
    UserQuota.objects.create(daily_calls=1)

    ai_budget.ask("Hello", feature="chat", subject="tenant-1")
    ai_budget.ask("Hello", feature="chat", subject="tenant-2")
    with pytest.raises(ai_budget.QuotaExceeded) as caught:
        ai_budget.ask("Hello", feature="chat", subject="tenant-1", user=user)

    assert_refused(caught.value, "subject:tenant-1")
    assert balance(f"user:{user.pk}").calls == 0  # refused as a whole


@pytest.mark.parametrize(
    ("first", "second"),
    [("bob", "Bob"), ("bob", "bob "), ("bob", "böb"), ("bob", "bob,feature:chat")],
)
def test_subjects_that_are_written_alike_are_not_the_same(
    api: AnthropicSimulator, first: str, second: str
) -> None:
    UserQuota.objects.create(daily_calls=1)

    ai_budget.ask("Hello", feature="chat", subject=first)
    ai_budget.ask("Hello", feature="chat", subject=second)

    assert len(api.billed) == 2
    assert_balanced()


def test_a_user_may_be_told_by_the_primary_key(api: AnthropicSimulator, user: Any) -> None:
    ai_budget.ask("Hello", feature="chat", user=user.pk)

    assert only_row().user_id == user.pk


def test_windows_without_a_limit_count_too(api: AnthropicSimulator, user: Any) -> None:
    ai_budget.ask("Hello", feature="chat", user=user, subject="tenant-1")

    cost = only_row().cost_nanousd or 0
    assert {window.scope for window in windows().filter(spent_nanousd=cost, calls=1)} == {
        "*",
        "feature:chat",
        f"user:{user.pk}",
        f"user:{user.pk},feature:chat",
        "subject:tenant-1",
        "subject:tenant-1,feature:chat",
    }


def test_what_was_refused_leaves_the_rest_of_the_budget_untouched(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with override_budget("chat", daily_limit_usd=Decimal("0.01")):
        with pytest.raises(ai_budget.BudgetExceeded):
            client.messages.create(**{**ASKED, "max_tokens": 21_000})
        client.messages.create(**ASKED)

    assert_exact(api)
