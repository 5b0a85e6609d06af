"""Brings the totals up to date: what a booking has marked is added up anew from its calls.

A reader needs none of this to be right: it counts what is marked itself (``sums``). This is what
keeps it quick.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any

from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, Func, Min, Q, QuerySet, Value

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger.connection import ensure_durable, guest_transaction, one_moment, retry
from ai_budget.ledger.journal import of_days
from ai_budget.ledger.set_aside import SetAside
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
from ai_budget.periods import Period, Window
from ai_budget.review.cover import joined
from ai_budget.review.measures import (
    ALIKE,
    CALLER_MEASURES,
    HELD,
    MEASURES,
    RELEASED,
    QuarterStart,
    Total,
    quarter_of,
)
from ai_budget.review.spenders import CallerTotal, column_of, in_parts, nobody

MARKS_AT_ONCE = 10_000
"""Marks that one transaction takes back."""

_RANGES_AT_ONCE = 100


def add_up(*, using: str | None = None, aside: SetAside | None = None) -> int:
    """Add up anew what bookings have marked, and return how many marks that were.

    Each transaction takes some thousand of them; workers take turns. A mark that nothing can be
    done with is set ``aside``, and stays: readers take what it marks from the calls. Raises
    ``CallInsideTransaction`` and ``LedgerUnavailable`` as a ledger does.
    """
    connection, aside = ready(using), aside or SetAside()
    marks = TotalMark.objects.using(connection.alias).order_by("pk").values_list("pk", flat=True)
    done, last = 0, 0

    def add_up_some(some: Sequence[int]) -> None:
        retry(connection, lambda: _add_up_between(connection, some[0], some[-1]))

    retry(connection, partial(_follow_the_zone, connection))
    while True:
        some_more = marks.filter(pk__gt=last)[:MARKS_AT_ONCE]
        found: list[int] = retry(connection, partial(list, some_more.all()))
        if found:
            aside.do_together("the totals of mark", found, add_up_some)
            done, last = done + len(found), found[-1]
        if len(found) < MARKS_AT_ONCE:
            return done


def rebuild(since: date | None = None, *, using: str | None = None) -> list[date]:
    """Add up all calls anew from that day on, or from the first one; return the days.

    Days whose calls were purged keep the sums that they have. Calls may go on meanwhile: what
    they change is marked, as ever. Raises what ``add_up`` raises.
    """
    connection = ready(using)
    days = retry(connection, lambda: _days_to_rebuild(connection, since))
    for day in days:
        retry(connection, partial(_rebuild_day, connection, day))
    for month in sorted({day.replace(day=1) for day in days}):
        retry(connection, partial(_rebuild_month, connection, month))
    return days


def differences(since: date, *, using: str | None = None) -> list[date]:
    """Return the days from that one on whose totals are not the sum of their calls.

    What is marked is not counted yet, and so is no difference. Raises what ``add_up`` raises.
    """
    connection = ready(using)
    return retry(connection, lambda: _differences(connection, since))


# One step of adding up


def _follow_the_zone(connection: BaseDatabaseWrapper) -> None:
    with adding_up(connection):
        pass  # where nothing is marked, the days may have changed all the same


def _add_up_between(connection: BaseDatabaseWrapper, first: int, last: int) -> None:
    with adding_up(connection) as adding:
        found = TotalMark.objects.using(connection.alias).filter(pk__range=(first, last))
        marks = list(found.values_list("pk", "reserved_at", "day", "user_id", "subject"))
        adding.quarters({quarter_of(at) for _, at, _, _, _ in marks})
        users: dict[date, set[Any]] = {}
        subjects: dict[date, set[Any]] = {}
        for _, _, day, user_id, subject in marks:
            if user_id is not None:
                users.setdefault(day, set()).add(user_id)
            if subject:
                subjects.setdefault(day, set()).add(subject)
        adding.callers(UserTotal, users)
        adding.callers(SubjectTotal, subjects)
        # By their keys: others may have been written meanwhile, and not been seen.
        for some in in_parts(pk for pk, *_ in marks):
            TotalMark.objects.using(connection.alias).filter(pk__in=some).delete()


@contextmanager
def adding_up(connection: BaseDatabaseWrapper) -> Iterator[Adding]:
    """Open a durable transaction in which nobody else adds up."""
    with guest_transaction(connection):
        states = TotalState.objects.using(connection.alias).filter(pk=STATE)
        states.update(zone=F("zone"))  # locks it, and on SQLite the database
        adding = Adding(connection, states.get())
        adding.follow_the_zone()
        yield adding


class Adding:
    """Writes totals, inside a transaction that nobody else adds up in."""

    def __init__(self, connection: BaseDatabaseWrapper, state: TotalState) -> None:
        self.connection = connection
        self.alias = connection.alias
        self.state = state
        self.zone = conf.TIME_ZONE

    def follow_the_zone(self) -> None:
        """Make the days those of the zone that is set now."""
        if self.state.zone == str(self.zone):
            return
        DayTotal.objects.using(self.alias)._raw_delete(self.alias)
        starts = QuarterTotal.objects.using(self.alias).order_by().values_list("start", flat=True)
        self._days({periods.day(start, self.zone).first_day for start in starts.distinct()})
        self.state.zone = str(self.zone)
        self.state.save(update_fields=["zone"])

    def quarters(self, starts: Collection[datetime]) -> None:
        """Add up quarter-hours, and the days that they are in."""
        purged = self.state.purged_before
        kept = [start for start in starts if purged is None or start >= purged]
        for some in in_parts(sorted(kept), most=_RANGES_AT_ONCE):
            QuarterTotal.objects.using(self.alias).filter(start__in=some)._raw_delete(self.alias)
            self._write_quarters(some)
        self._days({periods.day(start, self.zone).first_day for start in kept})

    def every_quarter(self, window: Window) -> None:
        """Add up all quarter-hours of a day, whether or not anything is marked."""
        totals = QuarterTotal.objects.using(self.alias).filter(
            start__gte=window.start, start__lt=window.end
        )
        calls = CallLog.objects.using(self.alias).filter(
            reserved_at__gte=window.start, reserved_at__lt=window.end
        )
        starts = set(
            calls.order_by().values_list(QuarterStart("reserved_at"), flat=True).distinct()
        )
        self.quarters({*starts, *totals.order_by().values_list("start", flat=True).distinct()})

    def _write_quarters(self, starts: Sequence[datetime]) -> None:
        among = Q(pk__in=())
        for since, until in joined(starts):
            among |= Q(reserved_at__gte=since, reserved_at__lt=until)
        calls = CallLog.objects.using(self.alias).filter(among)
        start = {"start": QuarterStart("reserved_at")}
        self._insert(QuarterTotal, start, calls.exclude(HELD), ALIKE, MEASURES)

    def _days(self, days: Iterable[date]) -> None:
        for day in sorted(days):
            DayTotal.objects.using(self.alias).filter(day=day)._raw_delete(self.alias)
            window = periods.day(periods.midnight(day, self.zone), self.zone)
            quarters = QuarterTotal.objects.using(self.alias).filter(
                start__gte=window.start, start__lt=window.end
            )
            self._insert(DayTotal, {"day": day}, quarters, ALIKE, _summed(MEASURES))

    def callers(
        self, table: type[CallerTotal], days: Mapping[date, Collection[Any] | None]
    ) -> None:
        """Add up callers' days, all of a day's where none are named, and the named ones' months."""
        months: dict[date, set[Any]] = {}
        for day, names in sorted(days.items()):
            if self.state.purged_day is not None and day < self.state.purged_day:
                continue
            self._callers_of_day(table, day, names)
            if names is not None:
                months.setdefault(day.replace(day=1), set()).update(names)
        for month, names in sorted(months.items()):
            self.callers_of_month(table, month, names)

    def _callers_of_day(
        self, table: type[CallerTotal], day: date, names: Collection[Any] | None
    ) -> None:
        column = column_of(table)
        for some in _parts(names):
            own = {} if some is None else {f"{column}__in": some}
            window: dict[str, Any] = {"period": Period.DAY.value, "first_day": day}
            table.objects.using(self.alias).filter(**window, **own)._raw_delete(self.alias)
            calls = CallLog.objects.using(self.alias).filter(
                of_days(day, day + timedelta(days=1)), **own
            )
            calls = calls.exclude(HELD | RELEASED).exclude(nobody(column))
            self._insert(table, window, calls, (column,), CALLER_MEASURES)

    def callers_of_month(
        self, table: type[CallerTotal], month: date, names: Collection[Any] | None
    ) -> None:
        """Add up callers' months from their days."""
        column = column_of(table)
        for some in _parts(names):
            own = {} if some is None else {f"{column}__in": some}
            window: dict[str, Any] = {"period": Period.MONTH.value, "first_day": month}
            rows = table.objects.using(self.alias).filter(**own)
            rows.filter(**window)._raw_delete(self.alias)
            days = rows.filter(
                period=Period.DAY, first_day__gte=month, first_day__lt=periods.next_month(month)
            )
            self._insert(table, window, days, (column,), _summed(CALLER_MEASURES))

    def _insert(
        self,
        table: type[models.Model],
        own: Mapping[str, Any],
        rows: QuerySet[Any],
        alike: Sequence[str],
        measures: Mapping[str, Any],
    ) -> None:
        """Write sums of rows that are alike, in one statement of the database.

        ``own`` are columns that the rows lack: expressions of theirs, or values.
        """
        columns: dict[str, Any] = {it.name: it for it in table._meta.concrete_fields}
        given = {
            f"the_{name}": value
            if isinstance(value, Func)
            else Value(value, output_field=columns[name])
            for name, value in own.items()
        }
        sums = {f"sum_{name}": measure for name, measure in measures.items()}
        summed = rows.order_by().annotate(**given).values(*given, *alike).annotate(**sums)
        chosen = summed.values_list(*given, *alike, *sums)
        sql, params = chosen.query.get_compiler(connection=self.connection).as_sql()
        quote = self.connection.ops.quote_name
        names = [quote(columns[name].column) for name in (*own, *alike, *measures)]
        target = quote(table._meta.db_table)
        with self.connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {target} ({', '.join(names)}) {sql}", params)


