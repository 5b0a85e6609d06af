"""A span in the pieces that it is read in: whole days, quarter-hours, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from ai_budget import periods
from ai_budget.review.measures import QUARTER, quarter_of
from ai_budget.review.spans import Span

_FIRST_YEAR, _LAST_YEAR = 1970, 9000
"""No call is in these years, nor before the first or after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cover:
    """A span in the largest pieces: whole days, quarter-hours, and parts of one."""

    days: Sequence[tuple[date, date]] = ()
    quarters: Sequence[tuple[datetime, datetime]] = ()
    edges: Sequence[tuple[datetime, datetime]] = ()


def cover_of(span: Span, zone: ZoneInfo, *, days: bool = True) -> Cover:
    """Return a span in pieces; ``days`` says whether those may be used."""
    span = _to_whole_days(span, zone)
    first, after = _whole_days(span, zone)
    if days and first < after:
        begin, end = periods.midnight(first, zone), periods.midnight(after, zone)
        parts, whole = [(span.since, begin), (end, span.until)], [(first, after)]
    else:
        parts, whole = [(span.since, span.until)], []
    quarters, edges = [], []
    for since, until in parts:
        start, end = quarter_of(since + QUARTER - timedelta(microseconds=1)), quarter_of(until)
        if start > end:  # within one
            edges += [(since, until)] if since < until else []
            continue
        quarters += [(start, end)] if start < end else []
        edges += [it for it in ((since, start), (end, until)) if it[0] < it[1]]
    return Cover(days=whole, quarters=quarters, edges=edges)


def _whole_days(span: Span, zone: ZoneInfo) -> tuple[date, date]:
    """Return the first day that is whole in a span, and the first after it that is not."""
    begins, ends = periods.day(span.since, zone), periods.day(span.until, zone)
    first, after = begins.first_day, ends.first_day
    if begins.start < span.since:
        first += timedelta(days=1)
    return first, after


def _to_whole_days(span: Span, zone: ZoneInfo) -> Span:
    """Return a span of everything as one of whole days: there are no calls at its ends."""
    since, until = span.since, span.until
    if since.year <= _FIRST_YEAR:
        since = periods.day(since, zone).start
    if until.year >= _LAST_YEAR:
        until = periods.day(until, zone).end
    return replace(span, since=since, until=until)


def joined(starts: Sequence[datetime]) -> Iterator[tuple[datetime, datetime]]:
    """Yield the ranges that quarter-hours, given in order, make up together."""
    begun: datetime | None = None
    last: datetime | None = None
    for start in starts:
        if begun is not None and last is not None and start != last + QUARTER:
            yield begun, last + QUARTER
            begun = None
        begun = start if begun is None else begun
        last = start
    if begun is not None and last is not None:
        yield begun, last + QUARTER
