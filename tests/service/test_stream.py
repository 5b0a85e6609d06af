"""``stream`` and ``astream``: text as it comes, and the cost once it has come."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest

import ai_budget
from ai_budget.guard.charge import current_call, current_payer
from ai_budget.models import FeatureBudget
from ai_budget.testing import AnthropicSimulator, CutStream, Fail, Reply, override_budget
from ai_budget.values import Kind
from tests.guard.books import (
    assert_balanced,
    assert_exact,
    bill,
    in_db,
    only_row,
    rows,
    statuses,
)

pytestmark = pytest.mark.django_db

STORY = "Once upon a time there was a budget that held. " * 20


def test_text_comes_in_pieces_and_the_cost_at_the_end(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text=STORY))

    with ai_budget.stream("A story", feature="tales", max_tokens=500) as answer:
        pieces = list(answer)

    row = assert_exact(api)
    assert len(pieces) > 10
    assert "".join(pieces) == answer.text == STORY
    assert answer.cost == row.cost_usd
    assert answer.usage.output_tokens == row.output_tokens
    assert answer.model == answer.requested_model == row.model
    assert not answer.downgraded
    assert not answer.cached
    assert answer.call_id == row.call_id
    assert answer.message.stop_reason == "end_turn"
    assert (row.feature_id, row.kind) == ("tales", Kind.STREAM)


@pytest.mark.django_db(transaction=True)
async def test_async_text_comes_in_pieces_and_the_cost_at_the_end(
    api: AnthropicSimulator,
) -> None:
    api.enqueue(Reply(text=STORY))

    async with ai_budget.astream("A story", feature="tales", max_tokens=500) as answer:
        pieces = [piece async for piece in answer]

    row = await in_db(assert_exact, api)
    assert "".join(pieces) == answer.text == STORY
    assert answer.cost == row.cost_usd
    assert answer.usage.output_tokens == row.output_tokens
    assert answer.call_id == row.call_id
    assert answer.message.stop_reason == "end_turn"


def test_while_it_runs_the_model_is_known_and_the_cost_is_not(api: AnthropicSimulator) -> None:
    with ai_budget.stream("A story", feature="tales") as answer:
        assert answer.model == "claude-haiku-5-5"
        assert answer.cost == 0
        assert answer.usage == ai_budget.Usage()
        assert answer.text == ""


def test_leaving_early_books_what_was_used(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    with ai_budget.stream("A story", feature="tales", max_tokens=4_000) as answer:
        for piece in answer:
            if piece:
                break

    api.wait_until_idle()
    row = only_row()
    assert row.status == "estimated"
    assert answer.cost == row.cost_usd
    assert bill(api)[0] <= (row.cost_nanousd or 0) < row.reserved_nanousd
    assert answer.text
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_leaving_early_books_what_was_used_of_an_async_stream(
    api: AnthropicSimulator,
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    async with ai_budget.astream("A story", feature="tales", max_tokens=4_000) as answer:
        async for piece in answer:
            if piece:
                break

    row = await in_db(only_row)
    assert row.status == "estimated"
    assert answer.cost == row.cost_usd
    await in_db(assert_balanced)


@pytest.mark.django_db(transaction=True)
async def test_cancelling_the_reader_books_what_was_used(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.01))
    heard = asyncio.Event()

    async def read() -> None:
        async with ai_budget.astream("A story", feature="tales") as answer:
            async for _ in answer:
                heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (await in_db(only_row)).status == "estimated"
    await in_db(assert_balanced)


def test_nothing_is_reserved_before_it_is_entered(api: AnthropicSimulator) -> None:
    ai_budget.stream("A story", feature="tales")

    assert rows() == []
    assert api.requests == []


def test_a_refusal_comes_before_the_first_byte(api: AnthropicSimulator) -> None:
    with (
        override_budget("tales", daily_limit_usd=0),
        pytest.raises(ai_budget.BudgetExceeded),
        ai_budget.stream("A story", feature="tales"),
    ):
        raise AssertionError("unreachable")

    assert api.requests == []


@pytest.mark.django_db(transaction=True)
async def test_an_async_refusal_comes_before_the_first_byte(api: AnthropicSimulator) -> None:
    await FeatureBudget.objects.acreate(name="tales", daily_limit_usd=0)

    with pytest.raises(ai_budget.BudgetExceeded):
        async with ai_budget.astream("A story", feature="tales"):
            raise AssertionError("unreachable")


def test_attempts_that_failed_before_the_stream_are_the_same_call(api: AnthropicSimulator) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001), Reply(text=STORY))

    with ai_budget.stream("A story", feature="tales", max_tokens=500) as answer:
        list(answer)

    assert statuses() == ["settled", "settled"]
    assert {row.call_id for row in rows()} == {answer.call_id}
    assert answer.cost == rows()[1].cost_usd
    assert_balanced()


def test_a_stream_that_breaks_off_raises_and_is_booked(api: AnthropicSimulator) -> None:
    api.enqueue(CutStream(after_events=9, reply=Reply(text=STORY)))

    with (
        pytest.raises(httpx2.RemoteProtocolError),
        ai_budget.stream("A story", feature="tales", max_tokens=4_000) as answer,
    ):
        list(answer)

    row = only_row()
    assert (row.status, answer.cost) == ("estimated", row.cost_usd)
    assert answer.text
    assert_balanced()


def test_an_error_of_the_api_is_raised_on_entering(api: AnthropicSimulator) -> None:
    api.enqueue(Fail(status=400))

    with pytest.raises(anthropic.BadRequestError), ai_budget.stream("A story"):
        raise AssertionError("unreachable")


def test_what_runs_inside_the_block_is_charged_as_before(api: AnthropicSimulator) -> None:
    with (
        ai_budget.charge(feature="page"),
        ai_budget.stream("A story", feature="tales") as answer,
    ):
        assert current_payer().feature == "page"
        assert current_call() is None
        ai_budget.ask("Hello")
        list(answer)

    assert {row.feature_id for row in rows()} == {"page", "tales"}
    assert len({row.call_id for row in rows()}) == 2
    assert_balanced()


def test_two_streams_at_once_are_two_calls(api: AnthropicSimulator) -> None:
    def story() -> Iterator[str]:
        with ai_budget.stream("A story", feature="tales") as answer:
            yield from answer

    assert all(pair for pair in zip(story(), story(), strict=True))

    assert statuses() == ["settled", "settled"]
    assert len({row.call_id for row in rows()}) == 2
    assert_balanced()


def test_tools_and_system_pass_through(api: AnthropicSimulator) -> None:
    tool: dict[str, Any] = {"name": "t", "input_schema": {"type": "object"}}
    with ai_budget.stream([{"role": "user", "content": "Hi"}], system="S", tools=[tool]) as answer:
        list(answer)

    body = api.requests[0].body or {}
    assert (body["system"], body["tools"], body["stream"]) == ("S", [tool], True)
    assert_exact(api)
