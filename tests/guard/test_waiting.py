"""``wait=``: a caller who would rather be late than refused."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anthropic
import pytest

import ai_budget
from ai_budget import periods
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard import middleware
from ai_budget.guard.opening import APART_SECONDS
from ai_budget.ledger.base import SATURATED_DELAY_SECONDS
from ai_budget.models import FeatureBudget
from ai_budget.signals import call_refused
from ai_budget.testing import AnthropicSimulator, Fail, Reply, override_budget
from tests.guard.books import MODEL, assert_balanced, in_db, refusals, rows, statuses

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello there"}],
}
ROUNDING = 1e-6
"""Seconds that the sums of a clock may be off."""

ONE_CALL = Decimal("0.00009")
"""A limit that holds one call of these and not two."""


class Clock:
    """A clock that stands still but for those who sleep by it; each sleep may do something."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        return NOON + timedelta(seconds=sum(self.slept))

    def monotonic(self) -> float:
        return 1_000 + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(middleware, "time", types.SimpleNamespace(sleep=clock.sleep))
    monkeypatch.setattr(periods, "monotonic", clock.monotonic)
    with periods.override_clock(clock.now):
        yield clock


@pytest.fixture
def refused() -> Iterator[list[AIBudgetError]]:
    """The refusals that listeners heard of."""
    heard: list[AIBudgetError] = []

    def listen(error: AIBudgetError, **kwargs: Any) -> None:
        heard.append(error)

    call_refused.connect(listen)
    yield heard
    call_refused.disconnect(listen)


def ask(**options: Any) -> ai_budget.Answer:
    return ai_budget.ask("Hello there", feature="chat", max_tokens=50, **options)


def read(stream: anthropic.Stream[Any]) -> None:
    for _event in stream:
        pass


def assert_slept(clock: Clock, *seconds: float) -> None:
    """It slept so long each time, or a little longer."""
    assert len(clock.slept) == len(seconds)
    for slept, least in zip(clock.slept, seconds, strict=True):
        assert least - ROUNDING <= slept <= least + APART_SECONDS + ROUNDING


# What is waited for


def test_a_call_waits_until_a_rate_has_refilled(
    api: AnthropicSimulator, clock: Clock, refused: list[AIBudgetError]
) -> None:
    with override_budget("chat", requests_per_minute=1):
        ask()
        answer = ask(wait=61)

    assert_slept(clock, 60)
    assert answer.text
    assert statuses() == ["settled", "settled"]
    assert refusals() == {}
    assert refused == []


def test_a_stream_waits_before_it_begins(api: AnthropicSimulator, clock: Clock) -> None:
    with override_budget("chat", requests_per_minute=1):
        ask()
        with ai_budget.stream("Hello", feature="chat", wait=61) as answer:
            assert "".join(answer)

    assert_slept(clock, 60)


