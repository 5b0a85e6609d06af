"""Figures are what a plain aggregate of the calls says, however much of it is in the totals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db.models import F
from django.test.utils import override_settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.models import (
    CallLog,
    DayTotal,
    QuarterTotal,
    TotalMark,
    TotalState,
    UserTotal,
)
from ai_budget.review import rollups
from ai_budget.review.cover import cover_of
from ai_budget.review.spans import Span, ever
from ai_budget.review.spenders import CallerFigures
from ai_budget.review.sums import Figures, reading
from tests.depth import deep
from tests.factories import (
    HAIKU,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    UserFactory,
    mark,
)

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 10, 26, 9, 40, tzinfo=UTC)
ZONES = ["UTC", "Asia/Kathmandu", "Asia/Kolkata", "Europe/Berlin", "America/New_York"]
STATUSES = list(CallLog.Status)
PAID = {"settled", "estimated"}


@pytest.fixture(autouse=True)
def now() -> Any:
    with periods.override_clock(lambda: NOW):
        yield


def in_zone(name: str) -> Any:
    return override_settings(AI_BUDGET={"TIME_ZONE": name})


# What every figure has to be, in plain words -----------------------------------------------------


def expected(calls: Iterable[CallLog]) -> Figures:
    rows = list(calls)
    helpers = {"router", "summary"}
    paid = [it for it in rows if it.status in PAID]
    settled = [it for it in rows if it.status == "settled"]
    held = [it for it in rows if it.status == "reserved"]
    cached = [it for it in rows if it.status == "cached" and it.kind not in helpers]

    def total(some: Sequence[CallLog], column: str) -> int:
        return sum(getattr(it, column) for it in some)

    return Figures(
        attempts=sum(it.status != "cached" for it in rows),
        answers=sum(it.status != "released" and it.kind not in helpers for it in rows),
        calls=total(paid + held, "counted") + len(cached),
        cached=len(cached),
        looked_up=total([it for it in paid + held if it.cache_checked], "counted") + len(cached),
        paid_calls=total(paid, "counted"),
        paid_attempts=len(paid),
        settled_attempts=len(settled),
        in_flight=len(held),
        spend_nanousd=total(paid, "cost_nanousd"),
        settled_nanousd=total(settled, "cost_nanousd"),
        estimated_nanousd=total(paid, "cost_nanousd") - total(settled, "cost_nanousd"),
        held_nanousd=total(held, "reserved_nanousd"),
        saved_nanousd=total(rows, "saved_nanousd"),
        input_tokens=total(paid, "input_tokens"),
        cache_write_5m_tokens=total(paid, "cache_write_5m_tokens"),
        cache_write_1h_tokens=total(paid, "cache_write_1h_tokens"),
        cache_read_tokens=total(paid, "cache_read_tokens"),
        output_tokens=total(paid, "output_tokens"),
        thinking_tokens=total(paid, "thinking_tokens"),
        web_searches=total(paid, "web_searches"),
        max_tokens=total(settled, "max_tokens"),
        cut=sum(it.stop_reason == "max_tokens" for it in settled),
        roomy=sum(it.output_tokens * 2 < it.max_tokens for it in settled),
    )


def expected_by(calls: Iterable[CallLog], key: Callable[[CallLog], Any]) -> dict[Any, Figures]:
    groups: dict[Any, list[CallLog]] = {}
    for call in calls:
        groups.setdefault(key(call), []).append(call)
    sums = {key: expected(group) for key, group in groups.items()}
    return {key: figures for key, figures in sums.items() if figures != Figures()}


def expected_users(calls: Iterable[CallLog]) -> dict[Any, CallerFigures]:
    found: dict[Any, CallerFigures] = {}
    for it in calls:
        if it.user_id is None or it.status == "released":
            continue
        helper = it.kind in {"router", "summary"}
        counted = it.status in PAID | {"reserved"}
        made = it.counted if counted else int(it.status == "cached" and not helper)
        found[it.user_id] = found.get(it.user_id, CallerFigures()) + CallerFigures(
            attempts=1,
            calls=made,
            spend_nanousd=(it.cost_nanousd or 0) if it.status in PAID else 0,
            saved_nanousd=it.saved_nanousd,
        )
    return found


# Random calls ------------------------------------------------------------------------------------


def random_call(dice: random.Random, users: Sequence[Any], features: Sequence[Any]) -> CallLog:
    at = NOW - timedelta(minutes=dice.choice([0, 7, 31, 400, 1_500, 3_000, 30_000]))
    at -= timedelta(microseconds=dice.randrange(0, 10**10))
    status = dice.choice(STATUSES)
    call: CallLog = CallLogFactory.build(
        feature=dice.choice(features),
        user=dice.choice([*users, None]),
        subject=dice.choice(["", "", "acme", "Zoe, ü"]),
        kind=dice.choice(list(CallLog.Kind)),
        status=status,
        counted=dice.choice([0, 1, 1, 3]),
        requested_model=dice.choice([SONNET, HAIKU]),
        model=HAIKU,
        reserved_at=at,
        reserved_nanousd=dice.randrange(10**9),
        saved_nanousd=dice.randrange(-100, 1000) if status != "reserved" else 0,
        saved_reason=dice.choice(["", "routing", "batch"]) if status != "reserved" else "",
        cache_checked=dice.random() < 0.5,
        input_tokens=dice.randrange(1000),
        cache_write_5m_tokens=dice.randrange(1000),
        cache_write_1h_tokens=dice.randrange(1000),
        cache_read_tokens=dice.randrange(1000),
        output_tokens=dice.randrange(1000),
        thinking_tokens=dice.randrange(1000),
        web_searches=dice.randrange(3),
        stop_reason=dice.choice(["end_turn", "max_tokens"]),
        tags=dice.choice([{}, {"plan": "free"}, {"plan": "pro", "team": "a b"}]),
    )
    if status in PAID:
        call.cost_nanousd = dice.randrange(10**9)
    return call


def book(call: CallLog) -> None:
    call.save()
    if call.status != "reserved":
        mark(call)


def change(dice: random.Random, call: CallLog) -> None:
    """End a call in flight, or correct an estimate."""
    if call.status == "reserved":
        call.status = dice.choice(["settled", "estimated", "released"])
    elif call.status == "estimated":
        call.status = "settled"
    else:
        return
    call.cost_nanousd = 0 if call.status == "released" else dice.randrange(10**9)
    book(call)


def play(dice: random.Random, steps: int) -> None:
    for table in (CallLog, TotalMark, TotalState, QuarterTotal, DayTotal, UserTotal):
        table.objects.all().delete()
    users = [UserFactory.create() for _ in range(3)]
    chat = FeatureBudgetFactory.create(name="chat")
    features = [chat, FeatureBudgetFactory.create(name="search")]
    calls: list[CallLog] = []
    for _ in range(steps):
        step = dice.random()
        if step < 0.6 or not calls:
            call = random_call(dice, users, features)
            call.category = "support" if call.feature_id == "chat" else ""
            book(call)
            calls.append(call)
        elif step < 0.85:
            change(dice, dice.choice(calls))
        else:
            rollups.add_up()


def some_span(dice: random.Random, zone: str) -> Span:
    since = NOW - timedelta(seconds=dice.randrange(60, 60 * 60 * 24 * 40))
    until = since + timedelta(seconds=dice.randrange(1, 60 * 60 * 24 * 45))
    if dice.random() < 0.6:
        since = periods.day(since, ZoneInfo(zone)).start
        until = periods.day(until, ZoneInfo(zone)).end
    return Span(since=since, until=until)


def within(span: Span) -> list[CallLog]:
    rows = CallLog.objects.filter(reserved_at__gte=span.since, reserved_at__lt=span.until)
    return list(rows)


@hypothesis_settings(
    max_examples=deep(200, else_=6), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**9), zone=st.sampled_from(ZONES))
def test_figures_are_a_plain_aggregate_of_the_calls(seed: int, zone: str) -> None:
    dice = random.Random(seed)
    with in_zone(zone):
        play(dice, 25)
        where = ZoneInfo(zone)
        for span in [some_span(dice, zone), some_span(dice, zone), ever()]:
            calls = within(span)
            with reading() as figures:
                assert figures.total(span) == expected(calls)
                assert figures.calls_made(span) == expected(calls).calls
                assert figures.by(span, "day", "feature") == expected_by(
                    calls, lambda it: (periods.day(it.reserved_at, where).first_day, it.feature_id)
                )
                assert figures.by(span, "model", "requested_model", "saved_reason") == expected_by(
                    calls, lambda it: (it.model, it.requested_model, it.saved_reason)
                )
                spent = expected_by(calls, lambda it: (it.feature_id,))
                assert figures.spend(span, "feature") == {
                    key: it.spend_nanousd for key, it in spent.items() if it.spend_nanousd
                }
                users = expected_users(calls)
                assert dict(figures.users(span, top=100)) == users
                assert figures.active_users(span) == (
                    len(users),
                    sum(it.spend_nanousd for it in users.values()),
                )


@hypothesis_settings(
    max_examples=deep(200, else_=3), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**9))
def test_filters_leave_the_same_calls_as_a_plain_one(seed: int) -> None:
    dice = random.Random(seed)
    play(dice, 25)
    span = some_span(dice, "UTC")
    calls = within(span)
    someone = next((it.user_id for it in calls if it.user_id), None)

    with reading() as figures:
        assert figures.total(replace(span, feature="support")) == expected(
            it for it in calls if it.category == "support"
        )
        assert figures.total(replace(span, feature="chat", model=HAIKU)) == expected(
            it for it in calls if it.feature_id == "chat" and it.model == HAIKU
        )
        assert figures.total(replace(span, tag=("team", "a b"))) == expected(
            it for it in calls if it.tags.get("team") == "a b"
        )
        assert dict(figures.users(replace(span, feature="chat"), top=9)) == expected_users(
            it for it in calls if it.feature_id == "chat"
        )
        if someone is not None:
            assert figures.total(replace(span, user_id=someone)) == expected(
                it for it in calls if it.user_id == someone
            )


# The totals --------------------------------------------------------------------------------------


def test_what_was_added_up_is_read_from_the_totals_alone() -> None:
    call = CallLogFactory.create(reserved_at=NOW)
    rollups.add_up()

    # Behind the ledger's back, to see who is asked.
    CallLog.objects.filter(pk=call.pk).update(cost_nanousd=5)

    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 1_234_567
        assert figures.behind == 0


def test_a_mark_makes_the_calls_themselves_count() -> None:
    call = CallLogFactory.create(reserved_at=NOW)
    rollups.add_up()
    CallLog.objects.filter(pk=call.pk).update(cost_nanousd=5)

    mark(call)

    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 5
        assert figures.behind == 1


def test_totals_of_a_changed_zone_are_its_own_days() -> None:
    at = datetime(2026, 10, 25, 20, 0, tzinfo=UTC)  # the day after, in Kathmandu
    CallLogFactory.create(reserved_at=at)
    with in_zone("UTC"):
        rollups.add_up()
        assert [str(it.day) for it in DayTotal.objects.all()] == ["2026-10-25"]

    with in_zone("Asia/Kathmandu"):
        with reading() as figures:
            days = figures.by(ever(), "day")
        rollups.add_up()

        assert [str(day) for (day,) in days] == ["2026-10-26"]
        assert [str(it.day) for it in DayTotal.objects.all()] == ["2026-10-26"]


def test_totals_are_recreated_from_the_calls() -> None:
    CallLogFactory.create_batch(3, reserved_at=NOW, user=UserFactory.create())
    CallLogFactory.create(reserved_at=NOW - timedelta(days=40), subject="acme")
    rollups.add_up()
    with reading() as figures:
        before = (figures.by(ever(), "day"), figures.users(ever(), top=9))
    QuarterTotal.objects.update(cost_nanousd=F("cost_nanousd") + 1)
    DayTotal.objects.all().delete()
    UserTotal.objects.update(cost_nanousd=0)
    since = (NOW - timedelta(days=60)).date()
    wrong = rollups.differences(since)

    rollups.rebuild(since)

    assert len(wrong) == 2
    assert rollups.differences(since) == []
    with reading() as figures:
        assert (figures.by(ever(), "day"), figures.users(ever(), top=9)) == before


def test_the_dearest_users_are_found_among_totals_and_what_changed_since() -> None:
    poor, rich, newly_rich = (UserFactory.create() for _ in range(3))
    CallLogFactory.create(reserved_at=NOW, user=poor, cost_nanousd=10)
    CallLogFactory.create(reserved_at=NOW, user=rich, cost_nanousd=1_000)
    CallLogFactory.create(reserved_at=NOW, user=newly_rich, cost_nanousd=1)
    rollups.add_up()
    CallLogFactory.create(reserved_at=NOW, user=newly_rich, cost_nanousd=5_000)

    with reading() as figures:
        window = periods.month(NOW, ZoneInfo("UTC"))
        month = Span(since=window.start, until=window.end)
        assert [user for user, _ in figures.users(ever(), top=2)] == [newly_rich.pk, rich.pk]
        assert figures.active_users(month) == (3, 6_011)


def test_a_span_is_covered_without_gaps_or_overlaps() -> None:
    zone = ZoneInfo("Asia/Kathmandu")
    since = datetime(2026, 10, 20, 3, 7, tzinfo=UTC)
    until = datetime(2026, 10, 25, 23, 59, tzinfo=UTC)

    cover = cover_of(Span(since=since, until=until), zone)

    days = [
        (periods.midnight(first, zone), periods.midnight(after, zone))
        for first, after in cover.days
    ]
    pieces = sorted([*days, *cover.quarters, *cover.edges])
    assert (pieces[0][0], pieces[-1][1]) == (since, until)
    assert all(a[1] == b[0] for a, b in pairwise(pieces))


@pytest.mark.parametrize("zone", [*ZONES, "Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_everything_is_made_of_whole_days_in_every_zone(zone: str) -> None:
    cover = cover_of(ever(), ZoneInfo(zone))

    assert (len(cover.days), cover.quarters, cover.edges) == (1, [], [])