# Adding up everything


def _days_to_rebuild(connection: BaseDatabaseWrapper, since: date | None) -> list[date]:
    """Return every day from the first call, or the first total, to the present."""
    zone = conf.TIME_ZONE
    state = TotalState.objects.using(connection.alias).get(pk=STATE)
    purged = state.purged_before
    first = since
    if first is None:
        oldest = CallLog.objects.using(connection.alias).aggregate(at=Min("reserved_at"))["at"]
        first_total = QuarterTotal.objects.using(connection.alias).aggregate(at=Min("start"))["at"]
        known = [at for at in (oldest, first_total) if at is not None]
        if not known:
            return []
        first = periods.day(min(known), zone).first_day
    if purged is not None:
        first = max(first, periods.day(purged, zone).first_day)
    today = periods.day(periods.now(), zone).first_day
    # A day more, for rows of a clock that goes ahead or of another zone's day.
    return [window.first_day for window in periods.days(first, today + timedelta(days=2), zone)]


def _rebuild_day(connection: BaseDatabaseWrapper, day: date) -> None:
    with adding_up(connection) as adding:
        adding.every_quarter(periods.day(periods.midnight(day, conf.TIME_ZONE), conf.TIME_ZONE))
        adding.callers(UserTotal, {day: None})
        adding.callers(SubjectTotal, {day: None})


