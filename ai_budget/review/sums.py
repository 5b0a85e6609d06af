"""What calls add up to, exact to the last one: the totals, and the calls that are not in them yet.

A figure is the sum of whole days' totals, of quarter-hours' where a range begins or ends within a
day, less what the totals say of quarter-hours that are marked as changed, plus the calls of those
themselves, plus what is in flight. All of it is read as it was at one moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import date, datetime, timedelta
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple, Self
from zoneinfo import ZoneInfo

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Max, Min, Q, QuerySet
from django.db.models.fields.json import KeyTextTransform
from django.db.models.lookups import Exact

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger.connection import one_moment
from ai_budget.models import (
    CallLog,
    DayTotal,
    QuarterTotal,
    SubjectTotal,
    TotalMark,
    TotalState,
    UserTotal,
)
from ai_budget.models.totals import STATE
from ai_budget.review.cover import Cover, cover_of, joined
from ai_budget.review.measures import (
    ALIKE,
    CACHED,
    CALLER_MEASURES,
    HELD,
    MEASURES,
    PAID,
    QuarterStart,
    Total,
)
from ai_budget.review.spans import Span
from ai_budget.review.spenders import CallerFigures, Callers, caller_changes
from ai_budget.values import SITE, Kind, Status

DAY = "day"
"""The column of a figure's day, besides those that totals tell apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What calls add up to. Amounts are nano-dollars.

    ``calls`` are what quotas count: the counted attempts that were paid for or are in flight, and
    the answers from the cache. ``attempts`` are requests to the API, ``answers`` everything but
    what was released or only helped another call. ``spend`` is the cost of ``settled`` and
    ``estimated`` attempts; what is in flight is ``held``. Tokens are those that were paid for.
    Of the settled attempts ``cut`` ended at their ``max_tokens``, and ``roomy`` used less than
    half of them.
    """

    attempts: int = 0
    answers: int = 0
    calls: int = 0
    cached: int = 0
    looked_up: int = 0
    paid_calls: int = 0
    paid_attempts: int = 0
    settled_attempts: int = 0
    in_flight: int = 0
    spend_nanousd: int = 0
    settled_nanousd: int = 0
    estimated_nanousd: int = 0
    held_nanousd: int = 0
    saved_nanousd: int = 0
    input_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_read_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    web_searches: int = 0
    max_tokens: int = 0
    cut: int = 0
    roomy: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in _FIELDS})

    def __sub__(self, other: Self) -> Self:
        return type(self)(**{name: getattr(self, name) - getattr(other, name) for name in _FIELDS})

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompts, from the cache or not."""
        return (
            self.input_tokens
            + self.cache_write_5m_tokens
            + self.cache_write_1h_tokens
            + self.cache_read_tokens
        )


_FIELDS = tuple(it.name for it in fields(Figures))


@contextmanager
def reading(using: str | None = None) -> Iterator[Reading]:
    """Read figures as they were at one moment.

    Inside a transaction of the caller's the moment is as exact as that one keeps it. Ask a
    ledger for live balances outside of this.
    """
    connection = connections[using or conf.LEDGER_DATABASE]
    if connection.in_atomic_block:
        yield Reading(connection)
        return
    with one_moment(connection):
        if connection.vendor == "postgresql":
            # So many sums of so few rows take longer to compile than to run.
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL jit = off")
        yield Reading(connection)


