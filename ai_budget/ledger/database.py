"""The ledger in the site's own database: short durable transactions and locked rows.

Its statements are written out, because they run twice in every call and the ORM would take
longer to phrase them than the database to run them. Columns and conversions come from the
models all the same.
"""

from __future__ import annotations

import functools
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable, LimitReached
from ai_budget.ledger.base import Ledger, breaches, refusal
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period
from ai_budget.policy.limits import balance_keys
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Charge,
    Limit,
    Reservation,
    Settlement,
    Status,
)

LOCK_TIMEOUT_SECONDS = 5
"""How long one statement waits for another's lock before the step is tried again."""

TRIES = 6
"""How often a step is tried against deadlocks and lock timeouts."""

CLOCK_SECONDS = 30.0
"""How long the store's clock is carried on by the worker's monotonic one."""

_RETRIED = {
    "40001",  # PostgreSQL: serialization failure
    "40P01",  # PostgreSQL: deadlock
    "55P03",  # PostgreSQL: lock timeout
    1020,  # MariaDB: the record has changed since it was read
    1205,  # MySQL and MariaDB: lock timeout
    1213,  # MySQL and MariaDB: deadlock
}

Result = TypeVar("Result")


class _WindowsMissing(Exception):
    """Balances that have no row yet."""


class DatabaseLedger(Ledger):
    """Balances as rows of SpendWindow, the journal as rows of CallLog, one transaction for both."""

    def __init__(self) -> None:
        self._clocks: dict[str, _StoreClock] = {}

    @property
    def alias(self) -> str:
        return conf.LEDGER_DATABASE

    def now(self) -> datetime:
        if periods.is_overridden():
            return periods.now()
        alias = self.alias
        clock = self._clocks.get(alias)
        if clock is None:
            clock = self._clocks[alias] = _StoreClock(alias)
        return retry(connections[alias], clock.now)

    def ensure_durable(self) -> None:
        _ensure_durable(connections[self.alias])

    def reserve(self, limits: Sequence[Limit], amounts: Amounts, attempt: Attempt) -> Reservation:
        connection = connections[self.alias]
        _ensure_durable(connection)
        # Fixed order, so that no two attempts wait for each other's rows.
        keys = sorted({limit.key for limit in limits}, key=_primary_key)
        tried = False

        def step() -> Reservation:
            nonlocal tried
            again, tried = tried, True
            # A connection that was lost may have committed before.
            row = _journaled(connection.alias, attempt) if again else None
            if row is None:
                return self._reserve(connection, keys, limits, amounts, attempt)
            return Reservation(id=row, attempt=attempt, amounts=amounts, balances=tuple(keys))

        try:
            return retry(connection, step)
        except LimitReached as refused:
            counted = {limit.key for limit in limits if limit.scope == refused.scope}
            # One that cannot be counted is a refusal all the same.
            with suppress(LedgerUnavailable):
                self.count_refusal(_refused_keys(counted, limits))
            raise

    def _reserve(
        self,
        connection: BaseDatabaseWrapper,
        keys: Sequence[BalanceKey],
        limits: Sequence[Limit],
        amounts: Amounts,
        attempt: Attempt,
    ) -> Reservation:
        statements = _statements(connection)
        try:
            with _transaction(connection) as cursor:
                balances = statements.take(cursor, keys, amounts)
                if len(balances) < len(keys):
                    raise _WindowsMissing
                # A breach undoes what was taken, with the transaction.
                shadowed = self._check(limits, amounts, attempt, balances)
                row = statements.journal(cursor, attempt, amounts, shadowed)
        except _WindowsMissing:
            create_windows(connection.alias, keys)
            return self._reserve(connection, keys, limits, amounts, attempt)
        return Reservation(id=row, attempt=attempt, amounts=amounts, balances=tuple(keys))

    def _check(
        self,
        limits: Sequence[Limit],
        amounts: Amounts,
        attempt: Attempt,
        balances: Mapping[BalanceKey, Balances],
    ) -> str:
        """Raise for a breach that is enforced; return what shadow mode would have refused."""
        found = breaches(limits, amounts, balances)
        enforced = [breach for breach in found if breach[0].enforce]
        if enforced:
            raise refusal(enforced, amounts, attempt.reserved_at) from None
        return ", ".join(f"{limit.scope} {limit.window.period}" for limit, _ in found)

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        connection = connections[self.alias]
        _ensure_durable(connection)
        retry(connection, lambda: self._settle(connection, reservation, settlement))

    def _settle(
        self, connection: BaseDatabaseWrapper, reservation: Reservation, settlement: Settlement
    ) -> None:
        statements = _statements(connection)
        keys = sorted(reservation.balances, key=_primary_key)
        now = self.now()
        calls = 0 if settlement.keep_call else reservation.amounts.calls
        with _transaction(connection) as cursor:
            if statements.close(cursor, reservation.id, settlement, now, Status.RESERVED):
                spent, held = settlement.cost_nanousd, reservation.amounts.nanousd
                statements.give(cursor, keys, spent=spent, held=held, calls=calls)
                return
            # Somebody was first: the tick, at the bound. What is known corrects an estimate.
            if settlement.status is Status.ESTIMATED:
                return
            estimated = statements.lock_estimate(cursor, reservation.id)
            if estimated is None:
                return
            statements.close(cursor, reservation.id, settlement, now, Status.ESTIMATED)
            correction = settlement.cost_nanousd - estimated
            statements.give(cursor, keys, spent=correction, held=0, calls=calls)

    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        connection = connections[self.alias]
        wanted = sorted(set(keys), key=_primary_key)
        if not wanted:
            return {}
        return retry(connection, lambda: _statements(connection).read(connection, wanted))

    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        connection = connections[self.alias]
        refused = sorted(set(keys), key=_primary_key)
        if refused:
            retry(connection, lambda: self._count_refusal(connection, refused))

    def _count_refusal(self, connection: BaseDatabaseWrapper, keys: Sequence[BalanceKey]) -> None:
        try:
            with _transaction(connection) as cursor:
                if _statements(connection).count_refusal(cursor, keys) < len(keys):
                    raise _WindowsMissing
        except _WindowsMissing:
            # Nothing was counted in these before: a paused feature, a call without a bound.
            create_windows(connection.alias, keys)
            self._count_refusal(connection, keys)

    def settle_overdue(self, *, most: int = 1_000) -> int:
        rows = CallLog.objects.using(self.alias).filter(
            status=CallLog.Status.RESERVED, deadline__lt=self.now()
        )
        overdue = retry(connections[self.alias], lambda: list(rows.order_by("deadline")[:most]))
        settled, failure = 0, None
        for row in overdue:
            try:
                self.settle(_reservation_of(row), _at_bound(row))
                settled += 1
            except LedgerUnavailable as error:
                failure = error  # one row that will not settle holds up no other
        if failure is not None and not settled:
            raise failure
        return settled


