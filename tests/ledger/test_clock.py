"""The store tells the time where it has a clock: a worker's may be wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from pytest_django import DjangoAssertNumQueries

from ai_budget import periods
from ai_budget.ledger.clock import CLOCK_SECONDS, StoreClock
from ai_budget.ledger.database import DatabaseLedger

pytestmark = pytest.mark.django_db

STORE_HAS_A_CLOCK = connection.vendor != "sqlite"
HOUR = timedelta(hours=1)
needs_a_clock = pytest.mark.skipif(not STORE_HAS_A_CLOCK, reason="SQLite has no clock")


class Worker:
    """A worker's two clocks: the one that can be set, and the one that only goes forward."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)
        self.running = 1_000.0

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return self.running

    def pass_by(self, seconds: float) -> None:
        """Both clocks go on, as they do while a worker runs."""
        self.running += seconds
        self.ahead += timedelta(seconds=seconds)

    def sleep(self, time: timedelta) -> None:
        """A suspended machine wakes up with the right time and a clock that stood still."""
        self.ahead += time


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    worker = Worker()
    # The system's clock itself, so that it is none that a test has set.
    monkeypatch.setattr(periods, "_system_clock", worker.now)
    monkeypatch.setattr(periods, "_clock", periods._system_clock)
    monkeypatch.setattr(periods, "monotonic", worker.monotonic)
    assert not periods.is_overridden()
    return worker


@pytest.fixture
def ledger() -> DatabaseLedger:
    return DatabaseLedger()


def about(at: datetime) -> Callable[[datetime], bool]:
    return lambda other: abs(at - other) < timedelta(seconds=30)


def test_the_time_is_in_utc(ledger: DatabaseLedger) -> None:
    assert ledger.now().tzinfo is UTC


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_the_stores_clock_wins_over_the_workers(
    worker: Worker, ledger: DatabaseLedger, ahead: timedelta
) -> None:
    worker.ahead = ahead

    expected = datetime.now(UTC) + (timedelta(0) if STORE_HAS_A_CLOCK else ahead)
    assert about(expected)(ledger.now())


def test_a_clock_that_a_test_has_set_wins_over_the_stores(ledger: DatabaseLedger) -> None:
    then = datetime(2026, 5, 4, 12, tzinfo=UTC)

    with periods.override_clock(lambda: then):
        assert ledger.now() == then


def test_a_clock_that_a_test_has_set_is_not_remembered(ledger: DatabaseLedger) -> None:
    with periods.override_clock(lambda: datetime(2020, 1, 1, tzinfo=UTC)):
        ledger.now()

    assert about(datetime.now(UTC))(ledger.now())


@needs_a_clock
def test_the_store_is_not_asked_every_time(
    worker: Worker, ledger: DatabaseLedger, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    first = ledger.now()
    worker.pass_by(CLOCK_SECONDS)

    with django_assert_num_queries(0):
        assert ledger.now() == first + timedelta(seconds=CLOCK_SECONDS)


@needs_a_clock
def test_the_store_is_asked_now_and_then(
    worker: Worker, ledger: DatabaseLedger, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    ledger.now()
    worker.pass_by(CLOCK_SECONDS + 0.001)

    with django_assert_num_queries(1):
        ledger.now()


@needs_a_clock
@pytest.mark.parametrize("jump", [HOUR, -HOUR, timedelta(seconds=2)])
def test_after_a_sleep_the_store_is_asked_again(
    worker: Worker,
    ledger: DatabaseLedger,
    django_assert_num_queries: DjangoAssertNumQueries,
    jump: timedelta,
) -> None:
    ledger.now()
    worker.sleep(jump)

    with django_assert_num_queries(1):
        assert about(datetime.now(UTC))(ledger.now())
    with django_assert_num_queries(0):
        ledger.now()


@needs_a_clock
def test_a_worker_whose_clock_is_only_wrong_does_not_ask_all_the_time(
    worker: Worker, ledger: DatabaseLedger, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    worker.ahead = HOUR
    ledger.now()

    with django_assert_num_queries(0):
        ledger.now()


def test_the_time_goes_forward(worker: Worker, ledger: DatabaseLedger) -> None:
    first = ledger.now()
    worker.pass_by(0.5)

    assert ledger.now() > first


def test_a_reading_is_never_carried_on_from_the_moment_of_another(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread reads the store while this one reckons: no half of each."""
    then = datetime(2026, 5, 4, 12, tzinfo=UTC)
    clock = StoreClock(lambda: then)
    clock.now()
    worker.pass_by(CLOCK_SECONDS - 1)

    def overtaken() -> float:
        clock._reading = (worker.running, then + timedelta(hours=5), worker.now())
        return worker.running

    monkeypatch.setattr(periods, "monotonic", overtaken)

    assert clock.now() == then + timedelta(seconds=CLOCK_SECONDS - 1)
