from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.test.utils import override_settings
from django.urls import reverse
from django.utils import translation

from ai_budget.admin.spend_sections import Figure, Table
from ai_budget.models import CallLog, FeatureBudget, TotalMark, TotalState
from ai_budget.money import NANO_PER_USD, parse_usd
from ai_budget.review import rollups
from tests.admin.conftest import NOW, SignIn
from tests.depth import some_of
from tests.factories import (
    HAIKU,
    OPUS,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    ModelRateFactory,
    SpendWindowFactory,
    UserFactory,
    mark,
)
from tests.queries import statements

pytestmark = pytest.mark.django_db

PAGE = "/admin/ai_budget/daytotal/"
CSV = f"{PAGE}csv/"
PAID = {"settled", "estimated"}
Rows = dict[str, dict[str, Figure]]


def context(client: Client, **query: Any) -> Any:
    response = client.get(PAGE, query)
    assert response.status_code == 200
    return response.context


def page(client: Client, **query: Any) -> str:
    response = client.get(PAGE, query)
    assert response.status_code == 200
    return response.content.decode()


def tables(shown: Any) -> dict[str, Table]:
    sections = [*shown["on_what"], *shown["by_whom"], *shown["not_spent"]]
    return {it.key: it for it in [*sections, shown["days"].table, shown["month"].table]}


def rows(table: Table) -> Rows:
    """The figures of a table, by the row's name and the column's."""
    return {
        str(row[0].text): {column.title: it for column, it in zip(table.columns, row, strict=True)}
        for row in table.rows
    }


def totals(shown: Any) -> dict[str, Figure]:
    return {it.label: it for it in shown["totals"]}


def cards(shown: Any) -> dict[str, Figure]:
    return {it.label: it for it in shown["cards"]}


def nanousd(figure: Figure) -> int:
    """The exact amount, which a figure says to who points at it."""
    return parse_usd(figure.title.replace("$", "").replace(",", ""))


def number(figure: Figure) -> int:
    return int(str(figure.text).replace(",", ""))


def at(day: int, hour: int = 9) -> datetime:
    return datetime(2026, 10, day, hour, tzinfo=UTC)


# Who may see it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [PAGE, CSV])
def test_a_stranger_is_sent_to_sign_in(client: Client, url: str) -> None:
    response = client.get(url)

    assert response.status_code == 302
    assert response.headers["Location"].startswith(reverse("admin:login"))


@pytest.mark.parametrize("url", [PAGE, CSV])
def test_it_is_for_those_alone_who_may_see_spend(staff: SignIn, url: str) -> None:
    other = staff("view_calllog", "view_featurebudget", "view_spendwindow", "view_userquota")

    assert staff().get(url).status_code == 403
    assert other.get(url).status_code == 403
    assert staff("view_spend").get(url).status_code == 200


def test_the_index_leads_to_it_for_those_who_may_see_it(staff: SignIn) -> None:
    index = reverse("admin:index")

    assert PAGE not in staff("view_calllog").get(index).content.decode()
    content = staff("view_spend").get(index).content.decode()
    assert f'href="{PAGE}"' in content
    assert f"{PAGE}add/" not in content


def test_it_stands_where_a_list_of_sums_would() -> None:
    assert reverse("admin:ai_budget_spend") == PAGE
    assert reverse("admin:ai_budget_daytotal_changelist") == PAGE


@pytest.mark.parametrize("path", ["add/", "1/change/", "1/delete/", "1/history/"])
def test_there_is_no_form_of_a_sum(root: Client, path: str) -> None:
    assert root.get(PAGE + path).status_code == 404
    assert root.post(PAGE + path, {"feature": "x"}).status_code in {403, 404}


def test_figures_lead_to_calls_for_those_who_may_see_calls(staff: SignIn) -> None:
    CallLogFactory.create(user=UserFactory.create())
    calls = reverse("admin:ai_budget_calllog_changelist")

    assert calls not in page(staff("view_spend"), by="model")
    assert f"{calls}?since=" in page(staff("view_spend", "view_calllog"))


# The figures ------------------------------------------------------------------------------------


