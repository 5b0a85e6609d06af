"""``ask`` and ``aask``: one answer, with what it cost."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import Any

import anthropic
import pytest
from django.contrib.auth import get_user_model

import ai_budget
from ai_budget.models import CallLog
from ai_budget.policy.routing import Question
from ai_budget.testing import AnthropicSimulator, CutBeforeResponse, Fail, Reply
from ai_budget.values import Kind
from tests.guard.books import assert_balanced, assert_exact, bill, in_db, only_row, rows, statuses

pytestmark = pytest.mark.django_db

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {}},
}


async def coroutine(question: Question) -> str:
    return question.asked


def sent(api: AnthropicSimulator) -> dict[str, Any]:
    """The body of the last request."""
    return api.requests[-1].body or {}


def test_an_answer_carries_its_text_its_cost_and_its_origin(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text="Four."))

    answer = ai_budget.ask("What is two and two?", feature="sums")

    row = assert_exact(api)
    assert answer.text == str(answer) == "Four."
    assert answer.cost_nanousd == row.cost_nanousd
    assert answer.cost == Decimal(bill(api)[0]).scaleb(-9)
    assert answer.model == answer.requested_model == "claude-haiku-5-5"
    assert not answer.downgraded
    assert not answer.cached
    assert answer.call_id == row.call_id
    assert answer.usage.input_tokens == row.input_tokens
    assert answer.usage.output_tokens == row.output_tokens
    assert isinstance(answer.message, anthropic.types.Message)
    assert (row.feature_id, row.kind) == ("sums", Kind.ASK)


@pytest.mark.django_db(transaction=True)
async def test_an_async_answer_is_the_same(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text="Four."))

    answer = await ai_budget.aask("What is two and two?", feature="sums")

    row = await in_db(assert_exact, api)
    assert answer.text == "Four."
    assert answer.cost_nanousd == row.cost_nanousd
    assert answer.call_id == row.call_id
    assert (row.feature_id, row.kind) == ("sums", Kind.ASK)


def test_a_prompt_may_be_text(api: AnthropicSimulator) -> None:
    ai_budget.ask("Hello")

    assert sent(api)["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_prompt_may_be_messages(api: AnthropicSimulator) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "How are you?"}]},
    ]

    ai_budget.ask(iter(messages))

    assert sent(api)["messages"] == messages


def test_the_rest_passes_to_the_sdk_unchanged(api: AnthropicSimulator) -> None:
    ai_budget.ask(
        "Hello",
        system="Be brief.",
        tools=[WEATHER],
        tool_choice={"type": "auto"},
        stop_sequences=["END"],
        metadata={"user_id": "u"},
    )

    body = sent(api)
    assert body["system"] == "Be brief."
    assert body["tools"] == [WEATHER]
    assert body["tool_choice"] == {"type": "auto"}
    assert body["stop_sequences"] == ["END"]
    assert "stream" not in body


def test_only_text_is_the_text_of_an_answer(api: AnthropicSimulator) -> None:
    api.enqueue(
        Reply(
            content=[
                {"type": "text", "text": "I shall look. "},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
                {"type": "text", "text": "Wait."},
            ]
        )
    )

    answer = ai_budget.ask("The weather?", tools=[WEATHER])

    assert answer.text == "I shall look. Wait."
    assert answer.message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("timeout", "error"), [("soon", TypeError), (True, TypeError), (-1, ValueError)]
)
def test_a_timeout_that_is_none_is_refused(
    api: AnthropicSimulator, timeout: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="timeout is a number of seconds"):
        ai_budget.ask("Hello", timeout=timeout)

    assert not CallLog.objects.exists()


def test_a_timeout_is_the_requests(api: AnthropicSimulator) -> None:
    api.enqueue(*[Reply(text="Late", delay=5)] * 3)

    with pytest.raises(anthropic.APITimeoutError):
        ai_budget.ask("Hello", timeout=0.05)

    assert statuses() == ["estimated"] * 3


def test_who_pays_is_recorded(api: AnthropicSimulator) -> None:
    user = get_user_model().objects.create_user("ada")

    ai_budget.ask("Hello", feature="chat", user=user, subject="tenant", tags={"plan": "free"})

    row = only_row()
    assert (row.feature_id, row.user_id, row.subject) == ("chat", user.pk, "tenant")
    assert row.tags == {"plan": "free"}


def test_the_cost_of_an_answer_is_that_of_all_its_attempts(api: AnthropicSimulator) -> None:
    api.enqueue(
        Fail(status=529, retry_after=0.001), CutBeforeResponse(billed=True), Reply(text="At last")
    )

    answer = ai_budget.ask("Hello", feature="chat")

    journal = rows()
    assert [row.status for row in journal] == ["settled", "estimated", "settled"]
    assert [row.attempt for row in journal] == [0, 1, 2]
    assert [row.counted for row in journal] == [1, 0, 0]
    assert {row.call_id for row in journal} == {answer.call_id}
    assert answer.cost_nanousd == sum(row.cost_nanousd or 0 for row in journal)
    assert_balanced()


def test_errors_of_the_api_pass_through(api: AnthropicSimulator) -> None:
    api.enqueue(Fail(status=400))

    with pytest.raises(anthropic.BadRequestError):
        ai_budget.ask("Hello")


def test_a_charge_does_not_outlive_the_call(api: AnthropicSimulator) -> None:
    from ai_budget.guard.charge import current_call, current_payer

    api.enqueue(Fail(status=400))
    with pytest.raises(anthropic.BadRequestError):
        ai_budget.ask("Hello", feature="chat")
    ai_budget.ask("Hello", feature="chat")

    assert current_payer().feature is None
    assert current_call() is None


@pytest.mark.parametrize("verb", ["ask", "aask", "stream", "astream", "estimate"])
def test_a_stream_is_not_asked_for_by_a_keyword(verb: str) -> None:
    with pytest.raises(TypeError, match=r"use stream\(\)"):
        getattr(ai_budget, verb)("Hello", stream=True).send(None)

    assert not CallLog.objects.exists()


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"cache": "public"}, ValueError),
        ({"ttl": -1}, ValueError),
        ({"ttl": "60"}, TypeError),
        ({"route": "cheapest"}, ValueError),
        ({"route": coroutine}, TypeError),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    api: AnthropicSimulator, option: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(option))):
        ai_budget.ask("Hello", **option)

    assert api.requests == []


def test_an_answer_with_unreadable_usage_is_still_an_answer(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text="Well", usage={"cache_read_input_tokens": "many"}))

    answer = ai_budget.ask("Hello")

    assert answer.text == "Well"
    assert answer.usage == ai_budget.Usage()
    assert answer.cost_nanousd == only_row().reserved_nanousd


def test_usage_without_a_price_is_shown_all_the_same(api: AnthropicSimulator) -> None:
    entries = [{"type": "daydream", "input_tokens": 5, "output_tokens": 5}]
    api.enqueue(Reply(text="Well", usage={"iterations": entries}))

    answer = ai_budget.ask("Hello")

    assert answer.usage.output_tokens == api.billed[0].usage["output_tokens"] > 0
    assert answer.cost_nanousd == only_row().reserved_nanousd


def test_extra_body_is_bounded_and_sent(api: AnthropicSimulator) -> None:
    ai_budget.ask("Hello", model="claude-opus-5-5", extra_body={"metadata": {"user_id": "u"}})

    assert sent(api)["metadata"] == {"user_id": "u"}
    assert_exact(api)


def test_a_refusal_survives_a_border_between_processes(api: AnthropicSimulator) -> None:
    from ai_budget.testing import override_budget

    with (
        override_budget("chat", daily_limit_usd=0),
        pytest.raises(ai_budget.BudgetExceeded) as error,
    ):
        ai_budget.ask("Hello", feature="chat")

    copied = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert str(copied) == str(error.value)
    assert copied.limit == 0
