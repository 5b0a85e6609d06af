"""Two workers at once, in every order: the first stops at each of its points while the other
does its work, and then goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ai_budget.testing import freeze
from ai_budget.values import Amounts, BalanceKey, Balances, Bucket, Charge, Measure, Reservation
from tests.contention import points, work
from tests.contention.books import assert_books_agree, journal
from tests.contention.calls import Wish, reserve
from tests.contention.conftest import Store
from tests.contention.mixes import simple_limits
from tests.contention.processes import Workers
from tests.depth import deep
from tests.ledger.given import NOON, RELEASED, estimated, settled

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

SINCE = NOON.date().replace(day=1)
HELD, COST = 10, 6
MEANWHILE = 0.05
"""Seconds that the second gets before the first goes on: it may be waiting for the first."""

Verb = tuple[Callable[..., object], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Round:
    """A feature of its own, whose day holds so much, and what was reserved of it before."""

    wish: Wish
    taken: Reservation | None

    @property
    def keys(self) -> list[BalanceKey]:
        return sorted(self.wish.keys)

    @property
    def reserve(self) -> Verb:
        return (work.try_to_reserve, (self.wish,))

    @property
    def settle(self) -> Verb:
        return (work.settle, (self.taken, settled(COST)))

    @property
    def release(self) -> Verb:
        return (work.settle, (self.taken, RELEASED))

    @property
    def tick(self) -> Verb:
        return (work.tick, (NOON,))

    @property
    def rebuild(self) -> Verb:
        return (work.rebuild, (SINCE,))

    @property
    def compare(self) -> Verb:
        return (work.differences, (SINCE,))

    @property
    def look(self) -> Verb:
        return (work.balances, (self.keys,))

    @property
    def spent(self) -> int:
        return self._of_journal().spent_nanousd

    @property
    def held(self) -> int:
        return self._of_journal().held_nanousd

    def _of_journal(self) -> Balances:
        day = next(key for key in self.keys if key.scope == self.scope)
        return journal().get(day, Balances())

    @property
    def scope(self) -> str:
        return f"feature:{self.wish.charge.feature}"


def round_of(number: int, *, room: int, taken: bool) -> Round:
    charge = Charge(feature=f"round-{number}")
    wish = Wish(
        charge=charge,
        category="",
        limits=simple_limits(charge, NOON, feature=room),
        amounts=Amounts(nanousd=HELD),
        at=NOON,
    )
    return Round(wish=wish, taken=reserve(wish) if taken else None)


def both(workers: Workers, point: int, first: Verb, second: Verb) -> tuple[str, list[bool]]:
    """Do the second while the first stands at a point; return it, and who was not refused."""
    one, other = workers.some(0), workers.some(1)
    stopped = one.one(work.stop_at, point, first[0], *first[1])
    other.begin(second[0], [second[1]])
    code = stopped.code
    if code is None:
        other.wait(MEANWHILE)
        code = one.one(points.go_on, stopped.child)
    result = other.results()[0]
    return stopped.point, [code == 0, result is not False]


def rounds(
    workers: Workers,
    verbs: Callable[[Round], tuple[Verb, Verb]],
    before: Callable[[], None] = lambda: None,
    *,
    room: int = 100,
    taken: bool = True,
    every: int = 4,
) -> Iterator[tuple[str, Round, list[bool]]]:
    """Play it at every point of the first; nothing may be wrong when both are done.

    Only the deep suite stops at all of them, the everyday one at each ``every``-th.
    """
    workers.at = NOON
    with freeze(NOON):
        for number in range(0, 400, deep(1, else_=every)):
            round_ = round_of(number, room=room, taken=taken)
            before()
            point, admitted = both(workers, number, *verbs(round_))
            yield point, round_, admitted
            assert_books_agree(round_.wish.limits)
            if not point:
                return
    raise AssertionError("there is no end to it")


def test_two_do_not_both_take_the_last(store: Store, workers: Workers) -> None:
    for point, round_, admitted in rounds(
        workers, lambda it: (it.reserve, it.reserve), room=HELD, taken=False
    ):
        assert sorted(admitted) == [False, True], point
        assert round_.held == HELD


def test_what_is_settled_twice_is_booked_once(store: Store, workers: Workers) -> None:
    for point, round_, _ in rounds(workers, lambda it: (it.settle, it.settle)):
        assert (round_.spent, round_.held) == (COST, 0), point


@pytest.mark.parametrize("first", ["settle", "tick"])
def test_a_worker_and_the_tick_book_the_truth(store: Store, workers: Workers, first: str) -> None:
    def verbs(it: Round) -> tuple[Verb, Verb]:
        return (it.settle, it.tick) if first == "settle" else (it.tick, it.settle)

    for point, round_, _ in rounds(workers, verbs, every=15 if first == "tick" else 4):
        assert (round_.spent, round_.held) == (COST, 0), point


def test_a_release_and_the_tick_give_everything_back(store: Store, workers: Workers) -> None:
    for point, round_, _ in rounds(workers, lambda it: (it.release, it.tick)):
        assert (round_.spent, round_.held) == (0, 0), point


@pytest.mark.parametrize(
    ("mending", "verb"), [("rebuild", "reserve"), ("rebuild", "settle"), ("compare", "release")]
)
def test_what_happens_while_balances_are_looked_over_is_not_lost(
    store: Store, workers: Workers, mending: str, verb: str
) -> None:
    """By the one who looks them over stopping, and by the one who calls."""
    for verbs in (
        lambda it: (getattr(it, mending), getattr(it, verb)),
        lambda it: (getattr(it, verb), getattr(it, mending)),
    ):
        for point, _, admitted in rounds(workers, verbs, every=12):
            assert all(admitted), point


# Balances that are missing -----------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["reserve", "settle", "tick"])
def test_what_happens_while_balances_are_filled_is_not_lost(
    redis_store: Store, workers: Workers, verb: str
) -> None:
    for point, _, admitted in rounds(
        workers, lambda it: (it.look, getattr(it, verb)), redis_store.flush
    ):
        assert all(admitted), point


@pytest.mark.parametrize("verb", ["reserve", "settle", "tick"])
def test_balances_that_are_filled_in_the_middle_of_a_call_are_right(
    redis_store: Store, workers: Workers, verb: str
) -> None:
    """Redis forgets, and another call has it filled anew, at every point of the first."""
    lost = (work.lose_everything_and_look, (redis_store.redis_url,))
    for point, _, admitted in rounds(
        workers,
        lambda it: (getattr(it, verb), (lost[0], (*lost[1], it.keys))),
        every=15 if verb == "tick" else 4,
    ):
        assert all(admitted), point


def test_two_do_not_both_take_the_last_of_what_was_lost(
    redis_store: Store, workers: Workers
) -> None:
    """Redis forgets, and another takes the last, at every point of the first."""
    for point, round_, admitted in rounds(
        workers,
        lambda it: (
            it.reserve,
            (work.lose_everything_and_reserve, (redis_store.redis_url, it.wish)),
        ),
        room=HELD,
        taken=False,
    ):
        assert sum(admitted) <= 1, point
        assert round_.held == HELD * sum(admitted), point


def test_calls_on_their_way_do_not_all_take_the_last_of_what_was_lost(
    redis_store: Store, workers: Workers
) -> None:
    """Eight have written to the journal what fits one when it is added up."""
    workers.at = NOON
    for number in range(0, 400, deep(1, else_=4)):
        with freeze(NOON):
            round_ = round_of(number, room=HELD, taken=False)
        share = (number, *round_.reserve[:1], *round_.reserve[1])
        stopped = workers.do(work.stop_before_redis, [share] * Workers.COUNT)
        redis_store.flush()
        with freeze(NOON):
            work.balances(round_.keys)

        waiting = [(which, it.child) for which, it in enumerate(stopped) if it.code is None]
        codes = [it.code for it in stopped if it.code is not None]
        for which, child in waiting:
            codes.append(workers.some(which).one(points.go_on, child))

        with freeze(NOON):
            assert codes.count(0) <= 1, number
            assert round_.held == HELD * codes.count(0)
            assert_books_agree(round_.wish.limits)
        if not waiting:
            return
    raise AssertionError("there is no end to it")


@pytest.mark.parametrize("first", ["fill", "correct"])
def test_a_correction_while_balances_are_filled_is_not_lost(
    redis_store: Store, workers: Workers, first: str
) -> None:
    """The tick took the worker for dead; it settles as Redis has forgotten everything."""

    def verbs(it: Round) -> tuple[Verb, Verb]:
        assert it.taken is not None
        work.settle(it.taken, estimated(HELD))
        lost: Verb = (work.lose_everything_and_look, (redis_store.redis_url, it.keys))
        return (lost, it.settle) if first == "fill" else (it.settle, lost)

    for point, round_, _ in rounds(workers, verbs):
        assert round_.spent == COST, point


def test_corrections_at_the_same_moment_are_made_once(store: Store, workers: Workers) -> None:
    def verbs(it: Round) -> tuple[Verb, Verb]:
        assert it.taken is not None
        work.settle(it.taken, estimated(HELD))
        return it.settle, it.settle

    for point, round_, _ in rounds(workers, verbs):
        assert round_.spent == COST, point


# Buckets -----------------------------------------------------------------------------------------


def test_two_do_not_both_take_the_last_request_of_a_minute(store: Store, workers: Workers) -> None:
    for point, _, admitted in rounds(workers, with_one_request, room=100, taken=False):
        assert sorted(admitted) == [False, True], point


def test_a_window_that_is_evicted_lets_nobody_past_a_bucket(
    redis_store: Store, workers: Workers
) -> None:
    """The bucket is still there; only the balances beside it are filled anew."""

    def verbs(it: Round) -> tuple[Verb, Verb]:
        first, (_, (wish,)) = with_one_request(it)
        return first, (work.lose_windows_and_reserve, (redis_store.redis_url, wish))

    for point, _, admitted in rounds(workers, verbs, room=100, taken=False):
        assert sum(admitted) <= 1, point


def with_one_request(it: Round) -> tuple[Verb, Verb]:
    """Both want the one request that there is in a minute."""
    bucket = Bucket(scope=it.scope, measure=Measure.REQUESTS, amount=1)
    wish = replace(it.wish, limits=(*it.wish.limits, bucket))
    return (work.try_to_reserve, (wish,)), (work.try_to_reserve, (wish,))
