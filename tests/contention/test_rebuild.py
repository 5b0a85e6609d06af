"""Balances that are filled anew, looked over and mended, while calls go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db.models import F

from ai_budget.ledger import base as ledgers
from ai_budget.models import SpendWindow
from ai_budget.testing import freeze
from ai_budget.values import BalanceKey, Difference, Limit
from tests.contention import work
from tests.contention.books import assert_books_agree, journal
from tests.contention.calls import make, make_all
from tests.contention.conftest import Store
from tests.contention.processes import Workers
from tests.contention.traffic import CALLER, assert_survived, run_through, traffic
from tests.ledger.given import NOON

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

SINCE = NOON.date().replace(day=1)
LIMITS = [limit for limit in traffic().limits if isinstance(limit, Limit)]
KEYS = sorted({limit.key for limit in LIMITS})


@pytest.fixture(autouse=True)
def at_noon() -> Iterator[None]:
    with freeze(NOON):
        yield


def test_of_many_who_find_balances_missing_one_adds_them_up(
    redis_store: Store, workers: Workers
) -> None:
    make_all([traffic(cost=1)] * 5)
    workers.at = NOON
    redis_store.flush()

    sums = workers.do(work.sums_made_by, [(KEYS,)] * Workers.COUNT)

    assert sum(sums) == len({(key.period, key.first_day) for key in KEYS})
    assert_books_agree(LIMITS)


def test_balances_may_be_looked_over_while_calls_go_on(store: Store, workers: Workers) -> None:
    found: list[Difference] = []

    outcomes = run_through(workers, lambda: found.extend(ledgers.current().differences(SINCE)))

    assert found == []
    assert_survived(outcomes)


def test_balances_may_be_rebuilt_while_calls_go_on(store: Store, workers: Workers) -> None:
    found: list[Difference] = []

    outcomes = run_through(workers, lambda: found.extend(ledgers.current().rebuild(SINCE)))

    assert found == []
    assert_survived(outcomes)


def test_wrong_balances_are_mended_while_calls_go_on(store: Store, workers: Workers) -> None:
    """Somebody has put a wrong amount into one of them, and it hinders nobody but its own."""
    make(traffic(cost=1))
    key = next(key for key in KEYS if key.scope == f"user:{CALLER.user_id}")
    found: list[Difference] = []

    def spoil_and_mend() -> None:
        spoil(store, key)
        found.extend(ledgers.current().rebuild(SINCE))

    outcomes = run_through(workers, spoil_and_mend)

    assert {difference.key for difference in found} == {key}
    assert len(found) == 3
    assert_survived(outcomes)


def spoil(store: Store, key: BalanceKey) -> None:
    """Add to what is spent, behind the ledger's back."""
    if store.redis is None:
        rows = SpendWindow.objects.filter(
            scope=key.scope, period=key.period, first_day=key.first_day
        )
        rows.update(spent_nanousd=F("spent_nanousd") + 5)
        return
    (window,) = store.redis.do("KEYS", f"*:{key.period}:{key.first_day.isoformat()}")
    for kind in "st":
        store.redis.do("HINCRBY", window, f"{kind} {key.scope}", 5)


def test_a_ledger_in_redis_leaves_what_admin_shows(redis_store: Store, workers: Workers) -> None:
    """The tick brings the rows of balances to what the journal says."""
    outcomes = run_through(workers, lambda: None)

    assert_survived(outcomes)
    shown = {
        (row.scope, row.period, row.first_day): (row.spent_nanousd, row.held_nanousd, row.calls)
        for row in SpendWindow.objects.all()
        if row.spent_nanousd or row.held_nanousd or row.calls
    }
    assert shown == {
        (key.scope, key.period, key.first_day): (it.spent_nanousd, it.held_nanousd, it.calls)
        for key, it in journal().items()
    }
