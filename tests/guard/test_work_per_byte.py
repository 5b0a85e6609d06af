"""Whatever walks a body before a limit has said yes takes work that is linear in its bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget import conversation
from ai_budget.guard.body import ensure_text, is_larger_than
from ai_budget.guard.marks import Marks
from ai_budget.pricing.bound import bound, count_request
from ai_budget.pricing.rates import resolve
from ai_budget.savings import response_cache

pytestmark = pytest.mark.django_db

AT = datetime(2026, 12, 1, tzinfo=UTC)
MODEL = "claude-haiku-5-5"
Body = dict[str, Any]


def body(*content: Any, **others: Any) -> Body:
    return {"model": MODEL, "max_tokens": 9, "messages": [message(*content)], **others}


def message(*content: Any, role: str = "user") -> Body:
    return {"role": role, "content": list(content)}


def text(value: str) -> Body:
    return {"type": "text", "text": value}


def tool_turn(number: int) -> list[Body]:
    use = {"type": "tool_use", "id": f"t{number}", "name": "look", "input": {"at": number}}
    result = {"type": "tool_result", "tool_use_id": f"t{number}", "content": [text("ok")]}
    return [message(use, role="assistant"), message(result)]


SHAPES: dict[str, Callable[[int], Body]] = {
    "messages": lambda n: {**body(), "messages": [message(text("hi"))] * n},
    "blocks": lambda n: body(*[text("hi")] * n),
    "system": lambda n: body(text("hi"), system=[text("hi")] * n),
    "tools": lambda n: body(
        text("hi"), tools=[{"name": f"t{i}", "input_schema": {}} for i in range(n)]
    ),
    "turns": lambda n: {**body(), "messages": sum(map(tool_turn, range(n)), [message(text("q"))])},
    "keys": lambda n: body({**text("hi"), "citations": {f"k{i}": i for i in range(n)}}),
    "numbers": lambda n: body(
        {"type": "tool_use", "id": "t", "name": "look", "input": {"at": [1] * n}}
    ),
    "marks": lambda n: body(text("a" + "\u0301\u0327" * n)),
    "letters": lambda n: body(text("\ufdfa\u00bd" * n)),
    "brackets": lambda n: body(text("< / summary" * n)),
}


def bounded(given: Body) -> None:
    bound(
        given,
        resolve(MODEL, at=AT),
        declared_geo=None,
        batch=False,
        region="",
        allow_unbounded=True,
        counted=None,
        at=AT,
    )


WALKS: dict[str, Callable[[Body], object]] = {
    "text": ensure_text,
    "size": lambda given: is_larger_than(10**9, given),
    "bound": bounded,
    "count": count_request,
    "prompt cache": lambda given: Marks("auto", "chat", AT, where="").mark(
        given, resolve(MODEL, at=AT)
    ),
    "response cache": lambda given: response_cache.place_of(
        given, scope="shared", feature="chat", owner=(), versions=(1,)
    ),
    "trim": lambda given: conversation.trim(given["messages"], keep=2, summarise=False),
}


def work(walk: Callable[[Body], object], given: Body) -> int:
    """How many functions are called, in Python and in C."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        walk(given)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("walk", WALKS)
def test_twice_the_bytes_are_twice_the_work(walk: str, shape: str) -> None:
    make, do = SHAPES[shape], WALKS[walk]
    do(make(1))  # what is read once

    some, twice = work(do, make(600)), work(do, make(1200))

    assert twice <= 2.1 * some + 300


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=60,
)


@settings(max_examples=15)
@given(ANY_JSON)
def test_no_part_of_a_body_is_walked_more_often_the_more_there_are(part: Any) -> None:
    block = {"type": "tool_result", "tool_use_id": "t", "content": [part]}
    bounded(body(block))

    some, twice = work(bounded, body(*[block] * 40)), work(bounded, body(*[block] * 80))

    assert twice <= 2.1 * some + 300
