"""A store that fails: tried again where that helps, refused in our own words where it does not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import (
    DatabaseError,
    DataError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    connection,
    connections,
    transaction,
)
from pytest_django import DjangoDbBlocker

from ai_budget import periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import connection as connecting
from ai_budget.ledger import journal as journals
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.models import CallLog, SpendWindow
from ai_budget.values import Reservation
from tests.ledger.given import (
    CHAT,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
    spent_held_calls,
    sums_of_calls,
    sums_of_windows,
)

LIMIT = limit(None)


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept between tries; nobody waits for it."""
    slept: list[float] = []
    monkeypatch.setattr(connecting, "time", SimpleNamespace(sleep=slept.append))
    return slept


class Failing:
    """Wraps every statement; the first ``times`` that ``contain`` something raise an error."""

    def __init__(self, error: Exception, *, times: int = 10**9, contain: str = "") -> None:
        self.error, self.times, self.contain = error, times, contain
        self.failed = 0

    def __call__(self, execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        if self.contain in sql and self.failed < self.times:
            self.failed += 1
            raise self.error
        return execute(sql, *rest)


def of_postgresql(name: str) -> OperationalError:
    import psycopg.errors

    error = OperationalError(name)
    error.__cause__ = getattr(psycopg.errors, name)(name)
    return error


PASSING: dict[str, dict[str, Callable[[], Exception]]] = {
    "sqlite": {
        "locked": lambda: OperationalError("database is locked"),
        "table-locked": lambda: OperationalError("database table is locked: ai_budget_calllog"),
    },
    "postgresql": {
        "deadlock": lambda: of_postgresql("DeadlockDetected"),
        "serialization": lambda: of_postgresql("SerializationFailure"),
        "lock-timeout": lambda: of_postgresql("LockNotAvailable"),
    },
    "mysql": {
        "deadlock": lambda: OperationalError(1213, "Deadlock found when trying to get lock"),
        "lock-timeout": lambda: OperationalError(1205, "Lock wait timeout exceeded"),
        "changed": lambda: OperationalError(1020, "Record has changed since last read"),
    },
}
passing = pytest.mark.parametrize(
    "error", [pytest.param(make(), id=name) for name, make in PASSING[connection.vendor].items()]
)
WINDOWS, CALLS = "ai_budget_spendwindow", "ai_budget_calllog"


# Tried again -------------------------------------------------------------------------------------


@pytest.mark.django_db
@passing
@pytest.mark.parametrize("at", [WINDOWS, CALLS])
def test_a_reservation_that_met_another_is_made_once(error: Exception, at: str) -> None:
    reserve(limits_of(CHAT), 10)  # so that the balances are there

    with connection.execute_wrapper(Failing(error, times=2, contain=at)):
        reserve(limits_of(CHAT), 10)

    assert spent_held_calls(LIMIT) == (0, 20, 2)
    assert sums_of_windows() == sums_of_calls()


@pytest.mark.django_db
@passing
@pytest.mark.parametrize("at", [WINDOWS, CALLS])
def test_a_settlement_that_met_another_is_made_once(error: Exception, at: str) -> None:
    reservation = reserve(limits_of(CHAT), 10)

    with connection.execute_wrapper(Failing(error, times=2, contain=at)):
        settle(reservation, settled(4))

    assert spent_held_calls(LIMIT) == (4, 0, 1)
    assert sums_of_windows() == sums_of_calls()


@pytest.mark.django_db
@passing
def test_a_refusal_that_met_another_is_counted_once(error: Exception) -> None:
    reserve([LIMIT], 10)

    with connection.execute_wrapper(Failing(error, times=2, contain="refused = refused + 1")):
        ledgers.current().count_refusal([LIMIT.key])

    assert SpendWindow.objects.get().refused == 1


@pytest.mark.django_db
@passing
def test_trying_ends(error: Exception, sleeps: list[float]) -> None:
    reserve([LIMIT], 10)
    failing = Failing(error, contain=WINDOWS)

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        reserve([LIMIT], 10)

    assert failing.failed == connecting.TRIES
    assert len(sleeps) == connecting.TRIES - 1
    assert max(sleeps) < 1
    assert spent_held_calls(LIMIT) == (0, 10, 1)


@pytest.mark.django_db
@passing
def test_trying_ends_when_it_has_taken_long(
    error: Exception, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where each try waits for a lock as long as it may."""
    reserve([LIMIT], 10)
    seconds = itertools.count(step=5.0)
    monkeypatch.setattr(periods, "monotonic", lambda: next(seconds))
    failing = Failing(error, contain=WINDOWS)

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        reserve([LIMIT], 10)

    assert failing.failed == 2
    assert spent_held_calls(LIMIT) == (0, 10, 1)


@pytest.mark.django_db
def test_what_will_not_pass_is_tried_once(sleeps: list[float]) -> None:
    failing = Failing(OperationalError("disk I/O error"), contain=WINDOWS)

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        reserve([LIMIT], 10)

    assert (failing.failed, sleeps) == (1, [])


@pytest.mark.django_db(transaction=True)
def test_what_will_not_pass_is_tried_once_outside_of_a_test_case_too() -> None:
    failing = Failing(OperationalError("disk I/O error"), contain=WINDOWS)

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        reserve([LIMIT], 10)

    assert failing.failed == 1


# In our own words --------------------------------------------------------------------------------

VERBS: dict[str, Callable[[], Any]] = {
    "reserve": lambda: reserve([LIMIT], 10),
    "balances": lambda: ledgers.current().balances([LIMIT.key]),
    "count_refusal": lambda: ledgers.current().count_refusal([LIMIT.key]),
}
verbs = pytest.mark.parametrize(
    "verb", [pytest.param(verb, id=name) for name, verb in VERBS.items()]
)


@pytest.mark.django_db
@verbs
@pytest.mark.parametrize(
    "error", [OperationalError, InterfaceError, ProgrammingError, DataError, DatabaseError]
)
def test_any_error_of_the_database_is_one_of_ours(
    verb: Callable[[], Any], error: type[Exception]
) -> None:
    failing = Failing(error("INSERT INTO secrets"), contain="ai_budget")

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable) as raised:
        verb()

    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert error.__name__ in str(raised.value)
    assert "secrets" not in str(raised.value)


@pytest.mark.django_db
def test_a_settlement_that_fails_takes_nothing_away() -> None:
    reservation = reserve(limits_of(CHAT), 10)
    failing = Failing(OperationalError("disk I/O error"), contain=WINDOWS)

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        settle(reservation, settled(4))

    assert row(reservation).status == "reserved"
    assert sums_of_windows() == sums_of_calls()
    settle(reservation, settled(4))
    assert spent_held_calls(LIMIT) == (4, 0, 1)


@pytest.mark.django_db
def test_a_reservation_that_fails_takes_nothing() -> None:
    reserve(limits_of(CHAT), 10)
    failing = Failing(OperationalError("disk I/O error"), contain=f"INSERT INTO {_quoted(CALLS)}")

    with connection.execute_wrapper(failing), pytest.raises(LedgerUnavailable):
        reserve(limits_of(CHAT), 10)

    assert failing.failed == 1
    assert spent_held_calls(LIMIT) == (0, 10, 1)


def _quoted(table: str) -> str:
    return connection.ops.quote_name(table)


@pytest.mark.django_db
def test_what_the_columns_do_not_hold_is_refused() -> None:
    """SQLite takes any length; where the row is refused, nothing may be taken."""
    try:
        reserve([LIMIT], 10, model="m" * 300)
    except LedgerUnavailable:
        assert connection.vendor != "sqlite"
        assert spent_held_calls(LIMIT) == (0, 0, 0)


# A store that is not there -----------------------------------------------------------------------


@pytest.fixture
def unreachable(
    django_db_setup: None, django_db_blocker: DjangoDbBlocker, settings: Any
) -> Iterator[None]:
    """The ledger writes through an alias behind which nobody answers."""
    gone = {**connections.settings["default"], "PORT": "1", "NAME": "/nowhere/at/all"}
    connections.settings["gone"] = gone
    settings.AI_BUDGET = {"LEDGER_DATABASE": "gone"}
    with django_db_blocker.unblock():
        yield
    del connections["gone"]
    del connections.settings["gone"]


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(
    "verb",
    [
        *(pytest.param(verb, id=name) for name, verb in VERBS.items()),
        pytest.param(lambda: ledgers.current().ensure_durable(), id="ensure_durable"),
        pytest.param(lambda: ledgers.current().settle_overdue(), id="settle_overdue"),
    ],
)
def test_a_store_that_cannot_be_reached_is_unavailable(verb: Callable[[], Any]) -> None:
    with pytest.raises(LedgerUnavailable, match="'gone'") as raised:
        verb()

    assert raised.value.__cause__ is None


@pytest.mark.usefixtures("unreachable")
def test_a_settlement_in_a_store_that_cannot_be_reached_is_unavailable(settings: Any) -> None:
    reservation: Any = SimpleNamespace(id=1, balances=(LIMIT.key,), amounts=None)

    with pytest.raises(LedgerUnavailable):
        settle(reservation, settled(1))


# A connection that was lost ----------------------------------------------------------------------


def drop_by_server() -> None:
    """End this thread's connection as a restart of the server would: it finds out when it asks."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_backend_pid()"
            if connection.vendor == "postgresql"
            else "SELECT CONNECTION_ID()"
        )
        (number,) = cursor.fetchone()

    def drop() -> None:
        try:
            with connection.cursor() as cursor:
                if connection.vendor == "postgresql":
                    cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [number])
                else:
                    cursor.execute(f"KILL {number}")
        finally:
            connections.close_all()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()


