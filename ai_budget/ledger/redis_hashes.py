"""What a hash in Redis holds of one day or month, and what it has to hold by the journal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

from ai_budget.ledger import journal as journals
from ai_budget.ledger.connection import one_moment
from ai_budget.models import CallLog
from ai_budget.periods import Period
from ai_budget.values import Amounts, BalanceKey, Balances, Difference, Status

_LONGEST_FLIGHT = timedelta(days=3)
"""No call is on its way for longer, so those that ended after a moment are found by their time."""


@dataclass(frozen=True, slots=True, order=True)
class Hash:
    """One calendar day or month, which is one hash."""

    period: Period
    first_day: date

    def __str__(self) -> str:
        return f"the {self.period} of {self.first_day}"

    @property
    def until(self) -> date:
        return journals.day_after(BalanceKey("", self.period, self.first_day))

    def scopes(self, keys: Iterable[BalanceKey]) -> list[str]:
        """Return the scopes of those balances that are in this hash."""
        return [key.scope for key in keys if key.period is self.period]


@dataclass(slots=True)
class Summed:
    """What one window holds: balances by scope, and rows that are open."""

    spent: dict[str, int]
    taken: dict[str, int]
    calls: dict[str, int]
    open_rows: dict[int, str]

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> Summed:
        """Read the fields of a hash."""
        summed = cls({}, {}, {}, {})
        by_kind = {"s ": summed.spent, "t ": summed.taken, "c ": summed.calls}
        for field, value in fields.items():
            if field[:2] in by_kind:
                by_kind[field[:2]][field[2:]] = int(value)
            elif field.startswith("#"):
                summed.open_rows[int(field[1:])] = value
        return summed

    def fields(self) -> dict[str, str]:
        """Return the fields of a hash."""
        return {
            **{f"s {scope}": str(value) for scope, value in self.spent.items()},
            **{f"t {scope}": str(value) for scope, value in self.taken.items()},
            **{f"c {scope}": str(value) for scope, value in self.calls.items()},
            **{f"#{row}": value for row, value in self.open_rows.items()},
        }

    def add(self, scope: str, *, spent: int = 0, held: int = 0, calls: int = 0) -> None:
        self.spent[scope] = self.spent.get(scope, 0) + spent
        self.taken[scope] = self.taken.get(scope, 0) + spent + held
        self.calls[scope] = self.calls.get(scope, 0) + calls

    def balances(self) -> dict[str, Balances]:
        scopes = {*self.spent, *self.taken, *self.calls}
        return {
            scope: Balances(
                spent_nanousd=self.spent.get(scope, 0),
                held_nanousd=self.taken.get(scope, 0) - self.spent.get(scope, 0),
                calls=self.calls.get(scope, 0),
            )
            for scope in scopes
        }


def add_up(connection: BaseDatabaseWrapper, window: Hash) -> Summed:
    """Add up the journal for one hash."""
    summed = Summed({}, {}, {}, {})
    for entry in journals.entries(connection, since=window.first_day, until=window.until):
        it = entry.balances
        scopes = window.scopes(entry.keys)
        for scope in scopes:
            summed.add(scope, spent=it.spent_nanousd, held=it.held_nanousd, calls=it.calls)
        if entry.row:
            summed.open_rows[entry.row] = _open_row(it.held_nanousd, it.calls, scopes)
    return summed


def _open_row(amount: int, calls: int, scopes: Sequence[str]) -> str:
    return json.dumps([str(amount), str(calls), list(scopes)])


def held_by(entry: str) -> Amounts:
    """Return what Redis holds for an open row."""
    amount, calls, *_ = json.loads(entry)
    return Amounts(nanousd=int(amount), calls=int(calls))


def compare(
    connection: BaseDatabaseWrapper, window: Hash, kept: Summed, *, at: datetime | None
) -> list[Difference] | None:
    """Compare what a hash held with the journal, which went on since.

    Rows that were open then in Redis are seen as the journal sees them now, and rows that Redis
    had not been asked about are left out. ``at`` is when the hash was read, if it was not held
    still: rows that began and ended since are left out by it, as well as clocks agree.

    Return None where that cannot be said: parts of a row were booked in the journal that Redis
    had not heard of, and nothing tells what they cost.
    """
    with one_moment(connection):
        summed = add_up(connection, window)
        rows = CallLog.objects.using(connection.alias)
        not_open = kept.open_rows.keys() - summed.open_rows.keys()
        closed = rows.in_bulk(not_open)
        later = [] if at is None else _ended_since(rows, window, at)
    held = {row: held_by(entry) for row, entry in kept.open_rows.items()}
    last = {row: held_by(entry) for row, entry in summed.open_rows.items()}
    last |= {row: journals.reservation_of(it).amounts for row, it in closed.items()}
    if any(last.get(row, amounts) != amounts for row, amounts in held.items()):
        return None
    for row in not_open:
        amount, calls, scopes, *_ = json.loads(kept.open_rows[row])
        gone = row not in closed or closed[row].status == Status.RELEASED
        cost = 0 if gone else closed[row].cost_nanousd or 0
        for scope in scopes:
            kept.add(scope, spent=cost, held=-int(amount), calls=-int(calls) if gone else 0)
    for row in summed.open_rows.keys() - kept.open_rows.keys():
        amount, calls, scopes = json.loads(summed.open_rows[row])
        for scope in scopes:
            summed.add(scope, held=-int(amount), calls=-int(calls))
    for it in later:
        if it.status != Status.RELEASED and it.pk not in held:
            for scope in window.scopes(journals.keys_of(it)):
                summed.add(scope, spent=-(it.cost_nanousd or 0), calls=-it.counted)
    ours, theirs, nothing = kept.balances(), summed.balances(), Balances()
    return [
        Difference(
            key=BalanceKey(scope, window.period, window.first_day),
            kept=ours.get(scope, nothing),
            journal=theirs.get(scope, nothing),
        )
        for scope in sorted({*ours, *theirs})
        if ours.get(scope, nothing) != theirs.get(scope, nothing)
    ]


def _ended_since(rows: QuerySet[CallLog], window: Hash, at: datetime) -> list[CallLog]:
    return list(
        rows.filter(
            day__gte=window.first_day,
            day__lt=window.until,
            reserved_at__gte=at - _LONGEST_FLIGHT,
            settled_at__gt=at,
        )
    )
