"""The most that one request can cost, told before it is sent.

The rules, each on the safe side of what the API documents:

- Text and the JSON of tools: no tokenizer that works on bytes makes more tokens than bytes, so
  the bytes of the body's JSON, the larger of UTF-8 and NFKC, plus tabled overheads.
- Images: the documented most of the model.
- PDFs, files, addresses, continued threads, citations and every block that is not classified:
  the context window.
- Server tools: the context window and all output for every turn of their loop, and their
  ``max_uses`` at their price. Without ``max_uses`` there is no bound.
- Prices: the long-context tier if the prompt may reach it, the dearest kind of cache write that
  is marked, fast mode if asked for, US inference unless another is declared.

Where the API's own count of a prompt sees all of it, that count and a margin may stand in for
the prompt's part: it is never wider than the rules, and often a quarter of them.

Parameters, blocks and tools are tabled below. What is in no table has no bound, until somebody
classifies it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Any, TypeGuard

from ai_budget import money
from ai_budget.exceptions import UnboundedCall
from ai_budget.pricing.folding import most_bytes
from ai_budget.pricing.rates import BATCH, ModelRates, TokenRates, resolve
from ai_budget.pricing.usage import SPEEDS
from ai_budget.values import Bound

PARAMETERS = {
    "model": "priced",
    "messages": "counted in bytes, blocks by BLOCKS",
    "system": "counted in bytes",
    "tools": "counted in bytes, typed tools by CLIENT_TOOLS and SERVER_TOOLS",
    "max_tokens": "priced as output",
    "cache_control": "priced: marks a cache write",
    "compaction": "priced: one more turn for every turn",
    "context_management": "priced: a compaction edit is one more turn for every turn",
    "fallbacks": "priced: every model that may answer",
    "inference_geo": "priced",
    "speed": "priced",
    "thread": "priced: a continued thread is the context window; refused with server tools",
    "container": "priced: the context window",
    "mcp_servers": "refused: a server decides what it sends",
    "output_config": "counted in bytes and an overhead",
    "output_format": "counted in bytes and an overhead",
    "thinking": "free: thinking counts as output",
    "tool_choice": "free: counted in bytes",
    "stop_sequences": "free: counted in bytes",
    "metadata": "free: counted in bytes",
    "diagnostics": "free: counted in bytes",
    "fallback_credit_token": "free: only lowers the bill",
    "billing_policy": "free: chooses who is billed",
    "service_tier": "free: priority costs as standard",
    "stream": "free",
    "user_profile_id": "free",
    "workspace_id": "free",
    "betas": "free: a header",
    "temperature": "free: sampling",
    "top_p": "free: sampling",
    "top_k": "free: sampling",
    "anthropic_version": "free: set by platforms",
    "anthropic_beta": "free: set by platforms",
}
"""Every request parameter that somebody has classified, and how."""

_NO_BOUND = frozenset({"mcp_servers"})

BLOCKS = {
    "text": "bytes",
    "image": "image",
    "document": "document",
    "search_result": "bytes",
    # Encrypted text is at least as long as its plain text.
    "thinking": "bytes",
    "redacted_thinking": "bytes",
    "tool_use": "bytes",
    "tool_result": "bytes",
    "server_tool_use": "bytes",
    "web_search_tool_result": "bytes",
    "web_fetch_tool_result": "bytes",
    "advisor_tool_result": "bytes",
    "code_execution_tool_result": "bytes",
    "bash_code_execution_tool_result": "bytes",
    "text_editor_code_execution_tool_result": "bytes",
    "tool_search_tool_result": "bytes",
    "mcp_tool_use": "bytes",
    "mcp_tool_result": "bytes",
    "compaction": "bytes",
    "fallback": "bytes",
    "container_upload": "window",
    "mcp_tool_listing": "window",
    "tool_addition": "window",
    "tool_removal": "bytes",
    "tool_reference": "window",
    "browser_state": "window",
}
"""Every kind of content block that somebody has classified. Others are the window."""

CLIENT_TOOLS = {
    "bash_": 1_024,
    "text_editor_": 2_048,
    "memory_": 4_096,
    "computer_toolset_": 16_384,
    "computer_": 4_096,
    "browser_toolset_": 16_384,
}
"""Tools of Anthropic's that run at the caller's, by prefix, and the tokens of their
definitions, which the request does not show: some times what the API's documents name."""

