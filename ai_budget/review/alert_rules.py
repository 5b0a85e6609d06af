"""When an alert of a budget is due: functions of what was spent, and of how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from ai_budget.models import Alert
from ai_budget.models.alert_texts import LIMIT, PLAN
from ai_budget.periods import Period, Window
from ai_budget.review.balances import BudgetUse, LimitUse
from ai_budget.review.forecast import forecast
from ai_budget.values import SITE

Kind, Effect = Alert.Kind, Alert.Effect

REFUSING_FROM = 90
"""The percentage of a limit, spent or held, from which on refusals of a day are put down to it.

Refusals are counted by feature and day, whichever limit refused: one of a user's quota, too.
"""

FORECAST_THRESHOLD = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """An alert that is due. Its fields are those of ``Alert``; amounts are nano-dollars."""

    kind: str
    budget: str
    period: str
    first_day: date
    threshold: int = 0
    about: str = ""
    effect: str = Effect.ALERTS
    spent_nanousd: int = 0
    of_nanousd: int | None = None
    forecast_nanousd: int | None = None
    percent: int | None = None
    count: int = 0
    model: str = ""
    rung: int | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def key(self) -> tuple[date, str, str, str, int, str]:
        """What it is told once for."""
        return (
            self.first_day, self.budget, self.period, self.kind, self.threshold, self.about
        )  # fmt: skip

    @property
    def group(self) -> tuple[date, str, str, str, str]:
        """What it is about: of several that are due at once the severest covers the others."""
        kind = str(Kind.LIMIT) if self.kind == Kind.OFF else str(self.kind)
        return self.first_day, self.budget, str(self.period), kind, self.about

    @property
    def severity(self) -> tuple[bool, int]:
        return self.kind == Kind.OFF, self.threshold


# The rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The rungs that calls of a budget follow, the lowest first, and whose they are."""

    owner: str
    enforce: bool
    rungs: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A budget and what is known of it at a moment."""

    name: str
    use: BudgetUse
    enforce: bool = True
    category: str = ""
    plan_nanousd: int | None = None
    refused_today: int = 0
    ladder: Ladder | None = None

    def limits(self) -> Iterator[tuple[Period, LimitUse, int]]:
        """Yield each limit that leaves room for anything, by its period, and what it is."""
        for period, use in ((Period.DAY, self.use.today), (Period.MONTH, self.use.month)):
            # A limit of 0 was closed by somebody who knows.
            if use.limit_nanousd:
                yield period, use, use.limit_nanousd


def of_plan(budget: Watched, thresholds: Iterable[int], month: Window) -> Iterator[Due]:
    """Yield the thresholds of the month's plan that spend has reached."""
    spent, plan = budget.use.month.spent_nanousd, budget.plan_nanousd
    if plan is None or not spent:
        return
    for threshold in thresholds:
        if spent * 100 >= plan * threshold:
            yield Due(
                kind=Kind.PLAN,
                budget=budget.name,
                period=Period.MONTH,
                first_day=month.first_day,
                threshold=threshold,
                spent_nanousd=spent,
                of_nanousd=plan,
                percent=percent_of(spent, plan) if plan else None,
                until=month.end,
            )


def of_limits(
    budget: Watched, thresholds: Iterable[int], windows: Mapping[Period, Window]
) -> Iterator[Due]:
    """Yield the thresholds up to 100 % that each limit's spend has reached, and that it is off."""
    wanted = [threshold for threshold in thresholds if threshold <= 100]
    for period, use, limit in budget.limits():
        spent, window = use.spent_nanousd, windows[period]
        percent = percent_of(spent, limit)
        rung = _rung_beside(budget.ladder, percent)
        shared: dict[str, Any] = {
            "budget": budget.name,
            "period": period,
            "first_day": window.first_day,
            "about": str(limit),
            "effect": Effect.REFUSES if budget.enforce else Effect.SHADOW,
            "of_nanousd": limit,
            "until": window.end,
        }
        for threshold in wanted:
            if spent * 100 >= limit * threshold:
                yield Due(
                    kind=Kind.LIMIT,
                    threshold=threshold,
                    spent_nanousd=spent,
                    percent=percent,
                    model=rung[1] if rung else "",
                    rung=rung[0] if rung else None,
                    **shared,
                )
        taken = use.taken_nanousd
        refusing = budget.refused_today and taken * 100 >= limit * REFUSING_FROM
        if spent >= limit or refusing:
            yield Due(
                kind=Kind.OFF,
                spent_nanousd=taken,
                percent=percent_of(taken, limit),
                count=budget.refused_today,
                **shared,
            )


def of_forecast(budget: Watched, month: Window, at: datetime) -> Iterator[Due]:
    """Yield the plan and the limit of the month that will be passed at this pace, and are not."""
    spent = budget.use.month.spent_nanousd
    expected = forecast(spent, month, now=at)
    if expected is None:
        return
    limit = budget.use.month.limit_nanousd
    refuses = Effect.REFUSES if budget.enforce else Effect.SHADOW
    for about, most, effect in (
        (PLAN, budget.plan_nanousd, Effect.ALERTS),
        (LIMIT, limit, refuses),
    ):
        if most and spent < most < expected:
            yield Due(
                kind=Kind.FORECAST,
                budget=budget.name,
                period=Period.MONTH,
                first_day=month.first_day,
                threshold=FORECAST_THRESHOLD,
                # A plan is the same plan when it is changed; a limit that was raised is another.
                about=f"{LIMIT} {most}" if about == LIMIT else about,
                effect=effect,
                spent_nanousd=spent,
                of_nanousd=most,
                forecast_nanousd=expected,
                percent=percent_of(expected, most),
                until=month.end,
            )


def of_ladder(
    budget: Watched, budgets: Mapping[str, Watched], windows: Mapping[Period, Window]
) -> Iterator[Due]:
    """Yield the rungs that are reached, by the fullest limit of a feature, its category or "*".

    They are told of the budget whose limit it is: of "*" once, and not of all its features.
    """
    ladder = budget.ladder
    if ladder is None:
        return
    names = dict.fromkeys([budget.name, budget.category, SITE])
    above = [budgets[name] for name in names if name in budgets]
    driving = [
        (percent_of(use.taken_nanousd, limit), at.name, period, use)
        for at in above
        # One in shadow mode moves no ladder but its own, which is then only recorded.
        if at.enforce or at.name == ladder.owner
        for period, use, limit in at.limits()
    ]
    if not driving:
        return
    percent, name, period, use = max(driving, key=lambda it: it[0])
    window = windows[period]
    for rung, model in ladder.rungs:
        if percent >= rung:
            yield Due(
                kind=Kind.LADDER,
                budget=name,
                period=period,
                first_day=window.first_day,
                threshold=rung,
                about=ladder.owner,
                effect=Effect.DOWNGRADES if ladder.enforce else Effect.SHADOW,
                spent_nanousd=use.taken_nanousd,
                of_nanousd=use.limit_nanousd,
                percent=percent,
                model=model,
                rung=rung,
                until=window.end,
            )


def _rung_beside(ladder: Ladder | None, percent: int) -> tuple[int, str] | None:
    """Return the rung that is reached, or else the first."""
    if ladder is None or not ladder.enforce:
        return None
    reached = [rung for rung in ladder.rungs if rung[0] <= percent]
    return reached[-1] if reached else ladder.rungs[0]


def percent_of(part: int, whole: int) -> int:
    """Return a share in whole percent, rounded down: 99.9 % is not all of it."""
    return part * 100 // whole
