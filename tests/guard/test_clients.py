"""Guarded clients of every kind, and whose connections they use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

import ai_budget
from ai_budget.conf import conf
from ai_budget.guard import clients
from ai_budget.guard.middleware import BudgetGuard
from ai_budget.testing import AnthropicSimulator
from tests.guard.books import assert_balanced, assert_exact, in_db, only_row
from tests.guard.test_readers import EVENTS, framed

ASKED: dict[str, Any] = {
    "model": "claude-haiku-5-5",
    "max_tokens": 20,
    "messages": [{"role": "user", "content": "Hello there"}],
}
AWS: dict[str, Any] = {"aws_region": "eu-west-1", "api_key": "key"}
GOOGLE: dict[str, Any] = {"region": "europe-west1", "project_id": "p", "access_token": "token"}
PLATFORMS: dict[str, tuple[Any, str, str]] = {
    "Anthropic": (lambda: anthropic.Anthropic(api_key="key"), "anthropic", ""),
    "AsyncAnthropic": (lambda: anthropic.AsyncAnthropic(api_key="key"), "anthropic", ""),
    "AnthropicBedrock": (lambda: anthropic.AnthropicBedrock(**AWS), "bedrock", "eu-west-1"),
    "AsyncAnthropicBedrock": (
        lambda: anthropic.AsyncAnthropicBedrock(**AWS),
        "bedrock",
        "eu-west-1",
    ),
    "AnthropicVertex": (lambda: anthropic.AnthropicVertex(**GOOGLE), "vertex", "europe-west1"),
    "AsyncAnthropicVertex": (
        lambda: anthropic.AsyncAnthropicVertex(**GOOGLE),
        "vertex",
        "europe-west1",
    ),
    "AnthropicFoundry": (
        lambda: anthropic.AnthropicFoundry(api_key="key", resource="r"),
        "foundry",
        "",
    ),
}


def the_guard(client: Any) -> BudgetGuard:
    last = client.middleware[-1]
    assert isinstance(last, BudgetGuard)
    assert sum(isinstance(one, BudgetGuard) for one in client.middleware) == 1
    return last


@pytest.mark.parametrize("name", PLATFORMS)
def test_clients_of_every_platform_are_guarded_and_known(name: str) -> None:
    make, provider, region = PLATFORMS[name]
    bare = make()

    guarded = ai_budget.guard(bare, feature="agent")

    assert type(guarded) is type(bare)
    guard = the_guard(guarded)
    assert (guard.provider, guard.region, guard.payer.feature) == (provider, region, "agent")
    assert bare.middleware == ()


def test_a_class_of_ones_own_is_known_by_what_it_derives_from() -> None:
    class Own(anthropic.AnthropicBedrock):
        pass

    assert the_guard(ai_budget.guard(Own(**AWS))).provider == "bedrock"


@pytest.mark.parametrize("thing", [None, "a key", object(), anthropic.Anthropic, 5])
def test_what_is_no_client_is_not_guarded(thing: Any) -> None:
    with pytest.raises(TypeError, match="takes a client of the anthropic SDK"):
        ai_budget.guard(thing)


@pytest.mark.django_db
def test_a_client_that_is_guarded_twice_books_once(anthropic_api: AnthropicSimulator) -> None:
    with anthropic.Anthropic(api_key="key", base_url=anthropic_api.base_url) as bare:
        twice = ai_budget.guard(ai_budget.guard(bare, feature="first"), feature="second")
        assert the_guard(twice).payer.feature == "second"
        twice.messages.create(**ASKED)

    assert assert_exact(anthropic_api).feature_id == "second"


def test_a_guard_goes_behind_the_middleware_that_is_there() -> None:
    def own(request: Any, call_next: Any) -> Any:
        return call_next(request)

    bare = anthropic.Anthropic(api_key="key", middleware=[own])

    guarded = ai_budget.guard(ai_budget.guard(bare))

    assert guarded.middleware[0] is own
    assert len(guarded.middleware) == 2


def test_a_guarded_client_shares_the_connections_of_its_own() -> None:
    bare = anthropic.Anthropic(api_key="key")

    assert ai_budget.guard(bare)._client is bare._client


# Clients by the settings


def test_clients_by_the_settings_share_their_connections() -> None:
    assert ai_budget.client(feature="a")._client is ai_budget.client(feature="b")._client


def test_options_make_a_client_of_its_own() -> None:
    own = ai_budget.client(max_retries=7, timeout=3)

    assert (own.max_retries, own.timeout) == (7, 3)
    assert own._client is not ai_budget.client()._client
    assert the_guard(own)


def test_a_changed_key_makes_another_client() -> None:
    before = ai_budget.client()
    with override_settings(AI_BUDGET={**conf.given, "API_KEY": "another"}):
        after = ai_budget.client()

    assert (before.api_key, after.api_key) == ("test-key", "another")


@pytest.mark.parametrize("make", [ai_budget.client, ai_budget.async_client])
def test_without_a_key_there_is_no_client(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with (
        override_settings(AI_BUDGET={"BASE_URL": "http://127.0.0.1:9"}),
        pytest.raises(ImproperlyConfigured, match="ai_budget_simulator"),
    ):
        make()


@pytest.mark.parametrize("options", [{"api_key": "own"}, {"auth_token": "own"}])
def test_a_key_of_ones_own_needs_none_in_the_settings(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with override_settings(AI_BUDGET={"BASE_URL": "http://127.0.0.1:9"}):
        client = ai_budget.client(**options)

    assert (client.api_key, client.auth_token) == (
        options.get("api_key"),
        options.get("auth_token"),
    )
    assert client.base_url == "http://127.0.0.1:9"
    assert the_guard(client)


async def test_async_clients_of_one_loop_share_their_connections() -> None:
    assert ai_budget.async_client()._client is ai_budget.async_client(feature="b")._client


@pytest.mark.django_db(transaction=True)
def test_the_connections_of_a_loop_are_closed_with_it(anthropic_api: AnthropicSimulator) -> None:
    used: list[Any] = []

    async def call() -> None:
        await ai_budget.aask("Hello")
        used.append(ai_budget.async_client()._client)
        assert asyncio.get_running_loop() in clients._of_loops

    for _ in range(3):
        async_to_sync(call)()

    assert len(set(map(id, used))) == 3
    assert all(client.is_closed for client in used)
    assert not clients._of_loops


def test_clients_of_loops_that_died_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_make_client())
    loop.close()

    asyncio.run(_make_client())

    assert loop not in clients._of_loops


async def _make_client() -> None:
    ai_budget.async_client()


def test_an_async_client_may_be_made_where_no_loop_runs() -> None:
    assert the_guard(ai_budget.async_client(feature="agent")).payer.feature == "agent"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here")
def test_a_forked_process_makes_connections_of_its_own() -> None:
    before = ai_budget.client()._client
    clients.forget_clients()  # what a fork does in the child

    assert ai_budget.client()._client is not before


def test_the_guard_shows_neither_key_nor_payer() -> None:
    shown = repr(the_guard(ai_budget.client(user="somebody", tags={"a": "secret"})))

    assert shown == "<BudgetGuard provider='anthropic'>"


# Platforms, over HTTP

BEDROCK_MODEL = "anthropic.claude-sonnet-4-5-20250929-v1:0"
VERTEX_MODEL = "claude-sonnet-4-5@20250929"
ANSWER: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [{"type": "text", "text": "Hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 12, "output_tokens": 9},
}


@pytest.fixture
def platforms(settings: Any) -> Iterator[AnthropicSimulator]:
    """The local API with the paths of Bedrock and Vertex, which answer always the same."""
    with AnthropicSimulator() as api:
        api.add_room("POST", r"/model/[^/]+/invoke", lambda call: call.send(ANSWER))
        api.add_room("POST", r"/model/[^/]+/invoke-with-response-stream", _send_frames)
        api.add_room("POST", r"/projects/.*:rawPredict", lambda call: call.send(ANSWER))
        yield api


def _send_frames(call: Any) -> None:
    call.exchange.start_stream(200, {"content-type": "application/vnd.amazon.eventstream"})
    body = framed([{**EVENTS[0], "message": {**ANSWER, "content": []}}, *EVENTS[1:]])
    for start in range(0, len(body), 50):
        call.exchange.send_chunk(body[start : start + 50])
    call.exchange.end_stream()


@pytest.mark.django_db
def test_a_call_over_bedrock_is_booked_at_bedrocks_price(platforms: AnthropicSimulator) -> None:
    with anthropic.AnthropicBedrock(**AWS, base_url=platforms.base_url) as bare:
        ai_budget.guard(bare).messages.create(**{**ASKED, "model": BEDROCK_MODEL})

    row = only_row()
    assert (row.provider, row.model, row.status) == ("bedrock", BEDROCK_MODEL, "settled")
    assert row.cost_nanousd == ai_budget.price(
        BEDROCK_MODEL, ANSWER["usage"], provider="bedrock", region="eu-west-1"
    )
    assert_balanced()


@pytest.mark.django_db
def test_a_stream_over_bedrock_is_read_from_its_frames(platforms: AnthropicSimulator) -> None:
    with anthropic.AnthropicBedrock(**AWS, base_url=platforms.base_url) as bare:
        # The SDK reads frames with a library that need not be there; the guard does not.
        response = (
            ai_budget.guard(bare)
            .with_options(max_retries=0)
            .post(
                "/v1/messages",
                body={**ASKED, "model": BEDROCK_MODEL, "stream": True},
                stream=True,
                stream_cls=_Frames,
                cast_to=dict[str, Any],
            )
        )
        assert len(b"".join(response.response.iter_bytes())) > 500

    row = only_row()
    assert (row.status, row.input_tokens, row.output_tokens) == ("settled", 12, 9)
    assert_balanced()


class _Frames(anthropic.Stream[dict[str, Any]]):
    """A stream whose frames nobody takes apart."""

    def __init__(self, *, response: Any, **options: Any) -> None:
        self.response = response


@pytest.mark.django_db
def test_a_call_over_vertex_is_booked_at_vertex_price(platforms: AnthropicSimulator) -> None:
    with anthropic.AnthropicVertex(**GOOGLE, base_url=platforms.base_url) as bare:
        ai_budget.guard(bare).messages.create(**{**ASKED, "model": VERTEX_MODEL})

    row = only_row()
    assert (row.provider, row.model, row.status) == ("vertex", VERTEX_MODEL, "settled")
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_an_async_call_over_bedrock_is_booked(platforms: AnthropicSimulator) -> None:
    async with anthropic.AsyncAnthropicBedrock(**AWS, base_url=platforms.base_url) as bare:
        await ai_budget.guard(bare).messages.create(**{**ASKED, "model": BEDROCK_MODEL})

    assert (await in_db(only_row)).provider == "bedrock"


@pytest.mark.django_db
def test_the_paths_of_a_platform_are_no_way_around(platforms: AnthropicSimulator) -> None:
    with (
        anthropic.AnthropicBedrock(**AWS, base_url=platforms.base_url) as bare,
        pytest.raises(ai_budget.UnpricedEndpoint),
    ):
        ai_budget.guard(bare).post(f"/model/{BEDROCK_MODEL}/invoke", body=ASKED, cast_to=object)

    assert platforms.requests == []
