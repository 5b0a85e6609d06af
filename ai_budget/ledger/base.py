"""What every ledger promises: one atomic step takes all limits of an attempt, or none."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache

from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from ai_budget.conf import conf
from ai_budget.exceptions import (
    BudgetExceeded,
    LimitReached,
    QuotaExceeded,
    Refusal,
)
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Limit,
    Measure,
    Reservation,
    Settlement,
)

SATURATED_RETRY_SECONDS = 2
"""How long to wait for calls in flight: about what an answer takes."""


class Ledger(ABC):
    """The only gate: nothing is sent that was not reserved here first."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the present in UTC, by the store's clock where it has one."""

    @abstractmethod
    def ensure_durable(self) -> None:
        """Raise ``CallInsideTransaction`` where the caller could undo what is journaled."""

    @abstractmethod
    def reserve(self, limits: Sequence[Limit], amounts: Amounts, attempt: Attempt) -> Reservation:
        """Take ``amounts`` from every limit at once and journal the attempt, durably.

        Raises ``BudgetExceeded`` or ``QuotaExceeded`` with the numbers and takes nothing where
        one limit does not hold it; ``CallInsideTransaction`` where the caller's transaction
        could undo the journal; ``LedgerUnavailable`` where the store does not answer.
        """

    @abstractmethod
    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        """Book what the attempt cost and give back the rest, once, however often it is called.

        A true cost that comes after an estimate corrects it.
        """

    @abstractmethod
    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        """Return what is spent and held now; keys that were never counted in are left out."""

    @abstractmethod
    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        """Count one refused call, without a row of its own."""

    @abstractmethod
    def settle_overdue(self, *, most: int = 1_000) -> int:
        """Book reservations past their deadline at their bound; return how many."""

    def release(self, reservation: Reservation, settlement: Settlement) -> None:
        """Give everything back: the request never left."""
        self.settle(reservation, settlement)


def current() -> Ledger:
    """Return the ledger that the settings name."""
    return _instance(conf.LEDGER)


@lru_cache(maxsize=8)
def _instance(path: str) -> Ledger:
    ledger: Ledger = import_string(path)()
    return ledger


def _forget_ledgers(*, setting: str, **kwargs: object) -> None:
    if setting == "AI_BUDGET":
        _instance.cache_clear()


setting_changed.connect(_forget_ledgers)


def breaches(
    limits: Iterable[Limit], amounts: Amounts, balances: Mapping[BalanceKey, Balances]
) -> list[tuple[Limit, Balances]]:
    """Return the limits that do not hold the amounts."""
    found = []
    for limit in limits:
        if limit.amount is None:
            continue
        balance = balances[limit.key]
        if limit.measure is Measure.NANOUSD:
            over = balance.taken_nanousd + amounts.nanousd > limit.amount
        else:
            over = balance.calls + amounts.calls > limit.amount
        if over:
            found.append((limit, balance))
    return found


def refusal(
    found: Sequence[tuple[Limit, Balances]], amounts: Amounts, at: datetime
) -> LimitReached:
    """Return the error for the breach that lasts longest: the one that the caller waits for."""
    refusals = [_refusal(limit, balance, amounts, at) for limit, balance in found]
    worst = max(refusals, key=lambda one: (one.exhausted, one.resets_at))
    of_caller = worst.scope.startswith(("user:", "subject:"))
    return QuotaExceeded(worst) if of_caller else BudgetExceeded(worst)


def _refusal(limit: Limit, balance: Balances, amounts: Amounts, at: datetime) -> Refusal:
    amount = limit.amount or 0
    money = limit.measure is Measure.NANOUSD
    spent = balance.spent_nanousd if money else balance.calls
    held = balance.held_nanousd if money else 0
    requested = amounts.nanousd if money else amounts.calls
    exhausted = spent + requested > amount
    until_reset = max(1, math.ceil((limit.window.end - at).total_seconds()))
    return Refusal(
        scope=limit.scope,
        period=limit.window.period,
        measure=limit.measure,
        limit=amount,
        spent=spent,
        held=held,
        requested=requested,
        exhausted=exhausted,
        resets_at=limit.window.end,
        retry_after=until_reset if exhausted else min(SATURATED_RETRY_SECONDS, until_reset),
    )
