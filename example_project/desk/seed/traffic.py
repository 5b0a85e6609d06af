"""Five weeks at the desk: who asks what and when, and what comes of it.

Random, but always the same for the same moment: the generator has a fixed seed.
"""

from __future__ import annotations

import copy
import math
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from ai_budget import money, periods, price
from ai_budget.conf import conf
from ai_budget.models import CallLog
from ai_budget.periods import Period
from ai_budget.pricing.rates import resolve
from ai_budget.values import SITE, BalanceKey, Usage
from example_project.desk.seed.books import Books
from example_project.desk.seed.budgets import (
    CHAT,
    CLASSIFICATION,
    READER_DAILY_USD,
    SUMMARIES,
    Plan,
)
from example_project.desk.seed.people import Person

DAYS = 35
# A newsletter brings a crowd on the working day so long ago: never so late that a limit of
# today has no room left.
_NEWSLETTERS = {9: 4.4, 22: 3.8}
_WEEKEND = 0.35
# Out of a day's calls, how many fall into each hour: nights are quiet, two peaks at the desk.
_HOURS = (2, 1, 1, 1, 1, 2, 5, 12, 25, 38, 44, 40, 28, 34, 42, 40, 33, 24, 18, 19, 20, 15, 9, 4)
# As long as the guard waits for a call before it counts as abandoned.
_PATIENCE = {CallLog.Kind.ASK: timedelta(minutes=21), CallLog.Kind.STREAM: timedelta(minutes=81)}
_NOT_FOUND = 0.69  # the share of lookups that the response cache has no answer for
_OVERLOADED = 0.006  # the share of calls that the API refuses once
_MIGRATED = 16  # days ago the catalogue moved to a newer model
_SITE_DAILY = money.parse_usd("5")
_READER_DAILY = money.parse_usd(READER_DAILY_USD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Habit:
    """How one feature is used. Token counts are medians; ``prefix`` is a cacheable prompt."""

    plan: Plan
    kind: CallLog.Kind
    calls_a_weekday: int
    prompt: int
    answer: int
    prefix: int = 0


HABITS = (
    Habit(
        plan=CHAT,
        kind=CallLog.Kind.STREAM,
        calls_a_weekday=64,
        prompt=850,
        answer=330,
        prefix=2_100,
    ),
    Habit(plan=SUMMARIES, kind=CallLog.Kind.ASK, calls_a_weekday=28, prompt=3_400, answer=210),
    Habit(plan=CLASSIFICATION, kind=CallLog.Kind.ASK, calls_a_weekday=55, prompt=420, answer=11),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Month:
    """What happened: the rows, and the balances that go with them."""

    calls: list[CallLog] = field(default_factory=list)
    books: Books = field(default_factory=Books)


def simulate(people: Sequence[Person], *, now: datetime) -> Month:
    """Return the calls of the weeks up to ``now``, in the order in which they were made."""
    dice = random.Random("the reading desk")
    month = Month()
    weights = [person.weight for person in people]
    for at, days_ago, habit in sorted(_moments(dice, now), key=lambda moment: moment[0]):
        person = dice.choices(people, weights)[0]
        _call(dice, month, habit, person, at, days_ago)
    _in_flight(dice, month, people[7], now)
    return month


def _moments(dice: random.Random, now: datetime) -> Iterator[tuple[datetime, int, Habit]]:
    today = now.astimezone(conf.TIME_ZONE).date()
    latest = now - timedelta(minutes=2)
    crowds = {_working_day(today, ago): crowd for ago, crowd in _NEWSLETTERS.items()}
    for days_ago in range(DAYS, -1, -1):
        day = today - timedelta(days=days_ago)
        midnight = periods.midnight(day, conf.TIME_ZONE)
        for habit in HABITS:
            for _ in range(_calls_on(dice, day, habit, crowds.get(day, 1.0))):
                hour = dice.choices(range(24), _HOURS)[0]
                at = midnight + timedelta(hours=hour, seconds=dice.uniform(0, 3600))
                if at < latest:
                    yield at, days_ago, habit


def _working_day(today: date, days_ago: int) -> date:
    day = today - timedelta(days=days_ago)
    return day - timedelta(days=max(0, day.weekday() - 4))


def _calls_on(dice: random.Random, day: date, habit: Habit, crowd: float) -> int:
    expected = habit.calls_a_weekday * (_WEEKEND if day.weekday() > 4 else 1.0)
    return round(expected * crowd * dice.uniform(0.8, 1.2))


def _call(
    dice: random.Random, month: Month, habit: Habit, person: Person, at: datetime, days_ago: int
) -> None:
    requested = _requested_model(dice, habit, person, days_ago)
    day = periods.day(at, conf.TIME_ZONE).first_day
    model, decision = _climb_down(month.books, habit.plan, requested, day)
    usage = _usage(dice, habit)
    most = _most(model, usage, habit.plan, at)
    if _refused(month.books, habit.plan, person, day, most):
        return
    row = _row(dice, habit, person, at, model=model, most=most)
    row.requested_model, row.decision = requested, decision
    if dice.random() < _OVERLOADED:
        _enter(month, _overloaded(row))
        row.attempt, row.counted = 1, 0
    _finish(dice, row, habit, usage)
    _enter(month, row)


def _enter(month: Month, row: CallLog) -> None:
    month.calls.append(row)
    month.books.enter(row)


def _row(
    dice: random.Random, habit: Habit, person: Person, at: datetime, *, model: str, most: int
) -> CallLog:
    """Return the row of a reservation, as it is before anything is known of the answer."""
    return CallLog(
        call_id=uuid.UUID(int=dice.getrandbits(128), version=4),
        feature_id=habit.plan.name,
        category=habit.plan.category,
        user_id=person.user_id,
        kind=habit.kind,
        requested_model=model,
        model=model,
        max_tokens=habit.plan.max_tokens,
        reserved_nanousd=most,
        rates=resolve(model, at=at).reference,
        reserved_at=at,
        day=periods.day(at, conf.TIME_ZONE).first_day,
        deadline=at + _PATIENCE[habit.kind],
        tags={"plan": person.plan},
    )


def _overloaded(row: CallLog) -> CallLog:
    """Return the first attempt of a call that the API was too busy for: it costs nothing."""
    first = copy.copy(row)
    first.status, first.error, first.cost_nanousd = CallLog.Status.SETTLED, "HTTP 529", 0
    first.settled_at, first.latency_ms = row.reserved_at + timedelta(milliseconds=400), 400
    return first


def _requested_model(dice: random.Random, habit: Habit, person: Person, days_ago: int) -> str:
    if habit.plan is CLASSIFICATION and days_ago > _MIGRATED:
        return "claude-haiku-4-5"
    if habit.plan is CHAT and person.plan == "team" and dice.random() < 0.05:
        return "claude-opus-5-5"
    return habit.plan.model


def _climb_down(books: Books, plan: Plan, requested: str, day: date) -> tuple[str, str]:
    """Return the model that answers at this share of the limits, and why."""
    scope = f"feature:{plan.name}"
    shares = (
        (books.taken(BalanceKey(scope, Period.DAY, day)), plan.daily_nanousd),
        (books.taken(BalanceKey(scope, Period.MONTH, day.replace(day=1))), plan.monthly_nanousd),
    )
    percent = max(taken * 100 // limit for taken, limit in shares)
    for at_percent, model in sorted(plan.rungs, reverse=True):
        if percent >= at_percent and model != requested:
            return model, f"rung {at_percent} % at {percent} %"
    return requested, ""


def _refused(books: Books, plan: Plan, person: Person, day: date, most: int) -> bool:
    """Count a refusal where a day's limit does not hold the call, as the ledger would."""
    feature = BalanceKey(f"feature:{plan.name}", Period.DAY, day)
    reader = BalanceKey(f"user:{person.user_id}", Period.DAY, day)
    site = BalanceKey(SITE, Period.DAY, day)
    limits = ((feature, plan.daily_nanousd), (reader, _READER_DAILY), (site, _SITE_DAILY))
    full = {key for key, limit in limits if books.taken(key) + most > limit}
    if full:
        books.refuse(full | {feature, reader})
    return bool(full)


def _usage(dice: random.Random, habit: Habit) -> Usage:
    read = written = 0
    if habit.prefix:
        # The prompt's prefix is mostly read from Anthropic's cache, now and then written to it.
        fate = dice.random()
        read = habit.prefix if fate < 0.62 else 0
        written = habit.prefix if 0.62 <= fate < 0.80 else 0
    return Usage(
        input_tokens=_around(dice, habit.prompt, 0.55),
        cache_read_tokens=read,
        cache_write_5m_tokens=written,
        output_tokens=min(_around(dice, habit.answer, 0.45), habit.plan.max_tokens),
        service_tier="standard",
    )


def _around(dice: random.Random, median: int, spread: float) -> int:
    """Draw a count with a long tail upwards, as lengths of texts have."""
    return max(1, round(median * math.exp(dice.gauss(0, spread))))


def _most(model: str, usage: Usage, plan: Plan, at: datetime) -> int:
    """Return a bound such as the guard's: a token for every byte, and all output."""
    worst = Usage(
        cache_write_5m_tokens=usage.prompt_tokens * 4 + 256, output_tokens=plan.max_tokens
    )
    return price(model, worst, at=at)


def _finish(dice: random.Random, row: CallLog, habit: Habit, usage: Usage) -> None:
    fate = dice.random()
    row.request_id = f"req_{dice.getrandbits(96):024x}"
    if fate < 0.008:
        _release(row, "APIConnectionError")
        return
    row.cache_checked = habit.plan.cache_scope != "off"
    if row.cache_checked and fate > _NOT_FOUND:
        _from_cache(row, usage)
        return
    row.status = CallLog.Status.SETTLED
    row.stop_reason = "max_tokens" if usage.output_tokens == row.max_tokens else "end_turn"
    if habit.kind == CallLog.Kind.STREAM and fate > 0.965:
        # The reader left: booked at what had been read and written by then.
        usage = _cut(dice, usage)
        row.status, row.stop_reason, row.error = CallLog.Status.ESTIMATED, "", "closed early"
    _book(row, usage)
    _time(dice, row, usage)


def _release(row: CallLog, error: str) -> None:
    row.status, row.error, row.cost_nanousd = CallLog.Status.RELEASED, error, 0
    row.request_id = ""
    row.settled_at = row.reserved_at + timedelta(milliseconds=120)


def _from_cache(row: CallLog, usage: Usage) -> None:
    row.status, row.cost_nanousd, row.reserved_nanousd = CallLog.Status.CACHED, 0, 0
    row.saved_nanousd = price(row.model, usage, at=row.reserved_at)
    row.saved_reason, row.request_id = "response cache", ""
    row.settled_at, row.latency_ms = row.reserved_at + timedelta(milliseconds=3), 3


def _cut(dice: random.Random, usage: Usage) -> Usage:
    return Usage(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_5m_tokens=usage.cache_write_5m_tokens,
        output_tokens=max(1, int(usage.output_tokens * dice.uniform(0.1, 0.8))),
        service_tier=usage.service_tier,
    )


def _book(row: CallLog, usage: Usage) -> None:
    row.input_tokens = usage.input_tokens
    row.cache_read_tokens = usage.cache_read_tokens
    row.cache_write_5m_tokens = usage.cache_write_5m_tokens
    row.output_tokens = usage.output_tokens
    row.service_tier = usage.service_tier
    row.cost_nanousd = price(row.model, usage, at=row.reserved_at)


def _time(dice: random.Random, row: CallLog, usage: Usage) -> None:
    first = int(dice.uniform(250, 600) + usage.prompt_tokens / 25)
    row.latency_ms = first + int(usage.output_tokens * dice.uniform(7, 14))
    if row.kind == CallLog.Kind.STREAM:
        row.first_token_ms = first
    row.settled_at = row.reserved_at + timedelta(milliseconds=row.latency_ms)


def _in_flight(dice: random.Random, month: Month, person: Person, now: datetime) -> None:
    """Leave one answer that is being written at this very moment."""
    habit, model, at = HABITS[0], CHAT.model, now - timedelta(seconds=2)
    most = _most(model, Usage(input_tokens=habit.prompt), habit.plan, at)
    _enter(month, _row(dice, habit, person, at, model=model, most=most))
