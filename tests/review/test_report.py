from __future__ import annotations

import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from pytest_django import DjangoAssertNumQueries
from pytest_django.fixtures import Settings

from ai_budget.models import CallLog
from ai_budget.review import rollups
from ai_budget.review.caching import Caching
from ai_budget.review.report import Report, cost_report
from ai_budget.review.spans import Span
from ai_budget.review.spending import FeatureSpend, Total, levers_of
from tests.depth import deep
from tests.factories import (
    HAIKU,
    OPUS,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    SpendWindowFactory,
    UserFactory,
    mark,
)
from tests.queries import statements
from tests.review.conftest import NOW

pytestmark = pytest.mark.django_db

DOLLAR = 1_000_000_000
Status = CallLog.Status


def feature(report: Report, name: str) -> FeatureSpend:
    (found,) = (row for row in report.features if row.feature == name)
    return found


# What counts ------------------------------------------------------------------------------------


def test_an_empty_span_has_no_rows_and_divides_by_nothing(october: Span) -> None:
    report = cost_report(october)

    assert report.is_empty
    assert report.total == Total(budget_nanousd=100 * DOLLAR)
    assert report.total.hit_rate is None
    assert report.total.cost_per_active_user_nanousd is None
    assert (report.features, report.users, report.models, report.downgrades) == ((), (), (), ())


def test_the_range_is_half_open_and_follows_the_reservation(october: Span) -> None:
    for at in (october.since, october.until, october.since - timedelta(microseconds=1)):
        CallLogFactory.create(reserved_at=at, settled_at=NOW, cost_nanousd=5)

    assert cost_report(october).total.spend_nanousd == 5


def test_a_span_must_begin_before_it_ends() -> None:
    with pytest.raises(ValueError, match="begins"):
        Span(since=NOW, until=NOW)


def test_each_status_counts_as_what_it_is(october: Span) -> None:
    CallLogFactory.create(cost_nanousd=100)
    CallLogFactory.create(status=Status.ESTIMATED, cost_nanousd=20)
    CallLogFactory.create(status=Status.RESERVED, reserved_nanousd=7)
    CallLogFactory.create(status=Status.RELEASED)
    CallLogFactory.create(status=Status.CACHED, cache_checked=True)

    total = cost_report(october).total

    assert (total.spend_nanousd, total.held_nanousd) == (120, 7)
    assert (total.calls, total.attempts, total.cached) == (4, 4, 1)
    assert total.hit_rate == Decimal("100.0")


def test_the_hit_rate_is_of_the_calls_that_were_looked_up(october: Span) -> None:
    CallLogFactory.create_batch(3, cache_checked=True)
    CallLogFactory.create(cache_checked=True, counted=0)  # a repeat of one of them
    CallLogFactory.create(status=Status.CACHED, counted=0, cache_checked=True, saved_nanousd=70)
    CallLogFactory.create_batch(4)  # the cache was off

    (feature,) = cost_report(october).features

    assert (feature.looked_up, feature.cached) == (4, 1)
    assert feature.hit_rate == Decimal("25.0")
    assert feature.saved_nanousd == 70


def test_what_only_helps_a_call_is_no_call_and_no_hit(october: Span) -> None:
    CallLogFactory.create(kind="router", counted=0, cost_nanousd=5, cache_checked=True)
    CallLogFactory.create(kind="router", counted=0, status=Status.CACHED, cache_checked=True)

    total = cost_report(october).total

    assert (total.calls, total.cached, total.looked_up) == (0, 0, 0)
    assert total.spend_nanousd == 5


@pytest.mark.parametrize(
    ("looked_up", "cached", "worthless"),
    [(499, 0, False), (500, 99, True), (500, 100, False), (5_000, 999, True)],
)
def test_a_cache_that_finds_too_little_is_named(
    looked_up: int, cached: int, worthless: bool
) -> None:
    caching = Caching(feature="chat", looked_up=looked_up, cached=cached)

    assert caching.is_worthless is worthless


