"""Prices, balances, and what holds for every page."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client, override_settings
from django.urls import reverse

from ai_budget.models import ModelRate, SpendWindow
from tests.factories import (
    CallLogFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    ModelRateFactory,
    SpendWindowFactory,
    UserQuotaFactory,
)

RATES = "/admin/ai_budget/modelrate/"
WINDOWS = "/admin/ai_budget/spendwindow/"


# Prices -----------------------------------------------------------------------------------------


def test_a_rate_is_changed_and_the_old_price_kept_in_the_history(root: Client) -> None:
    rate = ModelRateFactory.create(model="claude-next", input_usd=1, output_usd=5)
    fields = {
        "provider": "anthropic", "region": "", "model": "claude-next", "speed": "standard",
        "prompt_tokens_above": "0", "valid_from_0": rate.valid_from.date(),
        "valid_from_1": rate.valid_from.time(), "valid_until_0": "", "valid_until_1": "",
        "input_usd": "0.85", "output_usd": "5", "cache_write_5m_usd": "",
        "cache_write_1h_usd": "", "cache_read_usd": "", "web_search_usd": "", "note": "",
    }  # fmt: skip

    response = root.post(f"{RATES}{rate.pk}/change/", fields)

    assert response.status_code == 302
    assert "(1 → 0.85)" in LogEntry.objects.get().get_change_message()
    assert "$0.85" in root.get(RATES).content.decode()

    again = root.post(f"{RATES}add/", fields)
    assert again.status_code == 200
    assert ModelRate.objects.count() == 1


# Balances ---------------------------------------------------------------------------------------


def windows(client: Client, **query: str) -> list[SpendWindow]:
    response: Any = client.get(WINDOWS, query)
    return list(response.context["cl"].result_list)


def test_balances_are_listed_by_period_the_newest_first(root: Client) -> None:
    day = SpendWindowFactory.create(first_day=date(2026, 10, 1))
    later = SpendWindowFactory.create(first_day=date(2026, 10, 2))
    month = SpendWindowFactory.create(period="month", first_day=date(2026, 10, 1))

    assert windows(root) == [later, day]
    assert windows(root, period="month") == [month]


def test_a_scope_is_found_by_its_whole_name(root: Client) -> None:
    mine = SpendWindowFactory.create(scope="user:42", first_day=date(2025, 12, 31))
    month = SpendWindowFactory.create(scope="user:42", period="month", first_day=date(2024, 2, 1))
    SpendWindowFactory.create(scope="user:421")

    assert windows(root, q=" user:42 ") == [mine]
    assert windows(root, q="user:42", period="month") == [month]


def test_a_balance_is_exact(root: Client) -> None:
    window = SpendWindowFactory.create(spent_nanousd=1_234_567_891)

    page = root.get(reverse("admin:ai_budget_spendwindow_change", args=[window.pk]))

    assert "$1.234567891" in page.content.decode()


# Every page -------------------------------------------------------------------------------------


@pytest.fixture
def pages(root: Client) -> list[str]:
    budget = FeatureBudgetFactory.create(name="chat", daily_limit_usd=1)
    LimitOverrideFactory.create(budget=budget)
    rows = [
        budget,
        CallLogFactory.create(feature=budget),
        UserQuotaFactory.create(),
        ModelRateFactory.create(),
        SpendWindowFactory.create(scope="feature:chat", spent_nanousd=5),
    ]
    found = []
    for row in rows:
        name = f"admin:ai_budget_{row._meta.model_name}"
        found += [
            reverse(f"{name}_changelist"),
            reverse(f"{name}_change", args=[row.pk]),
            reverse(f"{name}_history", args=[row.pk]),
        ]
    return found


def test_no_page_needs_more_than_a_strict_content_security_policy(
    root: Client, pages: list[str]
) -> None:
    for page in pages:
        content = root.get(page).content.decode()
        scripts = re.findall(r"<script\b([^>]*)>", content)
        assert " style=" not in content, page
        assert "<style" not in content, page
        # A script that is data (type="application/json" or a template) is not run.
        assert all("src=" in attributes or "data-" in attributes for attributes in scripts), page
        assert not re.search(r"\son[a-z]+=", content), page


def test_every_page_can_be_read_in_another_language(root: Client, pages: list[str]) -> None:
    with override_settings(LANGUAGE_CODE="de", USE_THOUSAND_SEPARATOR=True):
        for page in pages:
            assert root.get(page).status_code == 200, page
