"""One reservation for many items, which are over by and by: each is booked once, and truly."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import OperationalError, connection, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.exceptions import BudgetExceeded, CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.journal import journal
from ai_budget.models import Batch, BatchItem, CallLog, SpendWindow
from ai_budget.testing import freeze
from ai_budget.values import (
    BalanceKey,
    Balances,
    Charge,
    Kind,
    Part,
    Reservation,
    Settlement,
    Status,
    Usage,
)
from tests.contention.books import assert_books_agree
from tests.contention.redis_server import BINARY, RedisServer
from tests.depth import deep
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    MIDNIGHT,
    NOON,
    RELEASED,
    attempt,
    estimated,
    limits_of,
    reserve,
    row,
    settle,
    settled,
)
from tests.ledger.threads import together

pytestmark = pytest.mark.django_db

WHO = Charge(
    feature="chat",
    user_id=get_user_model()._meta.pk.to_python("7".zfill(32)),
    subject="acme",
    tags={"plan": "free"},
)
EVERYWHERE = limits_of(WHO, category="support")
HELD = 10
DEADLINE = timedelta(minutes=10)
LEDGERS = {
    "database": {"LEDGER": "ai_budget.ledger.database.DatabaseLedger"},
    "redis": {"LEDGER": "ai_budget.ledger.redis.RedisLedger"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("there is no redis-server to start")
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    one.start()
    yield one
    one.stop()


@pytest.fixture(params=LEDGERS)
def ledger(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Ledger]:
    chosen = dict(LEDGERS[request.param])
    if request.param == "redis":
        server = request.getfixturevalue("server")
        server.make_ready()
        chosen["LEDGER_REDIS_URL"] = server.url
    with override_settings(AI_BUDGET=chosen):
        yield ledgers.current()


def of_many(items: int = 5, **fields: Any) -> Reservation:
    """A reservation for some items of ten nano-dollars each."""
    return reserve(
        EVERYWHERE,
        HELD * items,
        calls=items,
        charge=WHO,
        category="support",
        kind=Kind.BATCH,
        **fields,
    )


def part(settlement: Settlement | None = None, *, held: int = HELD, **fields: Any) -> Part:
    """One item that is over; it cost four of the ten unless it says otherwise."""
    asked = attempt(WHO, category="support", kind=Kind.BATCH, **fields)
    return Part(attempt=asked, held_nanousd=held, settlement=settlement or settled(4))


def book(reservation: Reservation, *parts: Part) -> Sequence[Part]:
    return ledgers.current().settle_parts(reservation.id, lambda row: parts)


def never(row: CallLog) -> Sequence[Part]:
    pytest.fail("it was asked for parts")


def items_of(reservation: Reservation) -> list[CallLog]:
    """The rows of the items that are over, the oldest first."""
    return list(CallLog.objects.exclude(pk=reservation.id).order_by("pk"))


def everywhere() -> tuple[int, int, int]:
    """Spent, held and calls, the same in every balance, and what the journal adds up to."""
    assert_books_agree()
    found = ledgers.current().balances(of.key for of in EVERYWHERE)
    nothing = Balances()
    balances = {
        (it.spent_nanousd, it.held_nanousd, it.calls)
        for it in (found.get(of.key, nothing) for of in EVERYWHERE)
    }
    (sums,) = balances
    return sums


# Chunk by chunk ----------------------------------------------------------------------------------


def test_chunk_by_chunk_what_is_held_becomes_what_was_spent(ledger: Ledger) -> None:
    reservation = of_many(5)
    assert everywhere() == (0, 50, 5)

    book(reservation, part(), part(settled(10)))
    assert everywhere() == (14, 30, 5)
    book(reservation, part(settled(0)))
    assert everywhere() == (14, 20, 5)
    book(reservation, part(), part(estimated(10)))
    assert everywhere() == (28, 0, 5)

    assert [it.cost_nanousd for it in items_of(reservation)] == [4, 10, 0, 4, 10]


def test_the_reservation_holds_and_counts_what_is_left(ledger: Ledger) -> None:
    reservation = of_many(5)

    book(reservation, part(), part(RELEASED))

    found = row(reservation)
    assert (found.status, found.reserved_nanousd, found.counted) == ("reserved", 30, 3)
    assert found.cost_nanousd is None


def test_with_its_last_item_the_reservation_is_over(ledger: Ledger, clock: Clock) -> None:
    reservation = of_many(2)
    book(reservation, part())
    clock.pass_by(timedelta(minutes=1))

    book(reservation, part())

    found = row(reservation)
    assert (found.status, found.reserved_nanousd, found.counted) == ("released", 0, 0)
    assert (found.cost_nanousd, found.settled_at) == (0, clock.now)


def test_what_no_item_holds_is_given_back_with_the_last(ledger: Ledger) -> None:
    reservation = of_many(2)

    book(reservation, part(held=6), part(held=6))

    assert everywhere() == (8, 0, 2)


def test_an_item_that_was_released_has_no_row_and_gives_back_its_call(ledger: Ledger) -> None:
    reservation = of_many(3)

    booked = book(reservation, part(RELEASED), part())

    assert len(booked) == 2
    assert everywhere() == (4, 10, 2)
    assert len(items_of(reservation)) == 1


def test_all_items_may_be_released(ledger: Ledger) -> None:
    reservation = of_many(2)

    book(reservation, part(RELEASED), part(RELEASED))

    assert everywhere() == (0, 0, 0)
    assert row(reservation).status == "released"


def test_what_is_settled_makes_room_and_what_is_open_does_not(ledger: Ledger) -> None:
    limits = limits_of(WHO, category="support", daily=100)
    reservation = of_many(10)
    with pytest.raises(BudgetExceeded):
        reserve(limits, 1, charge=WHO, category="support")

    book(reservation, part())

    reserve(limits, 6, charge=WHO, category="support")
    with pytest.raises(BudgetExceeded):
        reserve(limits, 1, charge=WHO, category="support")


def test_a_row_says_of_its_item_what_a_call_of_its_own_would(ledger: Ledger, clock: Clock) -> None:
    """All columns, but for those that no two rows share, and when it was settled."""
    usage = Usage(
        input_tokens=1,
        cache_write_5m_tokens=2,
        cache_write_1h_tokens=3,
        cache_read_tokens=4,
        output_tokens=5,
        thinking_tokens=6,
        web_searches=7,
        service_tier="batch",
    )
    ended = settled(
        4,
        usage=usage,
        stop_reason="end_turn",
        request_id="req_7",
        latency_ms=12,
        first_token_ms=3,
        error="odd",
        saved_nanousd=6,
        saved_reason="batch",
    )
    fields: dict[str, Any] = {
        "inference_geo": "us",
        "speed": "fast",
        "decision": "d" * 300,
        "rates": "at half the price",
        "number": 2,
        "cache_checked": True,
    }
    alone = reserve(EVERYWHERE, HELD, charge=WHO, category="support", kind=Kind.BATCH, **fields)
    settle(alone, ended)
    reservation = of_many(2)

    book(reservation, part(ended, **fields))

    unlike = ("id", "call_id")
    rows = CallLog.objects.filter(kind="batch").order_by("pk")
    expected, _, found = ({k: v for k, v in it.items() if k not in unlike} for it in rows.values())
    assert found == expected
    assert (found["speed"], found["inference_geo"]) == ("fast", "us")


def test_what_the_answer_says_of_speed_and_place_is_written(ledger: Ledger) -> None:
    reservation = of_many(2)
    ended = settled(4, usage=Usage(speed="standard", inference_geo="global"))
    asked = part(ended, inference_geo="us", speed="fast")

    book(reservation, asked)

    (item,) = items_of(reservation)
    assert (item.speed, item.inference_geo) == ("standard", "global")
    assert item.call_id == asked.attempt.call_id


def test_an_item_counts_where_and_when_its_reservation_does(ledger: Ledger, clock: Clock) -> None:
    reservation = of_many(2)
    clock.now = MIDNIGHT + timedelta(hours=3)
    other = Charge(feature="mail", user_id=None, subject="else", tags={"of": "item"})

    book(reservation, replace(part(), attempt=attempt(other, at=clock.now)))

    (item,) = items_of(reservation)
    assert (item.feature_id, item.user_id, item.subject) == ("chat", WHO.user_id, "acme")
    assert (item.category, item.day, item.tags) == ("support", NOON.date(), {"of": "item"})
    assert (item.reserved_at, item.settled_at) == (clock.now, clock.now)
    assert_books_agree(EVERYWHERE)


def test_an_item_that_cost_more_than_was_held_is_booked_and_told(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    reservation = of_many(2)
    dear = part(settled(25))

    book(reservation, part(), dear)

    assert everywhere() == (29, 0, 2)
    (told,) = (it.getMessage() for it in caplog.records if "too low" in it.getMessage())
    assert str(dear.attempt.call_id) in told


def test_there_may_be_a_hundred_thousand_items(ledger: Ledger) -> None:
    reservation = of_many(100_000)

    book(reservation, part())

    assert row(reservation).counted == 99_999
    assert everywhere() == (4, 999_990, 100_000)


def test_a_chunk_takes_a_few_statements_however_large_it_is(ledger: Ledger) -> None:
    reservation = of_many(1_000)
    book(reservation, part())
    parts = [part() for _ in range(400)]

    with CaptureQueriesContext(
        connection,
    ) as seen:
        book(reservation, *parts)

    rows = "INSERT INTO " + connection.ops.quote_name(CallLog._meta.db_table)
    writes = [it for it in seen.captured_queries if it["sql"].startswith(rows)]
    assert len(writes) == math.ceil(len(parts) / journal(connection).at_once)
    assert len(seen.captured_queries) - len(writes) <= 12


# Who claims --------------------------------------------------------------------------------------


def test_the_reservation_is_shown_as_it_is_now(ledger: Ledger) -> None:
    reservation = of_many(3)
    book(reservation, part())
    seen: list[tuple[int, int, int]] = []

    def claim(row: CallLog) -> Sequence[Part]:
        seen.append((row.pk, row.reserved_nanousd, row.counted))
        return ()

    assert ledger.settle_parts(reservation.id, claim) == ()
    assert seen == [(reservation.id, 20, 2)]
    assert everywhere() == (4, 20, 3)


def ended(how: Settlement) -> Callable[[], Reservation]:
    def end() -> Reservation:
        reservation = of_many(2)
        settle(reservation, how)
        return reservation

    return end


def all_booked() -> Reservation:
    reservation = of_many(2)
    book(reservation, part(), part())
    return reservation


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(ended(RELEASED), id="released"),
        pytest.param(ended(settled(3)), id="settled"),
        pytest.param(all_booked, id="all-booked"),
        pytest.param(lambda: replace(of_many(2), id=2**31 - 1), id="no-such-row"),
    ],
)
def test_nobody_is_asked_for_parts_of_what_is_over(
    ledger: Ledger, of: Callable[[], Reservation]
) -> None:
    reservation = of()
    before = everywhere()

    assert ledger.settle_parts(reservation.id, never) == ()

    assert everywhere() == before


class Items:
    """Items in the ledger's database, which their state tells apart."""

    def __init__(self, count: int) -> None:
        self.batch = Batch.objects.create(
            feature_id="chat", created_at=NOON, touched_at=NOON, call_id=uuid.uuid4()
        )
        BatchItem.objects.bulk_create(
            BatchItem(batch=self.batch, position=number, key=str(number), custom_id=str(number))
            for number in range(count)
        )

    @property
    def open(self) -> int:
        return BatchItem.objects.filter(batch=self.batch, status="open").count()

    def claim(self, count: int) -> list[Part]:
        """Take some that are open, as a worker does that has their results."""
        found = BatchItem.objects.filter(batch=self.batch, status="open").order_by("position")
        taken = [item.pk for item in found[:count]]
        BatchItem.objects.filter(pk__in=taken).update(status="succeeded")
        return [part() for _ in taken]


