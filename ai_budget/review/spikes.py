"""Whether an hour is out of the ordinary, beside the same hour of the days before it.

An hour is judged by its modified z-score: how many median absolute deviations it is above the
median. Neither moves when a few of the hours before were themselves out of the ordinary.

    0.6745 * (spent - median) / MAD > 3.5

B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers", 1993; quoted in
https://www.itl.nist.gov/div898/handbook/eda/section3/eda35h.htm. Where more than half of the hours
were alike the MAD is 0, and every deviation would do: floors in dollars and in calls, and a least
multiple of the median, keep quiet features and steady ones quiet.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from ai_budget import money

DAYS = 14
"""Days whose same hour an hour is compared with."""

LEAST_NANOUSD = money.NANO_PER_USD
"""What an hour has to be above the median by, to be worth telling."""

LEAST_CALLS = 5
"""Paid calls that make an hour: one dear call is no spike."""

LEAST_MULTIPLE = 2
"""How many times the median an hour has to be."""

LEAST_DAYS = 3
"""Days with spend, of those before, without which a feature is too new to have anything usual."""

_SCORE, _OF_NORMAL = (35_000, 6_745)
"""3.5 and 0.6745, as integers."""


def usual(spent_before: Sequence[int]) -> int:
    """Return what is usual: the median of the hours before, in nano-dollars, rounded down."""
    ordered = sorted(spent_before)
    middle = len(ordered) // 2
    if not ordered:
        return 0
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def is_spike(
    spent_nanousd: int, spent_before: Sequence[int], *, calls: int, days_with_spend: int
) -> bool:
    """Say whether an hour's spend is out of the ordinary.

    ``spent_before`` are the same hours of the days before, with a 0 for each without spend;
    ``calls`` are the paid calls of the hour, ``days_with_spend`` the days before it on which the
    feature spent anything at all. An hour that is not over yet may be one already.
    """
    if calls < LEAST_CALLS or days_with_spend < LEAST_DAYS:
        return False
    median = usual(spent_before)
    above = spent_nanousd - median
    if above < LEAST_NANOUSD or spent_nanousd < LEAST_MULTIPLE * median:
        return False
    deviation = usual([abs(spent - median) for spent in spent_before])
    return above * _OF_NORMAL > deviation * _SCORE


def same_hours(start: datetime, zone: ZoneInfo) -> list[datetime]:
    """Return when the hour that begins at ``start`` began on each of the days before it, in UTC.

    By the clock on the wall, whatever clocks did meanwhile: people work by it.
    """
    wall = start.astimezone(zone)
    days = [wall.date() - timedelta(days=number) for number in range(1, DAYS + 1)]
    hour = time(wall.hour)
    return [datetime.combine(day, hour, tzinfo=zone).astimezone(UTC) for day in days]


def hour_of(at: datetime, zone: ZoneInfo) -> datetime:
    """Return when the hour of the clock on the wall that contains ``at`` began."""
    wall = at.astimezone(zone)
    return at - timedelta(minutes=wall.minute, seconds=wall.second, microseconds=wall.microsecond)
