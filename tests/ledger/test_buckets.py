"""Limits that refill: taken in the same step as money, exact to the unit and the millisecond."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget.exceptions import BudgetExceeded, LimitReached, RateLimited
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, RateBucket
from ai_budget.values import SITE, Bucket, Level, Limit, Measure, Reservation
from tests.depth import deep
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    NOON,
    RELEASED,
    bucket,
    estimated,
    limit,
    reserve,
    row,
    settle,
    settled,
    spent_held_calls,
)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("clock")]

MS = timedelta(milliseconds=1)
MINUTE = timedelta(minutes=1)


def refused(limits: list[Limit | Bucket], **fields: Any) -> LimitReached:
    with pytest.raises(LimitReached) as raised:
        reserve(limits, **fields)
    return raised.value


def left(of: Bucket, clock: Clock) -> int:
    """How many units could be taken now: found out by taking them, which is then undone."""
    kept = RateBucket.objects.filter(pk=key(of)).values().first() or {"used": 0, "at_ms": 0}
    now = int(clock.now.timestamp() * 1000)
    passed = max(0, now - kept["at_ms"])
    used = max(0, kept["used"] - passed * of.amount)
    return of.amount - -(-used // of.milliseconds)


def key(of: Bucket) -> str:
    return RateBucket.key_for(of.scope, of.measure, of.seconds)


def empty(of: Bucket) -> Reservation:
    """Take all that is in a full bucket of tokens at once."""
    return reserve([of], tokens=of.amount)


# As many as it holds -----------------------------------------------------------------------------


def test_a_bucket_is_full_before_its_first_use() -> None:
    for _ in range(3):
        reserve([bucket(3)])

    refused([bucket(3)])


def test_tokens_are_taken_by_the_attempts_size(clock: Clock) -> None:
    of = bucket(1_000, tokens=True)

    reserve([of], tokens=400)

    assert left(of, clock) == 600
    reserve([of], tokens=600)
    refused([of], tokens=1)


def test_a_repeat_of_a_call_is_another_request() -> None:
    reserve([bucket(1)])

    refused([bucket(1)], calls=0)


@pytest.mark.parametrize(
    "other",
    [
        bucket(1, "feature:mail"),
        bucket(1, "user:7"),
        bucket(1, SITE),
        bucket(1, tokens=True),
        bucket(1, seconds=30),
        bucket(1, "feature:Chat"),
    ],
)
def test_a_bucket_is_its_scopes_measures_and_spans_own(other: Bucket) -> None:
    reserve([bucket(1)])

    reserve([other], tokens=1)


def test_two_limits_of_the_same_scope_are_no_concern_of_each_other() -> None:
    """A budget of money and a bucket bear the same name, and are two things."""
    reserve([limit(100), bucket(2)], 60)

    assert isinstance(refused([limit(100), bucket(2)], nanousd=60), BudgetExceeded)
    reserve([limit(100), bucket(2)], 40)


# All or nothing ----------------------------------------------------------------------------------

EVERYTHING: list[Limit | Bucket] = [
    limit(100),
    limit(5, "user:7", calls=True),
    bucket(5),
    bucket(5, SITE),
    bucket(100, tokens=True),
    bucket(100, "user:7", tokens=True),
]


@pytest.mark.parametrize("full", EVERYTHING)
def test_where_one_has_no_room_nothing_is_taken(full: Limit | Bucket) -> None:
    windows = [of for of in EVERYTHING if isinstance(of, Limit)]
    reserve(windows, 0, calls=0)  # so that the balances are there
    reserve([full], 100 if full.measure is Measure.NANOUSD else 0, calls=5, tokens=100)
    for _ in range(4):
        if full.measure is Measure.REQUESTS:
            reserve([full], 0)
    before = [spent_held_calls(of) for of in windows]
    journaled = CallLog.objects.count()

    error = refused(EVERYTHING, nanousd=1, tokens=1)

    assert (error.scope, error.measure) == (full.scope, full.measure)
    assert [spent_held_calls(of) for of in windows] == before
    assert CallLog.objects.count() == journaled
    others = [key(of) for of in EVERYTHING if isinstance(of, Bucket) and of is not full]
    assert not RateBucket.objects.filter(pk__in=others, used__gt=0).exists()


def test_what_is_admitted_takes_from_all(clock: Clock) -> None:
    reservation = reserve(EVERYTHING, 60, tokens=30)

    assert spent_held_calls(limit(100)) == (0, 60, 1)
    buckets = [of for of in EVERYTHING if isinstance(of, Bucket)]
    assert [left(of, clock) for of in buckets] == [4, 4, 70, 70]
    assert reservation.buckets == tuple(buckets)


def test_the_order_in_which_buckets_are_given_changes_nothing(clock: Clock) -> None:
    buckets: list[Limit | Bucket] = [bucket(5), bucket(5, SITE), bucket(5, "user:7")]
    reserve(buckets)

    reserve(buckets[::-1])

    assert [left(of, clock) for of in buckets if isinstance(of, Bucket)] == [3, 3, 3]


# Refilling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "seconds", "milliseconds"),
    [
        (1, 60, 60_000),
        (60, 60, 1_000),
        (7, 60, 8_572),  # and not 8 571: a seventh of a minute is no whole number
        (60_000, 60, 1),
        (50_000, 60, 2),
        (100_000, 60, 1),
        (1, 86_400, 86_400_000),
        (3, 1, 334),
    ],
)
def test_one_unit_is_back_after_its_part_of_the_span(
    clock: Clock, amount: int, seconds: int, milliseconds: int
) -> None:
    of = bucket(amount, tokens=True, seconds=seconds)
    empty(of)

    early = clock.now + (milliseconds - 1) * MS
    assert isinstance(refused([of], tokens=1, at=early), RateLimited)
    reserve([of], tokens=1, at=early + MS)


def test_nothing_is_lost_between_many_small_takes() -> None:
    """Seven a minute, asked every millisecond: the remainders are kept."""
    of = bucket(7, tokens=True)
    empty(of)
    admitted = []
    for milliseconds in range(8_500, 60_001, 250):
        try:
            reserve([of], tokens=1, at=NOON + milliseconds * MS)
        except RateLimited:
            continue
        admitted.append(milliseconds)

    assert len(admitted) == 7


def test_a_bucket_never_holds_more_than_its_amount(clock: Clock) -> None:
    of = bucket(3)
    reserve([of])
    clock.pass_by(timedelta(days=1))

    for _ in range(3):
        reserve([of], at=clock.now)
    refused([of], at=clock.now)


def test_a_clock_that_goes_back_refills_nothing(clock: Clock) -> None:
    of = bucket(60)
    for _ in range(60):
        reserve([of], at=NOON)

    refused([of], at=NOON - MINUTE)
    refused([of], at=NOON + 999 * MS)
    reserve([of], at=NOON + 1_000 * MS)


def test_an_attempt_from_before_does_not_turn_the_clock_back() -> None:
    """Else the time between would refill it twice."""
    of = bucket(2, seconds=2)
    reserve([of], at=NOON)
    reserve([of], at=NOON - MINUTE)

    refused([of], at=NOON)
    refused([of], at=NOON + 999 * MS)
    reserve([of], at=NOON + 1_000 * MS)


@pytest.mark.parametrize("microseconds", [0, 999])
def test_time_counts_in_whole_milliseconds(microseconds: int) -> None:
    of = bucket(60)
    at = NOON + timedelta(microseconds=microseconds)
    for _ in range(60):
        reserve([of], at=at)

    refused([of], at=NOON + 999 * MS)
    reserve([of], at=NOON + 1_000 * MS)


# Refused, and for how long -----------------------------------------------------------------------


def test_a_refusal_has_the_numbers_of_its_bucket() -> None:
    of = bucket(1_000, tokens=True)
    reserve([of], tokens=900)

    error = refused([of], tokens=200)

    assert type(error) is RateLimited
    assert (error.scope, error.period, error.measure) == ("feature:chat", "minute", "tokens")
    assert (error.limit, error.spent, error.held, error.requested) == (1_000, 900, 0, 200)
    assert error.exhausted


@pytest.mark.parametrize(
    ("amount", "used", "wanted", "delay", "retry_after"),
    [
        (60, 60, 1, 1.0, 1),
        (60, 60, 60, 60.0, 60),
        (60, 30, 31, 1.0, 1),
        (7, 7, 1, 8.572, 9),
        (60_000, 60_000, 1, 0.001, 1),
        (1, 1, 1, 60.0, 60),
    ],
)
def test_a_refusal_says_to_the_millisecond_when_it_will_fit(
    amount: int, used: int, wanted: int, delay: float, retry_after: int
) -> None:
    of = bucket(amount, tokens=True)
    reserve([of], tokens=used)

    error = refused([of], tokens=wanted)

    assert error.refusal.delay == delay
    assert error.retry_after == retry_after
    fits = timedelta(seconds=delay)
    assert error.resets_at == NOON + fits
    refused([of], tokens=wanted, at=NOON + fits - MS)
    reserve([of], tokens=wanted, at=NOON + fits)


def test_a_call_larger_than_the_bucket_never_fits() -> None:
    error = refused([bucket(100, tokens=True)], tokens=101)

    assert type(error) is RateLimited
    assert error.refusal.delay is None
    assert error.retry_after == 60


@pytest.mark.parametrize("tokens", [False, True])
def test_a_bucket_of_nothing_lets_nothing_through(tokens: bool) -> None:
    of = bucket(0, tokens=tokens)

    assert refused([of], tokens=1).refusal.delay is None
    refused([of], tokens=1, at=NOON + timedelta(days=365))


def test_of_several_the_one_that_lasts_longest_is_named() -> None:
    slow, fast = bucket(1, "user:7"), bucket(60)
    for _ in range(60):
        reserve([fast])
    reserve([slow])

    for limits in ([slow, fast], [fast, slow]):
        assert refused([*limits]).scope == "user:7"


def test_money_that_is_spent_lasts_longer_than_a_minute() -> None:
    reserve([bucket(1)], 0)
    settle(reserve([limit(100)], 100), settled(100))

    assert isinstance(refused([limit(100), bucket(1)]), BudgetExceeded)


# What is changed between calls -------------------------------------------------------------------


def test_a_larger_amount_is_in_force_at_once() -> None:
    for _ in range(2):
        reserve([bucket(2)])

    reserve([bucket(3)])
    refused([bucket(3)])


def test_a_smaller_amount_is_in_force_at_once() -> None:
    for _ in range(2):
        reserve([bucket(4)])

    refused([bucket(2)])


def test_what_was_taken_before_drains_at_the_new_rate() -> None:
    for _ in range(4):
        reserve([bucket(4)])

    # Three of four have to go, at two a minute, until one more fits in two.
    assert refused([bucket(2)]).refusal.delay == 90.0
    reserve([bucket(2)], at=NOON + 90 * timedelta(seconds=1))


# What comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "expected"), [(0, 100), (30, 70), (100, 0), (None, 0), (130, -30)]
)
def test_tokens_that_were_not_used_come_back(clock: Clock, used: int | None, expected: int) -> None:
    """What was used beyond the bound is missing, too."""
    of = bucket(100, tokens=True)
    reservation = empty(of)

    settle(reservation, settled(5, tokens=used))

    assert left(of, clock) == expected


def test_a_request_that_was_sent_stays_taken() -> None:
    of = bucket(1)
    settle(reserve([of]), settled(5, tokens=0))

    refused([of])


def test_what_never_left_takes_neither_request_nor_tokens(clock: Clock) -> None:
    requests, tokens = bucket(1), bucket(100, tokens=True)
    reservation = reserve([requests, tokens], tokens=100)

    ledgers.current().release(reservation, RELEASED)

    assert (left(requests, clock), left(tokens, clock)) == (1, 100)


def test_what_comes_back_does_not_make_a_bucket_fuller_than_full(clock: Clock) -> None:
    of = bucket(100, tokens=True)
    reservation = empty(of)
    clock.pass_by(MINUTE)

    settle(reservation, settled(5, tokens=0))

    assert left(of, clock) == 100


@pytest.mark.parametrize("first", [settled(5, tokens=40), estimated(5, tokens=40), RELEASED])
def test_what_comes_back_comes_back_once(clock: Clock, first: Any) -> None:
    of = bucket(100, tokens=True)
    reservation = reserve([of], tokens=50)
    settle(reservation, first)
    before = left(of, clock)

    settle(reservation, first)
    settle(reservation, settled(4, tokens=0))

    assert left(of, clock) == before


def test_what_the_tick_books_keeps_its_tokens(clock: Clock) -> None:
    """Nobody knows what it used, and the bucket has refilled long ago."""
    of = bucket(100, tokens=True)
    empty(of)
    clock.pass_by(timedelta(hours=1))

    ledgers.current().settle_overdue()

    assert left(of, clock) == 100


def test_a_bucket_whose_row_is_gone_is_settled_all_the_same(clock: Clock) -> None:
    of = bucket(100, tokens=True)
    reservation = empty(of)
    RateBucket.objects.all().delete()

    settle(reservation, settled(5, tokens=30))

    assert row(reservation).status == "settled"
    assert left(of, clock) == 100


# What the answer says ----------------------------------------------------------------------------


def level(remaining: int, *, tokens: bool = True, ago: int = 0) -> Level:
    measure = Measure.TOKENS if tokens else Measure.REQUESTS
    return Level(measure=measure, remaining=remaining, milliseconds_ago=ago)


def test_an_organisation_that_has_less_left_tightens_the_sites_bucket(clock: Clock) -> None:
    """Somebody else uses the same key."""
    of = bucket(100, SITE, tokens=True)

    settle(reserve([of], tokens=10), settled(5, tokens=10, levels=(level(20),)))

    assert left(of, clock) == 20


def test_an_organisation_that_has_more_left_loosens_nothing(clock: Clock) -> None:
    """It does not know of the calls that are on their way."""
    of = bucket(100, SITE, tokens=True)
    reserve([of], tokens=50)

    settle(reserve([of], tokens=10), settled(5, tokens=10, levels=(level(95),)))

    assert left(of, clock) == 40


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(bucket(100, tokens=True), id="a-features"),
        pytest.param(bucket(100, "user:7", tokens=True), id="a-users"),
        pytest.param(bucket(100, SITE), id="another-measure"),
    ],
)
def test_what_is_left_of_the_organisations_tokens_says_nothing_of(
    clock: Clock, other: Bucket
) -> None:
    reservation = reserve([other], tokens=1)

    settle(reservation, settled(5, tokens=1, levels=(level(20),)))

    assert left(other, clock) == 99


def test_a_level_of_some_time_ago_has_refilled_since(clock: Clock) -> None:
    of = bucket(60, SITE, tokens=True)

    settle(reserve([of], tokens=1), settled(5, tokens=1, levels=(level(20, ago=5_000),)))

    assert left(of, clock) == 25


def test_each_level_is_for_its_own_measure(clock: Clock) -> None:
    tokens, requests = bucket(100, SITE, tokens=True), bucket(100, SITE)
    reservation = reserve([tokens, requests], tokens=1)

    settle(reservation, settled(5, levels=(level(20), level(7, tokens=False))))

    assert (left(tokens, clock), left(requests, clock)) == (20, 7)


def test_an_amount_beyond_all_measure_does_not_keep_a_call_from_being_booked() -> None:
    of = bucket(2**62, SITE, tokens=True)
    reservation = reserve([of], tokens=1)

    settle(reservation, settled(5, levels=(level(0),)))

    assert row(reservation).status == "settled"


# Shadow mode -------------------------------------------------------------------------------------


def test_shadow_mode_refuses_nothing_and_says_what_it_would_have() -> None:
    watched = [bucket(1, enforce=False), bucket(10, SITE, tokens=True, seconds=10, enforce=False)]
    reserve([*watched], tokens=10)

    reservation = reserve([*watched], tokens=10, decision="rung 80 % at 85 %")

    assert row(reservation).decision == (
        "rung 80 % at 85 %; would refuse: feature:chat minute, * 10 seconds"
    )


def test_shadow_mode_builds_up_no_debt(clock: Clock) -> None:
    watched = bucket(1, enforce=False)
    for _ in range(50):
        reserve([watched])

    clock.pass_by(MINUTE)

    assert row(reserve([watched], at=clock.now)).decision == ""


def test_a_call_that_never_fits_only_empties_a_watched_bucket(clock: Clock) -> None:
    watched = bucket(100, tokens=True, enforce=False)
    reserve([watched], tokens=1_000)

    assert left(watched, clock) == 0


def test_shadow_mode_of_one_bucket_is_not_that_of_another() -> None:
    reserve([bucket(1)])

    error = refused([bucket(0, SITE, enforce=False), bucket(1)])

    assert error.scope == "feature:chat"


def test_a_watched_bucket_that_is_enforced_later_knows_what_was_taken() -> None:
    reserve([bucket(1, enforce=False)])

    refused([bucket(1)])


# Any sequence ------------------------------------------------------------------------------------

UNITS = st.integers(1, 12)
BUCKETS = st.builds(
    bucket, st.integers(1, 20), tokens=st.just(True), seconds=st.sampled_from([1, 7, 60])
)


def admitted(of: Bucket, units: int, milliseconds: int) -> bool:
    try:
        reserve([of], 0, tokens=units, at=NOON + milliseconds * MS)
    except RateLimited:
        return False
    return True


@settings(max_examples=deep(200, else_=25))
@given(BUCKETS, st.lists(st.tuples(UNITS, st.integers(0, 20_000)), max_size=15))
def test_any_sequence_is_admitted_as_by_a_bucket_of_exact_fractions(
    of: Bucket, steps: list[tuple[int, int]]
) -> None:
    RateBucket.objects.all().delete()
    used, now = Fraction(0), 0
    for units, later in steps:
        now += later
        used = max(Fraction(0), used - Fraction(later * of.amount, of.milliseconds))
        fits = used + units <= of.amount
        used += units if fits else 0

        assert admitted(of, units, now) is fits


@settings(max_examples=deep(200, else_=25))
@given(BUCKETS, st.lists(st.tuples(UNITS, st.integers(0, 90_000)), max_size=15))
def test_no_span_admits_more_than_a_full_bucket_and_its_refill(
    of: Bucket, attempts: list[tuple[int, int]]
) -> None:
    """By whatever clocks: one that is behind the latest counts as that."""
    RateBucket.objects.all().delete()
    taken: list[tuple[int, int]] = []
    for units, at in attempts:
        if admitted(of, units, at):
            taken.append((max([at, *(earlier for earlier, _ in taken)]), units))

    for first, (since, _) in enumerate(taken):
        total = 0
        for at, units in taken[first:]:
            total += units
            assert total * of.milliseconds <= of.amount * (of.milliseconds + at - since)


# Rows that count no more -------------------------------------------------------------------------


def test_a_bucket_that_nobody_used_for_days_is_dropped(clock: Clock) -> None:
    reserve([bucket(1), bucket(1, SITE)], at=NOON)
    reserve([bucket(2, "user:7")], at=NOON + timedelta(days=1))
    clock.pass_by(timedelta(days=2) + MS)

    ledgers.current().tidy()

    assert [of.pk for of in RateBucket.objects.all()] == [key(bucket(1, "user:7"))]


def test_a_bucket_of_a_day_that_is_still_refilling_is_kept(clock: Clock) -> None:
    of = bucket(1, seconds=86_400)
    reserve([of], at=NOON)
    clock.pass_by(timedelta(days=1) - MS)

    ledgers.current().tidy()

    refused([of], at=clock.now)


# What it takes -----------------------------------------------------------------------------------


def statements(work: Any) -> int:
    """How many statements it takes, without those that only begin and end a transaction."""
    with CaptureQueriesContext(connection) as captured:
        work()
    return sum("SAVEPOINT" not in query["sql"] for query in captured)


# PostgreSQL is told how long to wait, and marks the sums in the statement that changes the row;
# MariaDB cannot return what it updated.
RESERVE = {"sqlite": 2, "postgresql": 3, "mysql": 3}[connection.vendor]
SETTLE = 3


def test_where_there_is_no_bucket_none_is_asked() -> None:
    reserve([limit(100), limit(100, SITE)])
    reservation = reserve([limit(100), limit(100, SITE)])

    assert statements(lambda: reserve([limit(100), limit(100, SITE)])) == RESERVE
    assert statements(lambda: settle(reservation, settled(5, tokens=7))) == SETTLE


def test_all_buckets_are_locked_at_once_and_each_is_written() -> None:
    several: list[Limit | Bucket] = [limit(100), bucket(9), bucket(9, SITE), bucket(9, "user:7")]
    reserve(several)
    locks = 2 if connection.vendor == "sqlite" else 1

    assert statements(lambda: reserve(several)) == RESERVE + locks + 3


def test_a_request_that_stays_taken_is_not_asked_for_again() -> None:
    reserve([limit(100), bucket(9)])
    reservation = reserve([limit(100), bucket(9)])

    assert statements(lambda: settle(reservation, settled(5, tokens=7))) == SETTLE