@pytest.fixture
def traffic() -> Callable[[int], list[CallLog]]:
    """Make calls at random: all statuses, some in the totals, some booked since."""

    def make(seed: int) -> list[CallLog]:
        dice = random.Random(seed)
        category = FeatureBudgetFactory.create(name="product", monthly_plan_usd=Decimal("0.01"))
        for name in ("chat", "search"):
            FeatureBudgetFactory.create(name=name, parent=category, monthly_limit_usd=Decimal(1))
        FeatureBudgetFactory.create(name="nightly")
        users = [*UserFactory.create_batch(4), None]
        calls = [_call(dice, users) for _ in range(120)]
        made = CallLog.objects.bulk_create(calls[:80])
        for call in made:
            mark(call)
        rollups.add_up()
        later = CallLog.objects.bulk_create(calls[80:])
        for call in later:
            mark(call)
        late = dice.sample([it for it in made if it.status == "reserved"], 2)
        for call in late:
            call.status, call.cost_nanousd = "settled", dice.randrange(10**10)
            call.save()
            mark(call)
        return list(CallLog.objects.all())

    return make


def _call(dice: random.Random, users: list[Any]) -> CallLog:
    status = dice.choice(["settled"] * 4 + ["estimated", "released", "cached", "reserved"])
    feature = dice.choice(["chat", "search", "nightly"])
    requested = dice.choice([OPUS, SONNET, HAIKU])
    lever = dice.choice(["", "", "batch", "prompt cache", "batch, prompt cache"])
    call: CallLog = CallLogFactory.build(
        feature=None,
        feature_id=feature,
        category="" if feature == "nightly" else "product",
        user=dice.choice(users),
        subject=dice.choice(["", "", "tenant-1"]),
        status=status,
        requested_model=requested,
        model=dice.choice([requested, requested, HAIKU]),
        cost_nanousd=dice.randrange(10**10) if status in PAID else None,
        saved_nanousd=dice.randrange(10**9) if lever or status == "cached" else 0,
        saved_reason="response cache" if status == "cached" else lever,
        output_tokens=dice.randrange(1000),
        cache_checked=dice.random() < 0.5,
        reserved_at=NOW - timedelta(minutes=dice.randrange(60 * 24 * 50)),
        tags={"plan": dice.choice(["free", "team"])},
    )
    if status in {"released", "cached"}:
        call.cost_nanousd = 0
    return call


def spend(calls: Iterable[CallLog]) -> int:
    return sum(it.cost_nanousd or 0 for it in calls)


def made(calls: Iterable[CallLog]) -> int:
    return sum(
        1 if it.status == "cached" else it.counted for it in calls if it.status != "released"
    )


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_what_the_calls_add_up_to(
    root: Client, traffic: Callable[[int], list[CallLog]], seed: int
) -> None:
    everything = traffic(seed)
    calls = [it for it in everything if it.reserved_at >= at(1, 0)]
    shown = context(root)
    of = tables(shown)

    def by(column: str) -> dict[str, list[CallLog]]:
        groups: dict[str, list[CallLog]] = {}
        for it in calls:
            if it.status != "released":
                groups.setdefault(str(getattr(it, column)), []).append(it)
        return groups

    assert nanousd(totals(shown)["Spend"]) == spend(calls)
    assert number(totals(shown)["Calls"]) == made(calls)
    assert nanousd(totals(shown)["Saved"]) == sum(it.saved_nanousd for it in calls)
    assert number(totals(shown)["Active users"]) == len(by("user_id")) - 1
    for key, column in (("features", "feature_id"), ("models", "model")):
        assert {
            name: (nanousd(row["Spend"]), number(row["Calls"]))
            for name, row in rows(of[key]).items()
        } == {name: (spend(its), made(its)) for name, its in by(column).items()}
    for name, row in rows(of["features"]).items():
        downgraded = [it for it in by("feature_id")[name] if it.downgraded]
        assert number(row["Downgraded"]) == made(downgraded)
    dearest = sorted(
        (spend(its) for user, its in by("user_id").items() if user != "None"), reverse=True
    )
    assert [nanousd(row["Spend"]) for row in rows(of["users"]).values()] == dearest
    assert nanousd(rows(of["subjects"])["tenant-1"]["Spend"]) == spend(by("subject")["tenant-1"])
    held = [it for it in everything if it.status == "reserved"]
    assert nanousd(cards(shown)["Held"]) == sum(it.reserved_nanousd for it in held)
    assert f"{len(held)} calls in flight" in str(cards(shown)["Held"].note)


