"""What Prometheus reads is what the database has, and a counter never falls."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import random
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, connection
from django.test.utils import override_settings
from prometheus_client import CollectorRegistry

import ai_budget
from ai_budget import periods
from ai_budget.ledger import base as ledgers
from ai_budget.metrics import prometheus
from ai_budget.metrics.prometheus import BudgetCollector
from ai_budget.models import CallLog, FeatureBudget, SpendWindow, TotalMark
from ai_budget.review import rollups
from ai_budget.testing import AnthropicSimulator, Pace, override_budget
from tests.batches.given import DAY, HOUR, MINUTE, later, sent, standing_still
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    SpendWindowFactory,
    UserFactory,
    mark,
)
from tests.ledger.given import NOON, estimated, limit, reserve, settle, settled
from tests.metrics.scrapes import Scrape, described
from tests.queries import statements

pytestmark = pytest.mark.django_db

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
NOW = datetime(2026, 10, 26, 9, 40, tzinfo=UTC)


@pytest.fixture(autouse=True)
def now() -> Any:
    with periods.override_clock(lambda: NOW):
        yield


def call(cost: int | None = 1_000_000_000, **fields: Any) -> Any:
    return CallLogFactory(cost_nanousd=cost, **fields)


# Costs, tokens, calls ----------------------------------------------------------------------------


def test_cost_is_told_by_feature_and_model() -> None:
    call(1_500_000_000)
    call(2_000_000_000)
    call(7, requested_model=HAIKU)
    call(250_000_000, feature__name="search")

    scrape = Scrape()
    assert scrape.values("ai_budget_cost_usd_total") == {
        frozenset({("feature", "chat"), ("model", SONNET)}): 3.5,
        frozenset({("feature", "chat"), ("model", HAIKU)}): 0.000000007,
        frozenset({("feature", "search"), ("model", SONNET)}): 0.25,
    }


@pytest.mark.parametrize("added_up", [False, True])
def test_it_is_the_same_however_much_is_added_up(added_up: bool) -> None:
    for days in range(40):
        call(days, reserved_at=NOW - timedelta(days=days))
    if added_up:
        rollups.add_up()
        call(1)

    assert (
        Scrape().value("ai_budget_cost_usd_total", feature="chat", model=SONNET)
        == (sum(range(40)) + added_up) / 10**9
    )


def test_an_estimate_stands_apart_until_the_truth_comes() -> None:
    row = call(5_000_000_000, status="estimated")
    before = Scrape()
    CallLog.objects.filter(pk=row.pk).update(status="settled", cost_nanousd=1_000_000_000)
    after = Scrape()

    labels = {"feature": "chat", "model": SONNET}
    assert before.value("ai_budget_estimated_cost_usd", **labels) == 5
    assert before.value("ai_budget_cost_usd_total", **labels) is None
    assert after.value("ai_budget_estimated_cost_usd", **labels) == 0
    assert after.value("ai_budget_cost_usd_total", **labels) == 1


def test_tokens_are_those_of_settled_calls_each_in_one_type() -> None:
    call(
        input_tokens=1,
        cache_write_5m_tokens=20,
        cache_write_1h_tokens=300,
        cache_read_tokens=4_000,
        output_tokens=50_000,
        thinking_tokens=49_000,
    )
    call(status="estimated", input_tokens=999)
    call(0, status="cached", input_tokens=0, output_tokens=0)

    found = Scrape().values("ai_budget_tokens_total")
    assert {dict(labels)["type"]: value for labels, value in found.items()} == {
        "input": 1,
        "cache_write_5m": 20,
        "cache_write_1h": 300,
        "cache_read": 4_000,
        "output": 50_000,
    }


def test_calls_are_those_that_are_over() -> None:
    call()
    call(counted=0, attempt=1)  # a repeat
    for _ in range(3):
        call(0, status="cached")
    call(status="estimated")
    call(0, status="released")
    call(None, status="reserved")

    found = Scrape().values("ai_budget_calls_total")
    assert {dict(labels)["status"]: value for labels, value in found.items()} == {
        "settled": 1,
        "cached": 3,
    }


def test_hits_are_told_beside_lookups() -> None:
    for _ in range(2):
        call(cache_checked=True)
    call()
    for _ in range(3):
        call(0, status="cached", cache_checked=True)

    scrape = Scrape()
    assert scrape.value("ai_budget_cache_hits_total", feature="chat") == 3
    assert scrape.value("ai_budget_cache_lookups_total", feature="chat") == 5


def test_what_was_saved_may_be_less_than_nothing() -> None:
    call(saved_nanousd=3_000_000_000, saved_reason="routing, prompt cache")
    call(saved_nanousd=-500_000_000, saved_reason="routing")
    call(saved_nanousd=-250_000_000, saved_reason="routing")

    scrape = Scrape()
    assert {
        dict(labels)["lever"]: v for labels, v in scrape.values("ai_budget_saved_usd").items()
    } == {
        "routing, prompt cache": 3,
        "routing": -0.75,
    }


def test_calls_in_flight_are_told_by_feature() -> None:
    for _ in range(2):
        call(None, status="reserved")
    call()

    assert Scrape().value("ai_budget_in_flight_calls", feature="chat") == 2


def test_bookings_that_are_not_added_up_are_told() -> None:
    for _ in range(3):
        call()
    assert Scrape().value("ai_budget_totals_behind") == TotalMark.objects.count() == 3

    rollups.add_up()
    assert Scrape().value("ai_budget_totals_behind") == 0


# Limits and balances -----------------------------------------------------------------------------


def test_limits_are_told_beside_what_is_taken_of_them() -> None:
    FeatureBudgetFactory(name="chat", daily_limit_usd="2.50")
    with periods.override_clock(lambda: NOON):
        windows = [limit(None, scope) for scope in ("feature:chat", "*")]
        settle(reserve(windows, 2_000_000_000), settled(1_250_000_000))
        settle(reserve(windows, 500_000_000), estimated(500_000_000))
        reserve(windows, 250_000_000)
        scrape = Scrape()

    today = {"feature": "chat", "period": "day"}
    assert scrape.value("ai_budget_limit_usd", **today) == 2.5
    assert scrape.value("ai_budget_spent_usd", **today) == 1.75
    assert scrape.value("ai_budget_held_usd", **today) == 0.25


def test_a_budget_without_a_limit_has_none() -> None:
    FeatureBudgetFactory(name="chat", daily_limit_usd="0")

    scrape = Scrape()
    assert scrape.value("ai_budget_limit_usd", feature="chat", period="day") == 0
    assert scrape.value("ai_budget_limit_usd", feature="chat", period="month") is None
    assert scrape.value("ai_budget_spent_usd", feature="chat", period="month") == 0


def test_a_raised_limit_is_the_one_in_force() -> None:
    budget = FeatureBudgetFactory(name="chat", monthly_limit_usd=100)
    LimitOverrideFactory(budget=budget, amount_usd=200, until=NOW + timedelta(days=1))

    assert Scrape().value("ai_budget_limit_usd", feature="chat", period="month") == 200


def test_the_whole_site_is_one_of_them() -> None:
    FeatureBudgetFactory(name="*", daily_limit_usd=9)

    assert Scrape().value("ai_budget_limit_usd", feature="*", period="day") == 9


def test_periods_are_those_of_the_zone() -> None:
    with override_settings(AI_BUDGET={"TIME_ZONE": "Asia/Kathmandu"}):
        scrape = Scrape()

    start = datetime(2026, 10, 25, 18, 15, tzinfo=UTC)
    assert scrape.value("ai_budget_period_start_timestamp_seconds", period="day") == (
        start.timestamp()
    )
    assert (
        scrape.value("ai_budget_period_end_timestamp_seconds", period="day")
        == (start + timedelta(days=1)).timestamp()
    )
    end = datetime(2026, 10, 31, 18, 15, tzinfo=UTC)
    assert scrape.value("ai_budget_period_end_timestamp_seconds", period="month") == (
        end.timestamp()
    )


# Refusals ----------------------------------------------------------------------------------------


def test_refusals_are_those_of_the_month_by_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "_KEYS_AT_ONCE", 4)
    for name in ("chat", "search"):
        FeatureBudgetFactory(name=name)
    for day, refused in ((1, 2), (25, 3), (26, 4)):
        SpendWindowFactory(first_day=datetime(2026, 10, day, tzinfo=UTC).date(), refused=refused)
    last_month = datetime(2026, 9, 30, tzinfo=UTC).date()
    SpendWindowFactory(first_day=last_month, refused=100)
    SpendWindowFactory(scope="user:1", refused=1_000)
    SpendWindowFactory(scope="*", refused=10_000)

    found = Scrape().values("ai_budget_refusals_total")
    assert {dict(labels)["feature"]: value for labels, value in found.items()} == {
        "chat": 9,
        "search": 0,
    }


def test_a_refused_call_is_told(api: AnthropicSimulator) -> None:
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        ai_budget.ask("Hello", feature="chat")
    ledgers.current().tidy()

    assert Scrape().value("ai_budget_refusals_total", feature="chat") == 1


# A counter never falls ---------------------------------------------------------------------------


def test_no_counter_ever_falls_whatever_becomes_of_a_call() -> None:
    """Whatever status a call goes through, added up in between or not."""
    dice = random.Random(7)
    courses = [
        ["reserved", "settled"],
        ["reserved", "released"],
        ["reserved", "estimated", "settled"],
        ["reserved", "estimated", "released"],
        ["cached"],
    ]
    rows = [(None, dice.choice(courses)) for _ in range(12)]
    before: dict[Any, float] = {}
    while any(course for _, course in rows):
        rows = [_advanced(row, course, dice) for row, course in rows]
        if dice.random() < 0.4:
            rollups.add_up()
        now = Scrape().counters()
        fallen = {
            key: (value, now.get(key)) for key, value in before.items() if now.get(key, 0) < value
        }
        assert fallen == {}
        before = now


def _advanced(row: Any, course: list[str], dice: random.Random) -> tuple[Any, list[str]]:
    if not course or dice.random() < 0.5:
        return row, course
    status, *rest = course
    free = status in ("released", "cached")
    cost = None if status == "reserved" else 0 if free else dice.randrange(1, 10**9)
    if row is None:
        return call(cost, status=status, cache_checked=True), rest
    CallLog.objects.filter(pk=row.pk).update(
        status=status, cost_nanousd=cost, output_tokens=dice.randrange(1_000)
    )
    mark(row)
    return row, rest


def test_nor_does_it_when_a_batch_that_was_given_up_is_answered(api: AnthropicSimulator) -> None:
    api.batches.pace = Pace.never()
    with standing_still() as clock:
        sent("one", "two", "three")
        scrapes = [Scrape()]
        later(clock, 2 * DAY + MINUTE)
        scrapes.append(Scrape())
        api.batches.end()
        later(clock, 2 * HOUR)
        scrapes.append(Scrape())

    labels = {"feature": "nightly", "model": HAIKU}
    booked = [it.value("ai_budget_estimated_cost_usd", **labels) or 0 for it in scrapes]
    assert booked[0] == 0 < booked[1]
    assert booked[2] == 0
    calls = [it.value("ai_budget_calls_total", **labels, status="settled") or 0 for it in scrapes]
    assert calls == [0, 0, 3]
    for earlier, after in pairwise(scrapes):
        now = after.counters()
        assert all(now.get(key, 0) >= value for key, value in earlier.counters().items())


# A scrape ----------------------------------------------------------------------------------------


def test_the_oldest_features_have_labels_and_the_rest_are_told_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prometheus, "MOST_FEATURES", 3)
    monkeypatch.setattr(prometheus, "MOST_MODELS", 2)
    for number, name in enumerate(["zoo", "chat", "search", "aardvark", "bee"]):
        call(10**number * 1_000_000_000, feature__name=name, model=f"model-{number}")

    costs = Scrape().values("ai_budget_cost_usd_total")

    assert costs == {
        frozenset({("feature", "zoo"), ("model", "model-0")}): 1,
        frozenset({("feature", "chat"), ("model", "model-1")}): 10,
        frozenset({("feature", "search"), ("model", "(other)")}): 100,
        frozenset({("feature", "(other)"), ("model", "(other)")}): 11_000,
    }


def test_a_scrape_takes_as_many_queries_for_many_calls_as_for_few() -> None:
    def queries() -> int:
        return len(statements(Scrape))

    for feature in ("chat", "search"):
        call(feature__name=feature)
    rollups.add_up()
    call()
    few = queries()
    for number in range(60):
        call(feature__name=f"feature-{number % 20}", reserved_at=NOW - timedelta(days=number))
    rollups.add_up()
    call()

    assert queries() <= few
    assert few < 20


def test_registering_it_asks_nothing_of_the_database(django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(0):
        CollectorRegistry(auto_describe=True).register(BudgetCollector())


def test_it_cannot_be_registered_twice() -> None:
    registry = CollectorRegistry()
    registry.register(BudgetCollector())

    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(BudgetCollector())


@pytest.mark.parametrize("table", [CallLog, FeatureBudget, SpendWindow, TotalMark])
def test_a_database_that_fails_fails_the_scrape(table: Any) -> None:
    call()
    name = connection.ops.quote_name(table._meta.db_table)

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if name in sql:
            raise DatabaseError("away")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail), pytest.raises(Exception, match=r"away|database"):
        Scrape()


def test_no_user_subject_or_tag_is_a_label() -> None:
    user = UserFactory(username="hunter2")
    call(user=user, subject="hunter2", tags={"plan": "hunter2"})

    assert "hunter2" not in Scrape().text
    labels = {label for own in described().values() for label in own}
    assert labels == {"feature", "model", "type", "status", "lever", "period"}


# What is said of it ------------------------------------------------------------------------------


def test_every_metric_is_documented_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8").split("## OpenTelemetry")[0]
    rows = re.findall(r"^\| `(ai_budget_\w+)` \| (counter|gauge) \|([^|]*)\|", text, re.MULTILINE)

    documented = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, _, labels in rows}
    assert documented == described()
    kinds = {name: kind for name, kind, _ in rows}
    assert kinds == {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in BudgetCollector().describe()
    }


def test_every_metric_says_what_it_is() -> None:
    call()
    families = list(BudgetCollector().describe())

    assert all(family.documentation.endswith(".") for family in families)
    assert Counter(family.name for family in families).most_common(1)[0][1] == 1
    (cost,) = (family for family in families if family.name == "ai_budget_cost_usd")
    assert "ai_budget_estimated_cost_usd" in cost.documentation
