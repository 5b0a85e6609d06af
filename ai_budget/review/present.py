"""How today, this week and this month stand, each beside the same stretch of the one before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

from django.db.models import Count, Sum

from ai_budget import periods
from ai_budget.review.arithmetic import change, percent
from ai_budget.review.comparison import span_before
from ai_budget.review.forecast import Forecast, forecasts
from ai_budget.review.limits import Allowance, Budgets
from ai_budget.review.measures import HELD
from ai_budget.review.pace import by_budget
from ai_budget.review.spans import Span, ever
from ai_budget.review.sums import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A running day, week or month; its amounts are those until now.

    ``before`` is as much of the one before as has passed of this one.
    """

    period: str
    since: datetime
    until: datetime
    spend_nanousd: int
    before_since: datetime
    before_until: datetime
    before_nanousd: int
    budget_nanousd: int | None = None
    plan_nanousd: int | None = None

    @property
    def change(self) -> Decimal | None:
        """By how many percent more was spent than before."""
        return change(self.spend_nanousd, self.before_nanousd)

    @property
    def budget_used(self) -> Decimal | None:
        """Spend as a percentage of the limit."""
        return percent(self.spend_nanousd, self.budget_nanousd)

    @property
    def plan_used(self) -> Decimal | None:
        """Spend as a percentage of the plan."""
        return percent(self.spend_nanousd, self.plan_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Present:
    """What stands now; ``forecast`` is None in the first days of a month."""

    at: datetime
    today: Standing
    week: Standing
    month: Standing
    forecast: Forecast | None
    forecasts: tuple[Forecast, ...]
    held_nanousd: int
    in_flight: int


def present(reading: Reading, span: Span) -> Present:
    """Return how what a span is about stands now; when the span was makes no difference.

    Weeks begin on Monday. A day and a week have their share of the plan, and a week its share of
    the limit, as has a day without a limit of its own.
    """
    now, zone = reading.now, reading.zone
    day, month = periods.day(now, zone), periods.month(now, zone)
    monday = day.first_day - timedelta(days=day.first_day.weekday())
    week_start = periods.midnight(monday, zone)
    week_end = periods.midnight(monday + timedelta(days=7), zone)
    budgets = Budgets.read(min(week_start, month.start), max(week_end, month.end))
    known = not span.is_narrow and span.feature in budgets.rows

    def standing(period: str, since: datetime, until: datetime, allowance: Allowance) -> Standing:
        own = replace(span, since=since, until=until)
        before = span_before(own, now=now, zone=zone)
        return Standing(
            period=period,
            since=since.astimezone(zone),
            until=until.astimezone(zone),
            spend_nanousd=reading.spend(own).get((), 0),
            before_since=before.since.astimezone(zone),
            before_until=before.until.astimezone(zone),
            before_nanousd=reading.spend(before).get((), 0),
            budget_nanousd=allowance.budget_nanousd if known else None,
            plan_nanousd=allowance.plan_nanousd if known else None,
        )

    def share(since: datetime, until: datetime) -> Allowance:
        return budgets.share(span.feature, since, until) if known else Allowance()

    of_day, of_week = share(day.start, day.end), share(week_start, week_end)
    daily = budgets.limit(span.feature, day) if known else None
    if daily is not None:
        of_day = replace(of_day, budget_nanousd=daily)
    allowed = {} if span.is_narrow else budgets.over(month.start, month.end)
    this_month = replace(span, since=month.start, until=month.end)
    by_name = by_budget(reading.spend(this_month, "feature", "category"), about=span.feature)
    expected = forecasts(by_name, month, now=now, allowed=allowed)
    always = replace(span, since=ever().since, until=ever().until)
    held = reading.calls_of(always).filter(HELD)
    in_flight = held.aggregate(count=Count("pk"), nanousd=Sum("reserved_nanousd", default=0))
    return Present(
        at=now.astimezone(zone),
        today=standing("day", day.start, day.end, of_day),
        week=standing("week", week_start, week_end, of_week),
        month=standing("month", month.start, month.end, allowed.get(span.feature, Allowance())),
        forecast=next((it for it in expected if it.name == span.feature), None),
        forecasts=tuple(it for it in expected if it.name != span.feature),
        held_nanousd=int(in_flight["nanousd"]),
        in_flight=in_flight["count"],
    )
