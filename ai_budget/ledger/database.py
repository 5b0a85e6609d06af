"""The ledger in the site's own database: short durable transactions and locked rows.

Rows are locked in one order: windows by key, then buckets by key. The statements are written
out, because they run twice in every call and the ORM would take longer to phrase them than the
database to run them.
"""

from __future__ import annotations

import functools
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from ai_budget import periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import (
    Ledger,
    breaches,
    bucket_breach,
    drained,
    enforced,
    given_back,
    milliseconds,
)
from ai_budget.ledger.clock import StoreClock
from ai_budget.ledger.connection import (
    TRIES,
    ensure_durable,
    for_update,
    guest_transaction,
    one_moment,
    patience,
    patient_transaction,
    places,
    read_clock,
    retry,
    short_transaction,
)
from ai_budget.ledger.journal import Standing, journal
from ai_budget.ledger.kept import whole_since
from ai_budget.ledger.parts import Chunk, book_parts
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import CallLog, RateBucket, SpendWindow
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Bucket,
    Difference,
    Limit,
    Part,
    Reservation,
    Settlement,
    Status,
)

_LONGEST_REFILL = timedelta(days=2)
"""After which a bucket that nobody used counts as full; ``limited`` takes days at most."""


_MOST_USED = 2**63 - 1
"""What the column holds: no amount may be so large that a call could not be booked."""


class _RowsMissing(Exception):
    """Some of these balances or buckets have no row yet."""

    def __init__(
        self, *, windows: Sequence[BalanceKey] = (), buckets: Sequence[Bucket] = ()
    ) -> None:
        super().__init__()
        self.windows = windows
        self.buckets = buckets


