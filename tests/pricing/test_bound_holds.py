"""For no usage that a request permits is its price above its bound."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget.models import ModelRate
from ai_budget.pricing import rates
from ai_budget.pricing.bound import bound
from ai_budget.pricing.cost import price
from ai_budget.pricing.rates import resolve
from tests.depth import deep
from tests.factories import ModelRateFactory
from tests.pricing.permitted import (
    BEFORE_THE_TIERS_ENDED,
    LETTERS,
    NOW,
    Case,
    blocks,
    bodies,
    cases,
    client_tools,
    messages,
)


def bound_of(body: dict[str, Any], **options: Any) -> int:
    return bound(body, resolve(body["model"], at=NOW), at=NOW, **options).nanousd


def ensure_covered(case: Case) -> None:
    model = case.body["model"]
    most = bound(
        case.body,
        resolve(model, at=case.at),
        at=case.at,
        batch=case.batch,
        declared_geo=case.declared_geo,
    )
    assert price(model, case.usage, at=case.at, batch=case.batch) <= most.nanousd


@settings(max_examples=deep(600, else_=150))
@given(case=cases())
def test_no_permitted_usage_costs_more_than_the_bound(case: Case) -> None:
    ensure_covered(case)


@pytest.fixture
def odd_rates(fresh_rates: None) -> None:
    """Negotiated prices that turn everything around: what is usually dear is cheap."""
    ascending = ("input_usd", "cache_write_5m_usd", "cache_write_1h_usd", "cache_read_usd")
    for step, model in enumerate(["claude-opus-5-5", "claude-haiku-5-5", "claude-sonnet-4-6"]):
        for above, factor in ((0, 9), (1_000, 5), (100_000, 7), (600_000, 2), (1_500_000, 30)):
            order = ascending[step:] + ascending[:step]
            ModelRateFactory.create(
                model=model,
                valid_from=BEFORE_THE_TIERS_ENDED - timedelta(days=1),
                prompt_tokens_above=above,
                output_usd=factor,
                **{name: factor * (place + 1) for place, name in enumerate(order)},
            )
    ModelRateFactory.create(
        model="claude-opus-4-8",
        speed=ModelRate.Speed.FAST,
        valid_from=BEFORE_THE_TIERS_ENDED - timedelta(days=1),
        input_usd="0.1",
        output_usd="0.1",
    )
    rates.forget()


@pytest.mark.usefixtures("odd_rates")
@settings(max_examples=deep(300, else_=60))
@given(case=cases())
def test_no_permitted_usage_costs_more_whatever_the_rates_are(case: Case) -> None:
    ensure_covered(case)


@given(
    body=bodies(), block=blocks | st.builds(lambda text: {"type": "text", "text": text}, LETTERS)
)
def test_adding_a_block_never_lowers_a_bound(body: dict[str, Any], block: dict[str, Any]) -> None:
    more = {**body, "messages": [*body["messages"], {"role": "user", "content": [block]}]}

    assert bound_of(more) >= bound_of(body)


ADDITIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a mark": lambda body: {"cache_control": {"type": "ephemeral"}},
    "a dearer mark": lambda body: {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    "a fallback": lambda body: {
        "fallbacks": [*(body.get("fallbacks") or ()), {"model": "claude-opus-4-8"}]
    },
    "a fast fallback": lambda body: {
        "fallbacks": [*(body.get("fallbacks") or ()), {"model": "claude-opus-4-8", "speed": "fast"}]
    },
    "a container": lambda body: {"container": "container_1"},
    "a compaction": lambda body: {"compaction": {"type": "summarize"}},
    "a search": lambda body: (
        {
            "tools": [
                *body.get("tools", ()),
                {"type": "web_search_20260318", "name": "web_search", "max_uses": 1},
            ],
            "thread": None,
        }
        if not body.get("thread")
        else {}
    ),
    "another message": lambda body: {
        "messages": [{"role": "user", "content": "hello"}, *body["messages"]]
    },
}


@pytest.mark.parametrize("addition", ADDITIONS)
@settings(max_examples=deep(200, else_=15))
@given(body=bodies())
def test_adding_anything_never_lowers_a_bound(addition: str, body: dict[str, Any]) -> None:
    # A mark for five minutes in the place of one for an hour takes away.
    dearer = (body.get("cache_control") or {}).get("ttl") == "1h"
    more = {} if dearer and addition == "a mark" else ADDITIONS[addition](body)

    assert bound_of({**body, **more}) >= bound_of(body)


@settings(max_examples=deep(200, else_=20))
@given(body=bodies(), tool=client_tools)
def test_adding_a_tool_never_lowers_a_bound(body: dict[str, Any], tool: dict[str, Any]) -> None:
    assert bound_of({**body, "tools": [*body.get("tools", ()), tool]}) >= bound_of(body)


@settings(max_examples=deep(200, else_=20))
@given(body=bodies(), extra=st.lists(messages, max_size=2))
def test_a_longer_conversation_never_has_a_lower_bound(
    body: dict[str, Any], extra: list[dict[str, Any]]
) -> None:
    assert bound_of({**body, "messages": [*body["messages"], *extra]}) >= bound_of(body)


@given(body=bodies(), fewer=st.integers(0, 64_000))
def test_lowering_max_tokens_never_raises_a_bound(body: dict[str, Any], fewer: int) -> None:
    lower = {**body, "max_tokens": min(fewer, body["max_tokens"])}

    assert bound_of(lower) <= bound_of(body)


@settings(max_examples=deep(200, else_=20))
@given(body=bodies())
def test_declaring_a_geography_never_raises_a_bound(body: dict[str, Any]) -> None:
    assert bound_of(body, declared_geo="global") <= bound_of(body)


@settings(max_examples=deep(200, else_=20))
@given(body=bodies())
def test_a_batch_never_raises_a_bound(body: dict[str, Any]) -> None:
    assert bound_of(body, batch=True) <= bound_of(body)
