"""What is in force for a charge, as somebody typed it into the admin a moment ago."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Group
from django.db import OperationalError, connection, connections
from django.test import override_settings
from pytest_django import DjangoAssertNumQueries

from ai_budget.exceptions import FeatureDisabled, LedgerUnavailable
from ai_budget.guard.rules import create_if_new, read_rules
from ai_budget.models import FeatureBudget
from ai_budget.policy.limits import Budget, Quota, Rules, Rung
from ai_budget.values import SITE, Charge
from tests.factories import (
    DowngradeRungFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    UserFactory,
    UserQuotaFactory,
)

pytestmark = pytest.mark.django_db

AT = datetime(2026, 5, 4, 12, tzinfo=UTC)
DOLLAR = 1_000_000_000
SITE_LIMITS = {"DAILY_LIMIT_USD": "10", "MONTHLY_LIMIT_USD": "100"}


@pytest.fixture(autouse=True)
def settings_of_the_site() -> Iterator[None]:
    with override_settings(AI_BUDGET=SITE_LIMITS):
        yield


def rules(feature: str = "chat", *, at: datetime = AT, **caller: Any) -> Rules:
    return read_rules(Charge(feature=feature, **caller), at=at)


def budget(name: str = "chat", **fields: Any) -> FeatureBudget:
    made: FeatureBudget = FeatureBudgetFactory.create(name=name, **fields)
    return made


# The feature -------------------------------------------------------------------------------------


def test_a_feature_has_what_its_row_says() -> None:
    budget(
        daily_limit_usd=5,
        monthly_limit_usd="0.000000001",
        model="claude-opus-5-5",
        max_tokens=300,
        enforce=False,
        enabled=False,
        allow_unbounded=True,
    )

    feature = rules().feature

    assert (feature.daily_limit, feature.monthly_limit) == (5 * DOLLAR, 1)
    assert (feature.model, feature.max_tokens) == ("claude-opus-5-5", 300)
    assert (feature.enforce, feature.enabled, feature.allow_unbounded) == (False, False, True)


def test_a_feature_without_limits_has_none() -> None:
    budget()

    feature = rules().feature

    assert (feature.daily_limit, feature.monthly_limit, feature.max_tokens) == (None, None, None)
    assert (feature.enforce, feature.enabled, feature.allow_unbounded) == (True, True, False)


def test_a_feature_has_its_rates() -> None:
    budget(requests_per_minute=20, tokens_per_minute=9_000_000_000)
    budget(SITE, requests_per_minute=0)

    found = rules()

    assert (found.feature.requests_per_minute, found.feature.tokens_per_minute) == (
        20,
        9_000_000_000,
    )
    assert (found.site.requests_per_minute, found.site.tokens_per_minute) == (0, None)


def test_a_limit_of_nothing_is_no_missing_limit() -> None:
    budget(daily_limit_usd=0)

    assert rules().feature.daily_limit == 0


def test_a_change_is_in_force_at_the_next_call() -> None:
    budget(daily_limit_usd=5)
    before = rules().feature.daily_limit
    FeatureBudget.objects.update(daily_limit_usd=1)

    assert (before, rules().feature.daily_limit) == (5 * DOLLAR, DOLLAR)


def test_another_feature_changes_nothing() -> None:
    budget(daily_limit_usd=5)
    other = budget("search", daily_limit_usd=1)
    DowngradeRungFactory.create(budget=other)
    LimitOverrideFactory.create(
        budget=other, period="day", amount_usd=50, until=AT + timedelta(days=1)
    )

    assert rules().feature.daily_limit == 5 * DOLLAR
    assert rules().rungs == ()


# Its category ------------------------------------------------------------------------------------


def test_a_feature_without_a_category_has_none() -> None:
    budget()

    assert rules().category is None
    assert rules().category_name == ""


def test_a_feature_counts_against_its_category() -> None:
    budget(parent=budget("support", daily_limit_usd=6))
    budget("mail", parent=budget("support"))

    category = rules().category

    assert category is not None
    assert (category.name, category.daily_limit) == ("support", 6 * DOLLAR)
    assert rules().feature.name == "chat"


def test_a_call_for_a_category_itself_counts_with_those_of_its_features() -> None:
    """Its limit must hold for both together."""
    support = budget("support", daily_limit_usd=6)
    budget("chat", parent=support)
    budget("mail", parent=support)

    of_category = rules("support")

    assert of_category.category == of_category.feature
    assert of_category.category is not of_category.feature
    assert of_category.category_name == "support"


# The site ----------------------------------------------------------------------------------------


def test_the_settings_limit_a_site_that_has_no_row() -> None:
    site = rules().site

    assert (site.name, site.daily_limit, site.monthly_limit) == (SITE, 10 * DOLLAR, 100 * DOLLAR)
    assert site.enabled
    assert site.enforce


def test_the_row_of_the_site_wins_over_the_settings() -> None:
    budget(SITE, daily_limit_usd=3, monthly_limit_usd=0, enforce=False)

    site = rules().site

    assert (site.daily_limit, site.monthly_limit, site.enforce) == (3 * DOLLAR, 0, False)


def test_the_settings_fill_in_what_the_row_of_the_site_leaves_open() -> None:
    budget(SITE, monthly_limit_usd=30)

    site = rules().site

    assert (site.daily_limit, site.monthly_limit) == (10 * DOLLAR, 30 * DOLLAR)


@pytest.mark.parametrize("row", [True, False])
def test_a_site_without_any_limit_has_none(row: bool) -> None:
    if row:
        budget(SITE)
    with override_settings(AI_BUDGET={"DAILY_LIMIT_USD": None, "MONTHLY_LIMIT_USD": None}):
        site = rules().site

    assert (site.daily_limit, site.monthly_limit) == (None, None)


def test_an_override_raises_what_the_settings_say() -> None:
    LimitOverrideFactory.create(
        budget=budget(SITE), period="day", amount_usd=50, until=AT + timedelta(days=1)
    )

    assert rules().site.daily_limit == 50 * DOLLAR


def test_the_settings_do_not_limit_a_feature() -> None:
    assert rules().feature.daily_limit is None


# Overrides ---------------------------------------------------------------------------------------


def raised(*amounts: tuple[str, int, timedelta], limit: int | None = 5) -> Rules:
    """The rules of a feature with a limit a day and overrides: period, amount, how long still."""
    chat = budget(daily_limit_usd=limit, monthly_limit_usd=None if limit is None else limit * 10)
    for period, amount, left in amounts:
        LimitOverrideFactory.create(budget=chat, period=period, amount_usd=amount, until=AT + left)
    return rules()


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("amounts", "daily"),
    [
        pytest.param([("day", 9, HOUR)], 9, id="in-force"),
        pytest.param([("day", 9, -HOUR)], 5, id="expired"),
        pytest.param([("day", 9, timedelta(0))], 5, id="expired-this-moment"),
        pytest.param([("day", 9, timedelta(microseconds=1))], 9, id="the-last-moment"),
        pytest.param([("day", 9, HOUR), ("day", 12, HOUR), ("day", 7, HOUR)], 12, id="highest"),
        pytest.param([("day", 9, HOUR), ("day", 12, -HOUR)], 9, id="highest-in-force"),
        pytest.param([("day", 3, HOUR)], 5, id="a-raise-never-lowers"),
        pytest.param([("month", 90, HOUR)], 5, id="of-the-month"),
    ],
)
def test_an_override_raises_a_limit(amounts: list[tuple[str, int, timedelta]], daily: int) -> None:
    assert raised(*amounts).feature.daily_limit == daily * DOLLAR


def test_an_override_of_the_month_raises_the_month() -> None:
    assert raised(("month", 90, HOUR), ("day", 99, HOUR)).feature.monthly_limit == 90 * DOLLAR


def test_an_override_limits_nothing_that_had_no_limit() -> None:
    assert raised(("day", 9, HOUR), limit=None).feature.daily_limit is None


def test_an_override_raises_a_limit_of_nothing() -> None:
    assert raised(("day", 9, HOUR), limit=0).feature.daily_limit == 9 * DOLLAR


def test_an_override_is_over_when_it_is_over() -> None:
    raised(("day", 9, HOUR))

    assert rules(at=AT + HOUR).feature.daily_limit == 5 * DOLLAR


def test_an_override_of_a_category_raises_the_category() -> None:
    support = budget("support", daily_limit_usd=6)
    budget(parent=support, daily_limit_usd=5)
    LimitOverrideFactory.create(budget=support, period="day", amount_usd=60, until=AT + HOUR)

    found = rules()

    assert found.category is not None
    assert (found.feature.daily_limit, found.category.daily_limit) == (5 * DOLLAR, 60 * DOLLAR)


# The ladder --------------------------------------------------------------------------------------


def test_rungs_come_in_their_order() -> None:
    chat = budget()
    DowngradeRungFactory.create(budget=chat, at_percent=80, model="haiku")
    DowngradeRungFactory.create(budget=chat, at_percent=50, model="sonnet")

    assert rules().feature.rungs == (
        Rung(at_percent=50, model="sonnet"),
        Rung(at_percent=80, model="haiku"),
    )


@pytest.mark.parametrize("overrides", [0, 1, 3])
@pytest.mark.parametrize("children", [0, 2])
def test_rungs_and_overrides_do_not_multiply_each_other(overrides: int, children: int) -> None:
    chat = budget(daily_limit_usd=5)
    for percent in (50, 80, 90):
        DowngradeRungFactory.create(budget=chat, at_percent=percent)
    for amount in range(overrides):
        LimitOverrideFactory.create(budget=chat, period="day", amount_usd=amount, until=AT + HOUR)
    for number in range(children):
        budget(f"child-{number}", parent=chat)

    feature = rules().feature

    assert [rung.at_percent for rung in feature.rungs] == [50, 80, 90]
    assert feature.daily_limit == 5 * DOLLAR


def test_each_budget_has_its_own_ladder() -> None:
    support, site = budget("support"), budget(SITE)
    chat = budget(parent=support)
    for percent, of in ((50, chat), (60, support), (70, site)):
        DowngradeRungFactory.create(budget=of, at_percent=percent)

    found = rules()

    assert [rung.at_percent for one in found.budgets for rung in one.rungs] == [50, 60, 70]


# Unknown features --------------------------------------------------------------------------------


def test_an_unknown_feature_has_the_defaults_and_is_not_created() -> None:
    found = rules("brand-new", subject="acme")

    assert (found.feature.name, found.feature.daily_limit) == ("brand-new", None)
    assert found.feature.is_new
    assert not FeatureBudget.objects.exists()


def test_it_is_created_once_with_its_first_reservation() -> None:
    found = rules("brand-new")

    create_if_new(found.feature)
    create_if_new(found.feature)

    assert FeatureBudget.objects.get().name == "brand-new"
    assert rules("brand-new").feature == replace(found.feature, is_new=False)


def test_one_that_cannot_be_created_now_is_created_by_the_next_call() -> None:
    def locked(*args: Any) -> None:
        raise OperationalError("the table is locked")

    with connection.execute_wrapper(locked):
        create_if_new(Budget(name="brand-new", is_new=True))


def test_an_unknown_feature_is_refused_where_the_settings_say_so() -> None:
    with (
        override_settings(AI_BUDGET={"UNKNOWN_FEATURE": "refuse"}),
        pytest.raises(FeatureDisabled, match="no budget for the feature 'brand-new'"),
    ):
        rules("brand-new")

    assert not FeatureBudget.objects.exists()


def test_a_known_feature_is_not_refused() -> None:
    budget()

    with override_settings(AI_BUDGET={"UNKNOWN_FEATURE": "refuse"}):
        assert rules().feature.name == "chat"


@pytest.mark.parametrize(
    "name", ["", "my chat", "a,b", "a:b", "a|b", "chat\n", "käse", "f" * 65, "a/b", "' OR 1"]
)
@pytest.mark.parametrize("unknown", ["create", "refuse"])
def test_what_cannot_be_a_name_is_refused(name: str, unknown: str) -> None:
    with (
        override_settings(AI_BUDGET={"UNKNOWN_FEATURE": unknown}),
        pytest.raises(FeatureDisabled, match="cannot be a feature's name"),
    ):
        rules(name)

    assert not FeatureBudget.objects.exists()


@pytest.mark.parametrize("row", [True, False])
def test_nobody_makes_calls_for_the_whole_site(row: bool) -> None:
    if row:
        budget(SITE)

    with pytest.raises(FeatureDisabled):
        rules(SITE)


def test_names_are_told_apart_by_their_letters() -> None:
    """Where a database takes both for one, the second is refused: its balance has another name."""
    budget("chat", daily_limit_usd=5)

    try:
        limit = rules("Chat").feature.daily_limit
    except FeatureDisabled:
        assert connection.vendor == "mysql"
        return
    assert limit is None


# Quotas ------------------------------------------------------------------------------------------


def quotas(**caller: Any) -> tuple[Quota, ...]:
    return tuple(
        sorted(rules(**caller).quotas, key=lambda quota: (quota.for_user, quota.for_feature))
    )


EVERYONES = Quota(daily_calls=1, daily_limit=2 * DOLLAR, monthly_limit=3 * DOLLAR)
AMOUNTS: dict[str, Any] = {"daily_calls": 1, "daily_limit_usd": 2, "monthly_limit_usd": 3}


def test_everyones_quota_is_every_users() -> None:
    UserQuotaFactory.create(user=None, **AMOUNTS)

    assert quotas(user_id=UserFactory.create().pk) == (EVERYONES,)


def test_everyones_quota_is_every_subjects() -> None:
    UserQuotaFactory.create(user=None, **AMOUNTS)

    assert quotas(subject="acme") == (EVERYONES,)


def test_nobody_has_no_quota() -> None:
    UserQuotaFactory.create(user=None, **AMOUNTS)

    assert quotas() == ()


def test_a_users_own_quota_is_the_users() -> None:
    user = UserFactory.create()
    UserQuotaFactory.create(user=user, **AMOUNTS)

    assert quotas(user_id=user.pk) == (replace(EVERYONES, for_user=True),)


def test_a_users_own_quota_is_nobody_elses() -> None:
    UserQuotaFactory.create(**AMOUNTS)

    assert quotas(user_id=UserFactory.create().pk) == ()
    assert quotas(subject="acme") == ()


def test_a_quota_for_a_feature_is_for_that_feature() -> None:
    UserQuotaFactory.create(user=None, feature=budget(), **AMOUNTS)
    UserQuotaFactory.create(user=None, feature=budget("search"), daily_calls=9)

    assert quotas(user_id=UserFactory.create().pk) == (replace(EVERYONES, for_feature=True),)


def test_all_that_is_for_a_user_is_found() -> None:
    user, chat = UserFactory.create(), budget()
    UserQuotaFactory.create(user=None, daily_calls=1)
    UserQuotaFactory.create(user=None, feature=chat, daily_calls=2)
    UserQuotaFactory.create(user=user, daily_calls=3)
    UserQuotaFactory.create(user=user, feature=chat, unlimited=True, daily_calls=None)

    assert quotas(user_id=user.pk) == (
        Quota(daily_calls=1),
        Quota(for_feature=True, daily_calls=2),
        Quota(for_user=True, daily_calls=3),
        Quota(for_user=True, for_feature=True, unlimited=True),
    )


def test_zero_is_a_quota() -> None:
    UserQuotaFactory.create(user=None, daily_calls=0, daily_limit_usd=0, monthly_limit_usd=0)

    assert quotas(subject="acme") == (Quota(daily_calls=0, daily_limit=0, monthly_limit=0),)


def test_the_rates_of_a_quota_are_the_callers() -> None:
    UserQuotaFactory.create(
        user=None, daily_calls=None, requests_per_minute=20, tokens_per_minute=9_000_000_000
    )

    assert quotas(subject="acme") == (
        Quota(requests_per_minute=20, tokens_per_minute=9_000_000_000),
    )


# Groups ------------------------------------------------------------------------------------------


def member(*groups: Group) -> Any:
    """A user who is in these groups."""
    user: Any = UserFactory.create()
    user.groups.set(groups)
    return user


def group(name: str = "staff", *, priority: int = 100, **fields: Any) -> Group:
    """A group with a quota."""
    made = Group.objects.create(name=name)
    UserQuotaFactory.create(
        user=None, group=made, priority=priority, **{"daily_calls": None, **fields}
    )
    return made


def test_a_groups_quota_is_each_members() -> None:
    staff = group(**AMOUNTS)

    assert quotas(user_id=member(staff).pk) == (replace(EVERYONES, group=(100, staff.pk)),)


def test_the_quotas_of_all_of_a_members_groups_are_found() -> None:
    staff, guests = group(priority=5, daily_calls=7), group("guests", priority=3, daily_calls=1)
    group("others", daily_calls=9)

    assert set(quotas(user_id=member(staff, guests).pk)) == {
        Quota(group=(5, staff.pk), daily_calls=7),
        Quota(group=(3, guests.pk), daily_calls=1),
    }


def test_a_groups_quota_for_a_feature_is_for_that_feature() -> None:
    chat, search = budget(), budget("search")
    staff = group(feature=chat, daily_calls=7)
    UserQuotaFactory.create(user=None, group=staff, feature=search, daily_calls=9)

    assert quotas(user_id=member(staff).pk) == (
        Quota(group=(100, staff.pk), for_feature=True, daily_calls=7),
    )


def test_who_leaves_a_group_leaves_its_quota() -> None:
    staff = group(daily_calls=7)
    user = member(staff)
    user.groups.remove(staff)

    assert quotas(user_id=user.pk) == ()


def test_a_groups_quota_is_no_subjects() -> None:
    group(daily_calls=7)

    assert quotas(subject="acme") == ()


def test_users_without_groups_have_their_own_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user model need not have permissions, and then nobody is in a group."""
    user = UserFactory.create()
    UserQuotaFactory.create(user=user, daily_calls=3)
    monkeypatch.setattr("ai_budget.guard.rules.get_user_model", lambda: LogEntry)

    assert quotas(user_id=user.pk) == (Quota(for_user=True, daily_calls=3),)


