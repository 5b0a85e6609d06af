"""Alerts in the admin: to look at, and to acknowledge for those who may."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from ai_budget.models import Alert, AlertDelivery
from ai_budget.money import NANO_PER_USD as USD
from tests.admin.batches import BatchFactory
from tests.admin.conftest import NOW, SignIn
from tests.factories import HAIKU, FeatureBudgetFactory

pytestmark = pytest.mark.django_db

LIST = "admin:ai_budget_alert_changelist"


def an_alert(budget: str = "chat", **fields: Any) -> Alert:
    given = {
        "kind": "limit",
        "budget": budget,
        "period": "day",
        "first_day": date(2026, 10, 15),
        "threshold": 80,
        "effect": "refuses",
        "spent_nanousd": 80 * USD,
        "of_nanousd": 100 * USD,
        "percent": 80,
        "until": NOW + timedelta(hours=12),
        "raised_at": NOW,
        **fields,
    }
    return Alert.objects.create(**given)


def listed(client: Client, query: str = "") -> str:
    response = client.get(f"{reverse(LIST)}{query}")
    assert response.status_code == 200
    return response.content.decode()


def page(alert: Alert, name: str = "change") -> str:
    return reverse(f"admin:ai_budget_alert_{name}", args=[alert.pk])


def acknowledge(client: Client, *alerts: Alert) -> Any:
    given = {"action": "acknowledge", "_selected_action": [alert.pk for alert in alerts]}
    return client.post(reverse(LIST), given, follow=True)


def test_the_list_says_what_came_to_pass(root: Client) -> None:
    alert = an_alert()

    content = listed(root)

    assert "chat: 80 % of the daily limit is spent" in content
    assert "At the limit calls are refused, until 2026-10-16 00:00 UTC." in content
    assert page(alert) in content


def test_what_a_higher_threshold_covers_is_shown_where_it_is_asked_for(root: Client) -> None:
    an_alert(threshold=50, covered=True)
    an_alert(threshold=80)

    assert "50 % of the daily limit" not in listed(root)
    assert "80 % of the daily limit" not in listed(root, "?state=covered")
    assert "50 % of the daily limit" in listed(root, "?state=covered")


def test_filters_lead_to_a_budget_and_a_time(root: Client) -> None:
    support = FeatureBudgetFactory.create(name="support")
    FeatureBudgetFactory.create(name="chat", parent=support)
    FeatureBudgetFactory.create(name="search")
    an_alert("chat")
    an_alert("search", raised_at=NOW - timedelta(days=40))

    def found(query: str) -> set[str]:
        content = listed(root, query)
        return {name for name in ("chat", "search") if f"{name}: 80 %" in content}

    assert found("") == {"chat"}
    assert found("?raised=all") == {"chat", "search"}
    assert found("?raised=all&budget=support") == {"chat"}
    assert found("?raised=all&budget=search") == {"search"}
    assert found("?raised=all&kind__exact=spike") == set()


def test_an_alert_shows_its_figures_and_where_it_was_delivered(root: Client) -> None:
    budget = FeatureBudgetFactory.create(name="chat")
    alert = an_alert()
    AlertDelivery.objects.create(alert=alert, notifier="shop.pager", tries=2, error="HTTP 500")

    content = root.get(page(alert)).content.decode()

    assert "$80.00" in content
    assert "$100.00" in content
    assert "shop.pager" in content
    assert "HTTP 500" in content
    assert reverse("admin:ai_budget_featurebudget_change", args=[budget.pk]) in content


def test_an_alert_of_a_batch_leads_to_it(root: Client) -> None:
    batch = BatchFactory.create()
    alert = an_alert(kind="batch", effect="alerts", about=f"#{batch.pk}", count=2)
    gone = an_alert(kind="uncertain", effect="alerts", about="#987654/2")

    content = root.get(page(alert)).content.decode()

    assert reverse("admin:ai_budget_batch_change", args=[batch.pk]) in content
    assert root.get(page(gone)).status_code == 200


def test_an_alert_outlives_its_budget(root: Client) -> None:
    assert root.get(page(an_alert("gone"))).status_code == 200


def test_names_are_shown_as_text(root: Client) -> None:
    an_alert(kind="unpriced", period="month", model="<script>x</script>")

    content = listed(root)

    assert "<script>x" not in content
    assert "&lt;script&gt;x" in content


@pytest.mark.parametrize("kind", Alert.Kind)
def test_each_kind_has_a_page(root: Client, kind: Alert.Kind) -> None:
    period = "month" if kind in ("plan", "unpriced") else "day"
    alert = an_alert(kind=kind, period=period, about="#1", model=HAIKU, since=NOW)

    assert root.get(page(alert)).status_code == 200


def test_whoever_may_acknowledges_an_alert(staff: SignIn) -> None:
    alert, other = an_alert(), an_alert(threshold=100)
    client = staff("view_alert", "acknowledge_alert")

    response = acknowledge(client, alert)

    alert.refresh_from_db()
    other.refresh_from_db()
    assert "1 alert is acknowledged." in response.content.decode()
    assert alert.acknowledged_at == NOW
    assert str(alert.acknowledged_by_id) == client.session["_auth_user_id"]
    assert other.acknowledged_at is None
    assert LogEntry.objects.get().object_id == str(alert.pk)


def test_acknowledged_alerts_are_told_apart(staff: SignIn) -> None:
    client = staff("view_alert", "acknowledge_alert")
    acknowledge(client, an_alert())
    an_alert("search")

    assert "chat: 80 %" not in listed(client, "?state=open")
    assert "search: 80 %" in listed(client, "?state=open")
    assert "chat: 80 %" in listed(client, "?state=acknowledged")


def test_a_second_time_changes_nothing(staff: SignIn) -> None:
    alert = an_alert()
    acknowledge(staff("view_alert", "acknowledge_alert"), alert)
    first = Alert.objects.get().acknowledged_by_id

    acknowledge(staff("view_alert", "acknowledge_alert"), alert)

    assert Alert.objects.get().acknowledged_by_id == first
    assert LogEntry.objects.count() == 1


def test_whoever_may_only_look_acknowledges_none(staff: SignIn) -> None:
    alert = an_alert()
    client = staff("view_alert")

    assert 'value="acknowledge"' not in listed(client)
    acknowledge(client, alert)

    assert Alert.objects.get().acknowledged_at is None
    assert not LogEntry.objects.exists()


def test_whoever_may_not_look_acknowledges_none(staff: SignIn) -> None:
    alert = an_alert()
    client = staff("acknowledge_alert")

    assert acknowledge(client, alert).status_code == 403
    assert Alert.objects.get().acknowledged_at is None


def test_without_permission_there_is_nothing_to_see(staff: SignIn) -> None:
    alert, client = an_alert(), staff()

    for address in (reverse(LIST), page(alert), page(alert, "history")):
        assert client.get(address).status_code == 403


def test_a_stranger_is_sent_to_sign_in(client: Client) -> None:
    response = client.get(reverse(LIST))

    assert response.status_code == 302
    assert response.headers["Location"].startswith(reverse("admin:login"))


def test_nobody_writes_changes_or_deletes_one(root: Client) -> None:
    alert = an_alert()

    assert root.get(reverse("admin:ai_budget_alert_add")).status_code == 403
    assert root.post(page(alert), {"budget": "x"}).status_code == 403
    assert root.post(page(alert, "delete"), {"post": "yes"}).status_code == 403
    root.post(reverse(LIST), {"action": "delete_selected", "_selected_action": [alert.pk]})

    assert Alert.objects.get().budget == "chat"


def test_the_list_takes_as_many_queries_however_long_it_is(
    root: Client, django_assert_max_num_queries: Any
) -> None:
    for threshold in range(1, 40):
        an_alert(threshold=threshold)

    with django_assert_max_num_queries(12):
        listed(root)