@pytest.mark.parametrize("stack", ["feature", "model"])
def test_each_day_is_what_its_calls_add_up_to(
    root: Client, traffic: Callable[[int], list[CallLog]], stack: str
) -> None:
    calls = traffic(4)
    table = tables(context(root, by=stack))["days"]
    names = [column.title for column in table.columns[2:]]

    column = "feature_id" if stack == "feature" else "model"
    for day, row in zip(range(1, 16), table.rows, strict=True):
        own = [it for it in calls if it.day == at(day).date()]
        expected = [[it for it in own if getattr(it, column) == name] for name in names]
        assert [nanousd(it) for it in row[1:]] == [spend(own), *map(spend, expected)]


def test_today_this_week_and_this_month_stand_beside_those_before(root: Client) -> None:
    """NOW is noon of Thursday, 15 October."""
    amounts = {
        at(15): 1, at(14): 10, at(14, 13): 100, at(12): 1000, at(11): 10_000,
        at(1, 0): 100_000, at(1, 0) - timedelta(hours=1): 10**6,
        datetime(2026, 9, 15, 11, tzinfo=UTC): 10**7,
    }  # fmt: skip
    for when, amount in amounts.items():
        CallLogFactory.create(reserved_at=when, cost_nanousd=amount * NANO_PER_USD)

    shown = cards(context(root))

    def dollars(label: str) -> int:
        return nanousd(shown[label]) // NANO_PER_USD

    assert (dollars("Today"), dollars("This week"), dollars("This month")) == (1, 1111, 111_111)
    assert "$10.00 by this time yesterday" in str(shown["Today"].note)
    assert "<b>90.0 % less than</b>" in str(shown["Today"].note)
    assert "$0.00 by this time last week" in str(shown["This week"].note)
    assert "$10,000,000.00 by this day last month" in str(shown["This month"].note)


def test_budgets_and_plans_are_what_spend_is_measured_by(root: Client) -> None:
    FeatureBudgetFactory.create(
        name="*", daily_limit_usd=4, monthly_limit_usd=100, monthly_plan_usd=31
    )
    chat = FeatureBudgetFactory.create(name="chat", monthly_limit_usd=10, monthly_plan_usd=2)
    CallLogFactory.create(feature=chat, cost_nanousd=3 * NANO_PER_USD, reserved_at=at(15))
    shown = context(root)
    row = rows(tables(shown)["features"])["chat"]

    assert "75.0 % of the limit $4.00" in str(cards(shown)["Today"].note)
    assert "300.0 % of the plan $1.00" in str(cards(shown)["Today"].note)
    assert "3.0 % of the limit $100.00" in str(cards(shown)["This month"].note)
    assert "30.0 % of the limit $10.00" in str(row["Of the budget"].note)
    assert "150.0 % of the plan $2.00" in str(row["Of the budget"].drawn)


def test_the_month_is_forecast_once_it_has_begun_well(root: Client) -> None:
    CallLogFactory.create(reserved_at=at(1), cost_nanousd=29 * NANO_PER_USD)
    shown = context(root)

    assert cards(shown)["Forecast for the month"].text == "$62.00"
    assert "Forecast" in [it.label for it in shown["month"].legend]


def test_the_month_adds_up_day_by_day_beside_the_one_before(root: Client) -> None:
    for when in (at(1), at(3), datetime(2026, 9, 2, tzinfo=UTC)):
        CallLogFactory.create(reserved_at=when, cost_nanousd=NANO_PER_USD)

    table = tables(context(root))["month"]

    assert [[it.text for it in row[1:]] for row in table.rows[:3]] == [
        ["$1.00", "$1.00", "$0.00"],
        ["$0.00", "$1.00", "$1.00"],
        ["$1.00", "$2.00", "$1.00"],
    ]
    assert len(table.rows) == 15


