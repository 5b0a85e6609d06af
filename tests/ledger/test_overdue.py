"""What a worker left behind is booked at its bound, and not before its time."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.contrib.auth import get_user_model

from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog
from ai_budget.policy.limits import Quota
from ai_budget.values import Charge, Reservation, Settlement
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    RELEASED,
    estimated,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
    sums_of_calls,
    sums_of_windows,
)

pytestmark = pytest.mark.django_db

DEADLINE = timedelta(minutes=10)
MOMENT = timedelta(microseconds=1)


def settle_overdue(*, most: int = 1_000) -> int:
    return ledgers.current().settle_overdue(most=most)


def test_before_the_deadline_nothing_happens(clock: Clock) -> None:
    reservation = reserve([limit(None)], 100)
    clock.pass_by(DEADLINE)

    assert settle_overdue() == 0
    assert row(reservation).status == "reserved"


def test_after_the_deadline_it_is_booked_at_its_bound(clock: Clock) -> None:
    reservation = reserve([limit(None)], 100)
    clock.pass_by(DEADLINE + MOMENT)

    assert settle_overdue() == 1
    found = row(reservation)
    assert (found.status, found.cost_nanousd, found.error) == ("estimated", 100, "deadline passed")
    assert found.settled_at == clock.now


def test_each_attempt_has_its_own_deadline(clock: Clock) -> None:
    reserve([limit(None)], 100)
    later = reserve([limit(None)], 100, deadline=clock.now + timedelta(hours=1))
    clock.pass_by(DEADLINE + MOMENT)

    assert settle_overdue() == 1
    assert row(later).status == "reserved"


def test_what_is_over_is_left_alone(clock: Clock) -> None:
    for settlement in (settled(60), estimated(60), RELEASED):
        settle(reserve([limit(None)], 100), settlement)
    before = list(CallLog.objects.values())
    clock.pass_by(DEADLINE + MOMENT)

    assert settle_overdue() == 0
    assert list(CallLog.objects.values()) == before


def test_a_second_round_finds_nothing(clock: Clock) -> None:
    reserve([limit(None)], 100)
    clock.pass_by(DEADLINE + MOMENT)
    settle_overdue()

    assert settle_overdue() == 0


def test_the_call_still_counts(clock: Clock) -> None:
    of = limit(5, "user:7", calls=True)
    reserve([of], 100)
    clock.pass_by(DEADLINE + MOMENT)

    settle_overdue()

    assert ledgers.current().balances([of.key])[of.key].calls == 1


def test_a_worker_that_comes_back_corrects_the_estimate(clock: Clock) -> None:
    reservation = reserve([limit(None)], 100)
    clock.pass_by(DEADLINE + MOMENT)
    settle_overdue()

    settle(reservation, settled(60))

    assert (row(reservation).status, row(reservation).cost_nanousd) == ("settled", 60)
    assert ledgers.current().balances([limit(None).key])[limit(None).key].spent_nanousd == 60


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("category", ["", "support"])
@pytest.mark.parametrize("with_user", [True, False])
@pytest.mark.parametrize("subject", ["", "acme"])
def test_every_balance_that_was_held_is_freed(
    clock: Clock, calls: int, category: str, with_user: bool, subject: str
) -> None:
    """From the row alone, whoever the call was for and whatever its limits were."""
    user_id = get_user_model()._meta.pk.to_python("7") if with_user else None
    who = Charge(feature="chat", user_id=user_id, subject=subject)
    limits = limits_of(who, category=category, quota=Quota(daily_calls=9))
    reserve(limits, 100, calls=calls, charge=who, category=category)
    held = sums_of_windows()
    clock.pass_by(timedelta(days=40))

    settle_overdue()

    assert set(sums_of_windows().values()) == {(100, 0, calls)}
    assert set(sums_of_windows()) == set(held)
    assert sums_of_windows() == sums_of_calls()


def test_the_oldest_come_first(clock: Clock) -> None:
    second = reserve([limit(None)], deadline=clock.now + timedelta(seconds=2))
    first = reserve([limit(None)], deadline=clock.now + timedelta(seconds=1))
    clock.pass_by(DEADLINE)

    assert settle_overdue(most=1) == 1
    assert (row(first).status, row(second).status) == ("estimated", "reserved")


def test_a_round_takes_no_more_than_it_is_told(clock: Clock) -> None:
    for _ in range(3):
        reserve([limit(None)])
    clock.pass_by(DEADLINE + MOMENT)

    assert [settle_overdue(most=2) for _ in range(3)] == [2, 1, 0]


def test_one_that_will_not_settle_holds_up_no_other(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, next_one = reserve([limit(None)]), reserve([limit(None)])
    clock.pass_by(DEADLINE + MOMENT)
    ledger = ledgers.current()
    settle_it = ledger.settle

    def refuse_the_first(reservation: Reservation, settlement: Settlement) -> None:
        if reservation.id == stuck.id:
            raise LedgerUnavailable
        settle_it(reservation, settlement)

    monkeypatch.setattr(ledger, "settle", refuse_the_first)

    assert settle_overdue() == 1
    assert (row(stuck).status, row(next_one).status) == ("reserved", "estimated")
    with pytest.raises(LedgerUnavailable):
        settle_overdue()
