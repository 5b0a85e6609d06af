"""The end of batches: finished and told once, given up after the deadline, forgotten in time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from ai_budget import batches
from ai_budget.batches import ending
from ai_budget.batches.steps import LATE_LOOK, RESULTS_KEPT
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.guard.batch import results
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallText
from ai_budget.signals import batch_finished
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    Errored,
    Fail,
    Pace,
    Reply,
)
from tests.batches.given import (
    DAY,
    FEATURE,
    HANDED,
    HOUR,
    MINUTE,
    OVER,
    TAKE,
    assert_counted,
    assert_settled,
    bill,
    creations,
    items_of,
    later,
    now,
    over,
    reservation_of,
    sent,
    site,
    standing_still,
    statuses,
    submission_of,
    submit,
    work,
)
from tests.guard.books import ledger_of_the_run
from tests.whole.clocks import Clock

pytestmark = pytest.mark.django_db

DEADLINE = 2 * DAY


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    with standing_still() as clock:
        yield clock


@pytest.fixture
def told() -> Iterator[list[Batch]]:
    """The batches that the signal told of."""
    heard: list[Batch] = []

    def hear(batch: Batch, **kwargs: Any) -> None:
        heard.append(batch)

    batch_finished.connect(hear)
    yield heard
    batch_finished.disconnect(hear)


# Finished ---------------------------------------------------------------------------------------


def test_a_batch_is_finished_and_told_once(
    api: AnthropicSimulator, clock: Clock, told: list[Batch]
) -> None:
    batch = over(clock)
    for _ in range(3):
        later(clock, HOUR)

    assert told == [batch]
    assert (told[0].status, told[0].succeeded, told[0].open) == ("finished", 3, 0)
    assert now(batch).finished_at == now(batch).told_at == batch.finished_at
    assert [result.ok for result in told[0].results()] == [True] * 3


def test_it_is_finished_with_its_last_submission(
    api: AnthropicSimulator, clock: Clock, told: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_BYTES", 1)
    api.batches.pace = Pace.never()
    batch = submit("one", "two")
    work()
    first, second = api.batches.ids

    api.batches.end(first)
    later(clock)
    assert (now(batch).status, told, statuses(batch)) == ("open", [], ["succeeded", "open"])
    assert_counted(batch)

    api.batches.end(second)
    later(clock)
    assert told == [batch]
    assert_settled(batch, api)


def test_a_batch_that_is_all_over_is_finished_by_the_next_run(
    api: AnthropicSimulator, clock: Clock, told: list[Batch]
) -> None:
    """Its worker died before it could say so."""
    batch = over(clock)
    Batch.objects.update(status="open", finished_at=None, told_at=None)

    batches.tidy()

    assert told == [batch, batch]
    assert now(batch).status == "finished"


def test_who_died_while_telling_is_followed_by_another(
    api: AnthropicSimulator, clock: Clock, told: list[Batch]
) -> None:
    batch = over(clock)
    Batch.objects.update(told_at=None)

    batches.tidy()
    assert told == [batch]  # for whoever is at it may just be slow
    later(clock, OVER)
    later(clock, DAY)

    assert told == [batch, batch]


def test_a_receiver_that_fails_holds_nothing_up(
    api: AnthropicSimulator, clock: Clock, told: list[Batch]
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ValueError

    batch_finished.connect(fail)
    try:
        batch = over(clock)
    finally:
        batch_finished.disconnect(fail)

    assert told == [batch]
    assert now(batch).told_at is not None


# Given up ---------------------------------------------------------------------------------------


def test_a_batch_that_never_ends_is_booked_at_its_bound(
    api: AnthropicSimulator, clock: Clock, told: list[Batch]
) -> None:
    api.batches.pace = Pace.never()
    batch = sent(on_result=TAKE)
    bound = batch.reserved_nanousd

    clock.at += DEADLINE
    work()
    assert now(batch).status == "open"
    clock.at += MINUTE
    work()

    assert now(batch).status == "finished"
    assert (now(batch).held_nanousd, now(batch).spent_nanousd) == (0, bound)
    assert (site(batch).held_nanousd, site(batch).spent_nanousd) == (0, bound)
    assert {(it.status, it.error) for it in items_of(batch)} == {("expired", "deadline passed")}
    assert [it.status for it in HANDED] == ["expired"] * 3
    assert told == [batch]
    assert submission_of(batch).cancel_requested
    assert_counted(batch)


def given_up(api: AnthropicSimulator, clock: Clock, **options: Any) -> Batch:
    api.batches.pace = Pace(seconds=1_000_000, canceling=1_000_000, done=0.5)
    batch = sent("one", "two", **options)
    later(clock, DEADLINE + MINUTE)
    later(clock)
    assert (now(batch).status, submission_of(batch).status) == ("finished", "canceling")
    return now(batch)


def test_the_truth_corrects_it(api: AnthropicSimulator, clock: Clock, told: list[Batch]) -> None:
    batch = given_up(api, clock, on_result=TAKE)
    HANDED.clear()

    api.batches.end()
    later(clock, LATE_LOOK + MINUTE)

    assert statuses(batch) == ["succeeded", "canceled"]
    assert submission_of(batch).status == "done"
    assert reservation_of(batch).status == "released"
    assert site(batch).spent_nanousd == bill(api)
    # It was told that both had expired.
    assert [(it.key, it.status, it.text != "") for it in HANDED] == [("0", "succeeded", True)]
    assert told == [batch]
    assert_settled(batch, api)


def test_it_is_looked_for_as_long_as_the_api_keeps_it(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = given_up(api, clock)
    seen = len(api.requests)

    later(clock, LATE_LOOK + MINUTE)
    later(clock, HOUR)
    assert len(api.requests) == seen + 1
    later(clock, RESULTS_KEPT)

    assert submission_of(batch).status == "done"
    assert now(batch).spent_nanousd == batch.reserved_nanousd
    assert_counted(batch)


def test_a_batch_of_another_key_is_held_and_given_up(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    batch = sent()
    settings.AI_BUDGET = {**settings.AI_BUDGET, "API_KEY": "another"}

    later(clock)
    assert (submission_of(batch).error, statuses(batch)) == ("HTTP 404", ["open"] * 3)
    later(clock, DEADLINE + MINUTE)
    assert now(batch).spent_nanousd == batch.reserved_nanousd
    later(clock)
    assert submission_of(batch).next_look_at == clock.at + LATE_LOOK

    settings.AI_BUDGET = {**settings.AI_BUDGET, "API_KEY": "local"}
    later(clock, LATE_LOOK + MINUTE)
    assert_settled(batch, api)


def test_results_that_could_not_be_read_are_read_after_the_deadline(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = sent()
    api.batches.script("results", *[Fail(status=500)] * 3)
    later(clock)
    later(clock, DEADLINE)
    assert now(batch).spent_nanousd == batch.reserved_nanousd
    later(clock)

    later(clock, LATE_LOOK + MINUTE)

    assert_settled(batch, api)


def test_what_was_never_sent_is_released_though_nobody_worked(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    clock.at += DEADLINE + MINUTE

    batches.tidy()
    assert {(it.status, it.error) for it in items_of(batch)} == {("expired", "not sent in time")}
    assert now(batch).status == "finished"
    work()

    assert submission_of(batch).status == "done"
    assert creations(api) == 0
    assert_settled(batch, api)


def test_what_was_booked_for_being_late_and_never_sent_is_given_back(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    clock.at += DEADLINE + MINUTE
    assert ledgers.current().settle_overdue() == 1
    assert site(batch).spent_nanousd == batch.reserved_nanousd

    work()

    assert_settled(batch, api)
    assert site(batch).spent_nanousd == 0


def test_an_uncertain_submission_is_given_up_and_found_later(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.script("create", CutBeforeResponse(billed=True))
    api.batches.script("list", *[Fail(status=500)] * 5)
    batch = submit()
    work()
    later(clock)
    later(clock, DEADLINE)
    assert now(batch).spent_nanousd == batch.reserved_nanousd
    later(clock)

    for _ in range(4):
        later(clock, LATE_LOOK + MINUTE)

    assert_settled(batch, api)


def test_an_uncertain_submission_that_was_never_taken_is_given_back_even_late(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.script("create", CutBeforeResponse())
    api.batches.script("list", *[Fail(status=500)] * 5)
    batch = submit()
    work()
    later(clock)
    later(clock, DEADLINE)
    assert now(batch).spent_nanousd == batch.reserved_nanousd

    for _ in range(5):
        later(clock, LATE_LOOK + MINUTE)

    assert {(it.status, it.error) for it in items_of(batch)} == {("expired", "never accepted")}
    assert_settled(batch, api)


def test_an_uncertain_submission_whose_candidate_never_ends_is_looked_for_rarely(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.pace = Pace.never()
    api.batches.script("create", CutBeforeResponse(billed=True))
    batch = submit()
    work()

    later(clock, DEADLINE + MINUTE)
    later(clock)

    assert submission_of(batch).status == "uncertain"
    assert submission_of(batch).next_look_at == clock.at + LATE_LOOK


def test_an_answer_between_the_bookings_of_a_late_batch_counts(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """Who gives it up dies after the money, and before the items."""
    batch = sent("one", "two")
    clock.at += DEADLINE + MINUTE
    assert ledgers.current().settle_overdue() == 1

    work()

    assert statuses(batch) == ["succeeded"] * 2
    assert_settled(batch, api)


def test_many_items_are_given_up_in_chunks(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.results.ROWS_AT_ONCE", 2)
    api.batches.pace = Pace.never()
    batch = sent(*map(str, range(5)))
    clock.at += DEADLINE + MINUTE
    ledgers.current().settle_overdue()

    assert results.expire_items(batch) == 5
    assert results.expire_items(batch) == 0

    assert_counted(batch)


# Never opened -----------------------------------------------------------------------------------


def preparing(at: datetime) -> Batch:
    """A batch whose maker has died."""
    batch = Batch.objects.create(feature_id=FEATURE, created_at=at, touched_at=at)
    submission = BatchSubmission.objects.create(batch=batch, number=0)
    item = BatchItem(batch=batch, submission=submission, position=0, key="0", custom_id="x-0")
    item.save()
    CallText.objects.create(call_id=item.call_id, request="{}", kept_at=at)
    return batch


def test_a_batch_whose_maker_died_is_deleted(api: AnthropicSimulator, clock: Clock) -> None:
    submit("another")
    BatchSubmission.objects.update(next_look_at=None)
    dead = preparing(clock.at - HOUR - MINUTE)
    alive = preparing(clock.at - HOUR + MINUTE)

    batches.tidy()

    assert not Batch.objects.filter(pk=dead.pk).exists()
    assert Batch.objects.filter(pk=alive.pk).exists()
    assert CallText.objects.count() == BatchItem.objects.count() == 2


# What fails -------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_given_up_holds_no_other_up(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.batches.pace = Pace.never()
    other, stuck = sent(), sent()  # the newest comes first
    clock.at += DEADLINE + MINUTE
    for submission_id in batches.due():
        batches.advance(submission_id)
    book = results.book_overdue

    def fail(batch: Batch) -> None:
        if batch == stuck:
            raise LedgerUnavailable("Away.")
        book(batch)

    with monkeypatch.context() as patch:
        patch.setattr(ending, "book_overdue", fail)
        with pytest.raises(LedgerUnavailable, match=r"^Away\.$"):
            batches.tidy()
    assert (now(stuck).status, now(other).status) == ("open", "finished")

    batches.tidy()
    assert now(stuck).status == "finished"
    assert_counted(stuck)


def test_what_nobody_has_looked_after_since_the_deadline_is_not_given_up(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """Its results may lie ready, where no worker ran for days."""
    batch = sent("one", "two")
    clock.at += DEADLINE + MINUTE

    batches.tidy()
    assert now(batch).status == "open"

    work()
    assert (now(batch).status, now(batch).succeeded) == ("finished", 2)
    assert_settled(batch, api)


def test_texts_are_forgotten_though_batches_fail(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = over(clock)
    Batch.objects.update(status="open")
    CallText.objects.create(call_id=batch.call_id, kept_at=clock.at - 40 * DAY)

    def fail(batch: Batch) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(ending, "finish_if_over", fail)
    with pytest.raises(ValueError, match="a fault"):
        batches.tidy()

    assert not CallText.objects.exists()


def test_the_clock_of_the_ledger_may_be_away(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()

    def away(self: Any) -> datetime:
        raise LedgerUnavailable("Away.")

    monkeypatch.setattr(ledger_of_the_run(), "now", away)

    for step in (batches.due, batches.tidy, lambda: batches.advance(1)):
        with pytest.raises(LedgerUnavailable):
            step()


def test_what_is_finished_or_goes_on_costs_no_query_more(
    api: AnthropicSimulator, clock: Clock
) -> None:
    over(clock, "one")
    api.batches.pace = Pace.never()
    sent("one")

    def queries() -> int:
        with CaptureQueriesContext(
            connection,
        ) as captured:
            batches.tidy()
        return len(captured)

    few = queries()
    for _ in range(5):
        sent("one")
    finished = Batch.objects.filter(status="finished").values().get()
    del finished["id"], finished["call_id"]
    Batch.objects.bulk_create([Batch(**finished) for _ in range(3_000)])

    assert queries() == few < 12


# Texts ------------------------------------------------------------------------------------------


def test_texts_are_kept_as_long_as_the_settings_say(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": True, "LOG_PROMPTS_DAYS": 3}
    api.batches.enqueue(Reply(), Errored())
    batch = over(clock, "one", "two")

    later(clock, 3 * DAY - HOUR)
    assert CallText.objects.count() == 2
    later(clock, HOUR + MINUTE)

    assert not CallText.objects.exists()
    assert [result.status for result in batch.results()] == ["succeeded", "errored"]


def test_what_is_still_to_be_sent_is_never_forgotten(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    """A batch may have been prepared for hours, and waits for up to a day."""
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS_DAYS": 1}
    batch = submit()
    CallText.objects.update(kept_at=clock.at - 2 * HOUR)

    clock.at += 22 * HOUR + MINUTE
    batches.tidy()
    work()
    later(clock)

    assert_settled(batch, api)


def test_many_texts_are_forgotten_in_chunks(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "ROWS_AT_ONCE", 2)
    api.batches.default = Errored()
    over(clock, *map(str, range(5)))
    assert CallText.objects.count() == 5

    later(clock, 31 * DAY)

    assert not CallText.objects.exists()
