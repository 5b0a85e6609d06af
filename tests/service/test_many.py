"""``ask_many`` and ``aask_many``: many prompts at once, in order, inside the budget."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any, Protocol

import anthropic
import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.db.backends.signals import connection_created
from django.test import override_settings

import ai_budget
from ai_budget import periods
from ai_budget.guard.charge import current_payer
from ai_budget.many import Outcomes
from ai_budget.signals import call_refused, call_settled
from ai_budget.testing import AnthropicSimulator, CutBeforeResponse, Fail, Hang, Reply
from ai_budget.testing.budgets import override_budget
from tests.guard.books import (
    assert_balanced,
    balance,
    bill,
    in_db,
    ledger_of_the_run,
    refusals,
    rows,
    statuses,
    wait_until,
)

pytestmark = pytest.mark.django_db
in_threads = pytest.mark.django_db(transaction=True)
"""Threads have connections of their own, and would see nothing of a test's transaction."""

PATIENCE = 10
"""Seconds after which a test gives up."""

LONG = 2_000
"""Tokens that an answer may have, and reserves; those of the local API are a few."""

TWO_LONG = Decimal("0.0025")
"""A limit that holds two calls of so many tokens at once and not three."""

both_verbs = pytest.mark.parametrize(
    "ask_many",
    [
        pytest.param(ai_budget.ask_many, id="ask_many", marks=in_threads),
        pytest.param(async_to_sync(ai_budget.aask_many), id="aask_many"),
    ],
)


class AskMany(Protocol):
    """Either verb, as a test calls it."""

    def __call__(self, prompts: Any, **options: Any) -> Outcomes: ...


