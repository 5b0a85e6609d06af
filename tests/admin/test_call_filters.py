"""Filters of the list of calls that links lead to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext, override_settings

from tests.admin.conftest import NOW
from tests.admin.test_calls import CHANGELIST, listed, page
from tests.factories import HAIKU, OPUS, CallLogFactory, UserFactory

pytestmark = pytest.mark.django_db


def choices(client: Client, name: str, **query: str) -> list[dict[str, Any]]:
    changelist = client.get(CHANGELIST, query).context["cl"]
    (spec,) = (it for it in changelist.filter_specs if name in it.expected_parameters())
    return list(spec.choices(changelist))


# A range of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"since": "2026-10-02", "until": "2026-10-03"}, ["end", "begin"]),
        ({"since": "2026-10-03"}, ["after"]),
        ({"until": "2026-10-02"}, ["before"]),
        ({"since": "2026-10-02T12:00:00+00:00"}, ["after", "end"]),
        ({"since": "2026-10-02T14:00:00+02:00", "until": "2026-10-03"}, ["end"]),
        ({"since": "2026-10-02", "until": "2026-10-03", "reserved": "today"}, ["end", "begin"]),
    ],
)
def test_a_range_is_of_days_or_moments(
    root: Client, query: dict[str, str], expected: list[str]
) -> None:
    begin, moment = datetime(2026, 10, 2, tzinfo=UTC), timedelta(microseconds=1)
    for subject, at in {
        "before": begin - moment,
        "begin": begin,
        "end": begin + timedelta(days=1) - moment,
        "after": begin + timedelta(days=1),
    }.items():
        CallLogFactory.create(subject=subject, reserved_at=at)

    assert [call.subject for call in listed(root, **query)] == expected


def test_days_of_a_range_are_those_that_limits_count_in(root: Client) -> None:
    CallLogFactory.create(reserved_at=datetime(2026, 10, 1, 18, 14, tzinfo=UTC))
    call = CallLogFactory.create(reserved_at=datetime(2026, 10, 1, 18, 15, tzinfo=UTC))

    with override_settings(AI_BUDGET={"TIME_ZONE": "Asia/Kathmandu"}):
        assert listed(root, since="2026-10-02", until="2026-10-03") == [call]


@pytest.mark.parametrize(
    "query",
    [
        {"since": "nonsense"},
        {"since": "2026-13-01", "until": ""},
        {"until": "99999-01-01"},
        {"since": "2026-10-02T12:00:00"},
    ],
)
def test_what_is_no_range_is_the_last_seven_days(root: Client, query: dict[str, str]) -> None:
    call = CallLogFactory.create()
    CallLogFactory.create(reserved_at=NOW - timedelta(days=8))

    assert listed(root, **query) == [call]


def test_a_range_is_shown_and_left_by_any_other(root: Client) -> None:
    query = {"since": "2026-10-02", "until": "2026-10-03T12:30:00+00:00", "feature": "chat"}

    *others, own = choices(root, "reserved", **query)

    assert (own["display"], own["selected"]) == ("10/02/2026 – 10/03/2026 12:30", True)
    assert not any(choice["selected"] for choice in others)
    assert others[1]["query_string"] == "?feature=chat&reserved=today"


# Callers ----------------------------------------------------------------------------------------


def test_calls_of_one_user(root: Client) -> None:
    user = UserFactory.create(username="anna")
    call = CallLogFactory.create(user=user)
    CallLogFactory.create(user=UserFactory.create())

    assert listed(root, user=str(user.pk)) == [call]
    assert [it["display"] for it in choices(root, "user", user=str(user.pk))] == ["All", "anna"]


def test_calls_of_a_user_who_is_gone(root: Client) -> None:
    user = UserFactory.create()
    key = user.pk
    call = CallLogFactory.create(user=user)
    user.delete()

    assert listed(root, user=str(key)) == [call]
    assert f"user {key} (deleted)" in page(root, user=str(key))


@pytest.mark.parametrize("value", ["nobody", "-1", "9" * 40, "\0"])
def test_nobody_has_no_calls(root: Client, value: str) -> None:
    CallLogFactory.create(user=UserFactory.create())
    CallLogFactory.create()

    assert listed(root, user=value) == []


def test_calls_of_one_subject(root: Client) -> None:
    call = CallLogFactory.create(subject="tenant-1")
    CallLogFactory.create(subject="tenant-11")

    assert listed(root, subject="tenant-1") == [call]


@pytest.mark.parametrize(
    ("tag", "found"),
    [
        ("plan=free", True),
        ("plan = free ", True),
        ("plan=fre", False),
        ("plan=", False),
        ("plan", False),
        ("=free", False),
        ("it's.a[0]=50 % of $.a[0]", True),
        ("é=ü", True),
        ("empty=", True),
    ],
)
def test_calls_with_one_tag(root: Client, tag: str, found: bool) -> None:
    call = CallLogFactory.create(
        tags={"plan": "free", "it's.a[0]": "50 % of $.a[0]", "é": "ü", "empty": ""}
    )
    CallLogFactory.create(tags={"other": "free"})

    assert listed(root, tag=tag) == ([call] if found else [])


# What became of them ----------------------------------------------------------------------------


def test_calls_that_another_model_answered(root: Client) -> None:
    call = CallLogFactory.create(requested_model=OPUS, model=HAIKU)
    CallLogFactory.create()

    assert listed(root, downgraded="yes") == [call]
    assert listed(root, downgraded=OPUS) == [call]
    assert listed(root, downgraded=HAIKU) == []


def test_calls_by_what_saved_in_whatever_order_they_name_it(root: Client) -> None:
    one = CallLogFactory.create(saved_reason="batch, prompt cache")
    other = CallLogFactory.create(saved_reason="prompt cache, batch")
    CallLogFactory.create(saved_reason="batch")

    assert listed(root, saved_by="batch, prompt cache") == [other, one]
    assert listed(root, saved_by=", ".join("abcdefghij")) == []


# What they cost ---------------------------------------------------------------------------------


def test_filters_that_nobody_asked_for_are_not_there_and_cost_nothing(root: Client) -> None:
    CallLogFactory.create(user=UserFactory.create(), subject="tenant-1", tags={"plan": "free"})

    specs = root.get(CHANGELIST).context["cl"].filter_specs
    names = {name for it in specs for name in it.expected_parameters()}
    assert not {"user", "subject", "tag", "downgraded", "saved_by"} & names


def test_no_filter_reads_the_calls_for_its_choices(root: Client) -> None:
    user = UserFactory.create()
    with CaptureQueriesContext(connection) as captured:
        page(root, user=str(user.pk), subject="tenant-1", tag="a=b", downgraded="yes")

    # The rows are counted, and read.
    assert sum("ai_budget_calllog" in it["sql"] for it in captured) == 2
