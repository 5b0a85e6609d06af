"""What a ledger promises, in a few dictionaries: one process, no store, no way to lose anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from ai_budget.values import (
    Amounts,
    BalanceKey,
    Balances,
    Bucket,
    Limit,
    Measure,
    Reservation,
    Settlement,
    Status,
)


@dataclass
class Entry:
    """One reservation."""

    reservation: Reservation
    limits: tuple[Limit | Bucket, ...]
    amounts: Amounts
    deadline: datetime
    status: Status = Status.RESERVED
    cost: int = 0

    @property
    def keys(self) -> set[BalanceKey]:
        return {limit.key for limit in self.limits if isinstance(limit, Limit)}


@dataclass
class Level:
    """How many requests or tokens of a bucket are used, times its milliseconds, and when."""

    used: int = 0
    at: int = 0

    def now(self, bucket: Bucket, now: int) -> int:
        return max(0, self.used - (now - self.at) * bucket.amount)


@dataclass
class Total:
    spent: int = 0
    held: int = 0
    calls: int = 0


@dataclass
class Model:
    """The plain ledger. Moments of buckets are in milliseconds."""

    entries: list[Entry] = field(default_factory=list)
    totals: dict[BalanceKey, Total] = field(default_factory=lambda: defaultdict(Total))
    levels: dict[tuple[str, Measure], Level] = field(default_factory=lambda: defaultdict(Level))

    def has_room(self, limits: Iterable[Limit | Bucket], amounts: Amounts, now: datetime) -> bool:
        return all(self._fits(limit, amounts, milliseconds(now)) for limit in limits)

    def _fits(self, limit: Limit | Bucket, amounts: Amounts, now: int) -> bool:
        if limit.amount is None:
            return True
        if isinstance(limit, Bucket):
            used = self._level(limit).now(limit, now)
            wanted = limit.takes(amounts) * limit.milliseconds
            return used + wanted <= limit.amount * limit.milliseconds
        total = self.totals[limit.key]
        if limit.measure is Measure.CALLS:
            return total.calls + amounts.calls <= limit.amount
        return total.spent + total.held + amounts.nanousd <= limit.amount

    def take(self, entry: Entry, now: datetime) -> None:
        self.entries.append(entry)
        for key in entry.keys:
            self.totals[key].held += entry.amounts.nanousd
            self.totals[key].calls += entry.amounts.calls
        for bucket in entry.limits:
            if isinstance(bucket, Bucket):
                more = bucket.takes(entry.amounts) * bucket.milliseconds
                self._change(bucket, more, milliseconds(now))

    def book(
        self, entry: Entry, settlement: Settlement, now: datetime, *, buckets: bool = True
    ) -> None:
        """Book an end. The first counts; after an estimate the truth corrects it, once."""
        truth = settlement.status is not Status.ESTIMATED
        first = entry.status is Status.RESERVED
        if not first and not (truth and entry.status is Status.ESTIMATED):
            return
        for key in entry.keys:
            total = self.totals[key]
            total.spent += settlement.cost_nanousd - entry.cost
            total.held -= entry.amounts.nanousd if first else 0
            total.calls -= 0 if settlement.keep_call else entry.amounts.calls
        if first and buckets:
            self._give_back(entry, settlement, milliseconds(now))
        entry.status, entry.cost = settlement.status, settlement.cost_nanousd

    def _give_back(self, entry: Entry, settlement: Settlement, now: int) -> None:
        for bucket in entry.limits:
            if not isinstance(bucket, Bucket):
                continue
            if bucket.measure is Measure.REQUESTS:
                unused = 0 if settlement.keep_call else 1
            elif settlement.status is Status.RELEASED:
                unused = entry.amounts.tokens
            else:
                used = settlement.tokens
                unused = 0 if used is None else entry.amounts.tokens - used
            if unused:
                self._change(bucket, -unused * bucket.milliseconds, now)

    def _level(self, bucket: Bucket) -> Level:
        return self.levels[bucket.scope, bucket.measure]

    def _change(self, bucket: Bucket, more: int, now: int) -> None:
        level = self._level(bucket)
        level.used, level.at = max(0, level.now(bucket, now) + more), now

    def overdue(self, now: datetime) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if entry.status is Status.RESERVED and entry.deadline < now
        ]

    def balances(self) -> dict[BalanceKey, Balances]:
        """What is not empty."""
        return {
            key: Balances(spent_nanousd=total.spent, held_nanousd=total.held, calls=total.calls)
            for key, total in self.totals.items()
            if total.spent or total.held or total.calls
        }


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
