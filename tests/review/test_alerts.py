"""What somebody should know is told, once, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext, override_settings

from ai_budget import periods
from ai_budget.models import Alert, AlertDelivery, Batch, BatchSubmission, SpendWindow
from ai_budget.money import NANO_PER_USD as USD
from ai_budget.periods import Period
from ai_budget.pricing.rates import DEAREST, resolve
from ai_budget.review import alerts, notifiers, rollups
from ai_budget.review.alert_rules import (
    Due,
    Ladder,
    Watched,
    of_forecast,
    of_ladder,
    of_limits,
    of_plan,
)
from ai_budget.review.balances import BudgetUse, LimitUse
from ai_budget.values import SITE
from tests.admin.batches import BatchFactory, BatchSubmissionFactory
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    DowngradeRungFactory,
    FeatureBudgetFactory,
    LimitOverrideFactory,
    SpendWindowFactory,
    UserFactory,
)
from tests.ledger.threads import THREADS, together

NOW = datetime(2026, 10, 15, 12, tzinfo=UTC)
DAY, MONTH = date(2026, 10, 15), date(2026, 10, 1)
WINDOWS = {
    Period.DAY: periods.day(NOW, UTC),
    Period.MONTH: periods.month(NOW, UTC),
}
THRESHOLDS = (50, 80, 100, 120)


class Clock:
    """A clock that stands still until a test moves it."""

    at = NOW


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    clock = Clock()
    with periods.override_clock(lambda: clock.at):
        yield clock


@pytest.fixture(autouse=True)
def balances_in_the_database(settings: Any) -> None:
    """Where the tests write them."""
    settings.AI_BUDGET = {}


# The rules ---------------------------------------------------------------------------------------


def a_budget(
    *,
    today: int = 0,
    month: int = 0,
    held: int = 0,
    daily_limit: int | None = None,
    monthly_limit: int | None = None,
    **fields: Any,
) -> Watched:
    """A budget that spent so many dollars today and this month."""

    def use(spent: int, limit: int | None) -> LimitUse:
        most = None if limit is None else limit * USD
        return LimitUse(spent_nanousd=spent * USD, held_nanousd=held * USD, limit_nanousd=most)

    uses = BudgetUse(today=use(today, daily_limit), month=use(month, monthly_limit))
    return Watched(**{"name": "chat", "use": uses, **fields})


def limits(budget: Watched, thresholds: Sequence[int] = THRESHOLDS) -> list[Due]:
    return list(of_limits(budget, thresholds, WINDOWS))


def kinds(due: Sequence[Due]) -> list[tuple[str, int]]:
    return [(str(one.kind), one.threshold) for one in due]


@pytest.mark.parametrize(
    ("spent", "reached"),
    [
        (0, []),
        (49, []),
        (50, [50]),
        (79, [50]),
        (80, [50, 80]),
        (100, [50, 80, 100]),
        (119, [50, 80, 100]),
        (120, [50, 80, 100, 120]),
        (1_000, [50, 80, 100, 120]),
    ],
)
def test_a_plan_is_told_of_at_each_threshold(spent: int, reached: list[int]) -> None:
    budget = a_budget(month=spent, plan_nanousd=100 * USD)

    due = list(of_plan(budget, THRESHOLDS, WINDOWS[Period.MONTH]))

    assert [one.threshold for one in due] == reached
    assert {one.effect for one in due} <= {"alerts"}
    assert {(one.period, one.first_day) for one in due} <= {("month", MONTH)}


def test_just_under_a_threshold_is_under_it() -> None:
    use = LimitUse(spent_nanousd=80 * USD - 1)
    budget = Watched(name="chat", use=BudgetUse(today=use, month=use), plan_nanousd=100 * USD)

    assert [one.threshold for one in of_plan(budget, [80], WINDOWS[Period.MONTH])] == []


def test_without_a_plan_there_is_nothing_to_compare_with() -> None:
    assert not list(of_plan(a_budget(month=100), THRESHOLDS, WINDOWS[Period.MONTH]))


def test_a_plan_of_nothing_is_passed_by_anything() -> None:
    month = WINDOWS[Period.MONTH]

    assert not list(of_plan(a_budget(plan_nanousd=0), THRESHOLDS, month))
    (due,) = of_plan(a_budget(month=1, plan_nanousd=0), [120], month)
    assert due.percent is None


@pytest.mark.parametrize(
    ("spent", "due"),
    [
        (49, []),
        (50, [("limit", 50)]),
        (80, [("limit", 50), ("limit", 80)]),
        (99, [("limit", 50), ("limit", 80)]),
        (100, [("limit", 50), ("limit", 80), ("limit", 100), ("off", 0)]),
    ],
)
@pytest.mark.parametrize("period", ["day", "month"])
def test_a_limit_is_told_of_up_to_the_moment_it_is_used_up(
    period: str, spent: int, due: list[tuple[str, int]]
) -> None:
    given: dict[str, Any] = (
        {"today": spent, "daily_limit": 100}
        if period == "day"
        else {"month": spent, "monthly_limit": 100}
    )

    found = limits(a_budget(**given))

    assert kinds(found) == due
    assert {one.period for one in found} <= {period}
    assert {one.effect for one in found} <= {"refuses"}


def test_money_that_is_held_is_not_spent() -> None:
    assert kinds(limits(a_budget(today=40, held=60, daily_limit=100))) == []


@pytest.mark.parametrize(
    ("spent", "held", "refused", "off"),
    [(90, 0, 1, True), (40, 50, 1, True), (89, 0, 1, False), (99, 0, 0, False)],
)
def test_refusals_are_put_down_to_a_limit_that_is_nearly_full(
    spent: int, held: int, refused: int, off: bool
) -> None:
    budget = a_budget(today=spent, held=held, daily_limit=100, refused_today=refused)

    found = [one for one in limits(budget) if one.kind == "off"]

    assert bool(found) is off
    assert [one.count for one in found] == [refused] * off


def test_a_limit_that_somebody_closed_is_no_news() -> None:
    assert limits(a_budget(daily_limit=0, refused_today=7)) == []


def test_shadow_mode_says_would() -> None:
    due = limits(a_budget(today=100, daily_limit=100, enforce=False))

    assert {one.effect for one in due} == {"shadow"}


def test_what_is_past_a_limit_is_told_no_threshold() -> None:
    shadow = a_budget(today=150, daily_limit=100, enforce=False)

    assert kinds(limits(shadow)) == [("limit", 50), ("limit", 80), ("limit", 100), ("off", 0)]


def test_a_raised_limit_is_another_limit() -> None:
    before = limits(a_budget(today=80, daily_limit=100), [80])
    raised = limits(a_budget(today=80, daily_limit=200), [80])
    full_again = limits(a_budget(today=200, daily_limit=200))

    assert (kinds(before), raised) == ([("limit", 80)], [])
    assert full_again[-1].key != limits(a_budget(today=100, daily_limit=100))[-1].key


@pytest.mark.parametrize(("day", "told"), [(3, False), (4, True)])
def test_a_forecast_takes_three_days(day: int, told: bool) -> None:
    at = datetime(2026, 10, day, tzinfo=UTC)
    budget = a_budget(month=20, plan_nanousd=100 * USD)

    assert bool(list(of_forecast(budget, WINDOWS[Period.MONTH], at))) is told


@pytest.mark.parametrize(("spent", "told"), [(46, False), (47, True), (99, True), (100, False)])
@pytest.mark.parametrize("against", ["plan", "limit"])
def test_a_forecast_is_told_while_there_is_time(against: str, spent: int, told: bool) -> None:
    # 14.5 days of 31: at this pace 46.77 dollars become a hundred.
    budget = (
        a_budget(month=spent, plan_nanousd=100 * USD)
        if against == "plan"
        else a_budget(month=spent, monthly_limit=100)
    )

    due = list(of_forecast(budget, WINDOWS[Period.MONTH], NOW))

    assert [one.effect for one in due] == ["alerts" if against == "plan" else "refuses"] * told
    assert all((one.percent or 0) >= 100 for one in due)


LADDER = Ladder(owner="chat", enforce=True, rungs=((70, SONNET), (90, HAIKU)))


def rungs(budget: Watched, *others: Watched) -> list[tuple[str, int, str, str]]:
    budgets = {it.name: it for it in (budget, *others)}
    due = of_ladder(budget, budgets, WINDOWS)
    return [(one.budget, one.threshold, one.model, str(one.effect)) for one in due]


@pytest.mark.parametrize(("spent", "reached"), [(69, 0), (70, 1), (89, 1), (90, 2)])
def test_the_ladder_names_the_model_that_answers(spent: int, reached: int) -> None:
    budget = a_budget(today=spent, daily_limit=100, ladder=LADDER)

    told = [("chat", 70, SONNET, "downgrades"), ("chat", 90, HAIKU, "downgrades")]
    assert rungs(budget) == told[:reached]


def test_the_ladder_follows_what_is_held_too() -> None:
    assert rungs(a_budget(today=40, held=30, daily_limit=100, ladder=LADDER))


def test_the_ladder_follows_the_fullest_limit_and_says_whose_it_is() -> None:
    site = a_budget(name=SITE, today=75, daily_limit=100)

    assert rungs(a_budget(ladder=LADDER), site) == [(SITE, 70, SONNET, "downgrades")]


def test_the_ladder_leaves_out_the_limits_of_others_in_shadow_mode() -> None:
    site = a_budget(name=SITE, today=75, daily_limit=100, enforce=False)

    assert rungs(a_budget(ladder=LADDER), site) == []


def test_a_ladder_in_shadow_mode_says_would() -> None:
    shadow = replace(LADDER, enforce=False)
    budget = a_budget(today=75, daily_limit=100, enforce=False, ladder=shadow)

    assert rungs(budget) == [("chat", 70, SONNET, "shadow")]


def test_a_limit_says_which_model_takes_over() -> None:
    (below,) = limits(a_budget(today=50, daily_limit=100, ladder=LADDER), [50])
    (above,) = limits(a_budget(today=92, daily_limit=100, ladder=LADDER), [50])

    assert (below.rung, below.model) == (70, SONNET)
    assert (above.rung, above.model) == (90, HAIKU)


# Recording, once ---------------------------------------------------------------------------------


def due_of(kind: str = "plan", threshold: int = 80, **fields: Any) -> Due:
    given = {"budget": "chat", "period": "month", "first_day": MONTH, **fields}
    return Due(kind=kind, threshold=threshold, **given)


def record(*due: Due) -> int:
    return alerts.record(due, at=NOW, alias="default")


def told() -> list[tuple[str, int]]:
    rows = Alert.objects.filter(covered=False).order_by("pk")
    return [(alert.kind, alert.threshold) for alert in rows]


@pytest.mark.django_db
def test_the_highest_of_several_thresholds_is_told_and_covers_the_others() -> None:
    assert record(*(due_of(threshold=at) for at in THRESHOLDS)) == 1

    assert told() == [("plan", 120)]
    assert Alert.objects.filter(covered=True).count() == 3
    assert {it.alert.threshold for it in AlertDelivery.objects.select_related("alert")} == {120}


@pytest.mark.django_db
def test_a_limit_that_is_used_up_covers_its_thresholds() -> None:
    record(due_of("limit", 50), due_of("limit", 100), due_of("off", 0))

    assert told() == [("off", 0)]


@pytest.mark.django_db
def test_each_threshold_is_told_as_it_is_reached() -> None:
    counts = [record(*(due_of(threshold=at) for at in THRESHOLDS[:n])) for n in (1, 1, 2, 4)]

    assert counts == [1, 0, 1, 1]
    assert told() == [("plan", 50), ("plan", 80), ("plan", 120)]


@pytest.mark.django_db
def test_what_has_been_told_is_not_told_when_it_falls_below() -> None:
    record(due_of(threshold=50), due_of(threshold=80))

    assert record(due_of(threshold=50)) == 0


@pytest.mark.django_db
@pytest.mark.parametrize(
    "other",
    [
        {"budget": "search"},
        {"first_day": date(2026, 11, 1)},
        {"period": "day"},
        {"about": "another"},
    ],
)
def test_another_budget_period_or_matter_is_told_apart(other: dict[str, Any]) -> None:
    record(due_of())

    assert record(due_of(**other)) == 1


@pytest.mark.django_db
def test_it_is_delivered_to_every_notifier_and_the_signal() -> None:
    given = {"NOTIFIERS": ["shop.pager", {"BACKEND": "shop.pager", "OPTIONS": {"to": "x"}}]}
    with override_settings(AI_BUDGET=given):
        record(due_of())

    names = AlertDelivery.objects.values_list("notifier", flat=True)
    assert set(names) == {notifiers.SIGNAL, "shop.pager", "shop.pager#2"}
    assert set(AlertDelivery.objects.values_list("due_at", flat=True)) == {NOW}


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_workers_that_cross_a_threshold_at_once_tell_it_once() -> None:
    due = [due_of(threshold=at) for at in THRESHOLDS]

    counts = together([lambda: record(*due)] * THREADS)

    assert sorted(counts) == [*[0] * (THREADS - 1), 1]
    assert told() == [("plan", 120)]
    assert Alert.objects.count() == len(THRESHOLDS)
    assert AlertDelivery.objects.filter(notifier=notifiers.SIGNAL).count() == 1


@pytest.mark.contention
@pytest.mark.django_db(transaction=True)
def test_workers_that_see_it_before_anyone_wrote_tell_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each has looked, and found nothing.
    monkeypatch.setattr(alerts, "_recorded", lambda due, alias: set())
    due = [due_of(threshold=at) for at in THRESHOLDS]

    counts = together([lambda: record(*due)] * THREADS)

    assert sum(counts) == 1
    assert (Alert.objects.count(), told()) == (len(THRESHOLDS), [("plan", 120)])
    assert AlertDelivery.objects.filter(notifier=notifiers.SIGNAL).count() == 1


# From the tables ---------------------------------------------------------------------------------


def spent(usd: int, scope: str = "feature:chat", *, refused: int = 0, held: int = 0) -> None:
    """Put a scope's balances of today and this month at so many dollars."""
    for period, first in ((Period.DAY, DAY), (Period.MONTH, MONTH)):
        SpendWindow.objects.filter(pk=SpendWindow.key_for(scope, period, first)).delete()
        SpendWindowFactory.create(
            scope=scope,
            period=period,
            first_day=first,
            spent_nanousd=usd * USD,
            held_nanousd=held * USD,
            refused=refused if period is Period.DAY else 0,
        )


