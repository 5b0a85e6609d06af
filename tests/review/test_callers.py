"""One caller's figures, and which limits hold for whom and why."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.guard.rules import read_rules
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, TotalState, UserQuota, UserTotal
from ai_budget.policy.limits import limits_in_force
from ai_budget.review import callers, rollups
from ai_budget.review.callers import Caller, LimitInForce, Whose, in_force, quotas_of, spend_of
from ai_budget.values import Limit, Reservation, Settlement, Status
from tests.depth import deep
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    SpendWindowFactory,
    UserFactory,
    UserQuotaFactory,
)
from tests.ledger.given import limits_of as windows_of
from tests.ledger.given import reserve, settle
from tests.review.conftest import NOW

pytestmark = pytest.mark.django_db

CENT = 10_000_000
TODAY = date(2026, 10, 15)


def call(user: Any, *, days_ago: int = 0, **fields: Any) -> CallLog:
    at = NOW - timedelta(days=days_ago)
    return CallLogFactory.create(**{"user": user, "reserved_at": at, **fields})


def of(user: Any) -> Caller:
    return Caller(user_id=user.pk)


# Spend ------------------------------------------------------------------------------------------


def by_day(caller: Caller) -> dict[date, tuple[int, int]]:
    days = spend_of(caller).days
    return {
        it.day: (it.figures.calls, it.figures.spend_nanousd) for it in days if it.figures.attempts
    }


def by_month(caller: Caller) -> dict[date, tuple[int, int]]:
    months = spend_of(caller).months
    return {month: (its.calls, its.spend_nanousd) for month, its in months if its.attempts}


@pytest.mark.parametrize("add_up", [lambda: None, rollups.add_up], ids=["behind", "added up"])
def test_spend_is_told_by_day_and_month(add_up: Callable[[], Any]) -> None:
    anna, other = UserFactory.create_batch(2)
    call(anna, cost_nanousd=3 * CENT)
    call(anna, cost_nanousd=2 * CENT)
    call(anna, days_ago=20, cost_nanousd=5 * CENT)
    call(anna, days_ago=200, cost_nanousd=7 * CENT)
    call(other, cost_nanousd=11 * CENT)

    add_up()

    assert by_day(of(anna)) == {TODAY: (2, 5 * CENT), date(2026, 9, 25): (1, 5 * CENT)}
    assert by_month(of(anna)) == {
        date(2026, 10, 1): (2, 5 * CENT),
        date(2026, 9, 1): (1, 5 * CENT),
        date(2026, 3, 1): (1, 7 * CENT),
    }


def test_every_day_and_month_is_there_the_days_from_the_first_one_on() -> None:
    spend = spend_of(of(UserFactory.create()))

    assert [it.day for it in spend.days] == [
        date(2026, 9, 16) + timedelta(days=offset) for offset in range(30)
    ]
    assert [month for month, _ in spend.months[:3]] == [
        date(2026, 10, 1),
        date(2026, 9, 1),
        date(2026, 8, 1),
    ]
    assert len(spend.months) == 12


def test_what_changed_since_it_was_added_up_counts_once() -> None:
    anna = UserFactory.create()
    call(anna, cost_nanousd=3 * CENT)
    rollups.add_up()

    call(anna, cost_nanousd=2 * CENT)
    call(anna, status="reserved")
    call(anna, status="released")

    assert by_day(of(anna)) == {TODAY: (3, 5 * CENT)}
    assert by_month(of(anna)) == {date(2026, 10, 1): (3, 5 * CENT)}


def test_features_and_models_are_told_the_dearest_first() -> None:
    anna = UserFactory.create()
    call(anna, feature__name="chat", requested_model=HAIKU, cost_nanousd=1)
    call(anna, feature__name="search", requested_model=SONNET, cost_nanousd=5)
    call(anna, feature__name="chat", requested_model=SONNET, cost_nanousd=2)
    call(anna, feature__name="mail", days_ago=30, cost_nanousd=100)

    spend = spend_of(of(anna))

    assert [(name, its.spend_nanousd) for name, its in spend.by_feature] == [
        ("search", 5),
        ("chat", 3),
    ]
    assert [(name, its.spend_nanousd) for name, its in spend.by_model] == [(SONNET, 7), (HAIKU, 1)]


def test_a_subject_has_figures_of_its_own() -> None:
    call(None, subject="tenant,7", cost_nanousd=3)
    call(None, subject="tenant", cost_nanousd=5)
    SpendWindowFactory.create(scope="subject:tenant,,7", refused=4)

    spend = spend_of(Caller(subject="tenant,7"))

    assert spend.total.spend_nanousd == 3
    assert spend.refused == 4


def test_refusals_are_told_by_day() -> None:
    anna = UserFactory.create()
    SpendWindowFactory.create(scope=f"user:{anna.pk}", refused=3)
    SpendWindowFactory.create(
        scope=f"user:{anna.pk}", first_day=TODAY - timedelta(days=2), refused=4
    )
    SpendWindowFactory.create(
        scope=f"user:{anna.pk}", period="month", first_day=date(2026, 10, 1), refused=99
    )

    spend = spend_of(of(anna))

    assert {it.day: it.refused for it in spend.days if it.refused} == {
        TODAY: 3,
        date(2026, 10, 13): 4,
    }
    assert spend.refused == 7


def test_what_was_purged_is_still_told_by_day_and_month() -> None:
    anna = UserFactory.create()
    call(anna, days_ago=10, cost_nanousd=3)
    call(anna, cost_nanousd=5)
    rollups.add_up()
    purged = TODAY - timedelta(days=5)
    CallLog.objects.filter(day__lt=purged).delete()
    TotalState.objects.update(
        purged_before=periods.midnight(purged, conf.TIME_ZONE), purged_day=purged
    )

    spend = spend_of(of(anna))

    assert by_day(of(anna)) == {date(2026, 10, 5): (1, 3), TODAY: (1, 5)}
    assert by_month(of(anna)) == {date(2026, 10, 1): (2, 8)}
    assert spend.purged_day == purged
    assert [its.spend_nanousd for _, its in spend.by_feature] == [5]


def test_days_are_those_of_the_zone_that_limits_count_in(settings: Any) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "TIME_ZONE": "Asia/Kathmandu"}
    anna = UserFactory.create()
    with periods.override_clock(lambda: datetime(2026, 10, 15, 19, tzinfo=UTC)):
        call(anna, reserved_at=datetime(2026, 10, 15, 18, 20, tzinfo=UTC), cost_nanousd=7)

        assert by_day(of(anna)) == {date(2026, 10, 16): (1, 7)}


def test_who_was_purged_has_called_all_the_same() -> None:
    anna: Any = UserFactory.create()
    other = UserFactory.create()
    UserTotal.objects.create(
        user=anna, period="day", first_day=TODAY, attempts=1, calls=1, cost_nanousd=1,
        saved_nanousd=0,
    )  # fmt: skip

    assert callers.has_called(of(anna))
    assert not callers.has_called(of(other))
    assert not callers.has_called(Caller(subject="tenant"))


# Limits -----------------------------------------------------------------------------------------


def hold(user: Any, nanousd: int, *, days_ago: int = 0, feature: str = "chat") -> Reservation:
    """Reserve a call, in the ledger of this run."""
    charge, at = of(user).charge(feature), NOW - timedelta(days=days_ago)
    # Its answer is still awaited, whenever it was asked for.
    deadline = NOW + timedelta(minutes=10)
    return reserve(windows_of(charge, at=at), nanousd, charge=charge, at=at, deadline=deadline)


def book(user: Any, nanousd: int, **call: Any) -> None:
    """Make a call that cost so much."""
    settle(hold(user, nanousd, **call), Settlement(status=Status.SETTLED, cost_nanousd=nanousd))


def limits(user: Any) -> dict[tuple[str, str], LimitInForce]:
    caller = of(user)
    found = callers.limits_of(caller, quotas_of(caller, user=user))
    return {(it.feature, it.name): it for it in found}


def test_without_a_quota_there_is_no_limit_and_nobody_to_say_so() -> None:
    found = limits(UserFactory.create())

    assert {it.amount for it in found.values()} == {None}
    assert {it.whose for it in found.values()} == {None}


def test_each_field_says_whose_quota_decides_it() -> None:
    anna, students = UserFactory.create(), Group.objects.create(name="students")
    anna.groups.add(students)
    UserQuotaFactory.create(user=None, daily_calls=5, daily_limit_usd=1, monthly_limit_usd=10)
    UserQuotaFactory.create(user=None, group=students, daily_calls=20, daily_limit_usd=3)
    own = UserQuotaFactory.create(user=anna, daily_calls=50)

    found = limits(anna)

    calls, day, month = (
        found["*", name] for name in ("daily_calls", "daily_limit_usd", "monthly_limit_usd")
    )
    assert (calls.amount, calls.whose, calls.quota) == (50, Whose.OWN, own)
    assert (day.amount, day.whose) == (300 * CENT, Whose.GROUP)
    assert (month.amount, month.whose) == (1000 * CENT, Whose.EVERYONE)


def test_an_unlimited_quota_is_why_there_is_no_limit() -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=None, daily_calls=5)
    UserQuotaFactory.create(user=anna, daily_calls=None, unlimited=True)

    calls = limits(anna)["*", "daily_calls"]

    assert (calls.amount, calls.whose) == (None, Whose.OWN)


def test_limits_say_what_is_taken_and_when_they_begin_again() -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=anna, daily_calls=5, monthly_limit_usd=10, requests_per_minute=2)
    book(anna, 6 * CENT, days_ago=3)
    book(anna, 3 * CENT)
    hold(anna, CENT)

    found = limits(anna)

    calls, month = found["*", "daily_calls"], found["*", "monthly_limit_usd"]
    assert (calls.used, calls.held, calls.left) == (2, 0, 3)
    assert calls.resets_at == datetime(2026, 10, 16, tzinfo=UTC)
    assert (month.used, month.held, month.left) == (9 * CENT, CENT, 990 * CENT)
    assert month.resets_at == datetime(2026, 11, 1, tzinfo=UTC)
    minute = found["*", "requests_per_minute"]
    assert (minute.amount, minute.period, minute.resets_at) == (2, None, None)


def test_a_feature_has_the_limits_that_a_quota_gives_it_and_no_others() -> None:
    anna, chat = UserFactory.create(), FeatureBudgetFactory.create(name="chat")
    UserQuotaFactory.create(user=anna, feature=chat, daily_calls=None, daily_limit_usd=1)
    UserQuotaFactory.create(feature=FeatureBudgetFactory.create(name="mail"))
    book(anna, 40 * CENT)
    book(anna, 10 * CENT, feature="mail")

    in_features = {key: it for key, it in limits(anna).items() if key[0] != "*"}

    assert set(in_features) == {("chat", "daily_limit_usd")}
    assert in_features["chat", "daily_limit_usd"].left == 60 * CENT


def test_a_subject_follows_the_defaults_alone() -> None:
    UserQuotaFactory.create(user=None, daily_calls=5)
    UserQuotaFactory.create(daily_calls=7)
    caller = Caller(subject="tenant")

    (calls, *_rest) = callers.limits_of(caller, quotas_of(caller))

    assert (calls.amount, calls.whose) == (5, Whose.EVERYONE)


def test_balances_are_those_copied_last_where_the_ledger_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Any, keys: Any) -> Any:
        raise LedgerUnavailable("down")

    anna = UserFactory.create()
    UserQuotaFactory.create(user=anna, daily_limit_usd=1)
    SpendWindowFactory.create(scope=f"user:{anna.pk}", spent_nanousd=40 * CENT)
    monkeypatch.setattr(type(ledgers.current()), "balances", fail)

    assert limits(anna)["*", "daily_limit_usd"].left == 60 * CENT


AMOUNTS = st.none() | st.integers(0, 3)


@settings(max_examples=deep(200, else_=15))
@given(
    rows=st.dictionaries(
        st.tuples(st.sampled_from(["own", "wheel", "staff", "everyone"]), st.booleans()),
        st.tuples(st.booleans(), AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS),
    ),
    order=st.booleans(),
)
def test_what_is_shown_is_what_the_guard_goes_by(
    rows: dict[tuple[str, bool], tuple[Any, ...]], order: bool
) -> None:
    UserQuota.objects.all().delete()
    Group.objects.all().delete()
    anna, chat = UserFactory.create(), FeatureBudgetFactory.create(name="chat")
    groups = {name: Group.objects.create(name=name) for name in ("wheel", "staff")}
    anna.groups.set(groups.values())
    for (whose, in_feature), (unlimited, *amounts) in rows.items():
        UserQuotaFactory.create(
            user=anna if whose == "own" else None,
            group=groups.get(whose),
            priority=100 + (order if whose == "wheel" else not order),
            feature=chat if in_feature else None,
            unlimited=unlimited,
            **dict(zip(callers.LIMITING, amounts, strict=True)),
        )
    caller = of(anna)

    quotas = quotas_of(caller, user=anna)
    shown = {
        (it.feature, it.measure, it.period): it.amount
        for it in in_force(caller, quotas, at=NOW)
        if it.amount is not None
    }

    charge = caller.charge("chat")
    guarded = limits_in_force(charge, read_rules(charge, at=NOW), at=NOW, zone=conf.TIME_ZONE)
    assert shown == {
        (
            "chat" if it.scope.endswith(",feature:chat") else "*",
            it.measure,
            it.window.period if isinstance(it, Limit) else None,
        ): it.amount
        for it in guarded
        if it.scope.startswith("user:") and it.amount is not None
    }
    for it in in_force(caller, quotas, at=NOW):
        if it.amount is not None:
            assert it.quota is not None
            value = getattr(it.quota, it.name)
            assert it.amount == (value * 100 * CENT if it.name.endswith("usd") else value)


def test_the_newest_calls_come_first_those_in_flight_too() -> None:
    anna = UserFactory.create()
    old, new = call(anna, days_ago=1), call(anna, status="reserved")
    call(UserFactory.create())
    call(anna, days_ago=2)

    assert callers.last_calls(of(anna), most=2) == [new, old]
