from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from ai_budget.admin.large_tables import CappedPaginator
from ai_budget.models import CallLog
from tests.admin.conftest import NOW
from tests.factories import (
    HAIKU,
    OPUS,
    SONNET,
    CallLogFactory,
    DowngradeRungFactory,
    FeatureBudgetFactory,
    ModelRateFactory,
    UserFactory,
)
from tests.queries import statements

CHANGELIST = "/admin/ai_budget/calllog/"


def listed(client: Client, **query: str) -> list[CallLog]:
    response: Any = client.get(CHANGELIST, query)
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def page(client: Client, **query: str) -> str:
    return client.get(CHANGELIST, query).content.decode()


def row_text(client: Client, **query: str) -> str:
    """The text of the first row, without markup."""
    body = page(client, **query).partition("<tbody>")[2].partition("</tr>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).strip()


def detail(client: Client, call: CallLog) -> str:
    return client.get(reverse("admin:ai_budget_calllog_change", args=[call.pk])).content.decode()


# The list ---------------------------------------------------------------------------------------


def test_a_row_says_when_who_what_and_how_much(root: Client) -> None:
    CallLogFactory.create(
        user=UserFactory.create(username="anna"),
        reserved_at=datetime(2026, 10, 15, 11, 5, tzinfo=UTC),
        input_tokens=1000,
        cache_read_tokens=200,
        cache_write_5m_tokens=30,
        cache_write_1h_tokens=4,
        output_tokens=56,
        cost_nanousd=1_234_567,
    )

    assert row_text(root) == (
        f"2026-10-15 11:05 chat anna Ask Settled {SONNET} 1,234 / 56 $0.001235 850 ms"
    )


def test_a_downgraded_call_says_what_was_asked_for(root: Client) -> None:
    CallLogFactory.create(requested_model=OPUS, model=HAIKU)

    assert f"{HAIKU} asked for {OPUS}" in row_text(root)


def test_a_call_in_flight_shows_what_it_holds(root: Client) -> None:
    CallLogFactory.create(status="reserved", reserved_nanousd=2_000_000)

    assert "$0.002000 held –" in row_text(root)


def test_a_subject_stands_in_for_a_user(root: Client) -> None:
    CallLogFactory.create(subject="tenant-1")

    assert " chat tenant-1 Ask " in row_text(root)


def test_a_deleted_user_is_named_by_the_key_that_is_left(root: Client) -> None:
    user = UserFactory.create()
    key = user.pk
    call = CallLogFactory.create(user=user)
    user.delete()

    assert f"user {key} (deleted)" in row_text(root)
    assert f"user {key} (deleted)" in detail(root, call)


def test_names_are_escaped(root: Client) -> None:
    CallLogFactory.create(subject="<script>x</script>", requested_model="<b>", model="<i>")

    content = page(root)

    assert "<script>x" not in content
    assert "<b>" not in content
    assert "<i>" not in content


def test_the_newest_come_first(root: Client) -> None:
    first, second = CallLogFactory.create_batch(2)

    assert listed(root) == [second, first]


# Its cost ---------------------------------------------------------------------------------------


def test_queries_do_not_grow_with_the_rows(root: Client) -> None:
    def create(number: int) -> None:
        for index in range(number):
            user = UserFactory.create()
            CallLogFactory.create(user=user, feature__name=f"feature-{index}", model=HAIKU)
            if index % 2:
                user.delete()

    create(2)
    few = statements(lambda: page(root))
    create(30)
    many = statements(lambda: page(root))

    assert len(many) == len(few)
    assert sum("ai_budget_calllog" in query for query in many) == 2


def test_nothing_reads_the_whole_table(root: Client) -> None:
    CallLogFactory.create_batch(51)
    with CaptureQueriesContext(connection) as captured:
        page(root, reserved="all")

    over_calls = [query["sql"] for query in captured if "ai_budget_calllog" in query["sql"]]
    assert all("LIMIT" in query for query in over_calls)
    assert not any("DISTINCT" in query for query in over_calls)


def test_the_paginator_counts_no_further_than_its_cap(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CappedPaginator, "most", 100)
    CallLogFactory.create_batch(101)
    with CaptureQueriesContext(connection) as captured:
        content = page(root)

    assert "100+ rows match" in content
    assert any("LIMIT 101" in query["sql"] for query in captured)
    assert len(listed(root, p="2")) == 50
    assert root.get(CHANGELIST, {"p": "3"}).status_code == 302


def test_a_list_below_the_cap_is_counted_exactly(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CappedPaginator, "most", 3)
    CallLogFactory.create_batch(3)

    content = page(root)

    assert "rows match" not in content
    assert "3 calls" in content


def test_the_cap_is_written_for_people() -> None:
    assert CappedPaginator([], 50).most_shown == "10,000"


def test_columns_cannot_be_sorted_by(root: Client) -> None:
    first, second = CallLogFactory.create(cost_nanousd=2), CallLogFactory.create(cost_nanousd=1)

    assert listed(root, o="7") == [second, first]
    assert "?o=" not in page(root)


# Filters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["today", "this week", "this month too"]),
        ("week", ["today", "this week", "this month too"]),
        ("nonsense", ["today", "this week", "this month too"]),
        ("today", ["today"]),
        ("month", ["today", "this week", "this month too", "this month"]),
        ("last_month", ["last month"]),
        ("all", ["today", "this week", "this month too", "this month", "last month", "long ago"]),
    ],
)
def test_the_last_seven_days_unless_asked_otherwise(
    root: Client, choice: str | None, expected: list[str]
) -> None:
    for subject, at in {
        "long ago": datetime(2026, 8, 31, 23, 59, tzinfo=UTC),
        "last month": datetime(2026, 9, 1, tzinfo=UTC),
        "this month": datetime(2026, 10, 1, tzinfo=UTC),
        "this month too": NOW - timedelta(days=7),
        "this week": datetime(2026, 10, 14, 23, 59, tzinfo=UTC),
        "today": datetime(2026, 10, 15, tzinfo=UTC),
    }.items():
        CallLogFactory.create(subject=subject, reserved_at=at)

    query = {} if choice is None else {"reserved": choice}

    assert [call.subject for call in listed(root, **query)] == expected


