"""A span beside the one before it: last month, or as many days as the span has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

from ai_budget import periods
from ai_budget.review.arithmetic import change
from ai_budget.review.spans import Span

_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a feature, or all of them, spent now and before."""

    name: str
    spend_nanousd: int = 0
    before_nanousd: int = 0

    @property
    def difference_nanousd(self) -> int:
        """By how much more was spent; negative for less."""
        return self.spend_nanousd - self.before_nanousd

    @property
    def change(self) -> Decimal | None:
        """The difference in percent of what was spent before; None where that was nothing."""
        return change(self.spend_nanousd, self.before_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The span before, from ``since`` up to ``until``, beside the one that is reported.

    ``is_month`` says that it is the calendar month before, ``same_days`` that it is no longer than
    what has passed of a running span.
    """

    since: datetime
    until: datetime
    is_month: bool
    same_days: bool
    total: Change
    calls: int = 0
    calls_before: int = 0
    features: tuple[Change, ...] = ()


def comparison_of(
    span: Span,
    *,
    now: datetime,
    zone: ZoneInfo,
    spent: Mapping[str, int],
    spent_before: Mapping[str, int],
    calls: int,
    calls_before: int,
) -> Comparison:
    """Return a span beside ``span_before``, by feature: what moved most comes first."""
    earlier = span_before(span, now=now, zone=zone)
    changes = [
        Change(
            name=name,
            spend_nanousd=spent.get(name, 0),
            before_nanousd=spent_before.get(name, 0),
        )
        for name in spent.keys() | spent_before.keys()
    ]
    moved = [it for it in changes if it.spend_nanousd or it.before_nanousd]
    return Comparison(
        since=earlier.since.astimezone(zone),
        until=earlier.until.astimezone(zone),
        is_month=is_month(span, zone),
        same_days=is_running(span, now),
        total=Change(
            name=span.feature,
            spend_nanousd=sum(spent.values()),
            before_nanousd=sum(spent_before.values()),
        ),
        calls=calls,
        calls_before=calls_before,
        features=tuple(sorted(moved, key=lambda it: (-abs(it.difference_nanousd), it.name))),
    )


def span_before(span: Span, *, now: datetime, zone: ZoneInfo) -> Span:
    """Return the calendar month before a calendar month, else as many days before the span.

    Of a running span it has the same days alone: up to the time of day that it is now.
    """
    first = periods.day(span.since, zone).first_day
    if is_month(span, zone):
        start = periods.midnight(periods.previous_month(first), zone)
        end = periods.midnight(first, zone)
        if not is_running(span, now):
            return replace(span, since=start, until=end)
        until = _same_time(first, start, now, zone)
        return replace(span, since=start, until=min(max(until, start + _TICK), end))
    until = min(span.until, now) if is_running(span, now) else span.until
    days = _days(span, zone)
    since = _earlier(span.since, days, zone)
    return replace(span, since=since, until=max(_earlier(until, days, zone), since + _TICK))


def is_month(span: Span, zone: ZoneInfo) -> bool:
    """Say whether a span is one calendar month."""
    month = periods.month(span.since, zone)
    return (month.start, month.end) == (span.since, span.until)


def is_running(span: Span, now: datetime) -> bool:
    """Say whether a span is not over yet."""
    return span.since < now < span.until


def _same_time(first: date, start: datetime, now: datetime, zone: ZoneInfo) -> datetime:
    """Return the moment that is as many days, by the clock on the wall, after a month's start."""
    wall = now.astimezone(zone)
    passed = timedelta(days=(wall.date() - first).days)
    day = start.astimezone(zone).date() + passed
    return _at(day, wall, zone)


def _days(span: Span, zone: ZoneInfo) -> int:
    """Return how many days a span touches."""
    last = periods.day(span.until - _TICK, zone).first_day
    return (last - periods.day(span.since, zone).first_day).days + 1


def _earlier(at: datetime, days: int, zone: ZoneInfo) -> datetime:
    """Return the moment so many days before, at the same time by the clock on the wall."""
    wall = at.astimezone(zone)
    return _at(wall.date() - timedelta(days=days), wall, zone)


def _at(day: date, wall: datetime, zone: ZoneInfo) -> datetime:
    moment = datetime.combine(day, wall.timetz().replace(fold=0))
    if moment.time() == datetime.min.time():
        return periods.midnight(day, zone)
    return moment.astimezone(UTC)
