"""Counting a prompt before refusing it: limits fill up, they do not jam."""

from __future__ import annotations

import base64
import types
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ai_budget
from ai_budget import periods
from ai_budget.guard import middleware
from ai_budget.guard.deciding import Counted, Outgoing, decide
from ai_budget.guard.rules import read_rules
from ai_budget.ledger import base as ledgers
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.pricing.bound import (
    BLOCKS,
    COUNTED_BLOCKS,
    COUNTED_PARAMETERS,
    PARAMETERS,
    UNCOUNTED_PARAMETERS,
    bound,
    count_request,
)
from ai_budget.pricing.rates import resolve
from ai_budget.testing import AnthropicSimulator, Fail, Reply, override_budget
from ai_budget.values import Bound, Charge
from tests.factories import UserFactory
from tests.guard.books import MODEL, assert_balanced, assert_exact, in_db, only_row, refusals, rows

pytestmark = pytest.mark.django_db

LONG = "word " * 400
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 50,
    "messages": [{"role": "user", "content": LONG}],
}
BETWEEN = Decimal("0.00015")
"""A limit that does not hold what the bytes of LONG could cost, but what its tokens cost."""

TOO_SMALL = Decimal("0.00003")
"""A limit that does not hold the output, however short the prompt."""


def paths(api: AnthropicSimulator) -> list[str]:
    """What was asked, in order."""
    return [request.path.removeprefix("/v1/messages") for request in api.requests]


COUNTED = ["/count_tokens", ""]


# Where it helps