def test_what_the_claimant_writes_is_committed_with_the_parts(ledger: Ledger) -> None:
    reservation, items = of_many(5), Items(5)

    ledger.settle_parts(reservation.id, lambda row: items.claim(2))

    assert items.open == 3
    assert everywhere() == (8, 30, 5)


def too_many(items: Items) -> Sequence[Part]:
    return [*items.claim(2), *(part(held=0) for _ in range(4))]


def too_much(items: Items) -> Sequence[Part]:
    return [*items.claim(2), part(held=31)]


def fail(items: Items) -> Sequence[Part]:
    items.claim(2)
    raise ValueError("no result")


@pytest.mark.parametrize("claim", [too_many, too_much, fail])
def test_a_claim_that_fails_leaves_everything_as_it_was(
    ledger: Ledger, claim: Callable[[Items], Sequence[Part]]
) -> None:
    reservation, items = of_many(5), Items(5)

    with pytest.raises(ValueError, match=r"no result|more than is left"):
        ledger.settle_parts(reservation.id, lambda row: claim(items))

    assert items.open == 5
    assert items_of(reservation) == []
    assert everywhere() == (0, 50, 5)


def test_after_a_deadlock_it_is_asked_again_and_what_it_wrote_was_undone(ledger: Ledger) -> None:
    reservation, items = of_many(5), Items(5)
    open_then: list[int] = []

    def claim(row: CallLog) -> Sequence[Part]:
        open_then.append(items.open)
        parts = items.claim(2)
        if len(open_then) == 1:
            raise OperationalError("database is locked")
        return parts

    assert len(ledger.settle_parts(reservation.id, claim)) == 2
    assert open_then == [5, 5]
    assert items.open == 3
    assert everywhere() == (8, 30, 5)


