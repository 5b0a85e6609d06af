"""How far the tests go: what every run does, and what ``make test-deep`` adds.

``AI_BUDGET_TEST_DEPTH=deep`` asks for the second; ``docs/contributing.md`` lists what it alone
covers. A whole test that only the deep suite runs has the mark ``deep``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

DEEP = os.environ.get("AI_BUDGET_TEST_DEPTH") == "deep"

Number = TypeVar("Number", int, float)
Value = TypeVar("Value")


def deep(many: Number, *, else_: Number) -> Number:
    """Return ``many`` in the deep suite, ``else_`` in the everyday one."""
    return many if DEEP else else_


def some_of(values: Iterable[Value], *, count: int = 2) -> list[Value]:
    """Return all values in the deep suite, else ``count`` spread from the first to the last."""
    every = list(values)
    if DEEP or len(every) <= count:
        return every
    return [every[round(number * (len(every) - 1) / (count - 1))] for number in range(count)]