class Meter:
    """Answers of the local API that come so many at a time; ``most`` were asked for at once."""

    def __init__(self, together: int) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self._together = threading.Barrier(together)

    def __call__(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self._together.wait(PATIENCE)
        with self._lock:
            self._now -= 1
        return echo(body)


def echo(body: dict[str, Any]) -> Reply:
    """Answer with the prompt itself, backwards."""
    return Reply(text=said(body)[::-1])


def said(body: dict[str, Any]) -> str:
    text = body["messages"][-1]["content"]
    assert isinstance(text, str)
    return text


def numbered(count: int) -> list[str]:
    return [f"prompt {number:02}" for number in range(count)]


def asked(api: AnthropicSimulator) -> list[str]:
    """Every prompt that arrived, sorted."""
    return sorted(said(request.body or {}) for request in api.requests)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """No thread outlives the block, and no connection that one of them made is open."""
    made: list[Any] = []

    def keep(connection: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            made.append(connection)

    before = set(threading.enumerate())
    connection_created.connect(keep)
    try:
        yield
    finally:
        connection_created.disconnect(keep)
    ours = [it for it in set(threading.enumerate()) - before if "_work" in it.name]
    assert ours == []
    assert [it for it in made if it.connection is not None] == []


# What comes back


@both_verbs
def test_answers_are_in_the_order_of_their_prompts(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    second = threading.Event()

    def first_comes_last(body: dict[str, Any]) -> Reply:
        if said(body) == "prompt 00":
            assert second.wait(PATIENCE)
        else:
            second.set()
        return echo(body)

    api.default = first_comes_last

    outcomes = ask_many(numbered(5), feature="chat", concurrency=2)

    assert [outcome.text[::-1] for outcome in outcomes] == numbered(5)
    assert [outcome.prompt for outcome in outcomes] == numbered(5)
    assert all(outcome.answered for outcome in outcomes)
    assert outcomes.ended_by is None
    assert len(api.requests) == 5
    assert_balanced()


def test_the_cost_is_that_of_all_answers(api: AnthropicSimulator) -> None:
    outcomes = ai_budget.ask_many(numbered(3), feature="chat")

    assert outcomes.cost == Decimal(sum(bill(api))).scaleb(-9) > 0
    assert outcomes.cost == sum(answer.cost for answer in outcomes.answers)
    assert outcomes.cost == sum(outcome.cost for outcome in outcomes)


def test_no_prompts_are_no_calls(api: AnthropicSimulator) -> None:
    outcomes = ai_budget.ask_many([])

    assert outcomes == []
    assert outcomes.cost == 0
    assert api.requests == []


def test_prompts_are_whatever_ask_takes(api: AnthropicSimulator) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How are you?"},
    ]
    system: list[dict[str, Any]] = [{"type": "text", "text": "Be brief."}]

    prompts: list[Any] = ["Hello", iter(messages)]

    outcomes = ai_budget.ask_many((it for it in prompts), system=iter(system), concurrency=1)

    sent = [request.body or {} for request in api.requests]
    assert sent[0]["messages"] == messages[:1]
    assert sent[1]["messages"] == messages
    assert [body["system"] for body in sent] == [system, system]
    assert [outcome.prompt for outcome in outcomes] == ["Hello", messages]


def test_all_keywords_of_ask_are_taken() -> None:
    one = inspect.signature(ai_budget.ask).parameters
    many = dict(inspect.signature(ai_budget.ask_many).parameters)

    assert many == inspect.signature(ai_budget.aask_many).parameters
    assert many.pop("concurrency").default == 8
    assert list(many.values())[1:] == list(one.values())[1:]


def test_the_keywords_reach_every_call(api: AnthropicSimulator) -> None:
    ai_budget.ask_many(numbered(2), max_tokens=33, tags={"plan": "free"}, stop_sequences=["END"])

    assert [(request.body or {})["max_tokens"] for request in api.requests] == [33, 33]
    assert [(request.body or {})["stop_sequences"] for request in api.requests] == [["END"]] * 2
    assert [row.tags for row in rows()] == [{"plan": "free"}] * 2


# How many at once


@both_verbs
def test_as_many_are_in_flight_as_may_be_and_never_more(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    meter = api.default = Meter(together=4)

    outcomes = ask_many(numbered(12), feature="chat", concurrency=4)

    assert len(outcomes.answers) == 12
    assert meter.most == 4
    assert_balanced()


@both_verbs
def test_prompts_are_read_no_further_ahead_than_they_are_sent(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    unanswered: list[int] = []

    def prompts() -> Iterator[str]:
        for read, prompt in enumerate(numbered(9)):
            unanswered.append(read - len(api.billed))
            yield prompt

    ask_many(prompts(), feature="chat", concurrency=3)

    assert len(unanswered) == 9
    assert max(unanswered) < 3


@in_threads
def test_threads_and_their_connections_end_with_it(api: AnthropicSimulator) -> None:
    api.default = Meter(together=3)

    with nothing_left_behind():
        ai_budget.ask_many(numbered(6), feature="chat", concurrency=3)


@in_threads
def test_no_more_threads_are_started_than_are_needed(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def begin(thread: threading.Thread) -> None:
        if "_work" in thread.name:
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)

    ai_budget.ask_many(numbered(2), feature="chat", concurrency=100)
    ai_budget.ask_many(numbered(9), feature="chat", concurrency=2)

    assert 2 <= len(started) <= 4


def test_in_a_tests_transaction_calls_are_made_one_by_one_where_it_can_be_seen(
    api: AnthropicSimulator,
) -> None:
    """Another thread would see neither the budget nor, later, be rolled back with the test."""
    threads: set[int] = set()

    def listen(**kwargs: Any) -> None:
        threads.add(threading.get_ident())

    call_settled.connect(listen)
    meter = api.default = Meter(together=1)
    try:
        with override_budget("chat", max_tokens=7):
            outcomes = ai_budget.ask_many(numbered(3), feature="chat", concurrency=4)
    finally:
        call_settled.disconnect(listen)

    assert [outcome.text[::-1] for outcome in outcomes] == numbered(3)
    assert threads == {threading.get_ident()}
    assert meter.most == 1
    assert [row.max_tokens for row in rows()] == [7, 7, 7]


@pytest.mark.parametrize(
    ("concurrency", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_concurrency_is_a_whole_number_from_one_on(
    api: AnthropicSimulator, concurrency: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="concurrency is a whole number"):
        ai_budget.ask_many(["Hello"], concurrency=concurrency)

    assert api.requests == []


# Who pays


@both_verbs
def test_charges_reach_every_call(api: AnthropicSimulator, ask_many: AskMany) -> None:
    with ai_budget.charge(feature="outer", subject="tenant", tags={"plan": "free"}):
        ask_many(numbered(4), feature="chat", tags={"run": "7"})

    assert {(row.feature_id, row.subject) for row in rows()} == {("chat", "tenant")}
    assert [row.tags for row in rows()] == [{"plan": "free", "run": "7"}] * 4


@both_verbs
def test_a_generator_of_prompts_has_its_own_charges(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    seen: list[str | None] = []

    def prompts() -> Iterator[str]:
        seen.append(current_payer().feature)
        yield "Hello"

    with ai_budget.charge(feature="outer"):
        ask_many(prompts(), feature="chat")

    assert seen == ["outer"]


# When the budget refuses


@both_verbs
def test_once_the_budget_refuses_nothing_more_is_sent(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    api.default = Meter(together=4)
    with override_budget("chat", requests_per_minute=4):
        outcomes = ask_many(numbered(30), feature="chat", concurrency=4)

    assert asked(api) == numbered(4)
    assert [outcome.answered for outcome in outcomes] == [True] * 4 + [False] * 26
    assert all(outcome.refused and not outcome.failed for outcome in outcomes[4:])
    assert all(isinstance(outcome.error, ai_budget.RateLimited) for outcome in outcomes[4:])
    assert [outcome.prompt for outcome in outcomes] == numbered(30)
    assert outcomes.ended_by in [outcome.error for outcome in outcomes]
    assert [row.status for row in rows()] == ["settled"] * 4


@in_threads
def test_what_is_not_sent_is_not_counted_as_refused(api: AnthropicSimulator) -> None:
    with override_budget("chat", requests_per_minute=4):
        ai_budget.ask_many(numbered(30), feature="chat", concurrency=4)

    # A refusal that a busy database does not count is one all the same.
    assert refusals().get("feature:chat", 0) <= 4


@both_verbs
def test_those_in_flight_are_finished_when_another_is_refused(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    refused = threading.Event()

    def listen(**kwargs: Any) -> None:
        refused.set()

    def answer_after_the_refusal(body: dict[str, Any]) -> Reply:
        assert refused.wait(PATIENCE)
        return echo(body)

    api.default = answer_after_the_refusal
    call_refused.connect(listen)
    try:
        with override_budget("chat", requests_per_minute=2):
            outcomes = ask_many(numbered(9), feature="chat", concurrency=3)
    finally:
        call_refused.disconnect(listen)

    assert len(outcomes.answers) == 2
    assert sum(outcome.refused for outcome in outcomes) == 7
    assert_balanced()


@in_threads
@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"enabled": False}, ai_budget.FeatureDisabled),
        ({"daily_limit_usd": 0}, ai_budget.BudgetExceeded),
        ({"requests_per_minute": 0}, ai_budget.RateLimited),
    ],
)
def test_a_budget_that_allows_nothing_is_asked_no_oftener_than_calls_are_made_at_once(
    api: AnthropicSimulator, limits: dict[str, Any], error: type[Exception]
) -> None:
    with override_budget("chat", **limits):
        outcomes = ai_budget.ask_many(numbered(50), feature="chat", concurrency=2)

    assert len(outcomes) == 50
    assert all(isinstance(outcome.error, error) for outcome in outcomes)
    assert refusals()["feature:chat"] <= 2
    assert api.requests == []


def test_the_text_of_a_refused_prompt_is_its_error(api: AnthropicSimulator) -> None:
    with override_budget("chat", enabled=False):
        (outcome,) = ai_budget.ask_many(["Hello"], feature="chat")

    assert outcome.cost == 0
    assert outcome.answer is None
    with pytest.raises(ai_budget.FeatureDisabled):
        _ = outcome.text


@pytest.mark.parametrize(
    "limits", [{"daily_limit_usd": TWO_LONG}, {"tokens_per_minute": 2 * LONG + 1_500}]
)
@both_verbs
def test_calls_of_its_own_that_fill_a_limit_are_waited_for(
    api: AnthropicSimulator, ask_many: AskMany, limits: dict[str, Any]
) -> None:
    meter = api.default = Meter(together=2)
    with override_budget("chat", **limits):
        outcomes = ask_many(numbered(10), feature="chat", max_tokens=LONG, concurrency=5)

    assert [outcome.text[::-1] for outcome in outcomes] == numbered(10)
    assert meter.most == 2
    # A refusal that a busy database does not count is one all the same.
    assert refusals().get("feature:chat", 0) <= 4
    assert_balanced()


@both_verbs
def test_a_prompt_that_waits_for_others_is_marked_when_they_end_it(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    refused = threading.Event()

    def listen(**kwargs: Any) -> None:
        refused.set()

    def reject_the_key_after_the_refusal(body: dict[str, Any]) -> Fail:
        assert refused.wait(PATIENCE)
        return Fail(status=401)

    api.default = reject_the_key_after_the_refusal
    call_refused.connect(listen)
    try:
        with override_budget("chat", daily_limit_usd=TWO_LONG):
            outcomes = ask_many(numbered(6), feature="chat", max_tokens=LONG, concurrency=3)
    finally:
        call_refused.disconnect(listen)

    assert [outcome.prompt for outcome in outcomes] == numbered(6)
    assert all(outcome.failed for outcome in outcomes)
    assert len(api.requests) == 2


@in_threads
def test_a_limit_that_others_fill_ends_it(api: AnthropicSimulator) -> None:
    with (
        override_budget("chat", daily_limit_usd=TWO_LONG),
        ai_budget.stream("One", feature="chat", max_tokens=LONG),
        ai_budget.stream("Two", feature="chat", max_tokens=LONG),
    ):
        outcomes = ai_budget.ask_many(numbered(20), feature="chat", max_tokens=LONG, concurrency=3)

    assert isinstance(outcomes.ended_by, ai_budget.BudgetExceeded)
    assert outcomes.ended_by.saturated
    assert all(outcome.refused for outcome in outcomes)
    assert len(api.requests) == 2


@in_threads
def test_where_it_is_told_to_a_call_waits_for_others_and_nothing_is_refused(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    reserve = ledger_of_the_run().reserve

    def reserve_or_tell(*args: Any) -> Any:
        try:
            return reserve(*args)
        except ai_budget.LimitReached:
            full.set()
            raise

    def prompts() -> Iterator[str]:
        yield "Hello"
        assert full.wait(PATIENCE)
        for other in others:
            "".join(other)

    monkeypatch.setattr(ledger_of_the_run(), "reserve", reserve_or_tell)
    with override_budget("chat", daily_limit_usd=TWO_LONG), ExitStack() as stack:
        streams = [ai_budget.stream("Hello", feature="chat", max_tokens=LONG) for _ in range(2)]
        others = [stack.enter_context(stream) for stream in streams]
        outcomes = ai_budget.ask_many(prompts(), feature="chat", max_tokens=LONG, wait=PATIENCE)

    assert len(outcomes.answers) == 1
    assert refusals() == {}


def test_a_prompt_that_is_larger_than_the_limit_is_marked_alone(api: AnthropicSimulator) -> None:
    prompts = ["Short", "Endless " * 10_000, "Brief"]
    with override_budget("chat", daily_limit_usd=Decimal("0.0005")):
        outcomes = ai_budget.ask_many(prompts, feature="chat", max_tokens=50, concurrency=1)

    assert [outcome.answered for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, ai_budget.BudgetExceeded)
    assert outcomes.ended_by is None


def test_a_prompt_without_a_bound_is_marked_alone(api: AnthropicSimulator) -> None:
    search = {"type": "web_search_20260318", "name": "web_search"}
    added = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": search}}
    searching: list[dict[str, Any]] = [
        {"role": "system", "content": [added]},
        {"role": "user", "content": "Hello"},
    ]

    outcomes = ai_budget.ask_many([searching, "Hello"], feature="chat", concurrency=1)

    assert [outcome.answered for outcome in outcomes] == [False, True]
    assert isinstance(outcomes[0].error, ai_budget.UnboundedCall)
    assert outcomes[0].refused


# When something fails


@both_verbs
def test_a_prompt_that_fails_does_not_lose_the_others(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    def fail_one(body: dict[str, Any]) -> Any:
        return Fail(status=400) if said(body) == "prompt 02" else echo(body)

    api.default = fail_one

    outcomes = ask_many(numbered(5), feature="chat", concurrency=2)

    assert [outcome.answered for outcome in outcomes] == [True, True, False, True, True]
    assert outcomes[2].failed
    assert not outcomes[2].refused
    assert outcomes.ended_by is None
    with pytest.raises(anthropic.BadRequestError):
        _ = outcomes[2].text
    assert_balanced()


def test_so_does_one_whose_connection_is_cut(api: AnthropicSimulator) -> None:
    api.enqueue(*[CutBeforeResponse(billed=True)] * 3)  # with the SDK's repeats

    outcomes = ai_budget.ask_many(["Hello", "Hi"], feature="chat", concurrency=1)

    assert [outcome.failed for outcome in outcomes] == [True, False]
    assert isinstance(outcomes[0].error, anthropic.APIConnectionError)
    assert outcomes[0].cost == 0
    assert statuses() == ["estimated"] * 3 + ["settled"]


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_key_that_is_not_accepted_ends_it(api: AnthropicSimulator, status: int) -> None:
    api.default = Fail(status=status)

    outcomes = ai_budget.ask_many(numbered(20), feature="chat", concurrency=2)

    assert len(api.requests) <= 2
    assert len(outcomes) == 20
    assert all(outcome.failed for outcome in outcomes)
    assert isinstance(outcomes.ended_by, anthropic.APIStatusError)


@both_verbs
def test_without_a_key_nothing_is_read_or_sent(
    api: AnthropicSimulator, ask_many: AskMany, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    prompts = iter(numbered(2))

    with (
        override_settings(AI_BUDGET={"BASE_URL": api.base_url}),
        pytest.raises(ImproperlyConfigured),
    ):
        ask_many(prompts)

    assert list(prompts) == numbered(2)


@both_verbs
def test_inside_a_transaction_nothing_is_read_or_sent(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    """Threads of its own are outside the transaction, and the rule is the same all the same."""
    prompts = iter(numbered(2))

    with transaction.atomic(), pytest.raises(ai_budget.CallInsideTransaction):
        ask_many(prompts)

    assert list(prompts) == numbered(2)
    assert api.requests == []


@both_verbs
def test_what_is_no_prompt_is_an_error_once_those_in_flight_are_booked(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    wrong = {"role": "user", "content": "a message, not a list of them"}

    with pytest.raises(TypeError, match="A prompt is text or a list of messages") as caught:
        ask_many([*numbered(2), wrong, "never"], feature="chat", concurrency=4)

    assert asked(api) == numbered(2)
    assert statuses() == ["settled"] * 2
    (note,) = caught.value.__notes__
    assert note.startswith("Of the other prompts 2 had been answered, for $0.0")
    assert_balanced()


@pytest.mark.parametrize("prompts", ["Hello", b"Hello", {"role": "user", "content": "Hello"}, 5])
def test_one_prompt_is_not_many(api: AnthropicSimulator, prompts: Any) -> None:
    with pytest.raises(TypeError):
        ai_budget.ask_many(prompts)

    assert api.requests == []


@both_verbs
def test_an_option_that_makes_no_sense_is_refused(
    api: AnthropicSimulator, ask_many: AskMany
) -> None:
    with pytest.raises(ValueError, match="cache is") as caught:
        ask_many(numbered(9), cache="public")

    assert api.requests == []
    assert not hasattr(caught.value, "__notes__")


@in_threads
def test_an_error_of_the_prompts_themselves_is_raised_once_those_in_flight_are_booked(
    api: AnthropicSimulator,
) -> None:
    def prompts() -> Iterator[str]:
        yield "Hello"
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        ai_budget.ask_many(prompts(), feature="chat")

    assert statuses() == ["settled"]


def test_so_is_one_that_comes_after_the_last_that_was_sent(api: AnthropicSimulator) -> None:
    def prompts() -> Iterator[str]:
        yield from numbered(3)
        raise LookupError("no more")

    with override_budget("chat", requests_per_minute=1), pytest.raises(LookupError) as caught:
        ai_budget.ask_many(prompts(), feature="chat", concurrency=1)

    assert statuses() == ["settled"]
    assert len(caught.value.__notes__) == 1


# Who leaves


@in_threads
def test_an_interrupt_sends_nothing_more_and_books_what_is_in_flight(
    api: AnthropicSimulator,
) -> None:
    api.default = Reply(delay=0.05)

    def prompts() -> Iterator[str]:
        yield from numbered(2)
        raise KeyboardInterrupt

    with nothing_left_behind(), pytest.raises(KeyboardInterrupt):
        ai_budget.ask_many(prompts(), feature="chat", concurrency=4)

    assert asked(api) == numbered(2)
    assert statuses() == ["settled"] * 2
    assert_balanced()


@in_threads
async def test_cancelled_it_cancels_those_in_flight_and_waits_for_them_to_be_booked(
    api: AnthropicSimulator,
) -> None:
    api.default = Hang(seconds=30, billed=True)
    task = asyncio.create_task(ai_budget.aask_many(numbered(9), feature="chat", concurrency=3))
    await asyncio.to_thread(wait_until, lambda: len(api.billed) == 3)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await in_db(statuses) == ["estimated"] * 3
    assert {row.error for row in await in_db(rows)} == {"CancelledError"}
    assert len(api.requests) == 3
    await in_db(assert_balanced)


@in_threads
async def test_the_event_loop_is_free_meanwhile(api: AnthropicSimulator) -> None:
    turn = asyncio.Event()
    loop = asyncio.get_running_loop()
    free: Callable[[], object] = turn.set

    def answer(body: dict[str, Any]) -> Reply:
        loop.call_soon_threadsafe(free)
        return Reply(delay=0.05)

    api.default = answer
    task = asyncio.create_task(ai_budget.aask_many(numbered(2), feature="chat"))

    await asyncio.wait_for(turn.wait(), PATIENCE)
    assert not task.done()
    assert len((await task).answers) == 2


@in_threads
def test_slow_answers_come_almost_as_many_times_faster(api: AnthropicSimulator) -> None:
    api.default = Reply(delay=0.2)
    ai_budget.ask("warm", feature="chat")
    begun = periods.monotonic()

    outcomes = ai_budget.ask_many(numbered(16), feature="chat", concurrency=8)

    assert len(outcomes.answers) == 16
    assert periods.monotonic() - begun < 16 * 0.2 / 2
    assert balance("feature:chat").calls == 17
