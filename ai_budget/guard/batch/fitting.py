"""How much of a batch fits what its limits have left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ai_budget.guard.deciding import Books
from ai_budget.values import Balances, Bucket, Limit, Measure


def fitting(
    places: Iterable[int],
    holds: Sequence[int],
    limits: Iterable[Limit | Bucket],
    books: Books,
    *,
    calls: int,
) -> list[int]:
    """Return the items that fit what the limits have now: each in turn that still does.

    ``holds`` are the nano-dollars of every item, by its place; ``calls`` are taken before them.
    """
    money, most = left_of(limits, books)
    chosen: list[int] = []
    for place in places:
        if most is not None and len(chosen) + calls >= most:
            break
        if money is None or holds[place] <= money:
            chosen.append(place)
            money = None if money is None else money - holds[place]
    return chosen


def left_of(limits: Iterable[Limit | Bucket], books: Books) -> tuple[int | None, int | None]:
    """Return the nano-dollars and the calls that enforced limits still have; None for no end."""
    hard = [
        (limit, limit.amount)
        for limit in limits
        if isinstance(limit, Limit) and limit.amount is not None and limit.enforce
    ]
    balances = books.balances(limit.key for limit, _ in hard)
    money: list[int] = []
    calls: list[int] = []
    for limit, amount in hard:
        balance = balances.get(limit.key, Balances())
        if limit.measure is Measure.NANOUSD:
            money.append(max(0, amount - balance.taken_nanousd))
        else:
            calls.append(max(0, amount - balance.calls))
    return min(money, default=None), min(calls, default=None)
