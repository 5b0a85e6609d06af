"""What the messages of a conversation say, and where it may be cut in two.

Never between a tool's call and its result, and always where a user begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.pricing.bound import plain_json
from ai_budget.values import BYTES_A_TOKEN

_MEDIA_TOKENS = 1_500
"""What a picture or a short file comes to, for the same."""

_ROLES = ("user", "assistant", "system")

_MEDIA = ("image", "document", "container_upload")

_THOUGHTS = ("thinking", "redacted_thinking")

_SEALED = ("cache_control", "citations", "encrypted_content", "encrypted_index", "signature")
"""What of a block says nothing to its reader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trimmed:
    """A conversation to send in place of the whole: ``ai_budget.ask(trimmed.messages)``.

    ``summarised`` is how many messages of the beginning the ``summary`` stands for, ``dropped``
    how many were left out without one; all others follow as they were given. ``saved_tokens``
    is an estimate for each time that the conversation is sent, ``cost_nanousd`` what this trim
    paid for summaries. ``reason`` says why no more was left out: "short" where too little is
    old, "larger" where a summary would have been, "refused" where the model declined, or the
    name of the error that a summary met.
    """

    messages: list[Mapping[str, Any]] = field(repr=False)
    summary: str = field(default="", repr=False)
    summarised: int = 0
    dropped: int = 0
    saved_tokens: int = 0
    cost_nanousd: int = 0
    reason: str = ""

    @property
    def cost(self) -> Decimal:
        """Exact dollars, all summaries of this trim together."""
        return money.to_usd(self.cost_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One message: as it was given, and as plain JSON without marks of the prompt cache."""

    given: Mapping[str, Any] = field(repr=False)
    role: str
    blocks: list[dict[str, Any]] = field(repr=False)

    @property
    def calls(self) -> list[str]:
        """The ids of tools that it calls."""
        return [str(it.get("id")) for it in self.blocks if _kind(it).endswith("tool_use")]

    @property
    def results(self) -> list[str]:
        """The ids of the calls whose results it carries."""
        return [str(it["tool_use_id"]) for it in self.blocks if "tool_use_id" in it]

    @property
    def material(self) -> str:
        """What tells it from others."""
        return json.dumps([self.role, self.blocks], sort_keys=True)

    @property
    def line(self) -> str:
        """What a summary is made of; no text in it can end the record that it is part of."""
        content = [it for it in map(readable, self.blocks) if it is not None]
        said = {"role": self.role, "content": content[0] if len(content) == 1 else content}
        return json.dumps(said, ensure_ascii=False).replace("</", "<\\/")

    @property
    def tokens(self) -> int:
        return sum(map(block_tokens, self.blocks))


def read_message(message: Any, index: int) -> Said:
    """Return a message that was looked at. Its text is in no error."""
    if not isinstance(message, Mapping) and hasattr(message, "model_dump"):
        # An answer of the SDK has more to it than can be sent back.
        message = {name: getattr(message, name, None) for name in ("role", "content")}
    if not isinstance(message, Mapping):
        raise TypeError(f"messages[{index}] is no message but {type(message).__name__}.")
    if message.get("role") not in _ROLES:
        raise ValueError(f"messages[{index}] has no role of {', '.join(_ROLES)}.")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"messages[{index}] has neither a text nor a list of blocks as its content."
        )
    try:
        blocks = json.loads(json.dumps(content, default=plain_json))
    except (TypeError, ValueError, RecursionError):
        raise TypeError(f"messages[{index}] is not JSON.") from None
    if not all(isinstance(block, dict) for block in blocks):
        raise TypeError(f"messages[{index}] has a block that is no object.")
    return Said(
        given=message, role=message["role"], blocks=[_without_marks(block) for block in blocks]
    )


def _without_marks(block: dict[str, Any]) -> dict[str, Any]:
    # Marks move on with a conversation, and what was never set may come back as null.
    kept = {name: it for name, it in block.items() if name != "cache_control" and it is not None}
    if isinstance(kept.get("content"), list):
        inner = kept["content"]
        kept["content"] = [_without_marks(it) if isinstance(it, dict) else it for it in inner]
    return kept


def _ends(said: Sequence[Said], *, keep: int, step: int, tokens: int) -> Iterator[int]:
    """Yield where the older part may end, each an index of the first message after it.

    From one to the next are at least ``step`` messages and more than ``tokens`` tokens. They
    depend on what is before them alone, so that a conversation that grows keeps them.
    """
    end = 0
    for index in _turns(said[: max(0, len(said) - keep + 1)]):
        if index - end >= step and sum(one.tokens for one in said[end:index]) > tokens:
            yield index
            end = index


def _turns(said: Sequence[Said]) -> Iterator[int]:
    """Yield where a user says something after an answer, and no tool's result is awaited.

    Not behind a message of role "system": as a part of a summary it would no longer be obeyed.
    """
    awaited: set[str] = set()
    for index, one in enumerate(said):
        if one.role == "system":
            return
        answered = index > 0 and said[index - 1].role == "assistant"
        if one.role == "user" and answered and not one.results and not awaited:
            yield index
        awaited = (awaited | set(one.calls)) - set(one.results)


@dataclass(frozen=True, kw_only=True, slots=True)
class Older:
    """A conversation, and where its older part may ``ends``, in ascending order."""

    said: list[Said] = field(repr=False)
    ends: tuple[int, ...]
    model: str
    summary_tokens: int

    def tokens(self, end: int) -> int:
        return sum(one.tokens for one in self.said[:end])

    def whole(self, *, cost_nanousd: int = 0, reason: str) -> Trimmed:
        messages = [one.given for one in self.said]
        return Trimmed(messages=messages, cost_nanousd=cost_nanousd, reason=reason)

    def dropped(self) -> Trimmed:
        if not self.ends:
            return self.whole(reason="short")
        end = self.ends[-1]
        return Trimmed(
            messages=[one.given for one in self.said[end:]],
            dropped=end,
            saved_tokens=self.tokens(end),
        )


def read_older(
    messages: Iterable[Any],
    keep: int,
    summarise: bool,
    step: int | None,
    model: str | None,
    summary_tokens: int,
) -> Older:
    check_count("keep", keep, least=1)
    step = keep if step is None else step
    check_count("step", step, least=1)
    check_count("summary_tokens", summary_tokens, least=1)
    if isinstance(messages, (str, bytes, Mapping)):
        raise TypeError(f"messages are a list of messages, not {type(messages).__name__}.")
    said = [read_message(message, index) for index, message in enumerate(messages)]
    tokens = summary_tokens if summarise else 0
    return Older(
        said=said,
        ends=tuple(_ends(said, keep=keep, step=step, tokens=tokens)),
        model=model or (*conf.TIERS, conf.DEFAULT_MODEL)[0],
        summary_tokens=summary_tokens,
    )


def check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} is at least {least}.")


def _kind(block: Mapping[str, Any]) -> str:
    return str(block.get("type", ""))


def readable(value: Any) -> Any:
    """Return what a reader can make use of; None for what was only thought."""
    if isinstance(value, list):
        return [it for it in map(readable, value) if it is not None]
    if not isinstance(value, dict):
        return value
    if _kind(value) in _THOUGHTS:
        return None
    if _kind(value) == "text" and "text" in value:
        return value["text"]
    if _is_media(value):
        return {"type": _kind(value), "title": str(value.get("title") or "not shown here")}
    # What goes into a tool is the tool's own, whatever its names are.
    return {
        name: it if name == "input" else readable(it)
        for name, it in value.items()
        if name not in _SEALED
    }


def _is_media(block: Mapping[str, Any]) -> bool:
    source = block.get("source")
    legible = isinstance(source, dict) and source.get("type") in ("text", "content")
    return _kind(block) in _MEDIA and not legible


def block_tokens(block: Mapping[str, Any]) -> int:
    """Return about how many tokens a block has."""
    if _is_media(block):
        return _MEDIA_TOKENS
    content = block.get("content")
    if isinstance(content, list) and _kind(block).endswith("tool_result"):
        return sum(block_tokens(part) for part in content if isinstance(part, dict))
    said = readable(block)
    if said is None:
        return 0
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return len(text.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN
