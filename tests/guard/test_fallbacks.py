"""Server-side fallbacks: an answer is priced at the model that gave it."""

from __future__ import annotations

import anthropic
import pytest

import ai_budget
from ai_budget.models import CallLog
from ai_budget.testing import AnthropicSimulator, Reply, override_budget

pytestmark = pytest.mark.django_db

USAGE = {"input_tokens": 9, "output_tokens": 7}


def ask(api: AnthropicSimulator, *, stream: bool) -> CallLog:
    client = ai_budget.client(feature="chat")
    events = client.beta.messages.create(
        model="claude-opus-5-5",
        max_tokens=20,
        messages=[{"role": "user", "content": "Hello"}],
        fallbacks=[{"model": "claude-haiku-5-5"}],
        stream=stream,
    )
    if isinstance(events, anthropic.Stream):
        list(events)
    return CallLog.objects.get()


@pytest.mark.parametrize("stream", [False, True])
def test_the_fallback_that_answered_is_priced_at_its_own_rate(
    anthropic_api: AnthropicSimulator, stream: bool
) -> None:
    anthropic_api.enqueue(Reply(text="Hi", model="claude-haiku-5-5", usage=USAGE))

    row = ask(anthropic_api, stream=stream)

    assert row.cost_nanousd == ai_budget.price("claude-haiku-5-5", USAGE)


@pytest.mark.parametrize("stream", [False, True])
def test_an_iteration_without_a_model_is_the_answers_own(
    anthropic_api: AnthropicSimulator, stream: bool
) -> None:
    entries = [{"type": "compaction", **USAGE}, {"type": "message", **USAGE}]
    anthropic_api.enqueue(
        Reply(text="Hi", model="claude-haiku-5-5", usage={**USAGE, "iterations": entries})
    )

    row = ask(anthropic_api, stream=stream)

    assert row.cost_nanousd == 2 * ai_budget.price("claude-haiku-5-5", USAGE)


@pytest.mark.parametrize("cap", [None, 40])
@pytest.mark.parametrize("asked", ["many", 2.5, [9], True])
def test_a_fallback_whose_max_tokens_is_no_number_is_refused(
    anthropic_api: AnthropicSimulator, cap: int | None, asked: object
) -> None:
    with (
        override_budget("chat", max_tokens=cap),
        pytest.raises(ai_budget.UnboundedCall, match="max_tokens"),
    ):
        ai_budget.ask(
            "Hello",
            feature="chat",
            extra_body={"fallbacks": [{"model": "claude-haiku-5-5", "max_tokens": asked}]},
        )

    assert anthropic_api.requests == []
