"""The ledger in the site's own database: short durable transactions and locked rows.

Its statements are written out, because they run twice in every call and the ORM would take
longer to phrase them than the database to run them. Columns and conversions come from the
models all the same.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F

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

    has_clock = True

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
        return _guarded(connections[alias], clock.now)

    def ensure_durable(self) -> None:
        ensure_outside_transaction(connections[self.alias])

    def reserve(self, limits: Sequence[Limit], amounts: Amounts, attempt: Attempt) -> Reservation:
        connection = connections[self.alias]
        ensure_outside_transaction(connection)
        # Fixed order, so that no two attempts wait for each other's rows.
        keys = sorted({limit.key for limit in limits}, key=_primary_key)
        try:
            return _retry(
                connection, lambda: self._reserve(connection, keys, limits, amounts, attempt)
            )
        except LimitReached as refused:
            counted = {limit.key for limit in limits if limit.scope == refused.scope}
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
                balances = statements.lock(cursor, keys)
                if len(balances) < len(keys):
                    raise _WindowsMissing
                shadowed = self._check(limits, amounts, attempt, balances)
                statements.take(cursor, keys, amounts)
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
        ensure_outside_transaction(connection)
        _retry(connection, lambda: self._settle(connection, reservation, settlement))

    def _settle(
        self, connection: BaseDatabaseWrapper, reservation: Reservation, settlement: Settlement
    ) -> None:
        statements = _statements(connection)
        keys = sorted(reservation.balances, key=_primary_key)
        now = self.now()
        with _transaction(connection) as cursor:
            if statements.close(cursor, reservation.id, settlement, now, Status.RESERVED):
                spent, held = settlement.cost_nanousd, reservation.amounts.nanousd
                calls = 0 if settlement.keep_call else reservation.amounts.calls
                statements.give(cursor, keys, spent=spent, held=held, calls=calls)
                return
            # Somebody was first: the tick, at the bound. A true cost corrects an estimate.
            if settlement.status is not Status.SETTLED:
                return
            estimated = statements.lock_estimate(cursor, reservation.id)
            if estimated is None:
                return
            statements.close(cursor, reservation.id, settlement, now, Status.ESTIMATED)
            correction = settlement.cost_nanousd - estimated
            statements.give(cursor, keys, spent=correction, held=0, calls=0)

    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        connection = connections[self.alias]
        wanted = sorted(set(keys), key=_primary_key)
        return _guarded(
            connection, lambda: _statements(connection).read(connection, wanted) if wanted else {}
        )

    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        rows = sorted(_primary_key(key) for key in keys)
        windows = SpendWindow.objects.using(self.alias)
        if _guarded(
            connections[self.alias],
            lambda: windows.filter(pk__in=rows).update(refused=F("refused") + 1),
        ) < len(rows):
            # Nothing was counted in these before: a paused feature, a call without a bound.
            create_windows(self.alias, keys)
            windows.filter(pk__in=rows).update(refused=F("refused") + 1)

    def settle_overdue(self, *, most: int = 1_000) -> int:
        rows = CallLog.objects.using(self.alias).filter(
            status=CallLog.Status.RESERVED, deadline__lt=self.now()
        )
        count = 0
        for row in rows.order_by("deadline")[:most]:
            self.settle(
                _reservation_of(row),
                Settlement(
                    status=Status.ESTIMATED,
                    cost_nanousd=row.reserved_nanousd,
                    error="deadline passed",
                ),
            )
            count += 1
        return count


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


# Transactions


@contextmanager
def _transaction(connection: BaseDatabaseWrapper) -> Iterator[Any]:
    """Open a short durable transaction whose statements do not wait long for locks."""
    with transaction.atomic(using=connection.alias, durable=True), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
        yield cursor


def _retry(connection: BaseDatabaseWrapper, step: Callable[[], Result]) -> Result:
    """Run a step again after deadlocks and lock timeouts, a bounded number of times."""
    for tries in range(1, TRIES + 1):
        try:
            return step()
        except (OperationalError, InterfaceError) as error:
            if tries == TRIES or not _passes(connection, error):
                raise LedgerUnavailable(_unavailable(connection, error)) from None
            # Apart from each other, or the same calls would meet again.
            time.sleep(random.uniform(0, 0.01 * 2**tries))
        except DatabaseError as error:
            raise LedgerUnavailable(_unavailable(connection, error)) from None
    raise AssertionError("unreachable")


def _guarded(connection: BaseDatabaseWrapper, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except (OperationalError, InterfaceError, DatabaseError) as error:
        raise LedgerUnavailable(_unavailable(connection, error)) from None


def _passes(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    """Say whether trying again may help: another's lock, or a connection that was lost idle."""
    cause = error.__cause__
    code = getattr(cause, "sqlstate", None) or (error.args[0] if error.args else None)
    if code in _RETRIED or "is locked" in str(error):
        return True
    if connection.in_atomic_block:
        return False
    connection.close_if_unusable_or_obsolete()
    return connection.connection is None


