"""The page of one caller, and what it offers to change."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.test import Client
from django.urls import reverse
from pytest_django import Settings

import ai_budget
from ai_budget.admin.user_spend import SETTABLE, subject_url, user_url, wanted_by
from ai_budget.models import UserQuota
from ai_budget.review.callers import LIMITING, LimitInForce
from ai_budget.testing import AnthropicSimulator
from tests.admin.conftest import NOW, SignIn
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    SpendWindowFactory,
    UserFactory,
    UserQuotaFactory,
)
from tests.ledger.threads import together
from tests.queries import statements

pytestmark = pytest.mark.django_db

DOLLAR = 1_000_000_000
NOBODY = {True: "01234567-89ab-cdef-0123-456789abcdef", False: "987654321"}
"""A key that no user has, by whether keys are UUIDs."""


def page_of(user: Any) -> str:
    return user_url(admin.site, user.pk)


def page_to(change: str, user: Any) -> str:
    return reverse("admin:ai_budget_user_quota", args=[change, user.pk])


def seen(client: Client, url: str) -> str:
    """What the page at that address says, without its markup and what is said of its bars."""
    response = client.get(url)
    assert response.status_code == 200
    text = re.sub(r"<title>[^<]*</title>|<[^>]*>", " ", response.content.decode())
    return " ".join(text.split())


def token(client: Client, url: str) -> str:
    found = re.search(r'name="seen" value="([^"]*)"', client.get(url).content.decode())
    assert found is not None
    return found[1]


def confirm(client: Client, change: str, user: Any, **fields: Any) -> Any:
    """Look at the page that asks, and say yes."""
    url = page_to(change, user)
    return client.post(url, {"seen": token(client, url), **fields}, follow=True)


def own(user: Any) -> tuple[Any, ...]:
    quota = UserQuota.objects.get(user=user, feature=None)
    return quota.daily_calls, quota.daily_limit_usd, quota.monthly_limit_usd


def history() -> list[str]:
    return [entry.get_change_message() for entry in LogEntry.objects.order_by("pk")]


# What is shown ----------------------------------------------------------------------------------


def test_the_page_shows_what_a_user_spent(root: Client) -> None:
    anna = UserFactory.create(username="anna")
    CallLogFactory.create(user=anna, feature__name="chat", cost_nanousd=3 * DOLLAR)
    CallLogFactory.create(
        user=anna,
        feature__name="mail",
        requested_model=HAIKU,
        cost_nanousd=DOLLAR,
        reserved_at=NOW - timedelta(days=20),
    )
    SpendWindowFactory.create(scope=f"user:{anna.pk}", refused=7)

    text = seen(root, page_of(anna))

    assert "anna" in text
    assert "Last 30 days $4.0000 2 calls" in text
    assert "Refused in these days 7" in text
    assert "Oct. 15, 2026 1 $3.0000 $0.00 7" in text
    assert "September 2026 1 $1.0000" in text
    assert "chat 1 $3.0000 75.0 %" in text
    assert f"{HAIKU} 1 $1.0000 25.0 %" in text
    assert "From Sept. 16, 2026 to Oct. 15, 2026, $4.00 in all" in text


def test_limits_say_where_they_come_from_and_what_is_left(root: Client) -> None:
    anna, students = UserFactory.create(), Group.objects.create(name="students")
    anna.groups.add(students)
    UserQuotaFactory.create(user=None, daily_calls=5, monthly_limit_usd=10)
    UserQuotaFactory.create(user=None, group=students, daily_calls=None, daily_limit_usd=2)
    UserQuotaFactory.create(user=anna, daily_calls=50, tokens_per_minute=1000)
    chat = FeatureBudgetFactory.create(name="chat")
    UserQuotaFactory.create(user=None, feature=chat, daily_calls=3)

    text = seen(root, page_of(anna))

    assert "Calls a day 0 50 50 own quota 2026-10-16 00:00" in text
    assert "Dollars a day $0.00 $2 $2.0000 group students 2026-10-16 00:00" in text
    assert "Dollars a month $0.00 $10 $10.0000 everyone’s default 2026-11-01 00:00" in text
    assert "Requests a minute no limit –" in text
    assert "Tokens a minute 1,000 own quota" in text
    assert "In the feature chat Calls a day 0 3 3 everyone’s default" in text
    assert "Days and months are those of UTC." in text


def test_the_last_calls_and_all_others_are_a_click_away(root: Client) -> None:
    anna = UserFactory.create()
    calls = CallLogFactory.create_batch(21, user=anna)
    asked = CallLogFactory.create(user=anna, requested_model=SONNET, model=HAIKU)
    held = CallLogFactory.create(user=anna, status="reserved")

    content = root.get(page_of(anna)).content.decode()

    links = re.findall(r'href="/admin/ai_budget/calllog/(\d+)/change/"', content)
    assert links == [str(held.pk), str(asked.pk), *(str(it.pk) for it in reversed(calls[3:]))]
    assert "$0.002000 held" in content
    assert f"asked for {SONNET}" in content
    assert f'"/admin/ai_budget/calllog/?user={anna.pk}&amp;reserved=all"' in content


def test_each_figure_leads_to_its_calls(root: Client) -> None:
    anna = UserFactory.create()
    CallLogFactory.create(user=anna, feature__name="chat", requested_model=HAIKU)

    content = root.get(page_of(anna)).content.decode().replace("&amp;", "&")

    for query in (
        "since=2026-10-15&until=2026-10-16",
        "since=2026-10-01&until=2026-11-01",
        "since=2026-09-16&feature=chat",
        f"since=2026-09-16&model={HAIKU}",
    ):
        url = f"/admin/ai_budget/calllog/?user={anna.pk}&{query}"
        assert f'"{url}"' in content
        assert "1 call" in root.get(url).content.decode()


def test_who_has_called_nothing_has_a_page(root: Client) -> None:
    text = seen(root, page_of(UserFactory.create()))

    assert "Nothing was spent." in text
    assert "Nothing was called." in text
    assert "Last calls There are none." in text


def test_a_user_who_is_gone_has_a_page_and_nothing_to_change(root: Client) -> None:
    anna = UserFactory.create()
    CallLogFactory.create(user=anna, cost_nanousd=DOLLAR)
    UserQuotaFactory.create(user=None, daily_calls=5)
    page, double = page_of(anna), page_to("double", anna)
    label = f"user {anna.pk} (deleted)"
    anna.delete()

    text = seen(root, page)

    assert label in text
    assert "$1.0000" in text
    assert "everyone’s default" in text
    assert "Double" not in text
    assert root.get(double).status_code == 404
    assert root.post(double).status_code == 404


@pytest.mark.parametrize("subject", ["tenant-7", "a/b, c?d=e%20 _2F", "été"])
def test_a_subject_has_a_page_and_nothing_to_change(root: Client, subject: str) -> None:
    CallLogFactory.create(subject=subject, cost_nanousd=DOLLAR)
    UserQuotaFactory.create(user=None, daily_calls=5)

    response = root.get(subject_url(admin.site, subject))

    assert response.status_code == 200
    assert response.context["title"] == subject
    text = response.content.decode()
    assert "$1.0000" in text
    assert "everyone’s default" in text
    assert "Double" not in text


def is_uuid() -> bool:
    return get_user_model()._meta.pk.get_internal_type() == "UUIDField"


@pytest.mark.parametrize("key", ["", "x", "-1", "1" * 40, "1\0", "../1", "nobody"])
def test_a_user_that_never_was_has_no_page(root: Client, key: str) -> None:
    # No row has it; some databases refuse to be asked for a key that no column holds.
    text = NOBODY[is_uuid()] if key == "nobody" else key
    CallLogFactory.create()

    pages = [f"/admin/ai_budget/daytotal/users/{text}/", page_for(text)]

    assert {root.get(page).status_code for page in pages} == {404}


def page_for(key: str) -> str:
    return user_url(admin.site, key or "_")


@pytest.mark.parametrize("subject", ["nobody", "x\0", "x" * 300])
def test_a_subject_that_never_called_has_no_page(root: Client, subject: str) -> None:
    assert root.get(subject_url(admin.site, subject)).status_code == 404


def test_the_page_takes_the_same_queries_for_any_number_of_rows(root: Client) -> None:
    anna = UserFactory.create()
    CallLogFactory.create(user=anna, feature__name="one")

    def queries() -> int:
        return len(statements(lambda: root.get(page_of(anna))))

    UserQuotaFactory.create(feature=FeatureBudgetFactory.create(name="one"), user=anna)
    few = queries()
    for number in range(10):
        feature = FeatureBudgetFactory.create(name=f"feature-of-{number}")
        UserQuotaFactory.create(feature=feature, user=anna)
        UserQuotaFactory.create(feature=feature, user=None, group=None)
        CallLogFactory.create(feature=feature, user=anna, requested_model=f"model-{number}")

    assert queries() == few
    assert few < 25


def test_while_redis_is_away_the_page_shows_what_was_copied_last(
    root: Client, settings: Settings
) -> None:
    settings.AI_BUDGET = {
        **settings.AI_BUDGET,
        "LEDGER": "ai_budget.ledger.redis.RedisLedger",
        "LEDGER_REDIS_URL": "redis://127.0.0.1:9/0",  # where nothing listens
    }
    anna = UserFactory.create()
    UserQuotaFactory.create(user=anna, daily_calls=None, daily_limit_usd=4)
    SpendWindowFactory.create(scope=f"user:{anna.pk}", spent_nanousd=DOLLAR)

    assert "Dollars a day $1.0000 $4 $3.0000 own quota" in seen(root, page_of(anna))


# Who may ----------------------------------------------------------------------------------------


def test_a_stranger_is_sent_to_sign_in(client: Client) -> None:
    anna = UserFactory.create()
    pages = [page_of(anna), subject_url(admin.site, "x"), page_to("block", anna)]

    for response in (*map(client.get, pages), *map(client.post, pages)):
        assert response.status_code == 302
        assert response.headers["Location"].startswith(reverse("admin:login"))


def test_the_pages_are_for_those_who_may_see_spend(staff: SignIn) -> None:
    anna = UserFactory.create()
    CallLogFactory.create(user=anna, subject="tenant")
    client = staff("view_calllog", "view_userquota", "add_userquota", "change_userquota")

    for page in (page_of(anna), subject_url(admin.site, "tenant"), page_to("block", anna)):
        assert client.get(page).status_code == 403
    assert client.post(page_to("block", anna), {"seen": "x"}).status_code == 403
    # Not even whether there is such a user.
    assert client.get(page_for(NOBODY[is_uuid()])).status_code == 403


def test_calls_are_for_those_who_may_see_calls(staff: SignIn) -> None:
    anna = UserFactory.create()
    CallLogFactory.create(user=anna)

    without = staff("view_spend").get(page_of(anna)).content.decode()
    allowed = staff("view_spend", "view_calllog").get(page_of(anna)).content.decode()

    assert "Last calls" not in without
    assert "/calllog/" not in without
    assert "Last calls" in allowed


def test_the_quota_and_the_account_are_linked_for_those_who_may_see_them(staff: SignIn) -> None:
    quota = UserQuotaFactory.create()
    meta = get_user_model()._meta
    quota_url = reverse("admin:ai_budget_userquota_change", args=[quota.pk])

    without = staff("view_spend").get(page_of(quota.user)).content.decode()
    allowed = staff("view_spend", "view_userquota").get(page_of(quota.user)).content.decode()

    assert quota_url not in without
    assert quota_url in allowed
    if admin.site.is_registered(get_user_model()):
        account = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quota.user_id])
        assert account not in allowed
        may = staff("view_spend", "view_user").get(page_of(quota.user)).content.decode()
        assert account in may


def test_quotas_of_users_lead_to_their_pages_for_those_who_may_see_spend(staff: SignIn) -> None:
    quota = UserQuotaFactory.create()
    UserQuotaFactory.create(user=None)
    quotas, link = reverse("admin:ai_budget_userquota_changelist"), page_of(quota.user)

    without = staff("view_userquota").get(quotas).content.decode()
    allowed = staff("view_userquota", "view_spend").get(quotas).content.decode()

    assert "/daytotal/users/" not in without
    assert re.findall(r'href="([^"]*/daytotal/users/[^"]*)"', allowed) == [link]


@pytest.mark.parametrize(
    ("has_quota", "permission", "may"),
    [
        (True, "change_userquota", True),
        (True, "add_userquota", False),
        (True, "view_userquota", False),
        (False, "add_userquota", True),
        (False, "change_userquota", False),
    ],
)
def test_changes_are_for_those_who_may_make_them_on_the_quotas_own_page(
    staff: SignIn, has_quota: bool, permission: str, may: bool
) -> None:
    anna = UserFactory.create()
    if has_quota:
        UserQuotaFactory.create(user=anna, daily_calls=7)
    else:
        UserQuotaFactory.create(user=None, daily_calls=7)
    client, page = staff("view_spend", permission), page_to("block", anna)

    offered = page in client.get(page_of(anna)).content.decode()
    response = client.get(page)
    posted = client.post(page, {"seen": "7/1;None/None;None/None"})

    assert offered is may
    assert response.status_code == (200 if may else 403)
    if not may:
        assert posted.status_code == 403
        assert not UserQuota.objects.filter(daily_calls=0).exists()


def test_a_site_without_the_quotas_page_offers_no_change(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=anna)
    pages = page_of(anna), page_to("block", anna)
    registry: dict[Any, Any] = admin.site._registry
    monkeypatch.delitem(registry, UserQuota)

    assert "Block" not in seen(root, pages[0])
    assert root.get(pages[1]).status_code == 403


# Changes ----------------------------------------------------------------------------------------


def test_limits_are_set_and_what_holds_now_stands_in_empty_fields(root: Client) -> None:
    anna = UserFactory.create(username="anna")
    UserQuotaFactory.create(user=None, daily_calls=5, monthly_limit_usd=10)
    page = root.get(page_to("set", anna)).content.decode()

    assert 'placeholder="5"' in page
    assert 'placeholder="$10"' in page
    assert 'placeholder="no limit"' in page

    response = confirm(root, "set", anna, daily_calls="20", daily_limit_usd="1.5")

    assert own(anna) == (20, Decimal("1.5"), None)
    assert response.redirect_chain == [(page_of(anna), 302)]
    assert "The limits of anna are changed." in response.content.decode()
    assert history() == ["Added. Changed Calls a day (– → 20) and Daily limit ($) (– → 1.5)."]


def test_what_is_set_again_is_kept_with_the_value_before(root: Client) -> None:
    quota = UserQuotaFactory.create(daily_calls=20, daily_limit_usd="1.5", requests_per_minute=3)

    assert 'value="20"' in root.get(page_to("set", quota.user)).content.decode()
    confirm(root, "set", quota.user, daily_calls="30", monthly_limit_usd="9")

    assert own(quota.user) == (30, None, 9)
    quota.refresh_from_db()
    assert quota.requests_per_minute == 3
    (entry,) = LogEntry.objects.all()
    assert entry.object_id == str(quota.pk)
    assert entry.get_change_message() == (
        "Changed Calls a day (20 → 30), Daily limit ($) (1.5 → –) and Monthly limit ($) (– → 9)."
    )


def test_a_save_that_changes_nothing_writes_nothing(root: Client) -> None:
    anna = UserFactory.create()

    response = confirm(root, "set", anna)

    assert "There is nothing to change." in response.content.decode()
    assert not UserQuota.objects.exists()
    assert history() == []


@pytest.mark.parametrize("typed", ["-1", "x", "1e30"])
def test_what_is_no_amount_is_an_error_of_the_form(root: Client, typed: str) -> None:
    anna = UserFactory.create()

    response = confirm(root, "set", anna, daily_calls="5", daily_limit_usd=typed)

    assert response.status_code == 200
    assert 'class="errorlist' in response.content.decode()
    assert not UserQuota.objects.exists()


def test_what_is_inherited_is_doubled_and_halved_as_the_users_own(root: Client) -> None:
    anna = UserFactory.create()
    everyone = UserQuotaFactory.create(user=None, daily_calls=5, monthly_limit_usd="0.5")
    asked = seen(root, page_to("double", anna))

    assert "Calls a day: 5 → 10" in asked
    assert "Dollars a month: $0.5 → $1" in asked
    assert "Dollars a day" not in asked

    confirm(root, "double", anna)

    assert own(anna) == (10, None, 1)

    confirm(root, "halve", anna)
    confirm(root, "halve", anna)

    assert own(anna) == (3, None, Decimal("0.25"))
    everyone.refresh_from_db()
    assert everyone.daily_calls == 5
    assert history()[1] == "Changed Calls a day (10 → 5) and Monthly limit ($) (1 → 0.5)."


def test_a_blocked_user_may_nothing_until_unblocked(root: Client) -> None:
    anna = UserFactory.create(username="anna")
    UserQuotaFactory.create(user=None, daily_calls=5)
    UserQuotaFactory.create(user=anna, daily_calls=None, monthly_limit_usd=10)

    confirm(root, "block", anna)

    assert own(anna) == (0, 0, 0)
    text = seen(root, page_of(anna))
    assert "Blocked." in text
    assert "Unblock" in text
    assert "Double" not in text
    assert "Calls a day: 0 → 5" in seen(root, page_to("unblock", anna))

    confirm(root, "unblock", anna)

    assert own(anna) == (None, None, None)
    assert "Blocked." not in seen(root, page_of(anna))
    zeros = "Calls a day ({}), Daily limit ($) ({}) and Monthly limit ($) ({})."
    assert history() == [
        "Changed " + zeros.format("– → 0", "– → 0", "10 → 0"),
        "Changed " + zeros.format(*["0 → –"] * 3),
    ]


def test_the_next_call_of_a_blocked_user_is_refused(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    anna = UserFactory.create()

    confirm(root, "block", anna)

    with pytest.raises(ai_budget.QuotaExceeded):
        ai_budget.ask("Hello", feature="chat", user=anna)
    assert anthropic_api.requests == []

    confirm(root, "unblock", anna)

    assert ai_budget.ask("Hello", feature="chat", user=anna).cost > 0
    assert "Today &lt;$0.0001 1 call This month &lt;$0.0001 1 call" in seen(root, page_of(anna))


def test_whom_a_default_blocks_can_be_raised_and_not_unblocked(root: Client) -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=None, daily_calls=0)

    content = root.get(page_of(anna)).content.decode()

    assert "Blocked." in content
    assert page_to("unblock", anna) not in content
    assert page_to("set", anna) in content
    response = root.get(page_to("unblock", anna), follow=True)
    assert "There is nothing to change." in response.content.decode()


def test_what_could_not_be_stored_is_not_doubled(root: Client) -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=anna, daily_calls=5, monthly_limit_usd=5_000_000_000)

    confirm(root, "double", anna)

    assert own(anna) == (10, None, 5_000_000_000)


@pytest.mark.parametrize("change", ["set", "double", "halve", "block"])
def test_nothing_is_changed_by_looking(root: Client, change: str) -> None:
    UserQuotaFactory.create(user=None, daily_calls=5)
    anna = UserFactory.create()

    assert root.get(page_to(change, anna)).status_code == 200

    assert UserQuota.objects.count() == 1


def test_a_change_that_does_not_exist_is_not_found(root: Client) -> None:
    assert root.get(page_to("forgive", UserFactory.create())).status_code == 404


def test_a_change_needs_the_token_of_its_own_session() -> None:
    anna = UserFactory.create()
    client = Client(enforce_csrf_checks=True)
    superuser: Any = UserFactory.create(is_staff=True, is_superuser=True)
    client.force_login(superuser)

    assert client.post(page_to("block", anna), {"seen": "x"}).status_code == 403
    assert not UserQuota.objects.exists()


@pytest.mark.parametrize("has_quota", [True, False])
@pytest.mark.parametrize(
    ("change", "fields"), [("set", {"daily_calls": "9"}), ("double", {}), ("block", {})]
)
def test_of_two_who_change_at_once_the_second_is_told(
    root: Client, has_quota: bool, change: str, fields: dict[str, str]
) -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=None, daily_calls=5)
    if has_quota:
        UserQuotaFactory.create(user=anna, daily_calls=7)
    url = page_to(change, anna)
    both = token(root, url)

    root.post(page_to("set", anna), {"seen": both, "daily_calls": "20"})
    response = root.post(url, {"seen": both, **fields}, follow=True)

    text = response.content.decode()
    assert "Somebody has changed the limits since this page was shown" in text
    assert "Calls a day: 20" in text
    assert own(anna)[0] == 20
    assert len(history()) == 1

    again = re.search(r'name="seen" value="([^"]*)"', text)
    assert again is not None
    root.post(url, {"seen": again[1], **fields})
    assert own(anna)[0] == {"set": 9, "double": 40, "block": 0}[change]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("has_quota", [True, False])
def test_of_two_at_the_very_same_moment_one_is_told(root: Client, has_quota: bool) -> None:
    anna = UserFactory.create()
    UserQuotaFactory.create(user=None, daily_calls=5)
    if has_quota:
        UserQuotaFactory.create(user=anna, daily_calls=5)
    url = page_to("double", anna)
    both = token(root, url)

    def say_yes() -> int:
        return root.post(url, {"seen": both}).status_code

    assert sorted(together([say_yes, say_yes])) == [200, 302]

    assert own(anna)[0] == 10
    assert len(history()) == 1


# The rule ---------------------------------------------------------------------------------------


def in_force(**amounts: int | None) -> list[LimitInForce]:
    quota = UserQuota(user_id=1)
    return [
        LimitInForce(
            feature="*",
            name=name,
            measure=LIMITING[name][0],
            period=LIMITING[name][1],
            amount=amounts.get(name),
            quota=quota,
        )
        for name in SETTABLE
    ]


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        ("double", 1, 2),
        ("double", 0, None),
        ("double", None, None),
        ("halve", 10, 5),
        ("halve", 5, 3),
        ("halve", 2, 1),
        ("halve", 1, None),
        ("halve", 0, None),
    ],
)
def test_halving_never_blocks_and_doubling_never_lets_through(
    change: str, before: int | None, after: int | None
) -> None:
    wanted = wanted_by(change, in_force(daily_calls=before))

    assert wanted == ({} if after is None else {"daily_calls": after})


def test_money_is_scaled_to_the_nano_dollar() -> None:
    wanted = wanted_by("halve", in_force(daily_limit_usd=3))

    assert wanted == {"daily_limit_usd": Decimal("0.000000002")}
