"""Parts of a reservation on Redis: whatever is lost between the journal and the balances.

What every ledger does with parts is tested for it, too, in ``test_parts``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection
from django.test import override_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import journal as journals
from ai_budget.ledger import redis as redis_ledger
from ai_budget.ledger.redis import UNCHECKED, RedisLedger
from ai_budget.ledger.redis_hashes import Hash
from ai_budget.ledger.redis_wire import Step
from ai_budget.models import CallLog, SpendWindow
from ai_budget.testing import freeze
from ai_budget.values import Balances, Kind, Part, Reservation, Status
from tests.contention.redis_server import BINARY, RedisServer
from tests.depth import deep
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    CHAT,
    NOON,
    RELEASED,
    attempt,
    limit,
    limits_of,
    reserve,
    row,
    settled,
)

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(BINARY is None, reason="there is no redis-server to start"),
]

LIMITS = limits_of(CHAT)
HELD = 10
DEADLINE = timedelta(minutes=10)
DAY, MONTH = NOON.date(), NOON.date().replace(day=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    one.start()
    yield one
    one.stop()


@pytest.fixture
def ledger(
    server: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RedisLedger]:
    server.make_ready()
    monkeypatch.setattr(redis_ledger, "FLIGHT_SECONDS", 0.0)
    with using(server):
        yield the_ledger()


def using(server: RedisServer, **ai_budget: Any) -> override_settings:
    name = "ai_budget.ledger.redis.RedisLedger"
    return override_settings(
        AI_BUDGET={"LEDGER": name, "LEDGER_REDIS_URL": server.url, **ai_budget}
    )


def the_ledger() -> RedisLedger:
    found = ledgers.current()
    assert isinstance(found, RedisLedger)
    return found


def of_many(items: int = 5, **fields: Any) -> Reservation:
    return reserve(LIMITS, HELD * items, calls=items, kind=Kind.BATCH, **fields)


def part(cost: int | None = 4) -> Part:
    """One item that is over, at some cost of ten; None was released."""
    return Part(
        attempt=attempt(kind=Kind.BATCH),
        held_nanousd=HELD,
        settlement=RELEASED if cost is None else settled(cost),
    )


def book(reservation: Reservation, *costs: int | None) -> int:
    parts = [part(cost) for cost in costs or (4,)]
    return len(ledgers.current().settle_parts(reservation.id, lambda row: parts))


def kept() -> tuple[int, int, int]:
    """Spent, held and calls, in Redis."""
    (found,) = {ledgers.current().balances([of.key]).get(of.key, Balances()) for of in LIMITS}
    return found.spent_nanousd, found.held_nanousd, found.calls


def entry(reservation: Reservation) -> Any:
    key = f"{the_ledger().prefix}:day:{DAY}"
    return the_ledger().client.hget(key, f"#{reservation.id}")


def mark() -> Callable[[], bool]:
    """Put something into the balances of the day; return whether they were not filled anew."""
    key = f"{the_ledger().prefix}:day:{DAY}"
    the_ledger().client.hset(key, "witness", "1")
    return lambda: bool(the_ledger().client.hexists(key, "witness"))


def killed_before_redis(reservation: Reservation, *costs: int | None) -> None:
    """Book a chunk by a worker that ends between the journal and Redis."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RedisLedger, "_book", lambda *args: 2)
        assert book(reservation, *costs)


def catch(patched: pytest.MonkeyPatch) -> list[tuple[Sequence[Hash], Step]]:
    """Keep what is to be booked in Redis, to be booked later."""
    caught: list[tuple[Sequence[Hash], Step]] = []

    def keep(self: RedisLedger, touched: Sequence[Hash], step: Step, *rest: Any) -> int:
        caught.append((touched, step))
        return len(touched)

    patched.setattr(RedisLedger, "_book", keep)
    return caught


# Once --------------------------------------------------------------------------------------------


def test_redis_is_told_a_chunk_and_not_filled_anew(ledger: RedisLedger) -> None:
    reservation = of_many()
    stayed = mark()

    book(reservation, 4, None)

    assert stayed()
    assert kept() == (4, 30, 4)