class Reading:
    """Figures of any span. What is not in the totals yet is read once, when it is first needed."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.alias = connection.alias
        self.zone = conf.TIME_ZONE
        self.now = periods.now()
        self._spends: dict[date, list[_Spend]] = {}
        self._caller_changes: dict[Any, Mapping[tuple[date, Any], CallerFigures]] = {}

    def total(self, span: Span) -> Figures:
        """Return what all calls of a span add up to."""
        return self.by(span).get((), Figures())

    def calls_made(self, span: Span) -> int:
        """Return how many calls of a span quotas count; quicker than all figures."""
        return sum(source.calls_made() for source in self._sources(span))

    def by(self, span: Span, *columns: str) -> dict[tuple[Any, ...], Figures]:
        """Return figures by the values of columns: "day", or any that totals tell apart.

        A span of one user or tag is read from the calls themselves; there a day is the one that
        the call counts in.
        """
        sums: dict[tuple[Any, ...], list[int]] = {}
        for source in self._sources(span):
            for key, row in source.grouped(columns):
                total = sums.get(key)
                if total is None:
                    sums[key] = row
                else:
                    sums[key] = [a + b for a, b in zip(total, row, strict=True)]
        return {
            key: Figures(**dict(zip(_FIELDS, row, strict=True)))
            for key, row in sums.items()
            if any(row)
        }

    def spend(self, span: Span, *columns: str) -> dict[tuple[Any, ...], int]:
        """Return the nano-dollars that were spent, by columns; quicker than all figures.

        By day, feature, category and model it reads each day once, however often it is asked.
        """
        spent: dict[tuple[Any, ...], int] = {}
        for source in self._sources(span, in_flight=False, by=columns):
            for key, cost in source.spend(columns):
                spent[key] = spent.get(key, 0) + cost
        return {key: cost for key, cost in spent.items() if cost}

    def quarters(
        self,
        spans: Iterable[tuple[datetime, datetime]],
        *,
        features: Collection[str] | None = None,
    ) -> dict[tuple[datetime, str], int]:
        """Return the nano-dollars that features spent, by the start of quarter-hours.

        The ranges begin and end at quarter-hours; None is every feature.
        """
        among = Q(pk__in=())
        spans = list(spans)
        for since, until in spans:
            among |= Q(start__gte=since, start__lt=until)
        if features is not None:
            among &= Q(feature__in=features)
        rows = QuarterTotal.objects.using(self.alias).filter(among, PAID).order_by()
        found = rows.values_list("start", "feature").annotate(cost=Total("cost_nanousd"))
        spent = {(start, name): int(cost) for start, name, cost in found}
        for cell in self._changed:
            name = cell.alike[_FEATURE]
            own = features is None or name in features
            if own and any(since <= cell.at < until for since, until in spans):
                spent[cell.at, name] = spent.get((cell.at, name), 0) + cell.row[_SPEND]
        return {key: cost for key, cost in spent.items() if cost}

    # Callers

    def users(self, span: Span, *, top: int) -> list[tuple[Any, CallerFigures]]:
        """Return the users that spent most, by their primary keys, the dearest first."""
        return Callers(self, span, UserTotal).top(top)

    def subjects(self, span: Span, *, top: int) -> list[tuple[str, CallerFigures]]:
        """Return the subjects that spent most, the dearest first."""
        return Callers(self, span, SubjectTotal).top(top)

    def active_users(self, span: Span) -> tuple[int, int]:
        """Return how many users made any call, and the nano-dollars that they spent together."""
        return Callers(self, span, UserTotal).active()

    def caller_changes(
        self, table: type[UserTotal | SubjectTotal]
    ) -> Mapping[tuple[date, Any], CallerFigures]:
        """Return what the totals do not say of callers' days yet."""
        found = self._caller_changes.get(table)
        if found is None:
            found = self._caller_changes[table] = caller_changes(self, table)
        return found

    # What is not in the totals yet

    @property
    def behind(self) -> int:
        """How many quarter-hours are marked as changed, and read from their calls."""
        return len(self._marked)

    @cached_property
    def state(self) -> TotalState:
        """Whose days the totals are, and up to when calls were purged."""
        states = TotalState.objects.using(self.alias)
        return states.filter(pk=STATE).first() or TotalState(pk=STATE)

    @property
    def calls(self) -> QuerySet[CallLog]:
        """All calls but those that a purge is deleting: their sums are all there is of them."""
        calls = CallLog.objects.using(self.alias).order_by()
        purged = self.state.purged_before
        return calls if purged is None else calls.filter(Q(reserved_at__gte=purged) | HELD)

    @cached_property
    def _marked(self) -> list[datetime]:
        """The quarter-hours whose totals are not what their calls add up to, in order."""
        marks = TotalMark.objects.using(self.alias).order_by()
        starts = marks.values_list(QuarterStart("reserved_at"), flat=True).distinct()
        purged = self.state.purged_before
        return sorted(start for start in starts if purged is None or start >= purged)

    @cached_property
    def _changed(self) -> list[_Cell]:
        """What changed since it was added up: its calls, less what the totals say of it."""
        cells = []
        for since, until in joined(self._marked):
            calls = self.calls.exclude(HELD).filter(reserved_at__gte=since, reserved_at__lt=until)
            started = calls.annotate(start=QuarterStart("reserved_at"))
            cells += self._cells(started, "start", _OF_CALLS)
            totals = QuarterTotal.objects.using(self.alias).filter(
                start__gte=since, start__lt=until
            )
            cells += self._cells(totals, "start", _OF_TOTALS, sign=-1)
        return cells

    @cached_property
    def _in_flight(self) -> list[_Cell]:
        return self._cells(self.calls.filter(HELD), "reserved_at", _OF_CALLS)

    def _cells(
        self, rows: QuerySet[Any], moment: str, measures: Mapping[str, Any], *, sign: int = 1
    ) -> list[_Cell]:
        summed = rows.order_by().values(moment, *ALIKE).annotate(**measures)
        cells = []
        for at, *values in summed.values_list(moment, *ALIKE, *measures):
            alike, sums = tuple(values[: len(ALIKE)]), values[len(ALIKE) :]
            row = _row(alike[_KIND], alike[_STATUS], sums)
            day = periods.day(at, self.zone).first_day
            cells.append(_Cell(at=at, day=day, alike=alike, row=[sign * it for it in row]))
        return cells

    # Where a span's figures are

    def _sources(
        self, span: Span, *, in_flight: bool = True, by: Sequence[str] | None = None
    ) -> Iterator[_Rows | _Cells | _Spends]:
        if span.user_id is not None or span.tag is not None:
            yield _Rows(rows=self.calls_of(span), measures=_OF_CALLS)
            return
        # Another zone's days are not ours; quarter-hours are everybody's.
        cover = cover_of(span, self.zone, days=self.state.zone == str(self.zone))
        for first, after in cover.days:
            if by is not None and _SPEND_BY.issuperset(by):
                days = self._spend_of_days(first, after)
                everything = span.feature == SITE and not span.model
                own = days if everything else [it for it in days if it.is_about(span)]
                yield _Spends(own)
                continue
            rows = self._about(DayTotal.objects.using(self.alias), span, "day", first, after)
            yield _Rows(rows=rows, measures=_OF_TOTALS)
        for since, until in cover.quarters:
            totals = QuarterTotal.objects.using(self.alias)
            rows = self._about(totals, span, "start", since, until)
            yield _Rows(rows=rows, measures=_OF_TOTALS, zone=self.zone)
        for since, until in cover.edges:
            rows = self._about(self.calls.exclude(HELD), span, "reserved_at", since, until)
            day = periods.day(since, self.zone).first_day
            yield _Rows(rows=rows, measures=_OF_CALLS, day=day)
        yield _Cells([it for it in self._changed if it.is_about(span) and it.is_in(cover)])
        if in_flight:
            inside = (it for it in self._in_flight if span.since <= it.at < span.until)
            yield _Cells([it for it in inside if it.is_about(span)])

    def _spend_of_days(self, first: date, after: date) -> list[_Spend]:
        """Return what the totals say of days; those that were read before are not read again."""
        # Of days without a call there is nothing to read, and of years of them no list to make.
        known = self._known_days
        if known is None:
            return []
        first, after = max(first, known[0]), min(after, known[1] + timedelta(days=1))
        days = [first + timedelta(days=number) for number in range((after - first).days)]
        missing = [day for day in days if day not in self._spends]
        if missing:
            for day in missing:
                self._spends[day] = []
            rows = DayTotal.objects.using(self.alias).filter(
                PAID, day__gte=missing[0], day__lte=missing[-1], day__in=missing
            )
            by = ("day", "feature", "category", "model")
            summed = rows.order_by().values(*by).annotate(cost=Total("cost_nanousd"))
            for values in summed.values_list(*by, "cost"):
                self._spends[values[0]].append(_Spend(*values))
        return [spend for day in days for spend in self._spends[day]]

    @cached_property
    def _known_days(self) -> tuple[date, date] | None:
        """The first and the last day that there are totals of."""
        days = DayTotal.objects.using(self.alias).aggregate(first=Min("day"), last=Max("day"))
        return None if days["first"] is None else (days["first"], days["last"])

    def calls_of(self, span: Span) -> QuerySet[CallLog]:
        """Return the calls of a span themselves."""
        calls = self._about(self.calls, span, "reserved_at", span.since, span.until)
        if span.user_id is not None:
            calls = calls.filter(user_id=span.user_id)
        if span.tag is not None:
            name, value = span.tag
            calls = calls.filter(Exact(KeyTextTransform(name, "tags"), value))
        return calls

    def _about(
        self, rows: QuerySet[Any], span: Span, column: str, since: Any, until: Any
    ) -> QuerySet[Any]:
        inside = rows.filter(**{f"{column}__gte": since, f"{column}__lt": until})
        own = inside.filter(_of_feature(span.feature))
        return own.filter(model=span.model) if span.model else own


