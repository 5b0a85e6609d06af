"""The streamed page: what a reader gets, and what is booked when they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import AsyncClient, Client

import ai_budget
from ai_budget.models import CallLog, FeatureBudget
from ai_budget.testing.simulator import AnthropicSimulator
from ai_budget.testing.steps import Reply, StreamError
from example_project.desk import samples
from example_project.desk.streams import BROKEN
from tests.example.pages import violations

QUESTION = samples.QUESTIONS[0]
FORM = {"question": QUESTION}

# Closing a response closes the connections that a test's transaction would be on.
pytestmark = pytest.mark.django_db(transaction=True)


def _lines(chunks: list[bytes]) -> list[dict[str, str]]:
    return [json.loads(line) for line in b"".join(chunks).splitlines()]


def _text(lines: list[dict[str, str]]) -> str:
    return "".join(line.get("text", "") for line in lines)


def _is_priced_exactly(call: CallLog) -> bool:
    used = ai_budget.Usage(input_tokens=call.input_tokens, output_tokens=call.output_tokens)
    return call.cost_nanousd == ai_budget.price(call.model, used, at=call.reserved_at)


class TestUnderWSGI:
    def test_the_answer_arrives_in_pieces_and_ends_with_its_receipt(
        self, reader: Client, ada: Any
    ) -> None:
        response: Any = reader.post("/ask/stream/", FORM)

        lines = _lines(list(response.streaming_content))
        assert response.headers["Content-Type"] == "application/x-ndjson"
        assert _text(lines) == samples.ANSWERS[QUESTION]
        assert len(lines) > 10
        call = CallLog.objects.get()
        assert (call.kind, call.status, call.user_id) == ("stream", "settled", ada.pk)
        assert _is_priced_exactly(call)
        assert str(call.cost_usd).rstrip("0") in lines[-1]["receipt"]
        assert violations(lines[-1]["receipt"]) == []

    def test_the_upstream_call_ends_when_the_reader_leaves(
        self, reader: Client, api: AnthropicSimulator
    ) -> None:
        api.default = Reply(text="word " * 2_000, chunk_delay=0.02)
        response: Any = reader.post("/ask/stream/", FORM)
        pieces: Iterator[bytes] = iter(response.streaming_content)
        next(pieces)

        response.close()

        api.wait_until_idle()
        call = CallLog.objects.get()
        assert (call.status, call.error) == ("estimated", "closed early")
        assert call.cost_nanousd is not None
        assert call.cost_nanousd < call.reserved_nanousd
        written = api.billed[0].usage["output_tokens"]
        assert written < call.output_tokens < 1_000

    def test_an_answer_that_nobody_reads_is_closed_too(
        self, reader: Client, api: AnthropicSimulator
    ) -> None:
        api.default = Reply(text="word " * 2_000, chunk_delay=0.02)

        reader.post("/ask/stream/", FORM).close()

        api.wait_until_idle()
        assert CallLog.objects.get().status == "estimated"

    def test_a_refusal_comes_before_the_first_line(
        self, reader: Client, api: AnthropicSimulator
    ) -> None:
        FeatureBudget.objects.filter(name="chat").update(daily_limit_usd=0)

        response: Any = reader.post("/ask/stream/", FORM)

        assert response.status_code == 429
        assert "The chat feature’s daily limit" in response.text
        assert "<html" not in response.text
        assert violations(response.text) == []
        assert api.requests == []

    def test_a_bad_form_is_told_as_json(self, reader: Client) -> None:
        response = reader.post("/ask/stream/", {"question": ""})

        assert response.status_code == 400
        assert response.json()["errors"]["question"][0]["code"] == "required"

    def test_a_break_on_the_way_is_the_last_line(
        self, reader: Client, api: AnthropicSimulator
    ) -> None:
        api.enqueue(StreamError(after_events=6))

        response: Any = reader.post("/ask/stream/", FORM)

        lines = _lines(list(response.streaming_content))

        assert lines[-1] == {"error": BROKEN}
        assert CallLog.objects.get().status == "estimated"


class TestUnderASGI:
    async def test_the_answer_arrives_in_pieces_and_ends_with_its_receipt(
        self, async_client: AsyncClient, ada: Any, budgets: None
    ) -> None:
        await async_client.aforce_login(ada)
        response: Any = await async_client.post("/ask/stream/", FORM)

        assert response.is_async
        lines = _lines([chunk async for chunk in response.streaming_content])
        assert _text(lines) == samples.ANSWERS[QUESTION]
        assert "Receipt" in lines[-1]["receipt"]
        call = await CallLog.objects.aget()
        assert (call.kind, call.status, call.user_id) == ("stream", "settled", ada.pk)
        assert await sync_to_async(_is_priced_exactly)(call)

    async def test_the_upstream_call_ends_when_the_reader_leaves(
        self, async_client: AsyncClient, api: AnthropicSimulator, ada: Any, budgets: None
    ) -> None:
        api.default = Reply(text="word " * 2_000, chunk_delay=0.02)
        await async_client.aforce_login(ada)
        response: Any = await async_client.post("/ask/stream/", FORM)
        await anext(aiter(response.streaming_content))

        await sync_to_async(response.close)()

        await sync_to_async(api.wait_until_idle)()
        call = await CallLog.objects.aget()
        assert (call.status, call.error) == ("estimated", "closed early")

    async def test_a_refusal_comes_before_the_first_line(
        self, async_client: AsyncClient, api: AnthropicSimulator, ada: Any, budgets: None
    ) -> None:
        await FeatureBudget.objects.filter(name="chat").aupdate(daily_limit_usd=0)
        await async_client.aforce_login(ada)

        response: Any = await async_client.post("/ask/stream/", FORM)

        assert response.status_code == 429
        assert api.requests == []
