"""A tokenizer stand-in: one token per four UTF-8 bytes, and constants for the rest.

It is deterministic and cheap, not true. For text and messages it never counts more tokens than the
request's JSON has bytes, as a byte-level tokenizer does not. Images, PDFs and the instructions that
come with tools cost more than their bytes may suggest, and so they do at the real API.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ai_budget.testing.catalogue import limits_of

BYTES_PER_TOKEN = 4
REQUEST_OVERHEAD = 2
SYSTEM_OVERHEAD = 3
MESSAGE_OVERHEAD = 4
TOOLS_OVERHEAD = 300  # once per request: the instructions that make a model use tools
IMAGE_OVERHEAD = 8
IMAGE_OF_UNKNOWN_SIZE = 1_600
IMAGE_PATCH_PIXELS = 28
PDF_TOKENS = 2_000


class PromptBlock(NamedTuple):
    """One block of a prompt, in the order the model reads them.

    section: "tools", "system" or "messages".
    content: the block as sent; a plain string stands as its text block.
    opens: whether it is the first block of its message.
    tokens: its own, with the overhead of what it opens.
    path: where it is in the body, as error messages name it.
    """

    section: str
    role: str
    content: Mapping[str, Any]
    opens: bool
    tokens: int
    path: str


def text_tokens(text: str) -> int:
    """Tokens of `text`."""
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return -(-size // BYTES_PER_TOKEN)


def cut_to_tokens(text: str, tokens: int) -> str:
    """The beginning of `text` that has `tokens` tokens, or all of it if it has fewer."""
    if text_tokens(text) <= tokens:
        return text
    kept = text.encode("utf-8", "surrogatepass")[: tokens * BYTES_PER_TOKEN]
    return kept.decode("utf-8", "ignore")


def json_tokens(value: object) -> int:
    """Tokens of `value` as compact JSON."""
    return text_tokens(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def prompt_tokens(blocks: Sequence[PromptBlock]) -> int:
    """Tokens of the whole prompt that `blocks` make."""
    return sum(block.tokens for block in blocks) + REQUEST_OVERHEAD


def prompt_blocks(body: Mapping[str, Any]) -> list[PromptBlock]:
    """The prompt of `body` block by block: tools, then system, then messages."""
    return [*_tools(body), *_system(body), *_messages(body)]


def _tools(body: Mapping[str, Any]) -> Iterator[PromptBlock]:
    for index, tool in enumerate(body.get("tools") or ()):
        overhead = TOOLS_OVERHEAD if index == 0 else 0
        yield PromptBlock(
            section="tools",
            role="",
            content=tool,
            opens=index == 0,
            tokens=json_tokens(_without(tool, "cache_control")) + overhead,
            path=f"tools.{index}",
        )


def _system(body: Mapping[str, Any]) -> Iterator[PromptBlock]:
    largest_image = limits_of(body["model"]).largest_image
    for index, content in enumerate(_as_blocks(body.get("system") or ())):
        overhead = SYSTEM_OVERHEAD if index == 0 else 0
        yield PromptBlock(
            section="system",
            role="",
            content=content,
            opens=index == 0,
            tokens=_block_tokens(content, largest_image) + overhead,
            path=f"system.{index}",
        )


def _messages(body: Mapping[str, Any]) -> Iterator[PromptBlock]:
    largest_image = limits_of(body["model"]).largest_image
    for number, message in enumerate(body["messages"]):
        for index, content in enumerate(_as_blocks(message["content"])):
            overhead = MESSAGE_OVERHEAD if index == 0 else 0
            yield PromptBlock(
                section="messages",
                role=message["role"],
                content=content,
                opens=index == 0,
                tokens=_block_tokens(content, largest_image) + overhead,
                path=f"messages.{number}.content.{index}",
            )


def _as_blocks(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _block_tokens(block: Mapping[str, Any], largest_image: int) -> int:
    match block.get("type"):
        case "text":
            return text_tokens(str(block.get("text", "")))
        case "image":
            return _image_tokens(block.get("source") or {}, largest_image)
        case "document":
            return _document_tokens(block, largest_image)
        case "tool_result":
            content = _as_blocks(block.get("content") or ())
            return 1 + sum(_block_tokens(part, largest_image) for part in content)
        case "tool_use":
            return text_tokens(str(block.get("name", ""))) + json_tokens(block.get("input"))
        case _:
            return json_tokens(_without(block, "cache_control"))


def _document_tokens(block: Mapping[str, Any], largest_image: int) -> int:
    source = block.get("source") or {}
    named = sum(text_tokens(str(block.get(name) or "")) for name in ("title", "context"))
    match source.get("type"):
        case "text":
            return named + text_tokens(str(source.get("data", "")))
        case "content":
            parts = _as_blocks(source.get("content") or ())
            return named + sum(_block_tokens(part, largest_image) for part in parts)
        case _:
            return named + PDF_TOKENS


def _image_tokens(source: Mapping[str, Any], largest_image: int) -> int:
    size = _pixels(source) if source.get("type") == "base64" else None
    if size is None:
        return min(IMAGE_OF_UNKNOWN_SIZE, largest_image) + IMAGE_OVERHEAD
    width, height = size
    patches = -(-width // IMAGE_PATCH_PIXELS) * -(-height // IMAGE_PATCH_PIXELS)
    return min(patches, largest_image) + IMAGE_OVERHEAD


def _pixels(source: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height where the first bytes tell (PNG and GIF)."""
    try:
        head = binascii.a2b_base64(str(source.get("data", ""))[:32])
    except (ValueError, binascii.Error):
        return None
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head.startswith((b"GIF87a", b"GIF89a")) and len(head) >= 10:
        return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    return None


def _without(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return {name: item for name, item in value.items() if name != key} if key in value else value
