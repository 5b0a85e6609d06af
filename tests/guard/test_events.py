"""A message taken apart into the events of a stream, and put together again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget.guard.events import Assembly, encoded, events_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
INPUTS = st.dictionaries(TEXTS, JSON, max_size=3)
BLOCKS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
    st.fixed_dictionaries(
        {
            "type": st.just("text"),
            "text": TEXTS,
            "citations": st.lists(st.fixed_dictionaries({"cited_text": TEXTS}), min_size=1),
        }
    ),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": TEXTS, "signature": TEXTS}),
    st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": TEXTS}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": TEXTS, "name": TEXTS, "input": INPUTS}
    ),
    st.fixed_dictionaries({"type": st.just("web_search_tool_result"), "content": JSON}),
)
MESSAGES = st.fixed_dictionaries(
    {
        "id": st.just("msg_1"),
        "type": st.just("message"),
        "role": st.just("assistant"),
        "model": TEXTS,
        "content": st.lists(BLOCKS, max_size=4),
        "stop_reason": st.sampled_from(["end_turn", "max_tokens", "tool_use"]),
        "stop_sequence": st.none() | TEXTS,
        "usage": st.fixed_dictionaries(
            {"input_tokens": st.integers(0), "output_tokens": st.just(1)}
        ),
    }
)


@given(MESSAGES)
def test_a_message_comes_back_from_its_events_as_it_was(message: dict[str, Any]) -> None:
    assembly = Assembly()

    for event in events_of(message):
        assembly.see(json.loads(encoded(event).partition(b"data: ")[2]))

    assert assembly.message == message


@given(MESSAGES, st.integers(0, 50))
def test_a_stream_that_is_not_whole_is_no_message(message: dict[str, Any], seen: int) -> None:
    assembly = Assembly()

    for event in list(events_of(message))[:-1][:seen]:
        assembly.see(event)

    assert assembly.message is None


@pytest.mark.parametrize(
    "strange",
    [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "video_delta", "v": 1}},
        {"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta", "text": "x"}},
        {"type": "error", "error": {"type": "overloaded_error"}},
        {"type": "a_new_event"},
        {"no": "type"},
    ],
)
def test_what_is_not_understood_makes_it_no_message(strange: dict[str, Any]) -> None:
    message = {"content": [{"type": "text", "text": "Hi"}], "usage": {}, "stop_reason": "end_turn"}
    events = list(events_of(message))
    assembly = Assembly()

    for event in [*events[:2], strange, *events[2:]]:
        assembly.see(event)

    assert assembly.message is None
