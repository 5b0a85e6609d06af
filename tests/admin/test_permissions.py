"""Closed by default: each page and action asks for its own permission."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from ai_budget.models import CallLog, FeatureBudget, SpendWindow
from tests.admin.conftest import SignIn
from tests.factories import (
    CallLogFactory,
    FeatureBudgetFactory,
    ModelRateFactory,
    SpendWindowFactory,
    UserQuotaFactory,
)

pytestmark = pytest.mark.django_db

FACTORIES: dict[str, Any] = {
    "calllog": CallLogFactory,
    "featurebudget": FeatureBudgetFactory,
    "modelrate": ModelRateFactory,
    "spendwindow": SpendWindowFactory,
    "userquota": UserQuotaFactory,
}
JOURNALS = ["calllog", "spendwindow"]


def url(model: str, page: str, *args: Any) -> str:
    return reverse(f"admin:ai_budget_{model}_{page}", args=args)


def pages(model: str) -> list[str]:
    row = FACTORIES[model].create()
    return [
        url(model, "changelist"),
        url(model, "add"),
        url(model, "change", row.pk),
        url(model, "delete", row.pk),
        url(model, "history", row.pk),
    ]


@pytest.mark.parametrize("model", FACTORIES)
def test_a_stranger_is_sent_to_sign_in(client: Client, model: str) -> None:
    for page in pages(model):
        response = client.get(page)
        assert response.status_code == 302
        assert response["Location"].startswith(reverse("admin:login"))


@pytest.mark.parametrize("model", FACTORIES)
def test_staff_without_permission_see_nothing(staff: SignIn, model: str) -> None:
    client = staff()

    assert {client.get(page).status_code for page in pages(model)} == {403}
    assert "AI budget" not in client.get(reverse("admin:index")).content.decode()


@pytest.mark.parametrize("model", FACTORIES)
def test_who_may_view_can_look_and_not_touch(staff: SignIn, model: str) -> None:
    client = staff(f"view_{model}")
    changelist, add, change, delete, history = pages(model)

    for page in (changelist, change, history):
        assert client.get(page).status_code == 200
    for page in (add, delete):
        assert client.get(page).status_code == 403
    assert client.post(change, {}).status_code == 403


@pytest.mark.parametrize("model", JOURNALS)
def test_what_the_ledger_wrote_is_read_only_even_for_a_superuser(root: Client, model: str) -> None:
    _changelist, add, change, delete, _history = pages(model)

    assert root.get(add).status_code == 403
    assert root.get(delete).status_code == 403
    assert root.post(change, {"scope": "x"}).status_code == 403
    assert root.post(delete, {"post": "yes"}).status_code == 403
    assert CallLog.objects.count() + SpendWindow.objects.count() == 1


@pytest.mark.parametrize("model", JOURNALS)
def test_there_is_no_action_on_what_the_ledger_wrote(root: Client, model: str) -> None:
    row = FACTORIES[model].create()

    root.post(url(model, "changelist"), {"action": "delete_selected", "_selected_action": [row.pk]})

    assert type(row).objects.filter(pk=row.pk).exists()


@pytest.mark.parametrize("action", ["pause", "resume", "delete_selected"])
def test_actions_need_more_than_a_view(staff: SignIn, action: str) -> None:
    budget = FeatureBudgetFactory.create(enabled=action == "pause")
    client, page = staff("view_featurebudget"), url("featurebudget", "changelist")

    assert f'value="{action}"' not in client.get(page).content.decode()
    client.post(page, {"action": action, "_selected_action": [budget.pk], "post": "yes"})

    assert FeatureBudget.objects.get(pk=budget.pk).enabled is (action == "pause")
    assert not LogEntry.objects.exists()


def test_the_link_to_calls_is_for_those_who_may_see_calls(staff: SignIn) -> None:
    FeatureBudgetFactory.create(name="chat")
    page, link = url("featurebudget", "changelist"), url("calllog", "changelist") + "?feature=chat"

    without = staff("view_featurebudget").get(page).content.decode()
    with_permission = staff("view_featurebudget", "view_calllog").get(page).content.decode()

    assert link not in without
    assert link in with_permission


def test_inlines_ask_for_their_own_permissions(staff: SignIn) -> None:
    page = url("featurebudget", "change", FeatureBudgetFactory.create().pk)

    content = staff("change_featurebudget").get(page).content.decode()

    assert "overrides-TOTAL_FORMS" not in content
    assert "rungs-TOTAL_FORMS" not in content