@pytest.fixture
def chat(db: None) -> Any:
    return FeatureBudgetFactory.create(name="chat", daily_limit_usd=100)


def all_told() -> set[tuple[str, str, str, int]]:
    return {(it.budget, it.kind, it.period, it.threshold) for it in Alert.objects.all()}


def test_where_nothing_is_spent_nothing_is_due(chat: Any) -> None:
    assert alerts.evaluate() == 0
    assert not Alert.objects.exists()


def test_a_feature_its_category_and_the_site_have_limits_of_their_own(db: None) -> None:
    support = FeatureBudgetFactory.create(name="support", daily_limit_usd=100)
    FeatureBudgetFactory.create(name="chat", parent=support, daily_limit_usd=100)
    given = {"DAILY_LIMIT_USD": "100", "MONTHLY_LIMIT_USD": None, "ALERT_THRESHOLDS": [50, 80]}
    spent(49)
    spent(50, "category:support")
    spent(80, SITE)

    with override_settings(AI_BUDGET=given):
        assert alerts.evaluate() == 2
        assert alerts.evaluate() == 0

    assert all_told() == {
        ("support", "limit", "day", 50),
        (SITE, "limit", "day", 50),
        (SITE, "limit", "day", 80),
    }


def test_a_share_of_the_categorys_plan_is_a_plan(db: None) -> None:
    support = FeatureBudgetFactory.create(name="support", monthly_plan_usd=200)
    FeatureBudgetFactory.create(name="chat", parent=support, plan_share=50)
    spent(100)

    alerts.evaluate()

    assert ("chat", "plan", "month", 100) in all_told()
    assert ("chat", "plan", "month", 120) not in all_told()


