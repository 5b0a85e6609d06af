from __future__ import annotations

import re
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import AbstractUser, Group
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from pytest_django import Settings

from ai_budget import periods
from ai_budget.admin import FeatureBudgetAdmin
from ai_budget.admin.amounts import bar, exact_usd, milliseconds, price, trimmed
from ai_budget.models import DowngradeRung, FeatureBudget, LimitOverride, UserQuota
from ai_budget.review.balances import LimitUse
from tests.admin.conftest import SignIn
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    DowngradeRungFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    SpendWindowFactory,
    UserFactory,
    UserQuotaFactory,
)
from tests.queries import statements

CHANGELIST = "/admin/ai_budget/featurebudget/"
ADD = f"{CHANGELIST}add/"
QUOTAS = "/admin/ai_budget/userquota/"
DOLLAR = 1_000_000_000


def change_url(budget: FeatureBudget) -> str:
    return reverse("admin:ai_budget_featurebudget_change", args=[budget.pk])


def formset(prefix: str, *, initial: int = 0, total: int | None = None) -> dict[str, Any]:
    return {
        f"{prefix}-INITIAL_FORMS": initial,
        f"{prefix}-TOTAL_FORMS": initial if total is None else total,
        f"{prefix}-MIN_NUM_FORMS": 0,
        f"{prefix}-MAX_NUM_FORMS": 1000,
    }


def form(**fields: Any) -> dict[str, Any]:
    """What a browser posts for a budget, with no inline rows unless they are given."""
    return {
        "parent": "",
        "enabled": "on",
        "enforce": "on",
        "daily_limit_usd": "",
        "monthly_limit_usd": "",
        "monthly_plan_usd": "",
        "plan_share": "",
        "model": "",
        "max_tokens": "",
        "owner_email": "",
        "requests_per_minute": "",
        "tokens_per_minute": "",
        "cache_scope": "off",
        "cache_ttl": "3600",
        "cache_version": "0",
        "prompt_cache": "off",
        "routing": "off",
        **formset("rungs"),
        **formset("overrides"),
        **fields,
    }


def save(client: Client, url: str, **fields: Any) -> None:
    response: Any = client.post(url, form(**fields))
    assert response.status_code == 302, response.context["adminform"].form.errors


def history() -> list[str]:
    return [entry.get_change_message() for entry in LogEntry.objects.order_by("pk")]


# The list ---------------------------------------------------------------------------------------


def test_the_list_shows_today_and_this_month_against_the_limits(root: Client) -> None:
    FeatureBudgetFactory.create(name="chat", daily_limit_usd=2, monthly_limit_usd=10)
    SpendWindowFactory.create(scope="feature:chat", spent_nanousd=DOLLAR)
    SpendWindowFactory.create(
        scope="feature:chat", period="month", first_day=date(2026, 10, 1), spent_nanousd=9 * DOLLAR
    )

    content = root.get(CHANGELIST).content.decode()

    assert "$1.00 of $2.00" in content
    assert "$9.00 of $10.00" in content
    assert "ai-budget-bar-warn" in content


def test_the_list_takes_the_same_queries_for_any_number_of_budgets(root: Client) -> None:
    def queries() -> int:
        return len(statements(lambda: root.get(CHANGELIST)))

    FeatureBudgetFactory.create(parent=FeatureBudgetFactory.create())
    few = queries()
    for _ in range(10):
        LimitOverrideFactory.create(
            budget=FeatureBudgetFactory.create(parent=FeatureBudgetFactory.create())
        )

    assert queries() == few


def test_one_budget_shows_its_spend_too(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=2)
    SpendWindowFactory.create(scope="feature:chat", spent_nanousd=DOLLAR)

    assert "$1.00 of $2.00" in root.get(change_url(chat)).content.decode()


# The bar ----------------------------------------------------------------------------------------


def widths(markup: str) -> list[str]:
    """The widths of the track, of what is taken, and of what is spent."""
    return re.findall(r'<rect class="[a-z-]+" width="([0-9.]+)"', markup)