needs_a_server = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="SQLite has no server to lose"
)


@needs_a_server
@pytest.mark.django_db(transaction=True)
@verbs
def test_a_connection_that_was_lost_while_idle_is_made_again(verb: Callable[[], Any]) -> None:
    reserve([LIMIT], 10)
    drop_by_server()

    verb()

    assert CallLog.objects.count() in {1, 2}


@needs_a_server
@pytest.mark.django_db(transaction=True)
def test_a_settlement_over_a_lost_connection_is_made() -> None:
    reservation = reserve([LIMIT], 10)
    drop_by_server()

    settle(reservation, settled(4))

    assert spent_held_calls(LIMIT) == (4, 0, 1)


@needs_a_server
@pytest.mark.django_db(transaction=True)
def test_the_clock_is_read_over_a_new_connection() -> None:
    ledger = DatabaseLedger()
    reserve([LIMIT], 10)
    drop_by_server()

    ledger.now()


@contextmanager
def answer_of_commit_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next commit is made, and the connection ends before anybody hears of it."""
    driver = type(connections["default"])
    commit = driver._commit  # type: ignore[attr-defined]

    def committed_and_lost(connection: Any) -> None:
        monkeypatch.setattr(driver, "_commit", commit)
        commit(connection)
        connection.close()
        raise OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(driver, "_commit", committed_and_lost)
    yield


@pytest.mark.django_db(transaction=True)
def test_a_reservation_whose_commit_was_made_unheard_is_not_made_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reserve(limits_of(CHAT), 10)

    with answer_of_commit_lost(monkeypatch):
        reservation = reserve(limits_of(CHAT), 10)

    assert spent_held_calls(LIMIT) == (0, 20, 2)
    assert sums_of_windows() == sums_of_calls()
    settle(reservation, settled(4))
    assert spent_held_calls(LIMIT) == (4, 10, 2)


@pytest.mark.django_db(transaction=True)
def test_a_settlement_whose_commit_was_made_unheard_is_not_made_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reservation = reserve(limits_of(CHAT), 10)

    with answer_of_commit_lost(monkeypatch):
        settle(reservation, settled(4))

    assert spent_held_calls(LIMIT) == (4, 0, 1)
    assert sums_of_windows() == sums_of_calls()


# A lock that another holds -----------------------------------------------------------------------


@contextmanager
def held_by_another(until: threading.Event) -> Iterator[None]:
    """Another connection keeps the balance locked until it is told otherwise."""
    holding = threading.Event()

    def hold() -> None:
        try:
            with transaction.atomic():
                SpendWindow.objects.update(refused=0)
                holding.set()
                until.wait(30)
        finally:
            connections.close_all()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert holding.wait(10)
        yield
    finally:
        until.set()
        thread.join()


@pytest.fixture
def impatient(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements wait for locks only a moment."""
    reserve(limits_of(CHAT), 10)
    # Zero is "for ever" to PostgreSQL, and MariaDB takes whole seconds only.
    shortest = "0.01" if connection.vendor == "postgresql" else 0
    monkeypatch.setattr(connecting, "LOCK_TIMEOUT_SECONDS", shortest)
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout = 1")


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_given_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        free.set()

    with held_by_another(free):
        monkeypatch.setattr(connecting, "time", SimpleNamespace(sleep=sleep))
        # The thread that holds it needs a moment to let go: more tries, no more time.
        monkeypatch.setattr(connecting, "TRIES", 10_000)
        reserve([LIMIT], 10)

    assert slept
    assert spent_held_calls(LIMIT) == (0, 20, 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(lambda: reserve([LIMIT], 10), id="reserve"),
        pytest.param(lambda: settle(_reserved(), settled(4)), id="settle"),
        pytest.param(lambda: ledgers.current().count_refusal([LIMIT.key]), id="count_refusal"),
    ],
)
def test_a_lock_that_is_kept_is_not_waited_for_for_ever(
    verb: Callable[[], Any], sleeps: list[float]
) -> None:
    with held_by_another(threading.Event()), pytest.raises(LedgerUnavailable):
        verb()

    assert len(sleeps) == connecting.TRIES - 1
    assert spent_held_calls(LIMIT) == (0, 10, 1)


def _reserved() -> Reservation:
    """What was reserved before the lock was taken, as its row tells it."""
    return journals.reservation_of(CallLog.objects.get())