def _unavailable(connection: BaseDatabaseWrapper, error: Exception) -> str:
    return (
        f"The ledger's database {connection.alias!r} did not take the booking "
        f"({type(error).__name__}). Nothing was sent unless it was reserved before."
    )


class _StoreClock:
    """The store's clock, read now and then and carried on by a clock that cannot be set."""

    _READ = {
        "postgresql": "SELECT clock_timestamp()",
        "mysql": "SELECT UTC_TIMESTAMP(6)",
    }

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._read_at = float("-inf")
        self._store_at = datetime.min.replace(tzinfo=UTC)
        self._worker_at = datetime.min.replace(tzinfo=UTC)

    def now(self) -> datetime:
        connection = connections[self._alias]
        worker = periods.now()
        query = self._READ.get(connection.vendor)
        if query is None:
            return worker
        elapsed = periods.monotonic() - self._read_at
        # A machine that slept moved its clock but not its monotonic one.
        slept = abs((worker - self._worker_at).total_seconds() - elapsed) > 1
        if elapsed > CLOCK_SECONDS or slept:
            with connection.cursor() as cursor:
                cursor.execute(query)
                read = cursor.fetchone()[0]
            self._store_at = (
                read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
            )
            self._read_at, self._worker_at, elapsed = periods.monotonic(), periods.now(), 0.0
        return self._store_at + timedelta(seconds=elapsed)


# Statements