def test_savings_are_listed_by_lever(october: Span) -> None:
    CallLogFactory.create(saved_nanousd=50, saved_reason="prompt cache")
    CallLogFactory.create(saved_nanousd=-20, saved_reason="prompt cache")
    CallLogFactory.create(saved_nanousd=90, saved_reason="routing")
    CallLogFactory.create(kind="router", counted=0, saved_nanousd=-5, saved_reason="routing")
    CallLogFactory.create()

    report = cost_report(october)

    assert [(it.lever, it.calls, it.saved_nanousd) for it in report.savings] == [
        ("routing", 1, 85),
        ("prompt cache", 2, 30),
    ]
    assert report.total.saved_nanousd == 115


def test_the_same_levers_are_one_whatever_the_order_they_are_named_in(october: Span) -> None:
    for reason in (
        "batch, prompt cache, downgrade",
        "downgrade, prompt cache, batch",
        "something new, batch",
    ):
        CallLogFactory.create(saved_nanousd=5, saved_reason=reason)

    assert [(it.levers, it.calls, it.saved_nanousd) for it in cost_report(october).savings] == [
        (("prompt cache", "batch", "downgrade"), 2, 10),
        (("batch", "something new"), 1, 5),
    ]


def test_a_model_says_what_its_tokens_cost(october: Span) -> None:
    CallLogFactory.create(
        cost_nanousd=9_000, input_tokens=100, cache_read_tokens=300, output_tokens=40
    )
    CallLogFactory.create(
        cost_nanousd=1_000,
        input_tokens=0,
        cache_write_5m_tokens=50,
        cache_write_1h_tokens=50,
        output_tokens=10,
    )

    (model,) = cost_report(october).models

    assert (model.average_prompt_tokens, model.average_output_tokens) == (250, 25)
    assert (model.average_cost_nanousd, model.cost_per_1000_output_nanousd) == (5_000, 200_000)
    assert model.cache_read_share == Decimal("60.0")


def test_a_category_has_its_own_plan_and_what_is_in_none_has_no_plan(october: Span) -> None:
    product = FeatureBudgetFactory.create(name="product", monthly_plan_usd=10)
    FeatureBudgetFactory.create(name="chat", parent=product)
    SpendWindowFactory.create(scope="feature:chat", refused=3)
    CallLogFactory.create(category="product", cost_nanousd=13 * DOLLAR, model=HAIKU)
    CallLogFactory.create(feature__name="search", cost_nanousd=DOLLAR)

    product_spend, rest = cost_report(october).categories

    assert (product_spend.category, product_spend.plan_used) == ("product", Decimal("130.0"))
    assert product_spend.is_over_plan
    assert (product_spend.refused, product_spend.downgraded) == (3, 1)
    assert (rest.category, rest.plan_nanousd, rest.refused) == ("", None, 0)


def test_without_categories_there_is_no_such_section(october: Span) -> None:
    CallLogFactory.create()

    assert cost_report(october).categories == ()


def test_a_users_refusals_are_counted_and_nobody_knows_those_of_a_model(october: Span) -> None:
    user = UserFactory.create()
    SpendWindowFactory.create(scope=f"user:{user.pk}", refused=4)
    CallLogFactory.create(user=user)

    assert cost_report(replace(october, user_id=user.pk)).total.refused == 4
    assert cost_report(replace(october, user_id=user.pk, feature="chat")).total.refused is None
    assert cost_report(replace(october, model=SONNET)).total.refused is None
    assert cost_report(replace(october, tag=("a", "b"))).refusals == ()


def test_refusals_of_many_years_are_all_there(october: Span) -> None:
    for name in ("chat", "search", "digest"):
        FeatureBudgetFactory.create(name=name)
    SpendWindowFactory.create(scope="feature:chat", first_day=date(1990, 1, 1), refused=1)
    SpendWindowFactory.create(scope="feature:search", first_day=date(2026, 10, 1), refused=2)
    SpendWindowFactory.create(scope="user:1", first_day=date(2026, 10, 1), refused=9)
    long = replace(october, since=datetime(1980, 1, 1, tzinfo=UTC))

    assert [(it.feature, it.refused) for it in cost_report(long).refusals] == [
        ("search", 2),
        ("chat", 1),
    ]
    assert cost_report(long).weeks == ()


