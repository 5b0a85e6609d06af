"""Answers from the response cache: through every way to call, booked at nothing, never leaked."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anthropic
import pytest
from django.contrib.auth import get_user_model
from django.core.cache import caches
from django.db import connections

import ai_budget
from ai_budget.exceptions import BudgetExceeded, FeatureDisabled, QuotaExceeded
from ai_budget.guard.replay import CACHED_HEADER
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.testing import AnthropicSimulator, Fail, Reply, freeze, override_budget
from ai_budget.values import Status
from tests.guard.books import MODEL, QUESTION, assert_balanced, in_db, rows, statuses

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# What is answered


def test_a_question_that_was_asked_before_costs_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    api.enqueue(Reply(text="Because of the air."))
    first = client.messages.create(**QUESTION)

    again = client.messages.create(**QUESTION)

    asked, found = rows()
    assert again == first
    assert len(api.requests) == 1
    assert (found.status, found.cost_nanousd, found.reserved_nanousd) == (Status.CACHED, 0, 0)
    assert found.saved_nanousd == asked.cost_nanousd
    assert found.saved_nanousd > 0
    assert found.saved_reason == "response cache"
    assert found.decision == "response cache, shared"
    assert (found.counted, found.input_tokens, found.output_tokens) == (0, 0, 0)
    assert found.stop_reason == "end_turn"
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_an_async_caller_is_answered_alike(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    await in_db(FeatureBudget.objects.create, name="chat", cache_scope="shared")
    first = await async_client.messages.create(**QUESTION)

    again = await async_client.messages.create(**QUESTION)

    assert again == first
    assert await in_db(statuses) == [Status.SETTLED, Status.CACHED]


def test_an_answer_says_that_it_is_from_the_cache(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    fresh = client.messages.with_raw_response.create(**QUESTION)

    found = client.messages.with_raw_response.create(**QUESTION)

    assert CACHED_HEADER not in fresh.headers
    assert found.headers[CACHED_HEADER] == "hit"
    assert found.parse() == fresh.parse()


def test_every_way_to_call_is_answered(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    content = [
        {"type": "thinking", "thinking": "Air, then.", "signature": "c2ln"},
        {"type": "text", "text": "Because "},
        {"type": "text", "text": "of the air."},
    ]
    api.enqueue(Reply(content=content))
    whole = client.messages.create(**QUESTION)

    with client.messages.stream(**QUESTION) as manager:
        text = "".join(manager.text_stream)
        streamed = manager.get_final_message()
    raw = list(client.messages.create(**QUESTION, stream=True))
    with client.messages.with_streaming_response.create(**QUESTION) as response:
        read = response.parse()

    assert len(api.requests) == 1
    assert text == "Because of the air."
    assert streamed.to_dict() == whole.to_dict() == read.to_dict()
    assert raw[0].type == "message_start"
    assert raw[-1].type == "message_stop"
    assert statuses() == [Status.SETTLED, *[Status.CACHED] * 3]


def test_a_stream_is_kept_and_answers_whoever_asks(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    api.enqueue(Reply(text="Because of the air.", thinking_tokens=20))
    with client.messages.stream(**QUESTION) as manager:
        streamed = manager.get_final_message()

    whole = client.messages.create(**QUESTION)

    assert len(api.requests) == 1
    assert whole.to_dict() == streamed.to_dict()


def test_a_stream_that_nobody_read_to_its_end_is_not_kept(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    with client.messages.stream(**QUESTION) as manager:
        next(iter(manager))

    client.messages.create(**QUESTION)

    assert len(api.requests) == 2


def test_verbs_say_so(api: AnthropicSimulator, shared: None) -> None:
    api.enqueue(Reply(text="Blue."))
    ai_budget.ask("Colour?", feature="chat")

    answer = ai_budget.ask("Colour?", feature="chat")
    with ai_budget.stream("Colour?", feature="chat") as streamed:
        text = "".join(streamed)

    assert (answer.cached, answer.text, answer.cost) == (True, "Blue.", Decimal(0))
    assert (streamed.cached, text, streamed.cost) == (True, "Blue.", Decimal(0))
    assert answer.usage == ai_budget.Usage()
    assert answer.model == answer.requested_model == MODEL


# Who is answered


def test_private_answers_are_their_users_own(api: AnthropicSimulator, private: None) -> None:
    ada, bob = (get_user_model().objects.create_user(name) for name in ("ada", "bob"))
    api.enqueue(Reply(text="For Ada."), Reply(text="For Bob."), Reply(text="For a tenant."))

    callers: list[dict[str, Any]] = [
        {"user": ada},
        {"user": bob},
        {"user": ada, "subject": "tenant"},
    ]
    said = [ai_budget.ask("Hello", feature="chat", **who).text for who in callers * 2]

    assert said == ["For Ada.", "For Bob.", "For a tenant."] * 2


def test_who_has_no_name_has_no_private_answers(api: AnthropicSimulator, private: None) -> None:
    answers = [ai_budget.ask("Hello", feature="chat") for _ in range(2)]

    assert [answer.cached for answer in answers] == [False, False]


def test_a_feature_that_is_private_is_not_shared_by_a_call(
    api: AnthropicSimulator, private: None
) -> None:
    ai_budget.ask("Hello", feature="chat", subject="a", cache="shared")

    other = ai_budget.ask("Hello", feature="chat", subject="b", cache="shared")

    assert not other.cached


def test_a_call_opts_in_and_out_by_itself(api: AnthropicSimulator, shared: None) -> None:
    ai_budget.ask("Hello", feature="other", subject="a", cache="private")

    opted_in = ai_budget.ask("Hello", feature="other", subject="a", cache="private")
    without = ai_budget.ask("Hello", feature="other", subject="a")
    ai_budget.ask("Hello", feature="chat")
    opted_out = ai_budget.ask("Hello", feature="chat", cache="off")

    assert [answer.cached for answer in (opted_in, without, opted_out)] == [True, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 99},
        {"model": "claude-sonnet-5-5"},
        {"system": "Be brief."},
        {"stop_sequences": ["."]},
        {"tools": [{"name": "look", "input_schema": {"type": "object"}}]},
        {"extra_headers": {"anthropic-beta": "a-new-thing"}},
        {"extra_query": {"beta": "true"}},
        {"extra_body": {"new_parameter": 1}},
        {"metadata": {"user_id": "u"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_request_is_another_question(
    api: AnthropicSimulator, client: anthropic.Anthropic, change: dict[str, Any]
) -> None:
    with override_budget("chat", cache_scope="shared", allow_unbounded=True):
        client.messages.create(**QUESTION)

        client.messages.create(**{**QUESTION, **change})
        client.messages.create(**QUESTION)

    assert len(api.requests) == 2


def test_another_feature_has_other_answers(api: AnthropicSimulator, shared: None) -> None:
    ai_budget.ask("Hello", feature="chat", cache="shared")

    other = ai_budget.ask("Hello", feature="other", cache="shared")

    assert not other.cached


# For how long


def test_an_answer_grows_old(api: AnthropicSimulator) -> None:
    with override_budget("chat", cache_scope="shared", cache_ttl=60):
        with freeze(NOON):
            ai_budget.ask("Hello", feature="chat")
        with freeze(NOON + timedelta(seconds=59)):
            young = ai_budget.ask("Hello", feature="chat")
            too_old = ai_budget.ask("Hello", feature="chat", ttl=30)

    assert (young.cached, too_old.cached) == (True, False)


def test_a_ttl_of_nothing_neither_finds_nor_keeps(api: AnthropicSimulator, shared: None) -> None:
    answers = [ai_budget.ask("Hello", feature="chat", ttl=0) for _ in range(2)]

    assert [answer.cached for answer in answers] == [False, False]


def test_another_version_of_the_feature_has_other_answers(
    api: AnthropicSimulator, shared: None
) -> None:
    ai_budget.ask("Hello", feature="chat")
    FeatureBudget.objects.filter(name="chat").update(cache_version=1)

    after = ai_budget.ask("Hello", feature="chat")

    assert not after.cached


def test_a_downgraded_answer_does_not_outlive_its_window(api: AnthropicSimulator) -> None:
    late = datetime(2026, 3, 1, 23, 50, tzinfo=UTC)
    ladder: Any = [(1, MODEL)]
    chat: dict[str, Any] = {"cache_scope": "shared", "daily_limit_usd": "1", "rungs": ladder}
    asked: dict[str, Any] = {"feature": "chat", "model": "claude-opus-5-5", "max_tokens": 1000}
    api.enqueue(Reply(output_tokens=900))
    with override_budget("chat", **chat):
        with freeze(late):
            ai_budget.ask("Spend some", **asked)
            cheap = ai_budget.ask("Hello", **asked)
        with freeze(late + timedelta(minutes=9)):
            still = ai_budget.ask("Hello", **asked)
        with freeze(late + timedelta(minutes=11)):
            fresh = ai_budget.ask("Hello", **asked)

    assert (cheap.cached, cheap.downgraded) == (False, True)
    assert (still.cached, still.downgraded, still.model) == (True, True, MODEL)
    assert (fresh.cached, fresh.downgraded) == (False, False)


# What is not kept


@pytest.mark.parametrize(
    "reply",
    [
        Reply(output_tokens=500),
        Reply(stop_reason="refusal", text="No."),
        Reply(content=[{"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}]),
        Reply(stop_reason="pause_turn", text="Wait"),
    ],
    ids=["cut", "refusal", "tool", "pause"],
)
def test_what_is_no_whole_answer_is_not_kept(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None, reply: Reply, settings: Any
) -> None:
    api.enqueue(reply)
    first = client.messages.create(**QUESTION)
    client.messages.create(**QUESTION)
    assert len(api.requests) == 2

    settings.AI_BUDGET = {**settings.AI_BUDGET, "CACHE_STOP_REASONS": [first.stop_reason]}
    api.enqueue(reply)
    other = {**QUESTION, "system": "Asked for"}
    client.messages.create(**other)
    client.messages.create(**other)

    assert len(api.requests) == 3


def test_an_error_is_not_kept(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    api.enqueue(Fail(status=400))
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**QUESTION)

    client.messages.create(**QUESTION)

    assert statuses() == [Status.SETTLED, Status.SETTLED]


@pytest.mark.parametrize(
    ("broken", "second"),
    [("get", Status.SETTLED), ("set", Status.SETTLED), ("add", Status.CACHED)],
)
def test_a_cache_that_fails_is_a_miss(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    shared: None,
    broken: str,
    second: Status,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(caches["default"], broken, fail)

    for _ in range(2):
        client.messages.create(**QUESTION)

    assert statuses() == [Status.SETTLED, second]


# Limits


def test_an_exhausted_feature_answers_from_its_cache_and_a_paused_one_does_not(
    api: AnthropicSimulator,
) -> None:
    with override_budget("chat", cache_scope="shared"):
        ai_budget.ask("Hello", feature="chat")
    with override_budget("chat", cache_scope="shared", daily_limit_usd=0):
        exhausted = ai_budget.ask("Hello", feature="chat")
        with pytest.raises(BudgetExceeded):
            ai_budget.ask("Something else", feature="chat")
    with (
        override_budget("chat", cache_scope="shared", enabled=False),
        pytest.raises(FeatureDisabled),
    ):
        ai_budget.ask("Hello", feature="chat")

    assert exhausted.cached
    assert_balanced()


@pytest.mark.parametrize("counts", [True, False])
def test_an_answer_from_the_cache_is_a_call_if_the_feature_says_so(
    api: AnthropicSimulator, counts: bool
) -> None:
    ada = get_user_model().objects.create_user("ada")
    UserQuota.objects.create(daily_calls=2)
    with override_budget("chat", cache_scope="private", cache_counts=counts):
        asked = [ai_budget.ask("Hello", feature="chat", user=ada).cached for _ in range(2)]
        if counts:
            with pytest.raises(QuotaExceeded):
                ai_budget.ask("Hello", feature="chat", user=ada)
        else:
            ai_budget.ask("Hello", feature="chat", user=ada)

    assert asked == [False, True]
    assert [row.counted for row in rows()] == ([1, 1] if counts else [1, 0, 0])
    assert {row.status for row in rows()[1:]} == {Status.CACHED}
    assert_balanced()


# At once


@pytest.mark.django_db(transaction=True)
def test_equal_calls_at_once_are_one_request(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Reply(text="Once.", delay=0.3))
    said: list[str] = []
    together = threading.Barrier(12)

    def ask() -> None:
        together.wait()
        said.append(ai_budget.ask("Hello", feature="chat").text)
        connections.close_all()

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert said == ["Once."] * 12
    assert len(api.requests) == 1
    assert sorted(statuses()) == [*[Status.CACHED] * 11, Status.SETTLED]


@pytest.mark.django_db(transaction=True)
def test_where_the_first_fails_another_asks(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Fail(status=400, delay=0.2), Reply(text="Second."))
    said: list[str] = []
    together = threading.Barrier(6)

    def ask() -> None:
        together.wait()
        try:
            said.append(ai_budget.ask("Hello", feature="chat").text)
        except anthropic.BadRequestError:
            said.append("failed")
        connections.close_all()

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(said) == [*["Second."] * 5, "failed"]
    assert len(api.requests) == 2


# Leaks


def test_no_prompt_and_no_name_is_in_the_keys(
    api: AnthropicSimulator, private: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    cache = caches["default"]
    for name in ("get", "set", "add", "get_many", "touch", "delete"):
        real = getattr(cache, name)

        def spy(key: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            keys.extend([key] if isinstance(key, str) else key)
            return _real(key, *args, **kwargs)

        monkeypatch.setattr(cache, name, spy)

    ai_budget.ask("the secret plan", feature="chat", subject="acme-corp")
    ai_budget.ask("the secret plan", feature="chat", subject="acme-corp")

    assert keys
    assert all("secret" not in key and "acme" not in key for key in keys)
