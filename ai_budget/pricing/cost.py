"""What an answer cost: usage times the rates of its moment, rounded up once."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from ai_budget import money
from ai_budget.exceptions import UnclassifiedUsage
from ai_budget.pricing.rates import BATCH, ModelRates, resolve
from ai_budget.pricing.usage import ITERATION_TYPES, read_usage
from ai_budget.values import Iteration, Usage

_TOKENS = 1_000_000  # rates are per million tokens
_SEARCHES = 1_000  # and per thousand searches
_IN_TOP_LEVEL = frozenset({"message", "fallback_message"})


def price(
    model: str,
    usage: Any,
    at: datetime | None = None,
    batch: bool = False,
    *,
    provider: str = "anthropic",
    region: str = "",
) -> int:
    """Return what an answer cost in nano-dollars, to the nano-dollar.

    ``usage`` is an ``ai_budget.Usage``, the SDK's, or its dict; ``at`` (default: now) chooses
    among dated prices. Raises ``UnpricedModel`` for a model without a price, and
    ``UnclassifiedUsage`` for usage that has no price rule: never a zero by ignorance.
    """
    rates = resolve(model, at=at, provider=provider, region=region)
    return cost(rates, read_usage(usage), at=at, batch=batch, region=region)


def cost(
    rates: ModelRates,
    usage: Usage,
    *,
    at: datetime | None = None,
    batch: bool = False,
    region: str = "",
) -> int:
    """Return the cost in nano-dollars of usage at resolved rates. See ``price``."""
    halved = batch or usage.service_tier == "batch"
    if not usage.iterations:
        parts = [(rates, usage)]
    else:
        parts = [_part(rates, entry, at, region) for entry in usage.iterations]
        if not any(entry.type in _IN_TOP_LEVEL for entry in usage.iterations):
            # Only helpers are itemised, and their tokens are not in the counts at the top.
            parts.append((rates, usage))
    # One speed is told for all; where some model is fast, those without that mode ran at their own.
    some_are_fast = any(part_rates.fast for part_rates, _ in parts)
    scale = BATCH if halved else (1, 1)
    # One common denominator for all parts, so that rounding happens once.
    numerator, denominator = 0, _TOKENS * scale[1]
    for part_rates, part in parts:
        speed = "" if some_are_fast and not part_rates.fast else usage.speed
        over, under = part_rates.us_geo if usage.inference_geo == "us" else (1, 1)
        amount = _tokens(part_rates, part, speed) * scale[0] * over
        numerator, denominator = _add(numerator, denominator, amount, _TOKENS * scale[1] * under)
    searches = usage.web_searches * rates.web_searches
    numerator, denominator = _add(numerator, denominator, searches, _SEARCHES)
    return money.ceil_div(numerator, denominator)


def uncached(usage: Usage) -> Usage:
    """Return the same usage as it would have been without the API's prompt cache."""
    return replace(
        usage,
        input_tokens=usage.prompt_tokens,
        cache_write_5m_tokens=0,
        cache_write_1h_tokens=0,
        cache_read_tokens=0,
        iterations=tuple(replace(it, usage=uncached(it.usage)) for it in usage.iterations),
    )


def _part(
    rates: ModelRates, entry: Iteration, at: datetime | None, region: str
) -> tuple[ModelRates, Usage]:
    if entry.type not in ITERATION_TYPES:
        raise UnclassifiedUsage(f"The usage has an iteration of the unknown type {entry.type!r}.")
    if not entry.model or rates.model.endswith(entry.model):
        # Platforms put a region before the name, which decides the price.
        return rates, entry.usage
    return resolve(entry.model, at=at, provider=rates.provider, region=region), entry.usage


def _tokens(rates: ModelRates, usage: Usage, speed: str) -> int:
    per = rates.at(usage.prompt_tokens, speed)
    return (
        usage.input_tokens * per.input
        + usage.cache_write_5m_tokens * per.cache_write_5m
        + usage.cache_write_1h_tokens * per.cache_write_1h
        + usage.cache_read_tokens * per.cache_read
        + usage.output_tokens * per.output
    )


def _add(left: int, left_under: int, right: int, right_under: int) -> tuple[int, int]:
    if left_under == right_under:
        return left + right, left_under
    return left * right_under + right * left_under, left_under * right_under