def test_the_next_day_is_told_anew_and_the_month_is_not(chat: Any, clock: Clock) -> None:
    chat.monthly_limit_usd = 100
    chat.save()
    spent(60)
    with override_settings(AI_BUDGET={"ALERT_THRESHOLDS": [50]}):
        alerts.evaluate()
        before = Alert.objects.filter(budget="chat", kind="limit").count()
        clock.at += timedelta(days=1)
        alerts.evaluate()
        SpendWindowFactory.create(
            scope="feature:chat", first_day=DAY + timedelta(days=1), spent_nanousd=60 * USD
        )
        alerts.evaluate()

    told_of = Alert.objects.filter(budget="chat", kind="limit").order_by("pk")
    assert before == 2
    assert [(it.period, it.first_day) for it in told_of][2:] == [("day", date(2026, 10, 16))]


def test_the_next_month_is_told_anew(chat: Any, clock: Clock) -> None:
    chat.daily_limit_usd, chat.monthly_plan_usd = None, 100
    chat.save()
    spent(60)
    alerts.evaluate()
    clock.at = datetime(2026, 11, 2, tzinfo=UTC)
    SpendWindowFactory.create(
        scope="feature:chat", period="month", first_day=date(2026, 11, 1), spent_nanousd=60 * USD
    )

    alerts.evaluate()

    days = Alert.objects.filter(kind="plan", budget="chat").values_list("first_day", flat=True)
    assert sorted(days) == [MONTH, date(2026, 11, 1)]


