"""Week by week: whether budgets spend as they were meant to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from zoneinfo import ZoneInfo

from ai_budget import periods
from ai_budget.review.arithmetic import percent
from ai_budget.review.limits import Budgets
from ai_budget.review.spans import Span
from ai_budget.values import SITE

TOLERANCE_PERCENT = 10
"""How far from its share a week may be and be on track."""

MOST_WEEKS = 54
"""What is longer than a year is not looked at week by week."""

_WEEK = timedelta(days=7)


class Pace(StrEnum):
    """How a week's spend compares with its share."""

    ON_TRACK = "on track"
    OVER = "trending over"
    UNDER = "trending under"


class Against(StrEnum):
    """What a budget is compared with: its plan, else its limit."""

    PLAN = "plan"
    LIMIT = "limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Week:
    """Seven days or what is left of them, from ``since`` up to but not including ``until``.

    ``expected_nanousd`` is the share of the plan or limit, and of a ``running`` week as much of it
    as has passed.
    """

    since: date
    until: date
    spend_nanousd: int
    expected_nanousd: int
    running: bool = False

    @property
    def used(self) -> Decimal | None:
        """Spend as a percentage of the share."""
        return percent(self.spend_nanousd, self.expected_nanousd)

    @property
    def pace(self) -> Pace:
        """Whether the week is on track."""
        spent, expected = self.spend_nanousd * 100, self.expected_nanousd
        if spent > expected * (100 + TOLERANCE_PERCENT):
            return Pace.OVER
        if spent < expected * (100 - TOLERANCE_PERCENT):
            return Pace.UNDER
        return Pace.ON_TRACK


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetPace:
    """The weeks of one budget: of a feature, of a category, or of the whole site."""

    name: str
    against: Against
    weeks: tuple[Week, ...]


def weekly_pace(
    span: Span,
    *,
    spent: Mapping[tuple[date, str, str], int],
    budgets: Budgets,
    now: datetime,
) -> tuple[BudgetPace, ...]:
    """Return the weeks of a span that have begun: of what it is about, then of the dearest.

    ``spent`` are nano-dollars by day, feature and category. Budgets that have neither a plan nor
    a limit, and those that spent nothing, are left out, and so are spans of more than a year.
    """
    if min(span.until, now) - span.since > MOST_WEEKS * _WEEK:
        return ()
    weeks = list(_weeks(span, now, budgets.zone))
    by_name: dict[str, dict[date, int]] = {}
    for (day, feature, category), cost in spent.items():
        for name in budgets_of(feature, category, about=span.feature):
            days = by_name.setdefault(name, {})
            days[day] = days.get(day, 0) + cost
    others = sorted(by_name.keys() - {span.feature})
    names = [span.feature, *sorted(others, key=lambda name: -sum(by_name[name].values()))]
    found = (
        _pace_of(name, weeks, by_name.get(name, {}), budgets=budgets, now=now)
        for name in names
        if name in budgets.rows
    )
    return tuple(pace for pace in found if pace is not None)


def _pace_of(
    name: str,
    weeks: list[tuple[date, date, datetime, datetime]],
    spent: Mapping[date, int],
    *,
    budgets: Budgets,
    now: datetime,
) -> BudgetPace | None:
    against: Against | None = None
    rows = []
    for first, after, since, until in weeks:
        share = budgets.share(name, since, min(until, now))
        against = Against.LIMIT if share.plan_nanousd is None else Against.PLAN
        expected = share.budget_nanousd if share.plan_nanousd is None else share.plan_nanousd
        if expected is None:
            return None
        rows.append(
            Week(
                since=first,
                until=after,
                spend_nanousd=sum(cost for day, cost in spent.items() if first <= day < after),
                expected_nanousd=expected,
                running=now < until,
            )
        )
    return None if against is None else BudgetPace(name=name, against=against, weeks=tuple(rows))


def _weeks(
    span: Span, now: datetime, zone: ZoneInfo
) -> Iterator[tuple[date, date, datetime, datetime]]:
    """Yield the days and the moments of each week that has begun, the first from its first day."""
    since = span.since
    while since < min(span.until, now):
        first = periods.day(since, zone).first_day
        until = min(span.until, periods.midnight(first + _WEEK, zone))
        last = periods.day(until - timedelta(microseconds=1), zone).first_day
        yield first, last + timedelta(days=1), since, until
        since = until


def by_budget(spent: Mapping[tuple[str, str], int], *, about: str = SITE) -> dict[str, int]:
    """Return spend by the budgets that it counts in, of spend by feature and category.

    ``about`` is what all of it is about: the site, or a category, or a feature.
    """
    sums: dict[str, int] = {}
    for (feature, category), cost in spent.items():
        for name in budgets_of(feature, category, about=about):
            sums[name] = sums.get(name, 0) + cost
    return sums


def budgets_of(feature: str, category: str, *, about: str) -> set[str]:
    """Return the budgets that a call counts in, as far as all calls of them are looked at."""
    if about == SITE:
        return {SITE, feature, category} - {""}
    # Of a category all is there, and of its features; of a feature's category some is missing.
    return {about, feature} if about == category else {about}
