"""Any sequence of calls, against a ledger of a few lines of plain Python."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.exceptions import LimitReached
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from ai_budget.policy.limits import Budget, Quota, Rules
from ai_budget.values import (
    SITE,
    BalanceKey,
    Charge,
    Limit,
    Measure,
    Reservation,
    Settlement,
    Status,
)
from tests.depth import deep
from tests.ledger.given import (
    NOON,
    RELEASED,
    Sums,
    estimated,
    reserve,
    settle,
    settled,
    sums_of_calls,
    sums_of_windows,
    windows_in_force,
)

PATIENCE = timedelta(hours=30)


def user(number: int) -> Any:
    """A primary key of the project's user model, which need not be a number."""
    field = get_user_model()._meta.pk
    if field.get_internal_type() == "UUIDField":
        return field.to_python(f"{number:032x}")
    return number


@dataclass(frozen=True, kw_only=True)
class Site:
    """Limits that stay as they are; None is none."""

    chat: int | None
    mail: int | None
    support: int | None
    daily: int | None
    monthly: int | None
    quota: int | None
    calls: int | None

    def limits(self, charge: Charge, at: datetime) -> list[Limit]:
        rules = Rules(
            feature=Budget(name=charge.feature, daily_limit=getattr(self, charge.feature)),
            category=self.category(charge),
            site=Budget(name=SITE, daily_limit=self.daily, monthly_limit=self.monthly),
            quotas=(Quota(daily_limit=self.quota, daily_calls=self.calls),),
        )
        return windows_in_force(charge, rules, at=at)

    def category(self, charge: Charge) -> Budget | None:
        """Chat is in the category "support", mail in none."""
        if charge.feature != "chat":
            return None
        return Budget(name="support", monthly_limit=self.support)


@dataclass
class Balance:
    spent: int = 0
    held: int = 0
    calls: int = 0


@dataclass
class Entry:
    """A reservation as the plain ledger knows it."""

    reservation: Reservation
    keys: set[BalanceKey]
    nanousd: int
    calls: int
    deadline: datetime
    status: str = "reserved"
    cost: int = 0
    estimated_by_worker: bool = False


@dataclass
class Plain:
    """What the ledger promises, in dictionaries."""

    balances: dict[BalanceKey, Balance] = field(default_factory=lambda: defaultdict(Balance))
    entries: list[Entry] = field(default_factory=list)

    def has_room(self, limits: list[Limit], nanousd: int, calls: int) -> bool:
        return all(
            limit.amount is None
            or (self.taken(limit) + (nanousd if _is_money(limit) else calls) <= limit.amount)
            for limit in limits
        )

    def taken(self, limit: Limit) -> int:
        balance = self.balances[limit.key]
        return balance.spent + balance.held if _is_money(limit) else balance.calls

    def take(self, entry: Entry) -> None:
        self.entries.append(entry)
        for key in entry.keys:
            self.balances[key].held += entry.nanousd
            self.balances[key].calls += entry.calls

    def book(self, entry: Entry, status: str, cost: int) -> None:
        if entry.status in {"settled", "released"}:
            return
        if entry.status == "estimated" and status == "estimated":
            return
        for key in entry.keys:
            balance = self.balances[key]
            balance.spent += cost - entry.cost
            balance.held -= entry.nanousd if entry.status == "reserved" else 0
            balance.calls -= entry.calls if status == "released" else 0
        entry.status, entry.cost = status, cost

    def sums(self) -> Sums:
        return {
            (key.scope, str(key.period), key.first_day.isoformat()): sums
            for key, balance in self.balances.items()
            if any(sums := (balance.spent, balance.held, balance.calls))
        }


def _is_money(limit: Limit) -> bool:
    return limit.measure is Measure.NANOUSD


