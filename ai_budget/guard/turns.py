"""Remembers which model called a tool, so that its result goes back to the same one.

Only downgraded turns are remembered: the others name their model themselves. The memory is
Django's cache; without it a turn may change its model, which costs no promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from django.core.cache import caches

from ai_budget.conf import conf
from ai_budget.values import Attempt

SECONDS = 3600
"""How long a tool may take."""


def remember(attempt: Attempt, tool_use_ids: Iterable[str]) -> None:
    """Note the model of a downgraded turn that calls tools."""
    if attempt.model == attempt.requested_model:
        return
    keys = {_key(tool_use_id): attempt.model for tool_use_id in tool_use_ids}
    if keys:
        caches[conf.CACHE_ALIAS].set_many(keys, SECONDS)


def model_of(body: Mapping[str, Any]) -> str | None:
    """Return the model that this request has to keep, if it carries a tool's result.

    Where the turn was not downgraded that is the one it asks for.
    """
    ids = _result_ids(body)
    if not ids:
        return None
    kept = caches[conf.CACHE_ALIAS].get(_key(ids[0]))
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
    return f"ai_budget:turn:{tool_use_id}"
