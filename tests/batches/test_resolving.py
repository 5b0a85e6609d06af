"""What a person decides of a submission of which nobody knows whether the API took it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ai_budget import batches
from ai_budget.exceptions import AIBudgetError, LedgerUnavailable
from ai_budget.guard.clients import bare
from ai_budget.models import Batch
from ai_budget.testing import AnthropicSimulator, CutBeforeResponse, Fail, Pace
from tests.batches.given import (
    DAY,
    HANDED,
    HOUR,
    MINUTE,
    MODEL,
    TAKE,
    assert_counted,
    assert_settled,
    creations,
    items_of,
    later,
    now,
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


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    with standing_still() as clock:
        yield clock


def uncertain(api: AnthropicSimulator, *, taken: bool = False, **options: Any) -> Batch:
    api.batches.script("create", CutBeforeResponse(billed=taken))
    batch = submit(**options)
    work()
    assert submission_of(batch).status == "uncertain"
    return batch


def foreign(count: int = 3, prefix: str = "item") -> str:
    """Have the API make a batch that is none of ours; return its id."""
    params: Any = {"model": MODEL, "max_tokens": 9}
    params["messages"] = [{"role": "user", "content": "Hello"}]
    requests: Any = [{"custom_id": f"{prefix}-{n}", "params": params} for n in range(count)]
    created: str = bare().messages.batches.create(requests=requests).id
    return created


# It is that batch there -------------------------------------------------------------------------


def test_a_batch_that_is_named_is_booked_as_its_own(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    batch = uncertain(api, taken=True)

    batches.accept(submission_of(batch), api.batches.ids[0])
    assert submission_of(batch).status == "sent"
    api.batches.end()
    work()

    assert creations(api) == 1
    assert_settled(batch, api)


def test_one_that_has_ended_can_be_named(api: AnthropicSimulator, clock: Clock) -> None:
    batch = uncertain(api, taken=True)

    batches.accept(submission_of(batch), api.batches.ids[0])
    work()

    assert_settled(batch, api)


def test_it_can_be_named_even_after_it_was_given_up(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    batch = uncertain(api, taken=True)
    later(clock, 2 * DAY + MINUTE)
    assert now(batch).spent_nanousd == batch.reserved_nanousd
    api.batches.end()

    batches.accept(submission_of(batch), api.batches.ids[0])
    work()

    assert_settled(batch, api)


def test_a_batch_with_other_items_is_not_taken(api: AnthropicSimulator, clock: Clock) -> None:
    batch = uncertain(api)

    for api_id, why in ((foreign(2), "2 items"), (foreign(3), "results of other items")):
        with pytest.raises(AIBudgetError, match=why):
            batches.accept(submission_of(batch), api_id)

    assert (submission_of(batch).status, submission_of(batch).api_id) == ("uncertain", None)


def test_a_batch_of_another_submission_is_not_taken(api: AnthropicSimulator, clock: Clock) -> None:
    other = sent()
    batch = uncertain(api)

    with pytest.raises(AIBudgetError, match="belongs to another submission"):
        batches.accept(submission_of(batch), str(submission_of(other).api_id))

    assert submission_of(batch).status == "uncertain"


@pytest.mark.parametrize("status", [404, 500])
def test_a_batch_that_the_api_does_not_tell_of_is_not_taken(
    api: AnthropicSimulator, clock: Clock, status: int
) -> None:
    batch = uncertain(api)
    api.batches.script("retrieve", Fail(status=status))

    with pytest.raises(AIBudgetError, match=f"'msgbatch_1': HTTP {status}"):
        batches.accept(submission_of(batch), "msgbatch_1")

    assert submission_of(batch).status == "uncertain"


# It was never sent ------------------------------------------------------------------------------


def test_what_was_never_sent_is_sent_again(api: AnthropicSimulator, clock: Clock) -> None:
    batch = uncertain(api)

    batches.send_again(submission_of(batch))
    assert (submission_of(batch).status, now(batch).held_nanousd) == (
        "waiting",
        batch.reserved_nanousd,
    )
    work()
    later(clock)

    assert creations(api) == 2
    assert_settled(batch, api)


def test_what_would_be_sent_too_late_is_released(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.script("list", *[Fail(status=500)] * 9)
    batch = uncertain(api)
    later(clock, 2 * DAY + MINUTE)
    assert site(batch).spent_nanousd == batch.reserved_nanousd

    batches.send_again(submission_of(batch))
    work()

    assert {it.error for it in items_of(batch)} == {"not sent in time"}
    assert creations(api) == 1
    assert_settled(batch, api)


# It is not wanted any more ----------------------------------------------------------------------


def test_what_is_not_wanted_any_more_is_released_at_once(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = uncertain(api, on_result=TAKE)

    batches.release(submission_of(batch))

    assert statuses(batch) == ["canceled"] * 3
    assert [it.status for it in HANDED] == ["canceled"] * 3
    assert submission_of(batch).status == "done"
    later(clock, HOUR)
    assert creations(api) == 1
    assert_settled(batch, api)


def test_what_is_not_wanted_is_never_sent_though_the_ledger_is_away(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = uncertain(api)

    def away(*args: Any) -> Any:
        raise LedgerUnavailable("Away.")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_of_the_run(), "settle_parts", away)
        with pytest.raises(LedgerUnavailable):
            batches.release(submission_of(batch))
    later(clock)

    assert statuses(batch) == ["canceled"] * 3
    assert creations(api) == 1
    assert_settled(batch, api)


# Whoever decides second -------------------------------------------------------------------------


@pytest.mark.parametrize("decide", [batches.send_again, batches.release])
def test_what_is_not_uncertain_any_more_is_not_decided(
    api: AnthropicSimulator, clock: Clock, decide: Any
) -> None:
    batch = uncertain(api)
    stale = submission_of(batch)
    batches.send_again(stale)

    with pytest.raises(AIBudgetError, match="not uncertain any more"):
        decide(stale)

    assert submission_of(batch).status == "waiting"
    assert statuses(batch) == ["open"] * 3
    assert_counted(batch)
