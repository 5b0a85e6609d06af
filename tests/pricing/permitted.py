"""Requests of every shape, and any usage that the API may report for one.

Written from the API's documentation, not from the code under test: how much a model may read,
write and use is reckoned here in its own way, so that the two can disagree.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
BEFORE_THE_TIERS_ENDED = datetime(2026, 3, 1, 12, tzinfo=UTC)

WINDOWS = {
    "claude-opus-5-5": 1_000_000,
    "claude-opus-4-8": 1_000_000,
    "claude-opus-4-5": 200_000,
    "claude-fable-5-2": 1_000_000,
    "claude-mythos-preview": 1_000_000,
    "claude-sonnet-5-5": 1_000_000,
    "claude-sonnet-4-6": 1_000_000,
    "claude-sonnet-4-5": 1_000_000,
    "claude-haiku-5-5": 1_000_000,
    "claude-haiku-4-5": 200_000,
}
SMALL_IMAGES = {"claude-opus-4-5", "claude-sonnet-4-6", "claude-sonnet-4-5", "claude-haiku-4-5"}
FAST = {"claude-opus-5-5", "claude-opus-4-8", "claude-fable-5-2"}

# Tokens that the API adds to what the request shows, as documented or as seen.
FRAME = 100
MESSAGE_FRAME = 8
BLOCK_FRAME = 8
IMAGE_FRAME = 16
TOOL_FRAME = 40
TOOLS_TEXT = 588
SCHEMA_TEXT = 600
TYPED_TOOLS = {
    "bash_20250124": 245,
    "text_editor_20250728": 700,
    "memory_20250818": 2_000,
    "computer_20251124": 1_500,
    "computer_toolset_20260801": 6_000,
    "browser_toolset_20260801": 6_000,
}
TURNS_BEFORE_A_PAUSE = 10


# Requests ----------------------------------------------------------------------------------------

LETTERS = st.sampled_from(
    [
        *'aZ09 .\n\t"\\/<>{}',
        *"éßñ",
        *"жщ",
        *"שלום",
        *"सक्षि",
        *"語言漢字かなカナ",
        "안",
        "ᄀ",  # a Hangul letter that composes with what follows
        "ᅡ",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "e\u0301",
        "a\u0323\u0302\u0301",
        "\u0958",
        "\ufb2c",
        "\ufdfa",
        "\ufdfb",
        "\u3300",
        "㍿",
        "ﬃ",
        "\uff21",
        "①",
        "\u2026",
        "\u200b",
        "\x00",
        "\ud800",
        "\udfff",
        "\U0010ffff",
    ]
)


@st.composite
def texts(draw: st.DrawFn, *, longest: int = 5_000) -> str:
    piece = "".join(draw(st.lists(LETTERS, max_size=12)))
    return piece * draw(st.sampled_from([1, 1, 1, 3, 50, longest]))


MARKS = st.sampled_from(
    [
        None,
        None,
        None,
        {"type": "ephemeral"},
        {"type": "ephemeral", "ttl": "5m"},
        {"type": "ephemeral", "ttl": "1h"},
    ]
)
SMALL_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | texts(longest=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts(longest=1), inner, max_size=3)
    ),
    max_leaves=6,
)


def marked(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    block = st.fixed_dictionaries(
        {
            name: value if isinstance(value, st.SearchStrategy) else st.just(value)
            for name, value in fields.items()
        }
    )
    return st.builds(_with_mark, block, MARKS)


def _with_mark(block: dict[str, Any], mark: Any) -> dict[str, Any]:
    return block if mark is None else {**block, "cache_control": mark}


text_blocks = marked(type="text", text=texts())
image_blocks = marked(
    type="image",
    source=st.sampled_from(
        [
            {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo" * 2},
            {"type": "base64", "media_type": "image/jpeg", "data": "A" * 20_000},
            {"type": "url", "url": "https://example.com/a.png"},
            {"type": "file", "file_id": "file_1"},
        ]
    ),
)
sources = st.one_of(
    st.builds(lambda text: {"type": "text", "media_type": "text/plain", "data": text}, texts()),
    st.builds(lambda text: {"type": "content", "content": text}, texts()),
    st.builds(
        lambda blocks: {"type": "content", "content": blocks},
        st.lists(text_blocks | image_blocks, max_size=2),
    ),
    st.sampled_from(
        [
            {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="},
            {"type": "url", "url": "https://example.com/a.pdf"},
            {"type": "file", "file_id": "file_1"},
        ]
    ),
)
document_blocks = st.builds(
    lambda block, citations: {**block, **citations},
    marked(type="document", source=sources, title=texts(longest=3), context=texts(longest=3)),
    st.sampled_from([{}, {}, {"citations": {"enabled": False}}, {"citations": {"enabled": True}}]),
)
search_results = marked(
    type="search_result",
    source="https://example.com",
    title=texts(longest=3),
    content=st.lists(text_blocks, max_size=2),
    citations=st.sampled_from([{"enabled": False}, {"enabled": True}]),
)
plain_blocks = st.one_of(text_blocks, image_blocks, document_blocks, search_results)
blocks = st.one_of(
    plain_blocks,
    marked(type="tool_result", tool_use_id="toolu_1", content=st.lists(plain_blocks, max_size=3)),
    marked(type="tool_result", tool_use_id="toolu_1", content=texts()),
    marked(type="tool_use", id="toolu_1", name="add", input=SMALL_JSON),
    marked(type="thinking", thinking=texts(), signature="c2lnbmF0dXJl" * 50),
    marked(type="redacted_thinking", data="ZW5jcnlwdGVk" * 50),
    marked(type="compaction", content=texts()),
    marked(type="container_upload", file_id="file_1"),
    marked(type="something_new", content=texts(longest=3)),
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant"]),
        "content": texts(longest=50_000) | st.lists(blocks, max_size=3),
    }
)
client_tools = st.one_of(
    marked(name="add", description=texts(longest=20), input_schema=SMALL_JSON),
    marked(type="custom", name="add", input_schema=SMALL_JSON),
    *(marked(type=kind, name="tool") for kind in TYPED_TOOLS),
)
uses = st.sampled_from([0, 1, 3, 9, 10, 25])
server_tools = st.one_of(
    marked(type="web_search_20260318", name="web_search", max_uses=uses),
    marked(type="web_search_20250305", name="web_search", max_uses=uses),
    marked(type="web_fetch_20260318", name="web_fetch", max_uses=uses, max_content_tokens=100),
    marked(
        type="advisor_20260301",
        name="advisor",
        max_uses=uses,
        max_tokens=st.sampled_from([1_024, 64_000]),
        model=st.sampled_from(sorted(WINDOWS)),
        caching=MARKS,
    ),
)
fallback_entries = st.builds(
    lambda entry, extra: {**entry, **extra},
    st.fixed_dictionaries({"model": st.sampled_from(sorted(WINDOWS))}),
    st.sampled_from(
        [
            {},
            {"max_tokens": 50_000},
            {"max_tokens": None},
            {"speed": "fast"},
            {"speed": None},
            {"output_config": {"format": {"type": "json_schema", "schema": {"a": "b" * 300}}}},
        ]
    ),
)
schemas = st.builds(
    lambda schema: {"format": {"type": "json_schema", "schema": schema}, "effort": "high"},
    SMALL_JSON,
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A request that has a bound."""
    model = draw(st.sampled_from(sorted(WINDOWS)))
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": draw(st.sampled_from([0, 1, 100, 8_192, 64_000])),
        "messages": draw(st.lists(messages, min_size=1, max_size=3)),
    }
    optional: dict[str, st.SearchStrategy[Any]] = {
        "system": texts(longest=30_000) | st.lists(text_blocks, max_size=2),
        "cache_control": MARKS,
        "inference_geo": st.sampled_from(["us", "global", None]),
        "thinking": st.sampled_from([{"type": "adaptive"}, {"type": "disabled"}]),
        "output_config": schemas,
        "stop_sequences": st.lists(texts(longest=3), max_size=2),
        "context_management": st.sampled_from(
            [
                {"edits": [{"type": "clear_tool_uses_20250919"}]},
                {"edits": [{"type": "compact_20260112"}]},
            ]
        ),
        "compaction": st.just({"type": "summarize"}),
        "container": st.just("container_1"),
        "fallbacks": st.lists(fallback_entries, max_size=2),
    }
    for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True)):
        body[name] = draw(optional[name])
    tools: list[dict[str, Any]] = draw(st.lists(client_tools, max_size=2))
    threaded = draw(st.sampled_from([None, None, None, "create", "continue"]))
    if threaded is not None:
        body["thread"] = {"type": threaded, "previous_message_id": "msg_1"}
    elif draw(st.sampled_from([True, False, False])):
        tools += draw(st.lists(server_tools, min_size=1, max_size=2))
    in_messages: bool = draw(st.booleans())
    if tools and not in_messages:
        body["tools"] = tools
    elif tools:
        added = [
            {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}
            for tool in tools
        ]
        body["messages"] = [*body["messages"], {"role": "system", "content": added}]
    if model in FAST and draw(st.booleans()):
        body["speed"] = "fast"
    return body


