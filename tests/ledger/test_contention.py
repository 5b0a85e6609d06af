"""Real threads on a real database: never over, never twice, never stuck."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.db import connection

from ai_budget.exceptions import BudgetExceeded, LimitReached, QuotaExceeded
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import connection as connecting
from ai_budget.models import CallLog, RateBucket, SpendWindow
from ai_budget.policy.limits import Quota
from ai_budget.values import SITE, Balances, Bucket, Charge, Limit, Reservation
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    CHAT,
    NOON,
    RELEASED,
    bucket,
    estimated,
    limit,
    limits_of,
    reserve,
    settle,
    settled,
    spent_held_calls,
    sums_of_calls,
    sums_of_windows,
)
from tests.ledger.threads import THREADS, together

pytestmark = [
    pytest.mark.contention,
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("clock"),
]


def tried(limits: Sequence[Limit], nanousd: int = 10, charge: Charge = CHAT) -> Reservation | None:
    """A reservation, or None where a limit said no."""
    try:
        return reserve(limits, nanousd, charge=charge)
    except LimitReached:
        return None


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How often a step had to be tried again."""
    slept: list[float] = []
    monkeypatch.setattr(connecting, "time", SimpleNamespace(sleep=slept.append))
    return slept


# Exactly as many as fit --------------------------------------------------------------------------

ADA = Charge(feature="chat", user_id=7, subject="acme")
ATTEMPTS = 24


