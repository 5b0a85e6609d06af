"""What is changed is in force on the very next call, in every worker that is running."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.management import call_command
from django.test import Client

import ai_budget
from ai_budget.models import CallLog, FeatureBudget, LimitOverride, UserQuota
from ai_budget.money import to_usd
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import Balances
from tests.factories import UserFactory
from tests.guard.books import bill
from tests.whole.calls import (
    HAIKU,
    LONG,
    OPUS,
    SONNET,
    TOKENS,
    ask,
    assert_books_agree,
    balance,
    last,
    most,
    outcome,
    spent,
)
from tests.whole.clocks import Clock
from tests.whole.workers import Elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)
LITTLE, PLENTY = Decimal("0.000001"), Decimal(1)
"""Dollars that hold no call, and many."""


class Workers:
    """This process, and another that has been running for as long."""

    def __init__(self, elsewhere: Elsewhere) -> None:
        self._elsewhere = elsewhere

    def outcomes(self, feature: str = "chat", **options: Any) -> list[str]:
        """What becomes of the next call here, and of the next one there."""
        return [outcome(feature, **options), self._elsewhere.do(outcome, feature, **options)]

    def in_both(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Do something here, then there."""
        work(*arguments, **options)
        self._elsewhere.do(work, *arguments, **options)

    def elsewhere(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Do something in the other process alone."""
        return self._elsewhere.do(work, *arguments, **options)


@pytest.fixture
def workers(transactional_db: None, api: AnthropicSimulator, worker_process: Elsewhere) -> Workers:
    worker_process.use(django_settings.AI_BUDGET)
    return Workers(worker_process)


ANSWERED, EXCEEDED, PAUSED = ["answered"] * 2, ["BudgetExceeded"] * 2, ["FeatureDisabled"] * 2
LIMITED, USED_UP = ["RateLimited"] * 2, ["QuotaExceeded"] * 2


def budget(name: str = "chat", **fields: Any) -> FeatureBudget:
    return FeatureBudget.objects.create(name=name, **fields)


# Ways to change a budget -------------------------------------------------------------------------


def save(name: str, **fields: Any) -> None:
    found = FeatureBudget.objects.get(name=name)
    for field, value in fields.items():
        setattr(found, field, value)
    found.save()


def update(name: str, **fields: Any) -> None:
    FeatureBudget.objects.filter(name=name).update(**fields)


def post(name: str, **fields: Any) -> None:
    """Send the form of the admin, as a browser does."""
    client = Client()
    staff: Any = UserFactory.create(is_staff=True, is_superuser=True)
    client.force_login(staff)
    page = f"/admin/ai_budget/featurebudget/{FeatureBudget.objects.get(name=name).pk}/change/"
    shown: Any = client.get(page)
    form = shown.context["adminform"].form
    form_values = {field: form[field].value() for field in form.fields}
    for formset in shown.context["inline_admin_formsets"]:
        management = formset.formset.management_form
        form_values |= {
            management[it].html_name: management[it].value() for it in management.fields
        }
    values = {**form_values, **fields}
    posted = {it: value for it, value in values.items() if value is not None and value is not False}
    response: Any = client.post(page, posted)
    assert response.status_code == 302, response.context["adminform"].form.errors


CHANGES = {"save": save, "update": update, "admin": post, "elsewhere": update}
changes = pytest.mark.parametrize(
    ("way", "name"),
    [*((way, "chat") for way in CHANGES), ("update", "support"), ("update", "*")],
)


def change(workers: Workers, way: str, name: str = "chat", **fields: Any) -> None:
    if way == "elsewhere":
        workers.elsewhere(CHANGES[way], name, **fields)
    else:
        CHANGES[way](name, **fields)


# Limits ------------------------------------------------------------------------------------------


@changes
def test_a_limit_is_in_force_on_the_next_call_of_every_worker(
    workers: Workers, way: str, name: str
) -> None:
    budget("*")
    budget(parent=budget("support"))
    assert workers.outcomes() == ANSWERED

    change(workers, way, name, daily_limit_usd=LITTLE)
    assert workers.outcomes() == EXCEEDED

    change(workers, way, name, daily_limit_usd=PLENTY)
    assert workers.outcomes() == ANSWERED
    assert_books_agree()


def test_a_monthly_limit_is_in_force_on_the_next_call_of_every_worker(workers: Workers) -> None:
    budget()
    assert workers.outcomes() == ANSWERED

    update("chat", monthly_limit_usd=LITTLE)
    assert workers.outcomes() == EXCEEDED


def test_a_limit_that_is_taken_away_refuses_nobody_any_more(workers: Workers) -> None:
    budget(daily_limit_usd=0)
    assert workers.outcomes() == EXCEEDED

    update("chat", daily_limit_usd=None)
    assert workers.outcomes() == ANSWERED


def test_a_limit_counts_what_was_spent_before_there_was_one(
    workers: Workers, api: AnthropicSimulator
) -> None:
    api.default = LONG
    budget()
    workers.in_both(ask)

    update("chat", daily_limit_usd=to_usd(2 * most()))
    assert workers.outcomes() == EXCEEDED


def test_a_limit_that_is_lowered_below_a_call_on_its_way_lets_it_end_and_no_other_begin(
    workers: Workers, api: AnthropicSimulator
) -> None:
    budget(daily_limit_usd=PLENTY)
    with ai_budget.stream("Hello", feature="chat") as answer:
        update("chat", daily_limit_usd=0)
        assert workers.outcomes() == EXCEEDED
        "".join(answer)

    assert (last().status, [last().cost_nanousd]) == (CallLog.Status.SETTLED, bill(api))
    assert_books_agree()


def test_a_limit_per_minute_is_in_force_on_the_next_call_of_every_worker(workers: Workers) -> None:
    budget()
    assert workers.outcomes() == ANSWERED

    update("chat", requests_per_minute=0)
    assert workers.outcomes() == LIMITED


def test_a_quota_is_in_force_on_the_next_call_of_every_worker(workers: Workers) -> None:
    user: Any = UserFactory.create()
    quota = UserQuota.objects.create(user=user, daily_calls=2)
    assert workers.outcomes(user=user.pk) == ANSWERED
    assert workers.outcomes(user=user.pk) == USED_UP

    UserQuota.objects.filter(pk=quota.pk).update(daily_calls=4)
    assert workers.outcomes(user=user.pk) == ANSWERED
    assert workers.outcomes(user=user.pk) == USED_UP

    quota.delete()
    assert workers.outcomes(user=user.pk) == ANSWERED


def test_a_model_and_a_cap_are_in_force_on_the_next_call_of_every_worker(
    workers: Workers, api: AnthropicSimulator
) -> None:
    budget()
    workers.in_both(ask)
    update("chat", model=SONNET, max_tokens=7)
    workers.in_both(ask)

    sent = [request.body or {} for request in api.requests]
    assert [body["model"] for body in sent] == [HAIKU, HAIKU, SONNET, SONNET]
    assert [body["max_tokens"] for body in sent] == [TOKENS, TOKENS, 7, 7]


# Pauses ------------------------------------------------------------------------------------------


@changes
def test_a_pause_and_its_end_are_effective_at_once(
    workers: Workers, api: AnthropicSimulator, way: str, name: str
) -> None:
    budget("*")
    budget(parent=budget("support"))
    assert workers.outcomes() == ANSWERED
    before = len(api.requests)

    change(workers, way, name, enabled=False)
    assert workers.outcomes() == PAUSED
    assert len(api.requests) == before

    change(workers, way, name, enabled="on" if way == "admin" else True)
    assert workers.outcomes() == ANSWERED


def test_a_pause_stops_its_own_feature_alone(workers: Workers) -> None:
    budget(enabled=False)

    assert workers.outcomes("summaries") == ANSWERED


def test_a_call_that_is_on_its_way_when_a_pause_begins_is_booked(
    workers: Workers, api: AnthropicSimulator
) -> None:
    budget()
    with ai_budget.stream("Hello", feature="chat") as answer:
        update("chat", enabled=False)
        "".join(answer)

    assert [last().cost_nanousd] == bill(api)
    assert workers.outcomes() == PAUSED


# Overrides ---------------------------------------------------------------------------------------


def override(of: FeatureBudget, amount: Decimal | int, until: datetime) -> LimitOverride:
    return LimitOverride.objects.create(
        budget=of, period="day", amount_usd=amount, until=until, reason="launch"
    )


@pytest.mark.parametrize("name", ["chat", "support", "*"])
def test_an_override_begins_and_is_deleted_at_once(workers: Workers, name: str) -> None:
    budgets = {"*": budget("*"), "support": budget("support")}
    budgets["chat"] = budget(parent=budgets["support"])
    update(name, daily_limit_usd=LITTLE)
    assert workers.outcomes() == EXCEEDED

    raised = override(budgets[name], PLENTY, datetime.now(UTC) + timedelta(hours=1))
    assert workers.outcomes() == ANSWERED

    raised.delete()
    assert workers.outcomes() == EXCEEDED


def test_an_override_ends_at_its_moment(
    workers: Workers, worker_process: Elsewhere, clock: Clock
) -> None:
    override(budget(daily_limit_usd=0), PLENTY, NOW)

    for clock.at, expected in ((NOW - MOMENT, ANSWERED), (NOW, EXCEEDED)):
        worker_process.use(django_settings.AI_BUDGET, at=clock.at)
        assert workers.outcomes() == expected


def test_of_several_overrides_the_highest_is_in_force(
    workers: Workers, api: AnthropicSimulator
) -> None:
    api.default = LONG
    one = most()
    raised = budget(daily_limit_usd=0)
    soon = datetime.now(UTC) + timedelta(hours=1)
    for amount in (LITTLE, to_usd(2 * one), LITTLE):
        override(raised, amount, soon)

    assert workers.outcomes() == ANSWERED
    assert workers.outcomes() == EXCEEDED


def test_an_override_never_lowers_a_limit(workers: Workers) -> None:
    override(budget(daily_limit_usd=PLENTY), LITTLE, datetime.now(UTC) + timedelta(hours=1))

    assert workers.outcomes() == ANSWERED


def test_an_override_gives_no_limit_where_there_is_none(workers: Workers) -> None:
    override(budget(), LITTLE, datetime.now(UTC) + timedelta(hours=1))

    assert workers.outcomes() == ANSWERED


# Shadow mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "limit", "refusals"),
    [
        ("chat", {"daily_limit_usd": 0}, "feature:chat day", EXCEEDED),
        ("chat", {"monthly_limit_usd": 0}, "feature:chat month", EXCEEDED),
        ("chat", {"requests_per_minute": 0}, "feature:chat minute", LIMITED),
        ("chat", {"tokens_per_minute": 1}, "feature:chat minute", LIMITED),
        ("support", {"daily_limit_usd": 0}, "category:support day", EXCEEDED),
        ("*", {"daily_limit_usd": 0}, "* day", EXCEEDED),
    ],
)
def test_shadow_mode_records_every_refusal_until_it_is_switched_on(
    workers: Workers, name: str, fields: dict[str, Any], limit: str, refusals: list[str]
) -> None:
    budget("*")
    budget(parent=budget("support"))
    update(name, enforce=False, **fields)

    assert workers.outcomes() == ANSWERED
    decisions = CallLog.objects.values_list("decision", flat=True)
    assert list(decisions) == [f"would refuse: {limit}"] * 2

    update(name, enforce=True)
    assert workers.outcomes() == refusals

    update(name, enforce=False)
    assert workers.outcomes() == ANSWERED
    assert_books_agree()


def test_shadow_mode_records_what_the_ladder_would_do_until_it_is_switched_on(
    workers: Workers, api: AnthropicSimulator
) -> None:
    shadow = budget(enforce=False, daily_limit_usd=0)
    shadow.rungs.create(at_percent=50, model=HAIKU)

    workers.in_both(ask, model=OPUS)

    for row in CallLog.objects.all():
        assert row.model == row.requested_model == OPUS
        assert f"would downgrade to {HAIKU}" in row.decision
        assert "would refuse: feature:chat day" in row.decision
    assert {(request.body or {})["model"] for request in api.requests} == {OPUS}

    update("chat", enforce=True, daily_limit_usd=PLENTY)
    shadow.rungs.update(at_percent=1)
    save("chat", daily_limit_usd=to_usd(balance("feature:chat", last().day).spent_nanousd * 20))
    workers.in_both(ask, model=OPUS)
    assert [(row.model, row.downgraded) for row in CallLog.objects.order_by("id")][2:] == [
        (HAIKU, True)
    ] * 2


def test_the_ladder_of_a_feature_does_not_follow_a_limit_of_the_site_in_shadow_mode(
    workers: Workers, api: AnthropicSimulator
) -> None:
    api.default = LONG
    budget("*", enforce=False)
    budget().rungs.create(at_percent=1, model=HAIKU)
    ask(model=OPUS)
    update("*", daily_limit_usd=to_usd(20 * sum(bill(api))))

    workers.in_both(ask, model=OPUS)
    update("*", enforce=True)
    workers.in_both(ask, model=OPUS)

    models = list(CallLog.objects.order_by("id").values_list("model", flat=True))
    assert models == [OPUS, OPUS, OPUS, HAIKU, HAIKU]


def test_shadow_mode_of_one_budget_does_not_soften_another(workers: Workers) -> None:
    budget("*", daily_limit_usd=0)
    budget(enforce=False, daily_limit_usd=0)

    assert workers.outcomes() == EXCEEDED


# Categories --------------------------------------------------------------------------------------


def test_a_category_holds_all_its_features_together(
    workers: Workers, api: AnthropicSimulator
) -> None:
    api.default = LONG
    support = budget("support")
    budget("chat", parent=support)
    budget("mail", parent=support)
    update("support", daily_limit_usd=to_usd(2 * most()))

    ask("chat")
    assert workers.elsewhere(outcome, "mail") == "answered"

    assert workers.outcomes("chat") == EXCEEDED
    assert workers.outcomes("mail") == EXCEEDED
    assert workers.outcomes("other") == ANSWERED
    day = last().day
    assert balance("category:support", day) == spent(sum(bill(api)[:2]), calls=2)
    assert_books_agree()


def test_a_feature_that_is_moved_leaves_what_it_spent_behind(
    workers: Workers, api: AnthropicSimulator
) -> None:
    api.default = LONG
    old, new = budget("old", daily_limit_usd=to_usd(2 * most())), budget("new")
    chat = budget(parent=old)
    assert workers.outcomes() == ANSWERED
    assert workers.outcomes() == EXCEEDED

    chat.parent = new
    chat.save()
    assert workers.outcomes() == ANSWERED

    day = last().day
    assert balance("category:old", day) == spent(sum(bill(api)[:2]), calls=2)
    assert balance("category:new", day) == spent(sum(bill(api)[2:]), calls=2)
    assert_books_agree(day)


@pytest.mark.parametrize("to", ["new", None])
def test_a_call_on_its_way_settles_in_the_category_of_its_reservation(
    api: AnthropicSimulator, to: str | None
) -> None:
    budget("new")
    chat = budget(parent=budget("old"))

    with ai_budget.stream("Hello", feature="chat") as answer:
        chat.parent = FeatureBudget.objects.filter(name=to).first()
        chat.save()
        "".join(answer)

    row = last()
    assert (row.category, [row.cost_nanousd]) == ("old", bill(api))
    assert balance("category:old", row.day) == spent(row.cost_nanousd)
    assert balance("category:new", row.day) == Balances()
    assert_books_agree(row.day)


def test_an_overdue_call_is_booked_in_the_category_of_its_reservation(
    api: AnthropicSimulator, clock: Clock
) -> None:
    chat = budget(parent=budget("old"))

    with ai_budget.stream("Hello", feature="chat") as answer:
        chat.parent = budget("new")
        chat.save()
        clock.at += timedelta(hours=3)
        call_command("ai_budget_tick")

        row = last()
        assert (row.status, row.category) == (CallLog.Status.ESTIMATED, "old")
        assert balance("category:old", row.day) == spent(row.reserved_nanousd)
        assert balance("category:new", row.day) == Balances()
        assert_books_agree(row.day)
        "".join(answer)