@pytest.mark.django_db(transaction=True)
def test_workers_at_once_book_every_item_once(ledger: Ledger) -> None:
    reservation, items = of_many(40), Items(40)
    asked: list[int] = []

    def claim(row: CallLog) -> Sequence[Part]:
        asked.append(row.counted)
        return items.claim(4)

    def work() -> int:
        with freeze(NOON):
            return sum(len(ledger.settle_parts(reservation.id, claim)) for _ in range(8))

    booked = together([work] * 4)

    assert sum(booked) == 40
    assert asked == list(range(40, 0, -4))  # they waited, and nothing was done in vain
    assert items.open == 0
    assert everywhere() == (160, 0, 40)
    assert row(reservation).status == "released"


@pytest.mark.django_db(transaction=True)
def test_inside_a_callers_transaction_nothing_is_booked(ledger: Ledger) -> None:
    reservation = of_many(2)

    with transaction.atomic(), pytest.raises(CallInsideTransaction):
        ledger.settle_parts(reservation.id, never)

    assert everywhere() == (0, 20, 2)


def as_newer_ones_are(cursor: Any) -> None:
    """Let MariaDB refuse to change what was changed since the transaction read."""
    cursor.execute("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")
    if cursor.fetchall():
        cursor.execute("SET SESSION innodb_snapshot_isolation = ON")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("isolated")
