"""Retries of the SDK, and requests that never left, never came back, or broke on the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import anthropic
import httpx2
import pytest

import ai_budget
from ai_budget.models import CallLog
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    CutStream,
    Fail,
    Hang,
    Reply,
)
from tests.guard.books import (
    MODEL,
    assert_at_bound,
    assert_balanced,
    assert_exact,
    assert_released,
    bill,
    in_db,
    rows,
    site,
    statuses,
)

pytestmark = pytest.mark.django_db

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello there"}],
}
AT_ONCE = 0.001  # seconds, for retry-after


def refuse(status: int) -> Fail:
    return Fail(status=status, retry_after=AT_ONCE)


# Retries


@pytest.mark.parametrize("streamed", [False, True])
def test_each_retry_is_an_attempt_and_the_call_counts_once(
    api: AnthropicSimulator, client: anthropic.Anthropic, streamed: bool
) -> None:
    api.enqueue(refuse(429), refuse(529), Reply(text="Hi"))

    if streamed:
        list(client.messages.create(**ASKED, stream=True))
    else:
        client.messages.create(**ASKED)

    journal = rows()
    assert [row.attempt for row in journal] == [0, 1, 2]
    assert [row.counted for row in journal] == [1, 0, 0]
    assert [row.cost_nanousd for row in journal] == [0, 0, *bill(api)]
    assert [row.error for row in journal] == ["HTTP 429", "HTTP 529", ""]
    assert len({row.call_id for row in journal}) == 1
    assert site().calls == 1
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_each_retry_of_an_async_call_is_an_attempt(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(refuse(500), refuse(429), Reply(text="Hi"))

    await async_client.messages.create(**ASKED)

    journal = await in_db(rows)
    assert [row.cost_nanousd for row in journal] == [0, 0, *bill(api)]
    assert [row.counted for row in journal] == [1, 0, 0]
    assert (await in_db(site)).calls == 1
    await in_db(assert_balanced)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 429, 500, 529])
def test_an_error_of_the_api_costs_nothing(api: AnthropicSimulator, status: int) -> None:
    api.enqueue(refuse(status))

    with pytest.raises(anthropic.APIStatusError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert statuses() == [CallLog.Status.SETTLED]
    assert rows()[0].error == f"HTTP {status}"
    assert (site().spent_nanousd, site().calls) == (0, 1)
    assert_balanced()


def test_an_error_before_a_stream_costs_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(refuse(400))

    with pytest.raises(anthropic.BadRequestError), client.messages.stream(**ASKED):
        raise AssertionError("unreachable")

    assert [row.cost_nanousd for row in rows()] == [0]
    assert_balanced()


def test_retries_that_all_fail_cost_nothing_and_count_once(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(*[refuse(529)] * 3)

    with pytest.raises(anthropic.APIStatusError):
        client.messages.create(**ASKED)

    assert [row.cost_nanousd for row in rows()] == [0, 0, 0]
    assert site().calls == 1


def test_a_lost_attempt_and_its_repeat_are_both_booked(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(CutBeforeResponse(billed=True), Reply(text="Hi"))

    client.messages.create(**ASKED)

    lost, answered = rows()
    assert (lost.status, lost.cost_nanousd) == ("estimated", lost.reserved_nanousd)
    assert answered.cost_nanousd == bill(api)[-1]
    assert site().spent_nanousd >= sum(bill(api))
    assert site().calls == 1
    assert_balanced()


# What never left


@contextmanager
def nobody_listens() -> Iterator[str]:
    with closing(socket.socket()) as port:
        port.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{port.getsockname()[1]}"


@contextmanager
def nobody_accepts() -> Iterator[str]:
    """A port whose queue is full, so that connecting to it takes for ever."""
    with closing(socket.socket()) as port, closing(socket.socket()) as first:
        port.bind(("127.0.0.1", 0))
        port.listen(0)
        first.connect(port.getsockname())
        waiting = [socket.socket() for _ in range(2)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(port.getsockname())
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        for one in waiting:
            one.close()


def test_a_refused_connection_gives_money_and_call_back() -> None:
    with (
        nobody_listens() as address,
        pytest.raises(anthropic.APIConnectionError),
    ):
        ai_budget.client(base_url=address, max_retries=0).messages.create(**ASKED)

    assert assert_released().error == "APIConnectionError"


@pytest.mark.django_db(transaction=True)
async def test_a_refused_connection_of_an_async_client_gives_money_and_call_back() -> None:
    with nobody_listens() as address:
        bare = anthropic.AsyncAnthropic(api_key="key", base_url=address, max_retries=0)
        async with bare:
            with pytest.raises(anthropic.APIConnectionError):
                await ai_budget.guard(bare).messages.create(**ASKED)

    await in_db(assert_released)


def test_a_connect_timeout_gives_money_and_call_back() -> None:
    with (
        nobody_accepts() as address,
        pytest.raises(anthropic.APITimeoutError),
    ):
        ai_budget.client(base_url=address, max_retries=0, timeout=0.2).messages.create(**ASKED)

    assert assert_released().error == "APITimeoutError"


def test_a_call_that_connects_at_its_second_attempt_counts_once(
    api: AnthropicSimulator, settings: Any
) -> None:
    port = int(api.base_url.rpartition(":")[2])
    with nobody_listens() as address:
        client = ai_budget.client(base_url=address, max_retries=1)
        client_of_server = client._client

        def reach_the_server(request: Any) -> None:
            if request.headers["x-stainless-retry-count"] == "1":
                request.url = request.url.copy_with(port=port)

        client_of_server.event_hooks = {"request": [reach_the_server]}
        client.messages.create(**ASKED)

    assert statuses() == ["released", "settled"]
    assert [row.counted for row in rows()] == [1, 1]
    assert site().calls == 1
    assert_balanced()


def test_an_ask_that_connects_at_its_second_attempt_counts_once(
    api: AnthropicSimulator, settings: Any
) -> None:
    port = int(api.base_url.rpartition(":")[2])
    with nobody_listens() as address:
        settings.AI_BUDGET = {**settings.AI_BUDGET, "BASE_URL": address}

        def reach_the_server(request: Any) -> None:
            if request.headers["x-stainless-retry-count"] == "1":
                request.url = request.url.copy_with(port=port)

        ai_budget.client()._client.event_hooks = {"request": [reach_the_server]}
        answer = ai_budget.ask("Hello")

    assert statuses() == ["released", "settled"]
    assert [row.counted for row in rows()] == [1, 1]
    assert answer.cost_nanousd == rows()[1].cost_nanousd
    assert site().calls == 1
    assert_balanced()


@contextmanager
def proxy_that_refuses() -> Iterator[str]:
    """A proxy that lets nobody through."""

    def refuse_one() -> None:
        connection, _ = port.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

    with closing(socket.create_server(("127.0.0.1", 0))) as port:
        thread = threading.Thread(target=refuse_one)
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        thread.join()


def test_a_proxy_that_refuses_gives_money_and_call_back() -> None:
    with proxy_that_refuses() as address:
        bare = anthropic.Anthropic(
            api_key="key",
            base_url="https://api.invalid",
            http_client=anthropic.DefaultHttpxClient(proxy=address),
            max_retries=0,
        )
        with bare, pytest.raises(anthropic.APIConnectionError) as caught:
            ai_budget.guard(bare).messages.create(**ASKED)

    assert isinstance(caught.value.__cause__, httpx2.ProxyError)
    assert_released()


@pytest.mark.parametrize(
    ("options", "changes", "cause"),
    [
        ({"base_url": "ftp://api.invalid"}, {}, httpx2.UnsupportedProtocol),
        ({}, {"extra_headers": {"x-test": "a\nb"}}, httpx2.LocalProtocolError),
    ],
    ids=["protocol", "header"],
)
def test_what_cannot_be_sent_gives_money_and_call_back(
    api: AnthropicSimulator,
    options: dict[str, Any],
    changes: dict[str, Any],
    cause: type[Exception],
) -> None:
    client = ai_budget.client(max_retries=0, **options)

    with pytest.raises(anthropic.APIConnectionError) as caught:
        client.messages.create(**ASKED, **changes)

    assert isinstance(caught.value.__cause__, cause)
    assert_released()
    assert api.requests == []


def test_no_free_connection_gives_money_and_call_back(api: AnthropicSimulator) -> None:
    http = httpx2.Client(
        limits=httpx2.Limits(max_connections=1), timeout=httpx2.Timeout(30, pool=0.05)
    )
    bare = anthropic.Anthropic(
        api_key="key", base_url=api.base_url, http_client=http, max_retries=0
    )
    with bare:
        client = ai_budget.guard(bare)
        stream = client.messages.create(**ASKED, stream=True)
        with pytest.raises(anthropic.APITimeoutError):
            client.messages.create(**ASKED)
        list(stream)

    assert statuses() == ["settled", "released"]
    assert_balanced()


def test_an_unreachable_proxy_gives_money_and_call_back(api: AnthropicSimulator) -> None:
    with nobody_listens() as address:
        http = anthropic.DefaultHttpxClient(proxy=address)
        bare = anthropic.Anthropic(
            api_key="key", base_url=api.base_url, http_client=http, max_retries=0
        )
        with bare, pytest.raises(anthropic.APIConnectionError):
            ai_budget.guard(bare).messages.create(**ASKED)

    assert_released()


def test_a_missing_key_is_found_before_anything_leaves(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    client = ai_budget.guard(anthropic.Anthropic(base_url=api.base_url))

    with client, pytest.raises(TypeError, match="authentication"):
        client.messages.create(**ASKED)

    assert assert_released().error == "TypeError"
    assert api.requests == []


def test_what_the_sdk_refuses_itself_reserves_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with pytest.raises(ValueError, match=r"[Ss]treaming"):
        client.messages.create(**{**ASKED, "max_tokens": 64_000})

    assert rows() == []
    assert api.requests == []


# What never came back


def test_a_read_timeout_is_booked_at_the_bound(api: AnthropicSimulator) -> None:
    api.enqueue(Hang(seconds=30, billed=True))

    with pytest.raises(anthropic.APITimeoutError):
        ai_budget.client(max_retries=0).messages.create(**ASKED, timeout=0.1)

    row = assert_at_bound()
    assert row.error == "APITimeoutError"
    assert (row.cost_nanousd or 0) >= bill(api)[0]


@pytest.mark.django_db(transaction=True)
async def test_a_read_timeout_of_an_async_call_is_booked_at_the_bound(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Hang(seconds=30))
    hasty = async_client.with_options(max_retries=0)

    with pytest.raises(anthropic.APITimeoutError):
        await hasty.messages.create(**ASKED, timeout=0.1)

    await in_db(assert_at_bound)


def test_a_connection_cut_before_the_response_is_booked_at_the_bound(
    api: AnthropicSimulator,
) -> None:
    api.enqueue(CutBeforeResponse(billed=True))

    with pytest.raises(anthropic.APIConnectionError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert_at_bound()


def test_a_connection_cut_in_the_body_is_booked_at_the_bound(api: AnthropicSimulator) -> None:
    api.enqueue(CutStream())

    with pytest.raises(anthropic.APIConnectionError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert_at_bound()


@pytest.mark.django_db(transaction=True)
async def test_a_connection_cut_in_the_body_of_an_async_call_is_booked_at_the_bound(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(CutStream())

    with pytest.raises(anthropic.APIConnectionError):
        await async_client.with_options(max_retries=0).messages.create(**ASKED)

    await in_db(assert_at_bound)


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"", b"[]", b'{"usage": 5}'])
def test_an_answer_that_is_none_of_the_api_is_booked_at_the_bound(body: bytes) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body, headers={"content-type": "application/json"})

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    bare = anthropic.Anthropic(api_key="key", base_url="http://gateway.invalid", http_client=http)

    with bare:
        response = ai_budget.guard(bare).messages.with_raw_response.create(**ASKED)

    assert response.http_response.content == body
    assert assert_at_bound().error == "unreadable answer"


def test_an_answer_that_is_no_message_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(usage={"cache_read_input_tokens": "many"}))

    client.messages.create(**ASKED)

    assert_at_bound()


@pytest.mark.django_db(transaction=True)
async def test_an_endless_timeout_is_a_timeout_like_any_other(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    await async_client.messages.create(**ASKED, timeout=float("inf"))

    row = await in_db(assert_exact, api)
    assert (row.deadline - row.reserved_at).days < 4


def test_a_refusal_before_any_output_is_free(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(content=[], stop_reason="refusal", output_tokens=1))

    client.messages.create(**ASKED)

    assert [(row.status, row.cost_nanousd) for row in rows()] == [("settled", 0)]
    assert_balanced()


def test_a_refusal_after_output_is_billed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Well", stop_reason="refusal"))

    client.messages.create(**ASKED)

    assert_exact(api)
