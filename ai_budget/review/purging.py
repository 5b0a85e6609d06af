"""Deletes the calls of days long gone, and keeps their sums.

Days go one after the other, from the first that has calls. Before anything of a day is deleted it
is sealed: its totals are added up from its calls once more, and from then on are all there is of
it. So a run that dies between leaves calls that nobody counts any more, and the next one deletes
them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Count, Exists, Min, OuterRef, Q, QuerySet
from django.db.models.functions import TruncMonth

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.models import (
    Batch,
    BatchSubmission,
    CallLog,
    CallText,
    SpendWindow,
    SubjectTotal,
    TotalState,
    UserTotal,
)
from ai_budget.models.totals import STATE
from ai_budget.periods import Period, Window
from ai_budget.review import rollups
from ai_budget.review.measures import CALLER_MEASURES
from ai_budget.review.spenders import CallerTotal, column_of, in_parts
from ai_budget.scopes import OF_CALLERS
from ai_budget.values import Status

NEEDED = timedelta(days=5)
"""For how long a month's calls are needed after its end: balances may be filled from them, and a
call may be corrected."""

_ZONES_APART = timedelta(days=1)
"""A call that counts in a day was reserved no further from it, whatever the zone was then."""

_MOST_NAMED = 5
"""How many batches are named that are in the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """Why a day cannot be purged yet: calls in flight, and the ids of batches that are not over."""

    day: date
    in_flight: int
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Purge:
    """How a purge ended: rows deleted, and what is in the way or was out of time, if anything."""

    deleted: int
    obstacle: Obstacle | None = None
    out_of_time: bool = False


def latest() -> date:
    """Return the last day that calls may be purged before.

    The ledger has to be able to add up the balances that count: of the month, and a little longer.
    """
    today = periods.day(ledgers.current().now(), conf.TIME_ZONE).first_day
    return (today - NEEDED).replace(day=1)


def purge(
    before: date,
    *,
    batch_size: int = 5_000,
    max_seconds: float | None = None,
    tell: Callable[[int], None] = lambda deleted: None,
) -> Purge:
    """Delete all calls of days before that one, in short transactions, and keep their sums.

    What is left of a user or subject that was only refused goes, too, once no such call is left.

    It ends at the first day that is not over: the days after that wait for it. After
    ``max_seconds`` it ends between two transactions. ``tell`` is given the number of deleted rows
    after each. Raises ``ValueError`` for a day after ``latest()``, and ``CallInsideTransaction``
    and ``LedgerUnavailable`` as a ledger does.
    """
    connection = rollups.ready(None)
    if before > (last := latest()):
        raise ValueError(f"Calls of {last} and later days are still needed.")
    give_up = None if max_seconds is None else periods.monotonic() + max_seconds
    deleted = 0

    def out_of_time() -> bool:
        return give_up is not None and periods.monotonic() >= give_up

    window: Window | None = None
    while True:
        for some in _delete_sealed(connection, window, batch_size):
            deleted += some
            tell(deleted)
            if out_of_time():
                return Purge(deleted=deleted, out_of_time=True)
        window = retry(connection, partial(_next_day, connection.alias, before))
        if window is None:
            _forget_refused(connection, before, batch_size)
            return Purge(deleted=deleted)
        if out_of_time():
            return Purge(deleted=deleted, out_of_time=True)
        obstacle: Obstacle | None = retry(connection, partial(_seal, connection, window))
        if obstacle is not None:
            return Purge(deleted=deleted, obstacle=obstacle)


def _forget_refused(connection: BaseDatabaseWrapper, before: date, batch_size: int) -> None:
    """Delete the balances of users and subjects that only count refusals, of days before that one.

    Anybody can make some, by calling under one name after the other.
    """
    rows = SpendWindow.objects.using(connection.alias).filter(
        _OF_CALLERS,
        period=Period.DAY,
        first_day__lt=before,
        spent_nanousd=0,
        held_nanousd=0,
        calls=0,
    )

    def delete_some() -> int:
        some = list(rows.values_list("pk", flat=True)[:batch_size])
        with patient_transaction(connection):
            # A call of a day that is sealed is booked no more.
            return rows.filter(pk__in=some).delete()[0]

    while retry(connection, delete_some):
        pass


_OF_CALLERS = Q(*[("scope__startswith", kind) for kind in OF_CALLERS], _connector=Q.OR)


def purgeable(before: date) -> dict[date, int]:
    """Return how many calls of days before that one there are, by the first day of their month."""
    connection = rollups.ready(None)
    rows = _calls(connection.alias, periods.midnight(before, conf.TIME_ZONE), before)
    by_month = rows.values_list(TruncMonth("day")).annotate(rows=Count("pk"))
    return retry(connection, lambda: dict(sorted(by_month)))


def obstacle_before(before: date) -> Obstacle | None:
    """Return what a purge of the days before that one would end at, if anything."""
    connection = rollups.ready(None)
    last = periods.midnight(before, conf.TIME_ZONE) - timedelta(microseconds=1)
    return retry(connection, lambda: _obstacle(connection.alias, _day(last)))


# One day


def _next_day(alias: str, before: date) -> Window | None:
    """Return the first day before that one that has calls and is not sealed."""
    until = periods.midnight(before, conf.TIME_ZONE)
    calls = CallLog.objects.using(alias).filter(reserved_at__lt=until)
    sealed = _state(alias).purged_before
    if sealed is not None:
        calls = calls.filter(reserved_at__gte=sealed)
    oldest = calls.order_by("reserved_at").values_list("reserved_at", flat=True).first()
    return None if oldest is None else _day(oldest)


