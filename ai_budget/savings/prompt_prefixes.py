"""Where a request may be marked for the API's prompt cache, and how marks are put there.

The rules are those of https://platform.claude.com/docs/en/build-with-claude/prompt-caching, read
on 2026-11-22: at most four marks, none on thinking or empty text, a mark finds what was written
at most 20 positions before it, and a prefix shorter than the model's minimum is not cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ai_budget.pricing.bound import (
    BASE_TOKENS,
    BLOCKS,
    CLIENT_TOOL_TOKENS,
    CLIENT_TOOLS,
    CLIENT_TOOLS_TOKENS,
    OUTPUT_FORMAT_TOKENS,
    PARAMETERS,
    SERVER_TOOLS,
)
from ai_budget.pricing.folding import most_bytes
from ai_budget.pricing.rates import ModelRates
from ai_budget.savings.digest_keys import digest_key
from ai_budget.savings.prompt_reuse import HOUR, MOST_MARKS, Mark, Position
from ai_budget.values import BYTES_A_TOKEN

LOOKBACK = 20
"""Positions that a mark looks back for an entry, itself the first."""

FIRST, LAST = 6, 30
"""How many positions of the messages are remembered, from their beginning and from their end."""

MARKABLE = frozenset(
    {"text", "image", "document", "search_result", "tool_use", "tool_result"}
    | {"server_tool_use", "web_search_tool_result"}
)
"""Blocks of messages that are known to take a mark."""

_PURPOSE = "prompt"
_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPath:
    """Where in a body a block is: "tools" or "system" and a block, or a message's block."""

    section: str
    block: int
    message: int = 0


@dataclass(slots=True)
class Prefixes:
    """The positions of one prompt, each with its place, and the most tokens of the whole.

    ``hidden`` says that more is read than the request shows.
    """

    positions: list[Position] = field(default_factory=list)
    places: list[BlockPath] = field(default_factory=list)
    most: int = 0
    hidden: bool = False


def is_marked(body: Mapping[str, Any]) -> bool:
    """Say whether the caller has set any mark, the one for the whole request included."""
    if body.get("cache_control") is not None:
        return True
    contents = (body.get("tools"), body.get("system"), *_contents(body.get("messages")))
    return any(_has_mark(content) for content in contents)


def read_prefixes(
    body: Mapping[str, Any], *, rates: ModelRates, feature: str, where: str = ""
) -> Prefixes | None:
    """Return where a body may be marked, or None where its prompt cannot be read here.

    Fingerprints are digests keyed by the project's secret: no text can be told from them, nor
    one feature's from another's. Two are equal only where the API would take one prefix for the
    other; ``where`` tells its caches apart, which are the account's. The most tokens are bounded
    as in ``ai_budget.pricing.bound``.
    """
    reader = _Reader(rates, feature, where, body)
    try:
        return reader.read()
    except (TypeError, ValueError, AttributeError, KeyError):
        # What is not plain JSON in the shape of a request is the API's to judge.
        return None


def fixed_marks(prefixes: Prefixes, *, ttl: str, minimum: int) -> tuple[Mark, ...]:
    """Return the marks of a prefix that is taken to be stable: all but the prompt's last block.

    One at the end of tools and system, one at the end of the leading messages, and between them
    as many as it takes for an earlier turn's mark to be found again.
    """
    ends = _totals(prefixes.positions)
    stable = [index for index, position in enumerate(prefixes.positions) if position.part != "e"]
    able = [index for index in stable if ends[index] >= minimum]
    if not able:
        return ()
    last = able[-1]
    shared = [index for index in able if prefixes.positions[index].part == "s"][-1:]
    chosen = [last, *shared]
    step = last - LOOKBACK + 1
    while len(set(chosen)) < MOST_MARKS and step in able and step > (shared or [-1])[0]:
        chosen.append(step)
        step -= LOOKBACK - 1
    return tuple(Mark(index=index, ttl=ttl) for index in sorted(set(chosen)))


def place_marks(
    body: Mapping[str, Any], prefixes: Prefixes, marks: Sequence[Mark]
) -> dict[str, Any]:
    """Return a body with the marks in place, which shares with the given one all else.

    A string becomes the text block that it stands for: the prompt stays the same.
    """
    marked = dict(body)
    for mark in marks:
        place = prefixes.places[mark.index]
        control = {"type": "ephemeral", "ttl": "1h"} if mark.ttl == HOUR else {"type": "ephemeral"}
        if place.section == "messages":
            messages = list(marked["messages"])
            message = messages[place.message]
            content = _with_mark(message["content"], place.block, control)
            messages[place.message] = {**message, "content": content}
            marked["messages"] = messages
        else:
            marked[place.section] = _with_mark(marked[place.section], place.block, control)
    return marked