def _ensure_durable(connection: BaseDatabaseWrapper) -> None:
    try:
        ensure_outside_transaction(connection)
    except (DatabaseError, InterfaceError) as error:
        # It asks the connection, which has to be made first.
        raise LedgerUnavailable(_unavailable(connection, error)) from None


def ensure_outside_transaction(connection: BaseDatabaseWrapper) -> None:
    """Raise ``CallInsideTransaction`` where a rollback of the caller's could undo the ledger.

    The transaction that a TestCase wraps around a test is no caller's.
    """
    blocks = connection.atomic_blocks
    nested = bool(blocks) and not getattr(blocks[-1], "_from_testcase", False)
    if not nested and (connection.in_atomic_block or connection.get_autocommit()):
        return
    second = (
        "Make the call outside the transaction: SQLite has no second connection that could "
        "write beside it."
        if connection.vendor == "sqlite"
        else "Make the call outside the transaction, or name a second alias of the same "
        "database in AI_BUDGET['LEDGER_DATABASE']."
    )
    raise CallInsideTransaction(
        f"A paid call inside a transaction on {connection.alias!r}: its rollback would forget "
        f"what was spent. {second}"
    ) from None


def create_windows(alias: str, keys: Iterable[BalanceKey]) -> None:
    """Create the rows of balances that have none, outside any transaction of a reservation."""
    SpendWindow.objects.using(alias).bulk_create(
        [
            SpendWindow(scope=key.scope, period=key.period, first_day=key.first_day)
            for key in sorted(keys, key=_primary_key)
        ],
        ignore_conflicts=True,
    )