CHARGES = [
    Charge(feature="chat"),
    Charge(feature="chat", user_id=user(1)),
    Charge(feature="mail", user_id=user(1)),
    Charge(feature="mail", user_id=user(2), subject="acme"),
    Charge(feature="chat", subject="Acme"),
]
AMOUNT = st.none() | st.integers(0, 60)
SITES = st.builds(
    Site,
    chat=AMOUNT,
    mail=AMOUNT,
    support=AMOUNT,
    daily=AMOUNT,
    monthly=st.none() | st.integers(0, 150),
    quota=AMOUNT,
    calls=st.none() | st.integers(0, 6),
)
WHICH = st.integers(0, 30)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("reserve"),
            st.sampled_from(CHARGES),
            st.integers(0, 25),
            st.sampled_from([1, 1, 1, 0]),
        ),
        st.tuples(st.just("settle"), WHICH, st.integers(0, 100)),
        st.tuples(st.just("estimate"), WHICH, st.integers(0, 100)),
        st.tuples(st.just("release"), WHICH),
        st.tuples(st.just("wait"), st.sampled_from([timedelta(hours=6), timedelta(days=1)])),
        st.tuples(st.just("tick")),
    ),
    min_size=1,
    max_size=30,
)


class Run:
    """Both ledgers, doing the same."""

    def __init__(self, site: Site) -> None:
        self.site, self.plain, self.now = site, Plain(), NOON

    def step(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def reserve(self, charge: Charge, nanousd: int, calls: int) -> None:
        limits = self.site.limits(charge, self.now)
        category = self.site.category(charge)
        deadline = self.now + PATIENCE
        room = self.plain.has_room(limits, nanousd, calls)
        try:
            reservation = reserve(
                limits,
                nanousd,
                calls=calls,
                charge=charge,
                category=category.name if category else "",
                at=self.now,
                deadline=deadline,
            )
        except LimitReached:
            assert not room
            return
        assert room
        keys = {limit.key for limit in limits}
        self.plain.take(Entry(reservation, keys, nanousd, calls, deadline))
        self.ensure_not_over(limits)

    def settle(self, which: int, percent: int) -> None:
        self.by_worker(which, percent, settled)

    def estimate(self, which: int, percent: int) -> None:
        self.by_worker(which, percent, estimated)

    def by_worker(self, which: int, percent: int, settlement: Any) -> None:
        """A worker estimates what it cannot know, and does not come back to it."""
        if not self.plain.entries:
            return
        entry = self.plain.entries[which % len(self.plain.entries)]
        if entry.estimated_by_worker:
            return
        self.book(entry, settlement(entry.nanousd * percent // 100))

    def release(self, which: int) -> None:
        if self.plain.entries:
            self.book(self.plain.entries[which % len(self.plain.entries)], RELEASED)

    def book(self, entry: Entry, settlement: Settlement) -> None:
        settle(entry.reservation, settlement)
        entry.estimated_by_worker |= settlement.status is Status.ESTIMATED
        self.plain.book(entry, settlement.status.value, settlement.cost_nanousd)

    def wait(self, time: timedelta) -> None:
        self.now += time

    def tick(self) -> None:
        overdue = [
            entry
            for entry in self.plain.entries
            if entry.status == "reserved" and entry.deadline < self.now
        ]
        assert ledgers.current().settle_overdue() == len(overdue)
        for entry in overdue:
            self.plain.book(entry, "estimated", entry.nanousd)

    def ensure_not_over(self, limits: list[Limit]) -> None:
        for limit in limits:
            assert limit.amount is None or self.plain.taken(limit) <= limit.amount

    def ensure_the_same(self) -> None:
        assert sums_of_windows() == self.plain.sums() == sums_of_calls()
        for charge in CHARGES:
            self.ensure_not_over(self.site.limits(charge, self.now))


@pytest.mark.django_db
@settings(max_examples=deep(200, else_=25))
@given(SITES, STEPS)
def test_any_sequence_is_counted_like_the_plain_ledger_counts_it(
    site: Site, steps: list[tuple[Any, ...]]
) -> None:
    CallLog.objects.all().delete()
    SpendWindow.objects.all().delete()
    run = Run(site)

    with periods.override_clock(lambda: run.now):
        for step in steps:
            run.step(*step)
            run.ensure_the_same()
