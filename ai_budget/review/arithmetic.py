"""Shares, averages and changes, to be shown and never billed."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def percent(part: int, whole: int | None) -> Decimal | None:
    """Return a share in percent with one decimal, or None where there is nothing to share."""
    if not whole:
        return None
    return (Decimal(part) * 100 / whole).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP)


def change(now: int, before: int) -> Decimal | None:
    """Return by how many percent an amount has grown; None where there was nothing before."""
    return percent(now - before, before)


def average(amount: int, among: int) -> int | None:
    """Return an average rounded half up; None of nothing."""
    if not among:
        return None
    return (2 * amount + among) // (2 * among)