def test_at_any_level_of_isolation_calls_go_on_while_a_chunk_is_claimed(ledger: Ledger) -> None:
    """The claimant has read, and meanwhile others book in the balances that come last."""
    reservation = of_many(3)
    seen: list[int] = []

    def another() -> None:
        with freeze(NOON):
            settle(of_many(1), settled(1))

    def claim(row: CallLog) -> Sequence[Part]:
        seen.append(CallLog.objects.count())
        together([another])
        return [part()]

    def work() -> int:
        with freeze(NOON), connection.cursor() as cursor:
            if connection.vendor == "mysql":
                as_newer_ones_are(cursor)
            return len(ledger.settle_parts(reservation.id, claim))

    assert together([work]) == [1]
    assert seen == [1]
    assert everywhere() == (5, 20, 4)


# What is left ------------------------------------------------------------------------------------


def test_what_is_left_can_be_released(ledger: Ledger) -> None:
    reservation = of_many(5)
    book(reservation, part(), part(RELEASED))

    ledger.release(journals.reservation_of(row(reservation)), RELEASED)

    assert everywhere() == (4, 0, 1)


def test_what_is_left_after_the_deadline_is_booked_at_its_bound(
    ledger: Ledger, clock: Clock
) -> None:
    reservation = of_many(5)
    book(reservation, part(), part(RELEASED))
    clock.pass_by(DEADLINE * 2)

    assert ledger.settle_overdue() == 1

    assert everywhere() == (34, 0, 4)
    assert (row(reservation).status, row(reservation).cost_nanousd) == ("estimated", 30)


