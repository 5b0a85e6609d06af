"""What is told of a body before anything is worked out: that it is text, and that it is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ai_budget.exceptions import InvalidArgument

LARGE_BODY = 32_768
"""Characters, numbers and the like in a body, from which on a bound is worth a look before."""


def is_larger_than(most: int, body: Any) -> bool:
    """Say whether a body has more characters, and parts, than that; look no further than needed."""
    left, waiting = most, [body]
    while waiting:
        value = waiting.pop()
        left -= 1
        if isinstance(value, (str, bytes)):
            left -= len(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
            left -= len(value)
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        if left < 0 or len(waiting) > left:
            return True
    return False


def ensure_text(body: Mapping[str, Any]) -> None:
    """Raise ``InvalidArgument`` for half of a surrogate pair, which cannot be sent."""
    for name, given in body.items():
        waiting = [given]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                if not (value.isascii() or _is_text(value)):
                    problem = "has half of a surrogate pair in it, which is no text."
                    raise InvalidArgument(name, problem)
            elif isinstance(value, Mapping):
                waiting.extend(value)
                waiting.extend(value.values())
            elif isinstance(value, (list, tuple)):
                waiting.extend(value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