COUNTED_PARAMETERS = frozenset(
    {"messages", "model", "output_config", "system", "thinking", "tool_choice", "tools"}
)
"""What a count of the prompt is asked with: all that the model reads, and nothing else."""

UNCOUNTED_PARAMETERS = frozenset(
    {
        "compaction",
        "container",
        "context_management",
        "fallbacks",
        "mcp_servers",
        "output_format",
        "thread",
    }
)
"""What makes the model read more than a count sees, or read it with another tokenizer."""

COUNTED_BLOCKS = frozenset({"text", "image", "document", "tool_use", "tool_result"})
"""Blocks that a count is documented to see whole. Others may be left out of it, as the thinking
of earlier turns is for some models and not for others."""

COUNT_MARGIN_TOKENS = 64
COUNT_MARGIN_DIVISOR = 20
"""What is added to a count: 64 tokens, and one for every 20 counted.

The API calls its count an estimate that may differ from what is billed "by a small amount"
(https://platform.claude.com/docs/en/build-with-claude/token-counting). Users tell of differences
of some tens of tokens, and a twentieth leaves room for more in long prompts. Tokens that the API
adds on its own are counted and not billed. A bound that proves too low all the same is booked at
its true cost, and logged.
"""

SERVER_TOOLS = {
    "web_search_": "max_uses",
    "web_fetch_": "max_uses",
    "advisor_": "max_uses and max_tokens",
    "code_execution_": None,
    "tool_search_tool_": None,
    "mcp_toolset": None,
}
"""Tools that run at Anthropic's, by prefix, and the parameters that bound them (None: none)."""

LOOP_TURNS = 10
"""Turns after which the API pauses a loop of server tools; uses that are refused take turns
too. https://platform.claude.com/docs/en/agents-and-tools/tool-use/server-tools"""

BASE_TOKENS = 256
"""For what frames every request, and the system text of thinking."""

CLIENT_TOOLS_TOKENS = 1_024
"""For the system text that comes with any client tool (588 tokens were seen for 428 bytes)."""

CLIENT_TOOL_TOKENS = 64
"""For the frame of each client tool."""

_EXPECTED_BYTES = 3
"""Bytes a token from which on a prompt is not expected to fit into a window."""

MOST_TOKENS = 2**31 - 1
"""What the journal's column holds; no model writes near as much."""

OUTPUT_FORMAT_TOKENS = 1_024
"""For the system text that explains a schema of the output."""


@dataclass(slots=True)
class _Prompt:
    """What a walk through a body finds."""

    text_tokens: int = 0
    media_bytes: int = 0
    images: int = 0
    counted: int | None = None
    whole_window: bool = False
    marks: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def fill_window(self, reason: str) -> None:
        self.whole_window = True
        if reason not in self.reasons:
            self.reasons.append(reason)

    def tokens(self, rates: ModelRates, written: int = 0) -> int:
        """Return the most that a model reads, ``written`` before it being part of that."""
        most = rates.context_window
        if not self.whole_window:
            most = min(most, self.text_tokens + self.images * rates.image_tokens + written)
        return most if self.counted is None else min(most, _with_margin(self.counted))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loop:
    """How often the model may run within one request, and what its server tools use."""

    turns: int = 1
    searches: int = 0
    advisors: tuple[tuple[ModelRates, int, int], ...] = ()  # rates, uses, output tokens a use
    unbounded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fallback:
    """A model that may answer in another's place, and the output it may make."""

    model: str
    max_tokens: int
    speed: str


