"""Reads the API's usage, the only place that knows its field names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ai_budget.exceptions import UnclassifiedUsage
from ai_budget.values import Iteration, Usage

FIELDS = {
    "input_tokens": "priced",
    "output_tokens": "priced",
    "cache_creation_input_tokens": "priced: 5-minute writes, where cache_creation says no more",
    "cache_creation": "priced: splits the writes by lifetime",
    "cache_read_input_tokens": "priced",
    "output_tokens_details": "shown: thinking_tokens are part of output_tokens",
    "server_tool_use": "priced: web searches; fetches are free",
    "service_tier": "priced: batch is half; priority costs as standard",
    "inference_geo": "priced: us is 1.1 times",
    "speed": "priced: fast has its own rates",
    "iterations": "priced: the bill is the sum over its entries",
    "fallback_credit": "shown: a credit only lowers the bill, and its amount is not told",
}
"""Every field of usage that somebody has classified, and how."""

ITERATION_TYPES = frozenset({"message", "compaction", "advisor_message", "fallback_message"})
"""The entries of ``iterations`` that have a price rule."""


def read_usage(usage: Any) -> Usage:
    """Return usage as a value: from ours, from the SDK's object, or from its dict.

    Raises ``TypeError`` for anything else and ``UnclassifiedUsage`` for counts that are
    not whole numbers.
    """
    if isinstance(usage, Usage):
        return usage
    if not isinstance(usage, Mapping):
        dump = getattr(usage, "model_dump", None)
        if dump is None:
            raise TypeError(
                f"usage must be a Usage, the SDK's or a dict, not {type(usage).__name__}"
            )
        usage = dump(mode="json")
    return _read(usage, top=True)


def _read(raw: Mapping[str, Any], *, top: bool) -> Usage:
    writes_5m, writes_1h = _writes(raw)
    tools = raw.get("server_tool_use") or {}
    details = raw.get("output_tokens_details") or {}
    iterations = raw.get("iterations") or () if top else ()
    return Usage(
        input_tokens=_count(raw, "input_tokens"),
        cache_write_5m_tokens=writes_5m,
        cache_write_1h_tokens=writes_1h,
        cache_read_tokens=_count(raw, "cache_read_input_tokens"),
        output_tokens=_count(raw, "output_tokens"),
        thinking_tokens=_count(details, "thinking_tokens"),
        web_searches=_count(tools, "web_search_requests"),
        service_tier=raw.get("service_tier") or "",
        speed=raw.get("speed") or "",
        inference_geo=raw.get("inference_geo") or "",
        iterations=tuple(_iteration(entry) for entry in iterations),
        unclassified=tuple(sorted(raw.keys() - FIELDS.keys())) if top else (),
    )


def _writes(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Split the cache writes: what the total has beyond its parts was written for 5 minutes.

    In streams the total may be raised at the end without the split.
    """
    split = raw.get("cache_creation") or {}
    five, hour = (
        _count(split, "ephemeral_5m_input_tokens"),
        _count(split, "ephemeral_1h_input_tokens"),
    )
    total = _count(raw, "cache_creation_input_tokens")
    return five + max(0, total - five - hour), hour


def _iteration(entry: Mapping[str, Any]) -> Iteration:
    return Iteration(
        type=str(entry.get("type")),
        model=entry.get("model") or "",
        usage=_read(entry, top=False),
    )


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnclassifiedUsage(f"The usage's {key} is not a count of tokens.")
    return value
