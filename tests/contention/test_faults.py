"""Stores that fail in the middle: at every point of one call, and while eight processes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from django.db import OperationalError, connection

from ai_budget.exceptions import RateLimited
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import connection as connecting
from ai_budget.testing import freeze
from ai_budget.values import Amounts, Bucket, Charge, Measure
from tests.contention.books import assert_all_over, tick
from tests.contention.calls import Outcome, Wish, make, reserve
from tests.contention.conftest import Store
from tests.contention.mixes import simple_limits
from tests.contention.points import At, From, watched
from tests.contention.processes import Workers
from tests.contention.traffic import assert_survived, run_through, traffic
from tests.depth import deep, some_of
from tests.ledger.given import NOON, settled

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

# One call, at each of its points -----------------------------------------------------------------

TOKENS, USED, FULL = 40, 30, 100


@pytest.fixture(autouse=True)
def at_noon() -> Iterator[None]:
    with freeze(NOON):
        yield


@pytest.fixture
def sleepless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between tries."""
    monkeypatch.setattr(connecting, "time", SimpleNamespace(sleep=lambda seconds: None))


def a_call(number: int) -> Wish:
    """A call of a feature of its own, with a bucket of tokens of its own."""
    charge = Charge(feature=f"feature-{number}", user_id=7)
    return Wish(
        charge=charge,
        category="",
        limits=(
            *simple_limits(charge, NOON, feature=25, site=1_000_000),
            Bucket(scope=f"feature:{charge.feature}", measure=Measure.TOKENS, amount=FULL),
        ),
        amounts=Amounts(nanousd=10, tokens=TOKENS),
        at=NOON,
        ending="settle",
        cost=4,
        tokens=USED,
    )


Breaking = Callable[[Callable[[str], None]], Any]


def at_every_point(
    breaking: Callable[[int], At],
) -> Iterator[tuple[str, Wish, Outcome]]:
    """Make a call that something happens to at its n-th point; for every n in the deep suite."""
    make(a_call(-1))
    for number in range(0, 200, deep(1, else_=3)):
        at, wish = breaking(number), a_call(number)
        with watched(at):
            outcome = make(wish)
        yield at.names[number] if at.reached else "", wish, outcome
        if not at.reached:
            return
    raise AssertionError("there is no end to it")


def end_connection() -> None:
    """End the database's connection at its other end, as a restart does."""
    raw: Any = connection.connection
    if connection.vendor == "sqlite":
        raise OperationalError("disk I/O error")
    with _elsewhere() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [raw.info.backend_pid])
        else:
            cursor.execute(f"KILL {raw.thread_id()}")


@contextmanager
def _elsewhere() -> Iterator[Any]:
    """Another connection to the same database."""
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            yield cursor
    finally:
        other.close()


def drop_redis() -> None:
    raise redis.ConnectionError("Connection closed by server.")


def time_out_redis() -> None:
    raise redis.TimeoutError("Timeout reading from socket")


def meet_another() -> None:
    """Another transaction is in the way."""
    raise {
        "sqlite": OperationalError("database is locked"),
        "mysql": OperationalError(1213, "Deadlock found when trying to get lock"),
        "postgresql": _deadlock(),
    }[connection.vendor]


def _deadlock() -> OperationalError:
    error = OperationalError("deadlock detected")
    error.__cause__ = Exception()
    error.__cause__.sqlstate = "40P01"  # type: ignore[attr-defined]
    return error


class AtStatement(At):
    """Does it where the database is spoken to, and not where Redis is, nor after the fact."""

    def __call__(self, name: str) -> None:
        if "redis" not in name and name.startswith("before"):
            super().__call__(name)


class AtCommand(At):
    """Does it where Redis is spoken to."""

    def __call__(self, name: str) -> None:
        if "redis" in name:
            super().__call__(name)


@pytest.mark.usefixtures("sleepless")
def test_a_deadlock_at_any_statement_is_tried_again(store: Store) -> None:
    for point, wish, outcome in at_every_point(lambda n: AtStatement(n, meet_another)):
        assert outcome.booked, point
        assert_used(wish, USED, point)
    assert_all_over()


