"""Calls as workers make them, and what they report: enough to tell, without asking the ledger,
whether anything was over at any moment."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from django.db import connections

from ai_budget.exceptions import LedgerUnavailable, LimitReached
from ai_budget.ledger import base as ledgers
from ai_budget.values import (
    Amounts,
    BalanceKey,
    Bucket,
    Charge,
    Limit,
    Measure,
    Reservation,
    Settlement,
    Status,
)
from tests.ledger.given import RELEASED, attempt, estimated, settled

Result = TypeVar("Result")
Meter = tuple[Any, ...]
"""What one limit counts: its balance or bucket, and its measure."""

ENDINGS = ("settle", "settle", "settle", "estimate", "release", "abandon")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A call that somebody wants to make, and how it will end."""

    charge: Charge
    category: str
    limits: tuple[Limit | Bucket, ...]
    amounts: Amounts
    at: datetime
    ending: str = "abandon"
    cost: int = 0
    tokens: int | None = None

    @property
    def keys(self) -> set[BalanceKey]:
        """The balances that it counts in."""
        return {limit.key for limit in self.limits if isinstance(limit, Limit)}

    @property
    def settlement(self) -> Settlement | None:
        """How it is booked; None where nobody comes back to it."""
        if self.ending == "settle":
            return settled(self.cost, tokens=self.tokens)
        if self.ending == "estimate":
            return estimated(self.cost)
        return RELEASED if self.ending == "release" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a wish. Moments are of the monotonic clock, which all processes share.

    ``admitted`` is when the reservation was there; ``ended`` is when booking its end began.
    ``booked`` says that the booking was heard of.
    """

    wish: Wish
    admitted: float | None = None
    ended: float | None = None
    booked: bool = False
    exhausted: bool = False
    error: str = ""


def reserve(wish: Wish, **fields: Any) -> Reservation:
    journaled = attempt(wish.charge, at=wish.at, category=wish.category, **fields)
    return ledgers.current().reserve(wish.limits, wish.amounts, journaled)


def make(wish: Wish, *, hold: float = 0.0) -> Outcome:
    """Make one call: reserve, wait while it is in flight, and book its end."""
    try:
        reservation = reserve(wish)
    except LimitReached as refused:
        return Outcome(wish=wish, exhausted=refused.exhausted, error=type(refused).__name__)
    except LedgerUnavailable as error:
        return Outcome(wish=wish, error=type(error).__name__)
    admitted = time.monotonic()
    if hold:
        time.sleep(hold)
    settlement = wish.settlement
    if settlement is None:
        return Outcome(wish=wish, admitted=admitted)
    ended, booked = time.monotonic(), True
    try:
        ledgers.current().settle(reservation, settlement)
    except LedgerUnavailable:
        booked = False
    return Outcome(wish=wish, admitted=admitted, ended=ended, booked=booked)


def make_all(wishes: Sequence[Wish], threads: int = 1, hold: float = 0.0) -> list[Outcome]:
    """Make the calls, as many at once as there are threads."""
    return together([lambda wish=wish: make(wish, hold=hold) for wish in wishes], threads)  # type: ignore[misc]


def make_for(seconds: float, wishes: Sequence[Wish], seed: int) -> list[Outcome]:
    """Make one call after the other until the time is over."""
    chance, end, outcomes = random.Random(seed), time.monotonic() + seconds, []
    while time.monotonic() < end:
        outcomes.append(make(chance.choice(wishes), hold=chance.choice([0, 0, 0.002])))
    return outcomes


def make_patiently(wishes: Sequence[Wish], seed: int, hold: float) -> list[Outcome]:
    """Make calls until the limit is used up; while others only hold it, wait and ask again."""
    chance, outcomes = random.Random(seed), []
    for wish in wishes:
        while True:
            outcome = make(wish, hold=hold)
            if outcome.error != "BudgetExceeded":
                outcomes.append(outcome)
                break
            if outcome.exhausted:
                return outcomes
            time.sleep(chance.uniform(0.002, 0.01))
    return outcomes


def together(work: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
    """Do everything, so much at once, each thread with a connection of its own."""
    if threads == 1:
        return [one() for one in work]
    start = threading.Barrier(threads)
    shares = [work[number::threads] for number in range(threads)]

    def do(share: Sequence[Callable[[], Result]]) -> list[Result]:
        try:
            connections["default"].ensure_connection()
            start.wait(30)
            return [one() for one in share]
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=threads) as pool:
        return [result for results in pool.map(do, shares) for result in results]


# What must be true of it -------------------------------------------------------------------------


def meter(limit: Limit | Bucket) -> Meter:
    if isinstance(limit, Bucket):
        return (limit.scope, limit.seconds, limit.measure)
    return (limit.key, limit.measure)


def taken(limit: Limit | Bucket, amounts: Amounts) -> int:
    """What an attempt takes from a limit."""
    if isinstance(limit, Bucket):
        return limit.takes(amounts)
    return amounts.nanousd if limit.measure is Measure.NANOUSD else amounts.calls


def kept(limit: Limit | Bucket, amounts: Amounts, settlement: Settlement) -> int:
    """What stays taken once the attempt has ended."""
    if limit.measure is Measure.NANOUSD:
        return settlement.cost_nanousd
    if limit.measure is Measure.TOKENS:
        if settlement.status is Status.RELEASED:
            return 0
        return amounts.tokens if settlement.tokens is None else settlement.tokens
    one = amounts.calls if limit.measure is Measure.CALLS else 1
    return one if settlement.keep_call else 0


def most_taken(outcomes: Iterable[Outcome]) -> dict[Meter, int]:
    """The most that was taken of each limit at any moment, by the workers' own reports.

    Each is counted from when its worker had it in hand until it began to give back: in truth
    it was taken longer, so this is never too much. The clock of buckets must stand.
    """
    changes: dict[Meter, list[tuple[float, int]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.admitted is None:
            continue
        wish, settlement = outcome.wish, outcome.wish.settlement
        for limit in wish.limits:
            if limit.amount is None:
                continue
            amount = taken(limit, wish.amounts)
            changes[meter(limit)].append((outcome.admitted, amount))
            if outcome.ended is not None and settlement is not None:
                rest = kept(limit, wish.amounts, settlement) - amount
                changes[meter(limit)].append((outcome.ended, rest))
    highest = {}
    for name, steps in changes.items():
        total = most = 0
        for _, change in sorted(steps):
            total += change
            most = max(most, total)
        highest[name] = most
    return highest


def assert_never_over(outcomes: Sequence[Outcome]) -> None:
    """Nothing that was admitted went over a limit, at any moment."""
    amounts = {
        meter(limit): limit.amount
        for outcome in outcomes
        for limit in outcome.wish.limits
        if limit.amount is not None
    }
    over = {
        name: f"{most} of {amounts[name]}"
        for name, most in most_taken(outcomes).items()
        if most > amounts[name]
    }
    assert not over, over


def assert_refusals_were_needed(outcomes: Sequence[Outcome]) -> None:
    """What was refused would not fit even now, where nothing was given back in between."""
    now = most_taken(outcomes)
    for outcome in outcomes:
        if outcome.admitted is None:
            assert any(
                limit.amount is not None
                and now.get(meter(limit), 0) + taken(limit, outcome.wish.amounts) > limit.amount
                for limit in outcome.wish.limits
            ), outcome


def spent(outcomes: Iterable[Outcome]) -> int:
    """What was booked in all."""
    return sum(
        outcome.wish.settlement.cost_nanousd
        for outcome in outcomes
        if outcome.booked and outcome.wish.settlement is not None
    )