def bound(
    body: Mapping[str, Any],
    rates: ModelRates,
    *,
    declared_geo: str | None = None,
    batch: bool = False,
    region: str = "",
    allow_unbounded: bool = False,
    counted: int | None = None,
    at: datetime | None = None,
) -> Bound:
    """Return the most that the request can use and cost.

    ``body`` is the request's JSON with ``max_tokens`` set; ``declared_geo`` is the workspace's
    default geography where it is known. ``counted`` is the API's count of the prompt in tokens,
    asked with ``count_request``; it can only lower the bound. Raises ``UnboundedCall``, which says
    what to set,
    unless ``allow_unbounded``: then what has a bound is counted, and the loop's usual turns.
    Raises ``UnpricedModel`` where a model, or the speed of the first, has no price.
    """
    max_tokens = _max_tokens(body)
    loop = _loop(body, rates, region=region, at=at)
    unbounded = [*_unbounded_parameters(body), *loop.unbounded]
    fallbacks = _fallbacks(body, unbounded)
    speed = str(body.get("speed") or "")
    speeds = {speed, *(entry.speed for entry in fallbacks)}
    if not speeds <= SPEEDS:
        unbounded.append("The speed is not classified: leave it out, or set standard or fast.")
    if unbounded and not allow_unbounded:
        raise UnboundedCall(" ".join(unbounded))
    rates.bands(speed)  # raises UnpricedModel; a helper without this speed runs at its own
    prompt = _read_prompt(body, turns=loop.turns)
    if counted is not None and count_request(body) is not None:
        prompt.counted, prompt.reasons = counted, []
    geo = _geo(body, rates, declared_geo)
    prompt_tokens = prompt.tokens(rates)
    total = _attempt(rates, prompt_tokens, max_tokens, loop.turns, prompt.marks, speeds) * geo
    input_tokens, output_tokens = prompt_tokens * loop.turns, max_tokens * loop.turns
    for entry in fallbacks:
        other = resolve(entry.model, at=at, provider=rates.provider, region=region)
        # A fallback reads the prompt again, and what was written before it.
        reread = prompt.tokens(other, written=output_tokens)
        total += _attempt(other, reread, entry.max_tokens, loop.turns, prompt.marks, speeds) * _geo(
            body, other, declared_geo
        )
        input_tokens += reread * loop.turns
        output_tokens += entry.max_tokens * loop.turns
    # Nothing says that a fallback goes on counting the uses of tools where the others stopped.
    runs = 1 + len(fallbacks)
    for advisor, uses, cap in loop.advisors:
        uses *= runs
        total += _attempt(advisor, advisor.context_window, cap, uses, {"5m", "1h"}, speeds) * _geo(
            body, advisor, declared_geo
        )
        input_tokens += advisor.context_window * uses
        output_tokens += cap * uses
    searches = loop.searches * runs
    if batch:
        total *= Fraction(*BATCH)
    total += Fraction(searches * rates.web_searches, 1_000)
    nanousd = money.ceil_div(total.numerator, total.denominator)
    if nanousd > money.MAX_NANOUSD or max_tokens > MOST_TOKENS:
        raise UnboundedCall("The request may cost more than can be counted: lower max_tokens.")
    return Bound(
        nanousd=nanousd,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        web_searches=searches,
        hidden=bool(
            loop.turns > 1 or fallbacks or loop.advisors or unbounded or "compaction" in body
        ),
        reasons=(*prompt.reasons, *unbounded),
    )