@pytest.mark.usefixtures("sleepless")
def test_a_connection_to_the_database_that_ends_at_any_statement_loses_nothing(
    store: Store,
) -> None:
    for point, _, outcome in at_every_point(lambda n: AtStatement(n, end_connection)):
        if connection.vendor != "sqlite":
            assert outcome.booked, point  # a connection that was lost is made again
        tick(NOON)
        assert_all_over()


def test_a_command_to_redis_that_is_lost_is_repeated_once(redis_store: Store) -> None:
    """Whether it was done, and only its answer lost, or not."""
    for point, wish, outcome in at_every_point(lambda n: AtCommand(n, drop_redis)):
        assert outcome.booked, point
        assert_used(wish, USED, point)
    assert_all_over()


def test_a_command_to_redis_that_takes_too_long_loses_nothing(redis_store: Store) -> None:
    for _, _, _ in at_every_point(lambda n: AtCommand(n, time_out_redis)):
        tick(NOON)
        assert_all_over()


def test_a_redis_that_goes_away_at_any_point_and_comes_back_loses_nothing(
    redis_store: Store,
) -> None:
    class FromCommand(From):
        def __call__(self, name: str) -> None:
            if "redis" in name:
                super().__call__(name)

    for point, _, outcome in at_every_point(lambda n: FromCommand(n, drop_redis)):
        assert outcome.error in {"", "LedgerUnavailable"}, point
        tick(NOON)
        assert_all_over()


def assert_used(wish: Wish, tokens: int, point: str) -> None:
    """So much of the call's bucket is used, to the token."""
    assert not has_tokens(wish, FULL - tokens + 1), point
    assert has_tokens(wish, FULL - tokens), point


def has_tokens(wish: Wish, tokens: int) -> bool:
    """Whether the call's bucket holds so many more; they are taken, if it does."""
    bucket = wish.limits[-1]
    asking = Wish(
        charge=wish.charge,
        category="",
        limits=(*simple_limits(wish.charge, NOON), bucket),
        amounts=Amounts(nanousd=0, calls=0, tokens=tokens),
        at=NOON,
    )
    try:
        ledgers.current().settle(reserve(asking), settled(0))
    except RateLimited:
        return False
    return True


# While eight processes run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    some_of(
        [
            pytest.param(lambda redis: redis.restart(), id="restarted-empty"),
            pytest.param(lambda redis: redis.flush(), id="flushed"),
            pytest.param(lambda redis: redis.drop_clients(), id="connections-ended"),
            pytest.param(lambda redis: redis.restart_from_snapshot(), id="restarted-as-it-was"),
            pytest.param(lambda redis: redis.forget("*:month:*"), id="a-month-evicted"),
            pytest.param(lambda redis: redis.do("SCRIPT", "FLUSH"), id="scripts-forgotten"),
            pytest.param(lambda redis: redis.forget("*:day:*"), id="a-day-evicted"),
        ],
        count=3,
    ),
)
def test_a_redis_that_fails_in_the_middle_is_never_over(
    redis_store: Store, workers: Workers, fault: Callable[[Any], object]
) -> None:
    outcomes = run_through(workers, lambda: fault(redis_store.redis))

    assert_survived(outcomes)


def test_balances_of_an_old_snapshot_do_not_count(redis_store: Store, workers: Workers) -> None:
    """It was taken while nothing was held, and comes back while everything is."""
    server = redis_store.redis
    assert server is not None
    make(traffic(cost=1))
    server.save()

    outcomes = run_through(workers, server.restart)

    assert_survived(outcomes)


def test_a_database_that_ends_all_connections_is_never_over(store: Store, workers: Workers) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no server to end connections")

    outcomes = run_through(workers, end_all_connections)

    assert_survived(outcomes)


def end_all_connections() -> None:
    """End every connection to the test's database but this one."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            return
        cursor.execute(
            "SELECT id FROM information_schema.processlist"
            " WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        )
        for (number,) in cursor.fetchall():
            try:
                cursor.execute(f"KILL {number}")
            except OperationalError:
                continue  # it ended by itself