def _day(at: datetime) -> Window:
    return periods.day(at, conf.TIME_ZONE)


def _seal(connection: BaseDatabaseWrapper, window: Window) -> Obstacle | None:
    """Make the sums of a day all there is of it, or return what is in the way."""
    with rollups.adding_up(connection) as adding:
        obstacle = _obstacle(connection.alias, window)
        if obstacle is None:
            _add_up_once_more(adding, window)
            state, day_after = adding.state, window.first_day + timedelta(days=1)
            state.purged_before = max(state.purged_before or window.end, window.end)
            state.purged_day = max(state.purged_day or day_after, day_after)
            state.save(update_fields=["purged_before", "purged_day"])
        return obstacle


def _add_up_once_more(adding: rollups.Adding, window: Window) -> None:
    """Make the totals of a day the sum of its calls, whether or not anything was marked."""
    adding.every_quarter(window)
    calls = CallLog.objects.using(adding.alias).filter(
        reserved_at__gte=window.start, reserved_at__lt=window.end
    )
    # Where the zone was changed they may count in another day.
    counted_in = calls.order_by().values_list("day", flat=True).distinct()
    for day in {window.first_day, *counted_in}:
        for table in (UserTotal, SubjectTotal):
            before = _callers(table, adding.alias, day)
            adding.callers(table, {day: None})
            changed = {row[0] for row in before ^ _callers(table, adding.alias, day)}
            if changed:
                adding.callers_of_month(table, day.replace(day=1), changed)


def _callers(table: type[CallerTotal], alias: str, day: date) -> set[tuple[Any, ...]]:
    """Return the totals of all callers of a day, as they are now."""
    rows = table._base_manager.using(alias).filter(period=Period.DAY, first_day=day).order_by()
    return set(rows.values_list(column_of(table), *CALLER_MEASURES))


def _obstacle(alias: str, window: Window) -> Obstacle | None:
    """Return what is not over of a day, and of those before it."""
    day_after = window.first_day + timedelta(days=1)
    reserved = Q(reserved_at__lt=window.end) | Q(day__lt=day_after)
    calls = CallLog.objects.using(alias).filter(reserved, status=Status.RESERVED)
    in_flight = calls.aggregate(rows=Count("pk"), first=Min("reserved_at"))
    working = BatchSubmission.objects.filter(batch=OuterRef("pk")).exclude(
        status=BatchSubmission.Status.DONE
    )
    open_ = ~Q(status=Batch.Status.FINISHED) | Q(told_at=None) | Exists(working)
    batches = Batch.objects.using(alias).filter(reserved, open_).order_by("reserved_at")
    found = list(batches.values_list("pk", "reserved_at")[:_MOST_NAMED])
    moments = [at for at in (in_flight["first"], *(at for _, at in found)) if at is not None]
    if not moments:
        return None
    return Obstacle(
        day=min(_day(min(moments)).first_day, window.first_day),
        in_flight=in_flight["rows"],
        batches=tuple(pk for pk, _ in found),
    )


# What is sealed


def _delete_sealed(
    connection: BaseDatabaseWrapper, window: Window | None, batch_size: int
) -> Iterator[int]:
    """Delete calls that only their sums are left of, and yield how many each time.

    ``window`` is the day that was sealed last; before that there are none.
    """
    state = _state(connection.alias)
    if state.purged_before is None or state.purged_day is None:
        return
    sealed = _calls(connection.alias, state.purged_before, state.purged_day)
    columns = ("pk", "call_id", "reserved_at")
    # Onward from there, and from each last one: what was deleted may still stand in the index.
    since = None if window is None else window.start - _ZONES_APART
    while True:
        rows = sealed if since is None else sealed.filter(reserved_at__gte=since)
        found = rows.order_by("reserved_at").values_list(*columns)[:batch_size]
        some: list[Any] = retry(connection, partial(list, found))
        if not some:
            return
        retry(connection, partial(_delete, connection, [row[:2] for row in some]))
        since = some[-1][2]
        yield len(some)


def _delete(connection: BaseDatabaseWrapper, rows: Sequence[tuple[int, uuid.UUID]]) -> None:
    """Delete calls by their keys, and the texts of those that have no other attempt."""
    alias = connection.alias
    calls, texts = CallLog.objects.using(alias), CallText.objects.using(alias)
    other = CallLog.objects.filter(call_id=OuterRef("pk"))
    with patient_transaction(connection):
        for some in in_parts(rows):
            calls.filter(pk__in=[pk for pk, _ in some])._raw_delete(alias)
        for some in in_parts(rows):
            ids = [call_id for _, call_id in some]
            texts.filter(~Exists(other), pk__in=ids)._raw_delete(alias)


def _state(alias: str) -> TotalState:
    return TotalState.objects.using(alias).get(pk=STATE)


def _calls(alias: str, until: datetime, day: date) -> QuerySet[CallLog]:
    """Return calls before a moment that count in a day before that one, but none in flight.

    They are of the same days, unless the zone was changed between.
    """
    calls = CallLog.objects.using(alias).filter(reserved_at__lt=until, day__lt=day)
    return calls.exclude(status=Status.RESERVED).order_by()
