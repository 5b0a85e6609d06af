"""How large a body is, told without looking at more of it than needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