class DatabaseLedger(Ledger):
    """Balances as rows of SpendWindow, the journal as rows of CallLog, one transaction for both."""

    def __init__(self) -> None:
        self._clocks: dict[str, StoreClock] = {}

    def now(self) -> datetime:
        if periods.is_overridden():
            return periods.now()
        alias = self.alias
        clock = self._clocks.get(alias)
        if clock is None:
            clock = self._clocks[alias] = StoreClock(lambda: read_clock(connections[alias]))
        return retry(connections[alias], clock.now)

    def reserve(
        self, limits: Sequence[Limit | Bucket], amounts: Amounts, attempt: Attempt
    ) -> Reservation:
        connection = connections[self.alias]
        ensure_durable(connection)
        buckets = tuple(limit for limit in limits if isinstance(limit, Bucket))
        windows = {limit.key for limit in limits if isinstance(limit, Limit)}
        # Fixed order, so that no two attempts wait for each other's rows.
        keys = tuple(sorted(windows, key=_primary_key))
        step = functools.partial(self._reserve, connection, keys, buckets, limits, amounts, attempt)
        row = journals.write_once(connection, attempt, lambda: _creating_rows(connection, step))
        return Reservation(id=row, attempt=attempt, amounts=amounts, balances=keys, buckets=buckets)

    def _reserve(
        self,
        connection: BaseDatabaseWrapper,
        keys: Sequence[BalanceKey],
        buckets: Sequence[Bucket],
        limits: Sequence[Limit | Bucket],
        amounts: Amounts,
        attempt: Attempt,
    ) -> int:
        statements, rows = _statements(connection), journal(connection)
        row = rows.prepare(attempt, amounts)
        with short_transaction(connection) as cursor:
            balances = statements.take(cursor, keys, amounts)
            found = breaches(limits, amounts, defaultdict(Balances, balances))
            used = statements.lock_buckets(cursor, buckets, attempt.reserved_at)
            for bucket, level in used.items():
                breach = bucket_breach(bucket, bucket.takes(amounts), level)
                found += [] if breach is None else [breach]
            # A breach undoes what was taken, with the transaction.
            refused = enforced(found, attempt.reserved_at)
            if len(balances) < len(keys):
                # Made for who is let in alone: whatever a stranger names leaves no balance behind.
                raise _RowsMissing(windows=keys)
            statements.fill_buckets(cursor, used, amounts, attempt.reserved_at)
            note = f"would refuse: {refused}" if refused else ""
            return rows.write(cursor, row, note)

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        connection = connections[self.alias]
        ensure_durable(connection)
        keys = tuple(sorted(reservation.balances, key=_primary_key))
        step = functools.partial(self._settle, connection, keys, reservation, settlement)
        retry(connection, lambda: _creating_rows(connection, step))

    def _settle(
        self,
        connection: BaseDatabaseWrapper,
        keys: Sequence[BalanceKey],
        reservation: Reservation,
        settlement: Settlement,
    ) -> None:
        statements, rows = _statements(connection), journal(connection)
        now = self.now()
        with short_transaction(connection) as cursor:
            if not rows.close(cursor, reservation, settlement, now):
                found = rows.lock(cursor, reservation.id)
                if found is None or found.status is not Status.RESERVED:
                    self._correct(cursor, keys, reservation.id, settlement, now, found)
                    return
                # Parts of it were settled meanwhile.
                reservation, settlement = journals.of_the_rest(
                    reservation, settlement, found.amounts
                )
                rows.close(cursor, reservation, settlement, now)
            held = reservation.amounts
            calls = 0 if settlement.keep_call else held.calls
            spent = settlement.cost_nanousd
            statements.give(cursor, keys, spent=spent, held=held.nanousd, calls=calls)
            statements.give_back(cursor, reservation, settlement, now)

    def _correct(
        self,
        cursor: Any,
        keys: Sequence[BalanceKey],
        row: int,
        settlement: Settlement,
        now: datetime,
        found: Standing | None,
    ) -> None:
        """Write the truth over what somebody else booked first: the tick, at the bound."""
        if found is None or found.status is not Status.ESTIMATED:
            return
        if settlement.status is Status.ESTIMATED:
            return
        connection = connections[self.alias]
        journal(connection).correct(cursor, row, settlement, now)
        spent = settlement.cost_nanousd - found.cost_nanousd
        calls = 0 if settlement.keep_call else found.amounts.calls
        _statements(connection).give(cursor, keys, spent=spent, held=0, calls=calls)

    def settle_parts(
        self, reservation: int, claim: Callable[[CallLog], Sequence[Part]]
    ) -> Sequence[Part]:
        connection = connections[self.alias]
        ensure_durable(connection)
        row = journals.find(connection, reservation)
        if row is None:
            return ()
        keys = sorted(journals.keys_of(row), key=_primary_key)
        step = functools.partial(self._settle_parts, connection, keys, reservation, claim)
        chunk: Chunk | None = retry(connection, lambda: _creating_rows(connection, step))
        return () if chunk is None else chunk.told()

    def _settle_parts(
        self,
        connection: BaseDatabaseWrapper,
        keys: Sequence[BalanceKey],
        reservation: int,
        claim: Callable[[CallLog], Sequence[Part]],
    ) -> Chunk | None:
        now = self.now()
        with guest_transaction(connection) as cursor:
            chunk = book_parts(connection, cursor, reservation, claim, now)
            if chunk is not None and chunk.parts:
                _statements(connection).give(
                    cursor, keys, spent=chunk.spent, held=chunk.given_back, calls=chunk.released
                )
            return chunk

    def take(self, buckets: Sequence[Bucket], *, at: datetime) -> None:
        connection = connections[self.alias]
        step = functools.partial(self._take, connection, buckets, at)
        retry(connection, lambda: _creating_rows(connection, step))

    def _take(
        self, connection: BaseDatabaseWrapper, buckets: Sequence[Bucket], at: datetime
    ) -> None:
        statements = _statements(connection)
        one = Amounts(nanousd=0)
        # It may be in the caller's transaction: what that undoes was a request that failed.
        with short_transaction(connection, durable=False) as cursor:
            used = statements.lock_buckets(cursor, buckets, at)
            checked = (bucket_breach(bucket, 1, level) for bucket, level in used.items())
            enforced([breach for breach in checked if breach is not None], at)
            statements.fill_buckets(cursor, used, one, at)

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
            step = functools.partial(self._count_refusal, connection, refused)
            retry(connection, lambda: _creating_rows(connection, step))

    def _count_refusal(self, connection: BaseDatabaseWrapper, keys: Sequence[BalanceKey]) -> None:
        with short_transaction(connection) as cursor:
            _statements(connection).count_refusal(cursor, keys)

    def differences(self, since: date) -> list[Difference]:
        connection = connections[self.alias]
        ensure_durable(connection)
        return retry(connection, lambda: _differences(connection, since))

    def rebuild(self, since: date, aside: SetAside | None = None) -> list[Difference]:
        connection, aside = connections[self.alias], aside or SetAside()
        mended = []
        for seeming in self.differences(since):
            with aside.on_failure("the balance of", seeming.key.scope):
                mended.append(retry(connection, functools.partial(self._mend, connection, seeming)))
        return [difference for difference in mended if difference is not None]

    def _mend(self, connection: BaseDatabaseWrapper, seeming: Difference) -> Difference | None:
        """Write what the journal says, unless somebody has mended the balance meanwhile."""
        try:
            return self._recount(connection, seeming.key)
        except _RowsMissing:
            create_windows(connection, [seeming.key])
            return seeming

    def _recount(self, connection: BaseDatabaseWrapper, key: BalanceKey) -> Difference | None:
        """Make one balance the sum of the journal, with its row locked.

        Nobody can book in it meanwhile, so what the journal adds up to afterwards is in force.
        """
        statements = _statements(connection)
        with short_transaction(connection) as cursor:
            locked = statements.lock(cursor, key)
            if locked is None:
                raise _RowsMissing(windows=[key])
            kept = replace(locked, refused=0)
            summed = journals.balances_of(connection, [key])[key]
            if kept == summed or _is_purged(connection, key):
                return None
            statements.write(cursor, key, summed)
            return Difference(key=key, kept=kept, journal=summed)

    def close(self) -> None:
        """Do nothing: the connections are Django's."""

    def tidy(self, aside: SetAside | None = None) -> None:
        full = milliseconds(self.now() - _LONGEST_REFILL)
        connection = connections[self.alias]
        retry(connection, lambda: self._tidy(connection, full))

    def _tidy(self, connection: BaseDatabaseWrapper, full: int) -> None:
        with short_transaction(connection):
            RateBucket.objects.using(connection.alias).filter(at_ms__lt=full).delete()