def test_an_override_raises_what_is_compared_with(chat: Any) -> None:
    LimitOverrideFactory.create(budget=chat, period="day", amount_usd=400, until=NOW + _DAY)
    spent(150)

    alerts.evaluate()

    assert not Alert.objects.filter(budget="chat").exists()


_DAY = timedelta(days=1)


def test_refusals_of_today_are_counted(chat: Any) -> None:
    spent(95, refused=3)

    alerts.evaluate()

    off = Alert.objects.get(budget="chat", kind="off")
    assert (off.count, off.covered) == (3, False)
    assert "Refused today: 3." in off.text


def test_a_rung_that_is_reached_is_told(chat: Any) -> None:
    DowngradeRungFactory.create(budget=chat, at_percent=70, model=HAIKU)
    spent(70)

    alerts.evaluate()

    rung = Alert.objects.get(kind="ladder")
    assert (rung.budget, rung.model, rung.threshold) == ("chat", HAIKU, 70)


def test_a_ladder_of_the_site_is_told_once_and_not_of_every_feature(db: None) -> None:
    site = FeatureBudgetFactory.create(name=SITE, daily_limit_usd=100)
    DowngradeRungFactory.create(budget=site, at_percent=70, model=HAIKU)
    for name in ("chat", "search", "notes"):
        FeatureBudgetFactory.create(name=name)
    spent(75, SITE)

    alerts.evaluate()

    assert [it.budget for it in Alert.objects.filter(kind="ladder")] == [SITE]