def keyed_digest(*parts: str) -> str:
    """Return a digest that only this project can make."""
    return _digest(parts, digest_key(_PURPOSE))


@lru_cache(maxsize=1_024)
def _digest(parts: tuple[str, ...], key: bytes) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), key=key, digest_size=16).hexdigest()


class _Reader:
    """Walks a prompt in the order that the model reads it, block by block."""

    def __init__(
        self, rates: ModelRates, feature: str, where: str, body: Mapping[str, Any]
    ) -> None:
        self._rates, self._body = rates, body
        self._state = hashlib.blake2b(key=digest_key(_PURPOSE), digest_size=12)
        self._prefixes = Prefixes()
        self._expected = self._most = 0
        space = [body.get(name) for name in ("model", "workspace_id", "inference_geo")]
        self._update([rates.provider, where, feature, *space])
        self._candidates: list[tuple[Position, BlockPath]] = []

    def read(self) -> Prefixes:
        body = self._body
        self._prefixes.hidden = _reads_more(body)
        self._most += BASE_TOKENS + _format_tokens(body)
        self._read_tools()
        self._update(["system", body.get("speed")])
        for index, block in enumerate(_blocks(body.get("system"))):
            self._read_block(block, BlockPath(section="system", block=index), "s", "")
        messages = list(body["messages"])
        self._update(["messages", *_settings(body, messages)])
        last = len(messages) - 1
        for number, message in enumerate(messages):
            blocks = _blocks(message["content"])
            role = str(message["role"])
            for index, block in enumerate(blocks):
                ends = number == last and index == len(blocks) - 1
                place = BlockPath(section="messages", block=index, message=number)
                self._read_block(block, place, "e" if ends else "m", role, opens=index == 0)
        return self._selected()

    def _read_tools(self) -> None:
        tools = list(self._body.get("tools") or ())
        if not tools:
            return
        self._most += CLIENT_TOOLS_TOKENS
        place = None
        for index, tool in enumerate(tools):
            kind = str(tool.get("type") or "custom")
            more = CLIENT_TOOL_TOKENS + next(
                (tokens for prefix, tokens in CLIENT_TOOLS.items() if kind.startswith(prefix)), 0
            )
            size, most = self._update(["tool", _unmarked(tool)])
            self._expected += size // BYTES_A_TOKEN
            self._most += most + more
            # A tool that is loaded later is not in the prompt.
            if not tool.get("defer_loading"):
                place = BlockPath(section="tools", block=index)
        if place is not None:
            self._end(place, "s")

    def _read_block(
        self,
        block: Mapping[str, Any],
        place: BlockPath,
        part: str,
        role: str,
        *,
        opens: bool = False,
    ) -> None:
        size, most = self._update([role, opens, _unmarked(block)])
        images, data, whole = _media(block)
        if whole:
            most = self._rates.context_window
        self._expected += (size - data) // BYTES_A_TOKEN + images * self._rates.image_tokens // 2
        self._most += most - min(data, most) + images * self._rates.image_tokens
        if _takes_mark(block) and role in ("", "user", "assistant"):
            self._end(place, part)

    def _end(self, place: BlockPath, part: str) -> None:
        position = Position(
            fingerprint=self._state.copy().hexdigest(),
            expected=self._expected,
            most=min(self._most, self._rates.context_window),
            part=part,
        )
        self._candidates.append((position, place))
        self._expected = self._most = 0

    def _update(self, value: object) -> tuple[int, int]:
        """Add to the fingerprint; return the bytes of the JSON, and the most tokens they make."""
        # Keys keep their order: to the API another order is another prompt.
        text = _JSON.encode(value)
        data = text.encode("utf-8", "surrogatepass")
        self._state.update(data + b"\0")
        return len(data), most_bytes(text)

    def _selected(self) -> Prefixes:
        # What comes after the last position is read too, and chooses among prices with the rest.
        self._prefixes.most = self._most + sum(one.most for one, _ in self._candidates)
        shared = [one for one in self._candidates if one[0].part == "s"]
        rest = self._candidates[len(shared) :]
        head, tail = _thinned(shared, 2, 4), _thinned(rest, FIRST, LAST)
        for position, place in (*head, *tail):
            self._prefixes.positions.append(position)
            self._prefixes.places.append(place)
        return self._prefixes


