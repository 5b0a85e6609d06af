"""Answers from the cache where one would not expect trouble: other clients, waiting, receivers."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import anthropic
import pytest
from django.db import connections

import ai_budget
from ai_budget import signals
from ai_budget.exceptions import LedgerUnavailable, RateLimited, UnboundedCall
from ai_budget.guard.answers import Surroundings
from ai_budget.guard.events import Assembly, events_of
from ai_budget.models import FeatureBudget
from ai_budget.testing import AnthropicSimulator, Reply, freeze, override_budget
from tests.guard.books import MODEL, QUESTION, in_db, ledger_of_the_run
from tests.guard.test_answers_attacked import AT_ONCE, NOON, at_once

pytestmark = pytest.mark.django_db
SONNET, OPUS = "claude-sonnet-5-5", "claude-opus-5-5"


# Whose question it is


def test_a_header_that_is_not_sent_is_no_part_of_the_question() -> None:
    def around(header: Any) -> dict[str, Any]:
        return Surroundings(
            url="/v1/messages",
            base_url="",
            provider="anthropic",
            region="",
            headers={},
            client_headers={"anthropic-workspace-id": header},
            query={},
        ).named()

    assert around(anthropic.Omit()) == around(anthropic.Omit())


def test_a_copy_of_a_client_with_other_headers_asks_for_itself(
    api: AnthropicSimulator, client: Any, shared: None
) -> None:
    client.messages.create(**QUESTION)
    client.with_options(default_headers={"anthropic-beta": "x"}).messages.create(**QUESTION)
    assert len(api.requests) == 2


def test_a_copy_of_a_client_with_another_query_asks_for_itself(
    api: AnthropicSimulator, client: Any, shared: None
) -> None:
    client.messages.create(**QUESTION)
    client.with_options(default_query={"beta": "x"}).messages.create(**QUESTION)
    assert len(api.requests) == 2


def test_a_copy_of_a_client_with_another_address_asks_there(
    api: AnthropicSimulator, client: Any, shared: None
) -> None:
    with AnthropicSimulator() as other:
        client.messages.create(**QUESTION)
        client.with_options(base_url=other.base_url).messages.create(**QUESTION)
        assert len(other.requests) == 1


def test_behind_other_middleware_nothing_is_kept(
    api: AnthropicSimulator, client: Any, shared: None
) -> None:
    def of(tenant: str) -> Any:
        def add(request: Any, call_next: Any) -> Any:
            return call_next(request.copy(body={**request.json, "system": f"Serve {tenant}."}))

        return client.with_options(middleware=[*client.middleware, add])

    of("a").messages.create(**QUESTION)
    of("b").messages.create(**QUESTION)
    assert len(api.requests) == 2


def test_the_query_of_a_path_is_part_of_the_question(
    api: AnthropicSimulator, client: Any, shared: None
) -> None:
    def post(path: str) -> None:
        client.post(path, body=QUESTION, cast_to=anthropic.types.Message)

    post("/v1/messages")
    post("/v1/messages?beta=true")
    post("/v1/messages?beta=true")
    assert len(api.requests) == 2


@pytest.mark.django_db(transaction=True)
async def test_sync_and_async_clients_share_answers(
    api: Any, client: Any, async_client: Any
) -> None:
    await in_db(FeatureBudget.objects.create, name="chat", cache_scope="shared")
    await async_client.messages.create(**QUESTION)
    await in_db(client.messages.create, **QUESTION)
    assert len(api.requests) == 1


def test_an_answer_is_kept_under_the_question_that_was_asked(api: Any, monkeypatch: Any) -> None:
    budgets = FeatureBudget.objects.filter(name="chat")
    FeatureBudget.objects.create(
        name="chat", cache_scope="shared", model=MODEL, requests_per_minute=1
    )
    ai_budget.ask("Other", feature="chat", cache="off")
    monkeypatch.setattr(
        "time.sleep", lambda _: budgets.update(model=SONNET, requests_per_minute=None)
    )
    ai_budget.ask("Hello", feature="chat", wait=61)  # asks Sonnet, keeps it under Haiku
    budgets.update(model=MODEL)
    assert ai_budget.ask("Hello", feature="chat").model == MODEL


# Who waits for whom


@pytest.mark.parametrize("signal", ["call_settled", "call_downgraded"])
def test_a_receiver_that_asks_the_same_does_not_wait_for_its_own_caller(
    api: AnthropicSimulator, signal: str
) -> None:
    took: list[float] = []
    asked: dict[str, Any] = {"feature": "chat", "model": OPUS, "max_tokens": 100}

    def receiver(**_: Any) -> None:
        if not took:
            took.append(0)
            began = time.monotonic()
            ai_budget.ask("Hello", **asked)
            took.append(time.monotonic() - began)

    api.enqueue(Reply(output_tokens=900))
    ladder: Any = [(1, MODEL)]
    with override_budget("chat", cache_scope="shared", daily_limit_usd="1", rungs=ladder):
        ai_budget.ask("Spend", **{**asked, "max_tokens": 1000})
        getattr(signals, signal).connect(receiver)
        try:
            ai_budget.ask("Hello", **asked)
        finally:
            getattr(signals, signal).disconnect(receiver)
    assert took[1] < AT_ONCE


def test_nobody_waits_for_a_stream_that_they_hold_themselves(
    api: Any, client: Any, shared: None
) -> None:
    began = time.monotonic()
    with client.messages.stream(**QUESTION) as stream:
        next(iter(stream))
        client.messages.create(**QUESTION)
    assert time.monotonic() - began < AT_ONCE


@pytest.mark.django_db(transaction=True)
def test_nobody_waits_behind_one_who_waits_for_a_limit(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared", requests_per_minute=1)
    ai_budget.ask("Other", feature="chat", cache="off")
    waits, over = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        over.wait(seconds)

    def patient() -> None:
        try:
            ai_budget.ask("Hello", feature="chat", max_tokens=100, wait=61)
        finally:
            connections.close_all()

    monkeypatch.setattr("time.sleep", sleep)
    thread = threading.Thread(target=patient)
    thread.start()
    assert waits.wait(AT_ONCE)
    began = time.monotonic()
    with pytest.raises(RateLimited):
        ai_budget.ask("Hello", feature="chat", max_tokens=100)
    took = time.monotonic() - began
    FeatureBudget.objects.update(requests_per_minute=None)
    over.set()
    thread.join()

    assert took < AT_ONCE


@pytest.mark.django_db(transaction=True)
def test_streams_that_cannot_be_kept_do_not_queue(api: Any, monkeypatch: Any) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    monkeypatch.setattr(Assembly, "message", property(lambda _: None))  # an event unheard of
    api.default = Reply(delay=0.3)

    def read() -> None:
        with ai_budget.stream("Hello", feature="chat") as answer:
            "".join(answer)

    began = time.monotonic()
    at_once(read, 8)
    assert time.monotonic() - began < AT_ONCE


# Forgetting, booking, odd requests


def test_what_is_forgotten_with_its_category_stays_forgotten(api: AnthropicSimulator) -> None:
    one, two = (FeatureBudget.objects.create(name=name) for name in ("one", "two"))
    FeatureBudget.objects.create(name="chat", cache_scope="shared", parent=one)
    ai_budget.ask("Hello", feature="chat")
    ai_budget.forget_answers("one")
    FeatureBudget.objects.filter(name="chat").update(parent=two)
    assert not ai_budget.ask("Hello", feature="chat").cached


def test_what_is_forgotten_with_the_site_stays_forgotten(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    ai_budget.ask("Hello", feature="chat")
    ai_budget.forget_answers()
    FeatureBudget.objects.filter(name="*").delete()
    assert not ai_budget.ask("Hello", feature="chat").cached


@pytest.mark.parametrize("odd", ["100", [1], {"a": 1}], ids=str)
def test_max_tokens_that_is_no_number_is_refused_as_without_a_cache(
    api: Any, client: Any, shared: None, odd: Any
) -> None:
    with pytest.raises(UnboundedCall):
        client.messages.create(**{**QUESTION, "max_tokens": odd}, timeout=5)


def test_the_usage_of_a_found_answer_is_not_its_routers(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.routing.KEPT_SECONDS", 0.0)
    long = "Why? " * 400
    with override_budget("chat", routing="classifier", model=OPUS, cache_scope="shared"):
        api.enqueue(Reply(text='{"level": "simple"}'))
        ai_budget.ask(long, feature="chat", max_tokens=2000)
        api.enqueue(Reply(text='{"level": "simple"}'))
        answer = ai_budget.ask(long, feature="chat", max_tokens=2000)
    assert answer.cached
    assert answer.usage == ai_budget.Usage()


def test_a_counted_answer_is_given_though_its_settling_fails(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable("down")

    with override_budget("chat", cache_scope="shared", cache_counts=True):
        ai_budget.ask("Hello", feature="chat")
        monkeypatch.setattr(ledger_of_the_run(), "settle", fail)
        assert ai_budget.ask("Hello", feature="chat").cached


def test_context_management_of_a_stream_is_kept() -> None:
    edits: dict[str, Any] = {"applied_edits": []}
    message: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    assembly = Assembly()
    for event in events_of(message):
        more = {"context_management": edits} if event["type"] == "message_delta" else {}
        assembly.see({**event, **more})
    assert (assembly.message or {}).get("context_management") == edits


def test_an_answer_from_the_far_future_is_not_waited_for(api: Any, shared: None) -> None:
    with freeze(NOON + timedelta(seconds=120)):
        ai_budget.ask("Hello", feature="chat")
    began = time.monotonic()
    with freeze(NOON):
        ai_budget.ask("Hello", feature="chat")
    assert time.monotonic() - began < AT_ONCE  # 5 s: the note "kept" is of the future


def test_a_feature_that_does_not_exist_is_not_forgotten_in_silence() -> None:
    with pytest.raises(LookupError, match="chatt"):
        ai_budget.forget_answers("chatt")
