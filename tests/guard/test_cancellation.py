"""Callers who leave: cancelled tasks, closed generators and interrupted processes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import anthropic
import pytest
from asgiref.sync import sync_to_async

import ai_budget
from ai_budget.guard import middleware
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.ledger.base import Ledger
from ai_budget.models import CallLog
from ai_budget.testing import AnthropicSimulator, Hang, Reply
from tests.guard.books import (
    MODEL,
    assert_at_bound,
    assert_balanced,
    assert_exact,
    assert_released,
    bill,
    in_db,
    ledger_of_the_run,
    only_row,
    rows,
    wait_until,
)

pytestmark = pytest.mark.django_db(transaction=True)

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 2_000,
    "messages": [{"role": "user", "content": "Hello there"}],
}
STORY = "Once upon a time there was a budget that held. " * 20


class Gate:
    """Holds a step of the ledger until the test lets it go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def hold(self, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, *, after: bool) -> None:
        done = getattr(owner, step)

        def held(*args: Any) -> Any:
            result = done(*args) if after else None
            self.reached.set()
            assert self.opened.wait(10)
            return result if after else done(*args)

        monkeypatch.setattr(owner, step, held)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10)


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def let_go(task: asyncio.Task[Any]) -> None:
    """Cancel a task and see it end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def until_booked() -> None:
    """Wait for what goes on behind a caller who has left."""
    async with asyncio.timeout(10):
        while middleware._running:
            await asyncio.wait(middleware._running)
    await in_db(rows)  # and for the thread of the database to be free again


async def until_asked(api: AnthropicSimulator) -> None:
    await asyncio.to_thread(wait_until, lambda: api.requests)


async def test_cancelled_while_it_reserves_a_call_gives_everything_back(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "reserve", after=True)
    task = asyncio.create_task(async_client.messages.create(**ASKED))
    await gate.wait()

    await let_go(task)
    gate.opened.set()
    await until_booked()

    assert (await in_db(assert_released)).error == "CancelledError"
    assert api.requests == []


async def test_cancelled_before_a_refusal_nothing_is_left(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "reserve", after=False)
    await in_db(_allow_nothing)
    task = asyncio.create_task(async_client.messages.create(**ASKED))
    await gate.wait()

    await let_go(task)
    gate.opened.set()
    await until_booked()

    assert await in_db(rows) == []


def _allow_nothing() -> None:
    from ai_budget.models import FeatureBudget

    FeatureBudget.objects.create(name="chat", daily_limit_usd=0)


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelled_during_http_a_call_is_booked_at_its_bound(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, streamed: bool
) -> None:
    api.enqueue(Hang(seconds=30, billed=True))
    task = asyncio.create_task(async_client.messages.create(**ASKED, stream=streamed))
    await until_asked(api)

    await let_go(task)

    row = await in_db(assert_at_bound)
    assert row.error == "CancelledError"
    assert (row.cost_nanousd or 0) >= (await in_db(bill, api))[0]


async def test_a_second_cancellation_does_not_lose_the_booking(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "settle", after=False)
    api.enqueue(Hang(seconds=30))
    task = asyncio.create_task(async_client.messages.create(**ASKED))
    await until_asked(api)

    task.cancel()
    await gate.wait()
    await let_go(task)
    gate.opened.set()
    await until_booked()

    await in_db(assert_at_bound)


async def test_a_booking_that_waits_for_its_thread_is_not_cancelled_with_its_caller(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, gate: Gate
) -> None:
    api.enqueue(Hang(seconds=30))
    task = asyncio.create_task(async_client.messages.create(**ASKED))
    await until_asked(api)
    busy = asyncio.create_task(sync_to_async(gate.opened.wait)(10))
    await asyncio.sleep(0)

    task.cancel()
    await asyncio.to_thread(wait_until, lambda: middleware._running)
    await let_go(task)
    gate.opened.set()
    assert await busy
    await until_booked()

    await in_db(assert_at_bound)


async def test_cancelled_while_it_settles_an_answer_is_booked_as_it_is(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "settle", after=False)
    task = asyncio.create_task(async_client.messages.create(**ASKED))
    await gate.wait()

    await let_go(task)
    gate.opened.set()
    await until_booked()

    await in_db(assert_exact, api)


async def test_cancelled_while_it_is_read_a_stream_is_booked_in_part(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.01))
    heard = asyncio.Event()

    async def read() -> None:
        async with async_client.messages.stream(**ASKED) as stream:
            async for text in stream.text_stream:
                if text:
                    heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    await let_go(task)

    api.wait_until_idle()
    row = await in_db(only_row)
    assert row.status == CallLog.Status.ESTIMATED
    assert (await in_db(bill, api))[0] <= (row.cost_nanousd or 0) < row.reserved_nanousd
    await in_db(assert_balanced)


async def test_cancelled_twice_while_it_closes_a_stream_is_booked(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "settle", after=False)
    api.enqueue(Reply(text=STORY, chunk_delay=0.01))
    heard = asyncio.Event()

    async def read() -> None:
        async with async_client.messages.stream(**ASKED) as stream:
            async for text in stream.text_stream:
                if text:
                    heard.set()

    task = asyncio.create_task(read())
    await heard.wait()
    task.cancel()
    await gate.wait()
    await let_go(task)
    gate.opened.set()
    await until_booked()

    assert (await in_db(only_row)).status == CallLog.Status.ESTIMATED
    await in_db(assert_balanced)


async def test_a_timeout_of_asyncio_is_booked_like_any_cancellation(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Hang(seconds=30))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(async_client.messages.create(**ASKED), timeout=0.15)

    await in_db(assert_at_bound)


async def test_the_first_failure_of_a_group_books_its_other_calls(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Hang(seconds=30), Hang(seconds=30))

    async def fail() -> None:
        await asyncio.to_thread(wait_until, lambda: len(api.requests) == 2)
        raise LookupError("the caller's own")

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_ask(async_client))
            group.create_task(_ask(async_client))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await run()

    assert [row.status for row in await in_db(rows)] == ["estimated", "estimated"]
    await in_db(assert_balanced)


async def _ask(client: anthropic.AsyncAnthropic) -> None:
    await client.messages.create(**ASKED)


async def test_a_coroutine_that_is_thrown_away_during_http_is_booked(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    sent = asyncio.Event()

    async def never(request: anthropic.APIRequest, call_next: Any) -> Any:
        sent.set()
        await asyncio.Event().wait()

    inside = async_client.with_options(middleware=[*async_client.middleware, never])
    await throw_away(inside.messages.create(**ASKED), once=sent.is_set)
    await until_booked()

    assert (await in_db(assert_at_bound)).error == "GeneratorExit"


async def test_a_coroutine_that_is_thrown_away_while_it_reserves_gives_everything_back(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate.hold(monkeypatch, ledger_of_the_run(), "reserve", after=True)
    await throw_away(async_client.messages.create(**ASKED), once=gate.reached.is_set)
    gate.opened.set()
    await until_booked()

    assert (await in_db(assert_released)).error == "GeneratorExit"


def test_a_coroutine_that_is_thrown_away_after_its_loop_is_left_to_the_tick(
    api: AnthropicSimulator,
) -> None:
    sent = asyncio.Event()
    calls: list[Coroutine[Any, Any, Any]] = []

    async def never(request: anthropic.APIRequest, call_next: Any) -> Any:
        sent.set()
        await asyncio.Event().wait()

    async def begin() -> None:
        client = ai_budget.async_client()
        inside = client.with_options(middleware=[*client.middleware, never])
        calls.append(inside.messages.create(**ASKED))
        await drive(calls[0], until=sent.is_set)

    asyncio.run(begin())
    calls[0].close()

    assert only_row().status == CallLog.Status.RESERVED


async def throw_away(calling: Coroutine[Any, Any, Any], *, once: Callable[[], bool]) -> None:
    """Drive a coroutine without a task of its own, and drop it in the middle."""
    await drive(calling, until=once)
    calling.close()


async def drive(calling: Coroutine[Any, Any, Any], *, until: Callable[[], bool]) -> None:
    """Drive a coroutine without a task of its own, up to a point."""
    while not until():
        waited = calling.send(None)
        if waited is not None:
            waited._asyncio_future_blocking = False
            await asyncio.to_thread(wait_until, lambda: until() or waited.done())  # noqa: B023


def test_an_interrupted_process_books_its_call_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def interrupt(request: anthropic.APIRequest, call_next: Any) -> Any:
        call_next(request)
        raise KeyboardInterrupt

    inside = client.with_options(middleware=[*client.middleware, interrupt])

    with pytest.raises(KeyboardInterrupt):
        inside.messages.create(**ASKED)

    assert assert_at_bound().error == "KeyboardInterrupt"


def test_a_process_that_exits_while_it_reads_books_its_stream(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    def read() -> None:
        with client.messages.stream(**ASKED) as stream:
            for _ in stream.text_stream:
                raise SystemExit

    with pytest.raises(SystemExit):
        read()

    assert only_row().status == CallLog.Status.ESTIMATED
    assert_balanced()


async def test_an_async_generator_that_is_closed_books_its_stream(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    async def story() -> AsyncGenerator[str, None]:
        async with async_client.messages.stream(**ASKED) as stream:
            async for text in stream.text_stream:
                yield text

    async with contextlib.aclosing(story()) as told:
        async for _ in told:
            break

    assert (await in_db(only_row)).status == CallLog.Status.ESTIMATED
    await in_db(assert_balanced)


async def test_an_async_stream_that_is_dropped_half_read_is_booked(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    api.enqueue(Reply(text=STORY, chunk_delay=0.002))

    async def read() -> None:
        async for _ in await async_client.messages.create(**ASKED, stream=True):
            return

    await read()
    for _ in range(1_000):
        if (await in_db(only_row)).status != CallLog.Status.RESERVED:
            break
        await asyncio.sleep(0.005)

    assert (await in_db(only_row)).status == CallLog.Status.ESTIMATED
    await in_db(assert_balanced)


async def test_a_booking_whose_thread_is_gone_is_left_to_the_tick(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original: Callable[..., Awaitable[Any]] = middleware._in_thread

    async def broken(step: Any) -> Any:
        raise RuntimeError("CurrentThreadExecutor already quit or is broken")

    monkeypatch.setattr(middleware, "_in_thread", broken)

    answer = await async_client.messages.create(**ASKED)

    assert answer.content
    assert "ai_budget_tick will book it" in caplog.text
    monkeypatch.setattr(middleware, "_in_thread", original)
    assert (await in_db(only_row)).status == CallLog.Status.RESERVED


async def test_one_call_that_waits_for_its_booking_holds_up_no_other(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    answers = await asyncio.gather(
        *(async_client.messages.create(**ASKED) for _ in range(8)),
        *(ai_budget.aask("Hello", feature="chat") for _ in range(4)),
    )

    assert len(answers) == 12
    assert len(await in_db(rows)) == 12
    await in_db(assert_balanced)


def test_an_attempt_is_booked_once_whoever_comes_second(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[OpenAttempt] = []
    book_message = OpenAttempt.book_message

    def book_and_keep(self: OpenAttempt, *args: Any) -> None:
        opened.append(self)
        book_message(self, *args)

    monkeypatch.setattr(OpenAttempt, "book_message", book_and_keep)
    answer = ai_budget.ask("Hello")

    opened[0].book_lost("a late second booking")

    assert_exact(api)
    assert opened[0].call is not None
    assert opened[0].call.cost_nanousd == answer.cost_nanousd


async def test_the_thread_of_the_ledger_is_the_one_of_the_request(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    ledger = ledger_of_the_run()
    reserve = ledger.reserve

    def noting(self: Ledger, *args: Any) -> Any:
        seen.append(threading.get_ident())
        return reserve(self, *args)

    monkeypatch.setattr(ledger, "reserve", noting)
    await ai_budget.aask("Hello")

    assert seen == [await sync_to_async(threading.get_ident)()]