def test_a_chunk_that_is_said_twice_is_booked_once(ledger: RedisLedger) -> None:
    reservation = of_many()
    stayed = mark()
    real = ledger._run

    def twice(name: str, keys: Any, args: Any) -> Any:
        real(name, keys, args)
        return real(name, keys, args)

    ledger._run = twice  # type: ignore[method-assign]
    book(reservation, 4, None)
    assert kept() == (4, 30, 4)
    book(reservation, 4, 4, 4)
    assert kept() == (16, 0, 4)
    assert stayed()
    assert entry(reservation) is None


def test_amounts_are_exact_beyond_what_a_float_holds(ledger: RedisLedger) -> None:
    most = 2**60 + 7
    reservation = reserve(LIMITS, most, calls=2)
    parts = [Part(attempt=attempt(), held_nanousd=2**53 + 1, settlement=settled(2**53))]

    ledger.settle_parts(reservation.id, lambda row: parts)

    assert kept() == (2**53, most - 2**53 - 1, 2)


def test_a_chunk_that_overtakes_another_waits_for_it(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many()
    stayed = mark()
    with pytest.MonkeyPatch.context() as patched:
        caught = catch(patched)
        book(reservation, 4)
    monkeypatch.setattr(redis_ledger, "FLIGHT_SECONDS", 60.0)

    def sleep(seconds: float) -> None:
        (slow,) = caught
        ledger._book(*slow)

    monkeypatch.setattr(redis_ledger, "time", SimpleNamespace(sleep=sleep))
    book(reservation, 3)

    assert stayed()
    assert kept() == (7, 30, 5)


# Lost between journal and Redis ------------------------------------------------------------------


def test_until_a_lost_chunk_is_found_redis_holds_too_much_and_never_too_little(
    ledger: RedisLedger,
) -> None:
    reservation = of_many()

    killed_before_redis(reservation, 4, None)

    assert kept() == (0, 50, 5)


HEAL: dict[str, tuple[Callable[[RedisLedger, Reservation], Any], tuple[int, int, int]]] = {
    "next chunk": (lambda ledger, it: book(it, 3), (7, 20, 4)),
    "last chunk": (lambda ledger, it: book(it, 3, 3, 3), (13, 0, 4)),
    "release": (lambda ledger, it: ledger.release(it, RELEASED), (4, 0, 1)),
    "tidy": (lambda ledger, it: ledger.tidy(), (4, 30, 4)),
    "rebuild": (lambda ledger, it: ledger.rebuild(DAY), (4, 30, 4)),
    "compare": (lambda ledger, it: ledger.differences(DAY), (4, 30, 4)),
}


@pytest.mark.parametrize("heal", HEAL)
def test_a_chunk_that_redis_never_heard_of_is_found_by(ledger: RedisLedger, heal: str) -> None:
    do, sums = HEAL[heal]
    reservation = of_many()
    killed_before_redis(reservation, 4, None)

    do(ledger, reservation)

    assert kept() == sums
    assert ledger.differences(MONTH) == []


def test_a_lost_chunk_is_found_when_its_reservation_is_overdue(
    ledger: RedisLedger, clock: Clock
) -> None:
    reservation = of_many()
    killed_before_redis(reservation, 4, None)
    clock.pass_by(DEADLINE * 2)

    assert ledger.settle_overdue() == 1

    assert kept() == (34, 0, 4)
    assert ledger.differences(MONTH) == []


@pytest.mark.parametrize("last", [True, False])
def test_the_tick_finds_a_reservation_that_is_over_in_the_journal_alone(
    ledger: RedisLedger, last: bool
) -> None:
    """Its last chunk was lost; and, or not, the one before."""
    reservation = of_many()
    if last:
        book(reservation, 4)
    else:
        killed_before_redis(reservation, 4)
    killed_before_redis(reservation, 3, 3, 3, None)

    ledger.tidy()

    assert kept() == (13, 0, 4)
    assert entry(reservation) is None


def test_a_lost_chunk_makes_nothing_wrong_by_itself(ledger: RedisLedger) -> None:
    """A tick will heal it, so it is no difference, and nobody is told that balances are wrong."""
    reservation = of_many()
    killed_before_redis(reservation, 4)

    assert ledger.differences(DAY) == []


def test_what_is_wrong_besides_a_chunk_is_still_found(ledger: RedisLedger) -> None:
    reservation = of_many()
    book(reservation, 4)
    ledger.client.hincrby(f"{ledger.prefix}:day:{DAY}", "s feature:chat", 5)

    (difference,) = ledger.rebuild(DAY)

    assert difference.key == limit(None).key
    assert kept() == (4, 40, 5)


def test_a_chunk_is_booked_although_the_script_fails(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many()
    real = ledger._run

    def run(name: str, *args: Any) -> Any:
        if name == "settle":
            raise LedgerUnavailable("the connection broke")
        return real(name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_run", run)
        assert book(reservation, 4, None) == 2

    assert kept() == (4, 30, 4)
    book(reservation, 3)
    assert kept() == (7, 20, 4)


def test_chunks_are_booked_although_redis_is_away(ledger: RedisLedger, server: RedisServer) -> None:
    reservation = of_many()
    server.kill()
    assert book(reservation, 4) == 1
    server.start()

    assert kept() == (4, 40, 5)
    assert ledger.differences(MONTH) == []


def test_a_snapshot_of_before_a_chunk_does_not_count(
    ledger: RedisLedger, server: RedisServer
) -> None:
    reservation = of_many()
    server.save()
    book(reservation, 4)
    server.restart()

    book(reservation, 3)

    assert kept() == (7, 30, 5)


@pytest.mark.parametrize("costs", [(4,), (4, 4, 4, 4, 4)])
def test_a_row_that_is_gone_from_the_journal_leaves_nothing_in_redis(
    ledger: RedisLedger, costs: tuple[int, ...]
) -> None:
    reservation = of_many()
    killed_before_redis(reservation, *costs)
    CallLog.objects.filter(pk=reservation.id).delete()

    ledger.tidy()

    assert kept() == (4 * len(costs), 0, len(costs))


# On its way --------------------------------------------------------------------------------------


def arrives(
    ledger: RedisLedger, patched: pytest.MonkeyPatch, caught: Sequence[tuple[Sequence[Hash], Step]]
) -> None:
    """Let what is on its way arrive while somebody waits for it."""

    def sleep(seconds: float) -> None:
        for slow in caught:
            RedisLedger._book(ledger, *slow)

    patched.setattr(redis_ledger, "FLIGHT_SECONDS", 60.0)
    patched.setattr(redis_ledger, "time", SimpleNamespace(sleep=sleep))


@pytest.mark.parametrize("costs", [(4,), (4, 4, 4, 4, None)], ids=["a-part", "the-last"])
@pytest.mark.parametrize("look", ["tidy", "differences", "rebuild"])
def test_a_chunk_that_is_on_its_way_is_neither_wrong_nor_lost(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch, look: str, costs: tuple[int | None, ...]
) -> None:
    reservation = of_many()
    stayed = mark()
    with pytest.MonkeyPatch.context() as patched:
        caught = catch(patched)
        book(reservation, *costs)
    arrives(ledger, monkeypatch, caught)

    looks: dict[str, Callable[[], Any]] = {
        "tidy": ledger.tidy,
        "differences": lambda: ledger.differences(DAY),
        "rebuild": lambda: ledger.rebuild(DAY),
    }

    found = looks[look]()

    assert not found
    assert stayed()
    (slow,) = caught
    ledger._book(*slow)
    assert ledger.differences(MONTH) == []
    spent = sum(cost or 0 for cost in costs)
    assert kept() == (spent, HELD * (5 - len(costs)), 5 - costs.count(None))


def test_a_row_that_goes_on_changing_is_not_taken_for_lost(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the tick looks again, the chunk that was on its way is there, and others came."""
    reservation = of_many()
    stayed = mark()
    with pytest.MonkeyPatch.context() as patched:
        caught = catch(patched)
        book(reservation, 4)
    monkeypatch.setattr(redis_ledger, "FLIGHT_SECONDS", 60.0)
    waited = itertools.count()

    def sleep(seconds: float) -> None:
        if next(waited):
            return
        ledger._book(*caught[0])
        book(reservation, 3)
        killed_before_redis(reservation, 2)  # so that Redis lags behind once more

    monkeypatch.setattr(redis_ledger, "time", SimpleNamespace(sleep=sleep))
    ledger._close_left_behind(Hash(periods.Period.DAY, DAY))

    assert stayed()


# While balances are filled -----------------------------------------------------------------------


def while_filling(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]
) -> None:
    """Lose the balances; do something once the journal was read and they do not count yet."""
    ledger.client.flushall()
    real = RedisLedger._finish
    done: list[bool] = []

    def finish(self: RedisLedger, window: Hash, token: str) -> bool:
        if not done:
            done.append(True)
            do()
        return real(self, window, token)

    with monkeypatch.context() as patched:
        patched.setattr(RedisLedger, "_finish", finish)
        kept()
    assert done


def test_a_chunk_while_the_balances_are_filled_is_not_lost(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many()

    while_filling(ledger, monkeypatch, lambda: book(reservation, 4, None))

    assert kept() == (4, 30, 4)
    assert ledger.differences(MONTH) == []


@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "reversed"])
@pytest.mark.parametrize("end", ["chunk", "release", "last chunk"])
def test_chunks_and_the_end_while_the_balances_are_filled_count_in_any_order(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch, end: str, order: int
) -> None:
    reservation = of_many()

    def do() -> None:
        with pytest.MonkeyPatch.context() as patched:
            caught = catch(patched)
            book(reservation, 4, None)
            book(reservation, 3)
            if end == "chunk":
                book(reservation, 2)
            elif end == "last chunk":
                book(reservation, 2, 2)
            else:
                # As it stands then: the closing of what is left.
                ledger.release(journals.reservation_of(row(reservation)), RELEASED)
        for touched, step in caught[::order]:
            ledger._book(touched, step)
        stayed.append(mark())

    stayed: list[Callable[[], bool]] = []
    while_filling(ledger, monkeypatch, do)

    assert stayed[0]()
    expected = {"chunk": (9, 10, 4), "release": (7, 0, 2), "last chunk": (11, 0, 4)}
    assert kept() == expected[end]
    assert ledger.differences(MONTH) == []


def test_balances_that_lack_a_step_do_not_count_and_are_filled_once_more(
    ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk before it was journaled after the filling began, and never came."""
    reservation = of_many()

    def do() -> None:
        killed_before_redis(reservation, 4)
        book(reservation, 3)

    while_filling(ledger, monkeypatch, do)

    assert kept() == (7, 30, 5)
    assert ledger.differences(MONTH) == []


# After the deadline ------------------------------------------------------------------------------


def test_an_estimate_that_is_corrected_has_the_balances_filled_anew(
    ledger: RedisLedger, clock: Clock
) -> None:
    reservation = of_many()
    clock.pass_by(DEADLINE * 2)
    ledger.settle_overdue()
    stayed = mark()

    book(reservation, 4)

    assert not stayed()
    assert kept() == (44, 0, 5)


def test_whoever_dies_while_an_estimate_is_corrected_leaves_no_wrong_balances(
    ledger: RedisLedger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many()
    clock.pass_by(DEADLINE * 2)
    ledger.settle_overdue()
    monkeypatch.setattr(redis_ledger, "CLAIM_SECONDS", 0.05)

    class Killed(BaseException): ...

    def killed(self: RedisLedger) -> None:
        self._to_forget.clear()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RedisLedger, "_forget", killed)
        with pytest.raises(Killed):
            book(reservation, 4)

    assert kept() == (44, 0, 5)


def test_a_reservation_that_is_estimated_meanwhile_is_corrected(
    ledger: RedisLedger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick comes between the first look at the row and its lock."""
    reservation = of_many()
    clock.pass_by(DEADLINE * 2)
    real = journals.find
    asked: list[str] = []

    def find(*args: Any) -> CallLog | None:
        found = real(*args)
        if not asked:
            ledger.settle_overdue()
        asked.append(str(found and found.status))
        return found

    monkeypatch.setattr(journals, "find", find)

    assert book(reservation, 4, None) == 2
    assert asked == ["reserved", "estimated"]
    assert kept() == (34, 0, 4)


# Unchecked ---------------------------------------------------------------------------------------


def test_a_batch_that_was_let_through_is_counted_with_its_chunks(
    ledger: RedisLedger, server: RedisServer
) -> None:
    def away(*args: Any, **kwargs: Any) -> str:
        raise LedgerUnavailable("Redis does not answer")

    with using(server, ON_LEDGER_FAILURE="allow"):
        reserve(LIMITS, 1)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RedisLedger, "_take", away)
            reservation = of_many()
        assert UNCHECKED in row(reservation).decision
        assert kept() == (0, 1, 1)

        book(reservation, 4)

        assert kept() == (4, 41, 6)


# Any sequence ------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("book"), st.integers(0, 10)),
        st.tuples(st.just("book"), st.none()),
        st.tuples(st.just("lost"), st.integers(0, 10)),
        st.tuples(st.just("lost"), st.none()),
        st.tuples(st.just("late")),
        st.tuples(st.just("arrive")),
        st.tuples(st.just("lose")),
        st.tuples(st.just("overdue")),
        st.tuples(st.just("release")),
        st.tuples(st.just("tidy")),
        st.tuples(st.just("rebuild")),
    ),
    max_size=10,
)


class Run:
    """One reservation, and a Redis that misses some of what happens to it."""

    def __init__(self, ledger: RedisLedger) -> None:
        self.ledger, self.now = ledger, NOON
        self.reservation = of_many(6)
        self.flying: list[tuple[Sequence[Hash], Step]] = []

    def book(self, cost: int | None) -> None:
        if row(self.reservation).counted:
            book(self.reservation, cost)

    def lost(self, cost: int | None) -> None:
        if row(self.reservation).status == Status.RESERVED:
            killed_before_redis(self.reservation, cost)

    def late(self) -> None:
        if row(self.reservation).status == Status.RESERVED:
            with pytest.MonkeyPatch.context() as patched:
                flying = catch(patched)
                book(self.reservation, 5)
            self.flying += flying

    def arrive(self) -> None:
        while self.flying:
            self.ledger._book(*self.flying.pop())

    def lose(self) -> None:
        self.ledger.client.flushall()

    def overdue(self) -> None:
        self.now = NOON + DEADLINE * 2
        self.ledger.settle_overdue()

    def release(self) -> None:
        self.ledger.release(self.reservation, RELEASED)

    def tidy(self) -> None:
        self.ledger.tidy()

    def rebuild(self) -> None:
        assert self.ledger.rebuild(DAY) == []

    def ensure_never_under(self) -> None:
        summed = journals.balances_of(connection, [of.key for of in LIMITS])
        for key, it in summed.items():
            found = self.ledger.balances([key]).get(key, Balances())
            assert found.taken_nanousd >= it.taken_nanousd
            assert found.calls >= it.calls

    def ensure_exact(self) -> None:
        self.arrive()
        self.ledger.tidy()
        keys = [of.key for of in LIMITS]
        summed = journals.balances_of(connection, keys)
        found = self.ledger.balances(keys)
        assert {key: found.get(key, Balances()) for key in keys} == summed
        assert self.ledger.differences(DAY) == []


@settings(max_examples=deep(200, else_=10))
@given(STEPS)
def test_whatever_is_lost_redis_never_has_too_little_and_the_tick_makes_it_right(
    server: RedisServer, steps: list[tuple[Any, ...]]
) -> None:
    CallLog.objects.all().delete()
    SpendWindow.objects.all().delete()
    server.flush()
    with pytest.MonkeyPatch.context() as patched, using(server), freeze(NOON):
        patched.setattr(redis_ledger, "FLIGHT_SECONDS", 0.0)
        run = Run(the_ledger())
        with periods.override_clock(lambda: run.now):
            for step, *arguments in steps:
                getattr(run, step)(*arguments)
                run.ensure_never_under()
            run.ensure_exact()
