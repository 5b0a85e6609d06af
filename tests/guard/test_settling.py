"""What is left to the tick when a booking fails, and what is not left behind in memory."""

from __future__ import annotations

import gc
import logging
from datetime import timedelta
from typing import Any

import anthropic
import pytest
from django.db import transaction

import ai_budget
from ai_budget import periods
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog
from ai_budget.signals import call_refused, call_settled
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    Reply,
    freeze,
    override_budget,
)
from ai_budget.values import Reservation
from tests.guard.books import (
    MODEL,
    assert_at_bound,
    assert_balanced,
    assert_exact,
    in_db,
    ledger_of_the_run,
    only_row,
    rows,
    site,
)

pytestmark = pytest.mark.django_db(transaction=True)

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "A question with a secret: hunter2"}],
}


@pytest.fixture
def failing_settle(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def settle(self: ledgers.Ledger, *args: Any) -> None:
        raise LedgerUnavailable("The store is away.")

    monkeypatch.setattr(ledger_of_the_run(), "settle", settle)
    return monkeypatch


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_is_returned_although_it_cannot_be_booked(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    failing_settle: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    streamed: bool,
) -> None:
    if streamed:
        with client.messages.stream(**ASKED) as stream:
            assert stream.get_final_text()
    else:
        assert client.messages.create(**ASKED).content

    assert only_row().status == CallLog.Status.RESERVED
    assert "could not be settled (LedgerUnavailable)" in caplog.text
    assert "hunter2" not in caplog.text
    failing_settle.undo()
    with freeze(periods.now() + timedelta(hours=3)):
        assert ledgers.current().settle_overdue() == 1
    assert_at_bound()


async def test_an_async_answer_is_returned_although_it_cannot_be_booked(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    failing_settle: pytest.MonkeyPatch,
) -> None:
    assert (await async_client.messages.create(**ASKED)).content

    assert (await in_db(only_row)).status == CallLog.Status.RESERVED


def test_a_failure_is_raised_as_it_is_although_it_cannot_be_booked(
    api: AnthropicSimulator, failing_settle: pytest.MonkeyPatch
) -> None:
    api.enqueue(CutBeforeResponse())

    with pytest.raises(anthropic.APIConnectionError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)


def test_a_fault_in_a_booking_does_not_take_the_answer(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault(self: OpenAttempt, *args: Any) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr(OpenAttempt, "book_message", fault)

    assert client.messages.create(**ASKED).content
    assert "could not be booked (ZeroDivisionError)" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_true_cost_that_comes_after_the_tick_corrects_it(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text="Well then"))
    stream = client.messages.create(**ASKED, stream=True)
    next(stream)
    with freeze(periods.now() + timedelta(hours=3)):
        assert ledgers.current().settle_overdue() == 1
    assert_at_bound()

    list(stream)

    assert_exact(api)


def test_a_call_in_a_transaction_is_refused_before_anything_is_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with pytest.raises(CallInsideTransaction), transaction.atomic():
        client.messages.create(**ASKED)

    assert api.requests == []
    assert rows() == []


def test_a_stream_that_is_closed_in_a_transaction_is_left_to_the_tick(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    stream = client.messages.create(**ASKED, stream=True)

    with transaction.atomic():
        assert len(list(stream)) > 3

    assert only_row().status == CallLog.Status.RESERVED


def test_a_listener_that_fails_changes_nothing(
    api: AnthropicSimulator, client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("hunter2")

    call_settled.connect(fail)
    try:
        assert client.messages.create(**ASKED).content
    finally:
        call_settled.disconnect(fail)

    assert_exact(api)
    assert "ZeroDivisionError" in caplog.text


def test_a_call_that_a_listener_makes_is_its_own(api: AnthropicSimulator) -> None:
    def review(**kwargs: Any) -> None:
        if kwargs["reservation"].attempt.charge.feature == "chat":
            ai_budget.client(feature="review").messages.create(**ASKED)

    call_settled.connect(review)
    try:
        answer = ai_budget.ask("Hello", feature="chat", max_tokens=9)
    finally:
        call_settled.disconnect(review)

    asked, reviewed = rows()
    assert (asked.feature_id, asked.max_tokens) == ("chat", 9)
    assert (reviewed.feature_id, reviewed.max_tokens) == ("review", 50)
    assert asked.call_id == answer.call_id != reviewed.call_id
    assert answer.cost_nanousd == asked.cost_nanousd
    assert_balanced()


def test_listeners_hear_of_what_was_settled_and_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    heard: list[Any] = []

    def listen(**kwargs: Any) -> None:
        heard.append(kwargs.get("settlement") or kwargs["error"])

    call_settled.connect(listen)
    call_refused.connect(listen)
    try:
        client.messages.create(**ASKED)
        with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
            client.messages.create(**ASKED)
    finally:
        call_settled.disconnect(listen)
        call_refused.disconnect(listen)

    settlement, error = heard
    assert settlement.cost_nanousd == rows()[0].cost_nanousd
    assert isinstance(error, ai_budget.BudgetExceeded)


def test_a_bound_that_was_too_low_is_reported_and_the_truth_is_booked(
    api: AnthropicSimulator, client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    api.enqueue(Reply(text="Well", usage={"output_tokens": 1_000_000}))

    client.messages.create(**ASKED)

    row = only_row()
    assert (row.cost_nanousd or 0) > row.reserved_nanousd
    assert f"The bound of call {row.pk} was too low" in caplog.text
    assert_balanced()


def test_usage_with_new_fields_is_priced_and_reported(
    api: AnthropicSimulator, client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    api.enqueue(Reply(text="Well", usage={"quantum_tokens": 3}))

    client.messages.create(**ASKED)

    assert_exact(api)
    assert "fields without a price rule: quantum_tokens" in caplog.text


def test_usage_that_nobody_can_price_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [{"type": "daydream", "input_tokens": 5, "output_tokens": 5}]
    api.enqueue(Reply(text="Well", usage={"iterations": entries}))

    client.messages.create(**ASKED)

    assert assert_at_bound().error == "UnclassifiedUsage"
    assert "daydream" in caplog.text


@pytest.mark.parametrize("way", ["create", "stream", "ask"])
def test_memory_does_not_grow_with_calls(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    logging.getLogger("anthropic").setLevel(logging.WARNING)

    def call() -> None:
        match way:
            case "create":
                client.messages.create(**ASKED)
            case "stream":
                list(client.messages.create(**ASKED, stream=True))
            case _:
                ai_budget.ask("Hello", feature="chat")

    def kept() -> int:
        gc.collect()
        # By its type, for a lazy object that another test left would wake up.
        return sum(type(one) in (OpenAttempt, Reservation) for one in gc.get_objects())

    before = kept()  # what other tests left behind
    for _ in range(100):
        call()

    assert kept() == before
    assert site().calls == 100