def _rebuild_month(connection: BaseDatabaseWrapper, month: date) -> None:
    with adding_up(connection) as adding:
        for table in (UserTotal, SubjectTotal):
            adding.callers_of_month(table, month, None)


# Comparing


def _differences(connection: BaseDatabaseWrapper, since: date) -> list[date]:
    alias, zone = connection.alias, conf.TIME_ZONE
    with one_moment(connection):
        state = TotalState.objects.using(alias).get(pk=STATE)
        start = periods.midnight(since, zone)
        first = start if state.purged_before is None else max(start, state.purged_before)
        marked = set(
            TotalMark.objects.using(alias)
            .order_by()
            .values_list(QuarterStart("reserved_at"), flat=True)
            .distinct()
        )
        calls = CallLog.objects.using(alias).filter(reserved_at__gte=first).exclude(HELD)
        started = calls.order_by().annotate(start=QuarterStart("reserved_at"))
        journal = _by_key(started, "start", MEASURES)
        totals = QuarterTotal.objects.using(alias).filter(start__gte=first).order_by()
        kept = _by_key(totals, "start", _summed(MEASURES))
        wrong = {
            periods.day(quarter, zone).first_day
            for quarter in (journal.keys() | kept.keys()) - marked
            if journal.get(quarter) != kept.get(quarter)
        }
        if state.zone == str(zone):
            wrong |= _wrong_days(alias, since, kept)
        for table in (UserTotal, SubjectTotal):
            wrong |= _wrong_callers(alias, table, max(since, state.purged_day or since))
    return sorted(wrong)


