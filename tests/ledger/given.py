"""Limits, attempts and balances for the tests of the ledger, at noon of one day in May."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from ai_budget import periods
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period
from ai_budget.policy.limits import Budget, Quota, Rules, limits_in_force
from ai_budget.values import (
    SITE,
    Amounts,
    Attempt,
    Balances,
    Bucket,
    Charge,
    Kind,
    Limit,
    Measure,
    Reservation,
    Settlement,
    Status,
)

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
MIDNIGHT = datetime(2026, 5, 5, tzinfo=UTC)
ZONE = ZoneInfo("UTC")
CHAT = Charge(feature="chat")


def limit(
    amount: int | None,
    scope: str = "feature:chat",
    *,
    period: Period = Period.DAY,
    calls: bool = False,
    enforce: bool = True,
    at: datetime = NOON,
) -> Limit:
    """One limit, in nano-dollars unless it is one of ``calls``."""
    return Limit(
        scope=scope,
        window=periods.window(period, at, ZONE),
        measure=Measure.CALLS if calls else Measure.NANOUSD,
        amount=amount,
        enforce=enforce,
    )


def bucket(
    amount: int,
    scope: str = "feature:chat",
    *,
    tokens: bool = False,
    seconds: int = 60,
    enforce: bool = True,
) -> Bucket:
    """One bucket, of requests unless it is one of ``tokens``."""
    return Bucket(
        scope=scope,
        measure=Measure.TOKENS if tokens else Measure.REQUESTS,
        amount=amount,
        seconds=seconds,
        enforce=enforce,
    )


def limits_of(
    charge: Charge,
    *,
    daily: int | None = None,
    site: int | None = None,
    category: str = "",
    quota: Quota | None = None,
    at: datetime = NOON,
) -> list[Limit]:
    """All windows that a charge counts in, as the policy says it."""
    rules = Rules(
        feature=Budget(name=charge.feature, daily_limit=daily),
        category=Budget(name=category) if category else None,
        site=Budget(name=SITE, daily_limit=site),
        quotas=() if quota is None else (quota,),
    )
    return windows_in_force(charge, rules, at=at)


def windows_in_force(charge: Charge, rules: Rules, *, at: datetime) -> list[Limit]:
    """What the policy says of calendar days and months, without buckets."""
    limits = limits_in_force(charge, rules, at=at, zone=ZONE)
    return [limit for limit in limits if isinstance(limit, Limit)]


def attempt(charge: Charge = CHAT, *, at: datetime = NOON, **fields: Any) -> Attempt:
    return replace(
        Attempt(
            call_id=uuid.uuid4(),
            number=0,
            charge=charge,
            category="",
            kind=Kind.ASK,
            requested_model="claude-opus-5-5",
            model="claude-haiku-5-5",
            provider="anthropic",
            max_tokens=1024,
            speed="",
            inference_geo="",
            decision="",
            rates="anthropic",
            reserved_at=at,
            day=periods.day(at, ZONE).first_day,
            deadline=at + timedelta(minutes=10),
        ),
        **fields,
    )


def reserve(
    limits: Sequence[Limit | Bucket],
    nanousd: int = 10,
    *,
    calls: int = 1,
    tokens: int = 0,
    charge: Charge = CHAT,
    **fields: Any,
) -> Reservation:
    """Take an amount from limits, for an attempt with these fields."""
    amounts = Amounts(nanousd=nanousd, calls=calls, tokens=tokens)
    return ledgers.current().reserve(limits, amounts, attempt(charge, **fields))


def settle(reservation: Reservation, settlement: Settlement) -> None:
    ledgers.current().settle(reservation, settlement)


def settled(cost: int, **fields: Any) -> Settlement:
    return Settlement(status=Status.SETTLED, cost_nanousd=cost, **fields)


def estimated(cost: int, **fields: Any) -> Settlement:
    return Settlement(status=Status.ESTIMATED, cost_nanousd=cost, **fields)


RELEASED = Settlement(status=Status.RELEASED, cost_nanousd=0, keep_call=False)


def balance(of: Limit) -> Balances | None:
    """What a limit's balance is now; None where nothing was ever counted in it."""
    return ledgers.current().balances([of.key]).get(of.key)


def spent_held_calls(of: Limit) -> tuple[int, int, int]:
    found = balance(of) or Balances()
    return found.spent_nanousd, found.held_nanousd, found.calls


def row(reservation: Reservation) -> CallLog:
    return CallLog.objects.get(pk=reservation.id)


Sums = dict[tuple[str, str, str], tuple[int, int, int]]


def sums_of_windows() -> Sums:
    """Spent, held and calls of every balance that is not empty."""
    found = {
        (window.scope, window.period, window.first_day.isoformat()): (
            window.spent_nanousd,
            window.held_nanousd,
            window.calls,
        )
        for window in SpendWindow.objects.all()
    }
    return {key: sums for key, sums in found.items() if any(sums)}


def sums_of_calls() -> Sums:
    """The same, added up from the journal alone and without the ledger's own arithmetic."""
    spent, held, calls = Counter[Any](), Counter[Any](), Counter[Any]()
    for call in CallLog.objects.all():
        for scope in _scopes(call):
            for period, first in (("day", call.day), ("month", call.day.replace(day=1))):
                key = (scope, period, first.isoformat())
                if call.status == CallLog.Status.RESERVED:
                    held[key] += call.reserved_nanousd
                spent[key] += call.cost_nanousd or 0
                if call.status != CallLog.Status.RELEASED:
                    calls[key] += call.counted
    found = {key: (spent[key], held[key], calls[key]) for key in spent | held | calls}
    return {key: sums for key, sums in found.items() if any(sums)}


def _scopes(call: CallLog) -> Iterable[str]:
    feature = call.feature_id
    yield from (SITE, f"feature:{feature}")
    if call.category:
        yield f"category:{call.category}"
    if call.user_id is not None:
        yield from (f"user:{call.user_id}", f"user:{call.user_id},feature:{feature}")
    if call.subject:
        yield from (f"subject:{call.subject}", f"subject:{call.subject},feature:{feature}")
