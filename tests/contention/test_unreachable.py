"""A Redis that is away, or hangs: nobody waits long, and nothing is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog
from ai_budget.testing import freeze
from ai_budget.values import Limit
from tests.contention.books import assert_all_over, assert_books_agree, kept, tick
from tests.contention.calls import Wish, make, reserve
from tests.contention.conftest import Store
from tests.contention.points import At, watched
from tests.contention.processes import Workers
from tests.contention.redis_server import RedisServer
from tests.contention.traffic import LIMIT, traffic
from tests.depth import deep
from tests.ledger.given import NOON, settled

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

TIMEOUT = 0.2


@pytest.fixture(autouse=True)
def at_noon() -> Iterator[None]:
    with freeze(NOON):
        yield


@pytest.fixture
def server(redis_store: Store, settings: Any) -> RedisServer:
    """Redis, of which the ledger waits for an answer only a moment."""
    assert redis_store.redis is not None
    redis_store.settings["LEDGER_REDIS_URL"] += f"?socket_timeout={TIMEOUT}"
    settings.AI_BUDGET = dict(redis_store.settings)
    return redis_store.redis


@pytest.fixture
def allowed(server: RedisServer, redis_store: Store, settings: Any) -> None:
    """Calls pass while Redis is away."""
    redis_store.settings["ON_LEDGER_FAILURE"] = "allow"
    settings.AI_BUDGET = dict(redis_store.settings)


def seconds_to_refuse(wish: Wish) -> float:
    started = time.monotonic()
    with pytest.raises(LedgerUnavailable):
        reserve(wish)
    return time.monotonic() - started


@pytest.mark.parametrize("known", [True, False], ids=["connected", "not-yet-connected"])
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_call_is_refused_within_the_time_limit(
    server: RedisServer, how: str, known: bool
) -> None:
    if known:
        make(traffic(cost=1))

    getattr(server, how)()

    assert seconds_to_refuse(traffic()) < 4 * TIMEOUT
    assert CallLog.objects.exclude(status="released").count() == known


@pytest.mark.parametrize("failing", ["refuse", "allow"])
def test_a_redis_that_hangs_at_any_point_of_a_call_and_goes_on_loses_nothing(
    server: RedisServer, request: pytest.FixtureRequest, failing: str
) -> None:
    """What it did not answer in time it still does when it goes on."""
    if failing == "allow":
        request.getfixturevalue("allowed")
    make(traffic(cost=1))
    for number in range(0, 100, deep(1, else_=7)):
        at = At(number, server.freeze)
        with watched(at):
            outcome = make(traffic(cost=1))
        server.thaw()

        assert outcome.error in {"", "LedgerUnavailable"}, at.names[number]
        tick(NOON)
        assert_all_over()
        if not at.reached:
            return
    raise AssertionError("there is no end to it")


def test_a_settlement_that_redis_did_not_hear_of_is_in_the_books(server: RedisServer) -> None:
    reservation = reserve(traffic())
    server.kill()

    ledgers.current().settle(reservation, settled(4))

    server.start()
    assert (CallLog.objects.get().status, CallLog.objects.get().cost_nanousd) == ("settled", 4)
    assert_books_agree()


# Allowed to pass ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("allowed")
def test_what_passes_while_redis_is_away_is_counted_by_the_next_call(server: RedisServer) -> None:
    server.kill()
    outcomes = [make(traffic(cost=9)) for _ in range(5)]

    server.start()

    assert [outcome.error for outcome in outcomes] == [""] * 5
    assert make(replace(traffic(cost=9))).error == "", "15 are left"
    assert make(traffic()).error == "BudgetExceeded"
    assert_books_agree()


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_what_passes_while_redis_is_away_is_counted_by_other_workers_after_the_tick(
    server: RedisServer, workers: Workers, how: str
) -> None:
    """Balances are as they were, and the workers that spent without them are gone."""
    make(traffic(cost=9))
    workers.at = NOON
    server.save()
    getattr(server, how)()

    outcomes = workers.do(make, [(traffic(cost=9),)] * 5)

    server.start() if how == "kill" else server.thaw()
    tick(NOON)
    assert [outcome.error for outcome in outcomes] == [""] * 5
    assert make(traffic()).error == "BudgetExceeded"
    assert_all_over()


@pytest.mark.usefixtures("allowed")
def test_a_call_that_passed_and_never_ended_is_booked_at_its_bound(
    server: RedisServer, workers: Workers
) -> None:
    make(traffic(cost=1))
    workers.at = NOON
    server.freeze()
    workers.do(make, [(traffic(ending="abandon"),)] * 3)
    server.thaw()

    tick(NOON)

    site = [limit for limit in traffic().limits if isinstance(limit, Limit) and limit.amount]
    assert {it.spent_nanousd for it in kept([limit.key for limit in site]).values()} == {31}
    assert_all_over()


@pytest.mark.usefixtures("allowed")
def test_a_limit_still_refuses_while_redis_is_there(server: RedisServer) -> None:
    while make(traffic(cost=10)).error == "":
        pass

    assert CallLog.objects.count() == LIMIT // 10
