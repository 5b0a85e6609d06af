"""Conversations to trim, and what must be true of one that can be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from ai_budget.testing.request_checks import check_message_request

Talk = list[dict[str, Any]]

WORDS = "the quick brown fox jumps over the lazy dog and is written down by its keeper "


def talk(turns: int, *, words: str = WORDS) -> Talk:
    """A conversation of questions and answers; each of its messages is about 20 tokens long."""
    messages: Talk = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}: {words}"})
        messages.append({"role": "assistant", "content": f"Answer {turn}: {words}"})
    return messages


def question(text: str = "And now?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls(*ids: str) -> dict[str, Any]:
    """An answer that calls tools."""
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "Which tool?", "signature": "sig"},
        *({"type": "tool_use", "id": one, "name": "look_up", "input": {"q": one}} for one in ids),
    ]
    return {"role": "assistant", "content": blocks}


def results(*ids: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": one, "content": [{"type": "text", "text": one}]}
            for one in ids
        ],
    }


def searches(one: str) -> dict[str, Any]:
    """An answer in which a server's tool was called and has answered."""
    return {
        "role": "assistant",
        "content": [
            {"type": "server_tool_use", "id": one, "name": "web_search", "input": {"query": "x"}},
            {
                "type": "web_search_tool_result",
                "tool_use_id": one,
                "content": [
                    {
                        "type": "web_search_result",
                        "title": "A title",
                        "url": "https://example.com",
                        "encrypted_content": "c2VhbGVk",
                    }
                ],
            },
            {"type": "text", "text": "Found."},
        ],
    }


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    """Conversations that the API takes: parallel tools, server tools, pictures, open ends."""
    messages: Talk = []
    for turn in range(draw(st.integers(1, 8))):
        messages.append(draw(_asked(turn)))
        for loop in range(draw(st.integers(0, 3))):
            ids = [f"toolu_{turn}_{loop}_{one}" for one in range(draw(st.integers(1, 3)))]
            messages.append(calls(*ids))
            answered = results(*draw(st.permutations(ids)))
            if draw(st.booleans()):
                answered["content"].append({"type": "text", "text": "and go on"})
            messages.append(answered)
        messages.append(
            draw(
                st.sampled_from(
                    [
                        {"role": "assistant", "content": draw(st.text(min_size=1, max_size=120))},
                        searches(f"srvtoolu_{turn}"),
                    ]
                )
            )
        )
    # It may be asked for the next answer anywhere in its last turn.
    return messages[: len(messages) - draw(st.integers(0, min(3, len(messages) - 1)))]


@st.composite
def _asked(draw: st.DrawFn, turn: int) -> dict[str, Any]:
    text = draw(st.text(min_size=1, max_size=120))
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    content = draw(
        st.sampled_from(
            [
                text,
                [{"type": "text", "text": text}],
                [image, {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}],
            ]
        )
    )
    return {"role": "user", "content": content}


def assert_sendable(messages: Sequence[Any]) -> None:
    """The API takes it, and each tool's result comes right after its call."""
    body = {"model": "claude-haiku-5-5", "max_tokens": 1, "messages": list(messages)}
    check_message_request(body)
    assert messages[0]["role"] == "user"
    awaited: set[str] = set()
    for message in messages:
        blocks = message["content"] if isinstance(message["content"], list) else []
        given = {it["tool_use_id"] for it in blocks if it["type"] == "tool_result"}
        if message["role"] == "user":
            assert given == awaited
            awaited = set()
        else:
            awaited |= {it["id"] for it in blocks if it["type"] == "tool_use"}
