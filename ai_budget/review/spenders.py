"""Who spent what: users and subjects, from their totals where a span is about every call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from django.db.models import BigIntegerField, Count, F, Q, QuerySet, Sum, Value
from django.db.models.functions import Coalesce

from ai_budget import periods
from ai_budget.ledger.journal import of_days
from ai_budget.models import CallLog, SubjectTotal, TotalMark, UserTotal
from ai_budget.periods import Period
from ai_budget.review.cover import Cover, cover_of
from ai_budget.review.measures import CALLER_MEASURES, HELD, RELEASED, Total
from ai_budget.review.spans import Span
from ai_budget.values import SITE

if TYPE_CHECKING:
    from ai_budget.review.sums import Reading

CallerTotal = UserTotal | SubjectTotal

_AT_ONCE = 500
"""Names that one statement is given."""

_SUMS: Mapping[str, Any] = {f"sum_{name}": Total(name) for name in CALLER_MEASURES}
_PLAIN: Mapping[str, Any] = {f"sum_{name}": F(name) for name in CALLER_MEASURES}
_OF_CALLS: Mapping[str, Any] = {f"sum_{name}": it for name, it in CALLER_MEASURES.items()}
_DEAREST = ("-sum_cost_nanousd", "-sum_calls")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerFigures:
    """What one caller's calls add up to. ``attempts`` include answers from the cache."""

    attempts: int = 0
    calls: int = 0
    spend_nanousd: int = 0
    saved_nanousd: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            attempts=self.attempts + other.attempts,
            calls=self.calls + other.calls,
            spend_nanousd=self.spend_nanousd + other.spend_nanousd,
            saved_nanousd=self.saved_nanousd + other.saved_nanousd,
        )

    def __neg__(self) -> Self:
        return type(self)(
            attempts=-self.attempts,
            calls=-self.calls,
            spend_nanousd=-self.spend_nanousd,
            saved_nanousd=-self.saved_nanousd,
        )


class Callers:
    """The callers of a span, of one kind."""

    def __init__(self, reading: Reading, span: Span, table: type[CallerTotal]) -> None:
        self.reading = reading
        self.span = span
        self.table = table
        self.column = column_of(table)

    def top(self, most: int) -> list[tuple[Any, CallerFigures]]:
        """Return those that spent most, the dearest first."""
        if not self._have_totals:
            found = dict(_read(self._of_calls.order_by(*_DEAREST, self.column)[:most]))
        else:
            # Whoever did not change since is as dear as the totals say.
            rows = self._totals.order_by(*_DEAREST, self.column)[: most + len(self._changes)]
            found = self._changed({**dict(_read(rows)), **self._named(self._changes)})
        return sorted(found.items(), key=_by_spend)[:most]

    def active(self) -> tuple[int, int]:
        """Return how many called, and what they spent together."""
        if not self._have_totals:
            nothing = Value(0, output_field=BigIntegerField())
            spend = Coalesce(Sum("sum_cost_nanousd"), nothing)
            found = self._of_calls.aggregate(callers=Count("*"), spend=spend)
            return found["callers"], int(found["spend"])
        count = Count("*") if self._one_window else Count(self.column, distinct=True)
        kept = self._kept.aggregate(callers=count, spend=Total("cost_nanousd", default=0))
        before = self._named(self._changes)
        after = self._changed(before)
        more = sum(it.spend_nanousd for it in self._changes.values())
        return kept["callers"] - len(before) + len(after), int(kept["spend"]) + more

    # From the calls

    @property
    def _of_calls(self) -> QuerySet[Any]:
        calls = self.reading.calls_of(self.span).exclude(RELEASED).exclude(nobody(self.column))
        rows: QuerySet[Any] = calls.order_by().values(self.column).annotate(**_OF_CALLS)
        return rows

    # From the totals

    @property
    def _have_totals(self) -> bool:
        span = self.span
        everything = span.feature == SITE and not span.model
        of_everybody = span.user_id is None and span.tag is None
        return everything and of_everybody and not (self._cover.quarters or self._cover.edges)

    @cached_property
    def _cover(self) -> Cover:
        return cover_of(self.span, self.reading.zone)

    @cached_property
    def _windows(self) -> list[tuple[Period, date, date]]:
        """The months that the span covers, and the days that are in none of them."""
        today = periods.day(self.reading.now, self.reading.zone).first_day
        return [
            window
            for first, after in self._cover.days
            for window in windows_of(first, after, today=today)
        ]

    @property
    def _one_window(self) -> bool:
        """Whether every caller has one row at most."""
        if len(self._windows) != 1:
            return False
        period, first, after = self._windows[0]
        one = first + timedelta(days=1) if period is Period.DAY else periods.next_month(first)
        return after <= one

    @property
    def _kept(self) -> QuerySet[Any]:
        among = Q(pk__in=())
        for period, first, after in self._windows:
            # Where there is one, it is named: then the index is in the order of what was spent.
            one = Q(first_day=first) if self._one_window else Q(first_day__gte=first)
            among |= Q(one, period=period, first_day__lt=after)
        return self.table._base_manager.using(self.reading.alias).filter(among).order_by()

    @property
    def _totals(self) -> QuerySet[Any]:
        sums = _PLAIN if self._one_window else _SUMS
        rows: QuerySet[Any] = self._kept.values(self.column).annotate(**sums)
        return rows

    def _named(self, names: Collection[Any]) -> dict[Any, CallerFigures]:
        """Return what the totals say of some callers."""
        found: dict[Any, CallerFigures] = {}
        for some in in_parts(names):
            found.update(_read(self._totals.filter(**{f"{self.column}__in": some})))
        return found

    @cached_property
    def _changes(self) -> dict[Any, CallerFigures]:
        """What the totals do not say of the span yet, by caller."""
        changes: dict[Any, CallerFigures] = {}
        for (day, name), figures in self.reading.caller_changes(self.table).items():
            if any(first <= day < after for first, after in self._cover.days):
                changes[name] = changes.get(name, CallerFigures()) + figures
        return changes

    def _changed(self, found: Mapping[Any, CallerFigures]) -> dict[Any, CallerFigures]:
        """Return figures with what changed since; who has no call any more is left out."""
        nothing = CallerFigures()
        after = dict(found)
        for name, figures in self._changes.items():
            after[name] = after.get(name, nothing) + figures
        return {name: figures for name, figures in after.items() if figures.attempts}


