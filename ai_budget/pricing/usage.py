"""Reads the API's usage, the only place that knows its field names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ai_budget.exceptions import UnclassifiedUsage
from ai_budget.values import Iteration, Usage

FIELDS = {
    "input_tokens": "priced",
    "output_tokens": "priced",
    "cache_creation_input_tokens": "priced: 5-minute writes, where cache_creation says no more",
    "cache_creation": "priced: splits the writes by lifetime",
    "cache_creation.ephemeral_5m_input_tokens": "priced",
    "cache_creation.ephemeral_1h_input_tokens": "priced",
    "cache_read_input_tokens": "priced",
    "output_tokens_details": "shown",
    "output_tokens_details.thinking_tokens": "shown: they are part of output_tokens",
    "server_tool_use": "priced: web searches",
    "server_tool_use.web_search_requests": "priced",
    "server_tool_use.web_fetch_requests": "free",
    "service_tier": "priced: batch is half; priority costs as standard",
    "inference_geo": "priced: us is 1.1 times",
    "speed": "priced: fast has its own rates",
    "iterations": "priced: the bill is the sum over its entries",
    "fallback_credit": "shown: a credit only lowers the bill, and its amount is not told",
}
"""Every field of usage that somebody has classified, and how; a dot leads into an object."""

ITERATION_TYPES = frozenset({"message", "compaction", "advisor_message", "fallback_message"})
"""The entries of ``iterations`` that have a price rule."""

SPEEDS = frozenset({"", "standard", "fast"})
SERVICE_TIERS = frozenset({"", "standard", "priority", "batch"})

_OBJECTS = tuple(sorted({name.partition(".")[0] for name in FIELDS if "." in name}))
_COUNTS = (
    "input_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "cache_read_tokens",
    "output_tokens",
    "web_searches",
)


def read_usage(usage: Any) -> Usage:
    """Return usage as a value: from ours, from the SDK's object, or from its dict.

    Raises ``TypeError`` for anything else and ``UnclassifiedUsage`` for counts that are
    not whole numbers, and for kinds of usage whose price nobody knows.
    """
    if isinstance(usage, Usage):
        return _checked(usage)
    if not isinstance(usage, Mapping):
        dump = getattr(usage, "model_dump", None)
        if dump is None:
            raise TypeError(
                f"usage must be a Usage, the SDK's or a dict, not {type(usage).__name__}"
            )
        usage = dump(mode="json")
    return _read(usage, top=True)


def _checked(usage: Usage) -> Usage:
    for name in _COUNTS:
        _whole(getattr(usage, name), name)
    _known(usage.speed, "speed", SPEEDS)
    _known(usage.service_tier, "service_tier", SERVICE_TIERS)
    for entry in usage.iterations:
        _checked(entry.usage)
    return usage


def _read(raw: Mapping[str, Any], *, top: bool) -> Usage:
    writes_5m, writes_1h = _writes(raw)
    tools = _object(raw, "server_tool_use")
    details = _object(raw, "output_tokens_details")
    iterations = _entries(raw) if top else ()
    return Usage(
        input_tokens=_count(raw, "input_tokens"),
        cache_write_5m_tokens=writes_5m,
        cache_write_1h_tokens=writes_1h,
        cache_read_tokens=_count(raw, "cache_read_input_tokens"),
        output_tokens=_count(raw, "output_tokens"),
        thinking_tokens=_count(details, "thinking_tokens"),
        web_searches=_count(tools, "web_search_requests"),
        service_tier=_known(raw.get("service_tier") or "", "service_tier", SERVICE_TIERS),
        speed=_known(raw.get("speed") or "", "speed", SPEEDS),
        inference_geo=str(raw.get("inference_geo") or ""),
        iterations=tuple(_iteration(entry) for entry in iterations),
        unclassified=_unclassified(raw) if top else (),
    )


def _writes(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Split the cache writes: what the total has beyond its parts was written for 5 minutes.

    In streams the total may be raised at the end without the split.
    """
    split = _object(raw, "cache_creation")
    five, hour = (
        _count(split, "ephemeral_5m_input_tokens"),
        _count(split, "ephemeral_1h_input_tokens"),
    )
    for lifetime in split:
        if f"cache_creation.{lifetime}" not in FIELDS and split[lifetime]:
            # In the total too, where it would pass for the cheapest kind of write.
            raise UnclassifiedUsage(f"The usage has cache writes of the unknown kind {lifetime}.")
    total = _count(raw, "cache_creation_input_tokens")
    return five + max(0, total - five - hour), hour


def _entries(raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    entries = raw.get("iterations") or ()
    if not isinstance(entries, (list, tuple)) or not all(
        isinstance(entry, Mapping) for entry in entries
    ):
        raise UnclassifiedUsage("The usage's iterations are not a list of objects.")
    return entries


def _iteration(entry: Mapping[str, Any]) -> Iteration:
    return Iteration(
        type=str(entry.get("type")),
        model=str(entry.get("model") or ""),
        usage=_read(entry, top=False),
    )


def _unclassified(raw: Mapping[str, Any]) -> tuple[str, ...]:
    names = set(raw)
    for name in _OBJECTS:
        names.update(f"{name}.{part}" for part in _object(raw, name))
    return tuple(sorted(names - FIELDS.keys()))


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnclassifiedUsage(f"The usage's {key} is not an object.")
    return value


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    return 0 if value is None else _whole(value, key)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnclassifiedUsage(f"The usage's {name} is not a count.")
    return value


def _known(value: Any, name: str, known: frozenset[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UnclassifiedUsage(f"The usage has a {name} that has no price rule: {value!r}.")
    return value
