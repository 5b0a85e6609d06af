"""What the limits and plans of each budget allow, now and over a range of the past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from zoneinfo import ZoneInfo

from django.db.models import Prefetch

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.models import FeatureBudget, LimitOverride
from ai_budget.periods import Period, Window
from ai_budget.policy.limits import own_limit, raised
from ai_budget.values import SITE


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What a budget allowed over a range, in nano-dollars; None where it set no such amount."""

    budget_nanousd: int | None = None
    plan_nanousd: int | None = None


def allowances(
    since: datetime, until: datetime, *, using: str | None = None
) -> Mapping[str, Allowance]:
    """Return what each budget allowed in the days and months that the range touches, by name.

    The budget is the sum of the monthly limits or, where there is none, of the daily limits;
    overrides that were in force count. The site always has an entry.
    """
    return Budgets.read(since, until, using=using).over(since, until)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """All budgets with the overrides that were in force in a range: read once, asked often."""

    rows: Mapping[str, FeatureBudget]
    zone: ZoneInfo

    @classmethod
    def read(cls, since: datetime, until: datetime, *, using: str | None = None) -> Budgets:
        """Read what is needed to say what was allowed within the range."""
        in_force = LimitOverride.objects.filter(created_at__lt=until, until__gt=since)
        rows = (
            FeatureBudget.objects.using(using or conf.LEDGER_DATABASE)
            .select_related("parent")
            .prefetch_related(Prefetch("overrides", queryset=in_force))
        )
        budgets = {budget.name: budget for budget in rows}
        budgets.setdefault(SITE, FeatureBudget(name=SITE))
        return cls(rows=budgets, zone=conf.TIME_ZONE)

    def over(self, since: datetime, until: datetime) -> Mapping[str, Allowance]:
        """Return what each budget allowed in the days and months that a range touches."""
        first = periods.day(since, self.zone).first_day
        last = periods.day(until - timedelta(microseconds=1), self.zone).first_day
        site = self.rows[SITE]
        return {
            name: Allowance(
                budget_nanousd=_allowed(budget, first, last, self.zone),
                plan_nanousd=_planned(budget, site, first, last),
            )
            for name, budget in self.rows.items()
        }

    def share(self, name: str, since: datetime, until: datetime) -> Allowance:
        """Return a budget's share of a range: of each of its months as much as the range covers.

        A budget without a monthly limit has the daily limits' share. Rounded down.
        """
        budget = self.rows[name]
        plan = _monthly_plan(budget, self.rows[SITE])
        return Allowance(
            budget_nanousd=self._limit_share(budget, since, until),
            plan_nanousd=None
            if plan is None
            else sum(
                plan * part // whole
                for _month, part, whole in _parts(since, until, _MONTH, self.zone)
            ),
        )

    def limit(self, name: str, window: Window) -> int | None:
        """Return a budget's own limit of a day or a month, raised by what was in force in it."""
        budget = self.rows[name]
        limit = base_limit(budget, window.period)
        if limit is None:
            return None
        return _in_window(limit, _overrides(budget, window.period), window)

    def _limit_share(self, budget: FeatureBudget, since: datetime, until: datetime) -> int | None:
        for period in (Period.MONTH, Period.DAY):
            limit = base_limit(budget, period)
            if limit is None:
                continue
            overrides = _overrides(budget, period)
            return sum(
                _in_window(limit, overrides, window) * part // whole
                for window, part, whole in _parts(since, until, period, self.zone)
            )
        return None


def base_limit(budget: FeatureBudget, period: Period) -> int | None:
    """Return a budget's own limit without overrides; the settings stand in for the site's."""
    day = period is Period.DAY
    own = budget.daily_limit_usd if day else budget.monthly_limit_usd
    default = conf.DAILY_LIMIT_USD if day else conf.MONTHLY_LIMIT_USD
    return own_limit(_nanousd(own), budget.name, of_settings=_nanousd(default))


def raised_by(limit: int | None, overrides: Iterable[LimitOverride]) -> int | None:
    """Return the limit, raised to the highest override; what has no limit cannot be raised."""
    amounts = (_nanousd(override.amount_usd) for override in overrides)
    return raised(limit, (amount for amount in amounts if amount is not None))


_MONTH = Period.MONTH
_TICK = timedelta(microseconds=1)


@lru_cache(maxsize=256)
def _parts(
    since: datetime, until: datetime, period: Period, zone: ZoneInfo
) -> tuple[tuple[Window, int, int], ...]:
    """Return each window that a range touches: how much of it, of how much, in microseconds."""
    parts = []
    while since < until:
        window = periods.window(period, since, zone)
        end = min(until, window.end)
        parts.append((window, (end - since) // _TICK, (window.end - window.start) // _TICK))
        since = end
    return tuple(parts)


def _nanousd(usd: Decimal | int | str | None) -> int | None:
    return None if usd is None else money.parse_usd(usd)


def _allowed(budget: FeatureBudget, first: date, last: date, zone: ZoneInfo) -> int | None:
    for period in (Period.MONTH, Period.DAY):
        limit = base_limit(budget, period)
        if limit is not None:
            return _summed(budget, period, limit, first, last, zone)
    return None


def _summed(
    budget: FeatureBudget, period: Period, limit: int, first: date, last: date, zone: ZoneInfo
) -> int:
    overrides = _overrides(budget, period)
    if not overrides:
        return limit * _count(period, first, last)
    return sum(
        _in_window(limit, overrides, window) for window in _windows(period, first, last, zone)
    )


def _in_window(limit: int, overrides: Iterable[LimitOverride], window: Window) -> int:
    """Return what a limit was raised to at any time of a window."""
    in_force = [it for it in overrides if it.created_at < window.end and it.until > window.start]
    return raised_by(limit, in_force) or 0


def _overrides(budget: FeatureBudget, period: Period) -> list[LimitOverride]:
    if budget.pk is None:
        return []
    return [override for override in budget.overrides.all() if override.period == period]


def _planned(budget: FeatureBudget, site: FeatureBudget, first: date, last: date) -> int | None:
    plan = _monthly_plan(budget, site)
    return None if plan is None else plan * _count(Period.MONTH, first, last)


def _monthly_plan(budget: FeatureBudget, site: FeatureBudget) -> int | None:
    if budget.monthly_plan_usd is not None:
        return money.parse_usd(budget.monthly_plan_usd)
    if budget.plan_share is None or budget.is_site:
        return None
    parent = _monthly_plan(budget.parent or site, site)
    return None if parent is None else parent * budget.plan_share // 100


def _count(period: Period, first: date, last: date) -> int:
    if period is Period.DAY:
        return (last - first).days + 1
    return (last.year - first.year) * 12 + last.month - first.month + 1


def _windows(period: Period, first: date, last: date, zone: ZoneInfo) -> list[Window]:
    if period is Period.DAY:
        return periods.days(first, last + timedelta(days=1), zone)
    windows = []
    month = first.replace(day=1)
    while month <= last:
        windows.append(periods.month(periods.midnight(month, zone), zone))
        month = periods.next_month(month)
    return windows