def call(at: datetime, usd: int, **fields: Any) -> None:
    cost = usd * USD
    CallLogFactory.create(
        reserved_at=at, **{"cost_nanousd": cost, "reserved_nanousd": cost, **fields}
    )


def hours_before(usd: int) -> None:
    for number in range(1, 15):
        call(NOW - timedelta(days=number) + timedelta(minutes=10), usd)


@pytest.mark.parametrize("added_up", [True, False])
def test_a_spike_is_told_of_once_a_day(chat: Any, clock: Clock, added_up: bool) -> None:
    hours_before(2)
    clock.at = NOW + timedelta(minutes=25)
    for minute in range(5):
        call(NOW + timedelta(minutes=minute), 3)
    if added_up:
        rollups.add_up()

    first = alerts.evaluate()
    clock.at += timedelta(hours=1)

    assert (first, alerts.evaluate()) == (1, 0)
    alert = Alert.objects.get()
    assert (alert.kind, alert.budget, alert.count) == ("spike", "chat", 5)
    assert (alert.spent_nanousd, alert.of_nanousd) == (15 * USD, 2 * USD)
    assert alert.since == NOW


def test_the_last_full_hour_counts(chat: Any, clock: Clock) -> None:
    hours_before(2)
    for minute in range(5):
        call(NOW + timedelta(minutes=50 + minute), 3)
    clock.at = NOW + timedelta(minutes=61)

    alerts.evaluate()

    assert Alert.objects.get().kind == "spike"


