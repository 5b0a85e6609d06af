"""Answers the SDK from the response cache, in whatever form its caller asked for.

A message is kept as the API's own JSON. It comes back as that, or as the events of a stream:
callers that take it raw, parsed or streamed cannot tell it from a fresh one, but for a header.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import anthropic
import httpx2

from ai_budget.guard.events import encoded, events_of

CACHED_HEADER = "x-ai-budget-cache"
"""The header of a response that comes from the cache."""


def replay(request: anthropic.APIRequest, message: str, *, client: Any) -> Any:
    """Return a response with a kept message, given as JSON, to a sync caller.

    ``client`` is any client of the SDK: it knows how a response is read.
    """
    return anthropic.APIResponse(raw=_response(request, message), **_reading(request, client))


def replay_async(request: anthropic.APIRequest, message: str, *, client: Any) -> Any:
    """Return a response with a kept message to an async caller. See ``replay``."""
    return anthropic.AsyncAPIResponse(raw=_response(request, message), **_reading(request, client))


def _reading(request: anthropic.APIRequest, client: Any) -> dict[str, Any]:
    return {
        "client": client,
        "cast_to": request.cast_to,
        "stream": request.stream,
        "stream_cls": request.stream_cls,
        "options": request.options,
        "retries_taken": request.retries_taken,
    }


def _response(request: anthropic.APIRequest, message: str) -> httpx2.Response:
    if request.stream:
        kind = "text/event-stream; charset=utf-8"
        body = b"".join(map(encoded, events_of(json.loads(message))))
    else:
        kind, body = "application/json", message.encode()
    # Nothing was sent; the SDK looks at its headers to see what its caller wants.
    headers = {name: text for name, text in request.headers.items() if isinstance(text, str)}
    response = httpx2.Response(
        200,
        headers={"content-type": kind, CACHED_HEADER: "hit"},
        content=body,
        request=httpx2.Request("POST", "https://api.anthropic.com/v1/messages", headers=headers),
    )
    response.elapsed = timedelta()
    return response
