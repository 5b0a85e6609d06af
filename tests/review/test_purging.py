"""A purge deletes calls and keeps what they add up to, on whichever day it ends."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction
from ai_budget.ledger import redis as redis_ledger
from ai_budget.models import (
    Batch,
    BatchSubmission,
    CallLog,
    CallText,
    DayTotal,
    QuarterTotal,
    SubjectTotal,
    TotalMark,
    TotalState,
    UserTotal,
)
from ai_budget.periods import Period
from ai_budget.review import purging, rollups
from ai_budget.review.purging import Obstacle, Purge, purge
from ai_budget.review.spans import Span, ever
from ai_budget.review.sums import reading
from tests.depth import deep
from tests.factories import CallLogFactory, FeatureBudgetFactory, UserFactory
from tests.review.test_sums import (
    book,
    change,
    expected,
    expected_by,
    expected_users,
    in_zone,
    random_call,
)

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 10, 26, 9, 40, tzinfo=UTC)
OCTOBER = date(2026, 10, 1)


@pytest.fixture(autouse=True)
def now() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


def at(day: str, hour: int = 12) -> datetime:
    return datetime.fromisoformat(day).replace(hour=hour, tzinfo=UTC)


def called(day: str, **fields: Any) -> CallLog:
    call: CallLog = CallLogFactory.create(reserved_at=at(day), **fields)
    return call


def days_left() -> list[str]:
    return [str(it.day) for it in CallLog.objects.order_by("reserved_at")]


# Sums --------------------------------------------------------------------------------------------


@hypothesis_settings(
    max_examples=deep(200, else_=4), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**9),
    zone=st.sampled_from(["UTC", "Asia/Kathmandu", "Europe/Berlin", "America/New_York"]),
)
def test_figures_are_those_of_every_call_that_was_ever_made(seed: int, zone: str) -> None:
    dice = random.Random(seed)
    with in_zone(zone):
        for table in (CallLog, TotalMark, QuarterTotal, DayTotal, UserTotal, SubjectTotal):
            table.objects.all().delete()
        TotalState.objects.update(purged_before=None, purged_day=None)
        calls = play(dice, 30)
        with reading() as figures:
            assert figures.total(ever()) == expected(calls)
            for span in spans(dice, ZoneInfo(zone)):
                within = [it for it in calls if span.since <= it.reserved_at < span.until]
                assert figures.by(span, "day", "feature") == expected_by(
                    within,
                    lambda it: (
                        periods.day(it.reserved_at, ZoneInfo(zone)).first_day,
                        it.feature_id,
                    ),
                )
                if span != ever():  # not made of whole days, in most zones
                    assert dict(figures.users(span, top=100)) == expected_users(within)
        assert rollups.differences(date(2026, 1, 1)) == []


def play(dice: random.Random, steps: int) -> list[CallLog]:
    """Make calls, settle some later, add up and purge now and then; return all there ever were."""
    users = [UserFactory.create() for _ in range(3)]
    features = [FeatureBudgetFactory.create(name=name) for name in ("chat", "search")]
    calls: list[CallLog] = []
    for _ in range(steps):
        step = dice.random()
        if step < 0.5 or not calls:
            call = random_call(dice, users, features)
            call.reserved_at -= timedelta(hours=dice.randrange(24 * 60))
            call.day = periods.day(call.reserved_at, conf.TIME_ZONE).first_day
            if not is_sealed(call):  # nobody is admitted in the past
                book(call)
                calls.append(call)
        elif step < 0.75:
            call = dice.choice(calls)
            if not is_sealed(call):
                change(dice, call)
        elif step < 0.85:
            rollups.add_up()
        else:
            purge(dice.choice([OCTOBER, date(2026, 9, 17), date(2026, 8, 30)]), batch_size=3)
    return calls


def is_sealed(call: CallLog) -> bool:
    state = TotalState.objects.filter(purged_before__gt=call.reserved_at)
    return state.exists()


def spans(dice: random.Random, zone: ZoneInfo) -> Iterator[Span]:
    yield ever()
    since = NOW - timedelta(days=dice.randrange(20, 70))
    until = since + timedelta(days=dice.randrange(1, 60))
    yield Span(since=periods.day(since, zone).start, until=periods.day(until, zone).end)
    yield Span(since=periods.month(since, zone).start, until=periods.month(until, zone).end)


def test_nothing_but_whole_days_before_that_one_is_deleted() -> None:
    for day in ("2026-08-31", "2026-09-10", "2026-09-11", "2026-10-02"):
        called(day)

    ended = purge(date(2026, 9, 11))

    assert ended == Purge(deleted=2)
    assert days_left() == ["2026-09-11", "2026-10-02"]


def test_what_nobody_has_added_up_yet_is_added_up_first() -> None:
    user = UserFactory.create()
    called("2026-09-10", user=user, cost_nanousd=7)
    assert not QuarterTotal.objects.exists()

    purge(OCTOBER)

    with reading() as figures:
        september = Span(since=at("2026-09-01", 0), until=at("2026-10-01", 0))
        assert figures.total(september).spend_nanousd == 7
        assert figures.users(september, top=1)[0][1].spend_nanousd == 7
        assert figures.total(Span(since=at("2026-09-10", 12), until=NOW)).calls == 1


def test_calls_that_were_never_marked_are_added_up_all_the_same() -> None:
    called("2026-09-10", user=UserFactory.create(), cost_nanousd=7)
    TotalMark.objects.all().delete()

    purge(OCTOBER)

    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 7
    assert [it.period for it in UserTotal.objects.order_by("period")] == ["day", "month"]


def test_marks_of_a_purged_day_change_nothing() -> None:
    call = called("2026-09-10", cost_nanousd=7)
    purge(OCTOBER)

    TotalMark.objects.create(reserved_at=call.reserved_at, day=call.day, user_id=5)
    with reading() as figures:
        before = figures.total(ever())
    rollups.add_up()

    with reading() as figures:
        assert figures.total(ever()) == before
        assert before.spend_nanousd == 7


def test_totals_that_are_rebuilt_keep_what_was_purged() -> None:
    called("2026-09-10", user=UserFactory.create())
    called("2026-10-02")
    purge(OCTOBER)
    with reading() as figures:
        before = (figures.by(ever(), "day"), figures.users(ever(), top=5))

    rollups.rebuild()

    with reading() as figures:
        assert (figures.by(ever(), "day"), figures.users(ever(), top=5)) == before


def test_a_run_that_died_after_sealing_a_day_is_continued() -> None:
    called("2026-09-10", cost_nanousd=7)
    called("2026-09-11", cost_nanousd=5)
    rollups.add_up()
    assert purging._seal(connection, periods.day(at("2026-09-10"), UTC)) is None
    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 12

    assert purge(date(2026, 9, 11)) == Purge(deleted=1)

    assert days_left() == ["2026-09-11"]
    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 12


def test_a_zone_that_was_changed_between_loses_nothing() -> None:
    user = UserFactory.create()
    with in_zone("America/New_York"):
        for hour in (3, 12, 21):  # the first is of the day before, there
            CallLogFactory.create(reserved_at=at("2026-09-10", hour), user=user, cost_nanousd=7)
    with in_zone("Asia/Kathmandu"):
        assert purge(date(2026, 9, 11)) == Purge(deleted=2)  # the last is of the next day, here
    with in_zone("UTC"):
        assert purge(date(2026, 9, 11)) == Purge(deleted=1)
        with reading() as figures:
            september = Span(since=at("2026-09-01", 0), until=at("2026-10-01", 0))
            assert figures.total(september).spend_nanousd == 21
            assert dict(figures.users(september, top=1))[user.pk].spend_nanousd == 21
    days = UserTotal.objects.filter(period=Period.DAY).order_by("first_day")
    assert [str(it.first_day) for it in days] == ["2026-09-09", "2026-09-10"]


def test_a_call_that_counts_in_a_later_day_of_another_zone_is_kept_until_then() -> None:
    user = UserFactory.create()
    with in_zone("Asia/Kathmandu"):  # where both are of the eleventh
        for moment in (at("2026-09-10", 21), at("2026-09-11", 12)):
            CallLogFactory.create(reserved_at=moment, user=user, cost_nanousd=7)

    assert purge(date(2026, 9, 11)) == Purge(deleted=0)
    assert purge(date(2026, 9, 12)) == Purge(deleted=2)

    with reading() as figures:
        september = Span(since=at("2026-09-01", 0), until=at("2026-10-01", 0))
        assert figures.total(september).spend_nanousd == 14
        assert dict(figures.users(september, top=1))[user.pk].spend_nanousd == 14


# What is in the way ------------------------------------------------------------------------------


def test_a_call_in_flight_holds_up_its_day_and_those_after_it() -> None:
    for day in ("2026-09-10", "2026-09-11", "2026-09-12"):
        called(day)
    called("2026-09-11", status="reserved")

    ended = purge(OCTOBER)

    held_up = Obstacle(day=date(2026, 9, 11), in_flight=1, batches=())
    assert ended == Purge(deleted=1, obstacle=held_up)
    assert purging.obstacle_before(OCTOBER) == held_up
    assert TotalState.objects.get().purged_day == date(2026, 9, 11)
    assert days_left() == ["2026-09-11", "2026-09-11", "2026-09-12"]


@pytest.mark.parametrize(
    ("status", "told", "submission"),
    [
        ("open", False, "sent"),
        ("finished", False, "done"),
        ("finished", True, "uncertain"),
    ],
)
def test_a_batch_that_is_not_over_holds_up_its_day(
    status: str, told: bool, submission: str
) -> None:
    called("2026-09-10")
    batch = batch_of("2026-09-10", status=status, told_at=NOW if told else None)
    BatchSubmission.objects.create(batch=batch, number=0, status=submission)

    ended = purge(OCTOBER)

    assert ended.obstacle == Obstacle(day=date(2026, 9, 10), in_flight=0, batches=(batch.pk,))
    assert CallLog.objects.count() == 1


def test_a_batch_that_is_over_is_left_and_its_calls_are_deleted() -> None:
    call = called("2026-09-10", kind="batch")
    batch = batch_of("2026-09-10", status="finished", told_at=NOW)
    BatchSubmission.objects.create(batch=batch, number=0, status="done")
    batch.items.create(position=0, key="a", custom_id="a", call_id=call.call_id, status="succeeded")

    assert purge(OCTOBER) == Purge(deleted=1)

    assert batch.items.count() == 1


def batch_of(day: str, **fields: Any) -> Batch:
    feature = FeatureBudgetFactory.create(name="nightly")
    given = {"created_at": at(day), "touched_at": at(day), "reserved_at": at(day)}
    return Batch.objects.create(
        feature=feature, day=date.fromisoformat(day), total=1, succeeded=1, **given, **fields
    )


# What the ledger needs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("today", "last"),
    [
        ("2026-10-01", "2026-09-01"),
        ("2026-10-05", "2026-09-01"),
        ("2026-10-06", "2026-10-01"),
        ("2026-10-31", "2026-10-01"),
    ],
)
def test_a_month_is_needed_some_days_longer_than_it_lasts(today: str, last: str) -> None:
    with periods.override_clock(lambda: at(today)):
        assert purging.latest() == date.fromisoformat(last)
        with pytest.raises(ValueError, match="still needed"):
            purge(date.fromisoformat(last) + timedelta(days=1))


def test_no_balance_is_filled_from_days_that_may_be_purged() -> None:
    assert redis_ledger.KEPT + timedelta(days=1) < purging.NEEDED


def test_nothing_is_purged_inside_a_transaction() -> None:
    called("2026-09-10")

    with pytest.raises(CallInsideTransaction), transaction.atomic():
        purge(OCTOBER)

    assert CallLog.objects.count() == 1


# Texts and batches of rows -----------------------------------------------------------------------


def test_texts_go_with_their_calls() -> None:
    gone, both = uuid.uuid4(), uuid.uuid4()
    called("2026-09-10", call_id=gone)
    called("2026-09-30", call_id=both)
    called("2026-10-01", call_id=both, attempt=1)
    other = called("2026-10-02").call_id
    for call_id in (gone, both, other):
        CallText.objects.create(call_id=call_id, request="?", kept_at=NOW)

    purge(OCTOBER)

    assert set(CallText.objects.values_list("pk", flat=True)) == {both, other}


def test_rows_are_deleted_so_many_at_once_and_told_of() -> None:
    CallLogFactory.create_batch(5, reserved_at=at("2026-09-10"))
    called("2026-09-12")
    told: list[int] = []

    with CaptureQueriesContext(connection) as queries:
        ended = purge(OCTOBER, batch_size=2, tell=told.append)

    assert (ended, told) == (Purge(deleted=6), [2, 4, 5, 6])
    deletes = [it["sql"] for it in queries if _deletes_calls(it["sql"])]
    assert len(deletes) == 4


def _deletes_calls(sql: str) -> bool:
    return "DELETE FROM" in sql and f"{CallLog._meta.db_table}" in sql.split("WHERE")[0]


def test_a_purge_that_is_out_of_time_ends_between_two_transactions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CallLogFactory.create_batch(5, reserved_at=at("2026-09-10"), cost_nanousd=7)
    called("2026-09-12", cost_nanousd=7)
    seconds: Iterable[float] = iter(range(1_000))
    monkeypatch.setattr(periods, "monotonic", lambda: next(iter(seconds)))

    first = purge(OCTOBER, batch_size=2, max_seconds=4)

    assert (first.out_of_time, 0 < first.deleted < 5) == (True, True)
    with reading() as figures:
        assert figures.total(ever()).spend_nanousd == 42
    monkeypatch.undo()
    with periods.override_clock(lambda: NOW):
        assert purge(OCTOBER) == Purge(deleted=6 - first.deleted)


def test_a_purge_without_time_does_nothing() -> None:
    called("2026-09-10")

    assert purge(OCTOBER, max_seconds=0) == Purge(deleted=0, out_of_time=True)

    assert purging.purgeable(OCTOBER) == {date(2026, 9, 1): 1}


def test_what_can_be_purged_is_counted_by_month() -> None:
    for day in ("2026-08-31", "2026-09-10", "2026-09-30", "2026-10-01"):
        called(day)

    assert purging.purgeable(OCTOBER) == {date(2026, 8, 1): 1, date(2026, 9, 1): 2}
    assert purging.purgeable(date(2026, 9, 10)) == {date(2026, 8, 1): 1}
    assert purging.purgeable(date(2026, 1, 1)) == {}
    assert purge(date(2026, 1, 1)) == Purge(deleted=0)
    assert TotalState.objects.get().purged_day is None
