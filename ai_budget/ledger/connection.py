"""How a ledger uses a database: short durable transactions, tried again when others are in the
way, and the database's own clock."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable

LOCK_TIMEOUT_SECONDS = 5
"""How long one statement waits for another's lock before the step is tried again."""

TRIES = 6
"""How often a step is tried against deadlocks and lock timeouts."""

PATIENCE_SECONDS = 8.0
"""After which a step is not tried again, however often it was."""

_RETRIED = {
    "40001",  # PostgreSQL: serialization failure
    "40P01",  # PostgreSQL: deadlock
    "55P03",  # PostgreSQL: lock timeout
    1020,  # MariaDB: the record has changed since it was read
    1205,  # MySQL and MariaDB: lock timeout
    1213,  # MySQL and MariaDB: deadlock
}

Result = TypeVar("Result")


_stand_ins: set[str] = set()


@contextmanager
def stand_in(alias: str) -> Iterator[None]:
    """Let an alias stand in for the ledger's own, in tests, which see one connection alone.

    The transactions of a site that has a second alias are no reason to refuse: in production
    the ledger writes beside them. What they undo in a test is undone with the test.
    """
    _stand_ins.add(alias)
    try:
        yield
    finally:
        _stand_ins.discard(alias)


def ensure_durable(connection: BaseDatabaseWrapper) -> None:
    """Raise ``CallInsideTransaction`` where the caller could undo what is written here."""
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
    if connection.alias in _stand_ins:
        return
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


@contextmanager
def short_transaction(connection: BaseDatabaseWrapper, *, durable: bool = True) -> Iterator[Any]:
    """Open a transaction whose statements do not wait long for locks, and yield its cursor.

    One that is not ``durable`` may be part of the caller's transaction.
    """
    nested = connection.in_atomic_block
    durable = durable and connection.alias not in _stand_ins
    with (
        transaction.atomic(using=connection.alias, durable=durable),
        connection.cursor() as cursor,
    ):
        if not nested:
            _use_locks_alone(connection, cursor)
        if connection.vendor != "postgresql":
            yield cursor
            return
        of_caller = None if durable or not nested else _lock_timeout(cursor)
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
        yield cursor
        if of_caller is not None:
            # It would last to the end of the caller's transaction otherwise.
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [of_caller])


@contextmanager
def one_statement(connection: BaseDatabaseWrapper) -> Iterator[Any]:
    """Yield a cursor for a statement that is a transaction by itself.

    It does not wait long for locks. PostgreSQL is told so inside a transaction alone; elsewhere
    the way there and back is spared.
    """
    if connection.vendor == "postgresql":
        with short_transaction(connection) as cursor:
            yield cursor
        return
    with connection.cursor() as cursor:
        yield cursor


@contextmanager
def patient_transaction(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Open a transaction in which statements of the ORM, too, do not wait long for locks.

    For what is rare: on MySQL and MariaDB it asks for the caller's own patience, and restores it.
    """
    if connection.vendor != "mysql":
        with short_transaction(connection, durable=False):
            yield
        return
    with _patient_session(connection), transaction.atomic(using=connection.alias):
        yield


@contextmanager
def guest_transaction(connection: BaseDatabaseWrapper) -> Iterator[Any]:
    """Open a durable transaction in which somebody else's statements run, too; yield its cursor.

    They may read without locking: what others change meanwhile is then no reason to fail.
    """
    level: Any = getattr(connection, "isolation_level", None)
    nested = connection.in_atomic_block
    with _patient_session(connection), short_transaction(connection) as cursor:
        if connection.vendor == "mysql" and level != "read committed" and not nested:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        yield cursor


@contextmanager
def _patient_session(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Let no statement wait long for locks on MySQL and MariaDB; then restore what was set."""
    if connection.vendor != "mysql":
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@SESSION.innodb_lock_wait_timeout")
        (of_caller,) = cursor.fetchone()
        cursor.execute("SET SESSION innodb_lock_wait_timeout = %s", [LOCK_TIMEOUT_SECONDS])
        try:
            yield
        finally:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = %s", [of_caller])


def _use_locks_alone(connection: BaseDatabaseWrapper, cursor: Any) -> None:
    """Leave a stricter level of isolation than the usual one.

    Rows are locked before anything is decided by them, so a stricter level adds nothing but
    transactions that fail and statements that wait for readers.
    """
    level: Any = getattr(connection, "isolation_level", None)
    if connection.vendor == "postgresql" and level.name != "READ_COMMITTED":
        cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
    elif connection.vendor == "mysql" and level == "serializable":
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


@contextmanager
def one_moment(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Open a transaction that reads everything as it was at one moment, and locks nothing."""
    nested = connection.in_atomic_block
    durable = connection.alias not in _stand_ins
    with transaction.atomic(using=connection.alias, durable=durable):
        # SQLite reads so by itself, and what a TestCase wraps has no other writers.
        if not nested and connection.vendor != "sqlite":
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        yield


def _lock_timeout(cursor: Any) -> str:
    cursor.execute("SHOW lock_timeout")
    return str(cursor.fetchone()[0])


class RowRefused(LedgerUnavailable):
    """The store answers, and does not take this: a mistake of somebody's, and no failure of its."""


def lets_pass(error: LedgerUnavailable) -> bool:
    """Say whether the settings let calls pass unchecked for this: a failure of the store alone."""
    return conf.ON_LEDGER_FAILURE == "allow" and not isinstance(error, RowRefused)


def retry(connection: BaseDatabaseWrapper, step: Callable[[], Result]) -> Result:
    """Run a step again after deadlocks and lock timeouts, a bounded number of times."""
    give_up = periods.monotonic() + PATIENCE_SECONDS
    for tries in range(1, TRIES + 1):
        used = connection.connection
        try:
            return step()
        except (OperationalError, InterfaceError) as error:
            over = tries == TRIES or periods.monotonic() > give_up
            if over or not _passes(connection, error, used):
                raise LedgerUnavailable(_unavailable(connection, error)) from None
            # Apart from each other, or the same calls would meet again.
            time.sleep(random.uniform(0, 0.01 * 2**tries))
        except (DataError, IntegrityError) as error:
            raise RowRefused(_unavailable(connection, error)) from None
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


_CLOCKS = {
    "postgresql": "SELECT clock_timestamp()",
    "mysql": "SELECT UTC_TIMESTAMP(6)",
}


def read_clock(connection: BaseDatabaseWrapper) -> datetime | None:
    """Return the database's time in UTC; None for one that has no clock of its own."""
    query = _CLOCKS.get(connection.vendor)
    if query is None:
        return None
    with connection.cursor() as cursor:
        cursor.execute(query)
        read: datetime = cursor.fetchone()[0]
    return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)


def patience(connection: BaseDatabaseWrapper) -> str:
    """Say how long MariaDB waits in an update; MySQL waits as long as its server is set to."""
    if not getattr(connection, "mysql_is_mariadb", False):
        return ""
    return f"SET STATEMENT innodb_lock_wait_timeout = {LOCK_TIMEOUT_SECONDS} FOR "


def for_update(connection: BaseDatabaseWrapper) -> str:
    """Say that a SELECT locks what it reads, where the database can."""
    if not connection.features.has_select_for_update:
        return ""
    if getattr(connection, "mysql_is_mariadb", False):
        return f" FOR UPDATE WAIT {LOCK_TIMEOUT_SECONDS}"
    return " FOR UPDATE"


@functools.lru_cache(maxsize=64)
def places(count: int) -> str:
    """Return so many placeholders, for a list in a statement."""
    return ", ".join(["%s"] * count)