def test_hits_refusals_and_savings_are_told(root: Client) -> None:
    CallLogFactory.create_batch(3, cache_checked=True)
    CallLogFactory.create(
        status="cached", cache_checked=True, saved_nanousd=5, saved_reason="response cache"
    )
    SpendWindowFactory.create(scope="feature:chat", refused=7)
    shown = context(root)
    row = rows(tables(shown)["features"])["chat"]

    assert (row["Hit rate"].text, row["Refused"].text) == ("25.0 %", "7")
    assert totals(shown)["Refused"].text == "7"
    saved = rows(tables(shown)["savings"])["response cache"]
    assert (nanousd(saved["Saved"]), saved["Calls"].text) == (5, "1")


def test_what_needs_attention_says_so_and_where(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat", monthly_plan_usd=1)
    CallLogFactory.create(feature=chat, cost_nanousd=2 * NANO_PER_USD)
    CallLogFactory.create(
        feature=chat, status="reserved", deadline=NOW - timedelta(hours=1), reserved_at=at(15)
    )

    content = page(root)

    assert "Needs attention" in content
    assert "chat spent $2.00, 200.0 % of its plan of $1.00." in content
    assert re.search(r"never came back.* href=\"[^\"]*status__exact=reserved", content)


def test_with_no_call_the_page_says_so(root: Client) -> None:
    content = page(root)

    assert "Needs attention" not in content
    assert "No feature was called or refused." in content
    assert "Nothing was spent." in content


# Ranges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ({}, "2026-10-01", "2026-10-31"),
        ({"range": "today"}, "2026-10-15", "2026-10-15"),
        ({"range": "week"}, "2026-10-09", "2026-10-15"),
        ({"range": "last_month"}, "2026-09-01", "2026-09-30"),
        ({"range": "30"}, "2026-09-16", "2026-10-15"),
        ({"range": "90"}, "2026-07-18", "2026-10-15"),
        ({"first": "2026-10-02", "last": "2026-10-03"}, "2026-10-02", "2026-10-03"),
        ({"first": "2026-10-02"}, "2026-10-02", "2026-10-15"),
        ({"last": "2026-10-03"}, "2026-10-01", "2026-10-03"),
        ({"first": "2026-10-02", "last": "2026-10-03", "range": "90"}, "2026-10-02", "2026-10-03"),
        ({"first": "", "last": "", "range": "today"}, "2026-10-15", "2026-10-15"),
    ],
)
def test_a_range_is_of_whole_days(
    root: Client, query: dict[str, str], first: str, last: str
) -> None:
    begin = datetime.fromisoformat(f"{first}T00:00:00+00:00")
    end = datetime.fromisoformat(f"{last}T00:00:00+00:00") + timedelta(days=1)
    moment = timedelta(microseconds=1)
    for when in (begin - moment, begin, min(end - moment, NOW), end):
        CallLogFactory.create(reserved_at=when, cost_nanousd=NANO_PER_USD)
    shown = context(root, **query)

    assert (shown["asked"].first.isoformat(), shown["asked"].last.isoformat()) == (first, last)
    assert totals(shown)["Spend"].text == "$2.00"
    assert not shown["asked"].problems


def test_days_are_those_that_limits_count_in(root: Client) -> None:
    midnight = datetime(2026, 10, 14, tzinfo=ZoneInfo("Asia/Kathmandu"))
    with override_settings(AI_BUDGET={"TIME_ZONE": "Asia/Kathmandu"}):
        for when in (midnight - timedelta(seconds=1), midnight, midnight + timedelta(hours=23)):
            CallLogFactory.create(reserved_at=when, cost_nanousd=NANO_PER_USD)
        shown = context(root, first="2026-10-14", last="2026-10-14")

    assert totals(shown)["Spend"].text == "$2.00"
    assert shown["range"] == "Oct. 14, 2026"


@pytest.mark.parametrize(
    ("first", "bars", "title"),
    [
        ("2026-07-20", 88, "Spend by day"),
        ("2026-06-01", 20, "Spend by week"),
        ("2023-01-02", 46, "Spend by month"),
    ],
)
def test_bars_of_a_long_range_are_of_weeks_and_months(
    root: Client, first: str, bars: int, title: str
) -> None:
    for day in (first, "2026-10-14", "2026-10-15"):
        when = datetime.fromisoformat(f"{day}T08:00:00+00:00")
        CallLogFactory.create(reserved_at=when, cost_nanousd=NANO_PER_USD)
    rollups.add_up()
    shown = context(root, first=first, last="2026-10-15")

    assert shown["days"].title == title
    assert len(shown["days"].table.rows) == bars
    assert sum(nanousd(row[1]) for row in shown["days"].table.rows) == 3 * NANO_PER_USD