def test_a_bar_draws_what_is_spent_and_what_is_held() -> None:
    markup = bar(LimitUse(spent_nanousd=DOLLAR, held_nanousd=DOLLAR // 2, limit_nanousd=4 * DOLLAR))

    assert widths(markup) == ["100", "37.5", "25.0"]
    assert "<title>$1.00 spent, $0.50 held: 37.5 % of $4.00</title>" in markup
    assert 'role="img"' in markup
    assert "ai-budget-bar-fine" in markup
    assert "$1.50 of $4.00" in markup
    assert "style" not in markup


@pytest.mark.parametrize(
    ("spent", "state", "width"),
    [(79, "fine", "79.0"), (80, "warn", "80.0"), (100, "full", "100.0"), (250, "full", "100.0")],
)
def test_a_bar_says_how_full_it_is_and_never_overflows(spent: int, state: str, width: str) -> None:
    markup = bar(LimitUse(spent_nanousd=spent, limit_nanousd=100))

    assert f"ai-budget-bar-{state}" in markup
    assert widths(markup)[2] == width


def test_a_limit_of_zero_is_full() -> None:
    markup = bar(LimitUse(limit_nanousd=0))

    assert "ai-budget-bar-full" in markup
    assert "the limit is $0.00" in markup


def test_without_a_limit_there_is_an_amount_and_no_bar() -> None:
    markup = bar(LimitUse(spent_nanousd=DOLLAR))

    assert "$1.00" in markup
    assert "svg" not in markup


def test_a_raised_limit_says_so() -> None:
    markup = bar(LimitUse(spent_nanousd=DOLLAR, limit_nanousd=4 * DOLLAR, raised=True))

    assert "$1.00 of $4.00 (raised)" in markup
    assert "a limit raised for now</title>" in markup


@pytest.mark.parametrize(
    ("nanousd", "expected"),
    [(0, "$0.00"), (1, "$0.000000001"), (1_500_000_000, "$1.50"), (10**12, "$1,000.00")],
)
def test_exact_amounts(nanousd: int, expected: str) -> None:
    assert exact_usd(nanousd) == expected


def test_shorter_amounts() -> None:
    assert trimmed(Decimal("10.000000000")) == "10"
    assert trimmed(Decimal("0.500")) == "0.5"
    assert trimmed(Decimal(100)) == "100"
    assert price(None) == "–"
    assert milliseconds(12_345) == "12.3 s"


# The form ---------------------------------------------------------------------------------------


def test_a_budget_is_made_with_its_ladder(root: Client) -> None:
    save(
        root,
        ADD,
        name="chat",
        monthly_limit_usd="10.5",
        **(
            formset("rungs", total=1)
            | {"rungs-0-at_percent": "80", "rungs-0-model": HAIKU, "rungs-0-budget": ""}
        ),
    )

    chat = FeatureBudget.objects.get(name="chat")
    assert chat.monthly_limit_usd == Decimal("10.5")
    assert [rung.model for rung in chat.rungs.all()] == [HAIKU]


def test_the_name_is_fixed_once_the_budget_exists(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat")

    save(root, change_url(chat), name="other")

    assert FeatureBudget.objects.get(pk=chat.pk).name == "chat"
    assert 'name="name"' not in root.get(change_url(chat)).content.decode()
    assert 'name="name"' in root.get(ADD).content.decode()


def test_dollars_are_shown_as_people_write_them(root: Client) -> None:
    chat = FeatureBudgetFactory.create(daily_limit_usd=10, monthly_limit_usd="99.95")

    content = root.get(change_url(chat)).content.decode()

    assert 'value="10"' in content
    assert 'value="99.95"' in content


@pytest.mark.parametrize("text", ["-1", "ten", "0.0000000001", "99999999999"])
def test_impossible_amounts_are_errors_of_the_form(root: Client, text: str) -> None:
    chat = FeatureBudgetFactory.create()

    response: Any = root.post(change_url(chat), form(daily_limit_usd=text))

    assert response.status_code == 200
    assert "daily_limit_usd" in response.context["adminform"].form.errors


def test_every_lever_is_offered_and_says_what_it_does_to_the_bill(root: Client) -> None:
    response: Any = root.get(ADD)

    fields = response.context["adminform"].form.fields
    assert set(fields) == {
        "name", "parent", "enabled", "enforce", "daily_limit_usd", "monthly_limit_usd",
        "monthly_plan_usd", "plan_share", "model", "max_tokens", "allow_unbounded", "owner_email",
        "requests_per_minute", "tokens_per_minute", "cache_scope", "cache_ttl", "cache_counts",
        "cache_version", "prompt_cache", "routing",
    }  # fmt: skip
    for lever in ("cache_scope", "cache_ttl", "cache_counts", "prompt_cache", "routing"):
        assert len(fields[lever].help_text.split()) >= 10


def test_the_whole_site_has_no_levers_but_can_be_forgotten(root: Client) -> None:
    site = FeatureBudgetFactory.create(name="*")

    response: Any = root.get(change_url(site))

    fields = set(response.context["adminform"].form.fields)
    assert "cache_version" in fields
    assert not fields & {"cache_scope", "prompt_cache", "routing"}


def test_a_lever_is_turned_on(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat")

    save(root, change_url(chat), name="chat", cache_scope="private", prompt_cache="auto")

    chat.refresh_from_db()
    assert (chat.cache_scope, chat.prompt_cache, chat.routing) == ("private", "auto", "off")


# The response cache -----------------------------------------------------------------------------


def test_the_page_says_how_much_is_found_in_the_cache(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat")
    CallLogFactory.create_batch(3, feature=chat, cache_checked=True, reserved_at=periods.now())
    CallLogFactory.create(
        feature=chat,
        status="cached",
        cache_checked=True,
        saved_nanousd=2_000_000_000,
        reserved_at=periods.now(),
    )

    page = root.get(change_url(chat)).content.decode()

    assert "1 of 4 calls in 30 days (25.0 %), $2.00 saved" in page
    assert "Not worth caching" not in page


def test_the_page_says_that_a_cache_finds_too_little(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.review.caching.ENOUGH_LOOKED_UP", 2)
    chat = FeatureBudgetFactory.create(name="chat")
    CallLogFactory.create_batch(2, feature=chat, cache_checked=True, reserved_at=periods.now())

    page = root.get(change_url(chat)).content.decode()

    assert "Not worth caching: fewer than 20 % are found." in page


def test_cached_answers_are_forgotten_from_the_list(root: Client) -> None:
    chat, other = (FeatureBudgetFactory.create(name=name) for name in ("chat", "other"))

    root.post(CHANGELIST, {"action": "forget", "_selected_action": [chat.pk]})

    chat.refresh_from_db()
    other.refresh_from_db()
    assert (chat.cache_version, other.cache_version) == (1, 0)
    assert history() == ["Changed Version of the cached answers (0 → 1)."]


def test_who_may_only_look_forgets_nothing(staff: SignIn) -> None:
    chat = FeatureBudgetFactory.create(name="chat")

    staff("view_featurebudget").post(
        CHANGELIST, {"action": "forget", "_selected_action": [chat.pk]}
    )

    chat.refresh_from_db()
    assert chat.cache_version == 0


def test_a_category_is_neither_the_site_nor_in_another(root: Client) -> None:
    FeatureBudgetFactory.create(name="*")
    product = FeatureBudgetFactory.create(name="product")
    FeatureBudgetFactory.create(name="chat", parent=product)

    response: Any = root.get(ADD)

    assert list(response.context["adminform"].form.fields["parent"].queryset) == [product]


# History ----------------------------------------------------------------------------------------


def test_a_changed_limit_is_kept_with_old_and_new_value(root: Client) -> None:
    product = FeatureBudgetFactory.create(name="product")
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=10)

    save(root, change_url(chat), daily_limit_usd="20.5", parent=product.pk, enforce="")

    (message,) = history()
    assert "Daily limit ($) (10 → 20.5)" in message
    assert "Category (– → product)" in message
    assert "Enforce (True → False)" in message
    assert (
        "Daily limit ($) (10 → 20.5)"
        in root.get(
            reverse("admin:ai_budget_featurebudget_history", args=[chat.pk])
        ).content.decode()
    )


def test_a_save_that_changes_nothing_says_so(root: Client) -> None:
    chat = FeatureBudgetFactory.create(daily_limit_usd=10)

    save(root, change_url(chat), daily_limit_usd="10.00")

    assert history() == ["No fields changed."]


def test_the_category_before_is_named(root: Client) -> None:
    chat = FeatureBudgetFactory.create(parent=FeatureBudgetFactory.create(name="product"))

    save(root, change_url(chat))

    assert history() == ["Changed Category (product → –)."]


def test_an_override_is_kept_with_who_made_it(root: Client, superuser: AbstractUser) -> None:
    chat = FeatureBudgetFactory.create()
    row = {
        "overrides-0-period": "month",
        "overrides-0-amount_usd": "50",
        "overrides-0-until_0": "2026-11-01",
        "overrides-0-until_1": "00:00",
        "overrides-0-reason": "launch",
        "overrides-0-budget": chat.pk,
    }

    save(root, change_url(chat), **(formset("overrides", total=1) | row))

    override = LimitOverride.objects.get()
    assert override.created_by == superuser
    assert override.amount_usd == 50
    assert "Added limit override “Monthly limit: $50" in history()[0]


def test_changed_inlines_are_kept_with_old_and_new_value(
    root: Client, superuser: AbstractUser
) -> None:
    chat = FeatureBudgetFactory.create()
    other = UserFactory.create()
    override = LimitOverrideFactory.create(budget=chat, amount_usd=50, created_by=other)
    rung = DowngradeRungFactory.create(budget=chat, at_percent=80)
    rows = {
        "overrides-0-id": override.pk,
        "overrides-0-budget": chat.pk,
        "overrides-0-period": "month",
        "overrides-0-amount_usd": "75",
        "overrides-0-until_0": override.until.date(),
        "overrides-0-until_1": override.until.time(),
        "overrides-0-reason": override.reason,
        "rungs-0-id": rung.pk,
        "rungs-0-budget": chat.pk,
        "rungs-0-at_percent": "90",
        "rungs-0-model": SONNET,
    }

    save(
        root,
        change_url(chat),
        **(formset("overrides", initial=1) | formset("rungs", initial=1) | rows),
    )

    (message,) = history()
    assert "(50 → 75)" in message
    assert "(80 → 90)" in message
    assert f"({HAIKU} → {SONNET})" in message
    assert LimitOverride.objects.get().created_by == other
    assert DowngradeRung.objects.get().model == SONNET


# Actions ----------------------------------------------------------------------------------------


def act(client: Client, action: str, *budgets: FeatureBudget, **fields: Any) -> Any:
    return client.post(
        CHANGELIST,
        {"action": action, "_selected_action": [budget.pk for budget in budgets], **fields},
        follow=True,
    )


def test_pause_and_resume_leave_an_entry_for_each_budget(staff: SignIn) -> None:
    client = staff("change_featurebudget")
    running = FeatureBudgetFactory.create_batch(2)
    paused = FeatureBudgetFactory.create(enabled=False)

    response = act(client, "pause", *running, paused)

    assert not FeatureBudget.objects.filter(enabled=True).exists()
    assert "2 features paused." in response.content.decode()
    assert history() == ["Changed Enabled (True → False)."] * 2

    response = act(client, "resume", paused)

    assert "1 feature resumed." in response.content.decode()
    assert FeatureBudget.objects.get(enabled=True) == paused
    assert history()[-1] == "Changed Enabled (False → True)."


def test_pause_leaves_alone_what_the_member_of_staff_may_not_change(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def may_change(self: Any, request: Any, obj: FeatureBudget | None = None) -> bool:
        return obj is None or obj.name != "payroll"

    monkeypatch.setattr(FeatureBudgetAdmin, "has_change_permission", may_change)
    payroll, chat = (FeatureBudgetFactory.create(name=name) for name in ("payroll", "chat"))

    act(root, "pause", payroll, chat)

    assert list(FeatureBudget.objects.filter(enabled=False)) == [chat]
    assert len(history()) == 1


# Deleting ---------------------------------------------------------------------------------------


def delete_url(budget: FeatureBudget) -> str:
    return reverse("admin:ai_budget_featurebudget_delete", args=[budget.pk])


@pytest.mark.parametrize("way", ["page", "action"])
def test_a_feature_with_calls_is_not_deleted_and_its_calls_are_not_read(
    root: Client, way: str
) -> None:
    chat, other = FeatureBudgetFactory.create(name="chat"), FeatureBudgetFactory.create()
    CallLogFactory.create_batch(3, feature=chat)

    with CaptureQueriesContext(connection) as captured:
        if way == "page":
            response = root.post(delete_url(chat), {"post": "yes"})
        else:
            response = act(root, "delete_selected", chat, other, post="yes")

    assert FeatureBudget.objects.filter(pk=chat.pk).exists()
    assert "What was spent stays on record; pause it instead." in response.content.decode()
    over_calls = [query["sql"] for query in captured if "ai_budget_calllog" in query["sql"]]
    assert over_calls
    assert all("EXISTS" in query for query in over_calls)


@pytest.mark.parametrize("way", ["page", "action"])
def test_a_feature_without_calls_is_deleted_with_what_belongs_to_it(root: Client, way: str) -> None:
    chat = FeatureBudgetFactory.create(name="chat")
    DowngradeRungFactory.create(budget=chat)
    CallLogFactory.create(feature__name="search")

    if way == "page":
        root.post(delete_url(chat), {"post": "yes"})
    else:
        act(root, "delete_selected", chat, post="yes")

    assert not FeatureBudget.objects.filter(name="chat").exists()
    assert not DowngradeRung.objects.exists()


def test_a_category_with_features_is_not_deleted(root: Client) -> None:
    product = FeatureBudgetFactory.create(name="product")
    FeatureBudgetFactory.create(name="chat", parent=product)

    content = root.post(delete_url(product), {"post": "yes"}).content.decode()

    assert "protected" in content
    assert FeatureBudget.objects.filter(name="product").exists()


# Quotas -----------------------------------------------------------------------------------------


def quota(**fields: Any) -> dict[str, Any]:
    return {
        "user": "", "feature": "", "daily_calls": "", "daily_limit_usd": "",
        "monthly_limit_usd": "", "group": "", "priority": "100", "requests_per_minute": "",
        "tokens_per_minute": "", **fields,
    }  # fmt: skip


def test_a_quota_is_made_for_everyone_a_user_and_a_feature(root: Client) -> None:
    user, chat = UserFactory.create(username="anna"), FeatureBudgetFactory.create(name="chat")

    root.post(f"{QUOTAS}add/", quota(daily_calls="5"))
    root.post(f"{QUOTAS}add/", quota(user=str(user.pk), daily_limit_usd="1.5"))
    root.post(f"{QUOTAS}add/", quota(user=str(user.pk), feature=chat.pk, unlimited="on"))

    assert UserQuota.objects.count() == 3
    content = root.get(QUOTAS).content.decode()
    assert "everyone" in content
    assert "anna" in content
    assert "$1.5" in content


def test_a_quota_is_made_for_a_group_with_its_rates(root: Client) -> None:
    students = Group.objects.create(name="students")

    root.post(
        f"{QUOTAS}add/",
        quota(group=students.pk, priority="5", requests_per_minute="20", tokens_per_minute="9000"),
    )

    row = UserQuota.objects.get()
    assert (row.group, row.priority) == (students, 5)
    assert (row.requests_per_minute, row.tokens_per_minute) == (20, 9_000)
    assert "students" in root.get(QUOTAS).content.decode()


@pytest.mark.parametrize("whose", ["everyone", "anna"])
def test_a_second_quota_for_the_same_is_an_error_of_the_form(root: Client, whose: str) -> None:
    user = None if whose == "everyone" else UserFactory.create(username=whose)
    UserQuotaFactory.create(user=user)

    response = root.post(f"{QUOTAS}add/", quota(user="" if user is None else str(user.pk)))

    assert response.status_code == 200
    assert "There is a quota for this already." in response.content.decode()


def test_a_user_who_does_not_exist_is_an_error_of_the_form(root: Client) -> None:
    for key in ("nobody", "0", "00000000-0000-0000-0000-000000000000"):
        assert root.post(f"{QUOTAS}add/", quota(user=key)).status_code == 200
    assert not UserQuota.objects.exists()


def test_a_changed_quota_is_kept_with_old_and_new_value(root: Client) -> None:
    row = UserQuotaFactory.create(daily_calls=5)

    root.post(f"{QUOTAS}{row.pk}/change/", quota(user=str(row.user_id), daily_calls="9"))

    assert history() == ["Changed Calls a day (5 → 9)."]


def test_quotas_are_found_by_user_in_the_same_queries_for_any_number(root: Client) -> None:
    anna = UserFactory.create(username="anna")
    UserQuotaFactory.create(user=anna)

    def search() -> None:
        assert "anna" in root.get(QUOTAS, {"q": "ann"}).content.decode()

    def queries() -> int:
        return len(statements(search))

    few = queries()
    for _ in range(5):
        UserQuotaFactory.create(user=anna, feature=FeatureBudgetFactory.create())

    assert queries() == few


# While Redis is away ----------------------------------------------------------------------------


@pytest.fixture
def redis_is_away(settings: Settings) -> None:
    settings.AI_BUDGET = {
        "LEDGER": "ai_budget.ledger.redis.RedisLedger",
        "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0",  # where nothing listens
    }


@pytest.mark.usefixtures("redis_is_away")
def test_while_redis_is_away_the_pages_show_what_was_copied_last(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat", daily_limit_usd=2)
    SpendWindowFactory.create(scope="feature:chat", spent_nanousd=DOLLAR)

    pages = [root.get(CHANGELIST), root.get(change_url(chat))]

    assert [page.status_code for page in pages] == [200, 200]
    assert all("$1.00" in page.content.decode() for page in pages)


@pytest.mark.usefixtures("redis_is_away")
def test_while_redis_is_away_a_feature_can_be_paused(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat")
    search = FeatureBudgetFactory.create(name="search")

    save(root, change_url(chat), name="chat", enabled="")
    action = root.post(CHANGELIST, {"action": "pause", "_selected_action": [search.pk]})

    assert action.status_code == 302
    assert not FeatureBudget.objects.filter(enabled=True).exists()
