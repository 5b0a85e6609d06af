"""The journal: rows of the call log, which are the reservations, and what they add up to.

Its statements are written out, because they run twice in every call and the ORM would take
longer to phrase them than the database to run them. Columns and conversions come from the model
all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Case, CharField, F, Func, Q, Sum, Value, When

from ai_budget import periods
from ai_budget.ledger.connection import (
    for_update,
    one_statement,
    patience,
    places,
    retry,
    short_transaction,
)
from ai_budget.models import CallLog, TotalMark
from ai_budget.periods import Period
from ai_budget.policy.limits import balance_keys
from ai_budget.scopes import SITE
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Charge,
    Part,
    Reservation,
    Settlement,
    Status,
)

DEADLINE_PASSED = "deadline passed"
"""The error of a row whose worker never came back."""

_LONGEST_DECISION = 200

_ROWS_AT_ONCE = 1_000
"""Rows that one statement writes, where the database takes as many parameters."""

_ZONES_APART = timedelta(hours=15)
"""No zone's midnight is further from UTC's, so a day's rows can be found by their time."""


class Journal:
    """The statements that write a reservation's row, in the words of one kind of database."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        self.connection = connection
        self.calls = quote(CallLog._meta.db_table)
        fields = [field for field in CallLog._meta.concrete_fields if not field.primary_key]
        # What an attempt does not say is the same in every row, and prepared once.
        blank = CallLog(feature_id="", status=Status.RESERVED)
        self.blank = {
            field.attname: field.get_db_prep_save(getattr(blank, field.attname), connection)
            for field in fields
            if field.attname not in _JOURNALED
        }
        self.prepared = {field.attname: field for field in fields if field.attname in _PREPARED}
        self.order = [field.attname for field in fields]
        names = ", ".join(quote(str(field.column)) for field in fields)
        self.marks = f"({places(len(fields))})"
        # As they are without a length, which a cast would silently cut them to.
        types = [str(field.db_type(connection)).partition("(")[0] for field in fields]
        self.arrays = ", ".join(f"(%s)::{name}[]" for name in types)
        self.returns = connection.features.can_return_columns_from_insert
        returning = f" RETURNING {quote('id')}" if self.returns else ""
        self.insert_many = f"INSERT INTO {self.calls} ({names})"
        self.insert = f"{patience(connection)}{self.insert_many} VALUES {self.marks}{returning}"
        at_once: int = connection.ops.bulk_batch_size(fields, range(_ROWS_AT_ONCE))
        self.at_once = max(1, at_once)
        assigned = ", ".join(
            [f"{quote(name)} = %s" for name in _CLOSED]
            # What the answer does not say stays as it was asked for.
            + [f"{name} = COALESCE(NULLIF(%s, ''), {name})" for name in map(quote, _REPORTED)]
        )
        self.correction = (
            f"{patience(connection)}UPDATE {self.calls} SET {assigned} WHERE id = %s "
            "AND status = %s"
        )
        # One that was made for many may hold less by now than whoever closes it knows of.
        self.closing = f"{self.correction} AND reserved_nanousd = %s AND counted = %s"
        marks = f"INSERT INTO {quote(TotalMark._meta.db_table)} ({_MARKED}) SELECT {_MARKED} FROM"
        self.marking = f"{marks} {self.calls} WHERE id = %s"
        # Where one statement can do both, it spares every call the way there and back.
        self.marks_along = connection.vendor == "postgresql"
        if self.marks_along:
            self.correction, self.closing = (
                f"WITH changed AS ({change} RETURNING {_MARKED}) {marks} changed"
                for change in (self.correction, self.closing)
            )

    def prepare(self, attempt: Attempt, amounts: Amounts) -> dict[str, Any]:
        """Return the columns of a reservation's row, before anything is locked: it takes time."""
        row = {**self.blank, **_asked(attempt, amounts)}
        for name, field in self.prepared.items():
            row[name] = field.get_db_prep_save(row[name], self.connection)
        return row

    def write(self, cursor: Any, row: Mapping[str, Any], note: str = "") -> int:
        """Write a row that was prepared, with a note to its decision; return its id."""
        decision = f"{row['decision']}; {note}".strip("; ") if note else row["decision"]
        given = {**row, "decision": decision[:_LONGEST_DECISION]}
        cursor.execute(self.insert, [given[name] for name in self.order])
        return int(cursor.fetchone()[0] if self.returns else cursor.lastrowid)

    def close(
        self, cursor: Any, reservation: Reservation, settlement: Settlement, now: datetime
    ) -> bool:
        """Write how the attempt ended, if its row still holds what was reserved; say if so."""
        held = reservation.amounts
        known = [reservation.id, Status.RESERVED.value, held.nanousd, held.calls]
        given = [*self._closed(settlement, now), *known]
        return self._change(cursor, self.closing, given, reservation.id)

    def correct(self, cursor: Any, row: int, settlement: Settlement, now: datetime) -> None:
        """Write the truth over an estimate, if it is still one."""
        known = [row, Status.ESTIMATED.value]
        self._change(cursor, self.correction, [*self._closed(settlement, now), *known], row)

    def _change(self, cursor: Any, statement: str, given: Sequence[Any], row: int) -> bool:
        """Change a row and mark its sums, in the caller's transaction; say if it was changed."""
        cursor.execute(statement, given)
        changed = bool(cursor.rowcount)
        if changed and not self.marks_along:
            self.mark(cursor, row)
        return changed

    def mark(self, cursor: Any, row: int) -> None:
        """Say that the sums which a row counts in have changed, in the caller's transaction."""
        cursor.execute(self.marking, [row])

    def _closed(self, settlement: Settlement, now: datetime) -> list[Any]:
        values = self._closing(settlement, now)
        return [values[name] for name in (*_CLOSED, *_REPORTED)]

    def prepare_settled(self, attempt: Attempt, settlement: Settlement) -> dict[str, Any]:
        """Return the columns of a row that is settled as it is written, and takes nothing."""
        row = self.prepare(attempt, Amounts(nanousd=0, calls=0))
        return {**row, **self._closing(settlement, attempt.reserved_at)}

    def _closing(self, settlement: Settlement, now: datetime) -> dict[str, Any]:
        return {**_ended(settlement), "settled_at": self._moment(now)}

    def _moment(self, at: datetime) -> Any:
        return self.connection.ops.adapt_datetimefield_value(at)

    def prepare_parts(self, row: CallLog, parts: Iterable[Part], now: datetime) -> list[list[Any]]:
        """Return the rows of items that are over; they count where the reservation does.

        What is alike in many of them is prepared once: there may be a hundred thousand.
        """
        shared: dict[str, Any] = {
            "feature_id": row.feature_id,
            "category": row.category,
            "subject": row.subject,
            "user_id": self._prepare("user_id", row.user_id),
            "day": self._prepare("day", row.day),
            "settled_at": self._moment(now),
        }
        moments: dict[datetime, Any] = {}
        charge, tags = None, None
        rows = []
        for part in parts:
            attempt = part.attempt
            if attempt.charge is not charge:
                charge = attempt.charge
                tags = self._prepare("tags", dict(charge.tags))
            for at in (attempt.reserved_at, attempt.deadline):
                if at not in moments:
                    moments[at] = self._moment(at)
            asked = _asked(attempt, Amounts(nanousd=part.held_nanousd))
            ended = _ended(part.settlement)
            for name in _REPORTED:
                ended[name] = ended[name] or asked[name]
            values = {
                **self.blank,
                **asked,
                **ended,
                **shared,
                "call_id": self._prepare("call_id", attempt.call_id),
                "decision": attempt.decision[:_LONGEST_DECISION],
                "reserved_at": moments[attempt.reserved_at],
                "deadline": moments[attempt.deadline],
                "tags": tags,
            }
            rows.append([values[name] for name in self.order])
        return rows

    def write_many(self, cursor: Any, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows that were prepared, as many at once as the database takes."""
        for start in range(0, len(rows), self.at_once):
            some = rows[start : start + self.at_once]
            if self.connection.vendor == "postgresql":
                # Its drivers take columns far more quickly than so many single values.
                given = [list(column) for column in zip(*some, strict=True)]
                values = f"SELECT * FROM UNNEST({self.arrays})"
            else:
                given = [value for row in some for value in row]
                values = f"VALUES {', '.join([self.marks] * len(some))}"
            cursor.execute(f"{self.insert_many} {values}", given)

    def _prepare(self, name: str, value: Any) -> Any:
        return self.prepared[name].get_db_prep_save(value, self.connection)

    def lock(self, cursor: Any, row: int) -> Standing | None:
        """Return how a row stands, and lock it; None if there is none."""
        cursor.execute(
            "SELECT status, cost_nanousd, reserved_nanousd, counted "
            f"FROM {self.calls} WHERE id = %s{for_update(self.connection)}",
            [row],
        )
        found = cursor.fetchone()
        if found is None:
            return None
        status, cost, reserved, counted = found
        held = Amounts(nanousd=reserved, calls=counted)
        return Standing(status=Status(status), cost_nanousd=cost or 0, amounts=held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a row stands: what it cost if it is over, and what it held at last."""

    status: Status
    cost_nanousd: int
    amounts: Amounts


def _asked(attempt: Attempt, amounts: Amounts) -> dict[str, Any]:
    """Return the columns that an attempt gives, as the model has them."""
    charge = attempt.charge
    return {
        "call_id": attempt.call_id,
        "attempt": attempt.number,
        "counted": amounts.calls,
        "feature_id": charge.feature,
        "category": attempt.category,
        "user_id": charge.user_id,
        "subject": charge.subject,
        "kind": attempt.kind.value,
        "requested_model": attempt.requested_model,
        "model": attempt.model,
        "provider": attempt.provider,
        "max_tokens": attempt.max_tokens,
        "speed": attempt.speed,
        "inference_geo": attempt.inference_geo,
        "reserved_nanousd": amounts.nanousd,
        "decision": attempt.decision,
        "cache_checked": attempt.cache_checked,
        "rates": attempt.rates,
        "reserved_at": attempt.reserved_at,
        "day": attempt.day,
        "deadline": attempt.deadline,
        "tags": dict(charge.tags),
    }


def _ended(settlement: Settlement) -> dict[str, Any]:
    """Return the columns that tell how an attempt ended, but for when."""
    usage = settlement.usage
    return {
        "status": settlement.status.value,
        "cost_nanousd": settlement.cost_nanousd,
        "input_tokens": usage.input_tokens,
        "cache_write_5m_tokens": usage.cache_write_5m_tokens,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "output_tokens": usage.output_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "web_searches": usage.web_searches,
        "service_tier": usage.service_tier[:16],
        "speed": usage.speed[:16],
        "inference_geo": usage.inference_geo[:32],
        "stop_reason": settlement.stop_reason[:32],
        "request_id": settlement.request_id[:64],
        "latency_ms": settlement.latency_ms,
        "first_token_ms": settlement.first_token_ms,
        "error": settlement.error[:64],
        "saved_nanousd": settlement.saved_nanousd,
        "saved_reason": settlement.saved_reason[:32],
    }


def journal(connection: BaseDatabaseWrapper) -> Journal:
    """Return the journal's statements for a connection, phrased once."""
    kept: Journal | None = getattr(connection, "_ai_budget_journal", None)
    if kept is None:
        kept = Journal(connection)
        connection._ai_budget_journal = kept  # type: ignore[attr-defined]
    return kept


_CLOSED = (
    "status",
    "cost_nanousd",
    "input_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "cache_read_tokens",
    "output_tokens",
    "thinking_tokens",
    "web_searches",
    "service_tier",
    "stop_reason",
    "request_id",
    "settled_at",
    "latency_ms",
    "first_token_ms",
    "error",
    "saved_nanousd",
    "saved_reason",
)

_REPORTED = ("speed", "inference_geo")

_MARKED = "reserved_at, day, user_id, subject"
"""What tells which sums a row counts in."""

_PREPARED = frozenset({"call_id", "user_id", "reserved_at", "day", "deadline", "tags"})
"""Columns whose values databases write in different ways."""

_JOURNALED = _PREPARED | {
    "attempt",
    "counted",
    "feature_id",
    "category",
    "subject",
    "kind",
    "requested_model",
    "model",
    "provider",
    "max_tokens",
    "speed",
    "inference_geo",
    "reserved_nanousd",
    "decision",
    "cache_checked",
    "rates",
}
"""Columns that an attempt gives."""


def write_once(connection: BaseDatabaseWrapper, attempt: Attempt, write: Callable[[], int]) -> int:
    """Run what writes the row of an attempt until it is done; return the row's id.

    A connection that was lost may have committed before: then it is not written again.
    """
    tried = False

    def step() -> int:
        nonlocal tried
        again, tried = tried, True
        row = row_of(connection.alias, attempt) if again else None
        return write() if row is None else row

    return retry(connection, step)


# Statements by themselves


def insert(
    connection: BaseDatabaseWrapper, attempt: Attempt, amounts: Amounts, note: str = ""
) -> int:
    """Write the row of an attempt by itself, once, and return its id."""

    def write() -> int:
        rows = journal(connection)
        prepared = rows.prepare(attempt, amounts)
        with one_statement(connection) as cursor:
            return rows.write(cursor, prepared, note)

    return write_once(connection, attempt, write)


def insert_settled(
    connection: BaseDatabaseWrapper, attempt: Attempt, settlement: Settlement
) -> int:
    """Write the row of an attempt that took nothing and is over, and return its id."""

    def write() -> int:
        rows = journal(connection)
        prepared = rows.prepare_settled(attempt, settlement)
        with short_transaction(connection) as cursor:
            row = rows.write(cursor, prepared)
            rows.mark(cursor, row)
            return row

    return retry(connection, write)


def close_open(
    connection: BaseDatabaseWrapper,
    reservation: Reservation,
    settlement: Settlement,
    now: datetime,
) -> tuple[Reservation, Settlement] | None:
    """Close an open row; return what it held at last and how it ended, or None if it was closed."""

    def step() -> tuple[Reservation, Settlement] | None:
        held, ended = reservation, settlement
        while True:
            with short_transaction(connection) as cursor:
                if journal(connection).close(cursor, held, ended, now):
                    return held, ended
            row = rows.first()
            if row is None:
                return None
            held, ended = of_the_rest(reservation, settlement, reservation_of(row).amounts)

    rows = CallLog.objects.using(connection.alias).filter(pk=reservation.id, status=Status.RESERVED)
    return retry(connection, step)


def is_estimate(connection: BaseDatabaseWrapper, row: int) -> bool:
    """Say whether a row was booked without knowing what it cost."""
    rows = CallLog.objects.using(connection.alias).filter(pk=row, status=Status.ESTIMATED)
    return retry(connection, rows.exists)


def correct_estimate(
    connection: BaseDatabaseWrapper, row: int, settlement: Settlement, now: datetime
) -> None:
    """Write over an estimate what the call cost in truth."""

    def step() -> None:
        with short_transaction(connection) as cursor:
            journal(connection).correct(cursor, row, settlement, now)

    retry(connection, step)


def delete_open(connection: BaseDatabaseWrapper, row: int) -> None:
    """Delete the row of a call that was refused after it was written: it never was one."""
    rows = CallLog.objects.using(connection.alias).filter(pk=row, status=Status.RESERVED)

    def step() -> None:
        with one_statement(connection):
            rows._raw_delete(connection.alias)

    retry(connection, step)


def note_decision(connection: BaseDatabaseWrapper, row: int, decision: str) -> None:
    """Write over why a row's model, rung or passing was chosen."""
    rows = CallLog.objects.using(connection.alias).filter(pk=row)

    def step() -> None:
        with one_statement(connection):
            rows.update(decision=decision[:_LONGEST_DECISION])

    retry(connection, step)


# Rows that somebody else wrote


def row_of(alias: str, attempt: Attempt) -> int | None:
    """Return the row of an attempt that was journaled, though nobody heard of it."""
    rows = CallLog.objects.using(alias).filter(
        call_id=attempt.call_id,
        attempt=attempt.number,
        reserved_at=attempt.reserved_at,
        status=Status.RESERVED,
    )
    return rows.values_list("pk", flat=True).first()


def overdue(alias: str, now: datetime, *, most: int, leave: Sequence[int] = ()) -> list[CallLog]:
    """Return reservations whose worker never came back, the oldest deadline first.

    ``leave`` are the keys of rows that nothing can be done with.
    """
    rows = CallLog.objects.using(alias).filter(status=CallLog.Status.RESERVED, deadline__lt=now)
    return list(rows.exclude(pk__in=leave).order_by("deadline")[:most])


def reservation_of(row: CallLog) -> Reservation:
    """Rebuild a reservation from its journal, for a worker that died."""
    attempt: Any = None  # settling needs only what is below
    return Reservation(
        id=row.pk,
        attempt=attempt,
        amounts=Amounts(nanousd=row.reserved_nanousd, calls=row.counted),
        balances=tuple(keys_of(row)),
    )


def keys_of(row: CallLog) -> list[BalanceKey]:
    """Return the balances that a row counts in."""
    charge = Charge(feature=row.feature_id, user_id=row.user_id, subject=row.subject)
    return balance_keys(charge, row.category, row.day)


def of_the_rest(
    reservation: Reservation, settlement: Settlement, held: Amounts
) -> tuple[Reservation, Settlement]:
    """Return a reservation and its end, as they are for what is left of it.

    Parts of it were settled since whoever closes it looked. What is not known cost no more than
    the rest holds.
    """
    amounts = replace(reservation.amounts, nanousd=held.nanousd, calls=held.calls)
    if settlement.status is Status.ESTIMATED:
        most = min(settlement.cost_nanousd, held.nanousd)
        settlement = replace(settlement, cost_nanousd=most)
    return replace(reservation, amounts=amounts), settlement


def find(connection: BaseDatabaseWrapper, row: int) -> CallLog | None:
    """Return a row as it is now."""
    rows = CallLog.objects.using(connection.alias).filter(pk=row)
    return retry(connection, rows.first)


def at_bound(row: CallLog) -> Settlement:
    """Return the booking of a call whose end nobody knows: all that was reserved for it."""
    return Settlement(
        status=Status.ESTIMATED, cost_nanousd=row.reserved_nanousd, error=DEADLINE_PASSED
    )


# What it adds up to


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Rows of one day that count alike, added up; a row that is still open is by itself.

    ``row`` is the open row's id, and 0 for the rows that are booked.
    """

    day: date
    charge: Charge
    category: str
    row: int
    balances: Balances

    @property
    def keys(self) -> list[BalanceKey]:
        """The balances that they count in."""
        return balance_keys(self.charge, self.category, self.day)


def entries(
    connection: BaseDatabaseWrapper,
    *,
    since: date,
    until: date | None = None,
    where: Q | None = None,
) -> Iterator[Entry]:
    """Add up the rows that count in the days from ``since`` up to but not including ``until``.

    One statement, so that no call can be seen half open and half booked.
    """
    mysql = connection.vendor == "mysql"
    subject: Any = F("subject")
    if mysql:
        # Grouping there follows a collation, to which two subjects may be one.
        subject = Func(F("subject"), function="HEX", output_field=CharField())
    still_open = When(status=Status.RESERVED, then="reserved_nanousd")
    rows = CallLog.objects.using(connection.alias).filter(of_days(since, until))
    if where is not None:
        rows = rows.filter(where)
    summed = (
        rows.exclude(status=Status.RELEASED)
        .annotate(
            whose=subject,
            open_row=Case(When(status=Status.RESERVED, then="id"), default=Value(0)),
        )
        .order_by()
        .values_list("day", "feature_id", "category", "user_id", "whose", "open_row")
        .annotate(
            spent=Sum("cost_nanousd", default=0),
            held=Sum(Case(still_open, default=Value(0))),
            calls=Sum("counted"),
        )
    )
    for day, feature, category, user_id, whose, row, spent, held, calls in summed.iterator():
        yield Entry(
            day=day,
            charge=Charge(
                feature=feature,
                user_id=user_id,
                subject=bytes.fromhex(whose).decode() if mysql else whose,
            ),
            category=category,
            row=row,
            balances=Balances(spent_nanousd=spent, held_nanousd=held, calls=calls),
        )


def of_days(since: date, until: date | None = None) -> Q:
    """Return the rows that count in the days up to ``until``, so that they are found by time."""
    rows = Q(day__gte=since, reserved_at__gte=_midnight(since) - _ZONES_APART)
    if until is not None:
        rows &= Q(day__lt=until, reserved_at__lt=_midnight(until) + _ZONES_APART)
    return rows


def add_up(found: Iterable[Entry]) -> dict[BalanceKey, Balances]:
    """Return what each balance has to be by these entries."""
    totals: dict[BalanceKey, list[int]] = {}
    for entry in found:
        more = entry.balances
        for key in entry.keys:
            total = totals.setdefault(key, [0, 0, 0])
            total[0] += more.spent_nanousd
            total[1] += more.held_nanousd
            total[2] += more.calls
    return {
        key: Balances(spent_nanousd=spent, held_nanousd=held, calls=calls)
        for key, (spent, held, calls) in totals.items()
    }


def balances_of(
    connection: BaseDatabaseWrapper, keys: Iterable[BalanceKey]
) -> Mapping[BalanceKey, Balances]:
    """Return what these balances have to be by the journal."""
    wanted: dict[str, list[BalanceKey]] = {}
    for key in keys:
        wanted.setdefault(key.scope, []).append(key)
    found = {}
    for scope, same in wanted.items():
        since = min(key.first_day for key in same)
        until = max(day_after(key) for key in same)
        totals = add_up(entries(connection, since=since, until=until, where=counted_in(scope)))
        found.update({key: totals.get(key, Balances()) for key in same})
    return found


def counted_in(scope: str) -> Q:
    """Return the rows that count in a scope, and maybe some that only look alike."""
    if scope == SITE:
        return Q()
    whose, feature = _parted(scope)
    kind, _, name = whose.partition(":")
    field = {"feature": "feature_id", "category": "category", "user": "user_id"}
    name = name.replace(",,", ",")
    if kind == "user" and not _is_primary_key(name):
        return Q(pk__in=())
    rows = Q(**{field.get(kind, "subject"): name})
    return rows & Q(feature_id=feature) if feature else rows


def _is_primary_key(text: str) -> bool:
    """Say whether a user can have that key: a site may have had other users before."""
    try:
        CallLog._meta.get_field("user").target_field.to_python(text)
    except ValidationError:
        return False
    return True


def day_after(key: BalanceKey) -> date:
    """Return the day after the last one that counts in a balance."""
    if key.period is Period.DAY:
        return key.first_day + timedelta(days=1)
    return periods.next_month(key.first_day)


def _parted(scope: str) -> tuple[str, str]:
    """Split the scope of a caller in one feature; commas of the caller's own are doubled."""
    whose, comma, feature = scope.rpartition(",feature:")
    commas = len(whose) - len(whose.rstrip(","))
    return (whose, feature) if comma and commas % 2 == 0 else (scope, "")


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), tzinfo=UTC)