def _differences(connection: BaseDatabaseWrapper, since: date) -> list[Difference]:
    """Compare balances and journal as both were at one moment: no call is half booked then."""
    with one_moment(connection):
        since = max(since, whole_since(connection.alias) or since)
        # Of the month that the day is in, too: so all its days have to be added up.
        first = since.replace(day=1)
        summed = journals.add_up(journals.entries(connection, since=first))
        kept = _statements(connection).since(connection, first)
    nothing = Balances()
    return [
        Difference(key=key, kept=kept.get(key, nothing), journal=summed.get(key, nothing))
        for key in sorted({*summed, *kept})
        if (key.period is periods.Period.MONTH or key.first_day >= since)
        and kept.get(key, nothing) != summed.get(key, nothing)
    ]


def _is_purged(connection: BaseDatabaseWrapper, key: BalanceKey) -> bool:
    """Say whether calls of a balance may have been deleted before the journal was added up."""
    whole = whole_since(connection.alias)
    return whole is not None and key.first_day < whole


def _creating_rows(connection: BaseDatabaseWrapper, step: Callable[[], Any]) -> Any:
    """Run a step; where it finds that rows are missing, create them and run it again."""
    for _ in range(TRIES):
        try:
            return step()
        except _RowsMissing as missing:
            create_windows(connection, missing.windows)
            create_buckets(connection, missing.buckets)
    raise LedgerUnavailable("Rows of balances vanish faster than they can be created.") from None


def create_windows(connection: BaseDatabaseWrapper, keys: Iterable[BalanceKey]) -> None:
    """Create the rows of balances that have none, with what the journal says is in them.

    Where somebody else is faster theirs are as good. They are written before the journal is
    added up: until they are committed nobody else can create them or book in them, so that no
    call is missed; and the others wait instead of adding up, too.
    """
    by_row = {_primary_key(key): key for key in keys}
    rows = SpendWindow.objects.using(connection.alias).filter(pk__in=by_row)
    missing = sorted(by_row.keys() - set(rows.values_list("pk", flat=True)))
    if not missing:
        return
    statements = _statements(connection)
    with short_transaction(connection) as cursor:
        ours = [by_row[row] for row in missing if statements.insert(cursor, by_row[row])]
        for key, balance in journals.balances_of(connection, ours).items():
            if balance != Balances():
                statements.write(cursor, key, balance)


