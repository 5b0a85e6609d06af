from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from ai_budget import periods
from ai_budget.models import CallLog, TotalMark
from ai_budget.pricing import rates
from ai_budget.review import attention, rollups
from ai_budget.review.attention import (
    Behind,
    Concern,
    CutAnswers,
    ForecastOver,
    OverPlan,
    RoomyAnswers,
    Spike,
    Stale,
    Unpriced,
    WorthlessCache,
)
from ai_budget.review.pace import Against
from ai_budget.review.report import Report, cost_report
from ai_budget.review.spans import Span
from ai_budget.review.wording import sentence
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    ModelRateFactory,
    mark,
)
from tests.review.conftest import NOW

pytestmark = pytest.mark.django_db

DOLLAR = 1_000_000_000
Status = CallLog.Status


def calls(number: int, **values: Any) -> None:
    """So many calls at once, which are marked as ever."""
    rows = [
        CallLogFactory.build(feature=FeatureBudgetFactory.create(name="chat"), **values)
        for _ in range(number)
    ]
    CallLog.objects.bulk_create(rows)
    for row in rows:
        mark(row)


def found(report: Report, kind: type[Concern]) -> list[Any]:
    return [it for it in report.attention if isinstance(it, kind)]


def test_nothing_is_nothing_to_look_at(october: Span) -> None:
    calls(2)

    assert cost_report(october).attention == ()


# Plans, limits and forecasts ---------------------------------------------------------------------