def test_who_only_had_released_attempts_is_not_listed(october: Span) -> None:
    CallLogFactory.create(status=Status.RELEASED, user=UserFactory.create(), subject="tenant-1")

    report = cost_report(october)

    assert report.total.attempts == 1
    assert (report.features, report.users, report.subjects, report.models) == ((), (), (), ())


def test_the_repeats_of_a_call_are_attempts_and_no_calls(october: Span) -> None:
    call_id = uuid.uuid4()
    CallLogFactory.create(call_id=call_id, status=Status.ESTIMATED, cost_nanousd=30)
    CallLogFactory.create(call_id=call_id, attempt=1, counted=0, cost_nanousd=10)

    report = cost_report(october)

    assert (report.total.calls, report.total.attempts) == (1, 2)
    assert report.models[0].average_cost_nanousd == 40


# The figures are the sums -----------------------------------------------------------------------


_UNSAVED = {Status.RESERVED, Status.RELEASED}


def random_rows(seed: int) -> list[CallLog]:
    """A month of calls around October, in every status, some without a user."""
    dice = random.Random(seed)
    features = [FeatureBudgetFactory.create(name=name) for name in ("chat", "search", "digest")]
    users = [*UserFactory.create_batch(4), None]
    rows = []
    for _ in range(300):
        status = dice.choice(list(Status))
        free = status in {Status.RELEASED, Status.CACHED}
        cost = 0 if free else dice.choice([0, 1, dice.randrange(10**12)])
        asked = dice.choice([SONNET, OPUS])
        rows.append(
            CallLogFactory.build(
                feature=dice.choice(features),
                category=dice.choice(["", "product", "product"]),
                tags=dice.choice([{}, {"plan": "free"}, {"plan": "pro"}]),
                saved_reason=dice.choice(["", "batch", "batch, downgrade", "downgrade, batch"]),
                saved_nanousd=0 if status in _UNSAVED else dice.randrange(-(10**6), 10**9),
                user=dice.choice(users),
                subject=dice.choice(["", "tenant-1", "tenant-2"]),
                status=status,
                counted=dice.choice([0, 1]),
                requested_model=asked,
                model=dice.choice([asked, HAIKU]),
                output_tokens=dice.randrange(2000),
                reserved_nanousd=dice.randrange(10**12),
                cost_nanousd=None if status == Status.RESERVED else cost,
                reserved_at=datetime(2026, 9, 25, tzinfo=UTC)
                + timedelta(seconds=dice.randrange(45 * 86400)),
            )
        )
    # Most are in the totals, and some were settled since.
    CallLog.objects.bulk_create(rows)
    for row in rows:
        mark(row)
    rollups.add_up()
    for row in rows[:15]:
        if row.status == Status.RESERVED:
            row.status, row.cost_nanousd = Status.SETTLED, 7
            row.save()
        mark(row)
    return rows


def plain_sums(rows: list[CallLog], *, by: str) -> dict[Any, tuple[int, int]]:
    """Spend and calls of each group, counted one row after the other."""
    spend: Counter[Any] = Counter()
    calls: Counter[Any] = Counter()
    for row in rows:
        key = getattr(row, by)
        if row.status in {Status.SETTLED, Status.ESTIMATED}:
            spend[key] += row.cost_nanousd or 0
            calls[key] += row.counted
        if row.status == Status.RESERVED:
            calls[key] += row.counted
        if row.status == Status.CACHED:
            calls[key] += 1
    return {
        key: (spend[key], calls[key])
        for key in {getattr(row, by) for row in rows if row.status != Status.RELEASED}
    }