def test_an_estimate_is_corrected_item_by_item(ledger: Ledger, clock: Clock) -> None:
    reservation = of_many(4)
    book(reservation, part())
    clock.pass_by(DEADLINE * 2)
    ledger.settle_overdue()
    assert everywhere() == (34, 0, 4)

    assert len(book(reservation, part(settled(1)))) == 1
    assert everywhere() == (25, 0, 4)
    book(reservation, part(RELEASED))
    assert everywhere() == (15, 0, 3)
    assert (row(reservation).status, row(reservation).cost_nanousd) == ("estimated", 10)
    book(reservation, part(settled(2)))
    assert everywhere() == (7, 0, 3)
    assert (row(reservation).status, row(reservation).cost_nanousd) == ("released", 0)
    assert book(reservation, part()) == ()


def test_what_is_left_of_an_estimate_can_be_released(ledger: Ledger, clock: Clock) -> None:
    reservation = of_many(4)
    clock.pass_by(DEADLINE * 2)
    ledger.settle_overdue()
    book(reservation, part(settled(1)))

    ledger.release(reservation, RELEASED)

    assert everywhere() == (1, 0, 1)


@pytest.mark.parametrize(
    ("end", "sums"),
    [
        pytest.param(RELEASED, (4, 0, 1), id="release"),
        pytest.param(estimated(50), (44, 0, 5), id="tick"),
    ],
)
def test_who_knows_the_reservation_as_it_was_closes_what_is_left(
    ledger: Ledger, end: Settlement, sums: tuple[int, int, int]
) -> None:
    """Between the look and the closing, a chunk was booked by somebody else."""
    reservation = of_many(5)
    book(reservation, part())

    settle(reservation, end)

    assert everywhere() == sums


def test_an_overdue_reservation_is_closed_as_it_is_then(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many(5)
    clock.pass_by(DEADLINE * 2)
    found = journals.overdue

    def slowly(*args: Any, **kwargs: Any) -> list[CallLog]:
        rows = found(*args, **kwargs)
        book(reservation, part(), part(RELEASED))
        return rows

    monkeypatch.setattr(journals, "overdue", slowly)

    assert ledger.settle_overdue() == 1
    assert everywhere() == (34, 0, 4)


def test_balances_that_are_gone_are_added_up_before_a_chunk_is_booked(ledger: Ledger) -> None:
    reservation = of_many(5)
    book(reservation, part())
    forget_balances(ledger)

    book(reservation, part())

    assert everywhere() == (8, 30, 5)


def forget_balances(ledger: Ledger) -> None:
    SpendWindow.objects.all().delete()
    store: Any = ledger
    if ledger.needs_redis:
        store.client.flushall()


# Any sequence ------------------------------------------------------------------------------------


class Model:
    """One reservation, as a few numbers."""

    def __init__(self, items: int) -> None:
        self.items, self.rest, self.status = items, items * HELD, "reserved"
        self.spent, self.calls = 0, items

    @property
    def held(self) -> int:
        return self.rest if self.status == "reserved" else 0

    @property
    def estimate(self) -> int:
        return self.rest if self.status == "estimated" else 0

    def book(self, costs: Sequence[int | None]) -> None:
        """Book items at their costs; None was released."""
        if self.status not in ("reserved", "estimated"):
            return
        self.items -= len(costs)
        self.rest -= HELD * len(costs)
        self.spent += sum(cost or 0 for cost in costs)
        self.calls -= costs.count(None)
        if not self.items:
            self.status = "over"

    def end(self, status: str) -> None:
        if self.status == "reserved" or (self.status == "estimated" and status == "over"):
            self.status = status
            self.calls -= self.items if status == "over" else 0


COSTS = st.lists(st.none() | st.integers(0, HELD + 3), max_size=4)
WHICH = st.integers(0, 2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("book"), WHICH, COSTS),
        st.tuples(st.just("book"), WHICH, COSTS),
        st.tuples(st.just("release"), WHICH),
        st.tuples(st.just("overdue")),
        st.tuples(st.just("forget")),
        st.tuples(st.just("rebuild")),
        st.tuples(st.just("tidy")),
    ),
    max_size=12,
)


