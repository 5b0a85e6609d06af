"""Bookings leave marks, and adding up takes them back: nothing is missed, whoever comes first."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction

from ai_budget import periods
from ai_budget.exceptions import CallInsideTransaction
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, QuarterTotal, SubjectTotal, TotalMark, UserTotal
from ai_budget.review import rollups
from ai_budget.review.spans import ever
from ai_budget.review.sums import Figures, reading
from ai_budget.values import Charge
from tests.ledger.given import (
    NOON,
    RELEASED,
    attempt,
    estimated,
    limits_of,
    reserve,
    settle,
    settled,
)
from tests.ledger.threads import THREADS, together

ADA = Charge(feature="chat", user_id=7, subject="acme")


@pytest.fixture(autouse=True)
def clock() -> Any:
    with periods.override_clock(lambda: NOON):
        yield


def totals() -> Figures:
    """What the totals say by themselves, once everything is added up."""
    rollups.add_up()
    with reading() as figures:
        assert figures.behind == 0
        return figures.total(ever())


@pytest.mark.django_db
def test_every_booking_leaves_a_mark_and_a_reservation_none() -> None:
    first, second = (reserve(limits_of(ADA), 100, charge=ADA) for _ in range(2))
    assert not TotalMark.objects.exists()

    settle(first, settled(60))
    settle(second, estimated(100))
    settle(second, settled(40))  # the truth, late
    ledgers.current().record(attempt(ADA), settled(0))

    assert TotalMark.objects.count() == 4
    whom = [set(it.objects.values_list("user_id", "subject")) for it in (TotalMark, CallLog)]
    assert whom[0] == whom[1]
    assert totals().spend_nanousd == 100
    assert UserTotal.objects.get(period="month").cost_nanousd == 100
    day = SubjectTotal.objects.get(period="day")
    assert (day.attempts, day.calls) == (3, 2)  # what is recorded takes no call


@pytest.mark.django_db
def test_what_is_booked_twice_leaves_one_mark() -> None:
    reservation = reserve(limits_of(ADA), 100, charge=ADA)

    for _ in range(2):
        settle(reservation, settled(60))

    assert TotalMark.objects.count() == 1


@pytest.mark.django_db
def test_a_released_call_is_an_attempt_that_cost_nothing() -> None:
    settle(reserve(limits_of(ADA), 100, charge=ADA), RELEASED)

    figures = totals()

    assert (figures.attempts, figures.calls, figures.spend_nanousd) == (1, 0, 0)
    assert not UserTotal.objects.exists()


@pytest.mark.django_db
def test_many_marks_are_taken_back_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "MARKS_AT_ONCE", 2)
    for _ in range(5):
        settle(reserve(limits_of(ADA), 100, charge=ADA), settled(3))

    assert rollups.add_up() == 5

    assert totals().spend_nanousd == 15
    assert QuarterTotal.objects.get().attempts == 5


@pytest.mark.django_db(transaction=True)
def test_inside_a_transaction_nothing_is_added_up() -> None:
    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        rollups.add_up()


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_nothing_is_missed_while_calls_are_booked_and_several_add_up() -> None:
    dice = random.Random(3)
    costs = [dice.randrange(100) for _ in range(10 * (THREADS - 2))]
    shares = [costs[which :: THREADS - 2] for which in range(THREADS - 2)]

    def book(share: list[int]) -> Callable[[], int]:
        def work() -> int:
            for cost in share:
                settle(reserve(limits_of(ADA), 100, charge=ADA), settled(cost))
            return 0

        return work

    def add_up() -> int:
        return sum(rollups.add_up() for _ in range(8))

    together([*map(book, shares), add_up, add_up])

    figures = totals()
    assert (figures.attempts, figures.spend_nanousd) == (len(costs), sum(costs))
    assert UserTotal.objects.get(period="month").cost_nanousd == sum(costs)
    assert rollups.differences(NOON.date()) == []
    assert CallLog.objects.count() == len(costs)


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has one writer a file")
@pytest.mark.django_db(transaction=True)
def test_a_booking_that_commits_late_is_not_missed() -> None:
    """Its mark is written before another's and seen after: no watermark could tell."""
    late = reserve(limits_of(ADA), 100, charge=ADA)
    settle(reserve(limits_of(ADA), 100, charge=ADA), settled(1))

    def book_late() -> None:
        with transaction.atomic():
            CallLog.objects.filter(pk=late.id).update(status="settled", cost_nanousd=40)
            TotalMark.objects.create(reserved_at=NOON, day=NOON.date(), user_id=7, subject="acme")
            together([rollups.add_up])  # meanwhile

    book_late()

    with reading() as figures:
        assert figures.behind == 1
        assert figures.total(ever()).spend_nanousd == 41
    assert totals().spend_nanousd == 41