# Rows and cells ----------------------------------------------------------------------------------

_KIND, _STATUS = ALIKE.index("kind"), ALIKE.index("status")
_FEATURE, _CATEGORY, _MODEL = (ALIKE.index(name) for name in ("feature", "category", "model"))
_CALLS, _SPEND = _FIELDS.index("calls"), _FIELDS.index("spend_nanousd")

_HELD_SUM = {"sum_held": Total("reserved_nanousd", filter=HELD, default=0)}
_OF_CALLS: Mapping[str, Any] = {
    **{f"sum_{name}": measure for name, measure in MEASURES.items()},
    **_HELD_SUM,
}
_CALLS_OF_TOTALS = Total("counted", filter=PAID, default=0) + Total(
    "attempts", filter=CACHED, default=0
)
_OF_TOTALS: Mapping[str, Any] = {f"sum_{name}": Total(name) for name in MEASURES}
_HELPERS = {Kind.ROUTER.value, Kind.SUMMARY.value}


def _row(kind: str, status: str, sums: Sequence[int]) -> list[int]:
    """Return figures, in the order of their fields, of calls of one kind and status."""
    (
        attempts,
        counted,
        checked,
        *tokens,  # the prompt's four, output, thinking
        searches,
        max_tokens,
        cut,
        roomy,
        cost,
        saved,
    ) = map(int, sums[: len(MEASURES)])
    held = int(sums[len(MEASURES)]) if len(sums) > len(MEASURES) else 0
    helper = kind in _HELPERS
    answers = 0 if helper or status == Status.RELEASED else attempts
    if status in (Status.SETTLED, Status.ESTIMATED):
        settled = status == Status.SETTLED
        return [
            attempts,
            answers,
            counted,  # calls
            0,
            checked,
            counted,  # paid calls
            attempts,
            attempts if settled else 0,
            0,
            cost,
            cost if settled else 0,
            0 if settled else cost,
            0,
            saved,
            *tokens,
            searches,
            *((max_tokens, cut, roomy) if settled else (0, 0, 0)),
        ]
    figures = [0] * len(_FIELDS)
    figures[_SAVED] = saved
    figures[1] = answers
    if status == Status.CACHED:
        # Calls, cached, looked up: an answer from the cache was looked for.
        figures[2] = figures[3] = figures[4] = 0 if helper else attempts
        return figures
    figures[0] = attempts
    if status == Status.RESERVED:
        figures[2], figures[4] = counted, checked
        figures[_IN_FLIGHT], figures[_HELD] = attempts, held
    return figures


