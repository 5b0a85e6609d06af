"""Closed by default: each page and action asks for its own permission."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from ai_budget.models import Batch, BatchSubmission, FeatureBudget
from tests.admin.batches import BatchFactory, BatchItemFactory, BatchSubmissionFactory
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
    "batch": BatchFactory,
    "batchitem": BatchItemFactory,
    "calllog": CallLogFactory,
    "featurebudget": FeatureBudgetFactory,
    "modelrate": ModelRateFactory,
    "spendwindow": SpendWindowFactory,
    "userquota": UserQuotaFactory,
}
JOURNALS = ["batch", "batchitem", "calllog", "spendwindow"]
DECISIONS = {
    "cancel": "change_batch",
    "resubmit": "add_batch",
    "submissions/0/accept": "change_batchsubmission",
    "submissions/0/send-again": "change_batchsubmission",
    "submissions/0/release": "change_batchsubmission",
}
"""The pages on which something is decided of a batch, each with the permission that it needs."""


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
    assert FACTORIES[model]._meta.model.objects.count() == 1


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


# Batches ----------------------------------------------------------------------------------------


def decision_pages(**batch: Any) -> dict[str, str]:
    """The pages of a batch on which all may be decided that can be."""
    row = BatchFactory.create(**batch)
    BatchSubmissionFactory.create(batch=row, status="uncertain")
    base = url("batch", "change", row.pk).removesuffix("change/")
    return {name: f"{base}{name}/" for name in DECISIONS}


def test_a_stranger_decides_nothing(client: Client) -> None:
    for page in decision_pages().values():
        for response in (client.get(page), client.post(page)):
            assert response.status_code == 302
            assert response.headers["Location"].startswith(reverse("admin:login"))
    assert not BatchSubmission.objects.exclude(status="uncertain").exists()


@pytest.mark.parametrize(
    "permission", ["", "change_batch", "add_batch", "change_batchsubmission", "delete_batch"]
)
def test_each_decision_asks_for_its_own_permission(staff: SignIn, permission: str) -> None:
    client = staff("view_batch", *([permission] if permission else []))

    for name, page in decision_pages().items():
        expected = 200 if DECISIONS[name] == permission else 403
        assert client.get(page).status_code == expected, name
        if expected == 403:
            assert client.post(page, {"api_id": "msgbatch_1"}).status_code == 403, name
    assert BatchSubmission.objects.filter(status="uncertain", cancel_requested=False).exists()
    assert Batch.objects.count() == 1


def test_who_may_not_see_batches_decides_nothing_about_them(staff: SignIn) -> None:
    client = staff("add_batch", "change_batchsubmission")

    for name, page in decision_pages().items():
        assert client.get(page).status_code == 403, name
        assert client.post(page, {"api_id": "msgbatch_1"}).status_code == 403, name


def test_decisions_are_offered_to_those_who_may(staff: SignIn) -> None:
    open_pages = decision_pages()
    over_pages = decision_pages(status="finished", total=1, errored=1)
    pages = {**open_pages, "resubmit": over_pages["resubmit"]}
    change_pages = [url("batch", "change", batch.pk) for batch in Batch.objects.all()]
    client = staff("view_batch")
    for_all = staff("view_batch", *set(DECISIONS.values()))

    seen = "".join(client.get(page).content.decode() for page in change_pages)
    seen_by_all = "".join(for_all.get(page).content.decode() for page in change_pages)

    assert "nobody heard whether the API took it" in seen
    assert not any(page in seen for page in pages.values())
    assert all(page in seen_by_all for page in pages.values())


@pytest.mark.parametrize("action", ["cancel", "resubmit"])
def test_actions_on_batches_need_more_than_a_view(staff: SignIn, action: str) -> None:
    batch = BatchFactory.create(status="open" if action == "cancel" else "finished", errored=1)
    BatchSubmissionFactory.create(batch=batch)
    client, page = staff("view_batch"), url("batch", "changelist")

    assert f'value="{action}"' not in client.get(page).content.decode()
    client.post(page, {"action": action, "_selected_action": [batch.pk], "confirmed": "yes"})

    assert not BatchSubmission.objects.filter(cancel_requested=True).exists()
    assert Batch.objects.count() == 1
    assert not LogEntry.objects.exists()


def test_links_of_a_batch_are_for_those_who_may_follow_them(staff: SignIn) -> None:
    batch = BatchFactory.create(total=1, succeeded=1)
    item = BatchItemFactory.create(batch=batch, status="succeeded")
    calls, items = url("calllog", "changelist"), url("batchitem", "changelist")
    pages = [
        url("batch", "change", batch.pk), url("batchitem", "change", item.pk), items,
    ]  # fmt: skip

    def links(*permissions: str) -> tuple[bool, bool]:
        client = staff("view_batch", *permissions)
        seen = "".join(client.get(page).content.decode() for page in pages)
        return f'"{calls}?' in seen, f'"{items}?batch=' in seen

    assert links() == (False, False)
    assert links("view_batchitem") == (False, True)
    assert links("view_calllog") == (True, False)
    assert links("view_batchitem", "view_calllog") == (True, True)


def test_submissions_ask_for_their_own_permission(staff: SignIn) -> None:
    submission = BatchSubmissionFactory.create(api_id="msgbatch_1")
    page = url("batch", "change", submission.batch_id)

    assert "msgbatch_1" not in staff("view_batch").get(page).content.decode()
    allowed = staff("view_batch", "view_batchsubmission")
    assert "msgbatch_1" in allowed.get(page).content.decode()
