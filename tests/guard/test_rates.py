"""Requests and tokens per minute, as callers meet them and as answers correct them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest
from django.contrib.auth.models import Group

import ai_budget
from ai_budget.models import UserQuota
from ai_budget.signals import call_settled
from ai_budget.testing import AnthropicSimulator, CutBeforeResponse, Fail, Reply, freeze
from ai_budget.testing import override_budget as override
from ai_budget.values import Level, Measure, Settlement
from tests.factories import UserFactory
from tests.guard.books import MODEL, assert_balanced, only_row, refusals, rows

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello there"}],
}
REQUESTS, TOKENS, INPUT_TOKENS = "requests", "tokens", "input-tokens"


@pytest.fixture(autouse=True)
def standing_clock() -> Iterator[None]:
    """No bucket refills."""
    with freeze(NOON):
        yield


@pytest.fixture
def settled() -> Iterator[list[Settlement]]:
    """How each attempt was booked."""
    booked: list[Settlement] = []

    def listen(settlement: Settlement, **kwargs: Any) -> None:
        booked.append(settlement)

    call_settled.connect(listen)
    yield booked
    call_settled.disconnect(listen)


def left(remaining: Any, of: str, limit: Any = 4_000) -> dict[str, str]:
    """The headers that say how much is left of one of Anthropic's limits."""
    name = f"anthropic-ratelimit-{of}"
    return {f"{name}-limit": str(limit), f"{name}-remaining": str(remaining)}


def ask(**who: Any) -> ai_budget.Answer:
    return ai_budget.ask("Hello there", max_tokens=50, **{"feature": "chat", **who})


# Whose rates


def test_a_feature_makes_so_many_requests_a_minute(api: AnthropicSimulator) -> None:
    with override("chat", requests_per_minute=2):
        ask()
        ask()
        with pytest.raises(ai_budget.RateLimited) as caught:
            ask()
        ask(feature="search")

    error = caught.value
    assert (error.scope, error.measure, error.limit) == ("feature:chat", "requests", 2)
    assert error.retry_after == 30
    assert error.__cause__ is None
    assert len(api.requests) == 3
    assert refusals() == {"feature:chat": 1}
    assert_balanced()


def test_a_category_and_the_site_have_rates_too(api: AnthropicSimulator) -> None:
    with (
        override("*", requests_per_minute=3),
        override("assistants", requests_per_minute=2) as category,
        override("chat", parent=category),
        override("search", parent=category),
    ):
        ask(feature="chat")
        ask(feature="search")
        with pytest.raises(ai_budget.RateLimited, match="category:assistants"):
            ask(feature="chat")
        ask(feature="other")
        with pytest.raises(ai_budget.RateLimited, match=r"limit of \*"):
            ask(feature="other")


def test_a_user_makes_so_many_requests_a_minute(api: AnthropicSimulator) -> None:
    ada, bob = UserFactory.create_batch(2)
    UserQuota.objects.create(requests_per_minute=1)

    ask(user=ada)
    ask(user=bob)
    with pytest.raises(ai_budget.RateLimited, match=f"user:{ada.pk}"):
        ask(user=ada, feature="search")


def test_a_users_rate_for_one_feature_leaves_the_others(api: AnthropicSimulator) -> None:
    ada = UserFactory.create()
    with override("chat") as chat:
        UserQuota.objects.create(feature=chat, requests_per_minute=1)
        ask(user=ada)
        with pytest.raises(ai_budget.RateLimited, match=f"user:{ada.pk},feature:chat"):
            ask(user=ada)
        ask(user=ada, feature="search")


def test_a_members_rate_is_the_groups(api: AnthropicSimulator) -> None:
    ada, bob = UserFactory.create_batch(2)
    slow = Group.objects.create(name="slow")
    ada.groups.add(slow)
    UserQuota.objects.create(group=slow, requests_per_minute=0)
    UserQuota.objects.create(requests_per_minute=1)

    with pytest.raises(ai_budget.RateLimited):
        ask(user=ada)
    ask(user=bob)


def test_each_attempt_is_a_request(api: AnthropicSimulator) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001))
    with override("chat", requests_per_minute=1), pytest.raises(ai_budget.RateLimited):
        ask()

    assert [row.error for row in rows()] == ["HTTP 529"]


def test_a_rate_in_shadow_mode_is_recorded(api: AnthropicSimulator) -> None:
    with override("chat", requests_per_minute=0, enforce=False):
        ask()

    assert only_row().decision == "would refuse: feature:chat minute"


# Tokens


def test_a_call_takes_all_the_tokens_of_its_bound(api: AnthropicSimulator) -> None:
    with override("chat", tokens_per_minute=100), pytest.raises(ai_budget.RateLimited) as caught:
        ask()

    assert caught.value.measure == "tokens"
    assert caught.value.requested > 50 + len("Hello there")
    assert api.billed == []


def test_what_an_answer_did_not_use_is_given_back(
    api: AnthropicSimulator, settled: list[Settlement]
) -> None:
    api.enqueue(Reply(output_tokens=7, usage={"input_tokens": 20, "cache_read_input_tokens": 900}))

    ask()

    assert settled[0].tokens == 27


@pytest.mark.parametrize(
    ("step", "tokens"),
    [
        (Fail(status=400), 0),
        (CutBeforeResponse(), None),
        (Reply(usage={"cache_read_input_tokens": "many"}), None),
    ],
    ids=["no success", "at the bound", "unreadable"],
)
def test_tokens_are_given_back_as_far_as_they_are_known(
    api: AnthropicSimulator, settled: list[Settlement], step: Any, tokens: int | None
) -> None:
    api.enqueue(step)
    with suppress(anthropic.APIError):
        ai_budget.client(max_retries=0, feature="chat").messages.create(**ASKED)

    assert [settlement.tokens for settlement in settled] == [tokens]