_SAVED = _FIELDS.index("saved_nanousd")
_IN_FLIGHT, _HELD = _FIELDS.index("in_flight"), _FIELDS.index("held_nanousd")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rows of a table. Where they have no column for their day, ``day`` is that of all of them,
    or ``zone`` tells which one their start is in."""

    rows: QuerySet[Any]
    measures: Mapping[str, Any]
    day: date | None = None
    zone: ZoneInfo | None = None

    def grouped(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
        by = list(dict.fromkeys([*self._own(columns), "kind", "status"]))
        summed = self.rows.order_by().values(*by).annotate(**self.measures)
        key, width = self._key(columns, by), len(by)
        kind, status = by.index("kind"), by.index("status")
        for values in summed.values_list(*by, *self.measures):
            yield key(values), _row(values[kind], values[status], values[width:])

    def calls_made(self) -> int:
        is_of_calls = self.measures is _OF_CALLS
        made = CALLER_MEASURES["calls"] if is_of_calls else _CALLS_OF_TOTALS
        return int(self.rows.order_by().aggregate(calls=made)["calls"])

    def spend(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], int]]:
        own = self._own(columns)
        key = self._key(columns, own)
        paid = self.rows.filter(PAID).order_by()
        cost = Total("cost_nanousd", default=0)
        if not own:
            yield key(()), int(paid.aggregate(cost=cost)["cost"])
            return
        for values in paid.values(*own).annotate(cost=cost).values_list(*own, "cost"):
            yield key(values), int(values[-1])

    def _own(self, columns: Sequence[str]) -> list[str]:
        """Return the columns to read for those that are asked for."""
        if self.zone is not None:
            return ["start" if name == DAY else name for name in columns]
        return [name for name in columns if name != DAY or self.day is None]

    def _key(self, columns: Sequence[str], read: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
        """Return what makes the key of a row out of the values that are read of it."""
        zone = self.zone
        if zone is not None and DAY in columns:
            places = [read.index("start" if name == DAY else name) for name in columns]
            which = columns.index(DAY)

            def of_its_day(values: Any) -> tuple[Any, ...]:
                key = [values[place] for place in places]
                key[which] = periods.day(key[which], zone).first_day
                return tuple(key)

            return of_its_day
        known = [read.index(name) if name in read else None for name in columns]
        return lambda values: tuple(self.day if it is None else values[it] for it in known)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    """Calls that are alike, at a moment or in the quarter-hour that begins then."""

    at: datetime
    day: date
    alike: tuple[str, ...]
    row: list[int]

    def is_of(self, feature: str) -> bool:
        return feature in (SITE, self.alike[_FEATURE], self.alike[_CATEGORY])

    def is_about(self, span: Span) -> bool:
        return self.is_of(span.feature) and span.model in ("", self.alike[_MODEL])

    def is_in(self, cover: Cover) -> bool:
        return any(first <= self.day < after for first, after in cover.days) or any(
            since <= self.at < until for since, until in cover.quarters
        )

    def key(self, columns: Sequence[str]) -> tuple[Any, ...]:
        return tuple(self.day if name == DAY else self.alike[ALIKE.index(name)] for name in columns)


class _Spend(NamedTuple):
    """The nano-dollars of a day's calls that are alike."""

    day: date
    feature: str
    category: str
    model: str
    nanousd: int

    def is_about(self, span: Span) -> bool:
        named = span.feature in (SITE, self.feature, self.category)
        return named and span.model in ("", self.model)