class Run:
    """Some reservations of one caller, and what they have to come to."""

    def __init__(self, ledger: Ledger, sizes: Sequence[int]) -> None:
        self.ledger, self.now = ledger, NOON
        self.models = [Model(items) for items in sizes]
        self.made = [of_many(items) for items in sizes]

    def book(self, which: int, costs: Sequence[int | None]) -> None:
        model, reservation = self.models[which], self.made[which]
        costs = costs[: model.items]
        parts = [part(RELEASED if cost is None else settled(cost)) for cost in costs]
        book(reservation, *parts)
        model.book(costs)

    def release(self, which: int) -> None:
        self.ledger.release(self.made[which], RELEASED)
        self.models[which].end("over")

    def overdue(self) -> None:
        self.now = NOON + DEADLINE * 2
        self.ledger.settle_overdue()
        for model in self.models:
            model.end("estimated")

    def forget(self) -> None:
        forget_balances(self.ledger)

    def rebuild(self) -> None:
        assert {it.kept for it in self.ledger.rebuild(NOON.date())} <= {Balances()}

    def tidy(self) -> None:
        self.ledger.tidy()

    def ensure_the_same(self) -> None:
        expected = Balances(
            spent_nanousd=sum(model.spent + model.estimate for model in self.models),
            held_nanousd=sum(model.held for model in self.models),
            calls=sum(model.calls for model in self.models),
        )
        keys: list[BalanceKey] = [of.key for of in EVERYWHERE]
        summed = journals.balances_of(connection, keys)
        assert set(summed.values()) == {expected}
        found = self.ledger.balances(keys)
        assert {found.get(key, expected) for key in keys} == {expected}


@settings(max_examples=deep(200, else_=8))
@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=3), steps=STEPS)
@pytest.mark.parametrize("name", LEDGERS)
def test_any_sequence_comes_to_what_it_has_to(
    name: str, server: RedisServer, sizes: list[int], steps: list[tuple[Any, ...]]
) -> None:
    CallLog.objects.all().delete()
    SpendWindow.objects.all().delete()
    server.flush()
    chosen = {**LEDGERS[name], "LEDGER_REDIS_URL": server.url}
    with override_settings(AI_BUDGET=chosen), freeze(NOON):
        run = Run(ledgers.current(), sizes)
        with periods.override_clock(lambda: run.now):
            for step, *arguments in steps:
                getattr(run, step)(*arguments)
                run.ensure_the_same()


# A store that is away ----------------------------------------------------------------------------


def test_a_journal_that_is_away_is_unavailable(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = of_many(2)

    def away(row: CallLog) -> Sequence[Part]:
        raise OperationalError("gone")

    with pytest.raises(LedgerUnavailable):
        ledger.settle_parts(reservation.id, away)
    assert row(reservation).status == Status.RESERVED
