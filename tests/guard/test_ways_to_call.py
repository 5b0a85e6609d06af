"""Each way to call Claude goes through the gate once and is booked at what it cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest

from ai_budget.models import CallLog
from ai_budget.testing import AnthropicSimulator, Reply
from tests.guard.books import (
    MODEL,
    assert_at_bound,
    assert_balanced,
    assert_exact,
    bill,
    in_db,
    only_row,
    rows,
)

pytestmark = pytest.mark.django_db


class City(pydantic.BaseModel):
    name: str


CITY = '{"name": "Lisbon"}'
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "Name a city, and write it down for me as JSON."}],
}
RAW: dict[str, Any] = {"cast_to": httpx2.Response, "body": ASKED}
Sync = Callable[[anthropic.Anthropic], object]
Async = Callable[[anthropic.AsyncAnthropic], Awaitable[object]]


def _read_stream(client: anthropic.Anthropic) -> object:
    with client.messages.stream(**ASKED) as stream:
        return stream.get_final_text()


def _read_beta_stream(client: anthropic.Anthropic) -> object:
    with client.beta.messages.stream(**ASKED) as stream:
        return stream.get_final_text()


def _read_parsed_stream(client: anthropic.Anthropic) -> object:
    with client.messages.stream(**ASKED, output_format=City) as stream:
        return stream.get_final_message().parsed_output


def _read_unread_response(client: anthropic.Anthropic) -> object:
    with client.messages.with_streaming_response.create(**ASKED) as response:
        return response.parse()


def _read_unread_response_by_lines(client: anthropic.Anthropic) -> object:
    with client.messages.with_streaming_response.create(**ASKED) as response:
        return list(response.iter_lines())


def _read_unread_stream(client: anthropic.Anthropic) -> object:
    with client.messages.with_streaming_response.create(**ASKED, stream=True) as response:
        return list(response.parse())


def _run_tools(client: anthropic.Anthropic) -> object:
    return client.beta.messages.tool_runner(**ASKED, tools=[]).until_done()


SYNC: dict[str, Sync] = {
    "create": lambda client: client.messages.create(**ASKED),
    "stream": _read_stream,
    "stream=True": lambda client: list(client.messages.create(**ASKED, stream=True)),
    "parse": lambda client: client.messages.parse(**ASKED, output_format=City),
    "stream parsed": _read_parsed_stream,
    "beta create": lambda client: client.beta.messages.create(**ASKED),
    "beta create with betas": lambda client: client.beta.messages.create(**ASKED, betas=["x-1"]),
    "beta stream": _read_beta_stream,
    "beta stream=True": lambda client: list(client.beta.messages.create(**ASKED, stream=True)),
    "beta parse": lambda client: client.beta.messages.parse(**ASKED, output_format=City),
    "tool runner": _run_tools,
    "raw response": lambda client: client.messages.with_raw_response.create(**ASKED).parse(),
    "raw response of a stream": lambda client: list(
        client.messages.with_raw_response.create(**ASKED, stream=True).parse()
    ),
    "streaming response": _read_unread_response,
    "streaming response by lines": _read_unread_response_by_lines,
    "streaming response of a stream": _read_unread_stream,
    "post": lambda client: client.post("/v1/messages", **RAW),
    "post without a slash": lambda client: client.post("v1/messages", **RAW),
    "post with a query": lambda client: client.post("/v1/messages?beta=true", **RAW),
    "post to an address": lambda client: client.post(f"{client.base_url}/v1/messages", **RAW),
    "post along a detour": lambda client: client.post("/v1/models/../messages", **RAW),
    "derived": lambda client: client.with_options(timeout=30).messages.create(**ASKED),
    "copied": lambda client: client.copy(max_retries=0).messages.create(**ASKED),
}


async def _aread_stream(client: anthropic.AsyncAnthropic) -> object:
    async with client.messages.stream(**ASKED) as stream:
        return await stream.get_final_text()


async def _aread_events(client: anthropic.AsyncAnthropic) -> object:
    return [event async for event in await client.messages.create(**ASKED, stream=True)]


async def _aread_beta_stream(client: anthropic.AsyncAnthropic) -> object:
    async with client.beta.messages.stream(**ASKED) as stream:
        return await stream.get_final_text()


async def _aread_raw(client: anthropic.AsyncAnthropic) -> object:
    return await (await client.messages.with_raw_response.create(**ASKED)).parse()


async def _aread_raw_stream(client: anthropic.AsyncAnthropic) -> object:
    response = await client.messages.with_raw_response.create(**ASKED, stream=True)
    return [event async for event in await response.parse()]


async def _aread_unread_response(client: anthropic.AsyncAnthropic) -> object:
    async with client.messages.with_streaming_response.create(**ASKED) as response:
        return await response.parse()


async def _aread_unread_stream(client: anthropic.AsyncAnthropic) -> object:
    async with client.messages.with_streaming_response.create(**ASKED, stream=True) as response:
        return [event async for event in await response.parse()]


async def _arun_tools(client: anthropic.AsyncAnthropic) -> object:
    return await client.beta.messages.tool_runner(**ASKED, tools=[]).until_done()


ASYNC: dict[str, Async] = {
    "create": lambda client: client.messages.create(**ASKED),
    "stream": _aread_stream,
    "stream=True": _aread_events,
    "parse": lambda client: client.messages.parse(**ASKED, output_format=City),
    "beta create": lambda client: client.beta.messages.create(**ASKED),
    "beta stream": _aread_beta_stream,
    "beta parse": lambda client: client.beta.messages.parse(**ASKED, output_format=City),
    "tool runner": _arun_tools,
    "raw response": _aread_raw,
    "raw response of a stream": _aread_raw_stream,
    "streaming response": _aread_unread_response,
    "streaming response of a stream": _aread_unread_stream,
    "post": lambda client: client.post("/v1/messages", **RAW),
    "derived": lambda client: client.with_options(timeout=30).messages.create(**ASKED),
}


@pytest.mark.parametrize("way", SYNC)
def test_a_call_is_booked_once_at_what_the_provider_charges(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    api.enqueue(Reply(text=CITY))

    SYNC[way](client)

    row = assert_exact(api)
    assert (row.feature_id, row.model, row.counted) == ("chat", MODEL, 1)
    assert row.input_tokens == api.billed[0].usage["input_tokens"]
    assert row.output_tokens == api.billed[0].usage["output_tokens"]
    assert row.request_id == api.billed[0].request_id
    assert row.kind == ("stream" if (api.requests[0].body or {}).get("stream") else "ask")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ASYNC)
async def test_an_async_call_is_booked_once_at_what_the_provider_charges(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, way: str
) -> None:
    api.enqueue(Reply(text=CITY))

    await ASYNC[way](async_client)

    row = await in_db(assert_exact, api)
    assert (row.feature_id, row.model, row.counted) == ("chat", MODEL, 1)
    assert row.request_id == api.billed[0].request_id


def test_an_unread_response_that_is_read_in_part_is_booked_at_its_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="long " * 50_000))
    with client.messages.with_streaming_response.create(
        **{**ASKED, "max_tokens": 100_000}, timeout=30
    ) as response:
        next(response.iter_bytes(64))

    api.wait_until_idle()
    row = assert_at_bound()
    assert row.error == "unreadable answer"


def test_a_response_that_is_never_read_is_booked_at_its_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with client.messages.with_streaming_response.create(**ASKED):
        pass

    assert_at_bound()


@pytest.mark.django_db(transaction=True)
async def test_an_async_response_that_is_never_read_is_booked_at_its_bound(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    async with async_client.messages.with_streaming_response.create(**ASKED):
        pass

    await in_db(assert_at_bound)


def test_counting_tokens_and_listing_models_are_free(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    counted = {name: value for name, value in ASKED.items() if name != "max_tokens"}

    assert client.messages.count_tokens(**counted).input_tokens > 0
    assert client.beta.messages.count_tokens(**counted).input_tokens > 0
    assert MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL

    assert rows() == []


@pytest.mark.django_db(transaction=True)
async def test_counting_tokens_and_listing_models_are_free_for_async_clients(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    counted = {name: value for name, value in ASKED.items() if name != "max_tokens"}

    assert (await async_client.messages.count_tokens(**counted)).input_tokens > 0
    assert (await async_client.models.retrieve(MODEL)).id == MODEL

    assert await in_db(rows) == []


def test_each_call_is_a_call_of_its_own(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    client.messages.create(**ASKED)
    client.messages.create(**ASKED)

    first, second = rows()
    assert first.call_id != second.call_id
    assert (first.attempt, second.attempt) == (0, 0)
    assert_balanced()


@pytest.mark.parametrize(
    "usage",
    [
        {"inference_geo": "us"},
        {"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 1}},
        {"cache_creation_input_tokens": 70, "cache_creation": {"ephemeral_1h_input_tokens": 60}},
        {"cache_read_input_tokens": 50},
        {
            "iterations": [
                {"type": "message", "input_tokens": 9, "output_tokens": 8},
                {"type": "compaction", "input_tokens": 100, "output_tokens": 83},
            ]
        },
    ],
    ids=["geo", "searches", "cache writes", "cache reads", "iterations"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_usage_of_every_shape_is_booked_at_its_price(
    api: AnthropicSimulator, client: anthropic.Anthropic, usage: dict[str, Any], streamed: bool
) -> None:
    api.enqueue(Reply(text=CITY, usage=usage))

    if streamed:
        _read_stream(client)
    else:
        client.messages.create(**ASKED)

    row = only_row()
    assert row.status == CallLog.Status.SETTLED
    assert row.cost_nanousd == sum(bill(api))
    assert_balanced()