def _attempt(
    rates: ModelRates, prompt: int, output: int, turns: int, marks: set[str], speeds: set[str]
) -> Fraction:
    """Return nano-dollars for so many turns of one model, each at its worst.

    One speed is told for a whole answer, and fast is no promise: either may be what is billed.
    """
    bands = (*rates.standard, *rates.fast) if "fast" in speeds else rates.standard
    reachable = [band.rates for band in bands if band.above < prompt * turns or band.above == 0]
    worst_input = max(_worst_input(per, marks) for per in reachable)
    worst_output = max(per.output for per in reachable)
    return Fraction((prompt * worst_input + output * worst_output) * turns, 1_000_000)


def _worst_input(per: TokenRates, marks: set[str]) -> int:
    worst = max(per.input, per.cache_read)
    if marks:
        worst = max(worst, per.cache_write_5m)
    if "1h" in marks:
        worst = max(worst, per.cache_write_1h)
    return worst


def _geo(body: Mapping[str, Any], rates: ModelRates, declared: str | None) -> Fraction:
    geo = body.get("inference_geo") or declared
    if geo == "global":
        return Fraction(1)
    return Fraction(*rates.us_geo)


def _max_tokens(body: Mapping[str, Any]) -> int:
    value = body.get("max_tokens")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnboundedCall("max_tokens must be a whole number of tokens.")
    return value


def _unbounded_parameters(body: Mapping[str, Any]) -> list[str]:
    said = [
        f"The parameter {name} has no bound: leave it out, or allow unbounded calls for the "
        "feature."
        for name in body
        if name in _NO_BOUND and body[name]
    ]
    said += [
        f"The parameter {name} is not classified, so its cost has no bound: leave it out, or "
        "allow unbounded calls for the feature."
        for name in body
        if name not in PARAMETERS
    ]
    return said


def _fallbacks(body: Mapping[str, Any], unbounded: list[str]) -> list[_Fallback]:
    entries = body.get("fallbacks")
    if not entries:
        return []
    if not isinstance(entries, (list, tuple)) or not all(
        isinstance(entry, Mapping) and entry.get("model") for entry in entries
    ):
        unbounded.append("Name the fallback models: a default chain has no bound.")
        return []
    speed = str(body.get("speed") or "")
    return [
        _Fallback(
            model=str(entry["model"]),
            max_tokens=_max_tokens(entry if entry.get("max_tokens") else body),
            # Left out, the request's speed may apply.
            speed=str(entry.get("speed") or speed),
        )
        for entry in entries
    ]