# Filters ----------------------------------------------------------------------------------------


@pytest.fixture
def two_of_each() -> dict[str, Any]:
    """One dollar of what is asked for, and others that are not."""
    product = FeatureBudgetFactory.create(name="product")
    chat = FeatureBudgetFactory.create(name="chat", parent=product)
    anna = UserFactory.create(username="anna")
    CallLogFactory.create(
        feature=chat,
        category="product",
        user=anna,
        model=HAIKU,
        requested_model=HAIKU,
        tags={"plan": "free", "b": "2"},
        cost_nanousd=NANO_PER_USD,
    )
    CallLogFactory.create(
        feature__name="search",
        user=UserFactory.create(),
        tags={"plan": "team"},
        cost_nanousd=2 * NANO_PER_USD,
    )
    return {"anna": anna.pk}


@pytest.mark.parametrize(
    "query",
    [
        {"feature": "chat"},
        {"feature": "product"},
        {"model": HAIKU},
        {"username": "anna"},
        {"user": "anna"},
        {"tag": "plan=free"},
        {"tag": " plan = free "},
        {"feature": "chat", "model": HAIKU, "username": "anna", "tag": "b=2", "by": "model"},
    ],
)
def test_filters_leave_out_all_others(
    root: Client, two_of_each: dict[str, Any], query: dict[str, str]
) -> None:
    query = {name: str(two_of_each[v]) if name == "user" else v for name, v in query.items()}
    shown = context(root, **query)
    of = tables(shown)

    assert shown["asked"].problems == ()
    assert totals(shown)["Spend"].text == "$1.00"
    assert cards(shown)["Today"].text == "$1.00"
    assert list(rows(of["features"])) == ["chat"]
    assert list(rows(of["models"])) == [HAIKU]
    assert list(rows(of["users"])) == ["anna"]
    assert [it.text for it in shown["days"].legend] == ["$1.00"]


@pytest.mark.parametrize(
    ("query", "known"),
    [({}, True), ({"feature": "chat"}, True), ({"model": HAIKU}, False), ({"tag": "b=2"}, False)],
)
def test_what_belongs_to_budgets_is_left_out_of_less(
    root: Client, two_of_each: dict[str, Any], query: dict[str, str], known: bool
) -> None:
    shown = context(root, **query)
    row = rows(tables(shown)["features"])["chat"]

    assert ("Refused" in row, "Of the budget" in row, "Refused" in totals(shown)) == (known,) * 3


def test_what_is_asked_for_stays_in_every_link(root: Client, two_of_each: dict[str, Any]) -> None:
    shown = context(root, feature="chat", tag="plan=free", range="90", by="model")

    links = [url for _title, url, _chosen in [*shown["ranges"], *shown["days"].choices]]
    links += [shown["csv_url"]]
    assert all("feature=chat&tag=plan%3Dfree" in url for url in links)
    assert sum("range=90" in url for url in links) == 4


def test_a_user_who_is_gone_can_still_be_asked_for(root: Client) -> None:
    user = UserFactory.create()
    key = user.pk
    CallLogFactory.create(user=user, cost_nanousd=NANO_PER_USD)
    user.delete()

    shown = context(root, user=str(key))

    assert totals(shown)["Spend"].text == "$1.00"
    assert f"user {key} (deleted)" in page(root, user=str(key))


def test_a_model_that_nobody_named_can_be_asked_for_once_it_was_used(root: Client) -> None:
    CallLogFactory.create(model="gateway/model")

    assert context(root, model="gateway/model")["asked"].problems == ()