def test_a_call_waits_for_calls_in_flight(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    with override_budget("chat", daily_limit_usd=ONE_CALL):
        stream = client.messages.create(**ASKED, stream=True)
        clock.meanwhile = lambda: read(stream)
        ask(wait=5)

    assert_slept(clock, SATURATED_DELAY_SECONDS)
    assert statuses() == ["settled", "settled"]
    assert_balanced()


def test_a_call_that_waits_over_midnight_counts_in_the_day_that_it_is_made(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.default = Reply(output_tokens=50)
    with override_budget("chat", daily_limit_usd=Decimal("0.00008")):
        ask()
        ask()
        ask(wait=86_400)

    assert_slept(clock, 12 * 3_600)
    assert [str(row.day) for row in rows()] == ["2026-05-04", "2026-05-04", "2026-05-05"]


def test_who_waits_sees_a_limit_that_is_raised_meanwhile(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    def raise_it() -> None:
        FeatureBudget.objects.filter(name="chat").update(daily_limit_usd=1)

    with override_budget("chat", daily_limit_usd=ONE_CALL):
        stream = client.messages.create(**ASKED, stream=True)
        clock.meanwhile = raise_it
        ask(wait=5)
        list(stream)

    assert_slept(clock, SATURATED_DELAY_SECONDS)


# What is not


@pytest.mark.parametrize("wait", [None, 0, 59.9])
def test_a_limit_that_opens_after_the_wait_refuses_at_once(
    api: AnthropicSimulator, clock: Clock, refused: list[AIBudgetError], wait: float | None
) -> None:
    with override_budget("chat", requests_per_minute=1):
        ask()
        with pytest.raises(ai_budget.RateLimited) as caught:
            ask(wait=wait)

    assert clock.slept == []
    assert len(api.requests) == 1
    assert refusals() == {"feature:chat": 1}
    assert refused == [caught.value]


@pytest.mark.parametrize(
    "limit", [{"daily_limit_usd": 0}, {"requests_per_minute": 0}, {"tokens_per_minute": 5}]
)
def test_a_limit_that_never_opens_refuses_at_once(
    api: AnthropicSimulator, clock: Clock, limit: dict[str, Any]
) -> None:
    with override_budget("chat", **limit), pytest.raises(ai_budget.exceptions.LimitReached):
        ask(wait=1_000_000)

    assert clock.slept == []
    assert api.billed == []
    assert refusals() == {"feature:chat": 1}


def test_a_paused_feature_refuses_at_once(api: AnthropicSimulator, clock: Clock) -> None:
    with override_budget("chat", enabled=False), pytest.raises(ai_budget.FeatureDisabled):
        ask(wait=60)

    assert clock.slept == []


def test_at_the_end_of_the_wait_the_last_refusal_is_raised_and_counted_once(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    clock: Clock,
    refused: list[AIBudgetError],
) -> None:
    with override_budget("chat", daily_limit_usd=ONE_CALL):
        stream = client.messages.create(**ASKED, stream=True)
        with pytest.raises(ai_budget.BudgetExceeded) as caught:
            ask(wait=1)
        list(stream)

    assert caught.value.saturated
    assert len(clock.slept) > 1
    assert 1 - SATURATED_DELAY_SECONDS - ROUNDING <= sum(clock.slept) <= 1 + ROUNDING
    assert refusals() == {"feature:chat": 1}
    assert refused == [caught.value]
    assert statuses() == ["settled"]


def test_a_guarded_client_does_not_wait(
    api: AnthropicSimulator, client: anthropic.Anthropic, clock: Clock
) -> None:
    with override_budget("chat", requests_per_minute=1):
        client.messages.create(**ASKED)
        with pytest.raises(ai_budget.RateLimited):
            client.messages.create(**ASKED)

    assert clock.slept == []


def test_all_attempts_of_a_call_share_its_wait(api: AnthropicSimulator, clock: Clock) -> None:
    api.enqueue(Fail(status=400), Fail(status=529, retry_after=0.001))
    with override_budget("chat", requests_per_minute=1):
        with pytest.raises(anthropic.BadRequestError):
            ask()
        with pytest.raises(ai_budget.RateLimited):
            ask(wait=100)

    assert_slept(clock, 60)
    assert [row.error for row in rows()] == ["HTTP 400", "HTTP 529"]


def test_the_wait_begins_with_the_first_refusal(api: AnthropicSimulator, clock: Clock) -> None:
    """An answer that took long before it failed leaves the whole wait to the next attempt."""

    def fail_late(body: dict[str, Any]) -> Fail:
        clock.sleep(30)
        return Fail(status=529, retry_after=0.001)

    api.enqueue(fail_late)
    with override_budget("chat", requests_per_minute=1):
        ask(wait=31)

    assert clock.slept[0] == 30
    assert 30 - ROUNDING <= clock.slept[1] <= 31 + ROUNDING
    assert [row.error for row in rows()] == ["HTTP 529", ""]


# Async


@pytest.mark.django_db(transaction=True)
async def test_an_async_call_waits_without_holding_a_thread(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    async def sleep(seconds: float) -> None:
        seen.append(len(await in_db(rows)))  # in the one thread that the ledger uses too
        clock.sleep(seconds)

    await FeatureBudget.objects.acreate(name="chat", requests_per_minute=1)
    await ai_budget.aask("Hello", feature="chat")
    monkeypatch.setattr(asyncio, "sleep", sleep)

    answer = await ai_budget.aask("Hello", feature="chat", wait=61)

    assert answer.text
    assert seen == [1]
    assert_slept(clock, 60)


@pytest.mark.django_db(transaction=True)
async def test_an_async_stream_waits_before_it_begins(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    await FeatureBudget.objects.acreate(name="chat", requests_per_minute=1)
    await ai_budget.aask("Hello", feature="chat")
    monkeypatch.setattr(asyncio, "sleep", sleep)

    async with ai_budget.astream("Hello", feature="chat", wait=61) as answer:
        assert [piece async for piece in answer]

    assert_slept(clock, 60)


@pytest.mark.django_db(transaction=True)
async def test_who_is_cancelled_while_waiting_has_reserved_nothing(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    await FeatureBudget.objects.acreate(name="chat", requests_per_minute=1)
    await ai_budget.aask("Hello", feature="chat")
    monkeypatch.setattr(asyncio, "sleep", sleep)

    task = asyncio.create_task(ai_budget.aask("Hello", feature="chat", wait=300))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await in_db(statuses) == ["settled"]
    await in_db(assert_balanced)
    assert await in_db(refusals) == {}


# What may be said


@pytest.mark.parametrize("verb", ["ask", "stream", "astream", "estimate"])
@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        ("5", TypeError),
        (True, TypeError),
        (timedelta(seconds=5), TypeError),
    ],
)
def test_a_wait_is_a_number_of_seconds(
    api: AnthropicSimulator, verb: str, wait: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="wait is a number of seconds"):
        getattr(ai_budget, verb)("Hello", wait=wait)

    assert api.requests == []


def test_an_estimate_does_not_wait(api: AnthropicSimulator, clock: Clock) -> None:
    with override_budget("chat", requests_per_minute=0):
        assert ai_budget.estimate("Hello", feature="chat", wait=5).most > 0

    assert clock.slept == []