def test_a_request_that_never_left_takes_no_tokens(settled: list[Settlement]) -> None:
    with pytest.raises(anthropic.APIConnectionError):
        ai_budget.client(max_retries=0, base_url="http://127.0.0.1:9").messages.create(**ASKED)

    assert [settlement.tokens for settlement in settled] == [0]


def test_many_small_answers_fit_where_few_bounds_would(api: AnthropicSimulator) -> None:
    with override("chat", tokens_per_minute=3_000):
        for _ in range(20):
            ai_budget.ask("Hello there", feature="chat", max_tokens=2_000)

    assert sum(row.max_tokens for row in rows()) == 40_000


# What the answers say of the organisation


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_tells_what_is_left_of_the_organisations_limits(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    settled: list[Settlement],
    streamed: bool,
) -> None:
    api.enqueue(Reply(headers=left(7, REQUESTS) | left(900, TOKENS) | left(100, INPUT_TOKENS)))

    answer = client.messages.create(**ASKED, stream=streamed)
    if streamed:
        list(answer)

    assert [(level.measure, level.remaining) for level in settled[0].levels] == [
        (Measure.REQUESTS, 7),
        (Measure.TOKENS, 900),
    ]


def test_a_level_is_as_old_as_its_answer(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    settled: list[Settlement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ai_budget import periods

    now = [100.0]
    monkeypatch.setattr(periods, "monotonic", lambda: now[0])
    api.enqueue(Reply(headers=left(7, REQUESTS)))

    stream = client.messages.create(**ASKED, stream=True)
    now[0] += 2.5
    list(stream)

    assert settled[0].levels[0] == Level(
        measure=Measure.REQUESTS, remaining=7, milliseconds_ago=2_500
    )


def test_a_refusal_of_the_api_tells_it_too(
    api: AnthropicSimulator, settled: list[Settlement]
) -> None:
    api.enqueue(Fail(status=429, headers=left(0, REQUESTS)))

    with pytest.raises(anthropic.RateLimitError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert settled[0].levels == (
        Level(
            measure=Measure.REQUESTS,
            remaining=0,
            milliseconds_ago=settled[0].levels[0].milliseconds_ago,
        ),
    )


def test_where_only_input_is_told_it_stands_for_the_tokens(
    api: AnthropicSimulator, settled: list[Settlement]
) -> None:
    api.enqueue(Fail(status=429, headers=left(55, INPUT_TOKENS)))

    with pytest.raises(anthropic.RateLimitError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert [(level.measure, level.remaining) for level in settled[0].levels] == [
        (Measure.TOKENS, 55)
    ]


@pytest.mark.parametrize("said", ["", "-1", "many", "1e3", "٣"])
@pytest.mark.parametrize("is_limit", [True, False])
def test_what_is_no_number_is_not_heard(
    api: AnthropicSimulator, settled: list[Settlement], said: str, is_limit: bool
) -> None:
    headers = left(5, REQUESTS, limit=said) if is_limit else left(said, REQUESTS)
    api.enqueue(Fail(status=429, headers=headers))

    with pytest.raises(anthropic.RateLimitError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert settled[0].levels == ()


@pytest.mark.parametrize("name", ["limit", "remaining"])
def test_half_of_what_there_is_to_tell_is_not_heard(
    api: AnthropicSimulator, settled: list[Settlement], name: str
) -> None:
    api.enqueue(Fail(status=429, headers={f"anthropic-ratelimit-requests-{name}": "5"}))

    with pytest.raises(anthropic.RateLimitError):
        ai_budget.client(max_retries=0).messages.create(**ASKED)

    assert settled[0].levels == ()


def test_the_sites_rate_follows_what_anthropic_says_is_left(api: AnthropicSimulator) -> None:
    """Others may use the same key."""
    api.enqueue(Reply(headers=left(0, REQUESTS)))
    with override("*", requests_per_minute=1_000):
        ask()
        with pytest.raises(ai_budget.RateLimited, match=r"limit of \*"):
            ask()


@pytest.mark.parametrize("of", [REQUESTS, TOKENS, INPUT_TOKENS])
def test_the_smaller_limit_of_one_model_says_nothing_about_the_others(
    api: AnthropicSimulator, of: str
) -> None:
    """Anthropic limits each model by itself, and the site's rate spans all of them."""
    api.enqueue(Fail(status=429, headers=left(0, of, limit=99_999)))
    with override("*", requests_per_minute=100_000, tokens_per_minute=100_000):
        with pytest.raises(anthropic.RateLimitError):
            ai_budget.client(max_retries=0).messages.create(**ASKED)
        ask()

    assert len(api.requests) == 2


@pytest.mark.parametrize("of", [REQUESTS, TOKENS, INPUT_TOKENS])
def test_a_limit_as_large_as_the_sites_rate_is_believed(api: AnthropicSimulator, of: str) -> None:
    api.enqueue(Fail(status=429, headers=left(0, of, limit=100_000)))
    with override("*", requests_per_minute=100_000, tokens_per_minute=100_000):
        with pytest.raises(anthropic.RateLimitError):
            ai_budget.client(max_retries=0).messages.create(**ASKED)
        with pytest.raises(ai_budget.RateLimited, match=r"limit of \*"):
            ask()