@pytest.mark.parametrize("seed", range(deep(5, else_=2)))
def test_every_section_equals_a_plain_sum_over_the_rows(october: Span, seed: int) -> None:
    rows = [it for it in random_rows(seed) if october.since <= it.reserved_at < october.until]

    report = cost_report(october, top=1000)

    everything = plain_sums(rows, by="provider")["anthropic"]
    assert (report.total.spend_nanousd, report.total.calls) == everything
    assert report.total.attempts == sum(row.status != Status.CACHED for row in rows)
    held = [row.reserved_nanousd for row in rows if row.status == Status.RESERVED]
    assert report.total.held_nanousd == sum(held)
    assert report.total.held_nanousd == sum(it.held_nanousd for it in report.features)

    by_user = plain_sums(rows, by="user_id")
    by_user.pop(None, None)
    assert {it.user_id: (it.spend_nanousd, it.calls) for it in report.users} == by_user
    assert report.total.active_users == len(by_user)
    assert report.total.spend_by_users_nanousd == sum(spend for spend, _ in by_user.values())

    by_subject = plain_sums(rows, by="subject")
    by_subject.pop("", None)
    assert {it.subject: (it.spend_nanousd, it.calls) for it in report.subjects} == by_subject

    features = {it.feature: (it.spend_nanousd, it.calls) for it in report.features}
    assert features == plain_sums(rows, by="feature_id")
    categories = {it.category: (it.spend_nanousd, it.calls) for it in report.categories}
    assert categories == plain_sums(rows, by="category")
    assert sum(report.days.values()) == report.total.spend_nanousd
    by_day = plain_sums(rows, by="day")
    for day in {day for day, _ in report.days}:
        assert sum(cost for (on, _), cost in report.days.items() if on == day) == by_day[day][0]
    models = {it.model: (it.spend_nanousd, it.calls) for it in report.models}
    assert models == plain_sums(rows, by="model")

    downgraded: dict[str, list[CallLog]] = defaultdict(list)
    for row in rows:
        if row.model != row.requested_model:
            downgraded[f"{row.feature_id} {row.requested_model} {row.model}"].append(row)
    assert {
        f"{it.feature} {it.requested_model} {it.model}": (it.spend_nanousd, it.calls)
        for it in report.downgrades
    } == {key: plain_sums(group, by="provider")["anthropic"] for key, group in downgraded.items()}


@pytest.mark.parametrize(
    ("about", "is_meant"),
    [
        ({"feature": "chat"}, lambda row: row.feature_id == "chat"),
        ({"feature": "product"}, lambda row: row.category == "product"),
        ({"model": HAIKU}, lambda row: row.model == HAIKU),
        ({"user_id": True}, lambda row: row.user_id is not None),
        ({"tag": ("plan", "free")}, lambda row: row.tags == {"plan": "free"}),
        (
            {"feature": "chat", "model": HAIKU, "tag": ("plan", "pro")},
            lambda row: (row.feature_id, row.model, row.tags) == ("chat", HAIKU, {"plan": "pro"}),
        ),
    ],
)
def test_every_section_can_be_of_less(
    october: Span, about: dict[str, Any], is_meant: Callable[[CallLog], bool]
) -> None:
    rows = [it for it in random_rows(9) if october.since <= it.reserved_at < october.until]
    if "user_id" in about:
        user_id = next(row.user_id for row in rows if row.user_id)
        about = {"user_id": user_id}
        rows = [row for row in rows if row.user_id == user_id]
    meant = [row for row in rows if is_meant(row)]

    report = cost_report(replace(october, **about), top=1000)

    everything = plain_sums(meant, by="provider")["anthropic"]
    assert (report.total.spend_nanousd, report.total.calls) == everything
    assert report.comparison.total.spend_nanousd == everything[0]
    assert sum(report.days.values()) == everything[0]
    features = {it.feature: (it.spend_nanousd, it.calls) for it in report.features}
    assert features == plain_sums(meant, by="feature_id")
    categories = {it.category: (it.spend_nanousd, it.calls) for it in report.categories}
    assert categories == plain_sums(meant, by="category")
    models = {it.model: (it.spend_nanousd, it.calls) for it in report.models}
    assert models == plain_sums(meant, by="model")
    by_user = plain_sums(meant, by="user_id")
    by_user.pop(None, None)
    assert {it.user_id: (it.spend_nanousd, it.calls) for it in report.users} == by_user
    assert report.total.active_users == len(by_user)
    by_subject = plain_sums(meant, by="subject")
    by_subject.pop("", None)
    assert {it.subject: (it.spend_nanousd, it.calls) for it in report.subjects} == by_subject
    saved: Counter[str] = Counter()
    for row in meant:
        if row.status != Status.RELEASED and row.saved_reason:
            saved[", ".join(levers_of(row.saved_reason))] += row.saved_nanousd
    assert {it.lever: it.saved_nanousd for it in report.savings} == saved