class _Statements:
    """The ledger's few statements, in the words of one kind of database."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        self.connection = connection
        self.windows = quote(SpendWindow._meta.db_table)
        self.calls = quote(CallLog._meta.db_table)
        self.key = quote("key")
        self.columns = "spent_nanousd, held_nanousd, calls, refused"
        self.fields = [field for field in CallLog._meta.concrete_fields if not field.primary_key]
        names = ", ".join(quote(str(field.column)) for field in self.fields)
        places = ", ".join(["%s"] * len(self.fields))
        self.returns = connection.features.can_return_columns_from_insert
        returning = f" RETURNING {quote('id')}" if self.returns else ""
        self.insert = f"INSERT INTO {self.calls} ({names}) VALUES ({places}){returning}"
        assigned = ", ".join(
            [f"{quote(name)} = %s" for name in _CLOSED]
            # What the answer does not say stays as it was asked for.
            + [f"{name} = COALESCE(NULLIF(%s, ''), {name})" for name in map(quote, _REPORTED)]
        )
        self.update = f"UPDATE {self.calls} SET {assigned} WHERE id = %s AND status = %s"

    def lock(self, cursor: Any, keys: Sequence[BalanceKey]) -> dict[BalanceKey, Balances]:
        """Lock the rows in the order of their keys and return what they hold."""
        if self.connection.vendor == "sqlite":
            # A read first could not become a write later; this takes the one lock there is.
            cursor.execute(f"UPDATE {self.windows} SET calls = calls WHERE {self.key} = ''")
        cursor.execute(self._select(len(keys), lock=True), [_primary_key(key) for key in keys])
        return self._balances(cursor, keys)

    def read(
        self, connection: BaseDatabaseWrapper, keys: Sequence[BalanceKey]
    ) -> dict[BalanceKey, Balances]:
        """Return what the rows hold, without waiting for anybody."""
        with connection.cursor() as cursor:
            cursor.execute(self._select(len(keys), lock=False), [_primary_key(key) for key in keys])
            return self._balances(cursor, keys)

    def _select(self, count: int, *, lock: bool) -> str:
        for_update = (
            " FOR UPDATE" if lock and self.connection.features.has_select_for_update else ""
        )
        if for_update and getattr(self.connection, "mysql_is_mariadb", False):
            for_update += f" WAIT {LOCK_TIMEOUT_SECONDS}"
        return (
            f"SELECT {self.key}, {self.columns} FROM {self.windows} "
            f"WHERE {self.key} IN ({_places(count)}) ORDER BY {self.key}{for_update}"
        )

    def _balances(self, cursor: Any, keys: Sequence[BalanceKey]) -> dict[BalanceKey, Balances]:
        by_row = {_primary_key(key): key for key in keys}
        return {
            by_row[row]: Balances(
                spent_nanousd=spent, held_nanousd=held, calls=calls, refused=refused
            )
            for row, spent, held, calls, refused in cursor.fetchall()
        }

    def take(self, cursor: Any, keys: Sequence[BalanceKey], amounts: Amounts) -> None:
        """Hold the amounts in rows that are locked already."""
        cursor.execute(
            f"UPDATE {self.windows} SET held_nanousd = held_nanousd + %s, calls = calls + %s "
            f"WHERE {self.key} IN ({_places(len(keys))})",
            [amounts.nanousd, amounts.calls, *map(_primary_key, keys)],
        )

    def give(
        self, cursor: Any, keys: Sequence[BalanceKey], *, spent: int, held: int, calls: int
    ) -> None:
        """Book what was spent, give back what was held, locking in the order of the keys."""
        rows = [_primary_key(key) for key in keys]
        change = (
            "spent_nanousd = spent_nanousd + %s, held_nanousd = held_nanousd - %s, "
            "calls = calls - %s"
        )
        places = _places(len(rows))
        if self.connection.vendor == "postgresql":
            statement = (
                f"UPDATE {self.windows} AS w SET {change} FROM (SELECT {self.key} "
                f"FROM {self.windows} WHERE {self.key} IN ({places}) ORDER BY {self.key} "
                f"FOR UPDATE) AS locked WHERE w.{self.key} = locked.{self.key}"
            )
        else:
            statement = f"UPDATE {self.windows} SET {change} WHERE {self.key} IN ({places})"
            if self.connection.vendor == "mysql":
                statement += f" ORDER BY {self.key}"
        cursor.execute(statement, [spent, held, calls, *rows])

    def journal(self, cursor: Any, attempt: Attempt, amounts: Amounts, shadowed: str) -> int:
        """Write the reservation's row and return its id."""
        decision = attempt.decision
        if shadowed:
            decision = f"{decision}; would refuse: {shadowed}".lstrip("; ")
        charge = attempt.charge
        row = CallLog(
            call_id=attempt.call_id,
            attempt=attempt.number,
            counted=amounts.calls,
            feature_id=charge.feature,
            category=attempt.category,
            user_id=charge.user_id,
            subject=charge.subject,
            kind=attempt.kind,
            status=Status.RESERVED,
            requested_model=attempt.requested_model,
            model=attempt.model,
            provider=attempt.provider,
            max_tokens=attempt.max_tokens,
            speed=attempt.speed,
            inference_geo=attempt.inference_geo,
            reserved_nanousd=amounts.nanousd,
            decision=decision[:200],
            rates=attempt.rates,
            reserved_at=attempt.reserved_at,
            day=attempt.day,
            deadline=attempt.deadline,
            tags=dict(charge.tags),
        )
        connection = self.connection
        values = [
            field.get_db_prep_save(getattr(row, field.attname), connection) for field in self.fields
        ]
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
        cursor.execute(self.update, [*given, row, status.value])
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