_SPEND_BY = frozenset(_Spend._fields[:-1])


@dataclass(frozen=True, slots=True)
class _Spends:
    """What was spent, as it was read before."""

    spends: Sequence[_Spend]

    def grouped(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
        raise NotImplementedError("These are no figures but what was spent.")

    def calls_made(self) -> int:
        raise NotImplementedError("These are no figures but what was spent.")

    def spend(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], int]]:
        # There are thousands, and a page asks many times: one pass, with no more than it takes.
        places = [_Spend._fields.index(name) for name in columns]
        spent: dict[Any, int] = defaultdict(int)
        if not places:
            yield (), sum(it.nanousd for it in self.spends)
            return
        key = itemgetter(*places)
        for it in self.spends:
            spent[key(it)] += it[-1]
        for found, cost in spent.items():
            yield found if len(places) > 1 else (found,), cost


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells that were read before."""

    cells: list[_Cell] = field(default_factory=list)

    def grouped(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
        for cell in self.cells:
            yield cell.key(columns), cell.row

    def calls_made(self) -> int:
        return sum(cell.row[_CALLS] for cell in self.cells)

    def spend(self, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], int]]:
        for cell in self.cells:
            yield cell.key(columns), cell.row[_SPEND]


def _of_feature(feature: str) -> Q:
    return Q() if feature == SITE else Q(feature=feature) | Q(category=feature)
