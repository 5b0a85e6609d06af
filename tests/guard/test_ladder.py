"""The ladder: a cheaper model takes over at its share of a limit, and says so."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest
from django.conf import settings as django_settings
from django.core.cache.backends.base import BaseCache
from django.test import override_settings
from pytest_django import Settings

import ai_budget
from ai_budget.models import CallLog, UserQuota
from ai_budget.signals import call_downgraded
from ai_budget.testing import AnthropicSimulator, Reply, freeze, override_budget
from tests.guard.books import assert_balanced, bill, in_db, rows

pytestmark = pytest.mark.django_db

OPUS, SONNET, HAIKU = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"
LADDER = [(50, SONNET), (90, HAIKU)]
ASKED: dict[str, Any] = {
    "model": OPUS,
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello there"}],
}
TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
TOOL_RESULT = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "here"}],
}


def spend(api: AnthropicSimulator, cents: int, feature: str = "chat") -> None:
    """Make one real call that costs so many cents, and a little for its prompt.

    No limit is in force meanwhile: a reservation is larger than what is spent of it.
    """
    output = cents * 500  # at 20 dollars per million
    api.enqueue(Reply(output_tokens=output))
    with override_budget(feature, daily_limit_usd=None, rungs=[]):
        ai_budget.client(feature=feature).messages.create(
            model=OPUS, max_tokens=output, messages=ASKED["messages"], timeout=60
        )


def last() -> CallLog:
    return rows()[-1]


@pytest.mark.parametrize(
    ("cents", "model", "decision"),
    [(0, OPUS, ""), (49, OPUS, ""), (50, SONNET, "rung 50 % at 50 %"), (91, HAIKU, "rung 90 %")],
)
def test_a_rung_takes_over_at_its_share(
    api: AnthropicSimulator, cents: int, model: str, decision: str
) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        if cents:
            spend(api, cents)
        answer = ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert answer.model == answer.message.model == model
    assert answer.requested_model == OPUS
    assert answer.downgraded == (model != OPUS)
    row = last()
    assert (row.model, row.requested_model) == (model, OPUS)
    assert decision in row.decision
    assert row.cost_nanousd == bill(api)[-1]
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_a_rung_takes_over_for_async_callers(api: AnthropicSimulator) -> None:
    def prepare() -> None:
        from ai_budget.models import FeatureBudget

        budget = FeatureBudget.objects.create(name="chat", daily_limit_usd=1)
        budget.rungs.create(at_percent=50, model=SONNET)
        spend(api, 60)

    await in_db(prepare)

    answer = await ai_budget.aask("Hello", feature="chat", model=OPUS)

    assert (answer.model, answer.downgraded) == (SONNET, True)


def test_the_reservation_is_made_for_the_model_that_answers(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        full = ai_budget.estimate("Hello", feature="chat", model=OPUS)
        spend(api, 60)
        cheaper = ai_budget.estimate("Hello", feature="chat", model=OPUS)
        ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert cheaper.model == SONNET
    assert last().reserved_nanousd == cheaper.most_nanousd < full.most_nanousd


@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_ladder_decides_is_what_is_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic, streamed: bool
) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60)
        answer = client.messages.create(**ASKED, stream=streamed)
        if streamed:
            list(answer)

    assert (api.requests[-1].body or {})["model"] == SONNET
    assert last().cost_nanousd == bill(api)[-1]


def test_a_streamed_answer_says_that_it_was_downgraded(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60)
        with ai_budget.stream("Hello", feature="chat", model=OPUS) as answer:
            "".join(answer)

    assert (answer.model, answer.requested_model, answer.downgraded) == (SONNET, OPUS, True)


def test_the_ladder_of_the_site_holds_for_features_without_one(api: AnthropicSimulator) -> None:
    with override_budget("*", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60, feature="another")
        answer = ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert answer.model == SONNET


def test_who_asks_for_the_model_of_the_rung_is_not_downgraded(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60)
        answer = ai_budget.ask("Hello", feature="chat", model=SONNET)

    assert not answer.downgraded


def test_at_all_of_the_limit_the_feature_is_refused(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 99)
        with pytest.raises(ai_budget.BudgetExceeded) as caught:
            ai_budget.client(feature="chat").messages.create(**{**ASKED, "max_tokens": 20_000})

    assert caught.value.exhausted
    assert caught.value.scope == "feature:chat"


@pytest.mark.parametrize(
    ("rungs", "asked", "model"),
    [
        ([(50, HAIKU)], {"speed": "fast"}, OPUS),
        ([(50, "claude-of-tomorrow")], {}, OPUS),
        ([(50, SONNET), (55, "claude-of-tomorrow")], {}, SONNET),
        ([(50, "claude-haiku-4-5")], {"thinking": {"type": "adaptive"}}, OPUS),
        ([(50, HAIKU)], {"thinking": {"type": "adaptive"}}, HAIKU),
    ],
    ids=["no fast mode", "no price", "the next lower rung", "no such thinking", "thinking"],
)
def test_a_rung_whose_model_does_not_take_the_request_is_skipped(
    api: AnthropicSimulator, rungs: Any, asked: dict[str, Any], model: str
) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=rungs):
        spend(api, 60)
        ai_budget.client(feature="chat").beta.messages.create(**ASKED, **asked)

    assert last().model == model


def test_between_a_tool_call_and_its_result_the_model_stays(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(content=[TOOL_USE]))
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        client.messages.create(**ASKED)
        spend(api, 60)
        client.messages.create(**{**ASKED, "messages": [*ASKED["messages"], TOOL_RESULT]})

    assert (last().model, last().requested_model) == (OPUS, OPUS)


def test_who_asks_another_model_for_the_result_of_a_tool_gets_it(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(content=[TOOL_USE]))
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        client.messages.create(**ASKED)
        client.messages.create(
            **{**ASKED, "model": HAIKU, "messages": [*ASKED["messages"], TOOL_RESULT]}
        )

    assert (last().model, last().requested_model) == (HAIKU, HAIKU)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_downgraded_turn_stays_with_its_model(
    api: AnthropicSimulator, client: anthropic.Anthropic, streamed: bool
) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60)
        api.enqueue(Reply(content=[TOOL_USE]))
        first = client.messages.create(**ASKED, stream=streamed)
        if streamed:
            list(first)
        spend(api, 32)
        client.messages.create(**{**ASKED, "messages": [*ASKED["messages"], TOOL_RESULT]})
        assert (last().model, last().decision) == (SONNET, "same turn")

        client.messages.create(**ASKED)
        assert last().model == HAIKU


def test_a_downgrade_is_told_to_listeners(api: AnthropicSimulator) -> None:
    heard: list[Any] = []

    def listen(**kwargs: Any) -> None:
        heard.append((kwargs["requested_model"], kwargs["model"], kwargs["percent"]))

    call_downgraded.connect(listen)
    try:
        with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
            spend(api, 60)
            ai_budget.ask("Hello", feature="chat", model=OPUS)
    finally:
        call_downgraded.disconnect(listen)

    assert heard == [(OPUS, SONNET, 60)]


class AbsentCache(BaseCache):
    """A cache whose server is away."""

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        super().__init__(params)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("hunter2")

    def set(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("hunter2")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cache_that_is_away_neither_refuses_a_call_nor_loses_its_booking(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    caplog: pytest.LogCaptureFixture,
    streamed: bool,
) -> None:
    away = {**django_settings.CACHES["default"], "BACKEND": f"{__name__}.AbsentCache"}

    with (
        override_settings(CACHES={"default": away}),
        override_budget("chat", daily_limit_usd=1, rungs=LADDER),
    ):
        spend(api, 60)
        for messages in (ASKED["messages"], [*ASKED["messages"], TOOL_RESULT]):
            api.enqueue(Reply(content=[TOOL_USE]))
            answer = client.messages.create(**{**ASKED, "messages": messages}, stream=streamed)
            if streamed:
                list(answer)

    assert [row.status for row in rows()] == ["settled"] * 3
    assert "ConnectionError" in caplog.text
    assert "hunter2" not in caplog.text
    assert_balanced()


def test_the_id_of_a_tool_call_may_be_any_text(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    strange = {**TOOL_USE, "id": "tool use \n " * 40}
    result = [{"type": "tool_result", "tool_use_id": strange["id"], "content": "here"}]
    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        spend(api, 60)
        api.enqueue(Reply(content=[strange]))
        client.messages.create(**ASKED)
        spend(api, 32)
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": result}]})

    assert last().model == SONNET


def test_a_rung_is_no_reason_to_pay_more(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=[(50, SONNET)]):
        spend(api, 60)
        answer = ai_budget.ask("Hello", feature="chat", model="claude-haiku-5-5")

    assert (answer.model, answer.downgraded) == (HAIKU, False)


def test_a_rung_whose_window_is_too_small_is_skipped(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=1, rungs=[(50, "claude-haiku-4-5")]):
        spend(api, 60)
        short = ai_budget.ask("Hello", feature="chat", model=OPUS)
        long = ai_budget.estimate("word " * 130_000, feature="chat", model=OPUS)

    assert (short.model, long.model) == ("claude-haiku-4-5", OPUS)


# Shadow mode


def test_a_ladder_in_shadow_mode_records_what_it_would_do(api: AnthropicSimulator) -> None:
    heard: list[Any] = []
    call_downgraded.connect(lambda **kwargs: heard.append(kwargs), weak=False, dispatch_uid="t")
    try:
        with override_budget("chat", daily_limit_usd=1, enforce=False, rungs=LADDER):
            spend(api, 60)
            answer = ai_budget.ask("Hello", feature="chat", model=OPUS)
    finally:
        call_downgraded.disconnect(dispatch_uid="t")

    assert (answer.model, answer.downgraded) == (OPUS, False)
    assert last().decision == f"would downgrade to {SONNET} (rung 50 % at 60 %)"
    assert heard == []


def test_a_limit_in_shadow_mode_does_not_drive_the_ladder_of_another(
    api: AnthropicSimulator,
) -> None:
    with (
        override_budget("*", daily_limit_usd=100, rungs=LADDER),
        override_budget("chat", daily_limit_usd=1, enforce=False),
    ):
        spend(api, 60)
        answer = ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert (answer.model, last().decision) == (OPUS, "")


def test_a_feature_in_shadow_mode_is_paused_all_the_same() -> None:
    with (
        override_budget("chat", enabled=False, enforce=False),
        pytest.raises(ai_budget.FeatureDisabled),
    ):
        ai_budget.ask("Hello", feature="chat")


def test_a_users_quota_is_enforced_in_shadow_mode(api: AnthropicSimulator) -> None:
    UserQuota.objects.create(daily_calls=0)
    with (
        override_budget("chat", enforce=False),
        pytest.raises(ai_budget.QuotaExceeded),
    ):
        ai_budget.ask("Hello", feature="chat", subject="acme")


# While Redis is away

REDIS_AWAY = {
    "LEDGER": "ai_budget.ledger.redis.RedisLedger",
    "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0",  # where nothing listens
}


def test_while_redis_is_away_a_call_that_is_let_through_keeps_its_model(
    api: AnthropicSimulator, settings: Settings
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, **REDIS_AWAY, "ON_LEDGER_FAILURE": "allow"}

    with override_budget("chat", daily_limit_usd=1, rungs=LADDER):
        answer = ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert (answer.model, answer.downgraded) == (OPUS, False)
    assert last().decision == "unchecked; ladder not read"
    assert last().cost_nanousd == bill(api)[-1]


def test_while_redis_is_away_a_feature_with_a_ladder_is_refused_by_default(
    api: AnthropicSimulator, settings: Settings
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, **REDIS_AWAY}

    with (
        override_budget("chat", daily_limit_usd=1, rungs=LADDER),
        pytest.raises(ai_budget.LedgerUnavailable),
    ):
        ai_budget.ask("Hello", feature="chat", model=OPUS)

    assert api.requests == []


def test_while_redis_is_away_nothing_is_estimated_without_the_ladder(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, **REDIS_AWAY}

    with (
        freeze(datetime(2026, 5, 4, 12, tzinfo=UTC)),  # by a clock that needs no Redis
        override_budget("chat", daily_limit_usd=1, rungs=LADDER),
        pytest.raises(ai_budget.LedgerUnavailable),
    ):
        ai_budget.estimate("Hello", feature="chat", model=OPUS)


# Windows


def image(size: int) -> list[dict[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": "A" * size}
    return [{"role": "user", "content": [{"type": "image", "source": source}]}]


def test_the_bytes_of_an_image_are_no_text(api: AnthropicSimulator) -> None:
    """Its size in tokens is that of its picture, whatever its file weighs."""
    with override_budget("chat", daily_limit_usd=1, rungs=[(50, "claude-haiku-4-5")]):
        spend(api, 60)
        found = ai_budget.estimate(image(700_000), feature="chat", model=OPUS)

    assert found.model == "claude-haiku-4-5"


def test_a_rung_with_a_window_as_large_takes_whatever_was_asked(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=None, rungs=[(50, SONNET)]):
        spend(api, 60)
    with override_budget("*", daily_limit_usd=1, rungs=[(50, SONNET)]):
        found = ai_budget.estimate("word " * 650_000, feature="chat", model=OPUS)

    assert found.model == SONNET