def test_a_prompt_is_counted_where_its_bytes_do_not_fit(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with override_budget("chat", daily_limit_usd=BETWEEN):
        client.messages.create(**ASKED)

    assert paths(api) == COUNTED
    row = assert_exact(api)
    counted = api.billed[0].usage["input_tokens"]
    assert row.decision == f"counted {counted} input tokens"
    assert row.reserved_nanousd < 150_000
    assert refusals() == {}


@pytest.mark.parametrize("way", ["ask", "stream", "stream=True", "beta", "raw", "unread"])
def test_it_is_counted_whatever_the_way(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    with override_budget("chat", daily_limit_usd=BETWEEN):
        match way:
            case "ask":
                ai_budget.ask(LONG, feature="chat", max_tokens=50)
            case "stream":
                with client.messages.stream(**ASKED) as stream:
                    stream.get_final_message()
            case "stream=True":
                list(client.messages.create(**ASKED, stream=True))
            case "beta":
                client.beta.messages.create(**ASKED, betas=["context-1m-2025-08-07"])
            case "raw":
                client.messages.with_raw_response.create(**ASKED)
            case _:
                with client.messages.with_streaming_response.create(**ASKED) as response:
                    response.read()

    assert paths(api) == COUNTED
    assert_exact(api)
    count, message = api.requests
    assert count.query == message.query
    for name in ("x-api-key", "anthropic-version", "anthropic-beta"):
        assert count.headers.get(name) == message.headers.get(name)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ["aask", "create", "stream"])
async def test_it_is_counted_for_async_callers(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic, way: str
) -> None:
    await FeatureBudget.objects.acreate(name="chat", daily_limit_usd=BETWEEN)

    match way:
        case "aask":
            await ai_budget.aask(LONG, feature="chat", max_tokens=50)
        case "create":
            await async_client.messages.create(**ASKED)
        case _:
            async with async_client.messages.stream(**ASKED) as stream:
                await stream.get_final_message()

    assert paths(api) == COUNTED
    await in_db(assert_exact, api)


def test_it_is_counted_for_a_rate_of_tokens(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with override_budget("chat", tokens_per_minute=1_000):
        client.messages.create(**ASKED)

    assert paths(api) == COUNTED


def test_it_is_counted_for_a_users_money(api: AnthropicSimulator) -> None:
    user: Any = UserFactory.create()
    UserQuota.objects.create(user=user, daily_limit_usd=BETWEEN)

    ai_budget.ask(LONG, feature="chat", user=user, max_tokens=50)

    assert paths(api) == COUNTED


def test_a_pdf_is_counted_instead_of_taking_the_whole_window(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQ="}
    content = [{"type": "document", "source": source}, {"type": "text", "text": "Sum it up"}]
    with override_budget("chat", daily_limit_usd=Decimal("0.001")):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": content}]})

    assert paths(api) == COUNTED
    assert only_row().decision.startswith("counted")


def test_a_retry_is_counted_anew(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001))
    with override_budget("chat", daily_limit_usd=BETWEEN):
        client.messages.create(**ASKED)

    assert paths(api) == [*COUNTED, *COUNTED]


def test_the_count_asks_for_what_the_model_reads_and_nothing_else(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    asked: dict[str, Any] = {
        **ASKED,
        "system": "Be brief.",
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u"},
    }
    with override_budget("chat", daily_limit_usd=Decimal("0.0004")):
        client.messages.create(**asked)

    count, message = (request.body or {} for request in api.requests)
    assert count == {
        name: message[name]
        for name in ("model", "messages", "system", "tools", "tool_choice", "thinking")
    }


def test_the_count_is_asked_of_the_model_that_would_answer(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    rungs = [(1, MODEL)]
    with override_budget("chat", daily_limit_usd=BETWEEN, rungs=rungs):
        ai_budget.ask("Hello", feature="chat", max_tokens=50)
        api.reset()
        client.messages.create(**{**ASKED, "model": "claude-opus-5-5"})

    assert paths(api) == COUNTED
    assert {(request.body or {})["model"] for request in api.requests} == {MODEL}


# Where it does not


def test_what_fits_is_not_counted(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    client.messages.create(**ASKED)

    assert paths(api) == [""]


@pytest.mark.parametrize(
    "limit",
    [
        {"daily_limit_usd": TOO_SMALL},
        {"daily_limit_usd": 0},
        {"requests_per_minute": 0},
        {"tokens_per_minute": 60},
    ],
)
def test_a_limit_that_no_count_would_change_refuses_at_once(
    api: AnthropicSimulator, client: anthropic.Anthropic, limit: dict[str, Any]
) -> None:
    with (
        override_budget("chat", **limit),
        pytest.raises(ai_budget.exceptions.LimitReached),
    ):
        client.messages.create(**ASKED)

    assert api.requests == []
    assert refusals() == {"feature:chat": 1}


def test_a_prompt_that_would_not_fit_by_a_hopeful_count_is_refused_at_once(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    """A flood of calls over the limit makes no flood of requests."""
    limit: dict[str, Any] = {"daily_limit_usd": Decimal("0.00004")}
    with override_budget("another", **limit):
        ai_budget.ask("Hello", feature="another", max_tokens=50)
    assert paths(api) == COUNTED
    api.reset()

    with override_budget("chat", **limit), pytest.raises(ai_budget.BudgetExceeded):
        client.messages.create(**ASKED)

    assert api.requests == []


def test_the_bytes_of_a_file_say_nothing_of_its_tokens(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": "A" * 400_000}
    content = [{"type": "document", "source": source}, {"type": "text", "text": "Sum it up"}]

    with override_budget("chat", daily_limit_usd=Decimal("0.001")):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": content}]})

    assert paths(api) == COUNTED


def test_a_quota_of_calls_refuses_at_once(api: AnthropicSimulator) -> None:
    UserQuota.objects.create(daily_calls=0)

    with pytest.raises(ai_budget.QuotaExceeded):
        ai_budget.ask(LONG, feature="chat", subject="acme")

    assert api.requests == []


def test_a_prompt_that_is_too_long_by_its_count_is_refused_once(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with (
        override_budget("chat", daily_limit_usd=Decimal("0.00007")),
        pytest.raises(ai_budget.BudgetExceeded) as caught,
    ):
        client.messages.create(**ASKED)

    assert paths(api) == ["/count_tokens"]
    assert caught.value.requested < 150_000  # by the count, not by the bytes
    assert refusals() == {"feature:chat": 1}
    assert rows() == []


@pytest.mark.parametrize("failure", [Fail(status=400), Fail(status=529), Fail(status=429)])
def test_where_counting_fails_the_refusal_stands(
    api: AnthropicSimulator, client: anthropic.Anthropic, failure: Fail
) -> None:
    api.count_failure = failure
    with (
        override_budget("chat", daily_limit_usd=BETWEEN),
        pytest.raises(ai_budget.BudgetExceeded) as caught,
    ):
        client.messages.create(**ASKED)

    assert paths(api) == ["/count_tokens"]
    assert caught.value.requested > 150_000
    assert caught.value.__cause__ is None
    assert refusals() == {"feature:chat": 1}


@pytest.mark.django_db(transaction=True)
async def test_where_counting_fails_async_callers_are_refused(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    await FeatureBudget.objects.acreate(name="chat", daily_limit_usd=BETWEEN)
    api.count_failure = Fail(status=529)

    with pytest.raises(ai_budget.BudgetExceeded):
        await async_client.messages.create(**ASKED)

    assert paths(api) == ["/count_tokens"]


def test_bedrock_does_not_count(api: AnthropicSimulator) -> None:
    bare = anthropic.AnthropicBedrock(
        aws_region="eu-west-1", aws_access_key="a", aws_secret_key="s", base_url=api.base_url
    )
    with (
        bare,
        override_budget("chat", daily_limit_usd=Decimal("0.002")),
        pytest.raises(ai_budget.BudgetExceeded),
    ):
        ai_budget.guard(bare, feature="chat").messages.create(
            **{**ASKED, "model": "anthropic.claude-haiku-4-5-20251001-v1:0"}
        )

    assert api.requests == []
    assert refusals() == {"feature:chat": 1}


def test_the_caller_may_leave_while_the_prompt_is_counted(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ai_budget.guard.middleware._counted", interrupt)
    with override_budget("chat", daily_limit_usd=BETWEEN), pytest.raises(KeyboardInterrupt):
        client.messages.create(**ASKED)

    assert rows() == []
    assert_balanced()


# With waiting


@pytest.mark.parametrize(
    "held_tokens",
    [
        pytest.param(62, id="a shorter prompt might fit now"),
        pytest.param(140, id="the first bound never fits"),
    ],
)
def test_what_was_counted_waits_with_the_smaller_bound(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    monkeypatch: pytest.MonkeyPatch,
    held_tokens: int,
) -> None:
    heard: list[list[str]] = []

    def read(seconds: float) -> None:
        heard.append(paths(api))
        list(held)

    with override_budget("chat", daily_limit_usd=BETWEEN):
        held = client.messages.create(**{**ASKED, "max_tokens": held_tokens}, stream=True)
        api.reset()
        monkeypatch.setattr(middleware, "time", types.SimpleNamespace(sleep=read))
        ai_budget.ask(LONG, feature="chat", max_tokens=20, wait=1)

    assert heard == [["/count_tokens"]]
    assert paths(api) == COUNTED
    assert rows()[-1].decision.startswith("counted")


def test_a_call_that_can_only_wait_is_not_counted_before(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[str]] = []

    def read(seconds: float) -> None:
        heard.append(paths(api))
        list(held)

    with override_budget("chat", daily_limit_usd=BETWEEN):
        held = client.messages.create(**{**ASKED, "max_tokens": 140}, stream=True)
        api.reset()
        monkeypatch.setattr(middleware, "time", types.SimpleNamespace(sleep=read))
        ai_budget.ask("Hello", feature="chat", max_tokens=100, wait=1)

    assert heard == [[]]


def test_a_count_that_could_only_help_later_is_not_asked_for_who_does_not_wait(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with override_budget("chat", daily_limit_usd=BETWEEN):
        held = client.messages.create(**{**ASKED, "max_tokens": 140}, stream=True)
        api.reset()
        with pytest.raises(ai_budget.BudgetExceeded):
            ai_budget.ask(LONG, feature="chat", max_tokens=20)
        list(held)

    assert api.requests == []


@pytest.mark.parametrize(
    "other", [{"model": "claude-opus-5-5"}, {"messages": [{"role": "user", "content": "Hi"}]}]
)
def test_the_count_of_another_prompt_or_model_bounds_nothing(other: dict[str, Any]) -> None:
    """The ladder may have put another model in its place since it was counted."""
    charge, ledger, at = Charge(feature="chat"), ledgers.current(), periods.now()
    rules = read_rules(charge, at=at)
    outgoing = Outgoing(
        body=ASKED, stream=False, retries=0, key="", timeout=None, provider="anthropic", region=""
    )
    request = count_request(ASKED) or {}

    def decided(counted: Counted | None) -> Bound:
        return decide(outgoing, charge, rules, ledger=ledger, at=at, counted=counted).bound

    assert decided(Counted(request={**request, **other}, tokens=5)) == decided(None)
    assert decided(Counted(request=request, tokens=5)) != decided(None)


# How far a limit is used


def use_up(api: AnthropicSimulator, *, counting: bool) -> Decimal:
    """Make ordinary calls one by one until the limit of 50 of them refuses; return the share."""
    prompt = "Please read this report and say what matters in it. " * 160
    api.default = Reply(output_tokens=100)
    mean = only_cost(api, prompt)
    if not counting:
        api.count_failure = Fail(status=400)
    with override_budget("reports", daily_limit_usd=50 * mean):
        while True:
            try:
                ai_budget.ask(prompt, feature="reports", max_tokens=200)
            except ai_budget.BudgetExceeded as error:
                return Decimal(error.spent) / error.limit


def only_cost(api: AnthropicSimulator, prompt: str) -> Decimal:
    return ai_budget.ask(prompt, feature="another", max_tokens=200).cost


def test_a_limit_of_50_calls_is_used_to_95_percent(api: AnthropicSimulator) -> None:
    assert use_up(api, counting=True) >= Decimal("0.95")
    assert_balanced()


def test_without_counting_it_would_not_be(api: AnthropicSimulator) -> None:
    assert use_up(api, counting=False) < Decimal("0.95")


# What a count sees

IMAGE = {
    "type": "image",
    "source": {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(b"x").decode(),
    },
}


def asking(*blocks: Any, **parameters: Any) -> dict[str, Any]:
    return {**ASKED, "messages": [{"role": "user", "content": list(blocks)}], **parameters}


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


TEXT = {"type": "text", "text": "Hello"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "body",
    [
        asking(TEXT),
        asking(IMAGE),
        asking(document(type="text", media_type="text/plain", data="Hello")),
        asking(document(type="content", content=[TEXT, IMAGE])),
        asking(document(type="base64", media_type="application/pdf", data="JVBERi0=")),
        asking({"type": "tool_result", "tool_use_id": "t", "content": [TEXT, IMAGE]}),
        asking({"type": "tool_result", "tool_use_id": "t", "content": "done"}),
        asking(TEXT, tools=[{"name": "t", "input_schema": {}}, {"type": "bash_20250124"}]),
        asking(TEXT, output_config={"effort": "low"}, speed="fast", metadata={"user_id": "u"}),
        asking({**TEXT, "cache_control": {"type": "ephemeral"}}, system=[TEXT]),
        asking(TEXT, thread=None, container=None, mcp_servers=[]),
    ],
)
def test_a_prompt_that_a_count_sees_whole_is_countable(body: dict[str, Any]) -> None:
    request = count_request(body)

    assert request is not None
    assert request["messages"] == body["messages"]
    assert set(request) <= COUNTED_PARAMETERS


@pytest.mark.parametrize(
    "body",
    [
        asking({"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}),
        asking({"type": "image", "source": {"type": "file", "file_id": "file_1"}}),
        asking(document(type="url", url="https://example.com/a.pdf")),
        asking(document(type="file", file_id="file_1")),
        asking(document(type="content", content=[{"type": "container_upload"}])),
        asking({**document(type="text", data="a"), "citations": {"enabled": True}}),
        asking({"type": "thinking", "thinking": "hm", "signature": "s"}),
        asking({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}),
        asking({"type": "tool_result", "content": [{"type": "search_result"}]}),
        asking({"type": "of_tomorrow"}),
        asking(TEXT, tools=[{"type": "web_search_20250305", "name": "w", "max_uses": 1}]),
        asking(TEXT, tools=[{"type": "of_tomorrow"}]),
        asking(TEXT, mcp_servers=[{"url": "https://example.com"}]),
        asking(TEXT, thread={"type": "continue"}),
        asking(TEXT, container="c"),
        asking(TEXT, fallbacks=[{"model": "claude-opus-5-5"}]),
        asking(TEXT, compaction={"type": "auto"}),
        asking(TEXT, context_management={"edits": []}),
        asking(TEXT, of_tomorrow=1),
        asking(TEXT, system=[{"type": "of_tomorrow"}]),
    ],
)
def test_a_prompt_that_a_count_does_not_see_whole_is_never_counted(body: dict[str, Any]) -> None:
    assert count_request(body) is None
    unbounded = {"allow_unbounded": True}
    assert most(body, counted=1, **unbounded) == most(body, **unbounded)


def test_every_parameter_is_classified_for_counting() -> None:
    """The rest say nothing to the model: they are settings of the answer, or of the transport."""
    assert not COUNTED_PARAMETERS & UNCOUNTED_PARAMETERS
    assert PARAMETERS.keys() - COUNTED_PARAMETERS - UNCOUNTED_PARAMETERS == {
        "anthropic_beta",
        "anthropic_version",
        "betas",
        "billing_policy",
        "cache_control",
        "diagnostics",
        "fallback_credit_token",
        "inference_geo",
        "max_tokens",
        "metadata",
        "service_tier",
        "speed",
        "stop_sequences",
        "stream",
        "temperature",
        "top_k",
        "top_p",
        "user_profile_id",
        "workspace_id",
    }


def test_every_block_that_is_counted_has_a_rule_of_its_own() -> None:
    assert all(BLOCKS[kind] in ("bytes", "image", "document") for kind in COUNTED_BLOCKS)


# The bound by a count


def most(body: dict[str, Any], **options: Any) -> Bound:
    rates = resolve(body["model"], at=periods.now())
    return bound(body, rates, at=periods.now(), **options)


@given(st.integers(0, 3_000_000))
def test_a_count_never_widens_a_bound(counted: int) -> None:
    assert most(ASKED, counted=counted).nanousd <= most(ASKED).nanousd
    assert most(ASKED, counted=counted).input_tokens <= most(ASKED).input_tokens


@given(st.integers(0, 1_900))
def test_a_count_has_a_margin(counted: int) -> None:
    tokens = most(ASKED, counted=counted).input_tokens

    assert tokens >= min(counted + 64 + counted / 20, most(ASKED).input_tokens)


def test_a_counted_window_is_no_reason_any_more() -> None:
    body = asking(document(type="base64", media_type="application/pdf", data="JVBERi0="))

    assert most(body).reasons
    assert most(body, counted=2_000).reasons == ()


def test_a_count_may_spare_the_dearer_tier_of_long_prompts() -> None:
    long = {**ASKED, "messages": [{"role": "user", "content": "word " * 50_000}]}

    def price(found: Bound) -> Decimal:
        return Decimal(found.nanousd) / found.input_tokens

    assert price(most(long, counted=60_000)) < price(most(long)) / 2


def test_strange_content_is_not_counted() -> None:
    strange: Iterable[Any] = ({"type": kind} for kind in ("of_tomorrow", "text"))

    assert count_request(asking(*strange)) is None
