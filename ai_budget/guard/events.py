"""A message as the events of a stream, and back: each says what the other says.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Event = dict[str, Any]

_INPUT = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
"""Blocks whose input comes as pieces of JSON."""

_OF_ENDING = ("stop_reason", "stop_sequence", "stop_details")
"""What a message says at its end, beside its usage."""

_BESIDE_ENDING = ("context_management",)
"""What it says beside that."""


def events_of(message: Mapping[str, Any]) -> Iterator[Event]:
    """Return the events of a stream that says what a whole message says."""
    beginning = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": beginning}
    for index, block in enumerate(message["content"]):
        start, deltas = _taken_apart(block)
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ending = {name: message[name] for name in _OF_ENDING if name in message}
    beside = {name: message[name] for name in _BESIDE_ENDING if name in message}
    yield {"type": "message_delta", "delta": ending, "usage": message["usage"], **beside}
    yield {"type": "message_stop"}


def encoded(event: Event) -> bytes:
    """Return an event as it goes on the wire."""
    data = json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()


def _taken_apart(block: Mapping[str, Any]) -> tuple[Event, list[Event]]:
    """Return a block as it begins, and the deltas that fill it."""
    start, deltas = dict(block), []
    kind = block.get("type")
    if kind == "text":
        for citation in block.get("citations") or ():
            start["citations"] = []
            deltas.append({"type": "citations_delta", "citation": citation})
        start["text"] = ""
        deltas.append({"type": "text_delta", "text": block["text"]})
    elif kind == "thinking":
        start |= {"thinking": "", "signature": ""}
        deltas.append({"type": "thinking_delta", "thinking": block["thinking"]})
        deltas.append({"type": "signature_delta", "signature": block.get("signature", "")})
    elif kind in _INPUT:
        start["input"] = {}
        pieces = json.dumps(block.get("input", {}), separators=(",", ":"))
        deltas.append({"type": "input_json_delta", "partial_json": pieces})
    return start, deltas


class Assembly:
    """Puts a message together again from the events of its stream, as they pass."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._blocks: dict[int, dict[str, Any]] = {}
        self._inputs: dict[int, str] = {}
        self._whole = False
        self._failed = False

    @property
    def message(self) -> dict[str, Any] | None:
        """The message, once it is whole; None where something passed that is not understood."""
        if self._message is None or not self._whole or self._failed:
            return None
        return {**self._message, "content": [self._blocks[at] for at in sorted(self._blocks)]}

    def see(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        try:
            self._see(event)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            self._failed = True

    def _see(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "ping":
                pass
            case "message_start":
                self._message = {**event["message"], "usage": {**event["message"]["usage"]}}
            case "content_block_start":
                self._blocks[event["index"]] = dict(event["content_block"])
            case "content_block_delta":
                self._fill(event["index"], event["delta"])
            case "content_block_stop":
                self._finish(event["index"])
            case "message_delta":
                self._end(event)
            case "message_stop":
                self._whole = True
            case _:
                self._failed = True

    def _fill(self, index: int, delta: Mapping[str, Any]) -> None:
        block = self._blocks[index]
        match delta["type"]:
            case "text_delta":
                block["text"] += delta["text"]
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
            case "thinking_delta":
                block["thinking"] += delta["thinking"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "input_json_delta":
                self._inputs[index] = self._inputs.get(index, "") + delta["partial_json"]
            case _:
                self._failed = True

    def _finish(self, index: int) -> None:
        pieces = self._inputs.pop(index, "")
        if pieces:
            self._blocks[index]["input"] = json.loads(pieces)

    def _end(self, event: Mapping[str, Any]) -> None:
        message: dict[str, Any] = self._message or {}
        message.update(event["delta"])
        message.update({name: event[name] for name in _BESIDE_ENDING if name in event})
        told = {name: value for name, value in event["usage"].items() if value is not None}
        message["usage"] = {**message["usage"], **told}