def test_the_dearest_come_first_and_no_more_than_asked_for(october: Span) -> None:
    for cost in (10, 30, 20):
        CallLogFactory.create(user=UserFactory.create(), cost_nanousd=cost)

    report = cost_report(october, top=2)

    assert [user.spend_nanousd for user in report.users] == [30, 20]
    assert report.total.active_users == 3


# Users ------------------------------------------------------------------------------------------


def test_a_deleted_user_is_named_by_the_key_that_is_left(october: Span) -> None:
    user, kept = UserFactory.create(), UserFactory.create(username="anna")
    key = user.pk
    CallLogFactory.create(user=user, cost_nanousd=2)
    CallLogFactory.create(user=kept, cost_nanousd=1)
    user.delete()

    gone, anna = cost_report(october).users

    assert (gone.label, gone.deleted, gone.user_id) == (f"user {key} (deleted)", True, key)
    assert (anna.label, anna.deleted) == ("anna", False)


def test_cost_per_active_user_leaves_out_what_nobody_spent(october: Span) -> None:
    CallLogFactory.create(user=UserFactory.create(), cost_nanousd=300)
    CallLogFactory.create(user=UserFactory.create(), status=Status.CACHED)
    CallLogFactory.create(user=UserFactory.create(), status=Status.RELEASED)
    CallLogFactory.create(user=None, subject="visitor", cost_nanousd=1000)

    assert cost_report(october).total.cost_per_active_user_nanousd == 150


# Budgets ----------------------------------------------------------------------------------------


def test_the_site_is_measured_against_the_settings_until_it_has_a_limit_of_its_own(
    october: Span, settings: Settings
) -> None:
    settings.AI_BUDGET = {"MONTHLY_LIMIT_USD": "50"}
    assert cost_report(october).total.budget_nanousd == 50 * DOLLAR

    FeatureBudgetFactory.create(name="*", monthly_limit_usd=80)
    assert cost_report(october).total.budget_nanousd == 80 * DOLLAR


def test_a_month_is_measured_against_the_monthly_limit(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=10, daily_limit_usd=1)
    CallLogFactory.create(cost_nanousd=2 * DOLLAR)

    chat = feature(cost_report(october), "chat")

    assert (chat.budget_nanousd, chat.budget_used) == (10 * DOLLAR, Decimal("20.0"))