def test_an_hour_as_usual_is_no_spike(chat: Any, clock: Clock) -> None:
    hours_before(2)
    clock.at = NOW + timedelta(minutes=25)
    for _ in range(3):
        call(NOW, 1)

    assert alerts.evaluate() == 0


def test_a_bound_that_was_too_low_is_told(chat: Any) -> None:
    call(NOW - timedelta(minutes=5), 3, reserved_nanousd=2 * USD)
    call(NOW - timedelta(minutes=5), 2, reserved_nanousd=2 * USD)

    alerts.evaluate()

    alert = Alert.objects.get()
    assert (alert.kind, alert.count) == ("bound", 1)
    assert (alert.spent_nanousd, alert.of_nanousd, alert.percent) == (3 * USD, 2 * USD, 150)


def test_a_bound_of_a_batch_is_told_when_it_is_finished(chat: Any) -> None:
    reserved = NOW - timedelta(days=1)
    BatchFactory.create(
        feature=chat, status=Batch.Status.FINISHED, reserved_at=reserved, finished_at=NOW
    )
    call(reserved, 3, reserved_nanousd=2 * USD, kind="batch")

    alerts.evaluate()

    assert [it.kind for it in Alert.objects.all()] == ["bound"]


def test_a_model_without_a_price_is_told_once_a_month(chat: Any, clock: Clock) -> None:
    with override_settings(AI_BUDGET={"UNPRICED_MODEL": "allow"}):
        rates = resolve("claude-next-9", at=NOW)
    assert rates.reference.startswith(f"{DEAREST}; ")
    for days in (0, 1):
        clock.at = NOW + timedelta(days=days)
        call(clock.at, 2, rates=rates.reference, requested_model="claude-next-9")
        alerts.evaluate()

    alert = Alert.objects.get()
    assert (alert.kind, alert.model, alert.period) == ("unpriced", "claude-next-9", "month")
    assert "claude-next-9" in alert.title


def test_a_model_with_a_price_is_none(chat: Any) -> None:
    call(NOW, 1, rates=resolve(HAIKU, at=NOW).reference)

    assert alerts.evaluate() == 0


@pytest.mark.parametrize(
    ("column", "told"),
    [("errored", True), ("expired", True), ("refused", True), ("canceled", False)],
)
def test_a_batch_with_items_that_were_not_answered_is_told(
    chat: Any, column: str, told: bool
) -> None:
    batch = BatchFactory.create(
        feature=chat,
        status=Batch.Status.FINISHED,
        finished_at=NOW,
        total=10,
        succeeded=8,
        **{column: 2},
    )

    alerts.evaluate()

    expected = [("batch", f"#{batch.pk}", 2)] if told else []
    assert [(it.kind, it.about, it.count) for it in Alert.objects.all()] == expected


@pytest.mark.parametrize(("hours", "told"), [(47, True), (49, False)])
def test_a_batch_is_told_though_no_tick_ran_for_a_while(chat: Any, hours: int, told: bool) -> None:
    finished = NOW - timedelta(hours=hours)
    BatchFactory.create(feature=chat, status="finished", finished_at=finished, errored=1)

    assert alerts.evaluate() == told


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"status": BatchSubmission.Status.UNCERTAIN}, "uncertain"),
        ({"status": BatchSubmission.Status.WAITING, "tries": 5}, "stuck"),
        ({"status": BatchSubmission.Status.WAITING, "tries": 4}, None),
        ({"status": BatchSubmission.Status.SENT}, None),
    ],
)
def test_a_submission_that_somebody_must_see_to_is_told(
    chat: Any, fields: dict[str, Any], kind: str | None
) -> None:
    batch = BatchFactory.create(feature=chat, status=Batch.Status.OPEN)
    BatchSubmissionFactory.create(batch=batch, number=3, **fields)

    alerts.evaluate()

    expected = [(kind, f"#{batch.pk}/3")] if kind else []
    assert [(it.kind, it.about) for it in Alert.objects.all()] == expected