def _thinned(
    given: list[tuple[Position, BlockPath]], first: int, last: int
) -> list[tuple[Position, BlockPath]]:
    """Leave out the middle, whose tokens then belong to the first position after it."""
    if len(given) <= first + last:
        return given
    left_out = given[first:-last]
    position, place = given[-last]
    merged = Position(
        fingerprint=position.fingerprint,
        expected=position.expected + sum(one.expected for one, _ in left_out),
        most=position.most + sum(one.most for one, _ in left_out),
        part=position.part,
    )
    return [*given[:first], (merged, place), *given[-last + 1 :]]


def _totals(positions: Sequence[Position]) -> list[int]:
    totals, total = [], 0
    for position in positions:
        total += position.expected
        totals.append(total)
    return totals


def _blocks(content: Any) -> Sequence[Mapping[str, Any]]:
    if content is None:
        return ()
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _settings(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what changes how messages are rendered, and so is part of their prefix."""
    output = body.get("output_config") or {}
    images = any(
        block.get("type") == "image"
        for message in messages
        for block in _blocks(message["content"])
    )
    return [
        *(body.get(name) for name in ("tool_choice", "thinking", "output_format")),
        output,
        images,
    ]


def _reads_more(body: Mapping[str, Any]) -> bool:
    """Say whether more is read than the body shows, or read more than once."""
    if not body.keys() <= PARAMETERS.keys():
        return True
    more = ("thread", "container", "mcp_servers", "fallbacks", "compaction", "context_management")
    if any(body.get(name) for name in more):
        return True
    kinds = [str(tool.get("type") or "custom") for tool in body.get("tools") or ()]
    return any(
        kind.startswith(tuple(SERVER_TOOLS)) or not (kind == "custom" or _is_client_tool(kind))
        for kind in kinds
    )


def _is_client_tool(kind: str) -> bool:
    return kind.startswith(tuple(CLIENT_TOOLS))


def _format_tokens(body: Mapping[str, Any]) -> int:
    output = body.get("output_config") or {}
    if body.get("output_format") or output.get("format"):
        return OUTPUT_FORMAT_TOKENS + len(json.dumps(body.get("output_format") or output)) * 3
    return 0


def _media(block: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Return the images in a block, the bytes of their data, and whether it may be a window."""
    rule = BLOCKS.get(str(block.get("type")), "window")
    citations = block.get("citations")
    if rule == "window" or (isinstance(citations, Mapping) and citations.get("enabled")):
        return 0, 0, True
    source = block.get("source")
    images = data = 0
    nested = block.get("content")
    if rule == "image":
        images = 1
        found = source.get("data") if isinstance(source, Mapping) else None
        data = len(found) if isinstance(found, str) and found.isascii() else 0
    elif rule == "document":
        kind = source.get("type") if isinstance(source, Mapping) else None
        if kind == "content" and isinstance(source, Mapping):
            nested = source.get("content")
        elif kind != "text":
            return 0, 0, True
    whole = False
    for part in _blocks(nested) if isinstance(nested, list) else ():
        more, bytes_, fills = _media(part)
        images, data, whole = images + more, data + bytes_, whole or fills
    return images, data, whole


def _takes_mark(block: Mapping[str, Any]) -> bool:
    kind = block.get("type")
    if kind == "text":
        return bool(str(block.get("text") or "").strip())
    return kind in MARKABLE


def _with_mark(content: Any, index: int, control: Mapping[str, Any]) -> list[Any]:
    blocks = list(_blocks(content))
    blocks[index] = {**blocks[index], "cache_control": control}
    return blocks


def _contents(messages: Any) -> Iterator[Any]:
    for message in messages if isinstance(messages, (list, tuple)) else ():
        if isinstance(message, Mapping):
            yield message.get("content")


def _has_mark(content: Any) -> bool:
    if not isinstance(content, (list, tuple)):
        return False
    for block in content:
        if not isinstance(block, Mapping):
            continue
        source = block.get("source")
        inner = source.get("content") if isinstance(source, Mapping) else None
        if (
            block.get("cache_control") is not None
            or _has_mark(block.get("content"))
            or _has_mark(inner)
        ):
            return True
    return False


def _unmarked(block: Mapping[str, Any]) -> Mapping[str, Any]:
    if "cache_control" not in block:
        return block
    return {name: value for name, value in block.items() if name != "cache_control"}
