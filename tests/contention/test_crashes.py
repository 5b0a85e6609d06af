"""Workers that are killed, or fall asleep, at every point of a call's life."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from django.core.management import CommandError
from django.db import connection, connections

from ai_budget.ledger import base as ledgers
from ai_budget.ledger import connection as connecting
from ai_budget.ledger import redis as redis_ledger
from ai_budget.models import CallLog, SpendWindow
from ai_budget.testing import AnthropicSimulator, Hang, Reply, freeze
from tests.contention import calls, points, work
from tests.contention.books import assert_all_over, bill, booked, tick
from tests.contention.conftest import Store
from tests.contention.mixes import simple_limits
from tests.contention.processes import Workers
from tests.contention.traffic import CALLER, traffic
from tests.depth import deep
from tests.guard.books import wait_until
from tests.ledger.given import NOON, estimated, settled

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]


def each_point_of(
    workers: Workers,
    until: Callable[..., points.Ended],
    verb: Callable[..., object],
    *arguments: Any,
    every: int = 5,
    before: Callable[[], None] = lambda: None,
) -> Iterator[points.Ended]:
    """Do the work again and again, each time until the next of its points.

    Only the deep suite stops at all of them, the everyday one at each ``every``-th.
    """
    for point in range(0, 400, deep(1, else_=every)):
        before()
        ended = workers.one(until, point, verb, *arguments)
        yield ended
        if not ended.point:
            return
    raise AssertionError("there is no end to it")


# Killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["message", "stream"])
def test_a_worker_that_is_killed_at_any_point_of_a_call_loses_nothing(
    store: Store, workers: Workers, api: AnthropicSimulator, stream: bool
) -> None:
    workers.one(work.call_claude, "chat")
    for ended in each_point_of(workers, work.die_at, work.call_claude, "chat", stream):
        api.wait_until_idle()
        tick()
        assert_all_over()
        assert 0 < bill(api) <= booked(), ended.point


def test_a_worker_that_is_killed_while_balances_are_made_loses_nothing(
    store: Store, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a day, or after Redis has forgotten."""
    monkeypatch.setattr(redis_ledger, "CLAIM_SECONDS", 0.1)
    workers.at = NOON

    def forget() -> None:
        store.flush()
        CallLog.objects.all().delete()
        forget_windows()

    for _ in each_point_of(
        workers, work.die_at, work.try_to_reserve, traffic(), every=9, before=forget
    ):
        tick(NOON)
        with freeze(NOON):
            assert_all_over()


def test_a_tick_that_is_killed_at_any_point_leaves_the_rest_to_the_next(
    store: Store, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_ledger, "CLAIM_SECONDS", 0.1)
    workers.at = NOON

    def abandon() -> None:
        with freeze(NOON):
            work.try_to_reserve(traffic())

    for _ in each_point_of(workers, work.die_at, work.tick, NOON, every=15, before=abandon):
        tick(NOON)
        with freeze(NOON):
            assert_all_over()
        CallLog.objects.all().delete()
        forget_windows()
        store.flush()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(Hang(seconds=30, billed=True), id="silent"),
        pytest.param(Reply(text="A story. " * 400, chunk_delay=0.05), id="answering"),
    ],
)
def test_a_worker_that_is_killed_during_the_request_is_booked_at_its_bound(
    store: Store, workers: Workers, api: AnthropicSimulator, step: Any
) -> None:
    api.default = step
    child = workers.one(work.start, work.call_claude, "chat", True)
    wait_until(lambda: api.requests)

    assert workers.one(points.kill, child) == -signal.SIGKILL

    tick()
    row = CallLog.objects.get()
    assert (row.status, row.cost_nanousd) == ("estimated", row.reserved_nanousd)
    assert_all_over()
    api.reset()


def test_a_worker_that_is_killed_at_any_point_of_a_correction_leaves_right_books(
    store: Store, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick took it for dead, and it dies indeed while it books the truth."""
    # How long those who come after it wait for its claims.
    monkeypatch.setattr("ai_budget.ledger.redis.CLAIM_SECONDS", 0.2)
    workers.at = NOON
    without_limits = replace(traffic(), limits=simple_limits(CALLER, NOON))
    for point in range(0, 400, deep(1, else_=9)):
        with freeze(NOON):
            reservation = calls.reserve(without_limits)
            ledgers.current().settle(reservation, estimated(10))
        ended = workers.one(work.die_at, point, work.settle, reservation, settled(0))
        tick(NOON)
        with freeze(NOON):
            assert_all_over()
        if not ended.point:
            return
    raise AssertionError("there is no end to it")


def forget_windows() -> None:
    SpendWindow.objects.all().delete()


# Asleep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sleep_at", [work.sleep_at, work.suspend_at], ids=["process", "machine"])
def test_a_worker_that_sleeps_at_any_point_of_a_call_books_the_truth_when_it_wakes_up(
    store: Store,
    workers: Workers,
    api: AnthropicSimulator,
    monkeypatch: pytest.MonkeyPatch,
    sleep_at: Callable[..., points.Ended],
) -> None:
    """The tick comes in between, and takes it for dead. A machine's monotonic clock sleeps, too."""
    shortest: Any = "0.01" if connection.vendor == "postgresql" else 0
    workers.one(work.call_claude, "chat")
    for ended in each_point_of(workers, sleep_at, work.call_claude, "chat", every=9):
        if not ended.point:
            break
        with monkeypatch.context() as hurry:
            hurry.setattr(connecting, "LOCK_TIMEOUT_SECONDS", shortest)
            hurry.setattr(connecting, "TRIES", 2)
            tick_beside_a_lock()
        code = workers.one(points.go_on, ended.child)

        assert code in {0, points.REFUSED}, ended.point
        tick()
        assert_all_over()
        assert 0 < bill(api) <= booked(), ended.point
        assert CallLog.objects.latest("id").status in {"settled", "released"}, ended.point


def tick_beside_a_lock() -> None:
    """Tick over a connection of its own, which waits only a moment for what is locked."""

    def beside() -> None:
        try:
            if connection.vendor == "sqlite":
                with connection.cursor() as cursor:
                    cursor.execute("PRAGMA busy_timeout = 10")
            with suppress(CommandError):
                tick()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(beside).result()
