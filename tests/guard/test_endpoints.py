"""No path past the gate: endpoints without a price, and bodies that the guard cannot read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import pytest

import ai_budget
from ai_budget.exceptions import FeatureDisabled, UnboundedCall, UnpricedEndpoint
from ai_budget.testing import AnthropicSimulator, override_budget
from tests.guard.books import MODEL, assert_exact, bill, in_db, only_row, rows, statuses

pytestmark = pytest.mark.django_db

MESSAGES: list[Any] = [{"role": "user", "content": "Hello there"}]
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": MESSAGES}
RAW: dict[str, Any] = {"cast_to": httpx2.Response}

UNPRICED: dict[str, Callable[[anthropic.Anthropic], object]] = {
    "sessions": lambda client: client.beta.sessions.create(agent="a", environment_id="e"),
    "events of a session": lambda client: client.beta.sessions.events.send("s", events=[]),
    "deployments": lambda client: client.beta.deployments.run("d"),
    "an old endpoint": lambda client: client.post("/v1/complete", body=ASKED, **RAW),
    "a new endpoint": lambda client: client.post("/v1/dreams/now", body=ASKED, **RAW),
    "a new version": lambda client: client.post("/v2/messages", body=ASKED, **RAW),
    "an address": lambda client: client.post(f"{client.base_url}/v1/dreams", body=ASKED, **RAW),
    "an escape": lambda client: client.post("/v1%2Fdreams", body=ASKED, **RAW),
    "doubled slashes": lambda client: client.post("//v1//dreams", body=ASKED, **RAW),
    "a detour": lambda client: client.post("/v1/messages/../dreams", body=ASKED, **RAW),
    "a path of a platform": lambda client: client.post(f"/model/{MODEL}/invoke", body=ASKED, **RAW),
    "put": lambda client: client.put("/v1/responses", body=ASKED, **RAW),
    "patch": lambda client: client.patch("/v1/responses", body=ASKED, **RAW),
}


@pytest.mark.parametrize("way", UNPRICED)
def test_what_has_no_price_is_refused_before_it_is_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic, way: str
) -> None:
    with pytest.raises(UnpricedEndpoint, match="what it costs cannot be told"):
        UNPRICED[way](client)

    assert api.requests == []
    assert rows() == []


@pytest.mark.django_db(transaction=True)
async def test_what_has_no_price_is_refused_to_async_clients(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    with pytest.raises(UnpricedEndpoint):
        await async_client.beta.deployments.run("d")

    assert api.requests == []
    assert await in_db(rows) == []


def test_a_feature_may_be_allowed_what_has_no_price(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with (
        override_budget("chat", allow_unbounded=True),
        pytest.raises(anthropic.NotFoundError),
    ):
        client.beta.deployments.run("d")

    assert [request.path for request in api.requests] == ["/v1/deployments/d/run"]


@pytest.mark.django_db(transaction=True)
async def test_an_async_feature_may_be_allowed_what_has_no_price(
    api: AnthropicSimulator, async_client: anthropic.AsyncAnthropic
) -> None:
    from ai_budget.models import FeatureBudget

    await FeatureBudget.objects.acreate(name="chat", allow_unbounded=True)

    with pytest.raises(anthropic.NotFoundError):
        await async_client.beta.deployments.run("d")


def test_a_paused_feature_is_not_allowed_it(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with (
        override_budget("chat", allow_unbounded=True, enabled=False),
        pytest.raises(FeatureDisabled),
    ):
        client.beta.deployments.run("d")

    assert api.requests == []


def test_reading_and_deleting_passes(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    for read in (
        lambda: client.messages.batches.retrieve("b"),
        lambda: client.messages.batches.delete("b"),
        lambda: client.get("/v1/of-tomorrow", **RAW),
    ):
        try:
            read()
        except anthropic.NotFoundError:
            continue

    assert [request.method for request in api.requests] == ["GET", "DELETE", "GET"]
    assert rows() == []


# Bodies


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.messages.create(**ASKED, extra_body={"stream": True}),
        lambda client: client.messages.create(**ASKED, stream=True, extra_body={"stream": False}),
        lambda client: client.post("/v1/messages", body={**ASKED, "stream": True}, **RAW),
    ],
    ids=["unasked", "denied", "posted"],
)
def test_a_stream_that_cannot_be_followed_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic, call: Callable[[Any], object]
) -> None:
    with pytest.raises(UnboundedCall, match="stream=True"):
        call(client)

    assert api.requests == []
    assert rows() == []


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b'{"model": "claude-opus-5-5"}'},
        {"content": b""},
        {"body": [ASKED]},
        {"body": "text"},
        {"body": None},
        {},
    ],
    ids=["bytes", "no bytes", "a list", "text", "null", "nothing"],
)
def test_a_body_that_the_guard_cannot_read_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic, sent: dict[str, Any]
) -> None:
    with pytest.raises(UnboundedCall, match="the guard can read"):
        client.post("/v1/messages", **sent, **RAW)

    assert api.requests == []
    assert rows() == []


def test_a_model_in_the_extra_body_is_the_one_that_is_priced(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    client.messages.create(**ASKED, extra_body={"model": "claude-opus-5-5", "max_tokens": 4_000})

    row = only_row()
    assert (row.model, row.max_tokens) == ("claude-opus-5-5", 4_000)
    assert row.reserved_nanousd > 4_000 * 20_000
    assert_exact(api)


def test_a_prompt_in_the_extra_body_is_bounded(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    client.messages.create(**ASKED)
    client.messages.create(**ASKED, extra_body={"system": "x" * 10_000})

    small, large = rows()
    assert large.reserved_nanousd - small.reserved_nanousd >= 10_000 * 100
    assert (large.cost_nanousd or 0) <= large.reserved_nanousd


def test_a_parameter_that_nobody_knows_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with pytest.raises(UnboundedCall, match="teleport"):
        client.messages.create(**ASKED, extra_body={"teleport": True})

    assert api.requests == []


@pytest.mark.parametrize("value", [10.5, "100", True, -1, [5], {"value": 5}])
def test_a_max_tokens_that_is_no_count_is_refused(
    api: AnthropicSimulator, client: anthropic.Anthropic, value: Any
) -> None:
    with override_budget("chat", max_tokens=10), pytest.raises(UnboundedCall, match="max_tokens"):
        client.messages.create(**ASKED, extra_body={"max_tokens": value})

    assert api.requests == []


def test_iterators_in_a_request_are_sent_as_they_were_bounded(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    content = iter([{"type": "text", "text": "word " * 200}])
    messages = iter([{"role": "user", "content": content}])

    client.messages.create(model=MODEL, max_tokens=5, messages=messages)  # type: ignore[arg-type]

    assert assert_exact(api).input_tokens > 200


def test_a_request_object_is_not_changed(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    asked = {**ASKED, "max_tokens": 500, "messages": [dict(MESSAGES[0])]}
    with override_budget("chat", max_tokens=20):
        client.post("/v1/messages", body=asked, **RAW)

    assert asked == {**ASKED, "max_tokens": 500}
    assert (api.requests[0].body or {})["max_tokens"] == 20


# Middleware of the SDK


def test_options_keep_the_guard(api: AnthropicSimulator, client: anthropic.Anthropic) -> None:
    client.with_options(timeout=5).copy(max_retries=1).messages.create(**ASKED)

    assert_exact(api)


def test_options_that_empty_the_middleware_take_the_guard_off(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    client.with_options(middleware=[]).messages.create(**ASKED)

    assert len(api.billed) == 1
    assert rows() == []


def test_middleware_of_a_client_that_is_guarded_last_runs_around_the_guard(
    api: AnthropicSimulator,
) -> None:
    seen: list[int] = []

    def watch(request: anthropic.APIRequest, call_next: Any) -> Any:
        seen.append(len(statuses()))
        response = call_next(request)
        seen.append(len(statuses()))
        return response

    bare = anthropic.Anthropic(api_key="key", base_url=api.base_url, middleware=[watch])
    with bare:
        ai_budget.guard(bare, feature="chat").messages.create(**ASKED)

    assert seen == [0, 1]


def test_middleware_around_the_guard_cannot_send_what_it_has_not_read(
    api: AnthropicSimulator,
) -> None:
    def replace(request: anthropic.APIRequest, call_next: Any) -> Any:
        changed = request.copy()
        changed.options.content = b'{"model": "claude-opus-5-5"}'
        return call_next(changed)

    bare = anthropic.Anthropic(api_key="key", base_url=api.base_url, middleware=[replace])
    with bare, pytest.raises(UnboundedCall):
        ai_budget.guard(bare, feature="chat").messages.create(**ASKED)

    assert api.requests == []


def test_each_request_of_middleware_around_the_guard_is_an_attempt(
    api: AnthropicSimulator,
) -> None:
    def twice(request: anthropic.APIRequest, call_next: Any) -> Any:
        call_next(request)
        return call_next(request)

    bare = anthropic.Anthropic(api_key="key", base_url=api.base_url, middleware=[twice])
    with bare:
        ai_budget.guard(bare, feature="chat").messages.create(**ASKED)

    assert statuses() == ["settled", "settled"]
    assert len(api.billed) == 2


def test_middleware_that_is_added_later_runs_inside_the_guard(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    seen: list[str] = []

    def watch(request: anthropic.APIRequest, call_next: Any) -> Any:
        seen.extend(statuses())
        return call_next(request)

    client.with_options(middleware=[*client.middleware, watch]).messages.create(**ASKED)

    assert seen == ["reserved"]
    assert_exact(api)


def test_an_error_of_middleware_inside_the_guard_says_nothing_of_what_was_sent(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def fail(request: anthropic.APIRequest, call_next: Any) -> Any:
        call_next(request)
        raise LookupError("after the answer")

    inside = client.with_options(middleware=[*client.middleware, fail])

    with pytest.raises(LookupError):
        inside.messages.create(**ASKED)

    assert statuses() == ["estimated"]
    assert (only_row().cost_nanousd or 0) >= sum(bill(api))


def test_an_answer_of_middleware_inside_the_guard_is_booked_at_the_bound(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    def replace(request: anthropic.APIRequest, call_next: Any) -> Any:
        return "an answer of its own"

    inside = client.with_options(middleware=[*client.middleware, replace])

    answer: object = inside.messages.create(**ASKED)

    assert answer == "an answer of its own"
    assert statuses() == ["estimated"]