def _wrong_callers(alias: str, table: type[CallerTotal], since: date) -> set[date]:
    """Return the days, and the first days of months, that callers' totals have wrong."""
    column = column_of(table)
    marks = TotalMark.objects.using(alias).exclude(nobody(column)).order_by()
    marked = set(marks.values_list("day", flat=True).distinct())
    calls = CallLog.objects.using(alias).filter(of_days(since))
    counted = calls.exclude(HELD | RELEASED).exclude(nobody(column)).order_by()
    journal = _by_key(counted, "day", CALLER_MEASURES)
    totals = table._base_manager.using(alias).filter(first_day__gte=since.replace(day=1)).order_by()
    days = _by_key(totals.filter(period=Period.DAY), "first_day", _summed(CALLER_MEASURES))
    months = _by_key(totals.filter(period=Period.MONTH), "first_day", _summed(CALLER_MEASURES))
    summed: dict[date, tuple[int, ...]] = {}
    for day, sums in days.items():
        _add(summed, day.replace(day=1), sums)
    ended = {day for day in journal.keys() | days.keys() if day >= since and day not in marked}
    wrong = {day for day in ended if journal.get(day) != days.get(day)}
    return wrong | {it for it in summed.keys() | months.keys() if summed.get(it) != months.get(it)}


def _add(summed: dict[Any, tuple[int, ...]], key: Any, sums: tuple[int, ...]) -> None:
    before = summed.get(key)
    if before is not None:
        sums = tuple(a + b for a, b in zip(before, sums, strict=True))
    summed[key] = sums


def _wrong_days(alias: str, since: date, quarters: Mapping[datetime, tuple[int, ...]]) -> set[date]:
    """Return the days that are not the sum of their quarter-hours."""
    zone = conf.TIME_ZONE
    summed: dict[date, tuple[int, ...]] = {}
    for quarter, sums in quarters.items():
        _add(summed, periods.day(quarter, zone).first_day, sums)
    totals = DayTotal.objects.using(alias).filter(day__gte=since).order_by()
    kept = _by_key(totals, "day", _summed(MEASURES))
    purged = TotalState.objects.using(alias).get(pk=STATE).purged_before
    return {
        day
        for day in summed.keys() | kept.keys()
        if summed.get(day) != kept.get(day)
        and (purged is None or periods.midnight(day, zone) >= purged)
    }


def _by_key(
    rows: QuerySet[Any], key: str, measures: Mapping[str, Any]
) -> dict[Any, tuple[int, ...]]:
    sums = {f"sum_{name}": measure for name, measure in measures.items()}
    found = rows.values(key).annotate(**sums).values_list(key, *sums)
    return {key: tuple(int(value) for value in values) for key, *values in found}


# Pieces


def ready(using: str | None) -> BaseDatabaseWrapper:
    """Return the connection of the totals, outside of any transaction of the caller's."""
    connection = connections[using or conf.LEDGER_DATABASE]
    ensure_durable(connection)
    states = TotalState.objects.using(connection.alias)
    retry(connection, lambda: states.get_or_create(pk=STATE))
    return connection


def _summed(measures: Iterable[str]) -> dict[str, Total]:
    return {name: Total(name) for name in measures}


def _parts(names: Collection[Any] | None) -> Iterable[list[Any] | None]:
    """Return names, as many at a time as one statement takes; None, once, for all of them."""
    return [None] if names is None else in_parts(names)