@functools.lru_cache(maxsize=4_096)
def _primary_key(key: BalanceKey) -> str:
    return SpendWindow.key_for(key.scope, key.period, key.first_day)


def _refused_keys(refused: set[BalanceKey], limits: Sequence[Limit]) -> list[BalanceKey]:
    """Return the days to count a refusal in: the feature's, the caller's, and the limit's own."""
    counted = {
        limit.key
        for limit in limits
        if limit.key in refused or limit.scope.startswith(("feature:", "user:", "subject:"))
    }
    return [key for key in counted if key.period is Period.DAY and ",feature:" not in key.scope]


def _journaled(alias: str, attempt: Attempt) -> int | None:
    """Return the row of an attempt that was journaled, though nobody heard of it."""
    rows = CallLog.objects.using(alias).filter(
        call_id=attempt.call_id,
        attempt=attempt.number,
        reserved_at=attempt.reserved_at,
        status=Status.RESERVED,
    )
    return rows.values_list("pk", flat=True).first()


def _reservation_of(row: CallLog) -> Reservation:
    """Rebuild a reservation from its journal, for a worker that died."""
    charge = Charge(feature=row.feature_id, user_id=row.user_id, subject=row.subject)
    attempt: Any = None  # settling needs only what is below
    return Reservation(
        id=row.pk,
        attempt=attempt,
        amounts=Amounts(nanousd=row.reserved_nanousd, calls=row.counted),
        balances=tuple(balance_keys(charge, row.category, row.day)),
    )


def _at_bound(row: CallLog) -> Settlement:
    return Settlement(
        status=Status.ESTIMATED, cost_nanousd=row.reserved_nanousd, error="deadline passed"
    )


# Transactions


@contextmanager
def _transaction(connection: BaseDatabaseWrapper) -> Iterator[Any]:
    """Open a short durable transaction whose statements do not wait long for locks."""
    with transaction.atomic(using=connection.alias, durable=True), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
        yield cursor


def retry(connection: BaseDatabaseWrapper, step: Callable[[], Result]) -> Result:
    """Run a step again after deadlocks and lock timeouts, a bounded number of times."""
    for tries in range(1, TRIES + 1):
        used = connection.connection
        try:
            return step()
        except (OperationalError, InterfaceError) as error:
            if tries == TRIES or not _passes(connection, error, used):
                raise LedgerUnavailable(_unavailable(connection, error)) from None
            # Apart from each other, or the same calls would meet again.
            time.sleep(random.uniform(0, 0.01 * 2**tries))
        except DatabaseError as error:
            raise LedgerUnavailable(_unavailable(connection, error)) from None
    raise AssertionError("unreachable")


def _passes(connection: BaseDatabaseWrapper, error: Exception, used: Any) -> bool:
    """Say whether trying again may help: another's lock, or a connection that was lost idle."""
    # Some drivers have both a state and a number of their own.
    codes = {getattr(error.__cause__, "sqlstate", None), *error.args[:1]}
    if codes & _RETRIED or "is locked" in str(error):
        return True
    if connection.in_atomic_block:
        return False
    if connection.connection is used and used is not None and not connection.is_usable():
        connection.close()
    # Django may have made another by now, in putting autocommit back.
    return used is not None and connection.connection is not used


def _unavailable(connection: BaseDatabaseWrapper, error: Exception) -> str:
    return (
        f"The ledger's database {connection.alias!r} did not take the booking "
        f"({type(error).__name__}). Nothing was sent unless it was reserved before."
    )


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class _StoreClock:
    """The store's clock, read now and then and carried on by a clock that cannot be set."""

    _READ = {
        "postgresql": "SELECT clock_timestamp()",
        "mysql": "SELECT UTC_TIMESTAMP(6)",
    }

    def __init__(self, alias: str) -> None:
        self._alias = alias
        # When it was read, by the monotonic clock, the store's and the worker's: one value, for
        # a thread must not carry on one reading from the moment of another.
        self._reading = (float("-inf"), _LONG_AGO, _LONG_AGO)

    def now(self) -> datetime:
        connection = connections[self._alias]
        worker = periods.now()
        query = self._READ.get(connection.vendor)
        if query is None:
            return worker
        read_at, store_at, worker_at = self._reading
        elapsed = periods.monotonic() - read_at
        # A machine that slept moved its clock but not its monotonic one.
        slept = abs((worker - worker_at).total_seconds() - elapsed) > 1
        if elapsed > CLOCK_SECONDS or slept:
            with connection.cursor() as cursor:
                cursor.execute(query)
                read: datetime = cursor.fetchone()[0]
            store_at = read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
            self._reading = (periods.monotonic(), store_at, periods.now())
            return store_at
        return store_at + timedelta(seconds=elapsed)