def test_without_a_monthly_limit_the_daily_limits_of_the_days_count(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    CallLogFactory.create(cost_nanousd=DOLLAR)

    assert feature(cost_report(october), "chat").budget_nanousd == 31 * DOLLAR


def test_a_limit_of_zero_and_no_limit_have_no_percentage(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=0)
    CallLogFactory.create()
    CallLogFactory.create(feature__name="search")

    report = cost_report(october)

    chat, search = feature(report, "chat"), feature(report, "search")
    assert (chat.budget_nanousd, chat.budget_used) == (0, None)
    assert (search.budget_nanousd, search.budget_used) == (None, None)


def test_several_months_add_up(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=10)
    CallLogFactory.create()
    span = Span(since=october.since, until=october.until + timedelta(days=1))

    assert feature(cost_report(span), "chat").budget_nanousd == 20 * DOLLAR


def test_an_override_raises_the_budget_of_the_windows_it_was_in_force_in(october: Span) -> None:
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    LimitOverrideFactory.create(
        budget=chat, period="day", amount_usd=5, until=NOW + timedelta(days=1)
    )
    lower = LimitOverrideFactory.create(budget=chat, period="day", amount_usd="0.5")
    # It was made at the moment the tests stand at, whatever the clock on the wall says.
    chat.overrides.update(created_at=NOW)
    CallLogFactory.create()

    assert feature(cost_report(october), "chat").budget_nanousd == (29 * 1 + 2 * 5) * DOLLAR
    assert lower.amount_usd == "0.5"


def test_a_plan_is_an_amount_or_a_share_of_the_plan_above(october: Span) -> None:
    FeatureBudgetFactory.create(name="*", monthly_plan_usd=1000)
    category = FeatureBudgetFactory.create(name="product", plan_share=50)
    FeatureBudgetFactory.create(name="chat", parent=category, plan_share=10)
    CallLogFactory.create(cost_nanousd=5 * DOLLAR)

    report = cost_report(october)

    assert report.total.plan_nanousd == 1000 * DOLLAR
    chat = feature(report, "chat")
    assert (chat.plan_nanousd, chat.plan_used) == (50 * DOLLAR, Decimal("10.0"))


# Features and categories ------------------------------------------------------------------------


def test_one_feature_is_measured_against_its_own_budget(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=10)
    CallLogFactory.create(cost_nanousd=1)
    CallLogFactory.create(feature__name="search", cost_nanousd=2)

    report = cost_report(Span(since=october.since, until=october.until, feature="chat"))

    assert report.total.spend_nanousd == 1
    assert report.total.budget_nanousd == 10 * DOLLAR
    assert [row.feature for row in report.features] == ["chat"]


def test_a_category_has_the_calls_and_refusals_of_its_features(october: Span) -> None:
    category = FeatureBudgetFactory.create(name="product")
    FeatureBudgetFactory.create(name="chat", parent=category)
    CallLogFactory.create(category="product", cost_nanousd=1)
    CallLogFactory.create(feature__name="search", cost_nanousd=2)
    for name in ("chat", "search"):
        SpendWindowFactory.create(scope=f"feature:{name}", refused=1)

    report = cost_report(Span(since=october.since, until=october.until, feature="product"))

    assert (report.total.spend_nanousd, report.total.refused) == (1, 1)


# Refusals and downgrades ------------------------------------------------------------------------


def test_refusals_are_summed_over_the_days_of_a_feature(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat")
    for first_day in (date(2026, 10, 1), date(2026, 10, 31), date(2026, 11, 1)):
        SpendWindowFactory.create(scope="feature:chat", first_day=first_day, refused=2)
    SpendWindowFactory.create(scope="feature:chat", period="month", refused=50)
    SpendWindowFactory.create(scope="user:1", refused=60)
    SpendWindowFactory.create(scope="*", refused=70)

    report = cost_report(october)

    assert [(row.feature, row.refused) for row in report.refusals] == [("chat", 4)]
    assert report.total.refused == 4
    assert feature(report, "chat").refused == 4
    assert not report.is_empty


def test_a_downgrade_says_from_what_to_what(october: Span) -> None:
    CallLogFactory.create(requested_model=SONNET, model=HAIKU, cost_nanousd=3)
    CallLogFactory.create(requested_model=SONNET, model=HAIKU, status=Status.RELEASED)
    CallLogFactory.create(requested_model=SONNET)

    (downgrade,) = cost_report(october).downgrades

    assert (downgrade.feature, downgrade.calls, downgrade.spend_nanousd) == ("chat", 1, 3)
    assert (downgrade.requested_model, downgrade.model) == (SONNET, HAIKU)


# Cost of the report -----------------------------------------------------------------------------


def test_the_number_of_queries_does_not_grow_with_the_rows(
    october: Span, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    def create(number: int) -> None:
        for index in range(number):
            CallLogFactory.create(user=UserFactory.create(), feature__name=f"feature-{index}")

    def queries() -> int:
        return len(statements(lambda: cost_report(october)))

    create(2)
    few = queries()
    create(12)
    assert queries() == few
