"""Time: the clock, and the half-open windows ``[start, end)`` that limits are counted in.

A window is a calendar day or a calendar month of a named zone, so it has 23, 24 or 25
hours on the days that clocks change; its bounds are kept in UTC. This module is the only
reader of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache


class Period(StrEnum):
    """The lengths of a window."""

    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A calendar day or month, from ``start`` up to but not including ``end`` (both UTC)."""

    period: Period
    first_day: date
    start: datetime
    end: datetime

    def __contains__(self, at: datetime) -> bool:
        return self.start <= at < self.end

    def __str__(self) -> str:
        return (
            self.first_day.isoformat() if self.period is Period.DAY else f"{self.first_day:%Y-%m}"
        )


def _system_clock() -> datetime:
    return datetime.now(UTC)


_clock: Callable[[], datetime] = _system_clock


def now() -> datetime:
    """Return the present as an aware datetime in UTC."""
    return _clock()


def is_overridden() -> bool:
    """Say whether a test has set the clock, which then wins over a store's own."""
    return _clock is not _system_clock


@contextmanager
def override_clock(clock: Callable[[], datetime]) -> Iterator[None]:
    """Use another clock in all threads of this process, for tests."""
    global _clock
    previous, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = previous


def monotonic() -> float:
    """Return seconds that only ever go forward, for durations."""
    return time.monotonic()


def day(at: datetime, zone: tzinfo) -> Window:
    """Return the calendar day of ``zone`` that contains ``at``."""
    first = at.astimezone(zone).date()
    return _window(Period.DAY, first, first + timedelta(days=1), zone)


def month(at: datetime, zone: tzinfo) -> Window:
    """Return the calendar month of ``zone`` that contains ``at``."""
    first = at.astimezone(zone).date().replace(day=1)
    return _window(Period.MONTH, first, next_month(first), zone)


def window(period: Period, at: datetime, zone: tzinfo) -> Window:
    """Return the window of that length in ``zone`` that contains ``at``."""
    return day(at, zone) if period is Period.DAY else month(at, zone)


def days(since: date, until: date, zone: tzinfo) -> list[Window]:
    """Return the calendar days from ``since`` up to but not including ``until``."""
    count = (until - since).days
    firsts = [since + timedelta(days=offset) for offset in range(max(count, 0))]
    return [_window(Period.DAY, first, first + timedelta(days=1), zone) for first in firsts]


def midnight(of: date, zone: tzinfo) -> datetime:
    """Return the first instant of a calendar day, in UTC.

    Where clocks jump over midnight the day begins at the jump; where midnight comes
    twice it begins at the first.
    """
    return datetime(of.year, of.month, of.day, tzinfo=zone, fold=0).astimezone(UTC)


def next_month(first: date) -> date:
    """Return the first day of the month after the one that ``first`` is in."""
    return (first.replace(day=1) + timedelta(days=32)).replace(day=1)


def previous_month(first: date) -> date:
    """Return the first day of the month before the one that ``first`` is in."""
    return (first.replace(day=1) - timedelta(days=1)).replace(day=1)


@lru_cache(maxsize=256)
def _window(period: Period, first: date, after: date, zone: tzinfo) -> Window:
    return Window(
        period=period, first_day=first, start=midnight(first, zone), end=midnight(after, zone)
    )
