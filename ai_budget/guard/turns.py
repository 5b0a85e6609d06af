"""Remembers which model called a tool, so that its result goes back to the same one.

Only turns are remembered that another model took over: the others name their model themselves.
The memory is Django's cache; without it a turn may change its model, which costs no promise, so a
cache that fails neither refuses a call nor loses its booking.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from django.core.cache import caches

from ai_budget.conf import conf

log = logging.getLogger("ai_budget")

SECONDS = 3600
"""How long a tool may take."""


def remember(model: str, tool_use_ids: Iterable[str]) -> None:
    """Note the model of a turn that calls tools."""
    keys = {_key(tool_use_id): model for tool_use_id in tool_use_ids}
    if not keys:
        return
    try:
        caches[conf.CACHE_ALIAS].set_many(keys, SECONDS)
    except Exception as error:
        log.warning("The model of a turn is not remembered: %s", type(error).__name__)


def model_of(body: Mapping[str, Any]) -> str | None:
    """Return the model that this request has to keep, if it carries a tool's result.

    Where nobody took the turn over that is the one it asks for.
    """
    ids = _result_ids(body)
    if not ids:
        return None
    try:
        kept = caches[conf.CACHE_ALIAS].get(_key(ids[0]))
    except Exception as error:
        log.warning("The model of a turn is not known: %s", type(error).__name__)
        kept = None
    return str(kept or body["model"])


def _result_ids(body: Mapping[str, Any]) -> list[str]:
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(content, list):
        return []
    return [
        str(block.get("tool_use_id"))
        for block in content
        if isinstance(block, Mapping) and block.get("type") == "tool_result"
    ]


def _key(tool_use_id: str) -> str:
    # A digest: the id comes with the request, and a cache does not take every text as a key.
    digest = hashlib.sha256(tool_use_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"ai_budget:turn:{digest}"