@pytest.mark.parametrize(("spent", "over"), [(120, False), (121, True)])
def test_a_budget_far_above_its_plan_is_named(october: Span, spent: int, over: bool) -> None:
    product = FeatureBudgetFactory.create(name="product", monthly_plan_usd=1)
    FeatureBudgetFactory.create(name="chat", parent=product)
    CallLogFactory.create(category="product", cost_nanousd=spent * DOLLAR // 100)

    report = cost_report(october)

    expected = [
        OverPlan(feature="product", spend_nanousd=spent * DOLLAR // 100, plan_nanousd=DOLLAR)
    ]
    assert found(report, OverPlan) == (expected if over else [])


def test_a_name_that_is_category_and_feature_is_named_once(october: Span) -> None:
    FeatureBudgetFactory.create(name="product", monthly_plan_usd=1)
    CallLogFactory.create(feature__name="product", category="product", cost_nanousd=2 * DOLLAR)

    assert len(found(cost_report(october), OverPlan)) == 1


def test_a_forecast_above_plan_or_limit_is_named(october: Span) -> None:
    # 14.5 of 31 days have passed.
    FeatureBudgetFactory.create(name="chat", monthly_limit_usd=2, monthly_plan_usd=3)
    CallLogFactory.create(cost_nanousd=DOLLAR)

    report = cost_report(october)

    assert found(report, ForecastOver) == [
        ForecastOver(
            feature="chat",
            against=Against.LIMIT,
            forecast_nanousd=2_137_931_034,
            allowed_nanousd=2 * DOLLAR,
        )
    ]


def test_a_forecast_says_nothing_new_of_a_plan_that_is_spent(october: Span) -> None:
    FeatureBudgetFactory.create(name="chat", monthly_plan_usd=1)
    CallLogFactory.create(cost_nanousd=2 * DOLLAR)

    report = cost_report(october)

    assert [type(it) for it in report.attention] == [OverPlan]
    assert report.forecasts[0].is_over_plan


def test_only_the_running_month_has_a_forecast() -> None:
    FeatureBudgetFactory.create(name="chat", monthly_plan_usd=3)
    september = Span(
        since=datetime(2026, 9, 1, tzinfo=UTC), until=datetime(2026, 10, 1, tzinfo=UTC)
    )
    CallLogFactory.create(reserved_at=september.since, cost_nanousd=2 * DOLLAR)

    report = cost_report(september)

    assert (report.forecast, report.forecasts, report.attention) == (None, (), ())


# Caches and answers ------------------------------------------------------------------------------


def test_a_cache_that_finds_too_little_is_named(
    october: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.review.caching.ENOUGH_LOOKED_UP", 6)
    calls(5, cache_checked=True)
    calls(1, status=Status.CACHED, cache_checked=True)

    (cache,) = found(cost_report(october), WorthlessCache)

    assert (cache.feature, cache.looked_up, cache.cached) == ("chat", 6, 1)


@pytest.fixture
def few_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ENOUGH_ANSWERS", 20)


@pytest.mark.usefixtures("few_answers")
def test_a_max_tokens_that_no_answer_comes_near_is_named(october: Span) -> None:
    calls(20, max_tokens=1000, output_tokens=100)
    calls(3, status=Status.ESTIMATED, max_tokens=1000, output_tokens=0)
    calls(3, kind="router", counted=0, max_tokens=10, output_tokens=10, stop_reason="max_tokens")

    assert found(cost_report(october), RoomyAnswers) == [
        RoomyAnswers(
            feature="chat",
            model=SONNET,
            answers=20,
            average_output_tokens=100,
            average_max_tokens=1000,
        )
    ]


@pytest.mark.usefixtures("few_answers")
@pytest.mark.parametrize(
    "one_more",
    [
        {"output_tokens": 500},  # half of it
        {"output_tokens": 100, "stop_reason": "max_tokens"},
    ],
)
def test_one_answer_that_needs_the_room_is_enough(october: Span, one_more: dict[str, Any]) -> None:
    calls(30, max_tokens=1000, output_tokens=100)
    calls(1, max_tokens=1000, **one_more)

    assert found(cost_report(october), RoomyAnswers) == []


@pytest.mark.usefixtures("few_answers")
def test_room_for_less_than_four_answers_is_not_much(october: Span) -> None:
    calls(20, max_tokens=1000, output_tokens=251)

    assert found(cost_report(october), RoomyAnswers) == []


@pytest.mark.usefixtures("few_answers")
def test_too_few_answers_say_nothing(october: Span) -> None:
    calls(19, max_tokens=1000, output_tokens=1, stop_reason="max_tokens")

    assert cost_report(october).attention == ()


@pytest.mark.usefixtures("few_answers")
@pytest.mark.parametrize(("cut", "named"), [(1, True), (0, False)])
def test_answers_that_are_cut_are_named(october: Span, cut: int, named: bool) -> None:
    calls(20 - cut, max_tokens=100, output_tokens=60)
    calls(cut, max_tokens=100, output_tokens=100, stop_reason="max_tokens")

    shares = [(it.cut, it.answers, str(it.share)) for it in found(cost_report(october), CutAnswers)]

    assert shares == ([(1, 20, "5.0")] if named else [])


# Prices, reservations and totals -----------------------------------------------------------------


@pytest.mark.parametrize("unpriced", ["refuse", "allow"])
def test_a_model_without_a_price_is_named(october: Span, settings: Settings, unpriced: str) -> None:
    settings.AI_BUDGET = {"UNPRICED_MODEL": unpriced}
    CallLogFactory.create(requested_model="claude-unheard-of", cost_nanousd=5)
    CallLogFactory.create(requested_model="claude-released", status=Status.RELEASED)

    assert found(cost_report(october), Unpriced) == [
        Unpriced(model="claude-unheard-of", provider="anthropic", calls=1, spend_nanousd=5)
    ]


def test_a_price_in_any_region_is_a_price(october: Span) -> None:
    CallLogFactory.create(requested_model="our-own", provider="bedrock")
    ModelRateFactory.create(
        model="our-own", provider="bedrock", region="eu", valid_from=NOW - timedelta(days=99)
    )
    rates.forget()

    assert found(cost_report(october), Unpriced) == []


def test_reservations_that_nobody_books_are_named(october: Span) -> None:
    late = NOW - timedelta(minutes=11)
    long_ago = october.since - timedelta(days=40)
    not_yet = NOW - timedelta(minutes=9)
    for deadline, reserved_at in ((late, NOW), (late, long_ago), (not_yet, NOW)):
        CallLogFactory.create(
            status=Status.RESERVED,
            reserved_nanousd=5,
            reserved_at=reserved_at,
            deadline=deadline,
        )

    assert found(cost_report(october), Stale) == [Stale(calls=2, held_nanousd=10, since=late)]
    elsewhere = Span(since=october.since, until=october.until, feature="search")
    assert found(cost_report(elsewhere), Stale) == []


def test_totals_that_nobody_brings_up_to_date_are_named(october: Span) -> None:
    for number in range(attention.BEHIND_QUARTERS):
        at = NOW - number * timedelta(minutes=15)
        TotalMark.objects.create(reserved_at=at, day=at.date())

    assert found(cost_report(october), Behind) == [Behind(quarter_hours=8)]
    rollups.add_up()
    assert found(cost_report(october), Behind) == []


def test_an_hour_that_is_out_of_the_ordinary_is_named(october: Span) -> None:
    for day in range(1, 8):
        CallLogFactory.create(reserved_at=NOW - timedelta(days=day), cost_nanousd=DOLLAR // 10)
    with periods.override_clock(lambda: NOW + timedelta(minutes=30)):
        calls(6, cost_nanousd=2 * DOLLAR, reserved_at=NOW)
        report = cost_report(october)
        past = cost_report(Span(since=october.since, until=NOW - timedelta(days=1)))

    (spike,) = found(report, Spike)
    assert (spike.feature, spike.since, spike.spend_nanousd) == ("chat", NOW, 12 * DOLLAR)
    assert spike.usual_nanousd <= DOLLAR // 10
    assert found(past, Spike) == []


# In words ----------------------------------------------------------------------------------------

ALL = [
    (
        OverPlan(feature="*", spend_nanousd=2 * DOLLAR, plan_nanousd=DOLLAR),
        "the whole site spent $2.00, 200.0 % of its plan of $1.00.",
    ),
    (
        OverPlan(feature="chat", spend_nanousd=2 * DOLLAR, plan_nanousd=0),
        "chat spent $2.00, and its plan is nothing.",
    ),
    (
        ForecastOver(
            feature="chat",
            against=Against.LIMIT,
            forecast_nanousd=3 * DOLLAR,
            allowed_nanousd=DOLLAR,
        ),
        "chat is heading for $3.00 this month, above its limit of $1.00.",
    ),
    (
        ForecastOver(
            feature="chat",
            against=Against.PLAN,
            forecast_nanousd=3 * DOLLAR,
            allowed_nanousd=DOLLAR,
        ),
        "chat is heading for $3.00 this month, above its plan of $1.00.",
    ),
    (
        Spike(feature="chat", since=NOW, spend_nanousd=9 * DOLLAR, usual_nanousd=DOLLAR),
        "chat spent $9.00 in the hour from Oct. 15, 2026, noon on; usual is $1.00.",
    ),
    (
        WorthlessCache(feature="chat", looked_up=1000, cached=25),
        (
            "The response cache of chat answered 2.5 % of 1,000 calls, less than 20 %: switch it "
            "off, or let it find more (a longer lifetime, prompts that are alike, a shared cache)."
        ),
    ),
    (
        RoomyAnswers(
            feature="chat",
            model=HAIKU,
            answers=100,
            average_output_tokens=50,
            average_max_tokens=4096,
        ),
        (
            f"Answers of {HAIKU} in chat take 50 tokens on average, and may take 4,096: with a "
            "lower max_tokens each call would hold less money."
        ),
    ),
    (
        CutAnswers(feature="chat", model=HAIKU, answers=100, cut=9, average_max_tokens=50),
        (
            f"9.0 % of the answers of {HAIKU} in chat were cut off at their max_tokens, 50 on "
            "average: they are paid for, and end in the middle."
        ),
    ),
    (
        Unpriced(model="claude-x", provider="anthropic", calls=1, spend_nanousd=DOLLAR),
        (
            "No price is known for claude-x of anthropic (1 call, $1.00): add a model rate, or "
            "update genai-prices."
        ),
    ),
    (
        Stale(calls=2, held_nanousd=DOLLAR, since=NOW),
        (
            "2 calls that never came back hold $1.00, the first since Oct. 15, 2026, noon: "
            "ai_budget_tick books them, and does not seem to run."
        ),
    ),
    (
        Behind(quarter_hours=9),
        (
            "9 quarter-hours wait to be added up: ai_budget_tick does it, and does not seem to "
            "run. Figures are right, and slower to read."
        ),
    ),
]


@pytest.mark.parametrize(("concern", "words"), ALL, ids=lambda it: getattr(it, "kind", ""))
def test_each_says_its_figures_and_what_to_do(concern: Concern, words: str) -> None:
    assert sentence(concern) == words


def test_every_kind_of_concern_has_its_words() -> None:
    said = {type(concern).__name__: concern.kind for concern, _ in ALL}

    assert said.keys() == {kind.__name__ for kind in Concern.__subclasses__()}
    assert len(set(said.values())) == len(said)
    with pytest.raises(TypeError, match="into words"):
        sentence(Concern())
