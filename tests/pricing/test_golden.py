"""Prices against figures that were worked out elsewhere, to the nano-dollar."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from anthropic.types import Model

from ai_budget import price
from ai_budget.money import parse_usd

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "costs.json").read_text())
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
MILLION = 1_000_000

# Dollars per million tokens: input, output, 5-minute write, 1-hour write, read.
PUBLISHED = {
    "claude-fable-5-2": ("8", "40", "10", "16", "0.20"),
    "claude-mythos-5-2": ("8", "40", "10", "16", "0.20"),
    "claude-fable-5-1": ("10", "50", "12.5", "20", "0.25"),
    "claude-mythos-5-1": ("10", "50", "12.5", "20", "0.25"),
    "claude-fable-5": ("10", "50", "12.5", "20", "1"),
    "claude-mythos-5": ("10", "50", "12.5", "20", "1"),
    "claude-mythos-preview": ("10", "50", "12.5", "20", "1"),
    "claude-opus-5-5": ("4", "20", "5", "8", "0.20"),
    "claude-opus-5": ("5", "25", "6.25", "10", "0.50"),
    "claude-opus-4-8": ("5", "25", "6.25", "10", "0.50"),
    "claude-opus-4-7": ("5", "25", "6.25", "10", "0.50"),
    "claude-opus-4-6": ("5", "25", "6.25", "10", "0.50"),
    "claude-opus-4-5": ("5", "25", "6.25", "10", "0.50"),
    "claude-opus-4-5-20251101": ("5", "25", "6.25", "10", "0.50"),
    "claude-sonnet-5-5": ("2", "10", "2.5", "4", "0.10"),
    "claude-sonnet-5": ("2", "10", "2.5", "4", "0.20"),
    "claude-sonnet-4-6": ("3", "15", "3.75", "6", "0.30"),
    "claude-haiku-4-5": ("1", "5", "1.25", "2", "0.10"),
    "claude-haiku-4-5-20251001": ("1", "5", "1.25", "2", "0.10"),
}
PUBLISHED_FAST = {
    "claude-fable-5-2": ("16", "80"),
    "claude-mythos-5-2": ("16", "80"),
    "claude-opus-5-5": ("8", "40"),
    "claude-opus-5": ("10", "50"),
    "claude-opus-4-8": ("10", "50"),
}
# Two tiers: the dearer one is for the whole of a request whose prompt is longer.
TIERED = {
    "claude-haiku-5-5": (
        100_000,
        ("0.10", "0.50", "0.125", "0.20", "0.01"),
        ("0.50", "2.50", "0.625", "1.00", "0.05"),
    ),
    "claude-sonnet-4-5": (
        200_000,
        ("3", "15", "3.75", "6", "0.30"),
        ("6", "22.5", "7.5", "12", "0.60"),
    ),
    "claude-sonnet-4-5-20250929": (
        200_000,
        ("3", "15", "3.75", "6", "0.30"),
        ("6", "22.5", "7.5", "12", "0.60"),
    ),
}
PARTS = ("input", "output", "write_5m", "write_1h", "read")


def usage_of(part: str, tokens: int) -> dict[str, Any]:
    shapes: dict[str, dict[str, Any]] = {
        "input": {"input_tokens": tokens},
        "output": {"output_tokens": tokens},
        "write_5m": {
            "cache_creation_input_tokens": tokens,
            "cache_creation": {"ephemeral_5m_input_tokens": tokens},
        },
        "write_1h": {
            "cache_creation_input_tokens": tokens,
            "cache_creation": {"ephemeral_1h_input_tokens": tokens},
        },
        "read": {"cache_read_input_tokens": tokens},
    }
    return shapes[part]


def per_million(dollars: str, tokens: int) -> int:
    nanousd = parse_usd(dollars) * tokens
    assert nanousd % MILLION == 0
    return nanousd // MILLION


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["model"])
def test_every_golden_row_is_exact(row: dict[str, Any]) -> None:
    at = datetime.fromisoformat(row["at"])

    assert price(row["model"], row["usage"], at=at, batch=row["batch"]) == row["nanousd"]


@pytest.mark.parametrize(
    "model", [name for union in get_args(Model) for name in get_args(union)] or ["none"]
)
def test_every_current_model_of_the_sdk_is_in_the_published_table(model: str) -> None:
    assert model in PUBLISHED.keys() | TIERED.keys()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_prices_are_charged(model: str, part: str) -> None:
    dollars = PUBLISHED[model][PARTS.index(part)]

    assert price(model, usage_of(part, MILLION), at=NOW) == parse_usd(dollars)


@pytest.mark.parametrize("part", ["input", "output"])
@pytest.mark.parametrize("model", PUBLISHED_FAST)
def test_published_fast_prices_are_charged(model: str, part: str) -> None:
    dollars = PUBLISHED_FAST[model][PARTS.index(part)]

    assert price(model, {**usage_of(part, MILLION), "speed": "fast"}, at=NOW) == parse_usd(dollars)


@pytest.mark.parametrize("part", ["input", "write_5m", "write_1h", "read"])
@pytest.mark.parametrize("model", TIERED)
def test_a_prompt_up_to_the_threshold_is_of_the_lower_tier(model: str, part: str) -> None:
    threshold, lower, _ = TIERED[model]

    cost = price(model, usage_of(part, threshold), at=NOW)

    assert cost == per_million(lower[PARTS.index(part)], threshold)


@pytest.mark.parametrize("part", ["input", "write_5m", "write_1h", "read"])
@pytest.mark.parametrize("model", TIERED)
def test_a_longer_prompt_is_of_the_higher_tier_as_a_whole(model: str, part: str) -> None:
    threshold, _, higher = TIERED[model]

    cost = price(model, usage_of(part, threshold + 1), at=NOW)

    assert cost == per_million(higher[PARTS.index(part)], threshold + 1)


@pytest.mark.parametrize("model", TIERED)
def test_output_never_selects_a_tier(model: str) -> None:
    _, lower, _ = TIERED[model]

    assert price(model, {"output_tokens": MILLION}, at=NOW) == parse_usd(lower[1])


@pytest.mark.parametrize("model", TIERED)
def test_output_follows_the_tier_of_its_prompt(model: str) -> None:
    threshold, _, higher = TIERED[model]
    tokens = {"input_tokens": threshold + 1, "output_tokens": 1_000}

    expected = per_million(higher[0], threshold + 1) + per_million(higher[1], 1_000)

    assert price(model, tokens, at=NOW) == expected


def test_every_class_of_prompt_token_counts_towards_the_tier() -> None:
    tokens = {
        "input_tokens": 25_001,
        "cache_creation_input_tokens": 50_000,
        "cache_creation": {
            "ephemeral_5m_input_tokens": 25_000,
            "ephemeral_1h_input_tokens": 25_000,
        },
        "cache_read_input_tokens": 25_000,
    }

    expected = (
        per_million("0.50", 25_001)
        + per_million("0.625", 25_000)
        + per_million("1.00", 25_000)
        + per_million("0.05", 25_000)
    )

    assert price("claude-haiku-5-5", tokens, at=NOW) == expected


@pytest.mark.parametrize(
    ("model", "lower", "higher"), [("claude-opus-4-6", "5", "10"), ("claude-sonnet-4-6", "3", "6")]
)
def test_the_long_context_tier_ended_on_its_day(model: str, lower: str, higher: str) -> None:
    last_moment = datetime(2026, 3, 12, 23, 59, 59, 999_999, tzinfo=UTC)
    first_moment = datetime(2026, 3, 13, tzinfo=UTC)
    long_prompt = {"input_tokens": 200_001}

    assert price(model, long_prompt, at=last_moment) == per_million(higher, 200_001)
    assert price(model, long_prompt, at=first_moment) == per_million(lower, 200_001)