def caller_changes(
    reading: Reading, table: type[CallerTotal]
) -> dict[tuple[date, Any], CallerFigures]:
    """Return what callers' totals do not say of their days yet: what is marked, and in flight."""
    column = column_of(table)
    marks = TotalMark.objects.using(reading.alias).exclude(nobody(column)).order_by()
    kept_from = reading.state.purged_day
    if kept_from is not None:
        marks = marks.filter(day__gte=kept_from)
    marked: dict[date, set[Any]] = {}
    for day, name in marks.values_list("day", column).distinct():
        marked.setdefault(day, set()).add(name)
    changes: dict[tuple[date, Any], CallerFigures] = {}
    # Of a day that is kept, all calls are.
    calls = CallLog.objects.using(reading.alias).exclude(RELEASED).exclude(nobody(column))
    for day, names in marked.items():
        for some in in_parts(names):
            own = {f"{column}__in": some}
            rows = (
                calls.filter(of_days(day, day + timedelta(days=1)), **own)
                .exclude(HELD)
                .order_by()
                .values(column)
            )
            for name, figures in _read(rows.annotate(**_OF_CALLS)):
                changes[day, name] = changes.get((day, name), CallerFigures()) + figures
            totals = table._base_manager.using(reading.alias).filter(
                period=Period.DAY, first_day=day, **own
            )
            for name, figures in _read(totals.order_by().values(column).annotate(**_SUMS)):
                changes[day, name] = changes.get((day, name), CallerFigures()) + -figures
    in_flight = calls.filter(HELD).order_by().values("day", column).annotate(**_OF_CALLS)
    for day, *values in in_flight.values_list("day", column, *_OF_CALLS):
        name, figures = _figures(values)
        changes[day, name] = changes.get((day, name), CallerFigures()) + figures
    return changes


def windows_of(first: date, after: date, *, today: date) -> Iterator[tuple[Period, date, date]]:
    """Yield whole months, as one range, and the days before and after them.

    A month that is not over is whole where the range reaches to the present.
    """
    if after > today:
        after = max(after, periods.next_month(today))
    begin = first if first.day == 1 else periods.next_month(first)
    end = after.replace(day=1)
    if begin >= end:
        yield Period.DAY, first, after
        return
    if first < begin:
        yield Period.DAY, first, begin
    yield Period.MONTH, begin, end
    if end < after:
        yield Period.DAY, end, after


def in_parts(names: Iterable[Any], *, most: int = _AT_ONCE) -> Iterator[list[Any]]:
    """Yield names, as many at a time as one statement takes."""
    ordered = list(names)
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]


def column_of(table: type[CallerTotal]) -> str:
    """Return the column that names a table's callers, there and in the log of calls."""
    return "user" if table is UserTotal else "subject"


def nobody(column: str) -> Q:
    """Return the rows that have no caller of that kind."""
    return Q(user__isnull=True) if column == "user" else Q(subject="")


def _read(rows: QuerySet[Any]) -> Iterator[tuple[Any, CallerFigures]]:
    """Read rows that are grouped by caller and annotated with the measures."""
    for row in rows:
        name, *sums = row.values()
        yield _figures([name, *sums])


def _figures(values: list[Any]) -> tuple[Any, CallerFigures]:
    name, attempts, calls, spend, saved = values
    return name, CallerFigures(
        attempts=int(attempts),
        calls=int(calls),
        spend_nanousd=int(spend),
        saved_nanousd=int(saved),
    )


def _by_spend(row: tuple[Any, CallerFigures]) -> tuple[int, int, str]:
    name, figures = row
    return -figures.spend_nanousd, -figures.calls, str(name)
