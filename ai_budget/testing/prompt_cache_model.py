"""The rules of the API's prompt cache: what a request reads from it, and what it writes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ai_budget.testing.catalogue import limits_of
from ai_budget.testing.tokens import PromptBlock, prompt_tokens

MOST_MARKS = 4
LOOKBACK_POSITIONS = 20  # per mark, the mark itself being the first
LIFETIMES = {"5m": 300.0, "1h": 3_600.0}  # seconds

_UNMARKABLE = ("thinking", "redacted_thinking")
_RUNS = ("tool_use", "tool_result")
_SWEEP_ABOVE = 10_000


class InvalidMark(ValueError):
    """A `cache_control` that the API refuses with a 400."""


class CacheUse(NamedTuple):
    """How one prompt divides, in tokens, and what its response will write or refresh."""

    uncached: int
    read: int
    written_5m: int
    written_1h: int
    touched: Sequence[tuple[bytes, str]] = ()
    at: float = 0.0


class PromptCache:
    """Prefixes that earlier requests wrote, each alive until its time to live runs out.

    The rules are those of platform.claude.com/docs/en/build-with-claude/prompt-caching: an entry is
    the hash of a prefix that ends at a mark; a mark finds the nearest entry at most 20 positions
    back; a lifetime counts from the start of the request that writes or reads the entry; and an
    entry is there for others only once the response that writes it has begun.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[bytes, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def plan(
        self, *, tenant: str, body: Mapping[str, Any], blocks: Sequence[PromptBlock], at: float
    ) -> CacheUse:
        """How the prompt is billed at `at` (seconds of the simulator's clock). Changes nothing.

        Raises InvalidMark.
        """
        total = prompt_tokens(blocks)
        marks = _marks(body, blocks)
        ends = _running_totals(blocks)
        minimum = limits_of(body["model"]).minimum_cached_prefix
        # A prefix under the minimum is processed without caching, and no error says so.
        marks = {index: ttl for index, ttl in marks.items() if ends[index] >= minimum}
        if not marks:
            return CacheUse(uncached=total, read=0, written_5m=0, written_1h=0)

        keys = _prefix_keys(tenant, body, blocks)
        with self._lock:
            hit = self._highest_hit(sorted(marks, reverse=True), keys, blocks, at)
            touched = {keys[index]: ttl for index, ttl in marks.items()}
            if hit is not None:
                touched.setdefault(keys[hit], "5m")
            # A hit keeps the lifetime it was written with, whatever the mark now asks.
            touched = {
                key: self._entries[key][0] if self._alive(key, at) else ttl
                for key, ttl in touched.items()
            }
        read_to = ends[hit] if hit is not None else 0
        last = max(marks)
        hour_to = max(
            (ends[index] for index, ttl in marks.items() if ttl == "1h" and ends[index] > read_to),
            default=read_to,
        )
        return CacheUse(
            uncached=total - ends[last],
            read=read_to,
            written_1h=hour_to - read_to,
            written_5m=ends[last] - hour_to,
            touched=tuple(touched.items()),
            at=at,
        )

    def commit(self, use: CacheUse) -> None:
        """Makes what `use` wrote readable and refreshes what it read: its response begins."""
        if not use.touched:
            return
        with self._lock:
            if len(self._entries) > _SWEEP_ABOVE:
                self._entries = {
                    key: entry for key, entry in self._entries.items() if entry[1] > use.at
                }
            for key, ttl in use.touched:
                dies = use.at + LIFETIMES[ttl]
                known = self._entries.get(key)
                if known is None or known[1] < dies:
                    self._entries[key] = (ttl, dies)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()

    def _alive(self, key: bytes, at: float) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry[1] > at

    def _highest_hit(
        self, marks: Sequence[int], keys: Sequence[bytes], blocks: Sequence[PromptBlock], at: float
    ) -> int | None:
        for mark in marks:
            position = 1
            for index in range(mark, -1, -1):
                if index < mark and not _same_position(blocks[index], blocks[index + 1]):
                    position += 1
                if position > LOOKBACK_POSITIONS:
                    break
                if self._alive(keys[index], at):
                    return index
        return None


def _same_position(block: PromptBlock, following: PromptBlock) -> bool:
    # A run of parallel tool calls, or of their results, is one position of the lookback.
    kind = block.content.get("type")
    return kind in _RUNS and block.section == "messages" and kind == following.content.get("type")


def _running_totals(blocks: Sequence[PromptBlock]) -> list[int]:
    totals: list[int] = []
    total = 0
    for block in blocks:
        total += block.tokens
        totals.append(total)
    return totals


def _marks(body: Mapping[str, Any], blocks: Sequence[PromptBlock]) -> dict[int, str]:
    marks: dict[int, str] = {}
    found = 0
    for index, block in enumerate(blocks):
        own = block.content.get("cache_control")
        if own is not None:
            _refuse_unmarkable(block)
            marks[index] = _ttl(own, block.path)
            found += 1
        for part in _nested(block.content):
            inner = part.get("cache_control")
            if inner is not None:
                marks.setdefault(index, _ttl(inner, block.path))
                found += 1

    automatic = body.get("cache_control")
    if automatic is not None:
        ttl = _ttl(automatic, "cache_control")
        last = _last_markable(blocks)
        if last is not None and last not in marks:
            marks[last] = ttl
            found += 1
        elif last is not None and marks[last] != ttl:
            raise InvalidMark(
                "cache_control: the last block already has a cache_control with another ttl."
            )
    if found > MOST_MARKS:
        raise InvalidMark(
            f"A maximum of {MOST_MARKS} blocks with cache_control may be provided. Found {found}."
        )
    _refuse_hour_after_minutes(marks, blocks)
    return marks


def _refuse_unmarkable(block: PromptBlock) -> None:
    kind = block.content.get("type")
    if kind in _UNMARKABLE:
        raise InvalidMark(f"{block.path}.{kind}.cache_control: Extra inputs are not permitted")
    if kind == "text" and not block.content.get("text"):
        raise InvalidMark(f"{block.path}.text: cache_control cannot be set for empty text blocks")


def _refuse_hour_after_minutes(marks: Mapping[int, str], blocks: Sequence[PromptBlock]) -> None:
    minutes_seen = False
    for index in sorted(marks):
        if marks[index] == "1h" and minutes_seen:
            raise InvalidMark(
                f"{blocks[index].path}.cache_control.ttl: a ttl='1h' cache_control block must not "
                "come after a ttl='5m' cache_control block. Note that blocks are processed in the "
                "following order: `tools`, `system`, `messages`."
            )
        minutes_seen = minutes_seen or marks[index] == "5m"


def _ttl(cache_control: object, path: str) -> str:
    if not isinstance(cache_control, Mapping) or cache_control.get("type") != "ephemeral":
        raise InvalidMark(f"{path}.cache_control.type: Input should be 'ephemeral'")
    ttl = cache_control.get("ttl") or "5m"
    if ttl not in LIFETIMES:
        raise InvalidMark(f"{path}.cache_control.ttl: Input should be '5m' or '1h'")
    return str(ttl)


def _last_markable(blocks: Sequence[PromptBlock]) -> int | None:
    for index in range(len(blocks) - 1, -1, -1):
        content = blocks[index].content
        empty = content.get("type") == "text" and not content.get("text")
        if not empty and content.get("type") not in _UNMARKABLE:
            return index
    return None


def _nested(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if content.get("type") != "tool_result":
        return ()
    parts = content.get("content")
    return parts if isinstance(parts, list) else ()


def _prefix_keys(
    tenant: str, body: Mapping[str, Any], blocks: Sequence[PromptBlock]
) -> list[bytes]:
    """A key for the prefix that ends at each block."""
    state = hashlib.sha256(_bytes([tenant, body["model"]]))
    section = "tools"
    keys: list[bytes] = []
    for block in blocks:
        if block.section != section:
            # Whatever lies between has settings of its own, which are part of the prefix too.
            if section == "tools":
                state.update(_bytes(["system", body.get("speed")]))
            if block.section == "messages":
                state.update(_bytes(["messages", *_rendered_settings(body, blocks)]))
            section = block.section
        unmarked = _unmarked(block.content)
        state.update(_bytes([block.role, block.opens, unmarked]))
        keys.append(state.copy().digest())
    return keys


def _rendered_settings(body: Mapping[str, Any], blocks: Sequence[PromptBlock]) -> list[Any]:
    """What changes how messages are rendered, and so invalidates them when it changes."""
    output_config = body.get("output_config") or {}
    has_images = any(block.content.get("type") == "image" for block in blocks)
    return [
        body.get("tool_choice"),
        body.get("thinking"),
        output_config.get("effort"),
        has_images,
    ]


def _unmarked(content: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in content.items() if name != "cache_control"}
    if _nested(content):
        kept["content"] = [_unmarked(part) for part in _nested(content)]
    return kept


def _bytes(value: object) -> bytes:
    # Keys keep the order they were sent in: to the API, another order is another prompt.
    encoded = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return encoded.encode("utf-8", "surrogatepass") + b"\0"
