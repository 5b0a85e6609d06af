"""One row that nothing can be done with holds up no other, and somebody is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from ai_budget import periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import RowRefused
from ai_budget.ledger.database import DatabaseLedger
from ai_budget.ledger.mirror import mirror
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import Alert, CallLog, QuarterTotal, SpendWindow, TotalMark
from ai_budget.periods import Period
from ai_budget.review import alerts, rollups
from ai_budget.values import Balances, Difference
from tests.ledger.given import NOON, limit, reserve

pytestmark = pytest.mark.django_db

BAD = "subject:\ud800"
"""No database takes half of a character."""


@pytest.fixture(autouse=True)
def an_hour_later() -> Iterator[None]:
    with periods.override_clock(lambda: NOON + timedelta(hours=1)):
        yield


@pytest.mark.parametrize("bad", [{7}, {0}, {99}, {3, 4, 50}, set(range(100)), set()])
def test_all_but_the_bad_ones_are_done(bad: set[int]) -> None:
    aside, done, tries = SetAside(), set[int](), list[int]()

    def do(some: Sequence[int]) -> None:
        tries.append(len(some))
        if bad.intersection(some):
            raise RowRefused("no")
        done.update(some)

    aside.do_together("row", range(100), do)

    assert done == set(range(100)) - bad
    assert aside.keys("row") == sorted(bad)
    assert len(tries) <= 1 + 2 * 7 * len(bad)


def test_a_store_that_fails_sets_nothing_aside() -> None:
    def do(some: Sequence[int]) -> None:
        raise LedgerUnavailable("away")

    aside = SetAside()
    with pytest.raises(LedgerUnavailable):
        aside.do_together("row", range(100), do)

    assert aside.names == []


def test_balances_are_copied_though_one_cannot_be() -> None:
    scopes = [*(f"subject:{number}" for number in range(40)), BAD]
    balances = {scope: Balances(spent_nanousd=5) for scope in scopes}
    aside = SetAside()

    day = NOON.date()
    mirror(connection, Period.DAY, day, balances=balances, refused={BAD: 1}, aside=aside)

    assert SpendWindow.objects.filter(spent_nanousd=5).count() == 40
    assert aside.names == [f"the balance of {BAD}"]


def fail_for(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    ledger = type(ledgers.current())
    whole = ledger._settle_overdue

    def settle(self: Any, row: CallLog) -> None:
        if row.pk == bad:
            raise ValueError("damaged")
        whole(self, row)

    monkeypatch.setattr(ledger, "_settle_overdue", settle)


def test_a_damaged_call_is_named_once_a_day_and_the_tick_does_all_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = [reserve([limit(None)], 100).id for _ in range(3)]
    fail_for(monkeypatch, calls[0])

    for _ in range(2):
        with pytest.raises(CommandError, match=f"Set aside: 'call {calls[0]}'") as caught:
            call_command("ai_budget_tick", stdout=StringIO())
        assert caught.value.returncode == 2

    statuses = dict(CallLog.objects.values_list("pk", "status"))
    assert statuses == dict(zip(calls, ["reserved", "estimated", "estimated"], strict=True))
    alert = Alert.objects.get(kind=Alert.Kind.SET_ASIDE)
    assert alert.about == f"call {calls[0]}"
    assert f"call {calls[0]} could not be worked on" in alert.title
    assert alert.text
    assert f"Set aside: call {calls[0]!r} (ValueError)." in caplog.text
    assert "damaged" not in caplog.text


def test_damaged_calls_in_front_leave_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = [reserve([limit(None)], 100).id for _ in range(3)]
    fail_for(monkeypatch, calls[0])
    aside = SetAside()

    settled = [ledgers.current().settle_overdue(most=1, aside=aside) for _ in range(4)]

    assert settled == [0, 1, 1, 0]
    assert aside.keys("call") == [calls[0]]


def test_totals_are_added_up_though_one_mark_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = NOON - timedelta(days=1)
    whole = rollups.Adding.quarters

    def quarters(self: rollups.Adding, starts: set[datetime]) -> None:
        if any(start.date() == bad.date() for start in starts):
            raise OverflowError("too large")
        whole(self, starts)

    monkeypatch.setattr(rollups.Adding, "quarters", quarters)
    with periods.override_clock(lambda: NOON):
        ledgers.current().settle_overdue()
    for at in (NOON, bad, NOON + timedelta(minutes=30)):
        CallLog.objects.bulk_create([settled_call(at)])
        TotalMark.objects.create(reserved_at=at, day=at.date())
    aside = SetAside()

    rollups.add_up(aside=aside)

    assert QuarterTotal.objects.count() == 2
    assert [mark.day for mark in TotalMark.objects.all()] == [bad.date()]
    assert aside.names == [f"the totals of mark {TotalMark.objects.get().pk}"]


def test_balances_are_mended_though_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve([limit(100), limit(100, "feature:chat")], 7)
    SpendWindow.objects.update(held_nanousd=99)
    whole = DatabaseLedger._mend

    def mend(self: DatabaseLedger, alias: Any, seeming: Difference) -> Difference | None:
        if seeming.key.scope == "*":
            raise RowRefused("too long")
        return whole(self, alias, seeming)

    monkeypatch.setattr(DatabaseLedger, "_mend", mend)
    aside = SetAside()

    mended = DatabaseLedger().rebuild(NOON.date(), aside)

    assert {it.key.scope for it in mended} == {"feature:chat"}
    assert aside.names == ["the balance of *"]
    with pytest.raises(CommandError, match="Not mended: 'the balance of"):
        call_command("ai_budget_rebuild", since=str(NOON.date()), stdout=StringIO())


def settled_call(at: datetime) -> CallLog:
    return CallLog(
        feature_id="chat",
        requested_model="m",
        model="m",
        status="settled",
        cost_nanousd=1,
        reserved_nanousd=1,
        max_tokens=1,
        reserved_at=at,
        settled_at=at,
        day=at.date(),
        deadline=at,
    )


def test_alerts_are_raised_though_one_kind_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ArithmeticError("none")

    monkeypatch.setattr(alerts, "due_of_calls", fail)

    alerts.evaluate()

    assert [alert.about for alert in Alert.objects.all()] == ["alerts of calls"]