# What may be read --------------------------------------------------------------------------------


def declared_tools(body: Mapping[str, Any]) -> list[Any]:
    inline = [
        block["tool"]["definition"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for block in message["content"]
        if block["type"] == "tool_addition"
    ]
    return [*body.get("tools", ()), *inline]


def all_blocks(content: Any) -> Iterator[Any]:
    """Every block of a content, at any depth."""
    if not isinstance(content, list):
        return
    for block in content:
        yield block
        yield from all_blocks(block.get("content"))
        yield from all_blocks(source_of(block).get("content"))


def source_of(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """A block's source, where it is no mere address."""
    source = block.get("source")
    return source if isinstance(source, dict) else {}


def every_block(body: Mapping[str, Any]) -> list[Any]:
    found = list(all_blocks(body.get("system")))
    for message in body["messages"]:
        found += all_blocks(message["content"])
    return found


def is_unmeasured(block: Mapping[str, Any]) -> bool:
    kind = source_of(block).get("type")
    return (
        block["type"] in {"container_upload", "something_new", "tool_addition"}
        or (block["type"] == "document" and kind in {"base64", "url", "file"})
        or bool((block.get("citations") or {}).get("enabled"))
    )


def shown_to_the_model(body: Mapping[str, Any]) -> Iterator[str]:
    """The words of a request, without the JSON around them."""

    def of_content(content: Any) -> Iterator[str]:
        if isinstance(content, str):
            yield content
            return
        for block in content or ():
            for name in ("text", "thinking", "data", "signature", "title", "context", "name"):
                if isinstance(block.get(name), str):
                    yield block[name]
            if "input" in block:
                yield json.dumps(block["input"], ensure_ascii=False, separators=(",", ":"))
            if isinstance(block.get("source"), str):
                yield block["source"]
            if source_of(block).get("type") == "text":
                yield source_of(block)["data"]
            yield from of_content(source_of(block).get("content"))
            yield from of_content(block.get("content"))

    yield from of_content(body.get("system"))
    for message in body["messages"]:
        yield from of_content(message["content"])
    for tool in declared_tools(body):
        yield json.dumps(tool, ensure_ascii=False, separators=(",", ":"))
    for part in (body, *(body.get("fallbacks") or ())):
        yield json.dumps(part.get("output_config"), ensure_ascii=False, separators=(",", ":"))


def most_read(body: Mapping[str, Any], model: str, *, folded: bool) -> int:
    """The most tokens that one turn of a model reads."""
    window = WINDOWS[model]
    blocks_ = every_block(body)
    thread = body.get("thread")
    if (
        loops(body)
        or compacts(body)
        or body.get("container")
        or (thread and thread["type"] == "continue")
        or any(is_unmeasured(block) for block in blocks_)
    ):
        return window
    words = list(shown_to_the_model(body))
    if folded:
        words = [unicodedata.normalize("NFKC", word) for word in words]
    tools = declared_tools(body)
    images = sum(block["type"] == "image" for block in blocks_)
    tokens: int = (
        FRAME
        + sum(len(word.encode("utf-8", "surrogatepass")) for word in words)
        + MESSAGE_FRAME * len(body["messages"])
        + BLOCK_FRAME * len(blocks_)
        + images * ((1_568 if model in SMALL_IMAGES else 4_784) + IMAGE_FRAME)
        + (TOOLS_TEXT if tools else 0)
        + sum(TOOL_FRAME + TYPED_TOOLS.get(tool.get("type"), 0) for tool in tools)
        + (SCHEMA_TEXT if "schema" in str(body.get("output_config")) else 0)
        + (SCHEMA_TEXT if "schema" in str(body.get("fallbacks")) else 0)
    )
    return min(tokens, window)


def server_tools_of(body: Mapping[str, Any]) -> list[Any]:
    return [
        tool
        for tool in declared_tools(body)
        if str(tool.get("type")).startswith(("web_search", "web_fetch", "advisor"))
    ]


def loops(body: Mapping[str, Any]) -> bool:
    return bool(server_tools_of(body))


def compacts(body: Mapping[str, Any]) -> bool:
    return "compact" in body.get("context_management", {}).get("edits", [{}])[0].get(
        "type", ""
    ) or bool(body.get("compaction"))


def lifetimes(body: Mapping[str, Any]) -> set[str]:
    """The kinds of cache write that a request may lead to."""
    marks = [
        part.get("cache_control")
        for part in (body, *every_block(body), *declared_tools(body))
        if part.get("cache_control")
    ]
    found = {mark.get("ttl", "5m") for mark in marks}
    if loops(body) or compacts(body):
        found.add("5m")
    if body.get("thread"):
        found |= {"5m", "1h"}
    return found


# Usage -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, where and how it is made, and usage that the API may report for it."""

    body: dict[str, Any]
    at: datetime
    batch: bool
    declared_geo: str | None
    usage: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    body = draw(bodies())
    batch = body.get("speed") != "fast" and draw(st.sampled_from([False, False, True]))
    declared = draw(st.sampled_from([None, None, "us", "global"]))
    return Case(
        body=body,
        at=draw(st.sampled_from([NOW, NOW, BEFORE_THE_TIERS_ENDED])),
        batch=batch,
        declared_geo=declared,
        usage=draw(usages(body, batch=batch, declared_geo=declared)),
    )


@st.composite
def usages(
    draw: st.DrawFn, body: dict[str, Any], *, batch: bool, declared_geo: str | None
) -> dict[str, Any]:
    """Any usage that a request permits, the most of everything as often as anything less."""
    all_of_it = draw(st.booleans())
    folded = draw(st.booleans())
    writes = lifetimes(body)
    fallbacks = body.get("fallbacks") or []

    def up_to(most: int) -> int:
        return most if all_of_it else draw(st.sampled_from([0, min(1, most), most // 2, most]))

    def tokens(read: int, written: int, kinds: set[str]) -> dict[str, Any]:
        counts = dict.fromkeys(("input", "read", *kinds), 0)
        favoured = draw(st.sampled_from(sorted(counts)))
        counts[favoured] = read
        if not all_of_it and read:
            other = draw(st.sampled_from(sorted(counts)))
            moved = draw(st.integers(0, read))
            counts[favoured] -= moved
            counts[other] += moved
        split = {
            "ephemeral_5m_input_tokens": counts.get("5m", 0),
            "ephemeral_1h_input_tokens": counts.get("1h", 0),
        }
        return {
            "input_tokens": counts["input"],
            "cache_read_input_tokens": counts["read"],
            "cache_creation_input_tokens": sum(split.values()),
            "cache_creation": split,
            "output_tokens": written,
        }

    used = server_tools_of(body)
    turns = max(sum(tool["max_uses"] for tool in used) + 1, TURNS_BEFORE_A_PAUSE) if used else 1
    chain = [(body["model"], body["max_tokens"])]
    chain += [(one["model"], one.get("max_tokens") or body["max_tokens"]) for one in fallbacks]
    chain = chain[: draw(st.integers(1, len(chain)))] if not all_of_it else chain
    entries: list[dict[str, Any]] = []
    searches, before = 0, 0
    for place, (model, cap) in enumerate(chain):
        served_by = {"model": model} if place or draw(st.booleans()) else {}
        here = max(1, up_to(turns))
        for turn in range(here):
            read = min(most_read(body, model, folded=folded) + before, WINDOWS[model])
            last = place and place + 1 == len(chain) and turn + 1 == here
            kind = "fallback_message" if last else "message"
            written = up_to(cap)
            entries.append({"type": kind, **served_by, **tokens(up_to(read), written, writes)})
            if compacts(body):
                # The summary is of the model that was asked: entries of this kind name none.
                summary = tokens(up_to(WINDOWS[body["model"]]), up_to(body["max_tokens"]), writes)
                if not place:
                    entries.append({"type": "compaction", **summary})
        before += cap * turns
        for tool in used:
            if tool["type"].startswith("web_search"):
                searches += up_to(tool["max_uses"])
            if tool["type"].startswith("advisor"):
                mark = tool.get("caching")
                kinds = {mark.get("ttl", "5m")} if mark else set()
                for _ in range(up_to(tool["max_uses"])):
                    advice = tokens(up_to(WINDOWS[tool["model"]]), up_to(tool["max_tokens"]), kinds)
                    entries.append({"type": "advisor_message", "model": tool["model"], **advice})

    total = _total(entries)
    usage = {
        **total,
        "server_tool_use": {"web_search_requests": searches, "web_fetch_requests": 3},
        "service_tier": "batch" if batch else draw(st.sampled_from(["standard", "priority", None])),
    }
    fast = "fast" in {body.get("speed"), *(one.get("speed") for one in fallbacks)}
    served_fast = fast and chain[-1][0] in FAST and (all_of_it or draw(st.booleans()))
    usage["speed"] = "fast" if served_fast else draw(st.sampled_from(["standard", None]))
    asked = body.get("inference_geo") or declared_geo
    anywhere = ["us", "us", "global", "not_available", None]
    usage["inference_geo"] = asked or draw(st.sampled_from(anywhere))
    only_messages = len(chain) == 1 and all(one["type"] == "message" for one in entries)
    if not only_messages or draw(st.booleans()):
        usage["iterations"] = entries
    return usage


def _total(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts at the top: those of the message entries."""
    own = [one for one in entries if one["type"] in {"message", "fallback_message"}]
    names = (
        "input_tokens",
        "output_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    )
    total: dict[str, Any] = {name: sum(one[name] for one in own) for name in names}
    total["cache_creation"] = {
        name: sum(one["cache_creation"][name] for one in own)
        for name in ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
    }
    return total
