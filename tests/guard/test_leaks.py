"""What people ask, what they are told, and keys: in no log, error, repr or row of ours."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from django.apps import apps

import ai_budget
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.ledger.base import Ledger
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    CutStream,
    Fail,
    Reply,
    StreamError,
    override_budget,
)
from tests.guard.books import MODEL, ledger_of_the_run, rows

pytestmark = pytest.mark.django_db

SECRET = "Xyzzy-7f3a"
"""In everything that is sent and answered."""

TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": f"Knows of {SECRET}",
    "input_schema": {"type": "object", "properties": {SECRET: {"type": "string"}}},
}
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 60,
    "system": f"You know of {SECRET}",
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": f"What is {SECRET}?"},
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"q": SECRET}}
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": SECRET}],
        },
    ],
}
ANSWER: list[Any] = [
    {"type": "text", "text": f"It is {SECRET} " * 8},
    {"type": "tool_use", "id": "toolu_2", "name": "look_up", "input": {"q": SECRET}},
]


@pytest.fixture
def client(api: AnthropicSimulator) -> Iterator[anthropic.Anthropic]:
    key = f"sk-ant-{SECRET}"
    with anthropic.Anthropic(api_key=key, base_url=api.base_url, max_retries=0) as bare:
        yield ai_budget.guard(bare, feature="chat")


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    # The SDK's own logger writes whole requests at this level; ours must not.
    caplog.set_level(logging.DEBUG, "ai_budget")


def assert_secret_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    formatter = logging.Formatter()
    for record in caplog.records:
        if record.name.startswith("ai_budget") and "testing" not in record.name:
            assert SECRET not in formatter.format(record)
            assert SECRET not in repr(record.__dict__)


def assert_secret_in_no_row() -> None:
    for model in apps.get_app_config("ai_budget").get_models():
        for row in model._default_manager.values():
            assert SECRET not in repr(row)


def stream(client: anthropic.Anthropic) -> None:
    list(client.messages.create(**ASKED, stream=True))


def create(client: anthropic.Anthropic) -> None:
    client.messages.create(**ASKED)


def leave(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASKED) as answer:
        for text in answer.text_stream:
            if text:
                return


def error_of(
    call: Callable[[anthropic.Anthropic], None], client: anthropic.Anthropic
) -> Exception | None:
    try:
        call(client)
    except Exception as error:
        return error
    return None


OUTCOMES: dict[str, tuple[Any, Callable[[anthropic.Anthropic], None]]] = {
    "answered": (Reply(content=ANSWER), create),
    "streamed": (Reply(content=ANSWER), stream),
    "left": (Reply(content=ANSWER, chunk_delay=0.005), leave),
    "refused by the API": (Fail(status=400, message=f"No {SECRET}"), create),
    "lost": (CutBeforeResponse(), create),
    "cut": (CutStream(after_events=6, reply=Reply(content=ANSWER)), stream),
    "failed": (StreamError(after_events=6, message=SECRET, reply=Reply(content=ANSWER)), stream),
    "unreadable": (Reply(content=ANSWER, usage={"cache_read_input_tokens": SECRET}), create),
    "unpriceable": (
        Reply(content=ANSWER, usage={"iterations": [{"type": "new"}], "new": SECRET}),
        create,
    ),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("books", ["open", "shut"])
def test_no_outcome_of_a_call_leaves_what_was_said_behind(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    books: str,
) -> None:
    def fail(self: Ledger, *args: Any) -> None:
        raise OSError(repr(args))

    if books == "shut":
        monkeypatch.setattr(ledger_of_the_run(), "settle", fail)
    step, call = OUTCOMES[outcome]
    api.enqueue(step)

    # Whatever it raises is the SDK's.
    assert not isinstance(error_of(call, client), AIBudgetError)

    assert len(rows()) == 1
    assert_secret_in_no_log(caplog)
    assert_secret_in_no_row()


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no money": ({"daily_limit_usd": 0}, {}),
    "paused": ({"enabled": False}, {}),
    "no price": ({}, {"model": "claude-of-tomorrow"}),
    "no bound": ({}, {"extra_body": {"teleport": SECRET}}),
    "no count": ({}, {"extra_body": {"max_tokens": SECRET}}),
    "an unknown tool": ({}, {"tools": [{"type": "server_of_tomorrow", "name": SECRET}]}),
    "unbounded search": (
        {},
        {"tools": [{"type": "web_search_20250305", "name": "web_search", "x": SECRET}]},
    ),
    "unfollowed": ({}, {"extra_body": {"stream": True}}),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_no_refusal_repeats_what_was_asked(
    api: AnthropicSimulator,
    client: anthropic.Anthropic,
    caplog: pytest.LogCaptureFixture,
    refusal: str,
) -> None:
    budget, changes = REFUSALS[refusal]

    with override_budget("chat", **budget), pytest.raises(AIBudgetError) as caught:
        client.messages.create(**{**ASKED, **changes})

    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        assert SECRET not in repr(error)
        error = error.__cause__ or error.__context__
    assert api.requests == []
    assert_secret_in_no_log(caplog)
    assert_secret_in_no_row()


def test_a_refused_endpoint_is_named_without_its_query(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    with pytest.raises(ai_budget.UnpricedEndpoint) as caught:
        client.post(f"/v1/complete?q={SECRET}", body={"prompt": SECRET}, cast_to=object)

    assert SECRET not in str(caught.value)


def test_nothing_of_ours_shows_what_a_call_in_flight_says(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    api.enqueue(Reply(content=ANSWER))
    with ai_budget.charge(feature="chat"), client.messages.stream(**ASKED) as answer:
        for text in answer.text_stream:
            if text:
                break
        ours = [one for one in gc.get_objects() if _is_ours(one)]
        assert any(isinstance(one, OpenAttempt) for one in ours)
        for one in ours:
            assert SECRET not in repr(one), type(one)


def test_a_streamed_text_in_hand_does_not_show_itself(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text=f"It is {SECRET} " * 8))

    with ai_budget.stream(f"What is {SECRET}?") as answer:
        assert SECRET in "".join(answer)
        assert SECRET not in repr(answer)


def test_an_estimate_does_not_show_what_it_is_of(api: AnthropicSimulator) -> None:
    assert SECRET not in repr(ai_budget.estimate(f"What is {SECRET}?", system=SECRET))


def _is_ours(one: object) -> bool:
    module = str(type(one).__module__)
    return module.startswith("ai_budget") and not module.startswith("ai_budget.testing")


def test_an_answer_does_not_show_its_text_unasked(anthropic_api: AnthropicSimulator) -> None:
    anthropic_api.enqueue(Reply(text="a private answer"))

    answer = ai_budget.ask("Hello", feature="chat")

    assert "a private answer" in str(answer)
    assert "private" not in repr(answer)
