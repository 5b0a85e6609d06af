"""Attacks on answers from the response cache: nothing leaks, nothing hangs, the books are right."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest
from django.contrib.auth.models import AnonymousUser
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.management import call_command
from django.db import OperationalError, connections, transaction
from django.utils.functional import SimpleLazyObject

import ai_budget
from ai_budget.exceptions import CallInsideTransaction, QuotaExceeded
from ai_budget.ledger.journal import Journal
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.review.report import cost_report
from ai_budget.review.spans import Span
from ai_budget.testing import AnthropicSimulator, Fail, Reply, freeze, override_budget
from ai_budget.values import Status
from tests.factories import UserFactory
from tests.guard.books import MODEL, QUESTION, assert_balanced, in_db, rows, statuses

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HAIKU, OPUS = MODEL, "claude-opus-5-5"
AT_ONCE = 1.5
"""Seconds within which a call ends that waits for nobody's lease: the shortest is ten."""


@pytest.fixture
def bare(api: AnthropicSimulator) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="key", base_url=api.base_url) as bare:
        yield bare


def at_once(ask: Callable[[], object], times: int) -> None:
    """Do it so many times side by side."""
    together = threading.Barrier(times)

    def one() -> None:
        together.wait()
        try:
            ask()
        finally:
            connections.close_all()

    threads = [threading.Thread(target=one) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Whose answers -----------------------------------------------------------------------------------


def test_one_user_is_the_same_however_they_are_named(
    api: AnthropicSimulator, bare: anthropic.Anthropic, private: None
) -> None:
    ada = UserFactory.create()
    client = ai_budget.guard(bare, feature="chat")

    for user in (ada, SimpleLazyObject(lambda: ada), ada.pk, str(ada.pk)):
        with ai_budget.charge(user=user):
            client.messages.create(**QUESTION)

    assert len(api.requests) == 1


def test_a_clients_own_user_is_who_is_answered(
    api: AnthropicSimulator, bare: anthropic.Anthropic, private: None
) -> None:
    ada, bob = UserFactory.create(), UserFactory.create()
    with ai_budget.charge(user=bob):
        ai_budget.guard(bare, feature="chat", user=ada).messages.create(**QUESTION)

        ai_budget.guard(bare, feature="chat").messages.create(**QUESTION)

    with ai_budget.charge(user=ada):
        ai_budget.guard(bare, feature="chat").messages.create(**QUESTION)
    assert statuses() == [Status.SETTLED, Status.SETTLED, Status.CACHED]


def test_a_subject_with_the_name_of_a_user_is_somebody_else(
    api: AnthropicSimulator, private: None
) -> None:
    ada = UserFactory.create()
    ai_budget.ask("Hello", feature="chat", user=ada)

    other = ai_budget.ask("Hello", feature="chat", subject=str(ada.pk))

    assert not other.cached


def test_visitors_share_nothing_private(api: AnthropicSimulator, private: None) -> None:
    visitor = SimpleLazyObject(AnonymousUser)

    found = [ai_budget.ask("Hello", feature="chat", user=visitor).cached for _ in range(2)]

    assert found == [False, False]


@pytest.mark.parametrize("other", ["Chat", "chat-", "cha", "chat.chat", "chat_"])
def test_features_with_names_alike_have_their_own(api: AnthropicSimulator, other: str) -> None:
    ai_budget.ask("Hello", feature="chat", cache="shared")

    try:
        found = ai_budget.ask("Hello", feature=other, cache="shared").cached
    except ai_budget.FeatureDisabled:  # a database that takes both names for one
        found = False

    assert not found


@pytest.mark.django_db(transaction=True)
def test_what_was_shared_is_not_found_once_it_is_private(api: AnthropicSimulator) -> None:
    def switch(body: dict[str, Any]) -> Reply:
        FeatureBudget.objects.filter(name="chat").update(cache_scope="private")
        connections.close_all()
        return Reply(text="Asked while it was shared.")

    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(switch)
    ai_budget.ask("Hello", feature="chat", subject="a")

    other = ai_budget.ask("Hello", feature="chat", subject="b")

    assert not other.cached


def test_an_answer_on_its_way_is_forgotten_too(api: AnthropicSimulator, private: None) -> None:
    def forget(body: dict[str, Any]) -> Reply:
        ai_budget.forget_answers(subject="a")
        return Reply(text="Old.")

    api.enqueue(forget)
    found = [ai_budget.ask("Hello", feature="chat", subject="a").cached for _ in range(3)]

    assert found == [False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"extra_headers": {"anthropic-workspace-id": "wrkspc_1"}},
        {"extra_headers": {"x-tenant": "a"}},
        {"extra_body": {"system": "Be brief."}},
        {"extra_body": {"max_tokens": 99}},
    ],
    ids=str,
)
def test_what_is_added_to_a_request_is_part_of_the_question(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None, change: dict[str, Any]
) -> None:
    client.messages.create(**QUESTION)

    client.messages.create(**QUESTION, **change)

    assert len(api.requests) == 2


