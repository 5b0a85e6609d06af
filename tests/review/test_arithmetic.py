from __future__ import annotations

from decimal import Decimal

import pytest

from ai_budget.review.arithmetic import average, change, percent


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(1, 3, "33.3"), (1, 0, None), (1, None, None), (0, 5, "0.0"), (1, 2000, "0.1")],
)
def test_percent(part: int, whole: int | None, expected: str | None) -> None:
    assert percent(part, whole) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("amount", "among", "expected"), [(10, 4, 3), (9, 4, 2), (1, 0, None), (0, 3, 0)]
)
def test_average(amount: int, among: int, expected: int | None) -> None:
    assert average(amount, among) == expected


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [(150, 100, "50.0"), (50, 100, "-50.0"), (0, 3, "-100.0"), (1, 0, None), (0, 0, None)],
)
def test_change(now: int, before: int, expected: str | None) -> None:
    assert change(now, before) == (None if expected is None else Decimal(expected))