def _loop(body: Mapping[str, Any], rates: ModelRates, *, region: str, at: datetime | None) -> _Loop:
    uses, searches = 0, 0
    advisors: list[tuple[ModelRates, int, int]] = []
    unbounded: list[str] = []
    looping = False
    for tool in _tools(body):
        kind = str(tool.get("type") or "custom")
        prefix = next((prefix for prefix in SERVER_TOOLS if kind.startswith(prefix)), None)
        if prefix is None:
            if kind != "custom" and not _client_tool_tokens(kind):
                unbounded.append(f"The tool {kind} is not classified: leave it out.")
                looping = True
            continue
        looping = True
        if SERVER_TOOLS[prefix] is None:
            unbounded.append(f"The tool {kind} has no bound: leave it out.")
            continue
        max_uses = tool.get("max_uses")
        if not _is_count(max_uses):
            unbounded.append(f"Set max_uses on the tool {kind}.")
            continue
        uses += max_uses
        if prefix == "web_search_":
            searches += max_uses
        if prefix == "advisor_":
            cap = tool.get("max_tokens")
            if not _is_count(cap) or not tool.get("model"):
                unbounded.append(f"Set model and max_tokens on the tool {kind}.")
                continue
            advisor = resolve(str(tool["model"]), at=at, provider=rates.provider, region=region)
            advisors.append((advisor, max_uses, cap))
    if body.get("mcp_servers"):
        looping = True
    if looping and body.get("thread"):
        unbounded.append(
            "Leave out thread where there are server tools: its later turns would use them, and "
            "do not show them."
        )
    turns = max(uses + 1, LOOP_TURNS) if looping else 1
    if _compacts(body):
        turns *= 2
    return _Loop(
        turns=turns,
        searches=searches,
        advisors=tuple(advisors),
        unbounded=tuple(unbounded),
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _compacts(body: Mapping[str, Any]) -> bool:
    management = body.get("context_management")
    edits = management.get("edits") if isinstance(management, Mapping) else None
    # Edits that clear things need no model; one that nobody knows may.
    return bool(body.get("compaction")) or any(
        not str(edit.get("type")).startswith("clear_") for edit in _mappings(edits)
    )


def _tools(body: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Yield every tool of a request, also those that are defined on the way in its messages."""
    yield from _mappings(body.get("tools"))
    for message in _mappings(body.get("messages")):
        for block in _mappings(message.get("content")):
            for change in (block, *_mappings(block.get("tool_changes"))):
                tool = change.get("tool")
                definition = tool.get("definition") if isinstance(tool, Mapping) else None
                if isinstance(definition, Mapping):
                    yield definition


# The count of a prompt


def count_request(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what to ask the API with for the count of a prompt.

    None where its count would not be all that the model reads: server tools and MCP, addresses
    and files, threads and containers, other models that may answer, citations, and whatever
    nobody has classified.
    """
    given = {name for name, value in body.items() if value}
    if given & UNCOUNTED_PARAMETERS or not given <= PARAMETERS.keys():
        return None
    if not all(_is_counted_tool(tool) for tool in _tools(body)):
        return None
    contents = [
        body.get("system"),
        *(part.get("content") for part in _mappings(body.get("messages"))),
    ]
    if not all(_is_counted(content) for content in contents):
        return None
    return {name: value for name, value in body.items() if name in COUNTED_PARAMETERS}


def _with_margin(counted: int) -> int:
    return counted + COUNT_MARGIN_TOKENS + money.ceil_div(counted, COUNT_MARGIN_DIVISOR)


def _is_counted_tool(tool: Mapping[str, Any]) -> bool:
    kind = str(tool.get("type") or "custom")
    return kind == "custom" or bool(_client_tool_tokens(kind))


def _is_counted(content: Any) -> bool:
    """Say whether a count sees all of some content, and of what is in it."""
    if content is None or isinstance(content, str):
        return True
    if isinstance(content, Mapping):
        content = [content]
    return all(_is_counted_block(block) for block in _mappings(content))


def _is_counted_block(block: Mapping[str, Any]) -> bool:
    if block.get("type") not in COUNTED_BLOCKS or block.get("citations"):
        return False
    source = block.get("source")
    if isinstance(source, Mapping):
        if source.get("type") not in ("base64", "text", "content"):
            return False
        if not _is_counted(source.get("content")):
            return False
    return _is_counted(block.get("content"))


# The prompt


def is_expected_to_fit(body: Mapping[str, Any], rates: ModelRates) -> bool:
    """Say whether a prompt should fit into a model's window, at three bytes of text a token.

    Images count as in the bound. A PDF's pages are not known: its bytes stand for their text.
    """
    prompt = _read_prompt(body, turns=1)
    text = prompt.text_tokens if not prompt.whole_window else json_bytes(body) - prompt.media_bytes
    return text // _EXPECTED_BYTES + prompt.images * rates.image_tokens <= rates.context_window


NESTED_TOO_DEEPLY = "The request's body is nested too deeply to be read: flatten its content."


def json_bytes(body: Mapping[str, Any]) -> int:
    """Return at least the bytes of the body's JSON, as it is or folded to NFKC."""
    try:
        text = json.dumps(body, ensure_ascii=False, default=plain_json)
    except (TypeError, ValueError):
        raise UnboundedCall("The request's body is not JSON.") from None
    except RecursionError:
        raise UnboundedCall(NESTED_TOO_DEEPLY) from None
    return most_bytes(text)


def plain_json(value: Any) -> Any:
    """Turn an object of the SDK, or an iterable, into plain JSON as the SDK will."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _read_prompt(body: Mapping[str, Any], *, turns: int) -> _Prompt:
    prompt = _Prompt(text_tokens=BASE_TOKENS)
    _mark(body.get("cache_control"), prompt)
    for message in _mappings(body.get("messages")):
        _read_content(message.get("content"), prompt)
    _read_content(body.get("system"), prompt)
    _read_tools(body, prompt)
    thread = body.get("thread")
    if thread:
        # Nothing says that a thread is not kept in the prompt cache.
        prompt.marks.update(("5m", "1h"))
        if not isinstance(thread, Mapping) or thread.get("type") != "create":
            prompt.fill_window("a continued thread")
    if body.get("container"):
        prompt.fill_window("a container")
    if any(_has_format(part) for part in (body, *_mappings(body.get("fallbacks")))):
        prompt.text_tokens += OUTPUT_FORMAT_TOKENS
    if turns > 1:
        # Nothing says that a loop does not keep its own turns in the prompt cache.
        prompt.marks.add("5m")
        prompt.whole_window = True
    if not prompt.whole_window:
        prompt.text_tokens += json_bytes(body) - prompt.media_bytes
    return prompt


def _has_format(part: Mapping[str, Any]) -> bool:
    output = part.get("output_config")
    return bool(part.get("output_format") or (isinstance(output, Mapping) and output.get("format")))


def _read_tools(body: Mapping[str, Any], prompt: _Prompt) -> None:
    tools = list(_tools(body))
    for tool in tools:
        _mark(tool.get("cache_control"), prompt)
        prompt.text_tokens += CLIENT_TOOL_TOKENS + _client_tool_tokens(str(tool.get("type")))
    if tools:
        prompt.text_tokens += CLIENT_TOOLS_TOKENS


def _client_tool_tokens(kind: str) -> int:
    return next((tokens for prefix, tokens in CLIENT_TOOLS.items() if kind.startswith(prefix)), 0)


def _read_content(content: Any, prompt: _Prompt) -> None:
    if content is None or isinstance(content, str):
        return
    if isinstance(content, Mapping):
        content = [content]
    for block in _mappings(content):
        _read_block(block, prompt)


def _read_block(block: Mapping[str, Any], prompt: _Prompt) -> None:
    _mark(block.get("cache_control"), prompt)
    kind = str(block.get("type"))
    rule = BLOCKS.get(kind, "window")
    if rule == "window":
        prompt.fill_window(f"a block of the type {kind}")
    elif rule == "image":
        prompt.images += 1
        prompt.media_bytes += _data_bytes(block.get("source"))
    elif rule == "document":
        _read_document(block, prompt)
    citations = block.get("citations")
    if isinstance(citations, Mapping) and citations.get("enabled"):
        # The API cuts the text into numbered pieces, and does not say how many.
        prompt.fill_window("citations")
    _read_content(block.get("content"), prompt)


def _read_document(block: Mapping[str, Any], prompt: _Prompt) -> None:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "content":
        _read_content(source.get("content") if isinstance(source, Mapping) else None, prompt)
    elif kind != "text":
        prompt.fill_window("a document that is not plain text")


def _data_bytes(source: Any) -> int:
    if isinstance(source, Mapping) and source.get("type") == "base64":
        data = source.get("data")
        return len(data) if isinstance(data, str) and data.isascii() else 0
    return 0


def _mark(mark: Any, prompt: _Prompt) -> None:
    if mark:
        ttl = mark.get("ttl") if isinstance(mark, Mapping) else None
        # An unknown lifetime may be the dearest.
        prompt.marks.add("5m" if ttl in (None, "5m") else "1h")


def _mappings(items: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, Mapping)):
        return
    for item in items:
        if hasattr(item, "model_dump"):
            item = item.model_dump(mode="json", exclude_unset=True)
        if isinstance(item, Mapping):
            yield item
