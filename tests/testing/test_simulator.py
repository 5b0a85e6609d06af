"""The simulated API, as the official SDK sees it over real HTTP."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.lib.streaming import MessageStreamManager
from anthropic.types import Message, RawMessageStreamEvent, ThinkingBlock, ToolUseBlock
from django.core.management import CommandError, call_command

from ai_budget.management.commands import ai_budget_simulator
from ai_budget.testing import prompt_cache_model
from ai_budget.testing.prompt_cache_model import CacheUse, PromptCache
from ai_budget.testing.request_checks import ApiError
from ai_budget.testing.simulator import AnthropicSimulator, Call
from ai_budget.testing.steps import (
    CutBeforeResponse,
    CutStream,
    Fail,
    Hang,
    Reply,
    Step,
    StreamError,
    TruncateCleanly,
)
from ai_budget.testing.tokens import prompt_blocks

MODEL = "claude-haiku-5-5"
QUESTION = "How tall is a fully grown oak?"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[AnthropicSimulator, Clock, anthropic.Anthropic]]:
    clock = Clock()
    with (
        AnthropicSimulator(clock=clock) as api,
        anthropic.Anthropic(base_url=api.base_url, api_key="key", max_retries=0) as client,
    ):
        yield api, clock, client


@pytest.fixture
def api(running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]) -> AnthropicSimulator:
    running[0].wait_until_idle()
    running[0].reset()
    return running[0]


@pytest.fixture
def clock(running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]) -> Clock:
    return running[1]


@pytest.fixture
def client(
    api: AnthropicSimulator, running: tuple[AnthropicSimulator, Clock, anthropic.Anthropic]
) -> anthropic.Anthropic:
    return running[2]


def ask(client: anthropic.Anthropic, content: Any = QUESTION, **options: Any) -> Message:
    options = {"model": MODEL, "max_tokens": 100, **options}
    options.setdefault("messages", [{"role": "user", "content": content}])
    message: Message = client.messages.create(**options)
    return message


def streaming(client: anthropic.Anthropic, **options: Any) -> MessageStreamManager[Any]:
    options = {"model": MODEL, "max_tokens": 100, **options}
    manager: MessageStreamManager[Any] = client.messages.stream(
        messages=[{"role": "user", "content": QUESTION}], **options
    )
    return manager


def raw_events(client: anthropic.Anthropic) -> list[RawMessageStreamEvent]:
    messages: Any = [{"role": "user", "content": QUESTION}]
    return list(client.messages.create(model=MODEL, max_tokens=100, messages=messages, stream=True))


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def post(
    api: AnthropicSimulator,
    body: Any,
    *,
    path: str = "/v1/messages",
    headers: dict[str, str] | None = None,
) -> tuple[HTTPResponse, bytes]:
    """Sends what the SDK would not send."""
    connection = HTTPConnection(api.base_url.removeprefix("http://"), timeout=5)
    try:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"x-api-key": "key", **({} if headers is None else headers)}
        connection.request("POST", path, payload, {k: v for k, v in sent.items() if v})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def error_of(raw: bytes) -> dict[str, Any]:
    payload = json.loads(raw)
    assert payload["type"] == "error"
    assert payload["request_id"].startswith("req_")
    error: dict[str, Any] = payload["error"]
    return error


# Answers


def test_an_answer_quotes_the_question_and_ends_its_turn(client: anthropic.Anthropic) -> None:
    message = ask(client)

    assert "How tall is a fully grown oak?" in text_of(message)
    assert message.stop_reason == "end_turn"
    assert message.role == "assistant"
    assert message.model == MODEL


def test_the_same_request_has_the_same_answer_and_usage(client: anthropic.Anthropic) -> None:
    first, second = ask(client), ask(client)

    assert first.content == second.content
    assert first.usage == second.usage
    assert first.id != second.id


def test_another_question_has_another_answer(client: anthropic.Anthropic) -> None:
    assert text_of(ask(client, "Is it raining?")) != text_of(ask(client, "Is it late?"))


def test_usage_has_every_field_of_the_api(client: anthropic.Anthropic) -> None:
    usage = ask(client).usage

    assert usage.to_dict() == {
        "input_tokens": 14,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": usage.output_tokens,
        "service_tier": "standard",
        "inference_geo": "not_available",
    }


def test_a_long_answer_is_cut_at_max_tokens(client: anthropic.Anthropic) -> None:
    message = ask(client, max_tokens=7)

    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 7
    assert len(text_of(message)) == 7 * 4


def test_max_tokens_of_zero_only_reads_the_prompt(client: anthropic.Anthropic) -> None:
    message = ask(client, max_tokens=0)

    assert message.content == []
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 0


@pytest.mark.parametrize("tokens", [3, 500])
def test_an_answer_can_be_given_a_length(
    api: AnthropicSimulator, client: anthropic.Anthropic, tokens: int
) -> None:
    api.enqueue(Reply(output_tokens=tokens))

    message = ask(client, max_tokens=1_000)

    assert message.usage.output_tokens == tokens
    assert len(text_of(message)) == tokens * 4
    assert message.stop_reason == "end_turn"


def test_a_scripted_answer_is_sent_as_written(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(
        Reply(text="Très grand — évidemment", stop_reason="refusal", model="claude-opus-5-5")
    )

    message = ask(client)

    assert text_of(message) == "Très grand — évidemment"
    assert message.stop_reason == "refusal"
    assert message.model == "claude-opus-5-5"


def test_the_model_can_ask_for_a_tool(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "measure", "input": {"tree": "chêne"}}
    api.enqueue(Reply(content=[{"type": "text", "text": "I will look."}, call]))

    message = ask(client)

    assert message.stop_reason == "tool_use"
    assert isinstance(message.content[1], ToolUseBlock)
    assert message.content[1].input == {"tree": "chêne"}


def test_scripted_blocks_are_sent_whole_and_counted_up_to_max_tokens(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    thought = {"type": "thinking", "thinking": "a" * 40, "signature": "s"}
    blocks = [thought, {"type": "text", "text": "b" * 40}]
    api.enqueue(Reply(content=blocks), Reply(content=blocks))

    roomy, narrow = ask(client, max_tokens=50), ask(client, max_tokens=5)

    assert roomy.usage.output_tokens == 20
    assert roomy.stop_reason == "end_turn"
    assert narrow.usage.output_tokens == 5
    assert narrow.stop_reason == "max_tokens"
    assert text_of(narrow) == "b" * 40


def test_thinking_comes_first_and_is_part_of_the_output(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Forty", thinking_tokens=40))

    message = ask(client)

    assert isinstance(message.content[0], ThinkingBlock)
    assert message.content[0].thinking
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 40
    assert message.usage.output_tokens == 42


def test_omitted_thinking_is_billed_but_not_shown(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Forty", thinking_tokens=40))

    message = ask(client, thinking={"type": "adaptive", "display": "omitted"})

    assert isinstance(message.content[0], ThinkingBlock)
    assert message.content[0].thinking == ""
    assert message.usage.output_tokens == 42


def test_thinking_counts_towards_max_tokens(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Forty", thinking_tokens=4_000))

    message = ask(client, max_tokens=30)

    assert [block.type for block in message.content] == ["thinking"]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 30


def test_scripted_usage_is_laid_over_the_computed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    iterations = [{"type": "compaction", "input_tokens": 70, "output_tokens": 31}]
    searches = {"web_search_requests": 2, "web_fetch_requests": 0}
    api.enqueue(Reply(usage={"iterations": iterations, "server_tool_use": searches}))

    tools = [{"type": "web_search_20260318", "name": "web_search"}]
    message = ask(client, tools=tools)

    assert message.usage.server_tool_use is not None
    assert message.usage.server_tool_use.web_search_requests == 2
    assert message.usage.to_dict()["iterations"] == iterations


def test_usage_reports_the_geography_and_speed_that_were_asked(
    client: anthropic.Anthropic,
) -> None:
    usage = ask(client, inference_geo="us", speed="fast").usage

    assert usage.inference_geo == "us"
    assert usage.speed == "fast"


@pytest.mark.parametrize(
    ("messages", "quoted"),
    [
        ([{"role": "assistant", "content": "Hello"}], ""),
        ([{"role": "user", "content": []}], ""),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], ""),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t", "content": "It is raining."}
                    ],
                }
            ],
            "It is raining.",
        ),
        ([{"role": "user", "content": "one two " * 50}], "one two one two one two one two ..."),
    ],
)
def test_the_answer_quotes_what_the_user_said_last(
    client: anthropic.Anthropic, messages: list[Any], quoted: str
) -> None:
    assert text_of(ask(client, messages=messages)).startswith(f'You asked: "{quoted}".')


def test_an_answer_of_no_words_costs_a_token(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="", stop_reason="refusal"))

    message = ask(client)

    assert message.content == []
    assert message.usage.output_tokens == 1


def test_steps_are_taken_in_order_and_then_the_default(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.default = Reply(text="again")
    api.enqueue(Reply(text="one"), Reply(text="two"))

    assert [text_of(ask(client)) for _ in range(4)] == ["one", "two", "again", "again"]


def test_a_step_can_depend_on_the_request(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def by_size(body: dict[str, Any]) -> Step:
        return Reply(text="short") if body["max_tokens"] < 50 else Fail(status=529)

    api.default = by_size

    assert text_of(ask(client, max_tokens=10)) == "short"
    with pytest.raises(anthropic.OverloadedError):
        ask(client, max_tokens=60)


def test_a_step_that_raises_is_a_500_that_says_so(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def broken(body: dict[str, Any]) -> Step:
        raise KeyError("nothing here")

    api.enqueue(broken)

    with pytest.raises(anthropic.InternalServerError, match="nothing here"):
        ask(client)


# Headers


def test_each_response_has_an_id_of_its_own(client: anthropic.Anthropic) -> None:
    first, second = ask(client), ask(client)

    assert first._request_id is not None
    assert first._request_id.startswith("req_")
    assert first._request_id != second._request_id


def test_rate_limit_headers_are_there(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(
        model=MODEL, max_tokens=10, messages=[{"role": "user", "content": QUESTION}]
    )

    for kind in ("requests", "tokens", "input-tokens", "output-tokens"):
        limit = int(raw.headers[f"anthropic-ratelimit-{kind}-limit"])
        assert 0 < int(raw.headers[f"anthropic-ratelimit-{kind}-remaining"]) < limit
        assert raw.headers[f"anthropic-ratelimit-{kind}-reset"].endswith("Z")
    assert raw.headers["content-type"] == "application/json"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answers_headers_are_laid_over_its_own(
    api: AnthropicSimulator, client: anthropic.Anthropic, stream: bool
) -> None:
    scripted = {"anthropic-ratelimit-requests-remaining": "7", "x-proxy": "here"}
    api.enqueue(Reply(headers=scripted))

    laid_over, plain = (headers_of_answer(client, stream=stream) for _ in range(2))

    assert {name: laid_over[name] for name in scripted} == scripted
    assert laid_over.keys() - plain.keys() == {"x-proxy"}
    assert plain["anthropic-ratelimit-requests-remaining"] != "7"
    assert laid_over["content-type"] == plain["content-type"]


def headers_of_answer(client: anthropic.Anthropic, **options: Any) -> dict[str, str]:
    messages: Any = [{"role": "user", "content": QUESTION}]
    with client.messages.with_streaming_response.create(
        model=MODEL, max_tokens=10, messages=messages, **options
    ) as raw:
        raw.read()
        return dict(raw.headers)


def test_a_failures_headers_are_laid_over_its_own(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    scripted = {"retry-after": "30", "anthropic-ratelimit-requests-remaining": "0"}
    api.enqueue(Fail(status=429, retry_after=0.5, headers=scripted))

    with pytest.raises(anthropic.RateLimitError) as raised:
        ask(client)

    headers = raised.value.response.headers
    assert {name: headers[name] for name in scripted} == scripted
    assert headers["content-type"] == "application/json"
    assert raised.value.request_id is not None


# Streams


def test_a_stream_says_what_the_whole_message_says(client: anthropic.Anthropic) -> None:
    whole = ask(client)

    with streaming(client) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()

    assert len(pieces) > 2
    assert "".join(pieces) == text_of(whole)
    assert final.usage == whole.usage
    assert final.stop_reason == "end_turn"


def test_events_come_in_the_order_of_the_api(api: AnthropicSimulator) -> None:
    response, raw = post(api, message_body(stream=True))

    names = [line[7:] for line in raw.decode().splitlines() if line.startswith("event: ")]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["transfer-encoding"] == "chunked"
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stream_starts_with_the_input_side_of_usage(client: anthropic.Anthropic) -> None:
    events = raw_events(client)

    assert events[0].type == "message_start"
    assert events[0].message.usage.input_tokens == 14
    assert events[0].message.usage.output_tokens == 1
    assert events[0].message.stop_reason is None
    assert events[-2].type == "message_delta"
    assert events[-2].usage.output_tokens > 1


def test_a_streams_input_can_grow_after_its_start(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    split = {"ephemeral_5m_input_tokens": 2_600, "ephemeral_1h_input_tokens": 0}
    api.enqueue(
        Reply(
            usage={"cache_creation_input_tokens": 2_900, "cache_creation": split},
            start_usage={"cache_creation_input_tokens": 2_600},
        )
    )

    events = raw_events(client)

    assert events[0].type == "message_start"
    assert events[0].message.usage.cache_creation_input_tokens == 2_600
    assert events[-2].type == "message_delta"
    assert events[-2].usage.cache_creation_input_tokens == 2_900
    assert "cache_creation" not in events[-2].usage.to_dict()


def test_thinking_and_tools_are_streamed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "measure", "input": {"tree": "chêne"}}
    api.enqueue(Reply(content=[call], thinking_tokens=12))

    with streaming(client) as stream:
        message = stream.get_final_message()

    assert isinstance(message.content[0], ThinkingBlock)
    assert message.content[0].signature
    assert isinstance(message.content[1], ToolUseBlock)
    assert message.content[1].input == {"tree": "chêne"}
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 12


def test_a_streamed_web_search_keeps_its_results_and_citations(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    search = {
        "type": "server_tool_use",
        "id": "srvtoolu_1",
        "name": "web_search",
        "input": {"query": "height of the tower"},
    }
    found = {
        "type": "web_search_result",
        "title": "The tower",
        "url": "https://example.com",
        "encrypted_content": "eA==",
        "page_age": None,
    }
    results = {
        "type": "web_search_tool_result",
        "tool_use_id": "srvtoolu_1",
        "content": [found],
    }
    citation = {
        "type": "web_search_result_location",
        "cited_text": "330 m",
        "url": "https://example.com",
        "title": "The tower",
        "encrypted_index": "eA==",
    }
    text = {"type": "text", "text": "It is 330 m high.", "citations": [citation]}
    used = {"web_search_requests": 1, "web_fetch_requests": 0}
    step = Reply(
        content=[search, results, text],
        usage={"input_tokens": 8_100, "server_tool_use": used},
        start_usage={"input_tokens": 1_700},
    )
    api.enqueue(step, step)

    whole = ask(client)
    with streaming(client) as stream:
        streamed = stream.get_final_message()

    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in whole.content
    ]
    assert streamed.usage.to_dict() == whole.usage.to_dict()
    assert whole.stop_reason == "end_turn"


def test_odd_characters_survive_a_stream(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    odd = 'line\u2028separator, next\x85line, quote ", emoji 🧾 and\r\nmore ' * 3
    api.enqueue(Reply(text=odd))

    with streaming(client, max_tokens=1_000) as stream:
        assert stream.get_final_text() == odd


def test_a_streaming_response_can_be_read_by_hand(client: anthropic.Anthropic) -> None:
    with client.messages.with_streaming_response.create(
        model=MODEL,
        max_tokens=100,
        messages=[{"role": "user", "content": QUESTION}],
    ) as response:
        body = json.loads(b"".join(response.iter_bytes()))

    assert body["type"] == "message"


# What is billed


def test_every_message_is_billed_as_it_was_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    message = ask(client)

    (bill,) = api.billed
    assert bill.model == MODEL
    assert bill.usage == message.usage.to_dict()
    assert bill.request_id == message._request_id
    assert bill.batch is False


def test_a_stream_read_to_its_end_is_billed_in_full(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with streaming(client) as stream:
        usage = stream.get_final_message().usage

    (bill,) = api.billed
    assert bill.usage == usage.to_dict()


def test_an_abandoned_stream_is_billed_for_what_was_made(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(output_tokens=5_000, chunk_delay=0.02))

    with streaming(client, max_tokens=9_000) as stream:
        next(iter(stream.text_stream))
    api.wait_until_idle()

    (bill,) = api.billed
    assert bill.usage["input_tokens"] == 14
    assert 1 < bill.usage["output_tokens"] < 1_000


def test_a_reader_who_leaves_is_noticed_at_a_failing_write(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    # More than the buffers between the two can hold.
    api.enqueue(Reply(output_tokens=10_000_000))

    with streaming(client, max_tokens=20_000_000) as stream:
        next(iter(stream.text_stream))
    api.wait_until_idle()

    (bill,) = api.billed
    assert 1 < bill.usage["output_tokens"] < 10_000_000


def test_a_client_that_gives_up_is_billed_all_the_same(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(delay=30))

    with pytest.raises(anthropic.APITimeoutError):
        ask(client, timeout=0.05)
    api.wait_until_idle()

    (bill,) = api.billed
    assert bill.usage["output_tokens"] > 1


def test_a_refused_request_is_not_billed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Fail(status=500))

    with pytest.raises(anthropic.InternalServerError):
        ask(client)
    client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": QUESTION}])

    assert api.billed == []


# Failures


@pytest.mark.parametrize(
    ("status", "error", "error_type"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (413, anthropic.APIStatusError, "request_too_large"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (503, anthropic.InternalServerError, "api_error"),
        (529, anthropic.OverloadedError, "overloaded_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_has_the_apis_type(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    status: int,
    error: type[anthropic.APIStatusError],
    error_type: str,
    stream: bool,
) -> None:
    api.enqueue(Fail(status=status))

    with pytest.raises(error) as raised:
        ask(client, stream=stream)

    assert raised.value.status_code == status
    assert raised.value.type == error_type
    assert raised.value.request_id is not None
    should_retry = raised.value.response.headers["x-should-retry"]
    assert should_retry == ("true" if status == 429 or status >= 500 else "false")


def test_a_failure_can_say_everything_itself(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(
        Fail(
            status=429,
            message="The organization is over its threshold.",
            retry_after=0.5,
            details={"error_code": "enforced_spend_limit_reached"},
        )
    )

    with pytest.raises(anthropic.APIStatusError, match="over its") as raised:
        ask(client)

    assert raised.value.response.headers["retry-after"] == "0.5"


def test_the_sdk_retries_and_each_attempt_takes_a_step(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    steps = Fail(status=429, retry_after=0.001), Fail(status=529, retry_after=0.001)
    api.enqueue(*steps, Reply(text="at last"))

    message = ask(client.with_options(max_retries=2))

    assert text_of(message) == "at last"
    assert [r.headers["x-stainless-retry-count"] for r in api.requests] == ["0", "1", "2"]
    assert len(api.billed) == 1


def test_a_hanging_request_times_out(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    api.enqueue(Hang(seconds=30))

    with pytest.raises(anthropic.APITimeoutError):
        ask(client, timeout=0.05)
    api.wait_until_idle()

    assert api.billed == []


def test_a_hanging_request_ends_without_an_answer(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Hang(seconds=0.01))

    with pytest.raises(anthropic.APIConnectionError):
        ask(client)


@pytest.mark.parametrize("step", [Hang(seconds=0.01, billed=True), CutBeforeResponse(billed=True)])
def test_an_answer_nobody_received_can_be_billed(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: Step
) -> None:
    api.enqueue(step)

    with pytest.raises(anthropic.APIConnectionError):
        ask(client)

    (bill,) = api.billed
    assert bill.usage["input_tokens"] == 14


def test_a_connection_can_be_cut_before_the_response(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(CutBeforeResponse())

    with pytest.raises(anthropic.APIConnectionError):
        ask(client)

    assert len(api.requests) == 1
    assert api.billed == []


def test_a_cut_stream_is_a_connection_error_and_billed_until_the_cut(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    reply = Reply(output_tokens=100, thinking_tokens=20)
    api.enqueue(CutStream(after_events=8, reply=reply))

    with streaming(client, max_tokens=200) as stream, pytest.raises(httpx2.RemoteProtocolError):
        stream.until_done()

    (bill,) = api.billed
    assert bill.usage["input_tokens"] == 14
    assert 20 <= bill.usage["output_tokens"] < 100
    assert bill.usage["output_tokens_details"] == {"thinking_tokens": 20}
    assert stream.current_message_snapshot.stop_reason is None


def test_a_stream_cut_at_once_still_owes_its_input(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(CutStream(after_events=0))

    with streaming(client, max_tokens=200) as stream, pytest.raises(httpx2.RemoteProtocolError):
        stream.until_done()
    api.wait_until_idle()

    (bill,) = api.billed
    assert bill.usage["input_tokens"] == 14
    assert bill.usage["output_tokens"] == 0


def test_a_whole_response_can_be_cut_in_its_body(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(CutStream())

    with pytest.raises((anthropic.APIConnectionError, httpx2.RemoteProtocolError)):
        ask(client)

    (bill,) = api.billed
    assert bill.usage["output_tokens"] > 1


def test_an_error_inside_a_stream_has_status_200(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(StreamError(after_events=5))

    with (
        streaming(client, max_tokens=200) as stream,
        pytest.raises(anthropic.APIStatusError, match="Overloaded") as raised,
    ):
        stream.until_done()

    assert raised.value.status_code == 200
    assert raised.value.type == "overloaded_error"
    (bill,) = api.billed
    assert bill.usage["output_tokens"] > 1


def test_a_stream_error_without_a_stream_is_that_http_error(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(StreamError(error_type="overloaded_error"))

    with pytest.raises(anthropic.OverloadedError):
        ask(client)

    assert api.billed == []


@pytest.mark.parametrize(("after_events", "seen"), [(None, "all"), (4, "some")])
def test_a_stream_can_end_cleanly_without_its_last_events(
    api: AnthropicSimulator, client: anthropic.Anthropic, after_events: int | None, seen: str
) -> None:
    api.enqueue(TruncateCleanly(after_events=after_events, reply=Reply(text="word " * 30)))

    with streaming(client, max_tokens=200) as stream:
        message = stream.get_final_message()

    assert message.stop_reason is None
    assert message.usage.output_tokens == 1
    assert (len(text_of(message)) == 150) == (seen == "all")
    (bill,) = api.billed
    assert bill.usage["output_tokens"] > 1


def test_without_a_stream_there_is_nothing_to_truncate(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(TruncateCleanly(after_events=1))

    assert ask(client).stop_reason == "end_turn"


# What is refused


def message_body(**changes: Any) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": QUESTION}],
        **changes,
    }
    return {key: value for key, value in body.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": None}, 400, "model: Field required"),
        ({"messages": None}, 400, "messages: Field required"),
        ({"max_tokens": None}, 400, "max_tokens: Field required"),
        ({"max_tokens": "9"}, 400, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 0"),
        ({"max_tokens": 0, "stream": True}, 400, "max_tokens: 0 only warms"),
        ({"model": 5}, 400, "model: Input should be a valid string"),
        ({"model": "gpt-x"}, 404, "model: gpt-x"),
        ({"stream": "yes"}, 400, "stream: Input should be a valid boolean"),
        ({"messages": []}, 400, "messages: at least one message is required"),
        ({"messages": "hi"}, 400, "messages: Input should be a valid list"),
        ({"messages": ["hi"]}, 400, "messages.0: Input should be a valid dictionary"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": [5]}]}, 400, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": "x"}]}]},
            400,
            "messages.0.content.0.source: Input should be a valid dictionary",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [5]}]}]},
            400,
            "messages.0.content.0.content.0: Input should be a valid dictionary",
        ),
        ({"thinking": "hard"}, 400, "thinking: Input should be a valid dictionary"),
        ({"system": 5}, 400, "system: Input should be a valid list"),
        ({"tools": ["x"]}, 400, "tools.0: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_request_is_refused_in_the_apis_words(
    api: AnthropicSimulator, changes: dict[str, Any], status: int, message: str
) -> None:
    response, raw = post(api, message_body(**changes))

    assert response.status == status
    assert error_of(raw)["type"] == (
        "not_found_error" if status == 404 else "invalid_request_error"
    )
    assert error_of(raw)["message"].startswith(message)
    assert api.billed == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "temperature: Extra inputs are not permitted"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "document"}]}]},
            "messages.0: document blocks are not permitted in assistant messages",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_the_api_version_decides_what_is_still_taken(
    api: AnthropicSimulator, changes: dict[str, Any], message: str, path: str
) -> None:
    def send(version: str) -> tuple[HTTPResponse, bytes]:
        headers = {"anthropic-version": version}
        return post(api, message_body(**changes), path=path, headers=headers)

    assert send("2023-06-01")[0].status == 200
    response, raw = send("2026-10-21")
    assert response.status == 400
    assert error_of(raw)["message"] == message


@pytest.mark.parametrize("raw_body", [b"", b"[1]", b"{", b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(api: AnthropicSimulator, raw_body: bytes) -> None:
    response, raw = post(api, raw_body)

    assert response.status == 400
    assert error_of(raw)["type"] == "invalid_request_error"
    assert api.requests[0].body is None


def test_a_request_without_a_key_is_refused(api: AnthropicSimulator) -> None:
    response, raw = post(api, message_body(), headers={"x-api-key": ""})

    assert response.status == 401
    assert error_of(raw)["type"] == "authentication_error"


def test_a_bearer_token_is_a_key(api: AnthropicSimulator) -> None:
    headers = {"x-api-key": "", "authorization": "Bearer secret"}

    response, _ = post(api, message_body(), headers=headers)

    assert response.status == 200
    assert "secret" not in repr(api.requests)


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/sessions", "/"])
def test_an_unknown_path_is_not_found(api: AnthropicSimulator, path: str) -> None:
    response, raw = post(api, message_body(), path=path)

    assert response.status == 404
    assert error_of(raw)["type"] == "not_found_error"


def test_a_known_path_refuses_other_methods(api: AnthropicSimulator) -> None:
    response, _ = post(api, {}, path="/v1/models")

    assert response.status == 405


@pytest.mark.parametrize(
    ("model", "window"), [("claude-haiku-4-5", 200_000), ("claude-haiku-5-5", 1_000_000)]
)
def test_a_prompt_longer_than_the_window_is_refused(
    client: anthropic.Anthropic, model: str, window: int
) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, "a" * 4 * window, model=model)

    assert f"prompt is too long: {window + 6} tokens > {window} maximum" in str(raised.value)
    assert ask(client, "a" * 4 * (window - 6), model=model).usage.input_tokens == window


def test_a_body_over_32_mb_is_refused(api: AnthropicSimulator) -> None:
    response, raw = post(api, message_body(system="a" * 32 * 1024 * 1024))

    assert response.status == 413
    assert error_of(raw)["type"] == "request_too_large"


# Tokens


def test_count_tokens_agrees_with_the_bill(client: anthropic.Anthropic) -> None:
    prompt: Any = {
        "model": MODEL,
        "system": "Use few words.",
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
    }

    counted = client.messages.count_tokens(**prompt)

    assert counted.input_tokens == ask(client, **prompt).usage.input_tokens


@pytest.mark.parametrize("text", ["", "a", "abcde", "日本語", "🧾" * 50, '\x00\x1f"\\', "a" * 999])
def test_text_never_has_more_tokens_than_its_json_has_bytes(
    client: anthropic.Anthropic, text: str
) -> None:
    messages: Any = [{"role": "user", "content": text}] * 3

    tokens = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens

    size = len(json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode())
    assert len(text.encode()) * 3 / 4 < tokens <= size


def png(width: int, height: int) -> dict[str, Any]:
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    source = {"type": "base64", "media_type": "image/png", "data": b64encode(head).decode()}
    return {"type": "image", "source": source}


def count(client: anthropic.Anthropic, *blocks: dict[str, Any], model: str = MODEL) -> int:
    """Tokens of blocks, beyond those of a message with none."""
    base: Any = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    with_blocks: Any = [{"role": "user", "content": [{"type": "text", "text": "x"}, *blocks]}]
    bare = client.messages.count_tokens(model=model, messages=base).input_tokens
    return client.messages.count_tokens(model=model, messages=with_blocks).input_tokens - bare


def test_images_are_counted_by_their_patches(client: anthropic.Anthropic) -> None:
    assert count(client, png(28 * 10, 28 * 3 + 1)) == 10 * 4 + 8


@pytest.mark.parametrize(("model", "most"), [(MODEL, 4_784), ("claude-opus-4-6", 1_568)])
def test_large_images_cost_the_most_of_their_model(
    client: anthropic.Anthropic, model: str, most: int
) -> None:
    assert count(client, png(8_000, 8_000), model=model) == most + 8


def test_documents_count_by_text_or_a_constant(client: anthropic.Anthropic) -> None:
    text = {"type": "text", "media_type": "text/plain", "data": "a" * 400}
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}

    assert count(client, {"type": "document", "source": text, "title": "four"}) == 101
    assert count(client, {"type": "document", "source": pdf}) == 2_000


def test_a_gif_is_counted_by_its_patches_too(client: anthropic.Anthropic) -> None:
    data = b64encode(b"GIF89a" + struct.pack("<HH", 56, 28)).decode()
    source = {"type": "base64", "media_type": "image/gif", "data": data}

    assert count(client, {"type": "image", "source": source}) == 2 + 8


@pytest.mark.parametrize("data", ["", "not base64!", b64encode(b"\xff\xd8\xff").decode()])
def test_an_image_of_unknown_size_is_a_constant(client: anthropic.Anthropic, data: str) -> None:
    source = {"type": "base64", "media_type": "image/jpeg", "data": data}

    assert count(client, {"type": "image", "source": source}) == 1_600 + 8


def test_a_document_of_blocks_counts_them(client: anthropic.Anthropic) -> None:
    source = {"type": "content", "content": [{"type": "text", "text": "a" * 40}, png(28, 28)]}

    assert count(client, {"type": "document", "source": source}) == 10 + 9


def test_a_tool_call_counts_its_name_and_input(client: anthropic.Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "it"}}

    assert count(client, call) == 1 + 3


def test_tool_results_count_what_they_hold(client: anthropic.Anthropic) -> None:
    content = [{"type": "text", "text": "a" * 40}, png(28, 28)]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}

    assert count(client, result) == 1 + 10 + 9


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "web_search_20260318", "name": "web_search"}]},
        {"mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "https://example.com"}}
                    ],
                }
            ]
        },
    ],
)
def test_token_counting_refuses_what_it_does_not_support(
    api: AnthropicSimulator, changes: dict[str, Any]
) -> None:
    response, raw = post(api, message_body(**changes), path="/v1/messages/count_tokens")

    assert response.status == 400
    assert "token counting does not support" in error_of(raw)["message"]


def test_token_counting_can_fail_where_messages_are_answered(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="for the message"))
    api.count_failure = Fail(status=529, message="Busy.", headers={"x-proxy": "here"})

    with pytest.raises(anthropic.OverloadedError, match=r"Busy\.") as raised:
        count(client)

    assert raised.value.response.headers["x-proxy"] == "here"
    assert api.billed == []
    assert text_of(ask(client)) == "for the message"


def test_token_counting_fails_until_it_is_told_otherwise(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.count_failure = Fail(status=400)
    for _ in range(2):
        with pytest.raises(anthropic.BadRequestError):
            count(client)

    api.count_failure = None

    assert count(client, png(28, 28)) > 0


@pytest.mark.parametrize("initial", [None, Fail(status=529)])
def test_a_reset_restores_how_token_counting_began(initial: Fail | None) -> None:
    with AnthropicSimulator(count_failure=initial) as api:
        began = post(api, message_body(), path="/v1/messages/count_tokens")[0].status
        api.count_failure = Fail(status=400)

        api.reset()

        again = post(api, message_body(), path="/v1/messages/count_tokens")[0].status
        assert again == began == (200 if initial is None else initial.status)


# Models


def test_models_are_listed_page_by_page(client: anthropic.Anthropic) -> None:
    first = client.models.list(limit=5)
    everything = [model.id for model in first]

    assert len(first.data) == 5
    assert first.has_more is True
    assert MODEL in everything
    assert len(everything) == len(set(everything)) > 15
    assert client.models.list(before_id=everything[3], limit=2).data[-1].id == everything[2]


def test_a_model_has_its_documented_limits(client: anthropic.Anthropic) -> None:
    model = client.models.retrieve("claude-haiku-4-5-20251001")

    assert model.display_name == "Claude Haiku 4.5"
    assert model.max_input_tokens == 200_000
    assert model.line == "haiku"


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("gpt-x")


@pytest.mark.parametrize("limit", ["0", "x", "1001"])
def test_a_wrong_page_size_is_refused(client: anthropic.Anthropic, limit: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="limit"):
        client.models.list(limit=limit)


def test_the_beta_endpoints_answer_too(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]

    message = client.beta.messages.create(model=MODEL, max_tokens=50, messages=messages)
    with client.beta.messages.stream(model=MODEL, max_tokens=50, messages=messages) as stream:
        streamed = stream.get_final_message()
    counted = client.beta.messages.count_tokens(model=MODEL, messages=messages)

    assert text_of(message) == text_of(streamed)
    assert counted.input_tokens == message.usage.input_tokens


def test_a_query_does_not_change_the_path(api: AnthropicSimulator) -> None:
    response, _ = post(api, message_body(), path="/v1/messages?beta=true")

    assert response.status == 200
    assert api.requests[0].path == "/v1/messages"
    assert api.requests[0].query == "beta=true"


# The prompt cache

LONG = "All work and no play. " * 100  # 550 tokens, above the minimum of 512


def marked(text: str = LONG, ttl: str | None = None) -> dict[str, Any]:
    control = {"type": "ephemeral"} if ttl is None else {"type": "ephemeral", "ttl": ttl}
    return {"type": "text", "text": text, "cache_control": control}


def cache_use(message: Message) -> tuple[int, int, int, int]:
    """Tokens read, written for 5 minutes, written for 1 hour, and neither."""
    usage = message.usage
    assert usage.cache_creation is not None
    five, hour = (
        usage.cache_creation.ephemeral_5m_input_tokens,
        usage.cache_creation.ephemeral_1h_input_tokens,
    )
    assert usage.cache_creation_input_tokens == five + hour
    return usage.cache_read_input_tokens or 0, five, hour, usage.input_tokens


def test_a_marked_prefix_is_written_and_then_read(client: anthropic.Anthropic) -> None:
    first = ask(client, system=[marked()])
    second = ask(client, system=[marked()])

    assert cache_use(first) == (0, 553, 0, 14)
    assert cache_use(second) == (553, 0, 0, 14)
    assert first.content == second.content


@pytest.mark.parametrize(("ttl", "lifetime"), [("5m", 300), ("1h", 3_600)])
def test_an_entry_lives_as_long_as_its_ttl(
    client: anthropic.Anthropic, clock: Clock, ttl: str, lifetime: float
) -> None:
    ask(client, system=[marked(ttl=ttl)])
    clock.now += lifetime

    read, five, hour, _ = cache_use(ask(client, system=[marked(ttl=ttl)]))

    assert read == 0
    assert (five, hour) == ((553, 0) if ttl == "5m" else (0, 553))


@pytest.mark.parametrize(("ttl", "lifetime"), [("5m", 300), ("1h", 3_600)])
def test_a_read_refreshes_an_entry(
    client: anthropic.Anthropic, clock: Clock, ttl: str, lifetime: float
) -> None:
    ask(client, system=[marked(ttl=ttl)])

    for _ in range(3):
        clock.now += lifetime - 1
        assert cache_use(ask(client, system=[marked(ttl=ttl)]))[0] == 553


@pytest.mark.parametrize(
    ("model", "minimum"),
    [
        ("claude-haiku-5-5", 512),
        ("claude-fable-5-2", 512),
        ("claude-opus-5", 512),
        ("claude-sonnet-5", 1_024),
        ("claude-opus-4-8", 1_024),
        ("claude-sonnet-4-6", 1_024),
        ("claude-opus-4-7", 2_048),
        ("anthropic.claude-mythos-preview-v1", 2_048),
        ("claude-opus-4-6", 4_096),
        ("claude-haiku-4-5", 4_096),
    ],
)
def test_a_prefix_under_the_models_minimum_is_ignored(
    client: anthropic.Anthropic, model: str, minimum: int
) -> None:
    def written(tokens: int) -> int:
        system = [marked("a" * 4 * (tokens - 3))]
        return cache_use(ask(client, model=model, system=system))[1]

    assert written(minimum - 1) == 0
    assert written(minimum) == minimum


def test_models_and_keys_share_no_entries(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    ask(client, system=[marked()])

    assert cache_use(ask(client, system=[marked()], model="claude-opus-5-5"))[0] == 0
    assert cache_use(ask(client.with_options(api_key="other"), system=[marked()]))[0] == 0


def test_a_changed_byte_anywhere_in_the_prefix_misses(client: anthropic.Anthropic) -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    ask(client, tools=tools, system=[marked()])

    assert cache_use(ask(client, tools=tools, system=[marked(LONG + ".")]))[0] == 0
    assert cache_use(ask(client, tools=[{**tools[0], "name": "see"}], system=[marked()]))[0] == 0
    assert cache_use(ask(client, tools=tools, system=[marked()]))[0] > 553


def test_tools_can_be_marked(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "description": "a" * 1_000}
    tool = {"name": "look", "input_schema": schema, "cache_control": {"type": "ephemeral"}}

    written = cache_use(ask(client, tools=[tool]))[1]
    read = cache_use(ask(client, "Something else?", tools=[tool]))[0]

    assert written == read > 512


def test_a_growing_conversation_reads_what_its_last_turn_wrote(
    client: anthropic.Anthropic,
) -> None:
    history: list[Any] = [{"role": "user", "content": LONG}]
    first = ask(client, messages=history, cache_control={"type": "ephemeral"})
    history += [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "Go on."}]

    second = ask(client, messages=history, cache_control={"type": "ephemeral"})

    assert cache_use(first) == (0, 554, 0, 2)
    assert cache_use(second) == (554, (4 + 2) + (4 + 2), 0, 2)


@pytest.mark.parametrize(("added", "hit"), [(19, True), (20, False)])
def test_a_mark_looks_back_over_twenty_positions(
    client: anthropic.Anthropic, added: int, hit: bool
) -> None:
    ask(client, [marked()])
    later = [{"type": "text", "text": "more"}] * (added - 1)

    message = ask(client, [{"type": "text", "text": LONG}, *later, marked("the last")])

    assert (cache_use(message)[0] > 0) is hit


def test_a_second_mark_looks_back_from_its_own_place(client: anthropic.Anthropic) -> None:
    ask(client, [marked()])
    later = [{"type": "text", "text": "more"}] * 40

    message = ask(client, [marked(), *later, marked("the last")])

    assert cache_use(message)[0] == 554
    assert cache_use(message)[1] == 40 + 2


def test_parallel_tool_calls_are_one_position(client: anthropic.Anthropic) -> None:
    def calls(count: int) -> list[Any]:
        asked = [
            {"type": "tool_use", "id": f"t{n}", "name": "look", "input": {}} for n in range(count)
        ]
        results = [
            {"type": "tool_result", "tool_use_id": f"t{n}", "content": "ok"} for n in range(count)
        ]
        return [{"role": "assistant", "content": asked}, {"role": "user", "content": results}]

    start = [{"role": "user", "content": [marked()]}]
    ask(client, messages=start)

    message = ask(client, messages=[*start, *calls(30)], cache_control={"type": "ephemeral"})

    assert cache_use(message)[0] == 554


def test_a_mark_on_a_part_of_a_tool_result_marks_the_result(client: anthropic.Anthropic) -> None:
    def turn(question: str) -> list[Any]:
        call = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
        parts = [{"type": "text", "text": "Found:"}, marked()]
        result = {"type": "tool_result", "tool_use_id": "t", "content": parts}
        return [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result, {"type": "text", "text": question}]},
        ]

    written = cache_use(ask(client, messages=turn("And?")))[1]
    read = cache_use(ask(client, messages=turn("So what?")))[0]

    assert written == read > 550


def test_mixed_lifetimes_are_billed_apart(client: anthropic.Anthropic, clock: Clock) -> None:
    system = [marked(ttl="1h"), marked("Now then. " * 10)]

    assert cache_use(ask(client, system=system)) == (0, 25, 553, 14)
    clock.now += 300
    assert cache_use(ask(client, system=system)) == (553, 25, 0, 14)


def test_a_mark_that_was_moved_on_stays_readable(client: anthropic.Anthropic) -> None:
    ask(client, system=[marked()])

    moved = [{"type": "text", "text": LONG}, marked("b" * 400)]

    assert cache_use(ask(client, system=moved)) == (553, 100, 0, 14)
    assert cache_use(ask(client, system=[marked()])) == (553, 0, 0, 14)


@pytest.mark.parametrize(
    "change",
    [
        {"tool_choice": {"type": "none"}},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "low"}},
    ],
)
def test_settings_that_render_into_messages_invalidate_them_alone(
    client: anthropic.Anthropic, change: dict[str, Any]
) -> None:
    prompt: Any = {"system": [marked()], "messages": [{"role": "user", "content": [marked()]}]}
    ask(client, **prompt)

    message = ask(client, **prompt, **change)

    assert cache_use(message) == (553, 554, 0, 2)


def test_speed_invalidates_system_and_messages(client: anthropic.Anthropic) -> None:
    ask(client, system=[marked()])

    assert cache_use(ask(client, system=[marked()], speed="fast"))[0] == 0


def test_an_entry_is_readable_once_its_response_begins(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(chunk_delay=30), Reply())
    system: Any = [marked()]

    with client.messages.stream(
        model=MODEL, max_tokens=50, system=system, messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        next(iter(stream))

        assert cache_use(ask(client, system=system))[0] == 553


def test_a_refused_request_writes_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Fail(status=529))
    with pytest.raises(anthropic.OverloadedError):
        ask(client, system=[marked()])

    assert cache_use(ask(client, system=[marked()]))[0] == 0


def test_a_warming_request_writes_for_the_next(client: anthropic.Anthropic) -> None:
    warm = ask(client, "warm up", max_tokens=0, system=[marked()])

    assert cache_use(warm)[1] == 553
    assert cache_use(ask(client, system=[marked()]))[0] == 553


def test_the_automatic_mark_passes_over_what_cannot_be_cached(
    client: anthropic.Anthropic,
) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages: Any = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": [thought]},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ]

    message = ask(client, messages=messages, cache_control={"type": "ephemeral"})

    assert cache_use(message)[1] == 554


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": [marked() for _ in range(5)]}, "A maximum of 4 blocks"),
        (
            {"system": [marked() for _ in range(4)], "cache_control": {"type": "ephemeral"}},
            "A maximum of 4 blocks",
        ),
        (
            {"system": [marked(ttl="5m"), marked(ttl="1h")]},
            "system.1.cache_control.ttl: a ttl='1h'",
        ),
        ({"system": [marked(ttl="2h")]}, "system.0.cache_control.ttl"),
        ({"cache_control": {"type": "forever"}}, "cache_control.cache_control.type"),
        ({"system": [marked("")]}, "system.0.text: cache_control cannot be set"),
        (
            {
                "messages": [{"role": "user", "content": [marked(ttl="1h")]}],
                "cache_control": {"type": "ephemeral"},
            },
            "cache_control: the last block already",
        ),
    ],
)
def test_a_wrong_mark_is_refused(
    client: anthropic.Anthropic, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, **changes)

    body: Any = raised.value.body
    assert body["error"]["message"].startswith(message)


def test_a_thinking_block_cannot_be_marked(client: anthropic.Anthropic) -> None:
    thought = {**marked(), "type": "thinking", "thinking": "hm", "signature": "s"}
    messages: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [thought]},
    ]

    with pytest.raises(anthropic.BadRequestError, match="Extra inputs are not permitted"):
        ask(client, messages=messages)


def test_an_automatic_mark_without_a_place_is_ignored(client: anthropic.Anthropic) -> None:
    message = ask(client, "", cache_control={"type": "ephemeral"})

    assert cache_use(message)[1] == 0


def test_a_late_five_minute_write_does_not_shorten_an_hour() -> None:
    cache = PromptCache()
    body = message_body(system=[marked()])
    blocks = prompt_blocks(body)
    # Two requests at once: neither sees the entry of the other.
    five = cache.plan(tenant="t", body=body, blocks=blocks, at=0)
    cache.commit(five._replace(touched=[(key, "1h") for key, _ in five.touched]))
    cache.commit(five)

    assert cache.plan(tenant="t", body=body, blocks=blocks, at=3_599).read == 553


def test_dead_entries_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache_model, "_SWEEP_ABOVE", 10)
    cache = PromptCache()

    for number in range(1_000):
        entry = (b"%d" % number, "5m")
        cache.commit(CacheUse(0, 0, 0, 0, touched=[entry], at=number * 60.0))

    assert len(cache) <= 11


def test_an_equal_automatic_mark_changes_nothing(client: anthropic.Anthropic) -> None:
    message = ask(client, [marked()], cache_control={"type": "ephemeral"})

    assert cache_use(message) == (0, 554, 0, 2)


# Compression


@pytest.fixture(scope="module")
def compressing() -> Iterator[AnthropicSimulator]:
    with AnthropicSimulator(compress=True) as api:
        yield api


def test_the_sdk_reads_compressed_answers_and_streams(compressing: AnthropicSimulator) -> None:
    with anthropic.Anthropic(base_url=compressing.base_url, api_key="key") as client:
        whole = client.messages.with_raw_response.create(
            model=MODEL, max_tokens=50, messages=[{"role": "user", "content": QUESTION}]
        )
        with streaming(client, max_tokens=50) as stream:
            text = stream.get_final_text()

    assert whole.headers["content-encoding"] == "gzip"
    assert stream.response.headers["content-encoding"] == "gzip"
    assert text == text_of(whole.parse())


@pytest.mark.parametrize(
    ("accepted", "encoded"),
    [("gzip, deflate", True), ("*", True), ("identity", False), ("gzip;q=0, br", False)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_compressed_only_where_it_is_accepted(
    compressing: AnthropicSimulator, accepted: str, encoded: bool, stream: bool
) -> None:
    headers = {"accept-encoding": accepted}

    response, raw = post(compressing, message_body(stream=stream), headers=headers)

    assert (response.headers.get("content-encoding") == "gzip") is encoded
    plain = gzip.decompress(raw) if encoded else raw
    assert plain.startswith(b"event: message_start" if stream else b'{"model"')
    assert plain.rstrip().endswith(b"}")


def test_a_compressed_stream_is_flushed_event_by_event(compressing: AnthropicSimulator) -> None:
    compressing.enqueue(Reply(chunk_delay=30))

    with (
        anthropic.Anthropic(base_url=compressing.base_url, api_key="key") as client,
        streaming(client) as stream,
    ):
        assert next(iter(stream)).type == "message_start"
    compressing.wait_until_idle()


# The async client


def test_the_async_client_reads_answers_and_streams(api: AnthropicSimulator) -> None:
    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=api.base_url, api_key="key") as client:
            messages: Any = [{"role": "user", "content": QUESTION}]
            whole = await client.messages.create(model=MODEL, max_tokens=50, messages=messages)
            async with client.messages.stream(
                model=MODEL, max_tokens=50, messages=messages
            ) as stream:
                return text_of(whole), await stream.get_final_text()

    whole, streamed = asyncio.run(both())

    assert whole == streamed
    assert len(api.billed) == 2


def test_a_cancelled_async_stream_is_billed_for_what_was_made(api: AnthropicSimulator) -> None:
    async def read_one() -> None:
        async with anthropic.AsyncAnthropic(base_url=api.base_url, api_key="key") as client:
            messages: Any = [{"role": "user", "content": QUESTION}]
            async with client.messages.stream(
                model=MODEL, max_tokens=9_000, messages=messages
            ) as stream:
                async for _ in stream.text_stream:
                    break

    api.enqueue(Reply(output_tokens=5_000, chunk_delay=0.02))
    asyncio.run(read_one())
    api.wait_until_idle()

    (bill,) = api.billed
    assert 1 < bill.usage["output_tokens"] < 1_000


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Fail(status=429), anthropic.RateLimitError),
        (CutBeforeResponse(), anthropic.APIConnectionError),
    ],
)
def test_the_async_client_sees_failures(
    api: AnthropicSimulator, step: Step, error: type[Exception]
) -> None:
    async def fail() -> None:
        async with anthropic.AsyncAnthropic(
            base_url=api.base_url, api_key="key", max_retries=0
        ) as client:
            await client.messages.create(
                model=MODEL, max_tokens=50, messages=[{"role": "user", "content": QUESTION}]
            )

    api.enqueue(step)

    with pytest.raises(error):
        asyncio.run(fail())


# What is recorded


def test_requests_are_recorded_without_their_key(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    ask(client.with_options(api_key="sk-very-secret"))

    (request,) = api.requests
    assert request.method == "POST"
    assert request.path == "/v1/messages"
    assert request.body is not None
    assert request.body["messages"][0]["content"] == QUESTION
    assert request.headers["authorization"] == "redacted"
    assert request.at == clock.now
    assert "very-secret" not in repr(api.requests)


def test_a_reset_forgets_everything(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    api.default = Fail(status=500)
    api.enqueue(Reply(), Fail(status=500))
    ask(client, system=[marked()])

    api.reset()

    assert api.requests == []
    assert api.billed == []
    assert cache_use(ask(client, system=[marked()]))[0] == 0


def test_what_still_runs_at_a_reset_stays_unseen(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(delay=30))
    with pytest.raises(anthropic.APITimeoutError):
        ask(client.with_options(timeout=0.05))

    api.reset()
    api.wait_until_idle()

    assert api.billed == []


def test_a_history_can_be_bounded() -> None:
    with AnthropicSimulator(history=3) as api:
        for _ in range(5):
            post(api, message_body())

        assert len(api.requests) == len(api.billed) == 3


def test_waiting_for_a_busy_simulator_ends(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(chunk_delay=30))
    with streaming(client, max_tokens=50) as stream:
        next(iter(stream))

        with pytest.raises(TimeoutError):
            api.wait_until_idle(timeout=0.01)


# Many at once


def test_fifty_threads_are_answered_and_billed_exactly(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    questions = [f"What is {number} squared?" for number in range(200)]
    api.enqueue(*[Fail(status=529)] * 20)

    def answer(question: str) -> str | None:
        try:
            return text_of(ask(client, question))
        except anthropic.OverloadedError:
            return None

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(answer, questions))

    assert answers.count(None) == 20
    assert all(f'"{q}"' in a for q, a in zip(questions, answers, strict=True) if a is not None)
    assert len(api.requests) == 200
    assert len(api.billed) == 180
    assert len({bill.request_id for bill in api.billed}) == 180


def test_fifty_streams_run_side_by_side(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.default = Reply(text="word " * 40, chunk_delay=0.01)

    def read(_: int) -> str:
        with streaming(client) as stream:
            return stream.get_final_text()

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(read, range(50)))

    assert texts == ["word " * 40] * 50
    assert len(api.billed) == 50


# The server


def test_one_connection_serves_many_requests(api: AnthropicSimulator) -> None:
    connection = HTTPConnection(api.base_url.removeprefix("http://"), timeout=5)
    try:
        for path in ("/v1/models", "/nowhere", "/v1/models/claude-opus-5"):
            connection.request("GET", path, headers={"x-api-key": "key"})
            connection.getresponse().read()
            assert connection.sock is not None
    finally:
        connection.close()

    assert len(api.requests) == 3


def test_a_chunked_request_is_read(api: AnthropicSimulator) -> None:
    connection = HTTPConnection(api.base_url.removeprefix("http://"), timeout=5)
    payload = json.dumps(message_body()).encode()
    try:
        connection.request(
            "POST",
            "/v1/messages",
            iter([payload[:20], payload[20:]]),
            {"x-api-key": "key", "transfer-encoding": "chunked"},
            encode_chunked=True,
        )
        assert connection.getresponse().status == 200
    finally:
        connection.close()

    assert api.requests[0].body == message_body()


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"a" * 70_000, b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nabc", b""),
        (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 404"),
        (
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\na: b\r\n\r\n",
            b"HTTP/1.1 404",
        ),
        (
            b"POST /v1/models HTTP/1.1\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n",
            b"HTTP/1.1 100",
        ),
    ],
)
def test_raw_bytes_get_an_http_answer_or_a_closed_connection(
    api: AnthropicSimulator, sent: bytes, received: bytes
) -> None:
    host, _, port = api.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(4_096):
            answer += piece

    assert answer[: len(received) or None] == received


def test_requests_sent_ahead_are_answered_in_turn(api: AnthropicSimulator) -> None:
    arrived = threading.Event()

    def first(body: dict[str, Any]) -> Step:
        arrived.set()
        return Reply(text="one", delay=0.05)

    def request(connection_header: bytes) -> bytes:
        body = json.dumps(message_body()).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nx-api-key: key\r\nconnection: %b\r\n"
        return head % connection_header + b"content-length: %d\r\n\r\n%b" % (len(body), body)

    api.enqueue(first, Reply(text="two"))
    host, _, port = api.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request(b"keep-alive"))
        assert arrived.wait(timeout=5)
        connection.sendall(request(b"close"))
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece

    assert 0 < answer.find(b'"one"') < answer.find(b'"two"')


def test_a_room_can_be_added(api: AnthropicSimulator) -> None:
    def echo(call: Call) -> None:
        if call.body is None:
            raise ApiError(400)
        call.send({"name": call.names["name"], "sent": call.body})

    with AnthropicSimulator() as other:
        other.add_room("POST", r"/v1/echo/(?P<name>\w+)", echo)
        _, raw = post(other, {"a": 1}, path="/v1/echo/me")

    assert json.loads(raw) == {"name": "me", "sent": {"a": 1}}


def test_stopping_ends_what_still_runs() -> None:
    arrived = threading.Event()

    def hang(body: dict[str, Any]) -> Step:
        arrived.set()
        return Hang(seconds=60)

    api = AnthropicSimulator(default=hang).start()
    with (
        anthropic.Anthropic(base_url=api.base_url, api_key="key", max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(ask, client)
        assert arrived.wait(timeout=5)
        api.stop()

        assert isinstance(asked.exception(timeout=5), anthropic.APIConnectionError)
    api.stop()
    with pytest.raises(RuntimeError, match="not running"):
        _ = api.base_url


def test_a_connection_that_cannot_be_accepted_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [OSError("too many open files")]
    accept = socket.socket.accept

    def fail_once(self: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", fail_once)

    with AnthropicSimulator() as api:
        response, _ = post(api, message_body())

    assert failures == []
    assert response.status == 200


def test_it_can_be_started_again() -> None:
    api = AnthropicSimulator()
    for _ in range(2):
        with api:
            assert api.start() is api
            response, _ = post(api, message_body())
            assert response.status == 200

    assert len(api.requests) == 2


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_any_loopback_host_will_do(host: str) -> None:
    with AnthropicSimulator(host=host) as api:
        response, _ = post(api, message_body())

    assert response.status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com", ""])
def test_a_host_that_others_can_reach_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        AnthropicSimulator(host=host)


def test_importing_it_needs_neither_django_nor_the_sdk() -> None:
    code = (
        "import sys, ai_budget.testing.simulator;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'django', 'anthropic'}))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


# The command


def test_the_command_serves_until_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    statuses: list[int] = []

    def ask_then_interrupt() -> None:
        address = out.getvalue().split("http://")[1].split(" ")[0]
        connection = HTTPConnection(address, timeout=5)
        body = json.dumps(message_body()).encode()
        connection.request("POST", "/v1/messages", body, {"x-api-key": "key"})
        statuses.append(connection.getresponse().status)
        connection.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(ai_budget_simulator, "wait_for_interrupt", ask_then_interrupt)

    call_command(ai_budget_simulator.Command(), "--port=0", "--compress", stdout=out)

    assert statuses == [200]
    assert '"BASE_URL": "http://127.0.0.1:' in out.getvalue()


def test_the_command_waits_for_ctrl_c() -> None:
    main = threading.main_thread().ident
    assert main is not None
    ctrl_c = threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT])
    ctrl_c.start()

    with pytest.raises(KeyboardInterrupt):
        ai_budget_simulator.wait_for_interrupt()
    ctrl_c.join()


def test_the_command_refuses_a_host_that_others_can_reach() -> None:
    with pytest.raises(CommandError, match="not a loopback address"):
        call_command(ai_budget_simulator.Command(), "--host=0.0.0.0")


def test_the_command_says_that_its_port_is_taken(api: AnthropicSimulator) -> None:
    port = api.base_url.rpartition(":")[2]

    with pytest.raises(CommandError, match=f"Cannot listen on 127.0.0.1:{port}: ") as raised:
        call_command(ai_budget_simulator.Command(), f"--port={port}")

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_the_command_refuses_a_port_that_cannot_be(port: str) -> None:
    with pytest.raises(CommandError, match="Cannot listen"):
        call_command(ai_budget_simulator.Command(), f"--port={port}")