@pytest.mark.parametrize(
    "query",
    some_of(
        [
            {"first": "nonsense"},
            {"first": "2026-13-01"},
            {"first": "0001-01-01"},
            {"last": "9999-12-31"},
            {"first": "2026-10-03", "last": "2026-10-02"},
            {"first": "2027-01-01"},
            {"first": "2005-01-01"},
            {"range": "century"},
            {"feature": "unheard-of"},
            {"model": "unheard-of"},
            {"username": "unheard-of"},
            {"user": "un\0heard-of' OR 1=1"},
            {"user": "9" * 40},
            {"tag": "plan"},
            {"tag": "=free"},
        ],
        count=6,
    ),
)
def test_what_makes_no_sense_is_told_and_left_out(root: Client, query: dict[str, str]) -> None:
    CallLogFactory.create(cost_nanousd=NANO_PER_USD)
    shown = context(root, **query)

    assert len(shown["asked"].problems) == 1
    assert totals(shown)["Spend"].text == "$1.00"
    assert '<li class="warning">' in page(root, **query)
    assert root.get(CSV, query).status_code == 200


@pytest.mark.parametrize("value", ["\0", "<script>alert(1)", "é" * 300, "'; --", "1=2"])
def test_no_parameter_breaks_the_page(root: Client, value: str) -> None:
    names = ("first", "last", "range", "feature", "model", "user", "username", "tag", "by")

    assert "<script>alert" not in page(root, **dict.fromkeys(names, value))


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"username": "anna"}, True),
        ({"tag": "plan=free", "range": "90"}, True),
        ({"feature": "chat"}, True),
        ({}, False),
        ({"username": "anna", "first": "2026-10-05"}, False),
    ],
)
def test_what_a_purge_took_from_the_figures_is_told(
    root: Client, two_of_each: dict[str, Any], query: dict[str, str], told: bool
) -> None:
    rollups.add_up()
    TotalState.objects.update(purged_before=at(5, 0), purged_day=at(5).date())

    assert ("Calls before Oct. 5, 2026 were purged" in page(root, **query)) is told


# The calls behind a figure ----------------------------------------------------------------------


def test_each_figure_leads_to_its_calls(
    root: Client, traffic: Callable[[int], list[CallLog]]
) -> None:
    traffic(7)
    shown = context(root, feature="product", range="30")
    followed = 0
    for table in tables(shown).values():
        for name, row in rows(table).items():
            for title in ("Spend", "Saved"):
                figure = row.get(title)
                if figure is None or not figure.url.startswith("/admin/ai_budget/calllog/"):
                    continue
                listed = root.get(figure.url).context["cl"].queryset
                column = "saved_nanousd" if title == "Saved" else "cost_nanousd"
                found = sum(getattr(it, column) or 0 for it in listed)
                assert found == nanousd(figure), (table.key, name)
                followed += 1
    for figure in (totals(shown)["Spend"], *cards(shown).values()):
        if figure.url:
            listed = root.get(figure.url).context["cl"].queryset
            held = figure.label == "Held"
            column = "reserved_nanousd" if held else "cost_nanousd"
            assert sum(getattr(it, column) or 0 for it in listed) == nanousd(figure), figure.label
            followed += 1

    assert followed > 40


def test_counts_lead_to_their_calls_too(root: Client) -> None:
    chat = FeatureBudgetFactory.create(name="chat")
    cached = CallLogFactory.create(feature=chat, status="cached", cache_checked=True)
    other = CallLogFactory.create(feature=chat, requested_model=OPUS, model=HAIKU)
    CallLogFactory.create(feature=chat)
    row = rows(tables(context(root))["features"])["chat"]

    def calls(figure: Figure) -> list[CallLog]:
        return list(root.get(figure.url).context["cl"].result_list)

    assert calls(row["Hit rate"]) == [cached]
    assert calls(row["Downgraded"]) == [other]
    assert len(calls(row["Calls"])) == 3


# What it costs ----------------------------------------------------------------------------------


def queries(client: Client, **query: str) -> list[str]:
    return statements(lambda: page(client, **query))


@pytest.mark.parametrize("query", [{}, {"range": "90", "by": "model"}, {"feature": "feature-0"}])
def test_queries_do_not_grow_with_the_calls(root: Client, query: dict[str, str]) -> None:
    def create(number: int) -> None:
        for index in range(number):
            CallLogFactory.create(
                feature__name=f"feature-{index}",
                model=f"model-{index}",
                user=UserFactory.create(),
                subject=f"tenant-{index}",
                reserved_at=NOW - timedelta(hours=7 * index),
            )
        rollups.add_up()

    for index in range(12):
        ModelRateFactory.create(model=f"model-{index}")
        # Refusals are looked up by key, some hundred features and days at a time.
        FeatureBudgetFactory.create(name=f"feature-{index}")
    create(3)
    few = queries(root, **query)
    create(12)
    many = queries(root, **query)

    # What was spent on days before the first call is not asked for, so that may be one more.
    assert len(few) <= len(many) <= len(few) + 1
    assert len(many) < 70