def test_it_takes_as_many_queries_for_fifty_features_as_for_one(chat: Any) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            alerts.evaluate()
        return len(queries)

    call(NOW, 1)
    of_one = count()
    for number in range(50):
        FeatureBudgetFactory.create(name=f"feature-{number}", daily_limit_usd=10)
        call(NOW, 1, feature__name=f"feature-{number}")

    assert count() <= of_one
    assert of_one <= 24


# What it says ------------------------------------------------------------------------------------


def alert_of(**fields: Any) -> Alert:
    due = {
        "kind": "limit",
        "budget": "chat",
        "period": "day",
        "first_day": DAY,
        "threshold": 80,
        "effect": "refuses",
        "spent_nanousd": 80 * USD,
        "of_nanousd": 100 * USD,
        "percent": 80,
        "until": WINDOWS[Period.DAY].end,
    }
    return Alert(**{**due, **fields})


def test_it_says_how_much_and_what_happens_and_until_when() -> None:
    alert = alert_of(model=HAIKU, rung=90)

    assert alert.title == "chat: 80 % of the daily limit is spent"
    assert alert.text == (
        "$80.00 of today's limit of $100.00 is spent (80 %). At the limit calls are refused, "
        f"until 2026-10-16 00:00 UTC. From 90 % on, {HAIKU} answers."
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "plan", "period": "month", "effect": "alerts"}, "a plan refuses nothing"),
        ({"effect": "shadow"}, "Shadow mode: at the limit nothing is refused"),
        ({"kind": "off"}, "Calls that do not fit are refused, until"),
        ({"kind": "off", "effect": "shadow"}, "Else calls would be refused until"),
        ({"kind": "ladder", "effect": "downgrades", "model": HAIKU}, f"{HAIKU} answers instead"),
        ({"kind": "ladder", "effect": "shadow", "model": HAIKU}, f"Else {HAIKU} would"),
        ({"kind": "forecast", "about": "plan", "effect": "alerts"}, "the plan of $100.00"),
        ({"kind": "forecast", "about": "limit 5"}, "At the limit calls are refused"),
        ({"kind": "spike", "effect": "alerts", "since": NOW}, "This alerts, and nothing more."),
    ],
)
def test_it_says_whether_it_alerts_downgrades_or_refuses(fields: dict[str, Any], said: str) -> None:
    assert said in alert_of(**fields).text


@pytest.mark.parametrize("kind", Alert.Kind)
def test_each_kind_has_a_title_and_a_text(kind: Alert.Kind) -> None:
    month = {"plan", "unpriced"}
    alert = alert_of(kind=kind, period="month" if kind in month else "day", budget=SITE, since=NOW)

    assert alert.title.startswith("The whole site: ")
    assert "%(" not in alert.title + alert.text


def test_the_end_of_the_day_is_told_in_the_zone_of_the_limits() -> None:
    with override_settings(AI_BUDGET={"TIME_ZONE": "Asia/Kathmandu"}):
        assert "2026-10-16 05:45 +0545" in alert_of().text


# Taking note of it -------------------------------------------------------------------------------


@pytest.mark.django_db
def test_an_alert_is_acknowledged_once_and_by_whoever_was_first() -> None:
    record(due_of())
    first, second = UserFactory.create(), UserFactory.create()

    acknowledged = alerts.acknowledge(Alert.objects.all(), by=first, at=NOW)
    again = alerts.acknowledge(Alert.objects.all(), by=second, at=NOW + _DAY)

    assert (len(acknowledged), again) == (1, [])
    alert = Alert.objects.get()
    assert (alert.acknowledged_by_id, alert.acknowledged_at) == (first.pk, NOW)


@pytest.mark.django_db
def test_what_was_acknowledged_is_not_told_again() -> None:
    record(due_of())
    alerts.acknowledge(Alert.objects.all(), by=UserFactory.create(), at=NOW)

    assert record(due_of()) == 0
