"""Two workers at once, and workers that die: everything is sent once and booked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from django.db import connection

from ai_budget import batches
from ai_budget.batches import handing, steps
from ai_budget.guard.batch import api as api_of_batches
from ai_budget.guard.batch import results
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch
from ai_budget.testing import (
    AnthropicSimulator,
    Errored,
    Expired,
    Pace,
    Reply,
)
from tests.batches.given import (
    DAY,
    HANDED,
    MINUTE,
    OVER,
    TAKE,
    assert_settled,
    calls_of,
    creations,
    items_of,
    later,
    now,
    sent,
    standing_still,
    statuses,
    submission_of,
    submit,
    work,
)
from tests.contention.points import watched
from tests.ledger.threads import together
from tests.whole.clocks import Clock

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("emptied_row_by_row"),
]

OUTCOMES = (Reply(), Errored(), Reply(), Expired(), Reply())
ENDED = ["succeeded", "errored", "succeeded", "expired", "succeeded"]


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    with standing_still() as clock:
        yield clock


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have five items be read in three chunks, and each result noted by itself."""
    for module in (steps, results):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(handing, "NOTED_EVERY", -1)


def prepared(api: AnthropicSimulator) -> Batch:
    api.batches.enqueue(*OUTCOMES)
    return submit(*"12345", on_result=TAKE)


# At once ----------------------------------------------------------------------------------------

WORKERS = 4


def all_at_once() -> None:
    together([work] * WORKERS)


def test_many_workers_send_it_once(api: AnthropicSimulator, clock: Clock) -> None:
    batch = prepared(api)

    all_at_once()

    assert creations(api) == 1
    assert submission_of(batch).status == "sent"


def test_many_workers_read_and_finish_it_once(api: AnthropicSimulator, clock: Clock) -> None:
    batch = prepared(api)
    all_at_once()
    clock.at += MINUTE

    all_at_once()
    clock.at += OVER
    all_at_once()

    assert statuses(batch) == ENDED
    assert sorted(it.key for it in HANDED) == list("01234")
    assert_settled(batch, api)


def test_results_that_many_book_at_once_are_booked_once(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """As after a lease that has lapsed, or where a client reads the results itself."""
    api.batches.enqueue(*OUTCOMES)
    batch = sent(*"12345")
    submission = submission_of(batch)
    lines = list(api_of_batches.results(str(submission.api_id)))

    booked = together([lambda: results.settle_results(submission, lines)] * WORKERS)

    assert sum(map(len, booked)) == 5
    later(clock)
    assert_settled(batch, api)


def test_giving_up_and_reading_at_once_books_once(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(*OUTCOMES)
    batch = sent(*"12345")
    submission = submission_of(batch)
    lines = list(api_of_batches.results(str(submission.api_id)))
    clock.at += 2 * DAY + MINUTE

    def settle() -> None:
        results.settle_results(submission, lines)

    together([settle, batches.tidy, settle, batches.tidy])
    work()

    assert statuses(batch) == ENDED
    assert_settled(batch, api)


# Workers that die -------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code that works on batches catches."""


class Dying:
    """Kills whoever comes to the n-th point inside; who is dead gets no further."""

    def __init__(self, number: int) -> None:
        self.number, self.reached = number, 0

    def __call__(self, name: str) -> None:
        self.reached += 1
        if self.reached >= self.number:
            raise Killed(name)


def killed_at(number: int, do: Callable[[], None]) -> bool:
    """Do it, and die at that point; say whether it came so far.

    What was begun is undone, as by a server whose client is gone.
    """
    dying = Dying(number)
    try:
        with watched(dying):
            do()
    except BaseException:
        if dying.reached < number:
            raise
    connection.close()
    return dying.reached >= number


def recover(clock: Clock, batch: Batch) -> None:
    """Let others go on, after what the dead one had is anybody's."""
    for _ in range(12):
        if now(batch).told_at is not None:
            ledgers.current().tidy()  # as the tick does, for what Redis was not told
            return
        later(clock, OVER)
    raise AssertionError(f"{batch} hangs: {submission_of(batch).status}")


EVERY = 11
"""How many points lie between two that are tried; each database has others."""


def points() -> Iterator[int]:
    """Yield the numbers of the points to die at, on and on."""
    return count({"sqlite": 1, "postgresql": 2, "mysql": 3}[connection.vendor], EVERY)


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_a_worker_that_dies_at_the_request_sends_nothing_twice(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    create = api_of_batches.create

    def die(body: bytes) -> str:
        if taken:
            create(body)
        raise Killed

    batch = prepared(api)
    with monkeypatch.context() as patch:
        patch.setattr(api_of_batches, "create", die)
        with pytest.raises(Killed):
            work()
    assert submission_of(batch).status == "sending"
    assert now(batch).held_nanousd == batch.reserved_nanousd

    for _ in range(4):
        later(clock, steps.NEVER_TAKEN_AFTER / 3)

    assert creations(api) == taken
    assert statuses(batch) == (ENDED if taken else ["expired"] * 5)
    assert_settled(batch, api)


def test_a_worker_that_dies_anywhere_while_it_sends_sends_nothing_twice(
    api: AnthropicSimulator, clock: Clock
) -> None:
    for number in points():
        batch = prepared(api)
        if not killed_at(number, work):
            break
        if submission_of(batch).status == "sending" and not creations(api):
            later(clock, steps.NEVER_TAKEN_AFTER)  # nobody knows that it never was
        recover(clock, batch)
        assert creations(api) <= 1
        assert_settled_once(api, batch)

    assert number > 10


def test_a_worker_that_dies_anywhere_while_it_reads_books_nothing_twice(
    api: AnthropicSimulator, clock: Clock
) -> None:
    for number in points():
        batch = prepared(api)
        work()
        clock.at += MINUTE
        if not killed_at(number, work):
            break
        recover(clock, batch)
        assert {it.key for it in HANDED} == set("01234")
        assert creations(api) == 1
        assert_settled_once(api, batch)

    assert number > 30


def test_a_worker_that_dies_anywhere_while_it_gives_up_books_nothing_twice(
    api: AnthropicSimulator, clock: Clock
) -> None:
    for number in points():
        api.batches.pace = Pace.never()
        batch = prepared(api)
        work()
        clock.at += 2 * DAY + MINUTE
        batches.advance(submission_of(batch).pk)
        died = killed_at(number, batches.tidy)
        batches.tidy()
        assert now(batch).spent_nanousd == batch.reserved_nanousd
        api.batches.end()
        later(clock, OVER)
        later(clock, steps.LATE_LOOK + MINUTE)
        recover(clock, batch)
        assert_settled_once(api, batch)
        if not died:
            break

    assert number > 10


def assert_settled_once(api: AnthropicSimulator, batch: Batch) -> None:
    """It is settled at what it was billed; then all is forgotten for the next."""
    if submission_of(batch).api_id:
        assert statuses(batch) == ENDED
        assert len(calls_of(batch)) == 3
    assert_settled(batch, api)
    assert all(item.status != "open" for item in items_of(batch))
    HANDED.clear()
    api.reset()