@pytest.mark.parametrize(
    ("fit", "limits", "kind"),
    [
        pytest.param(1, limits_of(CHAT, daily=10), BudgetExceeded, id="one-by-the-feature"),
        pytest.param(5, limits_of(CHAT, site=59), BudgetExceeded, id="five-by-the-site"),
        pytest.param(
            23, limits_of(ADA, daily=1_000, site=230), BudgetExceeded, id="all-but-one-by-the-site"
        ),
        pytest.param(
            7,
            limits_of(ADA, site=1_000, category="support", quota=Quota(daily_calls=7)),
            QuotaExceeded,
            id="seven-calls-of-a-user",
        ),
        pytest.param(
            3,
            limits_of(ADA, daily=1_000, quota=Quota(monthly_limit=30)),
            QuotaExceeded,
            id="three-by-the-month-of-a-user",
        ),
    ],
)
def test_exactly_as_many_as_fit_are_admitted(
    fit: int, limits: list[Limit], kind: type[LimitReached]
) -> None:
    errors: list[LimitReached] = []

    def attempts() -> int:
        admitted = 0
        for _ in range(ATTEMPTS // THREADS):
            try:
                reserve(limits, 10, charge=ADA)
                admitted += 1
            except LimitReached as error:
                errors.append(error)
        return admitted

    admitted = sum(together([attempts] * THREADS))

    assert admitted == fit == CallLog.objects.count()
    assert {type(error) for error in errors} == {kind}
    assert {spent_held_calls(of) for of in limits} == {(0, fit * 10, fit)}
    assert len(errors) == ATTEMPTS - fit


def test_two_cannot_both_take_the_last_cent() -> None:
    for round_ in range(15):
        of = [limit(10, f"feature:round-{round_}")]

        taken = together([lambda of=of: tried(of)] * 2)  # type: ignore[misc]

        assert [one is not None for one in sorted(taken, key=bool)] == [False, True]


def test_no_balance_is_over_its_limit_at_any_moment() -> None:
    """Each thread looks at what others have taken, right after it has taken its own."""
    site = limit(100, SITE)
    seen: list[Balances] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        charge = Charge(feature=f"feature-{number % 3}", user_id=1 + number % 2)
        for _ in range(6):
            limits = limits_of(charge, daily=60, site=100)
            reservation = tried(limits, chance.randint(1, 40), charge)
            seen.append(ledgers.current().balances([site.key])[site.key])
            if reservation is not None:
                cost = chance.randint(0, reservation.amounts.nanousd // 4)
                settle(reservation, chance.choice([settled(cost), estimated(cost), RELEASED]))

    together([lambda number=number: work(number) for number in range(THREADS)])  # type: ignore[misc]

    assert max(balance.taken_nanousd for balance in seen) <= 100
    assert max(balance.held_nanousd for balance in seen) > 0
    assert sums_of_windows() == sums_of_calls()


# Once --------------------------------------------------------------------------------------------


def test_many_who_settle_the_same_book_it_once() -> None:
    reservation = reserve(limits_of(ADA), 100, charge=ADA)

    together([lambda: settle(reservation, settled(60))] * THREADS)

    assert {spent_held_calls(of) for of in limits_of(ADA)} == {(60, 0, 1)}


def test_a_worker_and_the_tick_book_the_truth_once(clock: Clock) -> None:
    reservations = [reserve(limits_of(ADA), 100, charge=ADA) for _ in range(12)]
    clock.pass_by(timedelta(hours=1))

    def worker() -> int:
        for reservation in reservations:
            settle(reservation, settled(60))
        return 0

    def tick() -> int:
        return ledgers.current().settle_overdue()

    together([worker, tick, worker, tick])

    assert set(CallLog.objects.values_list("status", "cost_nanousd")) == {("settled", 60)}
    assert {spent_held_calls(of) for of in limits_of(ADA)} == {(12 * 60, 0, 12)}


def test_a_release_and_the_tick_give_everything_back_once(clock: Clock) -> None:
    reservations = [reserve(limits_of(ADA), 100, charge=ADA) for _ in range(12)]
    clock.pass_by(timedelta(hours=1))

    def worker() -> int:
        for reservation in reservations:
            settle(reservation, RELEASED)
        return 0

    together([worker, lambda: ledgers.current().settle_overdue(), worker])

    assert set(CallLog.objects.values_list("status", "cost_nanousd")) == {("released", 0)}
    assert sums_of_windows() == {}


def test_corrections_at_the_same_moment_are_made_once() -> None:
    reservation = reserve(limits_of(ADA), 100, charge=ADA)
    settle(reservation, estimated(100))

    together([lambda: settle(reservation, settled(60))] * THREADS)

    assert {spent_held_calls(of) for of in limits_of(ADA)} == {(60, 0, 1)}


def test_balances_that_are_missing_are_made_once() -> None:
    """The first calls of a new day come all at once."""
    together([lambda: reserve(limits_of(ADA), 10, charge=ADA)] * THREADS)

    assert SpendWindow.objects.count() == len(limits_of(ADA))
    assert {spent_held_calls(of) for of in limits_of(ADA)} == {(0, THREADS * 10, THREADS)}


def test_refusals_at_the_same_moment_are_all_counted() -> None:
    together([lambda: ledgers.current().count_refusal([limit(5).key])] * THREADS)

    assert SpendWindow.objects.get().refused == THREADS


# Never stuck -------------------------------------------------------------------------------------


def test_calls_over_the_same_balances_in_any_order_do_not_wait_for_each_other(
    sleeps: list[float],
) -> None:
    """No deadlock, and not even one that is tried again."""
    scopes = ["feature:chat", "category:support", SITE, "user:7", "user:7,feature:chat", "user:8"]
    settle(reserve([limit(None, scope) for scope in scopes], 10), RELEASED)

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(8):
            some = chance.sample(scopes, chance.randint(2, len(scopes)))
            reservation = reserve([limit(None, scope) for scope in some], 10)
            ledgers.current().count_refusal([limit(None, scope).key for scope in some[::-1]])
            settle(reservation, settled(chance.randint(0, 10)))

    together([lambda number=number: work(number) for number in range(THREADS)])  # type: ignore[misc]

    spent = [window.spent_nanousd for window in SpendWindow.objects.all()]
    assert sum(window.held_nanousd for window in SpendWindow.objects.all()) == 0
    assert all(spent)
    assert not CallLog.objects.filter(status="reserved").exists()
    if connection.vendor != "sqlite":  # which has one lock for all, and asks again and again
        assert sleeps == []


# Buckets -----------------------------------------------------------------------------------------


def admitted(attempts: Sequence[Callable[[], object]]) -> int:
    """How many of them a limit let through, all at the same moment."""

    def one(attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except LimitReached:
            return False
        return True

    return sum(together([functools.partial(one, attempt) for attempt in attempts]))


def test_exactly_as_many_requests_as_fit_are_admitted() -> None:
    of: list[Limit | Bucket] = [limit(None), bucket(5), bucket(100, SITE, tokens=True)]

    assert admitted([lambda: reserve(of, tokens=1)] * 12) == 5
    assert CallLog.objects.count() == 5


def test_exactly_as_many_tokens_as_fit_are_admitted() -> None:
    of: list[Limit | Bucket] = [limit(None), bucket(50), bucket(100, SITE, tokens=True)]

    assert admitted([lambda: reserve(of, tokens=30)] * 12) == 3


def test_exactly_as_many_views_as_fit_are_admitted() -> None:
    of = bucket(5, "view:chat:user:7")

    assert admitted([lambda: ledgers.current().take([of], at=NOON)] * 12) == 5


def test_what_is_given_back_at_the_same_moment_is_all_there() -> None:
    of = bucket(120, SITE, tokens=True)
    reservations = [reserve([limit(None), of], tokens=10) for _ in range(12)]

    together([lambda one=one: settle(one, settled(1, tokens=4)) for one in reservations])  # type: ignore[misc]

    reserve([of], tokens=72)
    with pytest.raises(LimitReached):
        reserve([of], tokens=1)


def test_calls_over_the_same_buckets_in_any_order_do_not_wait_for_each_other(
    sleeps: list[float],
) -> None:
    """Nor do views, nor the tick: no deadlock, and not even one that is tried again."""
    scopes = ["feature:chat", "category:support", SITE, "user:7", "user:7,feature:chat", "user:8"]
    views = [bucket(10_000, f"view:{number}") for number in range(4)]
    every: list[Limit | Bucket] = [
        of
        for scope in scopes
        for of in (limit(None, scope), bucket(10_000, scope), bucket(10**9, scope, tokens=True))
    ]
    settle(reserve(every, 10, tokens=1), RELEASED)
    ledgers.current().take(views, at=NOON)

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(6):
            some = chance.sample(every, chance.randint(2, len(every)))
            reservation = reserve(some, 10, tokens=100)
            for _ in range(4):
                ledgers.current().take(chance.sample(views, 3), at=NOON)
            ledgers.current().tidy()
            settle(reservation, settled(chance.randint(0, 10), tokens=chance.randint(0, 100)))

    together([lambda number=number: work(number) for number in range(THREADS)])  # type: ignore[misc]

    assert not CallLog.objects.filter(status="reserved").exists()
    if connection.vendor != "sqlite":  # which has one lock for all, and asks again and again
        assert sleeps == []


def test_a_bucket_that_is_dropped_under_its_users_is_made_again() -> None:
    of = bucket(10_000)

    def work() -> None:
        for _ in range(10):
            reserve([limit(None), of])

    def drop() -> None:
        for _ in range(10):
            RateBucket.objects.all().delete()

    together([work, work, drop])

    assert CallLog.objects.count() == 20