def test_a_groups_quota_is_not_everyones() -> None:
    group = Group.objects.create(name="staff")
    UserQuotaFactory.create(user=None, group=group, **AMOUNTS)

    assert quotas(user_id=UserFactory.create().pk) == ()


# The reading -------------------------------------------------------------------------------------


def test_two_queries_are_enough(django_assert_num_queries: DjangoAssertNumQueries) -> None:
    user, chat = UserFactory.create(), budget(parent=budget("support"))
    DowngradeRungFactory.create(budget=chat)
    UserQuotaFactory.create(user=user)
    user.groups.add(group(daily_calls=7))
    rules(user_id=user.pk)

    with django_assert_num_queries(2):
        rules(user_id=user.pk)


def test_rules_that_cannot_be_read_are_an_error_of_ours() -> None:
    def broken(*args: Any) -> None:
        raise OperationalError("the server went away")

    with (
        connection.execute_wrapper(broken),
        pytest.raises(LedgerUnavailable, match="OperationalError") as raised,
    ):
        rules()

    assert raised.value.__cause__ is None


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_a_feature_that_many_threads_find_unknown_is_created_once() -> None:
    start = threading.Barrier(8)

    def work(_number: int) -> str:
        try:
            connection.ensure_connection()
            start.wait(timeout=30)
            feature = rules("brand-new").feature
            create_if_new(feature)
            return feature.name
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert set(pool.map(work, range(8))) == {"brand-new"}
    assert FeatureBudget.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_rules_are_read_over_a_new_connection_where_the_old_one_was_lost() -> None:
    budget(daily_limit_usd=5)
    lost = connection.connection

    def hung_up(execute: Any, *rest: Any) -> Any:
        if connection.connection is lost:
            connection.close()
            raise OperationalError("the server closed the connection")
        return execute(*rest)

    with connection.execute_wrapper(hung_up):
        assert rules().feature.daily_limit == 5 * DOLLAR