# Statements


class _Statements:
    """The ledger's few statements, in the words of one kind of database."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        self.connection = connection
        self.windows = quote(SpendWindow._meta.db_table)
        self.calls = quote(CallLog._meta.db_table)
        self.key = quote("key")
        # A small table may be read whole otherwise, and every row on the way is locked, too.
        self.by_key = " FORCE INDEX (PRIMARY)" if connection.vendor == "mysql" else ""
        self.columns = "spent_nanousd, held_nanousd, calls, refused"
        self.returned = f"{self.key}, {self.columns}"
        self.updates_return = connection.vendor == "postgresql" or (
            connection.vendor == "sqlite" and sqlite3.sqlite_version_info >= (3, 35)
        )
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
        places = ", ".join(["%s"] * len(fields))
        self.returns = connection.features.can_return_columns_from_insert
        returning = f" RETURNING {quote('id')}" if self.returns else ""
        self.insert = f"INSERT INTO {self.calls} ({names}) VALUES ({places}){returning}"
        assigned = ", ".join(
            [f"{quote(name)} = %s" for name in _CLOSED]
            # What the answer does not say stays as it was asked for.
            + [f"{name} = COALESCE(NULLIF(%s, ''), {name})" for name in map(quote, _REPORTED)]
        )
        self.update = f"UPDATE {self.calls} SET {assigned} WHERE id = %s AND status = %s"

    def take(
        self, cursor: Any, keys: Sequence[BalanceKey], amounts: Amounts
    ) -> dict[BalanceKey, Balances]:
        """Hold the amounts in all rows, locked in the order of their keys.

        Return what the rows held before; rows that do not exist are left out.
        """
        rows = [_primary_key(key) for key in keys]
        given = [amounts.nanousd, amounts.calls, *rows]
        change = "held_nanousd = held_nanousd + %s, calls = calls + %s"
        if not self.updates_return:
            cursor.execute(self._select(len(keys), lock=True), rows)
            before = self._balances(cursor, keys)
            cursor.execute(self._update(change, len(keys)), given)
            return before
        cursor.execute(f"{self._update(change, len(keys))} RETURNING {self.returned}", given)
        return {
            key: replace(
                after,
                held_nanousd=after.held_nanousd - amounts.nanousd,
                calls=after.calls - amounts.calls,
            )
            for key, after in self._balances(cursor, keys).items()
        }

    def read(
        self, connection: BaseDatabaseWrapper, keys: Sequence[BalanceKey]
    ) -> dict[BalanceKey, Balances]:
        """Return what the rows hold, without waiting for anybody."""
        with connection.cursor() as cursor:
            cursor.execute(self._select(len(keys), lock=False), [_primary_key(key) for key in keys])
            return self._balances(cursor, keys)

    def _select(self, count: int, *, lock: bool) -> str:
        statement = (
            f"SELECT {self.key}, {self.columns} FROM {self.windows}{self.by_key} "
            f"WHERE {self.key} IN ({_places(count)}) ORDER BY {self.key}"
        )
        if lock and self.connection.features.has_select_for_update:
            statement += " FOR UPDATE"
            if getattr(self.connection, "mysql_is_mariadb", False):
                statement += f" WAIT {LOCK_TIMEOUT_SECONDS}"
        return statement

    def _update(self, change: str, count: int) -> str:
        """Phrase an update of several rows that locks them in the order of their keys."""
        among = f"{self.key} IN ({_places(count)})"
        if self.connection.vendor == "postgresql":
            return (
                f"UPDATE {self.windows} AS w SET {change} FROM (SELECT {self.key} AS locked_key "
                f"FROM {self.windows} WHERE {among} ORDER BY {self.key} FOR UPDATE) AS locked "
                f"WHERE w.{self.key} = locked.locked_key"
            )
        ordered = f" ORDER BY {self.key}" if self.connection.vendor == "mysql" else ""
        return (
            f"{self._patience()}UPDATE {self.windows}{self.by_key} SET {change} "
            f"WHERE {among}{ordered}"
        )

    def _patience(self) -> str:
        """Say how long MariaDB waits in an update; MySQL waits as long as its server is set to."""
        if not getattr(self.connection, "mysql_is_mariadb", False):
            return ""
        return f"SET STATEMENT innodb_lock_wait_timeout = {LOCK_TIMEOUT_SECONDS} FOR "

    def _balances(self, cursor: Any, keys: Sequence[BalanceKey]) -> dict[BalanceKey, Balances]:
        by_row = {_primary_key(key): key for key in keys}
        return {
            by_row[row]: Balances(
                spent_nanousd=spent, held_nanousd=held, calls=calls, refused=refused
            )
            for row, spent, held, calls, refused in cursor.fetchall()
        }

    def give(
        self, cursor: Any, keys: Sequence[BalanceKey], *, spent: int, held: int, calls: int
    ) -> None:
        """Book what was spent, give back what was held, locking in the order of the keys."""
        change = (
            "spent_nanousd = spent_nanousd + %s, held_nanousd = held_nanousd - %s, "
            "calls = calls - %s"
        )
        cursor.execute(
            self._update(change, len(keys)), [spent, held, calls, *map(_primary_key, keys)]
        )

    def count_refusal(self, cursor: Any, keys: Sequence[BalanceKey]) -> int:
        """Count one refusal in each row; return how many rows there are."""
        change = "refused = refused + 1"
        cursor.execute(self._update(change, len(keys)), [*map(_primary_key, keys)])
        return int(cursor.rowcount)

    def journal(self, cursor: Any, attempt: Attempt, amounts: Amounts, shadowed: str) -> int:
        """Write the reservation's row and return its id."""
        decision = attempt.decision
        if shadowed:
            decision = f"{decision}; would refuse: {shadowed}".lstrip("; ")
        charge = attempt.charge
        row: dict[str, Any] = {
            **self.blank,
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
            "decision": decision[:200],
            "rates": attempt.rates,
            "reserved_at": attempt.reserved_at,
            "day": attempt.day,
            "deadline": attempt.deadline,
            "tags": dict(charge.tags),
        }
        for name, field in self.prepared.items():
            row[name] = field.get_db_prep_save(row[name], self.connection)
        values = [row[name] for name in self.order]
        cursor.execute(self.insert, values)
        return int(cursor.fetchone()[0] if self.returns else cursor.lastrowid)

    def close(
        self, cursor: Any, row: int, settlement: Settlement, now: datetime, status: Status
    ) -> bool:
        """Write how the attempt ended, if its row still has that status; say whether it had."""
        usage = settlement.usage
        values = {
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
            "settled_at": self.connection.ops.adapt_datetimefield_value(now),
            "latency_ms": settlement.latency_ms,
            "first_token_ms": settlement.first_token_ms,
            "error": settlement.error[:64],
        }
        given = [values[name] for name in (*_CLOSED, *_REPORTED)]
        cursor.execute(self._patience() + self.update, [*given, row, status.value])
        return bool(cursor.rowcount)

    def lock_estimate(self, cursor: Any, row: int) -> int | None:
        """Return what an estimated row was booked at, and lock it; None if it is not one."""
        for_update = " FOR UPDATE" if self.connection.features.has_select_for_update else ""
        cursor.execute(
            f"SELECT cost_nanousd FROM {self.calls} WHERE id = %s AND status = %s{for_update}",
            [row, Status.ESTIMATED.value],
        )
        found = cursor.fetchone()
        return None if found is None else int(found[0])


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
)


_REPORTED = ("speed", "inference_geo")

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
    "rates",
}
"""Columns that an attempt gives."""


@functools.lru_cache(maxsize=64)
def _places(count: int) -> str:
    return ", ".join(["%s"] * count)


def _statements(connection: BaseDatabaseWrapper) -> _Statements:
    """Return the statements for a connection, phrased once."""
    kept: _Statements | None = getattr(connection, "_ai_budget_statements", None)
    if kept is None:
        kept = _Statements(connection)
        connection._ai_budget_statements = kept  # type: ignore[attr-defined]
    return kept
