"""Eight processes want more than there is: exactly what fits is admitted, and nothing is wasted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget.ledger import base as ledgers
from ai_budget.testing import freeze
from ai_budget.values import Amounts, Bucket, Charge, Measure
from tests.contention import work
from tests.contention.books import assert_all_over, assert_books_agree, tick
from tests.contention.calls import (
    Outcome,
    Wish,
    assert_never_over,
    assert_refusals_were_needed,
    make_all,
    make_patiently,
    spent,
)
from tests.contention.conftest import Store
from tests.contention.mixes import month, random_wishes, simple_limits, tight_wish
from tests.contention.processes import Workers
from tests.depth import deep
from tests.ledger.given import NOON

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

THREADS = 3
CALLS = Workers.COUNT * THREADS
DRIFT_SECONDS = 0.1
"""How far the clocks of workers are apart, each carrying on a reading of the store's."""

REFUSED = {"", "BudgetExceeded", "QuotaExceeded", "RateLimited"}


def by_all(workers: Workers, wishes: list[Wish], at: datetime) -> list[Outcome]:
    """Deal the calls out to the processes, each with several threads."""
    workers.at = at
    shares = [(wishes[number :: Workers.COUNT], THREADS) for number in range(Workers.COUNT)]
    return [outcome for done in workers.do(make_all, shares) for outcome in done]


def test_a_limit_that_fits_exactly_k_calls_admits_exactly_k(store: Store, workers: Workers) -> None:
    """Whatever kind of limit is the tightest, among whatever others."""
    for seed in range(deep(8, else_=3)):
        fits = random.Random(seed).choice([0, 1, 2, CALLS // 2, CALLS - 1])
        wish = tight_wish(seed, fits, CALLS)

        outcomes = by_all(workers, [wish] * CALLS, wish.at)

        errors = Counter(outcome.error for outcome in outcomes)
        assert errors.pop("", 0) == fits, f"seed {seed}: {errors}"
        assert_never_over(outcomes)
        with freeze(wish.at):
            assert_books_agree()


def test_whatever_is_refused_would_not_have_fitted(store: Store, workers: Workers) -> None:
    """Callers of many kinds, and calls of many sizes, over limits that they share in part."""
    for seed in range(deep(4, else_=2)):
        at = month(seed)
        wishes = random_wishes(seed, CALLS, at=at, endings=False)
        with freeze(at):
            # A fill counts what the journal holds, admitted or not, and may refuse in vain.
            ledgers.current().balances({key for wish in wishes for key in wish.keys})

        outcomes = by_all(workers, wishes, at)

        assert {outcome.error for outcome in outcomes} <= REFUSED, f"seed {seed}"
        assert_never_over(outcomes)
        assert_refusals_were_needed(outcomes)
        with freeze(at):
            assert_books_agree()


def test_calls_that_end_in_every_way_are_never_over_and_leave_nothing(
    store: Store, workers: Workers
) -> None:
    for seed in range(deep(4, else_=2)):
        at = month(seed)
        wishes = random_wishes(seed, 2 * CALLS, at=at, endings=True)

        outcomes = by_all(workers, wishes, at)

        assert {outcome.error for outcome in outcomes} <= REFUSED, f"seed {seed}"
        assert_never_over(outcomes)
        tick(at)
        with freeze(at):
            assert_all_over()


@pytest.mark.parametrize("endings", [False, True], ids=["held", "ended"])
def test_any_mix_among_threads_is_never_over(store: Store, endings: bool) -> None:
    unused = map(month, itertools.count(200))

    @settings(max_examples=deep(200, else_=6))
    @given(st.integers(0, 1_000_000))
    def over(seed: int) -> None:
        at = next(unused)
        with freeze(at):
            wishes = random_wishes(seed, 12, at=at, endings=endings)
            ledgers.current().balances({key for wish in wishes for key in wish.keys})
            outcomes = make_all(wishes, threads=4)
        assert_never_over(outcomes)
        if not endings:
            assert_refusals_were_needed(outcomes)

    over()


# Used up -----------------------------------------------------------------------------------------

LIMIT = 100_000
SMALL = Amounts(nanousd=1_000)


def test_small_calls_that_wait_for_their_turn_use_a_limit_up(
    store: Store, workers: Workers
) -> None:
    """A call holds four times what it will cost; the last per cents are used all the same."""
    charge = Charge(feature="chat", user_id=7)
    wish = Wish(
        charge=charge,
        category="",
        limits=simple_limits(charge, NOON, site=LIMIT),
        amounts=SMALL,
        at=NOON,
        ending="settle",
        cost=250,
    )
    workers.at = NOON
    share = [wish] * (LIMIT // 250)

    outcomes = [
        outcome
        for done in workers.do(
            make_patiently, [(share, seed, 0.001) for seed in range(Workers.COUNT)]
        )
        for outcome in done
    ]

    assert_never_over(outcomes)
    assert 0.95 * LIMIT <= spent(outcomes) <= LIMIT
    with freeze(NOON):
        assert_all_over()


# Buckets -----------------------------------------------------------------------------------------


def test_a_bucket_lets_exactly_its_amount_pass_while_its_clock_stands(
    store: Store, workers: Workers
) -> None:
    bucket = Bucket(scope="view:search", measure=Measure.REQUESTS, amount=10)
    workers.at = NOON

    passed = workers.do(work.pass_times, [(4, bucket)] * Workers.COUNT)

    assert sum(passed) == 10


def test_a_bucket_lets_no_more_pass_than_it_holds_and_gets(store: Store, workers: Workers) -> None:
    """By the store's clock, which no worker's is far from."""
    bucket = Bucket(scope="view:search", measure=Measure.REQUESTS, amount=40, seconds=1)

    done = workers.do(work.pass_for, [(1.0, bucket)] * Workers.COUNT)

    passed = sum(passed for passed, _, _ in done)
    seconds = max(ended for _, _, ended in done) - min(began for _, began, _ in done)
    assert 40 < passed <= 40 + 40 * (seconds + DRIFT_SECONDS)
