"""The messages of the simulated API, whole or as the events of a stream."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ai_budget.testing.prompt_cache_model import CacheUse
from ai_budget.testing.steps import Reply
from ai_budget.testing.tokens import BYTES_PER_TOKEN, cut_to_tokens, json_tokens, text_tokens

_QUOTED_WORDS = 8
_SHORTEST_DELTA = 24  # characters
_MOST_DELTAS = 64  # per block
_REMARKS = (
    "It depends on a few things, and the simplest of them usually decides.",
    "There are two sides to it, and both are worth a sentence.",
    "The short answer is yes, with one condition that is easy to meet.",
    "The short answer is no, although the reason is more useful than the answer.",
    "Start with the smallest case that could work, then look again.",
    "It has been asked before, and the first answer still holds.",
    "The usual advice applies: measure first, then decide.",
)
_FILLER = " This sentence is here to make the answer as long as it was asked to be."
_THOUGHT = "The question is plain, so a plain answer will do."
_SIGNATURE = "c2lnbmVkIGJ5IHRoZSBzaW11bGF0b3I="
_INPUT_JSON_BLOCKS = ("tool_use", "server_tool_use", "mcp_tool_use")
_START_OMITS = ("output_tokens_details", "server_tool_use", "iterations")
_DELTA_OMITS = ("cache_creation", "service_tier", "inference_geo", "speed")


class Event(NamedTuple):
    """One server-sent event; `generated` output tokens exist once it was made."""

    name: str
    payload: dict[str, Any]
    generated: int

    def encoded(self) -> bytes:
        """The event as it goes on the wire."""
        return b"event: %b\ndata: %b\n\n" % (self.name.encode(), to_json(self.payload))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A finished message, before anyone has read it."""

    message: dict[str, Any]
    start_usage: dict[str, Any]

    @property
    def usage(self) -> dict[str, Any]:
        """What is billed when all of it was made."""
        usage: dict[str, Any] = self.message["usage"]
        return usage

    def usage_when_cut(self, generated: int) -> dict[str, Any]:
        """What is billed when it was cut with `generated` output tokens made.

        Entries of `usage.iterations` stay as scripted.
        """
        details = self.usage.get("output_tokens_details")
        usage = {**self.usage, "output_tokens": generated}
        if details is not None:
            thought = min(details.get("thinking_tokens", 0), generated)
            usage["output_tokens_details"] = {**details, "thinking_tokens": thought}
        return usage

    def events(self) -> list[Event]:
        """The message as a stream, in the order of the API."""
        drafts = list(self._content_events())
        total = self.usage["output_tokens"]
        weight = sum(draft.weight for draft in drafts)
        events = [Event("message_start", self._message_start(), min(1, total))]
        made = 0
        for draft in drafts:
            made += draft.weight
            generated = -(-total * made // weight) if weight else total
            events.append(Event(draft.name, draft.payload, max(events[-1].generated, generated)))
            if len(events) == 2:
                events.append(Event("ping", {"type": "ping"}, events[-1].generated))
        events.append(Event("message_delta", self._message_delta(), total))
        events.append(Event("message_stop", {"type": "message_stop"}, total))
        return events

    def _message_start(self) -> dict[str, Any]:
        unfinished = {
            **self.message,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.start_usage,
        }
        return {"type": "message_start", "message": unfinished}

    def _message_delta(self) -> dict[str, Any]:
        delta = {key: self.message[key] for key in ("stop_reason", "stop_sequence", "stop_details")}
        usage = {key: value for key, value in self.usage.items() if key not in _DELTA_OMITS}
        return {"type": "message_delta", "delta": delta, "usage": usage}

    def _content_events(self) -> Iterator[_Draft]:
        thought = (self.usage.get("output_tokens_details") or {}).get("thinking_tokens", 0)
        for index, block in enumerate(self.message["content"]):
            empty, deltas = _as_deltas(block, thought)
            start = {"type": "content_block_start", "index": index, "content_block": empty}
            yield _Draft("content_block_start", start, 0)
            for delta, weight in deltas:
                payload = {"type": "content_block_delta", "index": index, "delta": delta}
                yield _Draft("content_block_delta", payload, weight)
            stop = {"type": "content_block_stop", "index": index}
            yield _Draft("content_block_stop", stop, 0)


class _Draft(NamedTuple):
    name: str
    payload: dict[str, Any]
    weight: int  # its part of the output, in bytes


def compose(reply: Reply, *, body: Mapping[str, Any], cache: CacheUse, message_id: str) -> Answer:
    """The answer to `body` that `reply` asks for."""
    speech = _speak(reply, body)
    usage = _usage(body, cache, speech)
    usage |= reply.usage or {}
    start_usage = {key: value for key, value in usage.items() if key not in _START_OMITS}
    start_usage["output_tokens"] = min(1, usage["output_tokens"])
    start_usage |= reply.start_usage or {}
    return Answer(
        message={
            "model": reply.model or body["model"],
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "content": speech.content,
            "stop_reason": _stop_reason(reply, speech),
            "stop_sequence": None,
            "stop_details": None,
            "usage": usage,
        },
        start_usage=start_usage,
    )


def to_json(value: object) -> bytes:
    """`value` as the compact JSON the API sends."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class _Speech(NamedTuple):
    """What the model says; `thinking` and `output` in tokens, the first part of the second."""

    content: list[dict[str, Any]]
    thinking: int
    output: int
    cut: bool


def _speak(reply: Reply, body: Mapping[str, Any]) -> _Speech:
    limit: int = body["max_tokens"]
    if limit == 0:  # only warms the prompt cache
        return _Speech([], 0, 0, cut=True)
    content = _content(reply, body)
    thinking = min(reply.thinking_tokens, limit)
    if reply.output_tokens is None:
        # An answer of no words costs a token all the same.
        wanted = max(1, reply.thinking_tokens + sum(_output_tokens(block) for block in content))
    else:
        wanted = max(reply.output_tokens, reply.thinking_tokens)
    cut = wanted > limit
    if cut and reply.content is None:
        content = _cut(content, limit - thinking)
    if thinking:
        content.insert(0, _thinking_block(body, thinking))
    return _Speech(content, thinking, min(wanted, limit), cut)


def _content(reply: Reply, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The visible blocks, as long as they would be with all the room they want."""
    if reply.content is not None:
        return [dict(block) for block in reply.content]
    text = reply.text
    if text is None:
        text = _plain_answer(body)
        if reply.output_tokens is not None:
            text = _of_length(text, max(0, reply.output_tokens - reply.thinking_tokens))
    return [{"type": "text", "text": text}] if text else []


def _cut(content: Sequence[Mapping[str, Any]], room: int) -> list[dict[str, Any]]:
    """The text block in `content` as far as `room` tokens reach."""
    shown = [cut_to_tokens(block["text"], room) for block in content]
    return [{"type": "text", "text": text} for text in shown if text]


def _plain_answer(body: Mapping[str, Any]) -> str:
    prompt = _last_words_of_user(body)
    words = prompt[:400].split()
    quoted = " ".join(words[:_QUOTED_WORDS])
    if len(words) > _QUOTED_WORDS:
        quoted += " ..."
    remark = _REMARKS[zlib.crc32(prompt.encode("utf-8", "replace")) % len(_REMARKS)]
    return f'You asked: "{quoted}". {remark}'


def _last_words_of_user(body: Mapping[str, Any]) -> str:
    for message in reversed(body["messages"]):
        if message["role"] == "user":
            return _text_in(message["content"])
    return ""


def _text_in(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    for block in reversed(content):
        text = block.get("text") or _text_in(block.get("content"))
        if text:
            return str(text)
    return ""


def _of_length(text: str, tokens: int) -> str:
    missing = tokens * BYTES_PER_TOKEN - len(text.encode("utf-8", "surrogatepass"))
    if missing > 0:
        text += _FILLER * (missing // len(_FILLER) + 1)
    return cut_to_tokens(text, tokens)


def _thinking_block(body: Mapping[str, Any], thinking: int) -> dict[str, Any]:
    # What the reader sees is a summary at most, never the tokens that are billed.
    omitted = (body.get("thinking") or {}).get("display") == "omitted"
    shown = "" if omitted else cut_to_tokens(_THOUGHT, thinking)
    return {"type": "thinking", "thinking": shown, "signature": _SIGNATURE}


def _output_tokens(block: Mapping[str, Any]) -> int:
    match block.get("type"):
        case "text":
            return text_tokens(str(block.get("text", "")))
        case "thinking":
            return text_tokens(str(block.get("thinking", "")))
        case "tool_use" | "server_tool_use" | "mcp_tool_use":
            return text_tokens(str(block.get("name", ""))) + json_tokens(block.get("input"))
        case _:
            return 0  # results that a server tool put there are not output


def _usage(body: Mapping[str, Any], cache: CacheUse, speech: _Speech) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "input_tokens": cache.uncached,
        "cache_creation_input_tokens": cache.written_5m + cache.written_1h,
        "cache_read_input_tokens": cache.read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": cache.written_5m,
            "ephemeral_1h_input_tokens": cache.written_1h,
        },
        "output_tokens": speech.output,
        "service_tier": "standard",
        "inference_geo": body.get("inference_geo") or "not_available",
    }
    if speech.thinking:
        usage["output_tokens_details"] = {"thinking_tokens": speech.thinking}
    if body.get("speed") is not None:
        usage["speed"] = body["speed"]
    return usage


def _stop_reason(reply: Reply, speech: _Speech) -> str:
    if speech.cut:
        return "max_tokens"
    if reply.stop_reason is not None:
        return reply.stop_reason
    calls_tool = any(block.get("type") == "tool_use" for block in speech.content)
    return "tool_use" if calls_tool else "end_turn"


def _as_deltas(
    block: dict[str, Any], thinking_tokens: int
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]:
    """The block as it starts, and the deltas that fill it, each with its weight in bytes."""
    match block["type"]:
        case "text":
            deltas = [
                ({"type": "text_delta", "text": piece}, len(piece.encode("utf-8", "replace")))
                for piece in _pieces(block["text"])
            ]
            citations = block.get("citations")
            if citations is None:
                return {"type": "text", "text": ""}, deltas
            cited = [({"type": "citations_delta", "citation": item}, 0) for item in citations]
            return {"citations": [], "type": "text", "text": ""}, cited + deltas
        case "thinking":
            pieces = _pieces(block["thinking"])
            signature = {"type": "signature_delta", "signature": block.get("signature", "")}
            # What was thought weighs by its tokens: the text shown of it may be none.
            share = thinking_tokens * BYTES_PER_TOKEN // (len(pieces) + 1)
            deltas = [({"type": "thinking_delta", "thinking": piece}, share) for piece in pieces]
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            return empty, [*deltas, (signature, share)]
        case kind if kind in _INPUT_JSON_BLOCKS:
            pieces = _pieces(json.dumps(block.get("input", {}), ensure_ascii=False))
            deltas = [
                ({"type": "input_json_delta", "partial_json": piece}, len(piece))
                for piece in pieces
            ]
            opening = ({"type": "input_json_delta", "partial_json": ""}, 0)
            return {**block, "input": {}}, [opening, *deltas]
        case _:
            return block, []


def _pieces(text: str) -> list[str]:
    size = max(_SHORTEST_DELTA, -(-len(text) // _MOST_DELTAS))
    return [text[start : start + size] for start in range(0, len(text), size)]
