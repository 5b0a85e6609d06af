"""Any sequence of what can happen to a ledger, beside a plain model of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ai_budget import periods
from ai_budget.exceptions import LimitReached
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, RateBucket, SpendWindow
from ai_budget.policy.limits import Quota
from ai_budget.values import SITE, Amounts, Bucket, Charge, Measure, Settlement
from tests.contention.books import journal, kept
from tests.contention.calls import reserve
from tests.contention.conftest import Store
from tests.contention.mixes import CHARGES, Mix
from tests.contention.model import Entry, Model
from tests.depth import deep
from tests.ledger.given import NOON, RELEASED, estimated, settled

pytestmark = [pytest.mark.contention, pytest.mark.django_db]

PATIENCE = timedelta(hours=2)
AMOUNT = st.none() | st.integers(0, 60)
FEW = st.none() | st.integers(0, 8)
WHICH = st.integers(0, 60)
BUDGETS = st.sampled_from(["chat", "mail", "support", SITE])
SCOPES = st.sampled_from([SITE, "feature:chat", "user:7"])


class Machine(RuleBasedStateMachine):
    """The ledger and the model, which do the same."""

    store: Store
    redis: Any = None

    @initialize()
    def begin(self) -> None:
        for model in (CallLog, SpendWindow, RateBucket):
            model.objects.all().delete()
        self.store.flush()
        self.model, self.at = Model(), NOON
        self.mix = Mix(
            at=NOON, daily={}, monthly={}, quotas=(Quota(), Quota(for_feature=True)), buckets=()
        )
        self.clock = periods.override_clock(lambda: self.at)
        self.clock.__enter__()

    def teardown(self) -> None:
        if hasattr(self, "clock"):
            self.clock.__exit__(None, None, None)

    # Calls

    @rule(
        charge=st.sampled_from(CHARGES),
        nanousd=st.integers(0, 25),
        calls=st.sampled_from([1, 1, 1, 0]),
        tokens=st.integers(0, 9),
        again=st.booleans(),
    )
    def reserve(self, charge: Charge, nanousd: int, calls: int, tokens: int, again: bool) -> None:
        amounts = Amounts(nanousd=nanousd, calls=calls, tokens=tokens)
        wish = self.mix.wish(charge, amounts)
        room = self.model.has_room(wish.limits, amounts, self.at)
        try:
            reservation = reserve(wish, deadline=self.at + PATIENCE)
        except LimitReached:
            assert not room
            return
        assert room
        entry = Entry(
            reservation=reservation,
            limits=wish.limits,
            amounts=amounts,
            deadline=self.at + PATIENCE,
        )
        self.model.take(entry, self.at)

    @precondition(lambda self: self.model.entries)
    @rule(which=WHICH, percent=st.integers(0, 100), tokens=st.none() | st.integers(0, 9))
    def settle(self, which: int, percent: int, tokens: int | None) -> None:
        """The truth, whether it comes in time, late, or again."""
        entry = self.entry(which)
        used = None if tokens is None else min(tokens, entry.amounts.tokens)
        self.book(entry, settled(entry.amounts.nanousd * percent // 100, tokens=used))

    @precondition(lambda self: self.model.entries)
    @rule(which=WHICH, percent=st.integers(0, 100))
    def estimate(self, which: int, percent: int) -> None:
        entry = self.entry(which)
        self.book(entry, estimated(entry.amounts.nanousd * percent // 100))

    @precondition(lambda self: self.model.entries)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        self.book(self.entry(which), RELEASED)

    def entry(self, which: int) -> Entry:
        return self.model.entries[which % len(self.model.entries)]

    def book(self, entry: Entry, settlement: Settlement) -> None:
        ledgers.current().settle(entry.reservation, settlement)
        self.model.book(entry, settlement, self.at)

    # The world

    @rule(
        time=st.sampled_from(
            [
                timedelta(milliseconds=1),
                timedelta(milliseconds=333),
                timedelta(seconds=7),
                timedelta(seconds=61),
                timedelta(hours=3),
            ]
        )
    )
    def wait(self, time: timedelta) -> None:
        self.move_to(self.at + time)

    @rule(before=st.booleans())
    def come_to_midnight(self, before: bool) -> None:
        midnight = self.at.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        moment = timedelta(milliseconds=1)
        self.move_to(max(self.at, midnight - moment) if before else midnight)

    @rule()
    def come_to_the_end_of_the_month(self) -> None:
        first = periods.next_month(self.at.date().replace(day=1))
        midnight = datetime(first.year, first.month, first.day, tzinfo=self.at.tzinfo)
        self.move_to(max(self.at, midnight - timedelta(milliseconds=1)))

    def move_to(self, at: datetime) -> None:
        self.at = at
        self.mix = replace(self.mix, at=at)

    @rule()
    def tick(self) -> None:
        overdue = self.model.overdue(self.at)
        assert ledgers.current().settle_overdue() == len(overdue)
        for entry in overdue:
            bound = estimated(entry.amounts.nanousd)
            self.model.book(entry, bound, self.at, buckets=False)
        ledgers.current().tidy()

    # Who decides

    @rule(name=BUDGETS, daily=AMOUNT, monthly=AMOUNT)
    def change_budget(self, name: str, daily: int | None, monthly: int | None) -> None:
        self.mix = replace(
            self.mix,
            daily={**self.mix.daily, name: daily},
            monthly={**self.mix.monthly, name: monthly},
        )

    @rule(daily=AMOUNT, calls=FEW, for_feature=st.booleans())
    def change_quota(self, daily: int | None, calls: int | None, for_feature: bool) -> None:
        others = [it for it in self.mix.quotas if it.for_feature != for_feature]
        quota = Quota(for_feature=for_feature, daily_limit=daily, daily_calls=calls)
        self.mix = replace(self.mix, quotas=(*others, quota))

    @rule(scope=SCOPES, tokens=st.booleans(), amount=FEW)
    def change_bucket(self, scope: str, tokens: bool, amount: int | None) -> None:
        measure = Measure.TOKENS if tokens else Measure.REQUESTS
        others = [it for it in self.mix.buckets if (it.scope, it.measure) != (scope, measure)]
        if amount is not None:
            others.append(Bucket(scope=scope, measure=measure, amount=amount))
        self.mix = replace(self.mix, buckets=tuple(others))

    # Redis, which forgets

    @precondition(lambda self: self.redis is not None)
    @rule()
    def flush(self) -> None:
        """All is lost; buckets alone cannot be known again, and begin full."""
        self.redis.flush()
        self.model.levels.clear()

    @precondition(lambda self: self.redis is not None)
    @rule(which=WHICH)
    def evict_a_window(self, which: int) -> None:
        windows = self.windows()
        if windows:
            self.redis.do("DEL", windows[which % len(windows)])

    @precondition(lambda self: self.redis is not None)
    @rule(other=st.booleans(), which=WHICH)
    def lose_a_marker(self, other: bool, which: int) -> None:
        """A window of which nobody knows any more whether it is whole."""
        windows = self.windows()
        if not windows:
            return
        window = windows[which % len(windows)]
        if other:
            self.redis.do("HSET", window, "run", "0" * 40)
        else:
            self.redis.do("HDEL", window, "run")

    @rule()
    def rebuild(self) -> None:
        assert ledgers.current().rebuild(self.at.date().replace(day=1)) == []

    def windows(self) -> list[bytes]:
        found = [
            *self.redis.do("KEYS", "*:day:*"),
            *self.redis.do("KEYS", "*:month:*"),
        ]
        return sorted(found)

    # What must hold

    @invariant()
    def balances_are_the_models_and_the_journals(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = self.model.balances()
        assert journal() == expected
        assert kept({*expected, *self.model.totals}) == expected
        assert ledgers.current().differences(self.at.date().replace(day=1)) == []


def test_any_sequence_ends_as_in_the_model(store: Store) -> None:
    class OfStore(Machine):
        pass

    OfStore.store, OfStore.redis = store, store.redis
    run_state_machine_as_test(
        OfStore,
        settings=settings(max_examples=deep(200, else_=6), stateful_step_count=25, deadline=None),
    )
