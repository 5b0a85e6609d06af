"""What a user has spent and may still spend, read from the balances that the ledger keeps."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.models import FeatureBudget, SpendWindow, UserQuota
from ai_budget.periods import Period
from ai_budget.values import SITE

_LIMIT_FIELDS = {Period.DAY: "daily_limit_usd", Period.MONTH: "monthly_limit_usd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """Somebody's money in the present day or month. Amounts in dollars; no limit is None."""

    period: Period
    spent: Decimal
    held: Decimal
    calls: int
    limit: Decimal | None
    resets_at: datetime

    @property
    def left(self) -> Decimal | None:
        """What no call has spent or holds."""
        if self.limit is None:
            return None
        return max(self.limit - self.spent - self.held, Decimal(0))

    @property
    def percent(self) -> int:
        """How much of the limit is taken, from 0 to 100."""
        if self.limit is None:
            return 0
        if not self.limit:
            return 100
        return min(100, int(100 * (self.spent + self.held) / self.limit))


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureShare:
    """What one user spent on one feature in the present month."""

    feature: str
    calls: int
    spent: Decimal


def allowance(user: Any, period: Period) -> Allowance:
    """Return what the user has spent, holds and has left in the present day or month."""
    return _allowance(f"user:{user.pk}", period, _limit(user, period))


def budget_allowance(name: str, period: Period) -> Allowance:
    """Return the same of a feature, or of the whole site (``"*"``)."""
    budget = FeatureBudget.objects.filter(name=name).first()
    limit = getattr(budget, _LIMIT_FIELDS[period]) if budget else None
    return _allowance(SITE if name == SITE else f"feature:{name}", period, limit)


def _allowance(scope: str, period: Period, limit: Decimal | None) -> Allowance:
    window = periods.window(period, periods.now(), conf.TIME_ZONE)
    key = SpendWindow.key_for(scope, window.period, window.first_day)
    balance = SpendWindow.objects.filter(pk=key).first()
    return Allowance(
        period=period,
        spent=balance.spent_usd if balance else Decimal(0),
        held=balance.held_usd if balance else Decimal(0),
        calls=balance.calls if balance else 0,
        limit=limit,
        resets_at=window.end.astimezone(conf.TIME_ZONE),
    )


def shares(user: Any) -> list[FeatureShare]:
    """Return what the user spent on each feature this month, the most first."""
    window = periods.month(periods.now(), conf.TIME_ZONE)
    prefix = f"user:{user.pk},feature:"
    balances = SpendWindow.objects.filter(
        scope__startswith=prefix, period=window.period, first_day=window.first_day, calls__gt=0
    )
    return [
        FeatureShare(
            feature=balance.scope.removeprefix(prefix),
            calls=balance.calls,
            spent=money.to_usd(balance.spent_nanousd),
        )
        for balance in balances.order_by("-spent_nanousd", "scope")
    ]


def _limit(user: Any, period: Period) -> Decimal | None:
    """Return the user's own limit, else everyone's. This site gives groups none."""
    field = _LIMIT_FIELDS[period]
    own = UserQuota.objects.filter(user_id=user.pk, feature=None).first()
    if own and (own.unlimited or getattr(own, field) is not None):
        return getattr(own, field)  # type: ignore[no-any-return]
    everyone = UserQuota.objects.filter(user=None, group=None, feature=None).first()
    return getattr(everyone, field) if everyone else None
