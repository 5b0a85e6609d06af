"""Calls at the edges of days, months and years, in zones whose clocks change, by wrong clocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.core.management import call_command
from django.db import connection
from django.test import override_settings
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ai_budget
from ai_budget import periods
from ai_budget.exceptions import BudgetExceeded
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, FeatureBudget, LimitOverride, SpendWindow
from ai_budget.money import to_usd
from ai_budget.periods import Period
from ai_budget.testing import AnthropicSimulator, CutStream, Reply
from ai_budget.values import Balances
from tests.depth import deep, some_of
from tests.guard.books import bill
from tests.whole.calls import LONG, TOKENS, ask, assert_books_agree, balance, last, most, spent
from tests.whole.clocks import Clock

pytestmark = pytest.mark.django_db

MOMENT = timedelta(microseconds=1)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type, misc]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A day or a month of a zone, with its bounds as the almanac gives them."""

    zone: str
    first_day: date
    start: datetime
    end: datetime
    period: Period = Period.DAY

    @property
    def next(self) -> date:
        """The first day of the window after it."""
        if self.period is Period.DAY:
            return self.first_day + DAY
        return (self.first_day + 31 * DAY).replace(day=1)


WINDOWS = {
    "a day": Window(
        zone="UTC", first_day=date(2026, 5, 4), start=utc(2026, 5, 4), end=utc(2026, 5, 5)
    ),
    # Clocks go back at 3:00, summer's end: 25 hours.
    "Berlin, 25 hours": Window(
        zone="Europe/Berlin",
        first_day=date(2026, 10, 25),
        start=utc(2026, 10, 24, 22),
        end=utc(2026, 10, 25, 23),
    ),
    # Clocks go forward at 2:00: 23 hours.
    "Berlin, 23 hours": Window(
        zone="Europe/Berlin",
        first_day=date(2026, 3, 29),
        start=utc(2026, 3, 28, 23),
        end=utc(2026, 3, 29, 22),
    ),
    # There is no midnight: clocks jump from 24:00 to 1:00, with which the day begins.
    "Santiago, without midnight": Window(
        zone="America/Santiago",
        first_day=date(2026, 9, 6),
        start=utc(2026, 9, 6, 4),
        end=utc(2026, 9, 7, 3),
    ),
    # The last hour before midnight comes twice.
    "Santiago, eleven twice": Window(
        zone="America/Santiago",
        first_day=date(2026, 4, 4),
        start=utc(2026, 4, 4, 3),
        end=utc(2026, 4, 5, 4),
    ),
    # Midnight comes twice; the day begins with the first.
    "Havana, midnight twice": Window(
        zone="America/Havana",
        first_day=date(2026, 11, 1),
        start=utc(2026, 11, 1, 4),
        end=utc(2026, 11, 2, 5),
    ),
    # Clocks change by half an hour: 24 and a half, and 23 and a half.
    "Lord Howe, half an hour more": Window(
        zone="Australia/Lord_Howe",
        first_day=date(2026, 4, 5),
        start=utc(2026, 4, 4, 13),
        end=utc(2026, 4, 5, 13, 30),
    ),
    "Lord Howe, half an hour less": Window(
        zone="Australia/Lord_Howe",
        first_day=date(2026, 10, 4),
        start=utc(2026, 10, 3, 13, 30),
        end=utc(2026, 10, 4, 13),
    ),
    "a month": Window(
        zone="UTC",
        first_day=date(2026, 2, 1),
        start=utc(2026, 2, 1),
        end=utc(2026, 3, 1),
        period=Period.MONTH,
    ),
    "Berlin, the end of summer's month": Window(
        zone="Europe/Berlin",
        first_day=date(2026, 10, 1),
        start=utc(2026, 9, 30, 22),
        end=utc(2026, 10, 31, 23),
        period=Period.MONTH,
    ),
    "the year's end": Window(
        zone="Europe/Berlin",
        first_day=date(2025, 12, 1),
        start=utc(2025, 11, 30, 23),
        end=utc(2025, 12, 31, 23),
        period=Period.MONTH,
    ),
}
windows = pytest.mark.parametrize(
    "window", some_of(WINDOWS.values(), count=8), ids=some_of(WINDOWS, count=8)
)
days = pytest.mark.parametrize(
    "window",
    some_of(
        [pytest.param(it, id=name) for name, it in WINDOWS.items() if it.period is Period.DAY],
        count=6,
    ),
)


@pytest.fixture
def zone(api: AnthropicSimulator, settings: Any) -> Callable[[str], None]:
    """Set the zone of the site's budgets, as a new deployment would."""

    def change(name: str) -> None:
        settings.AI_BUDGET = {**settings.AI_BUDGET, "TIME_ZONE": name}

    return change