def test_clients_with_other_headers_have_other_answers(
    api: AnthropicSimulator, shared: None
) -> None:
    for beta in ("one-2026-01-01", "two-2026-01-01"):
        headers = {"anthropic-beta": beta}
        with anthropic.Anthropic(
            api_key="key", base_url=api.base_url, default_headers=headers
        ) as bare:
            client = ai_budget.guard(bare, feature="chat")
            client.messages.create(**QUESTION)
            client.messages.create(**QUESTION, extra_headers={"anthropic-beta": anthropic.omit})

    assert len(api.requests) >= 3  # the two without may be one


def test_what_is_no_message_is_never_answered(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    counted = {"model": MODEL, "messages": QUESTION["messages"]}
    client.messages.create(**QUESTION)

    for _ in range(2):
        assert client.messages.count_tokens(**counted).input_tokens > 0

    assert statuses() == [Status.SETTLED]


# In every form -----------------------------------------------------------------------------------

CITED = {
    "type": "char_location",
    "cited_text": "y",
    "document_index": 0,
    "document_title": None,
    "start_char_index": 0,
    "end_char_index": 1,
    "file_id": None,
}
FOUND = {
    "type": "web_search_result",
    "title": "t",
    "url": "https://example.org",
    "encrypted_content": "e",
    "page_age": None,
}
TEXT = {"type": "text", "text": "Bläue \U0001f600"}
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "thinking": [{"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}, TEXT],
    "omitted": [{"type": "thinking", "thinking": "", "signature": "c2ln"}, TEXT],
    "redacted": [{"type": "redacted_thinking", "data": "abc"}, TEXT],
    "tool": [
        {"type": "tool_use", "id": "toolu_1", "name": "a", "input": {"b": [1.5, None], "a": "ü"}}
    ],
    "tool without input": [{"type": "tool_use", "id": "toolu_1", "name": "a", "input": {}}],
    "citations": [{**TEXT, "citations": [CITED, {**CITED, "cited_text": "z"}]}],
    "no citations": [{**TEXT, "citations": []}],
    "server tool": [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"q": "w"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [FOUND]},
        TEXT,
    ],
    "empty text": [{"type": "text", "text": ""}],
    "nothing": [],
}


@pytest.mark.parametrize("way", ["messages", "beta"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_replay_says_what_the_api_said(
    api: AnthropicSimulator, client: anthropic.Anthropic, kind: str, way: str, settings: Any
) -> None:
    stops = ["end_turn", "tool_use"]
    settings.AI_BUDGET = {**settings.AI_BUDGET, "CACHE_STOP_REASONS": stops}
    api.enqueue(*[Reply(content=BLOCKS[kind])] * 2)
    made = client.beta.messages if way == "beta" else client.messages

    def whole(question: dict[str, Any]) -> dict[str, object]:
        return told(made.create(**question))

    def streamed(question: dict[str, Any]) -> dict[str, object]:
        with made.stream(**question) as stream:
            return told(stream.get_final_message())

    def told(message: Any) -> dict[str, object]:
        said: dict[str, object] = message.to_dict()
        del said["id"]  # the two that were asked for have two
        return said

    with override_budget("chat", cache_scope="shared", allow_unbounded=True):
        first, second = ({**QUESTION, "system": name} for name in "ab")
        fresh_whole, found_stream = whole(first), streamed(first)
        fresh_stream, found_whole = streamed(second), whole(second)
        again = streamed(second)

    assert len(api.requests) == 2
    assert fresh_whole == found_whole
    assert fresh_stream == found_stream == again


def test_structured_answers_are_parsed_again(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    class Colour(pydantic.BaseModel):
        name: str

    api.enqueue(Reply(text='{"name": "blue"}'))

    parsed = [client.messages.parse(**QUESTION, output_format=Colour) for _ in range(2)]

    assert [message.parsed_output for message in parsed] == [Colour(name="blue")] * 2
    assert len(api.requests) == 1


def test_a_response_can_be_read_raw(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    client.messages.create(**QUESTION)
    open_response = client.messages.with_streaming_response.create

    whole = client.messages.with_raw_response.create(**QUESTION)
    with open_response(**QUESTION) as response:
        lines = "".join(response.iter_lines())
    with open_response(**QUESTION) as response:
        read = b"".join(response.iter_bytes())
    with open_response(**QUESTION, stream=True) as response:
        events = [line for line in response.iter_lines() if line.startswith("event: ")]
    with client.messages.create(**QUESTION, stream=True) as stream:
        next(iter(stream))

    assert len(api.requests) == 1
    assert json.loads(lines) == json.loads(read) == whole.http_response.json()
    assert events[-1] == "event: message_stop"
    assert (whole.elapsed, whole.request_id, whole.retries_taken) == (timedelta(), None, 0)


def test_a_response_can_be_had_bare(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None
) -> None:
    bodies = [
        client.post("/v1/messages", body=QUESTION, cast_to=httpx2.Response).json() for _ in range(2)
    ]

    assert len(api.requests) == 1
    assert bodies[0] == bodies[1]


# At once -----------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("after", [0, 0.005, 0.02, 0.08, 0.3])
async def test_where_the_first_is_cancelled_another_asks(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, after: float
) -> None:
    await in_db(FeatureBudget.objects.create, name="chat", cache_scope="shared")
    api.enqueue(Reply(delay=0.2))
    first = asyncio.create_task(async_client.messages.create(**QUESTION))
    await asyncio.sleep(0)
    others = [asyncio.create_task(async_client.messages.create(**QUESTION)) for _ in range(4)]
    await asyncio.sleep(after)
    began = time.monotonic()

    first.cancel()
    answered = await asyncio.gather(first, *others, return_exceptions=True)

    assert time.monotonic() - began < AT_ONCE
    assert not [it for it in answered[1:] if isinstance(it, BaseException)]
    assert len(api.requests) <= 2
    await in_db(assert_balanced)


@pytest.mark.parametrize("drop", ["forgotten", "left unread", "left early"])
def test_a_stream_that_is_dropped_holds_nobody_up(
    api: AnthropicSimulator, client: anthropic.Anthropic, shared: None, drop: str
) -> None:
    if drop == "forgotten":
        stream: Any = client.messages.create(**QUESTION, stream=True)
        next(iter(stream))
        del stream
        gc.collect()
    elif drop == "left unread":
        with client.messages.with_streaming_response.create(**QUESTION):
            pass
    else:
        with client.messages.stream(**QUESTION) as manager:
            next(iter(manager))
    began = time.monotonic()

    client.messages.create(**QUESTION)

    assert time.monotonic() - began < AT_ONCE
    assert len(api.requests) == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("status", [429, 500, 529])
def test_what_the_sdk_tries_again_may_be_answered_meanwhile(
    api: AnthropicSimulator, client: anthropic.Anthropic, status: int
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Fail(status=status, retry_after=0.01, delay=0.1), Reply(text="Second.", delay=0.1))
    said: list[Any] = []

    at_once(lambda: said.append(client.messages.create(**QUESTION).content), 6)

    assert {content[0].text for content in said} == {"Second."}
    assert len(said) == 6
    assert len(api.requests) == 2
    assert_balanced()


@pytest.mark.django_db(transaction=True)
def test_refusals_are_not_waited_for_one_after_the_other(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.default = Reply(text="No.", stop_reason="refusal", delay=0.3)
    began = time.monotonic()

    at_once(lambda: ai_budget.ask("Hello", feature="chat"), 8)

    assert time.monotonic() - began < AT_ONCE
    assert len(api.requests) == 8


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_never_more_answers_are_counted_than_a_quota_has_calls(api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared", cache_counts=True)
    UserQuota.objects.create(daily_calls=5)
    ada = UserFactory.create()
    api.enqueue(Reply(delay=0.2))
    became: Counter[str] = Counter()

    def ask() -> None:
        try:
            answer = ai_budget.ask("Hello", feature="chat", user=ada)
            became["found" if answer.cached else "asked"] += 1
        except QuotaExceeded:
            became["refused"] += 1

    at_once(ask, 12)
    call_command("ai_budget_rebuild", "--check")
    call_command("ai_budget_tick")

    assert became == {"asked": 1, "found": 4, "refused": 7}
    assert sum(row.counted for row in rows()) == 5
    assert sorted(statuses()) == [*[Status.CACHED] * 4, Status.SETTLED]
    assert_balanced()


@pytest.mark.parametrize("counts", [True, False])
def test_a_report_counts_each_answer_once(api: AnthropicSimulator, counts: bool) -> None:
    with override_budget("chat", cache_scope="shared", cache_counts=counts), freeze(NOON):
        for _ in range(4):
            ai_budget.ask("Hello", feature="chat")

    day = timedelta(days=1)
    report = cost_report(Span(since=NOON - day, until=NOON + day))

    (feature,) = report.features
    for found in (report.total, feature):
        assert (found.calls, found.cached, found.looked_up) == (4, 3, 4)
        assert found.saved_nanousd == 3 * (rows()[0].cost_nanousd or 0)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_classifier_is_asked_only_if_its_call_fits(api: AnthropicSimulator, left: int) -> None:
    ada = UserFactory.create()
    UserQuota.objects.create(daily_calls=2)
    for number in range(2 - left):
        ai_budget.ask(f"Question {number}", feature="other", user=ada)
    before = len(api.requests)
    api.enqueue(Reply(text='{"level": "simple"}'))

    with override_budget("chat", routing="classifier", model=OPUS):
        try:
            ai_budget.ask("Why? " * 400, feature="chat", user=ada, max_tokens=2_000)
        except QuotaExceeded:
            assert not left

    assert len(api.requests) - before == (2 if left else 0)
    assert sum(row.counted for row in rows()) == min(2, 2 - left + 1)
    assert_balanced()


def test_what_three_levers_saved_together_is_exact(api: AnthropicSimulator) -> None:
    prefix = [{"type": "text", "text": "word " * 30_000}]
    ladder: Any = [(1, HAIKU)]
    api.enqueue(Reply(output_tokens=20_000))
    with override_budget(
        "chat", routing="length", model=OPUS, daily_limit_usd=50, rungs=ladder, prompt_cache="5m"
    ):
        ai_budget.ask("Spend", feature="chat", model=OPUS, max_tokens=20_000, timeout=60)
        for _ in range(2):
            answer = ai_budget.ask("word " * 1_500, feature="chat", system=prefix)

    row, used = rows()[-1], answer.usage
    whole = used.input_tokens + used.cache_read_tokens + used.cache_write_5m_tokens
    plain = {"input_tokens": whole, "output_tokens": used.output_tokens}
    assert row.cache_read_tokens > 0
    assert row.saved_reason == "routing, downgrade, prompt cache"
    assert row.saved_nanousd == ai_budget.price(OPUS, plain) - (row.cost_nanousd or 0)


@pytest.mark.django_db(transaction=True)
def test_an_answer_that_is_there_is_refused_inside_a_transaction_all_the_same(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    client.messages.create(**QUESTION)

    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        client.messages.create(**QUESTION)


# Time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "found"), [(60, True), (65, False)])
def test_an_answer_is_found_up_to_the_last_moment_of_its_life(
    api: AnthropicSimulator, shared: None, seconds: int, found: bool
) -> None:
    # It is as old as its last byte, so a moment younger than its question.
    with freeze(NOON):
        ai_budget.ask("Hello", feature="chat")

    with freeze(NOON + timedelta(seconds=seconds)):
        answer = ai_budget.ask("Hello", feature="chat", ttl=60)

    assert answer.cached is found


def test_an_answer_of_a_host_whose_clock_is_ahead_is_found(
    api: AnthropicSimulator, shared: None
) -> None:
    with freeze(NOON + timedelta(seconds=30)):
        ai_budget.ask("Hello", feature="chat")

    with freeze(NOON):
        answer = ai_budget.ask("Hello", feature="chat")

    assert answer.cached


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["private", "shared"])
@pytest.mark.parametrize("backend", ["locmem.LocMemCache", "filebased.FileBasedCache"])
@pytest.mark.parametrize(
    "broken", ["get", "get_many", "set", "add", "delete", "touch", "set_many", "delete_many"]
)
def test_whatever_fails_in_the_cache_every_call_is_answered_at_once(
    api: AnthropicSimulator,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    tmp_path: Path,
    broken: str,
    backend: str,
    scope: str,
) -> None:
    name = f"django.core.cache.backends.{backend}"
    own = {"BACKEND": name, "LOCATION": str(tmp_path)}
    # Its prefix stays: a ledger in Redis is kept under it as well.
    settings.CACHES = {"default": {**settings.CACHES["default"], **own}}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(caches["default"], broken, fail)
    began = time.monotonic()
    with override_budget("chat", cache_scope=scope):
        for _ in range(3):
            ai_budget.ask("Hello", feature="chat", subject="a")

    assert time.monotonic() - began < AT_ONCE
    assert_balanced()


def test_an_answer_that_cannot_be_journaled_is_given_all_the_same(
    api: AnthropicSimulator, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ai_budget.ask("Hello", feature="chat")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("down")

    monkeypatch.setattr(Journal, "write", fail)

    assert ai_budget.ask("Hello", feature="chat").cached
    assert len(api.requests) == 1


@pytest.mark.django_db(transaction=True)
async def test_a_slow_cache_does_not_hold_up_the_event_loop(
    api: AnthropicSimulator,
    async_client: anthropic.AsyncAnthropic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await in_db(FeatureBudget.objects.create, name="chat", cache_scope="shared")
    looked_in: set[str] = set()
    get = LocMemCache.get

    def slowly(self: LocMemCache, *args: Any, **kwargs: Any) -> Any:
        looked_in.add(threading.current_thread().name)
        return get(self, *args, **kwargs)

    monkeypatch.setattr(LocMemCache, "get", slowly)
    for _ in range(2):
        await async_client.messages.create(**QUESTION)

    assert looked_in
    assert threading.current_thread().name not in looked_in