def test_the_first_range_is_marked_as_chosen(root: Client) -> None:
    response: Any = root.get(CHANGELIST)
    (time, *_others) = response.context["cl"].filter_specs

    choices = list(time.choices(response.context["cl"]))

    assert [choice["selected"] for choice in choices] == [True, False, False, False, False]
    assert choices[0]["query_string"] == "?"
    assert choices[1]["query_string"] == "?reserved=today"


def test_features_and_categories_come_from_their_budgets(root: Client) -> None:
    product = FeatureBudgetFactory.create(name="product")
    chat = FeatureBudgetFactory.create(name="chat", parent=product)
    of_chat = CallLogFactory.create(feature=chat)
    CallLogFactory.create(feature__name="search")

    assert listed(root, feature="chat") == [of_chat]
    assert listed(root, feature="product") == [of_chat]
    assert listed(root, feature="unheard-of") == []


def test_models_come_from_budgets_ladders_rates_and_settings(root: Client) -> None:
    FeatureBudgetFactory.create(model="of-a-budget")
    DowngradeRungFactory.create(model="of-a-rung")
    ModelRateFactory.create(model="of-a-rate")
    haiku = CallLogFactory.create(model=HAIKU)
    CallLogFactory.create(model="of-a-call-alone")

    content = page(root)

    for name in ("of-a-budget", "of-a-rung", "of-a-rate", OPUS):
        assert f"?model={name}" in content
    assert "?model=of-a-call-alone" not in content
    assert listed(root, model=HAIKU) == [haiku]


def test_status_and_kind_filter(root: Client) -> None:
    cached = CallLogFactory.create(status="cached", kind="stream")
    CallLogFactory.create()

    assert listed(root, status__exact="cached") == [cached]
    assert listed(root, kind__exact="stream") == [cached]


def test_all_calls_of_a_user_are_one_link_away(root: Client) -> None:
    user = UserFactory.create()
    old = CallLogFactory.create(user=user, reserved_at=NOW - timedelta(days=100))
    CallLogFactory.create()

    assert f"?user={user.pk}&amp;reserved=all" in detail(root, old)
    assert listed(root, user=str(user.pk), reserved="all") == [old]


# Search -----------------------------------------------------------------------------------------


def test_a_request_is_found_by_its_whole_id_however_old(root: Client) -> None:
    old = CallLogFactory.create(request_id="req_abc", reserved_at=NOW - timedelta(days=300))
    CallLogFactory.create(request_id="req_abcd")

    assert listed(root, q=" req_abc ") == [old]
    assert listed(root, q="req_ab") == []


def test_a_call_is_found_with_all_its_attempts(root: Client) -> None:
    call_id = uuid.uuid4()
    first = CallLogFactory.create(call_id=call_id)
    second = CallLogFactory.create(call_id=call_id, attempt=1, counted=0)
    CallLogFactory.create()

    assert listed(root, q=str(call_id)) == [second, first]


def test_a_chosen_time_still_narrows_a_search(root: Client) -> None:
    CallLogFactory.create(request_id="req_abc", reserved_at=NOW - timedelta(days=3))

    assert listed(root, q="req_abc", reserved="today") == []


# One call ---------------------------------------------------------------------------------------


def test_the_cost_is_shown_to_the_last_nano_dollar(root: Client) -> None:
    call = CallLogFactory.create(cost_nanousd=1_234_567_891, reserved_nanousd=2_500_000_000)

    content = detail(root, call)

    assert "$1.234567891" in content
    assert "$2.50<" in content


def test_the_other_attempts_of_the_call_are_linked(root: Client) -> None:
    call_id = uuid.uuid4()
    first = CallLogFactory.create(call_id=call_id, status="estimated", cost_nanousd=5)
    second = CallLogFactory.create(call_id=call_id, attempt=1, counted=0)
    other = CallLogFactory.create()

    content = detail(root, second)

    assert f'<a href="{CHANGELIST}{first.pk}/change/">Attempt 0</a> Estimated' in content
    assert f"{CHANGELIST}{other.pk}/change/" not in content


def test_every_field_is_on_the_page() -> None:
    from django.contrib import admin
    from django.contrib.admin.utils import flatten_fieldsets

    shown = set(flatten_fieldsets(admin.site.get_model_admin(CallLog).fieldsets or ()))
    stand_ins = {
        "user": "caller_with_calls",
        "cost_nanousd": "exact_cost",
        "reserved_nanousd": "exact_reserved",
        "saved_nanousd": "exact_saved",
        "latency_ms": "latency",
        "first_token_ms": "first_token",
    }
    fields = {field.name for field in CallLog._meta.get_fields() if field.name != "id"}

    assert {stand_ins.get(name, name) for name in fields} == shown - {"attempts_of_call"}