def test_no_call_is_read_that_is_in_the_totals(root: Client) -> None:
    for hours in range(0, 240, 24):
        CallLogFactory.create(user=UserFactory.create(), reserved_at=NOW - timedelta(hours=hours))
    rollups.add_up()
    assert not TotalMark.objects.exists()

    read = [sql for sql in queries(root) if 'FROM "ai_budget_calllog"' in sql.replace("`", '"')]

    # What is in flight, and the last minutes before the present of a comparison.
    assert all("reserved" in sql for sql in read)
    unbounded = [it for it in read if "'reserved'" not in it and "reserved_at" not in it]
    assert unbounded == []


# Words ------------------------------------------------------------------------------------------


def test_names_are_escaped(root: Client) -> None:
    hostile = "<script>alert('x')</script>"
    user = UserFactory.create(username=hostile)
    CallLogFactory.create(
        model=hostile, requested_model=hostile, user=user, subject=hostile, tags={hostile: hostile}
    )

    for query in ({}, {"by": "model"}, {"username": hostile}, {"tag": f"{hostile}={hostile}"}):
        assert "<script>alert" not in page(root, **query)


def test_nothing_is_inline_that_a_strict_policy_forbids(root: Client) -> None:
    CallLogFactory.create(user=UserFactory.create())
    content = page(root)

    assert " style=" not in content
    assert "<style" not in content
    assert re.findall(r"<script(?![^>]* src=)", content) == []
    assert re.findall(r"\son\w+=", content) == []


def test_figures_are_written_as_the_reader_writes_them(root: Client) -> None:
    CallLogFactory.create_batch(3, cache_checked=True)
    CallLogFactory.create(status="cached", cache_checked=True, reserved_at=at(14))
    with override_settings(LANGUAGE_CODE="de"), translation.override("de"):
        content = page(root)

    assert "25,0 %" in content
    assert ">14.10.2026<" in content


# CSV --------------------------------------------------------------------------------------------


def exported(client: Client, **query: str) -> list[list[str]]:
    response: Any = client.get(CSV, query)
    assert response.status_code == 200
    assert response.streaming
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    text = b"".join(response.streaming_content).decode()
    return list(csv.reader(io.StringIO(text)))


def test_what_is_shown_can_be_exported(
    root: Client, traffic: Callable[[int], list[CallLog]]
) -> None:
    calls = [it for it in traffic(2) if it.reserved_at >= at(1, 0)]

    header, *lines = exported(root)

    assert header == ["section", "name", "metric", "value"]
    values = {(section, name, metric): value for section, name, metric, value in lines}
    assert parse_usd(values["total", "", "spend_usd"]) == spend(calls)
    days = [parse_usd(value) for (section, _, _), value in values.items() if section == "days"]
    assert sum(days) == spend(calls)


def test_an_export_keeps_the_filters(root: Client, two_of_each: dict[str, Any]) -> None:
    lines = exported(root, feature="chat", by="model")

    assert ["total", "", "spend_usd", "1.000000000"] in lines
    assert ["days", f"2026-10-15, {HAIKU}", "spend_usd", "1.000000000"] in lines


def test_the_file_is_named_after_its_days(root: Client) -> None:
    disposition = root.get(CSV).headers["Content-Disposition"]

    assert disposition == 'attachment; filename="spend-2026-10-01-2026-10-31.csv"'


def test_no_cell_is_a_formula(root: Client) -> None:
    FeatureBudget.objects.create(name="=cmd")
    CallLogFactory.create(
        feature_id="=cmd",
        feature=None,
        subject="=1+1",
        model="@SUM(1)",
        user=UserFactory.create(username="+1"),
    )

    cells = [cell for line in exported(root) for cell in line]

    assert "'=1+1" in cells
    assert [cell for cell in cells if cell.startswith(("=", "+", "@"))] == []