def create_buckets(connection: BaseDatabaseWrapper, buckets: Iterable[Bucket]) -> None:
    """Create the rows of buckets that have none: full ones."""
    keys = sorted(map(_bucket_key, buckets))
    if keys:
        rows = [RateBucket(key=key) for key in keys]
        with patient_transaction(connection):
            RateBucket.objects.using(connection.alias).bulk_create(rows, ignore_conflicts=True)


@functools.lru_cache(maxsize=4_096)
def _primary_key(key: BalanceKey) -> str:
    return SpendWindow.key_for(key.scope, key.period, key.first_day)


@functools.lru_cache(maxsize=4_096)
def _bucket_key(bucket: Bucket) -> str:
    return RateBucket.key_for(bucket.scope, bucket.measure, bucket.seconds)


# Statements


class _Statements:
    """The ledger's few statements on balances, in the words of one kind of database."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        quote = connection.ops.quote_name
        self.connection = connection
        self.windows = quote(SpendWindow._meta.db_table)
        self.buckets = quote(RateBucket._meta.db_table)
        self.key = quote("key")
        # A small table may be read whole otherwise, and every row on the way is locked, too.
        self.by_key = " FORCE INDEX (PRIMARY)" if connection.vendor == "mysql" else ""
        self.columns = "spent_nanousd, held_nanousd, calls, refused"
        self.returned = f"{self.key}, {self.columns}"
        self.updates_return = connection.vendor == "postgresql" or (
            connection.vendor == "sqlite" and sqlite3.sqlite_version_info >= (3, 35)
        )

    def take(
        self, cursor: Any, keys: Sequence[BalanceKey], amounts: Amounts
    ) -> dict[BalanceKey, Balances]:
        """Hold the amounts in all rows, locked in the order of their keys.

        Return what the rows held before; rows that do not exist are left out.
        """
        if not keys:
            return {}
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

    def since(self, connection: BaseDatabaseWrapper, first: date) -> dict[BalanceKey, Balances]:
        """Return what all rows from that day on hold, but for what they refused."""
        rows = SpendWindow.objects.using(connection.alias).filter(first_day__gte=first)
        return {
            BalanceKey(row.scope, periods.Period(row.period), row.first_day): Balances(
                spent_nanousd=row.spent_nanousd, held_nanousd=row.held_nanousd, calls=row.calls
            )
            for row in rows.iterator()
        }

    def lock(self, cursor: Any, key: BalanceKey) -> Balances | None:
        """Lock one row and return what it holds; None where there is none."""
        if self.connection.vendor == "sqlite":
            # A transaction that reads first may not write any more.
            cursor.execute(self._update("calls = calls", 1), [_primary_key(key)])
        cursor.execute(self._select(1, lock=True), [_primary_key(key)])
        return self._balances(cursor, [key]).get(key)

    def insert(self, cursor: Any, key: BalanceKey) -> bool:
        """Create an empty row; say whether there was none."""
        mysql = self.connection.vendor == "mysql"
        verb, otherwise = ("INSERT IGNORE", "") if mysql else ("INSERT", "ON CONFLICT DO NOTHING")
        cursor.execute(
            f"{patience(self.connection)}{verb} INTO {self.windows} ({self.key}, scope, period, "
            f"first_day, {self.columns}) VALUES (%s, %s, %s, %s, 0, 0, 0, 0) {otherwise}",
            [_primary_key(key), key.scope, key.period.value, key.first_day.isoformat()],
        )
        return bool(cursor.rowcount)

    def write(self, cursor: Any, key: BalanceKey, balances: Balances) -> None:
        """Put what the journal says into a row."""
        change = "spent_nanousd = %s, held_nanousd = %s, calls = %s"
        given = [balances.spent_nanousd, balances.held_nanousd, balances.calls]
        cursor.execute(self._update(change, 1), [*given, _primary_key(key)])

    def _select(self, count: int, *, lock: bool) -> str:
        return (
            f"SELECT {self.key}, {self.columns} FROM {self.windows}{self.by_key} "
            f"WHERE {self.key} IN ({places(count)}) ORDER BY {self.key}"
            f"{for_update(self.connection) if lock else ''}"
        )

    def _update(self, change: str, count: int) -> str:
        """Phrase an update of several rows that locks them in the order of their keys."""
        among = f"{self.key} IN ({places(count)})"
        if self.connection.vendor == "postgresql":
            return (
                f"UPDATE {self.windows} AS w SET {change} FROM (SELECT {self.key} AS locked_key "
                f"FROM {self.windows} WHERE {among} ORDER BY {self.key} FOR UPDATE) AS locked "
                f"WHERE w.{self.key} = locked.locked_key"
            )
        ordered = f" ORDER BY {self.key}" if self.connection.vendor == "mysql" else ""
        return (
            f"{patience(self.connection)}UPDATE {self.windows}{self.by_key} SET {change} "
            f"WHERE {among}{ordered}"
        )

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
        self._change_all(cursor, change, [spent, held, calls], keys)

    def count_refusal(self, cursor: Any, keys: Sequence[BalanceKey]) -> None:
        """Count one refusal in each row."""
        self._change_all(cursor, "refused = refused + 1", [], keys)

    def _change_all(
        self, cursor: Any, change: str, given: Sequence[int], keys: Sequence[BalanceKey]
    ) -> None:
        """Change every one of the rows, or raise ``_RowsMissing``."""
        if not keys:
            return
        cursor.execute(self._update(change, len(keys)), [*given, *map(_primary_key, keys)])
        if cursor.rowcount < len(keys):
            raise _RowsMissing(windows=keys)

    # Buckets

    def lock_buckets(
        self, cursor: Any, buckets: Sequence[Bucket], at: datetime
    ) -> dict[Bucket, int]:
        """Lock the buckets in the order of their keys; return what is used of each now."""
        if not buckets:
            return {}
        keys = sorted({_bucket_key(bucket) for bucket in buckets})
        among = f"WHERE {self.key} IN ({places(len(keys))})"
        if self.connection.vendor == "sqlite":
            # A transaction that reads first may not write any more.
            cursor.execute(f"UPDATE {self.buckets} SET used = used {among}", keys)
        cursor.execute(
            f"SELECT {self.key}, used, at_ms FROM {self.buckets}{self.by_key} {among} "
            f"ORDER BY {self.key}{for_update(self.connection)}",
            keys,
        )
        rows = {key: (used, at_ms) for key, used, at_ms in cursor.fetchall()}
        if len(rows) < len(keys):
            raise _RowsMissing(buckets=buckets)
        now = milliseconds(at)
        return {bucket: drained(bucket, *rows[_bucket_key(bucket)], now) for bucket in buckets}

    def fill_buckets(
        self, cursor: Any, used: Mapping[Bucket, int], amounts: Amounts, at: datetime
    ) -> None:
        """Take an attempt's part from locked buckets; in shadow mode until they are empty."""
        for bucket, level in used.items():
            wanted = level + bucket.takes(amounts) * bucket.milliseconds
            full = bucket.amount * bucket.milliseconds
            self._write_bucket(cursor, bucket, min(wanted, max(level, full)), at)

    def give_back(
        self, cursor: Any, reservation: Reservation, settlement: Settlement, at: datetime
    ) -> None:
        """Return to the buckets what an attempt did not use, and learn what is left of them."""
        changes = {
            bucket: change
            for bucket in reservation.buckets
            if (change := given_back(bucket, reservation.amounts, settlement)) is not None
        }
        for bucket, level in self.lock_buckets(cursor, list(changes), at).items():
            back, least = changes[bucket]
            self._write_bucket(cursor, bucket, max(level - back, least, 0), at)

    def _write_bucket(self, cursor: Any, bucket: Bucket, used: int, at: datetime) -> None:
        # Clocks of attempts may arrive out of order; the bucket's goes forward only.
        later = "CASE WHEN at_ms > %s THEN at_ms ELSE %s END"
        now = milliseconds(at)
        cursor.execute(
            f"{patience(self.connection)}UPDATE {self.buckets} SET used = %s, at_ms = {later} "
            f"WHERE {self.key} = %s",
            [min(used, _MOST_USED), now, now, _bucket_key(bucket)],
        )


def _statements(connection: BaseDatabaseWrapper) -> _Statements:
    """Return the statements for a connection, phrased once."""
    kept: _Statements | None = getattr(connection, "_ai_budget_statements", None)
    if kept is None:
        kept = _Statements(connection)
        connection._ai_budget_statements = kept  # type: ignore[attr-defined]
    return kept