def limited_to_one_call(period: Period) -> None:
    """Give "chat" a limit that holds one long answer, and no second."""
    field = "daily_limit_usd" if period is Period.DAY else "monthly_limit_usd"
    # A stream asks for a little more than the same call without one.
    FeatureBudget.objects.create(name="chat", **{field: to_usd(most() * 5 // 4)})


# Calls that are on their way when the window ends ------------------------------------------------


def ask_across(api: AnthropicSimulator, clock: Clock, end: datetime) -> None:
    api.enqueue(clock.moves_to(end))
    ask()


def guarded_across(api: AnthropicSimulator, clock: Clock, end: datetime) -> None:
    api.enqueue(clock.moves_to(end))
    client = ai_budget.client(feature="chat")
    messages: Any = [{"role": "user", "content": "Hello"}]
    with client.messages.stream(model="claude-haiku-5-5", max_tokens=9, messages=messages) as it:
        it.get_final_message()


def stream_across(api: AnthropicSimulator, clock: Clock, end: datetime) -> None:
    with ai_budget.stream("Hello", feature="chat") as answer:
        next(iter(answer))
        clock.at = end
        "".join(answer)


def astream_across(api: AnthropicSimulator, clock: Clock, end: datetime) -> None:
    async def read() -> None:
        async with ai_budget.astream("Hello", feature="chat") as answer:
            clock.at = end
            async for _ in answer:
                pass

    async_to_sync(read)()


ACROSS = [ask_across, guarded_across, stream_across, astream_across]


@windows
def test_a_call_counts_in_the_window_of_its_reservation(
    api: AnthropicSimulator, clock: Clock, zone: Any, window: Window
) -> None:
    zone(window.zone)
    clock.at = window.end - MOMENT

    ask_across(api, clock, window.end)

    row = last()
    assert (row.reserved_at, row.settled_at) == (window.end - MOMENT, window.end)
    assert row.day == (window.end - MOMENT).astimezone(ZoneInfo(window.zone)).date()
    assert [row.cost_nanousd] == bill(api)
    for scope in ("*", "feature:chat"):
        assert balance(scope, window.first_day, window.period) == spent(row.cost_nanousd)
        assert balance(scope, window.next, window.period) == Balances()
    assert_books_agree(window.first_day)


@pytest.mark.parametrize("across", ACROSS)
def test_by_every_verb_it_counts_in_the_window_of_its_reservation(
    api: AnthropicSimulator, clock: Clock, zone: Any, across: Any
) -> None:
    window = WINDOWS["Berlin, 25 hours"]
    zone(window.zone)
    clock.at = window.end - MOMENT

    across(api, clock, window.end + HOUR)

    row = last()
    assert (row.day, row.settled_at) == (window.first_day, window.end + HOUR)
    assert [row.cost_nanousd] == bill(api)
    assert balance("feature:chat", window.first_day) == spent(row.cost_nanousd)
    assert_books_agree(window.first_day)


def test_a_stream_that_is_cut_after_midnight_is_estimated_in_the_day_before(
    api: AnthropicSimulator, clock: Clock
) -> None:
    clock.at = utc(2026, 5, 4, 23, 59)
    api.enqueue(CutStream(after_events=6, reply=Reply(text="word " * 100)))
    with ExitStack() as stack:
        answer = stack.enter_context(ai_budget.stream("Hello", feature="chat"))
        clock.at = utc(2026, 5, 5, 0, 1)
        with pytest.raises(Exception, match="peer closed"):
            "".join(answer)

    row = last()
    assert (row.status, row.day) == (CallLog.Status.ESTIMATED, date(2026, 5, 4))
    assert balance("feature:chat", row.day) == spent(row.cost_nanousd)
    assert_books_agree(row.day)


def test_what_a_call_of_yesterday_holds_is_held_in_yesterday_alone(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """A limit of today has all its room, though a long call of yesterday still goes on."""
    api.default = LONG
    limited_to_one_call(Period.DAY)
    clock.at = utc(2026, 5, 4, 23, 59)
    with ai_budget.stream("Hello", feature="chat", max_tokens=TOKENS) as yesterday:
        clock.at = utc(2026, 5, 5, 0, 1)
        ask()
        "".join(yesterday)

    first, second = CallLog.objects.order_by("id")
    assert (first.day, second.day) == (date(2026, 5, 4), date(2026, 5, 5))
    assert balance("feature:chat", first.day) == spent(first.cost_nanousd)
    assert balance("feature:chat", second.day) == spent(second.cost_nanousd)
    assert_books_agree(first.day)


# Limits ------------------------------------------------------------------------------------------


@windows
def test_a_limit_is_used_up_to_the_last_moment_of_its_window_and_fresh_in_the_next(
    api: AnthropicSimulator, clock: Clock, zone: Any, window: Window
) -> None:
    api.default = LONG
    zone(window.zone)
    limited_to_one_call(window.period)

    clock.at = window.start - MOMENT
    ask()
    for clock.at in (window.start, window.end):
        ask()
    for clock.at in (window.start, window.end - MOMENT):
        with pytest.raises(BudgetExceeded) as refused:
            ask()
        assert refused.value.exhausted
        assert refused.value.resets_at == window.end
        assert refused.value.retry_after == math.ceil((window.end - clock.at).total_seconds())

    found = balance("feature:chat", window.first_day, window.period)
    assert found.calls == 1
    assert_books_agree()


def test_the_first_call_of_a_day_does_not_find_itself_in_the_way(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """What it would hold is no call in flight that could be waited for."""
    FeatureBudget.objects.create(name="chat", daily_limit_usd=to_usd(1_000))

    for clock.at in (utc(2026, 5, 4), utc(2026, 5, 5)):
        with pytest.raises(BudgetExceeded) as refused:
            ask()
        assert (refused.value.spent, refused.value.held) == (0, 0)
        assert refused.value.exhausted
    assert_books_agree()


def test_both_of_an_hour_that_comes_twice_count_in_one_day(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    api.default = LONG
    zone("Europe/Berlin")
    limited_to_one_call(Period.DAY)

    clock.at = utc(2026, 10, 25, 0, 30)  # 2:30 in summer time
    ask()
    clock.at = utc(2026, 10, 25, 1, 30)  # 2:30 in winter time
    with pytest.raises(BudgetExceeded):
        ask()


def test_a_midnight_that_comes_twice_does_not_make_a_limit_fresh_twice(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    api.default = LONG
    zone("America/Havana")
    limited_to_one_call(Period.DAY)

    clock.at = utc(2026, 11, 1, 4)  # 0:00 in summer time
    ask()
    clock.at = utc(2026, 11, 1, 5)  # 0:00 in winter time
    with pytest.raises(BudgetExceeded):
        ask()


@days
def test_what_is_left_is_told_for_the_day_that_is(
    api: AnthropicSimulator, clock: Clock, zone: Any, window: Window
) -> None:
    zone(window.zone)
    FeatureBudget.objects.create(name="chat", daily_limit_usd=1)
    clock.at = window.end - MOMENT
    ask()

    before = ai_budget.usage(feature="chat").day
    clock.at = window.end
    after = ai_budget.usage(feature="chat").day

    assert (before.window.start, before.resets_at) == (window.start, window.end)
    assert before.balance.spent_nanousd == last().cost_nanousd
    assert after.window.start == window.end
    assert after.balance == Balances()


# The tick and the repair of balances -------------------------------------------------------------


@windows
def test_an_overdue_call_of_yesterday_is_booked_in_yesterday(
    api: AnthropicSimulator, clock: Clock, zone: Any, window: Window
) -> None:
    zone(window.zone)
    clock.at = window.end - MOMENT
    with ai_budget.stream("Hello", feature="chat") as answer:
        clock.at = window.end + 3 * HOUR

        call_command("ai_budget_tick")

        row = last()
        assert (row.status, row.settled_at) == (CallLog.Status.ESTIMATED, clock.at)
        assert row.cost_nanousd == row.reserved_nanousd
        kept = balance("feature:chat", window.first_day, window.period)
        assert kept == spent(row.reserved_nanousd)
        assert balance("feature:chat", window.next, window.period) == Balances()
        assert_books_agree(window.first_day)
        "".join(answer)

    row.refresh_from_db()
    assert (row.status, [row.cost_nanousd]) == (CallLog.Status.SETTLED, bill(api))
    assert balance("feature:chat", window.first_day, window.period) == spent(row.cost_nanousd)
    assert_books_agree(window.first_day)


@days
def test_balances_of_a_day_on_which_clocks_change_are_rebuilt(
    api: AnthropicSimulator, clock: Clock, zone: Any, window: Window
) -> None:
    zone(window.zone)
    for clock.at in (window.start - MOMENT, window.start, window.end - MOMENT, window.end):
        ask()
    break_balance(window.first_day)

    (mended,) = ledgers.current().rebuild(window.first_day)

    assert (mended.key.scope, mended.key.first_day) == ("feature:chat", window.first_day)
    assert balance("feature:chat", window.first_day) == spent(sum(bill(api)[1:3]), calls=2)
    assert_books_agree(window.first_day)


def break_balance(day: date) -> None:
    ledger: Any = ledgers.current()
    if ledger.needs_redis:
        ledger.client.hincrby(f"{ledger.prefix}:day:{day}", "s feature:chat", 5)
    else:
        SpendWindow.objects.filter(scope="feature:chat", period="day", first_day=day).update(
            spent_nanousd=5
        )


# A zone that is changed --------------------------------------------------------------------------


def test_a_call_settles_in_the_day_of_its_reservation_whatever_the_zone_is_by_then(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    clock.at = utc(2026, 5, 31, 23, 30)
    zone("UTC")
    with ai_budget.stream("Hello", feature="chat") as answer:
        zone("Asia/Tokyo")  # where it is the first of June
        "".join(answer)

    row = last()
    assert (row.day, [row.cost_nanousd]) == (date(2026, 5, 31), bill(api))
    assert balance("feature:chat", date(2026, 5, 31)) == spent(row.cost_nanousd)
    assert balance("feature:chat", date(2026, 5, 1), Period.MONTH) == spent(row.cost_nanousd)
    assert balance("feature:chat", date(2026, 6, 1)) == Balances()
    assert_books_agree(date(2026, 5, 1))


def test_a_zone_that_is_changed_between_calls_loses_none(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    clock.at = utc(2026, 5, 4, 23, 30)
    for name in ("UTC", "Asia/Tokyo", "America/Los_Angeles", "Pacific/Kiritimati", "UTC"):
        zone(name)
        ask()

    assert [row.day.day for row in CallLog.objects.order_by("id")] == [4, 5, 4, 5, 4]
    assert balance("feature:chat", date(2026, 5, 4)).calls == 3
    assert balance("feature:chat", date(2026, 5, 5)).calls == 2
    assert balance("feature:chat", date(2026, 5, 1), Period.MONTH).calls == 5
    assert_books_agree(date(2026, 5, 1))


def test_a_limit_counts_the_day_of_the_new_zone(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    api.default = LONG
    clock.at = utc(2026, 5, 4, 23, 30)
    zone("UTC")
    limited_to_one_call(Period.DAY)
    ask()
    zone("Asia/Tokyo")
    ask()

    with pytest.raises(BudgetExceeded) as refused:
        ask()
    assert refused.value.resets_at == utc(2026, 5, 5, 15)
    zone("UTC")
    with pytest.raises(BudgetExceeded) as refused:
        ask()
    assert refused.value.resets_at == utc(2026, 5, 5)


def test_an_overdue_call_is_booked_in_its_day_though_the_zone_has_changed(
    api: AnthropicSimulator, clock: Clock, zone: Any
) -> None:
    clock.at = utc(2026, 5, 4, 23, 30)
    zone("UTC")
    with ai_budget.stream("Hello", feature="chat") as answer:
        zone("Pacific/Kiritimati")
        clock.at += 3 * HOUR
        call_command("ai_budget_tick")
        "".join(answer)

    assert last().day == date(2026, 5, 4)
    assert balance("feature:chat", date(2026, 5, 4)) == spent(sum(bill(api)))
    assert_books_agree(date(2026, 5, 1))


# A worker whose clock is wrong -------------------------------------------------------------------


class WrongClock:
    """The clock of a worker's machine, which nobody has set."""

    def __init__(self) -> None:
        self.wrong_by = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.wrong_by


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> WrongClock:
    clock = WrongClock()
    # The system's clock itself, so that it is none that a test has set.
    monkeypatch.setattr(periods, "_system_clock", clock)
    monkeypatch.setattr(periods, "_clock", clock)
    assert not periods.is_overridden()
    return clock


@pytest.fixture
def of_store(ledger_settings: dict[str, Any]) -> bool:
    """Whether the ledger's store has a clock of its own."""
    return connection.vendor != "sqlite" or "LEDGER_REDIS_URL" in ledger_settings


WRONG = [HOUR, -HOUR, DAY, -DAY]


@pytest.mark.parametrize("wrong_by", WRONG, ids=str)
def test_a_call_is_booked_at_the_time_of_the_store(
    api: AnthropicSimulator, worker: WrongClock, of_store: bool, wrong_by: timedelta
) -> None:
    """On SQLite nobody knows better than the worker."""
    worker.wrong_by = wrong_by

    ask()

    row = last()
    expected = datetime.now(UTC) + (timedelta() if of_store else wrong_by)
    assert abs(row.reserved_at - expected) < timedelta(minutes=1)
    assert row.day == row.reserved_at.date()
    assert row.settled_at is not None
    assert timedelta() <= row.settled_at - row.reserved_at < timedelta(minutes=1)
    assert_books_agree()


@pytest.mark.parametrize("wrong_by", WRONG, ids=str)
def test_a_worker_whose_clock_is_wrong_has_no_limits_of_its_own(
    api: AnthropicSimulator, zone: Any, worker: WrongClock, of_store: bool, wrong_by: timedelta
) -> None:
    if not of_store:
        pytest.skip("SQLite has no clock")
    api.default = LONG
    zone(zone_in_which_it_is(first_hour=wrong_by < timedelta()))
    limited_to_one_call(Period.DAY)
    ask()

    worker.wrong_by = wrong_by
    with another_process(), pytest.raises(BudgetExceeded) as refused:
        ask()

    assert datetime.now(UTC) < refused.value.resets_at <= datetime.now(UTC) + DAY


def another_process() -> override_settings:
    """Return a block in which the ledger is made anew, as in a process that has just begun."""
    return override_settings(AI_BUDGET=dict(django_settings.AI_BUDGET))


def zone_in_which_it_is(*, first_hour: bool) -> str:
    """Name a zone where an hour earlier, or later, is another day."""
    offset = (0 if first_hour else 23) - datetime.now(UTC).hour
    offset = (offset + 12) % 24 - 12
    return f"Etc/GMT{-offset:+d}"  # whose names have the sign of the sailor


def test_an_override_ends_by_the_time_of_the_store(
    api: AnthropicSimulator, worker: WrongClock, of_store: bool
) -> None:
    budget = FeatureBudget.objects.create(name="chat", daily_limit_usd=0)
    ended = datetime.now(UTC) - HOUR / 2
    LimitOverride.objects.create(budget=budget, period="day", amount_usd=1, until=ended, reason="r")
    worker.wrong_by = -HOUR

    if of_store:
        with pytest.raises(BudgetExceeded):
            ask()
    else:
        ask()


def test_the_tick_waits_for_a_deadline_by_the_time_of_the_store(
    api: AnthropicSimulator, worker: WrongClock, of_store: bool
) -> None:
    with ai_budget.stream("Hello", feature="chat") as answer:
        worker.wrong_by = DAY
        with another_process():
            call_command("ai_budget_tick")

        expected = CallLog.Status.RESERVED if of_store else CallLog.Status.ESTIMATED
        assert last().status == expected
        "".join(answer)

    assert [last().cost_nanousd] == bill(api)


# Any moments, any zones --------------------------------------------------------------------------

ZONES = [*sorted({window.zone for window in WINDOWS.values()}), "Pacific/Apia", "Asia/Kathmandu"]
EDGES = [edge for window in WINDOWS.values() for edge in (window.start, window.end)]
MOMENTS = st.one_of(
    st.builds(
        lambda edge, by: edge + by,
        st.sampled_from(EDGES),
        st.timedeltas(timedelta(hours=-1), timedelta(hours=1)),
    ),
    st.datetimes(
        datetime(2025, 12, 1),  # noqa: DTZ001 - the zone is added
        datetime(2026, 12, 31),  # noqa: DTZ001
        timezones=st.just(UTC),
    ),
)
CALLS = st.lists(
    st.tuples(MOMENTS, st.sampled_from(ZONES), st.timedeltas(timedelta(), timedelta(hours=12))),
    min_size=1,
    max_size=3,
)
numbers = itertools.count()


@settings(
    max_examples=deep(200, else_=6),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(calls=CALLS)
@example(calls=[(utc(2026, 5, 4, 23, 30), zone, HOUR) for zone in ("UTC", "Australia/Lord_Howe")])
def test_whenever_and_wherever_calls_are_made_they_count_where_they_were_reserved(
    api: AnthropicSimulator, clock: Clock, zone: Any, calls: list[tuple[datetime, str, timedelta]]
) -> None:
    feature = f"chat-{next(numbers)}"
    for at, name, takes in calls:
        zone(name)
        clock.at = at
        api.enqueue(clock.moves_to(at + takes))
        ask(feature)

    rows = CallLog.objects.filter(feature_id=feature).order_by("id")  # type: ignore[misc]
    for row, (at, name, takes) in zip(rows, calls, strict=True):
        assert (row.reserved_at, row.settled_at) == (at, at + takes)
        assert row.day == at.astimezone(ZoneInfo(name)).date()
        same_day = [other for other in rows if other.day == row.day]
        kept = balance(f"feature:{feature}", row.day)
        assert kept == spent(sum(it.cost_nanousd or 0 for it in same_day), calls=len(same_day))
    assert_books_agree()
