"""What a batch is asked for: requests as plain JSON, and what none of them may say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ai_budget.pricing.bound import plain_json

LONGEST_KEY = 200
"""Characters of an item's own id."""

LARGEST_ITEM = 256 * 2**20 - 1_000
"""Bytes of the largest request that the API can take."""

_PARAMETERS_OF_CALLS = frozenset(
    # The SDK's, and those of ``ask``.
    {"extra_headers", "extra_query", "extra_body", "timeout", "betas"}
    | {"cache", "ttl", "route", "wait"}
)
"""Keywords that are about one call at once, not about what it asks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request as it was handed in: its parameters, and the id it is found again by.

    ``custom_id`` is its id at the API; empty for one of ours, which no other batch has.
    """

    key: str
    params: Mapping[str, Any] = field(repr=False)
    custom_id: str = ""


def plain(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters as plain JSON: objects of the SDK become what they stand for.

    Raises ``TypeError`` for what is no JSON, ``TypeError`` and ``ValueError`` for what a batch
    cannot do.
    """
    objects = False

    def note(value: Any) -> Any:
        nonlocal objects
        objects = True
        return plain_json(value)

    try:
        text = json.dumps(params, default=note, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise TypeError("A request has to be JSON: texts, numbers, lists and dicts.") from None
    found: Mapping[str, Any] = json.loads(text) if objects else params
    _ensure_possible(found)
    return found


def _ensure_possible(params: Mapping[str, Any]) -> None:
    messages = params.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("A request needs messages.")
    if not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("Messages are dicts; an id and a prompt are a tuple, as in (id, prompt).")
    if params.get("stream"):
        raise ValueError("Answers of a batch are not streamed: leave stream out.")
    if params.get("speed") == "fast":
        raise ValueError("There is no fast mode in batches: leave speed out.")
    wrong = sorted(_PARAMETERS_OF_CALLS & params.keys())
    if wrong:
        raise TypeError(f"An item of a batch takes no {', '.join(wrong)}.")


def ensure_key(key: str) -> None:
    """Raise ``ValueError`` for an id that cannot be stored."""
    if len(key) > LONGEST_KEY:
        raise ValueError(f"An item's id has at most {LONGEST_KEY} characters.")
    if "\0" in key or not _is_text(key):
        raise ValueError("An item's id has a character that no database takes.")


def to_json(body: Mapping[str, Any]) -> str:
    """Return what is sent, as a text that every database takes."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # Half a character is one only as an escape.
    return text if _is_text(text) else json.dumps(body, separators=(",", ":"))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
