"""Streams that end in every way there is, and what each is booked at."""

from __future__ import annotations

import contextlib
import gc
import zlib
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any

import anthropic
import httpx2
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import ai_budget
from ai_budget import periods
from ai_budget.guard.stream import ALLOWANCE_TOKENS
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog
from ai_budget.testing import (
    AnthropicSimulator,
    CutStream,
    Reply,
    StreamError,
    TruncateCleanly,
    freeze,
)
from tests.guard.books import (
    MODEL,
    assert_at_bound,
    assert_balanced,
    assert_exact,
    bill,
    in_db,
    only_row,
    rows,
    site,
)

pytestmark = pytest.mark.django_db

MAX_TOKENS = 4_000
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": MAX_TOKENS,
    "messages": [{"role": "user", "content": "Tell me a story"}],
}
STORY = "Once upon a time there was a budget that held. " * 20
"""About 240 tokens in some forty deltas, in an answer that might have had 4,000."""


def assert_estimated_from_part(api: AnthropicSimulator) -> CallLog:
    """One stream was read in part: booked at what was seen, and some for what was not."""
    row = only_row()
    assert row.status == CallLog.Status.ESTIMATED
    assert row.cost_nanousd is not None
    assert sum(bill(api)) <= row.cost_nanousd < row.reserved_nanousd
    assert ALLOWANCE_TOKENS <= row.output_tokens <= MAX_TOKENS
    assert row.input_tokens > 0
    assert_balanced()
    return row


# Read to the end


def test_a_stream_that_is_read_to_its_end_is_exact(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY))

    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == STORY

    row = assert_exact(api)
    assert row.stop_reason == "end_turn"
    assert row.first_token_ms is not None
    assert row.latency_ms is not None
    assert row.latency_ms >= row.first_token_ms


def test_a_stream_with_thinking_that_is_read_to_its_end_is_exact(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, thinking_tokens=300))

    list(client.messages.create(**ASKED, thinking={"type": "adaptive"}, stream=True))

    assert assert_exact(api).thinking_tokens == 300


def test_cache_writes_that_grow_at_the_end_without_their_split_are_priced(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(
        Reply(
            text="Well",
            usage={
                "cache_creation_input_tokens": 337,
                "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 68},
            },
            start_usage={"cache_creation_input_tokens": 68},
        )
    )
    marked: list[Any] = [
        {"type": "text", "text": "story " * 40, "cache_control": {"type": "ephemeral"}}
    ]

    list(client.messages.create(**ASKED, system=marked, stream=True))

    row = assert_exact(api)
    assert (row.cache_write_5m_tokens, row.cache_write_1h_tokens) == (269, 68)


def test_iterations_that_a_stream_reports_are_the_bill(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    entries = [
        {"type": "message", "input_tokens": 20, "output_tokens": 8},
        {"type": "message", "input_tokens": 90, "output_tokens": 80},
    ]
    api.enqueue(Reply(text="Well", usage={"iterations": entries}))

    list(client.messages.create(**ASKED, stream=True))

    assert_exact(api)


def test_a_refused_stream_without_output_is_free(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(content=[], stop_reason="refusal", output_tokens=1))

    list(client.messages.create(**ASKED, stream=True))

    row = only_row()
    assert (row.status, row.cost_nanousd, row.stop_reason) == ("settled", 0, "refusal")
    assert_balanced()


def test_a_stream_refused_after_output_is_billed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, stop_reason="refusal"))

    list(client.messages.create(**ASKED, stream=True))

    assert_exact(api)


@pytest.fixture
def compressing_api(settings: Any) -> Iterator[AnthropicSimulator]:
    with AnthropicSimulator(compress=True) as api:
        settings.AI_BUDGET = {"API_KEY": "key", "BASE_URL": api.base_url}
        yield api


def test_a_server_that_can_compress_is_asked_not_to(compressing_api: AnthropicSimulator) -> None:
    list(ai_budget.client().messages.create(**ASKED, stream=True))

    assert compressing_api.requests[0].headers["accept-encoding"] == "identity"
    assert_exact(compressing_api)


def test_what_the_caller_says_of_compression_does_not_win(
    compressing_api: AnthropicSimulator,
) -> None:
    gzip = {"accept-encoding": "gzip"}

    list(ai_budget.client().messages.create(**ASKED, stream=True, extra_headers=gzip))

    assert_exact(compressing_api)


def test_whole_answers_may_be_compressed(compressing_api: AnthropicSimulator) -> None:
    ai_budget.client().messages.create(**ASKED)

    assert "gzip" in compressing_api.requests[0].headers["accept-encoding"]
    assert_exact(compressing_api)


class _CompressingAnyway(httpx2.HTTPTransport):
    """A server that compresses whatever it was asked."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        body = response.read()
        compressor = zlib.compressobj(wbits=31)
        pieces = [compressor.compress(body), compressor.flush()]
        return httpx2.Response(
            200,
            headers={
                "content-type": response.headers["content-type"],
                "content-encoding": self._encoding,
            },
            stream=_Pieces(b"".join(pieces)),
        )


class _Pieces(httpx2.SyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._body), 7):
            yield self._body[start : start + 7]


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_that_is_compressed_all_the_same_is_read(
    api: AnthropicSimulator, streamed: bool
) -> None:
    http = httpx2.Client(transport=_CompressingAnyway("gzip"))
    bare = anthropic.Anthropic(api_key="key", base_url=api.base_url, http_client=http)

    with (
        bare,
        ai_budget.guard(bare).messages.with_streaming_response.create(
            **ASKED, stream=streamed
        ) as response,
    ):
        assert b"usage" in response.read()

    assert_exact(api)


def test_an_encoding_that_nobody_knows_is_booked_at_the_bound(api: AnthropicSimulator) -> None:
    http = httpx2.Client(transport=_CompressingAnyway("unheard-of"))
    bare = anthropic.Anthropic(api_key="key", base_url=api.base_url, http_client=http)

    with (
        bare,
        ai_budget.guard(bare).messages.with_streaming_response.create(
            **ASKED, stream=True
        ) as response,
    ):
        list(response.iter_bytes())

    assert_at_bound()


# Left by the reader


def test_a_stream_that_its_reader_leaves_is_booked_in_part(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    with client.messages.stream(**ASKED) as stream:
        for text in stream.text_stream:
            if text:
                break

    api.wait_until_idle()
    assert assert_estimated_from_part(api).error == "closed early"


@pytest.mark.django_db(transaction=True)
async def test_an_async_stream_that_its_reader_leaves_is_booked_in_part(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    async with async_client.messages.stream(**ASKED) as stream:
        async for text in stream.text_stream:
            if text:
                break

    api.wait_until_idle()
    assert (await in_db(assert_estimated_from_part, api)).error == "closed early"


def test_what_was_read_counts_by_its_bytes(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Jemand mußte Josef K. verleumdet haben. " * 60, chunk_delay=0.001))

    read = ""
    with client.messages.stream(**ASKED) as stream:
        for text in stream.text_stream:
            read += text
            if len(read) > 600:
                break

    api.wait_until_idle()
    row = assert_estimated_from_part(api)
    assert row.output_tokens >= len(read.encode()) + ALLOWANCE_TOKENS


def test_the_allowance_covers_seconds_of_generation() -> None:
    assert ALLOWANCE_TOKENS >= 4 * 100  # tokens a second, of a quick model


def test_a_short_answer_is_never_booked_above_its_reservation(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="One two three four " * 3, chunk_delay=0.002))

    with client.messages.stream(**{**ASKED, "max_tokens": 20}) as stream:
        next(iter(stream.text_stream))

    api.wait_until_idle()
    row = only_row()
    assert (row.status, row.output_tokens) == ("estimated", 20)
    assert bill(api)[0] <= (row.cost_nanousd or 0) <= row.reserved_nanousd


def test_a_stream_that_is_dropped_half_read_is_booked_in_part(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    stream = client.messages.create(**ASKED, stream=True)
    for event in stream:
        if event.type == "content_block_delta":
            break
    del stream, event
    gc.collect()

    api.wait_until_idle()
    assert_estimated_from_part(api)


def test_a_stream_that_the_collector_closes_is_booked_with_the_next_call(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    """The collector may stop a thread in the middle of a statement on the same connection."""
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))
    stream = client.messages.create(**ASKED, stream=True)
    next(stream)
    cycle: list[Any] = [stream]
    cycle.append(cycle)

    with CaptureQueriesContext(connection) as queries:
        del stream, cycle
        gc.collect()
    assert queries.captured_queries == []
    assert only_row().status == CallLog.Status.RESERVED

    client.messages.create(**ASKED)
    assert [row.status for row in rows()] == ["estimated", "settled"]
    assert_balanced()


def test_a_stream_that_is_dropped_unread_is_left_to_the_tick(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    stream = client.messages.create(**ASKED, stream=True)
    del stream
    gc.collect()
    assert [row.status for row in rows()] == ["reserved"]
    assert site().held_nanousd == rows()[0].reserved_nanousd

    with freeze(periods.now() + timedelta(hours=3)):
        assert ledgers.current().settle_overdue() == 1

    assert_at_bound()


def test_a_stream_left_before_its_first_event_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    with client.messages.stream(**ASKED):
        pass

    assert assert_at_bound().error == "closed early"


def test_a_stream_left_in_its_thinking_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, thinking_tokens=800, chunk_delay=0.002))

    for event in client.messages.create(**ASKED, stream=True):
        if event.type == "content_block_delta":
            break

    api.wait_until_idle()
    assert_at_bound()


def test_a_stream_that_may_think_out_of_sight_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))
    hidden: Any = {"type": "adaptive", "display": "omitted"}

    with client.messages.stream(**ASKED, thinking=hidden) as stream:
        next(iter(stream.text_stream))

    api.wait_until_idle()
    assert_at_bound()


def test_a_stream_that_must_not_think_is_booked_in_part(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    with client.messages.stream(**ASKED, thinking={"type": "disabled"}) as stream:
        next(iter(stream.text_stream))

    api.wait_until_idle()
    assert_estimated_from_part(api)


def test_an_exception_of_the_reader_closes_and_books_the_stream(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    def read() -> None:
        with client.messages.stream(**ASKED) as stream:
            next(iter(stream.text_stream))
            raise LookupError("the reader's own")

    with pytest.raises(LookupError):
        read()

    api.wait_until_idle()
    assert_estimated_from_part(api)


def test_a_generator_that_is_closed_books_its_stream(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    def story() -> Generator[str, None, None]:
        with client.messages.stream(**ASKED) as stream:
            yield from stream.text_stream

    told = story()
    next(told)
    told.close()

    api.wait_until_idle()
    assert_estimated_from_part(api)


def test_closing_twice_books_once(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))
    stream = client.messages.create(**ASKED, stream=True)
    next(stream)

    stream.close()
    stream.close()

    assert len(rows()) == 1
    assert_balanced()


# Broken off by the server


@pytest.mark.parametrize(
    ("step", "raised"),
    [
        (CutStream(after_events=9, reply=Reply(text=STORY)), httpx2.RemoteProtocolError),
        (StreamError(after_events=9, reply=Reply(text=STORY)), anthropic.APIStatusError),
    ],
    ids=["cut", "error event"],
)
def test_a_stream_that_breaks_off_is_booked_in_part(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: Any, raised: type[Exception]
) -> None:
    api.enqueue(step)

    with pytest.raises(raised):
        list(client.messages.create(**ASKED, stream=True))

    api.wait_until_idle()
    row = assert_estimated_from_part(api)
    assert row.error in {"RemoteProtocolError", "overloaded_error"}


@pytest.mark.django_db(transaction=True)
async def test_an_async_stream_that_breaks_off_is_booked_in_part(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(CutStream(after_events=9, reply=Reply(text=STORY)))

    async def read() -> None:
        async for _ in await async_client.messages.create(**ASKED, stream=True):
            pass

    with pytest.raises(httpx2.RemoteProtocolError):
        await read()

    api.wait_until_idle()
    await in_db(assert_estimated_from_part, api)


@pytest.mark.django_db(transaction=True)
async def test_an_async_stream_that_ends_in_an_error_event_is_booked_in_part(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(StreamError(after_events=9, reply=Reply(text=STORY)))

    async def read() -> None:
        async with async_client.messages.stream(**ASKED) as stream:
            async for _ in stream:
                pass

    with pytest.raises(anthropic.APIStatusError):
        await read()

    api.wait_until_idle()
    assert (await in_db(assert_estimated_from_part, api)).error == "overloaded_error"


def test_a_stream_that_ends_without_its_last_events_is_booked_in_part(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(TruncateCleanly(reply=Reply(text=STORY)))

    list(client.messages.create(**ASKED, stream=True))

    api.wait_until_idle()
    assert assert_estimated_from_part(api).error == "incomplete"


@pytest.mark.parametrize("step", [TruncateCleanly(after_events=0), StreamError(after_events=0)])
def test_a_stream_that_ends_before_it_begins_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic, step: Any
) -> None:
    api.enqueue(step)

    with contextlib.suppress(anthropic.APIStatusError):
        list(client.messages.create(**ASKED, stream=True))

    assert_at_bound()


def test_a_stream_cut_after_its_final_usage_is_booked_at_that(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    answer = Reply(text="Four")
    api.enqueue(CutStream(after_events=6, reply=answer))  # all but message_stop

    with pytest.raises(httpx2.RemoteProtocolError):
        list(client.messages.create(**ASKED, stream=True))

    row = only_row()
    assert (row.status, [row.cost_nanousd]) == ("estimated", bill(api))


def test_a_stream_that_reports_iterations_half_way_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    entries = [{"type": "message", "input_tokens": 5, "output_tokens": 1}]
    reply = Reply(text=STORY, start_usage={"iterations": entries})
    api.enqueue(CutStream(after_events=9, reply=reply))

    with pytest.raises(httpx2.RemoteProtocolError):
        list(client.messages.create(**ASKED, stream=True))

    assert_at_bound()
