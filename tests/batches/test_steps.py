"""Every state of a submission, and every way out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from ai_budget import batches
from ai_budget.batches import steps
from ai_budget.batches.steps import CLOCKS_APART, NEVER_TAKEN_AFTER, SEND_WITHIN
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.guard.batch import api as batch_api
from ai_budget.guard.batch.opening import OPEN_FOR
from ai_budget.guard.batch.rows import LEASE
from ai_budget.guard.clients import bare
from ai_budget.ledger import connection
from ai_budget.models import BatchItem, BatchSubmission, CallLog
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    CutStream,
    Fail,
    Pace,
    Reply,
    Results,
    TruncateCleanly,
)
from ai_budget.testing.steps import BatchStep
from tests.batches.given import (
    DAY,
    HANDED,
    HOUR,
    MINUTE,
    MODEL,
    OVER,
    TAKE,
    assert_counted,
    assert_settled,
    calls_of,
    creations,
    items_of,
    later,
    now,
    over,
    page_in_between,
    sent,
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


def state(batch: Any) -> str:
    return submission_of(batch).status


# Sending ----------------------------------------------------------------------------------------


def test_what_waits_is_sent_once(api: AnthropicSimulator, clock: Clock) -> None:
    batch = submit("one", "two")
    assert state(batch) == "waiting"

    work()
    work()

    submission = submission_of(batch)
    assert (submission.status, submission.sent_at) == ("sent", clock.at)
    assert [submission.api_id] == api.batches.ids
    assert creations(api) == 1
    assert_counted(batch)


def test_it_is_sent_as_it_was_asked(api: AnthropicSimulator, clock: Clock) -> None:
    text = 'He said: "\\ü\u2028 \U0001f600"\n'
    batch = submit({"messages": [{"role": "user", "content": text}], "system": "Ä"}, "two")

    work()

    (request,) = [it for it in api.requests if it.method == "POST"]
    assert request.body is not None
    first, second = request.body["requests"]
    assert first["params"]["messages"][0]["content"] == text
    assert first["params"]["system"] == "Ä"
    assert [first["custom_id"], second["custom_id"]] == [it.custom_id for it in items_of(batch)]


BUSY = {
    "429": Fail(status=429, retry_after=7),
    "529": Fail(status=529),
    "503": Fail(status=503),
    "401": Fail(status=401),
    "403": Fail(status=403),
    "404": Fail(status=404),
}


@pytest.mark.parametrize("step", BUSY.values(), ids=BUSY)
def test_what_the_api_does_not_take_now_is_sent_later(
    api: AnthropicSimulator, clock: Clock, step: BatchStep
) -> None:
    api.batches.script("create", step)
    batch = submit()

    work()

    submission = submission_of(batch)
    assert (submission.status, submission.tries, submission.sent_at) == ("waiting", 1, None)
    assert submission.next_look_at == clock.at + timedelta(seconds=30)
    assert now(batch).held_nanousd == batch.reserved_nanousd
    assert_counted(batch)
    later(clock)
    assert (state(batch), submission_of(batch).error) == ("sent", "")
    later(clock)
    assert_settled(batch, api)


@pytest.mark.parametrize(
    ("retry_after", "waited"),
    [("600", 600.0), ("soon", 30.0), ("-5", 30.0), ("1e30", 3_600.0), ("nan", 30.0)],
)
def test_the_api_says_when_to_try_again(
    api: AnthropicSimulator, clock: Clock, retry_after: str, waited: float
) -> None:
    api.batches.script("create", Fail(status=429, headers={"retry-after": retry_after}))
    batch = submit()

    work()

    assert submission_of(batch).next_look_at == clock.at + timedelta(seconds=waited)


def test_the_same_failure_is_tried_ever_less_often(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.script("create", *[Fail(status=529)] * 7, Fail(status=401))
    batch = submit()
    waits = []

    for _ in range(8):
        work()
        look = submission_of(batch).next_look_at
        assert look is not None
        waits.append((look - clock.at).total_seconds())
        clock.at = look

    assert waits == [30, 60, 120, 240, 480, 900, 900, 30]


def test_a_connection_that_is_refused_sent_nothing(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    batch = submit()
    there = settings.AI_BUDGET
    settings.AI_BUDGET = {**there, "BASE_URL": "http://127.0.0.1:9"}

    work()
    assert (state(batch), submission_of(batch).error) == ("waiting", "APIConnectionError")

    settings.AI_BUDGET = there
    later(clock)
    later(clock)
    assert_settled(batch, api)


def test_a_key_that_is_missing_keeps_it_waiting(
    api: AnthropicSimulator, clock: Clock, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    batch = submit()
    with_key = settings.AI_BUDGET
    without = {**with_key, "API_KEY": None}

    settings.AI_BUDGET = without
    work()
    assert (state(batch), submission_of(batch).error) == ("waiting", "no key")

    settings.AI_BUDGET = with_key
    later(clock)
    settings.AI_BUDGET = without
    later(clock)
    assert (state(batch), submission_of(batch).error) == ("sent", "no key")


@pytest.mark.parametrize("status", [400, 413])
def test_what_the_api_refuses_for_good_is_errored(
    api: AnthropicSimulator, clock: Clock, status: int
) -> None:
    api.batches.script("create", Fail(status=status, message="requests.0: the secret is too long"))
    batch = submit(on_result=TAKE)

    work()

    assert statuses(batch) == ["errored"] * 3
    assert {item.error for item in items_of(batch)} == {f"HTTP {status}"}
    assert state(batch) == "done"
    assert creations(api) == 1
    assert [(it.key, it.error) for it in HANDED] == [(str(n), f"HTTP {status}") for n in range(3)]
    assert_settled(batch, api)


def test_what_could_not_be_sent_for_a_day_is_released(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    clock.at += SEND_WITHIN + MINUTE

    work()

    assert {(it.status, it.error) for it in items_of(batch)} == {("expired", "not sent in time")}
    assert creations(api) == 0
    assert_settled(batch, api)


# Uncertain --------------------------------------------------------------------------------------

UNHEARD: dict[str, BatchStep] = {
    "no answer": CutBeforeResponse(billed=True),
    "half an answer": CutStream(),
}
NOT_TAKEN: dict[str, BatchStep] = {
    "HTTP 500": Fail(status=500),
    "HTTP 502": Fail(status=502),
    "no answer": CutBeforeResponse(),
}


@pytest.mark.parametrize("step", UNHEARD.values(), ids=UNHEARD)
def test_what_the_api_took_unheard_is_found_again_and_not_sent_again(
    api: AnthropicSimulator, clock: Clock, step: BatchStep
) -> None:
    api.batches.pace = Pace.never()
    api.batches.script("create", step)
    batch = submit()
    work()
    assert state(batch) == "uncertain"

    later(clock, 20 * MINUTE)  # it shows in the list, and has not ended
    assert state(batch) == "uncertain"
    assert now(batch).held_nanousd == batch.reserved_nanousd
    api.batches.end()
    later(clock, 20 * MINUTE)
    later(clock)

    assert submission_of(batch).api_id == api.batches.ids[0]
    assert creations(api) == 1
    assert_settled(batch, api)


@pytest.mark.parametrize("step", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_the_api_never_took_is_released_after_a_day(
    api: AnthropicSimulator, clock: Clock, step: BatchStep
) -> None:
    api.batches.script("create", step)
    batch = submit()
    work()

    later(clock, NEVER_TAKEN_AFTER - MINUTE)
    assert state(batch) == "uncertain"
    later(clock, 20 * MINUTE)

    assert {(it.status, it.error) for it in items_of(batch)} == {("expired", "never accepted")}
    assert creations(api) == 1
    assert_settled(batch, api)


def test_a_page_of_a_proxy_says_nothing(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    """Nobody knows whether the API has it, or how it stands."""
    batch = submit()
    there = settings.AI_BUDGET

    with page_in_between() as address:
        settings.AI_BUDGET = {**there, "BASE_URL": address}
        work()
        assert (state(batch), submission_of(batch).error) == ("uncertain", "unreadable answer")
        later(clock)
        assert (state(batch), submission_of(batch).tries) == ("uncertain", 2)

    assert_counted(batch)


def test_a_worker_that_died_while_it_sent_leaves_it_uncertain(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    BatchSubmission.objects.update(
        status="sending", sent_at=clock.at, next_look_at=clock.at + LEASE
    )

    work()
    assert state(batch) == "sending"
    later(clock, OVER)

    assert (state(batch), creations(api)) == ("uncertain", 0)
    assert_counted(batch)


def uncertain(api: AnthropicSimulator, *, taken: bool = True) -> Any:
    api.batches.script("create", CutBeforeResponse(billed=taken))
    batch = submit()
    work()
    assert state(batch) == "uncertain"
    return batch


def make(*custom_ids: str) -> None:
    """Have the API make a batch that is none of ours."""
    params: Any = {"model": MODEL, "max_tokens": 9}
    params["messages"] = [{"role": "user", "content": "Hello"}]
    requests: Any = [{"custom_id": it, "params": params} for it in custom_ids]
    bare().messages.batches.create(requests=requests)


def test_another_batch_of_the_same_size_is_not_taken_for_it(
    api: AnthropicSimulator, clock: Clock
) -> None:
    make("item-1", "item-2", "item-3")
    batch = uncertain(api, taken=False)
    make("item-1", "item-2", "item-3")

    later(clock, 20 * MINUTE)
    assert state(batch) == "uncertain"
    later(clock, NEVER_TAKEN_AFTER)

    assert {it.error for it in items_of(batch)} == {"never accepted"}
    assert_counted(batch)


def test_batches_of_other_sizes_and_times_are_not_even_looked_into(
    api: AnthropicSimulator, clock: Clock
) -> None:
    make("item-1", "item-2")
    clock.at += 2 * HOUR
    batch = uncertain(api, taken=False)
    make("item-1")
    clock.at += 2 * HOUR
    make("item-1", "item-2", "item-3")

    work()

    assert state(batch) == "uncertain"
    assert not any(it.path.endswith("/results") for it in api.requests)


def test_durations_leave_room_for_each_other() -> None:
    """What the API took has ended before it counts as never taken, or its money as lost."""
    assert NEVER_TAKEN_AFTER > DAY + CLOCKS_APART
    assert SEND_WITHIN + DAY < OPEN_FOR


def test_a_batch_of_another_submission_is_not_taken_for_it(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.pace = Pace.never()
    known = sent()
    batch = uncertain(api, taken=False)
    assert submission_of(known).items_count == submission_of(batch).items_count

    later(clock, NEVER_TAKEN_AFTER + HOUR)

    assert {it.error for it in items_of(batch)} == {"never accepted"}


def test_two_uncertain_submissions_are_told_apart(api: AnthropicSimulator, clock: Clock) -> None:
    one, other = uncertain(api), uncertain(api)

    later(clock, 20 * MINUTE)
    later(clock)

    assert [submission_of(it).api_id for it in (one, other)] == api.batches.ids
    for batch in (one, other):
        assert_counted(batch)
        assert statuses(batch) == ["succeeded"] * 3


@pytest.mark.parametrize("apart", [-50 * MINUTE, 50 * MINUTE], ids=["behind", "ahead"])
def test_the_clock_of_the_api_may_be_wrong(
    api: AnthropicSimulator, clock: Clock, apart: timedelta
) -> None:
    def accept(body: dict[str, Any]) -> BatchStep:
        clock.at += apart  # by which the API dates it
        return CutBeforeResponse(billed=True)

    api.batches.script("create", accept)
    batch = submit()
    start = clock.at
    work()
    clock.at = start

    later(clock, HOUR)
    later(clock)

    assert_settled(batch, api)


def test_a_list_that_cannot_be_read_keeps_it_held(api: AnthropicSimulator, clock: Clock) -> None:
    batch = uncertain(api)
    api.batches.script("list", Fail(status=500), CutBeforeResponse())

    later(clock, NEVER_TAKEN_AFTER + MINUTE)
    later(clock, 20 * MINUTE)
    assert state(batch) == "uncertain"
    assert now(batch).held_nanousd == batch.reserved_nanousd

    later(clock, 20 * MINUTE)
    later(clock)
    assert_settled(batch, api)


UNREADABLE: dict[str, BatchStep] = {
    "not found": Fail(status=404),
    "nothing in it": TruncateCleanly(after_events=0),
    "half a line": CutStream(after_events=0),
}


@pytest.mark.parametrize("step", UNREADABLE.values(), ids=UNREADABLE)
def test_results_that_cannot_be_read_may_be_its_own(
    api: AnthropicSimulator, clock: Clock, step: BatchStep
) -> None:
    """Nothing is given back for them, and nobody waits for them who can be found."""
    batch = uncertain(api)
    api.batches.script("results", step)

    later(clock, NEVER_TAKEN_AFTER + MINUTE)
    assert (state(batch), statuses(batch)) == ("uncertain", ["open"] * 3)

    later(clock, 20 * MINUTE)
    later(clock)
    assert_settled(batch, api)


# Looking after it -------------------------------------------------------------------------------


def test_it_is_looked_after_often_at_first_and_then_by_its_age(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.pace = Pace.never()
    batch = sent()
    waits = []

    for age in (10, 60, 600, 7_200):
        submission = submission_of(batch)
        assert submission.sent_at is not None
        clock.at = submission.sent_at + timedelta(seconds=age)
        BatchSubmission.objects.update(next_look_at=clock.at)
        work()
        look = submission_of(batch).next_look_at
        assert look is not None
        waits.append((look - clock.at).total_seconds())

    assert waits == [10, 10, 60, 300]
    assert statuses(batch) == ["open"] * 3


@pytest.mark.parametrize("step", [Fail(status=500), Fail(status=404), CutBeforeResponse()])
def test_a_look_that_fails_is_taken_again(
    api: AnthropicSimulator, clock: Clock, step: BatchStep
) -> None:
    batch = sent()
    api.batches.script("retrieve", step)

    later(clock)
    submission = submission_of(batch)
    assert (submission.status, submission.tries) == ("sent", 1)
    assert submission.error

    later(clock)
    assert submission_of(batch).error == ""
    assert_settled(batch, api)


def test_a_failure_that_has_passed_is_forgotten(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    batch = sent()
    api.batches.script("retrieve", Fail(status=500))

    later(clock)
    later(clock)

    submission = submission_of(batch)
    assert (submission.status, submission.tries, submission.error) == ("sent", 0, "")


# Reading the results ----------------------------------------------------------------------------

CUTS: dict[str, BatchStep] = {
    "cut": CutStream(after_events=2),
    "ended early": TruncateCleanly(after_events=2),
    "lines are missing": Results(omit=["?"]),
    "no connection": CutBeforeResponse(),
    "not now": Fail(status=500),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_came_of_the_results_is_booked_and_the_rest_is_read_again(
    api: AnthropicSimulator, clock: Clock, name: str
) -> None:
    batch = sent("one", "two", "three", on_result=TAKE)
    step = CUTS[name]
    if isinstance(step, Results):
        step = Results(omit=[items_of(batch)[0].custom_id])
    api.batches.script("results", step)

    later(clock)
    assert state(batch) == "ended"
    came = 0 if name in ("no connection", "not now") else 2
    assert statuses(batch).count("succeeded") == len(calls_of(batch)) == len(HANDED) == came
    assert_counted(batch)

    later(clock)
    assert sorted(it.key for it in HANDED) == ["0", "1", "2"]
    assert creations(api) == 1
    assert_settled(batch, api)


def test_results_are_read_in_chunks(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ROWS_AT_ONCE", 2)
    batch = sent(*map(str, range(5)))
    api.batches.script("results", CutStream(after_events=3), Results(times=2))

    later(clock)
    assert statuses(batch).count("succeeded") == 3
    later(clock)

    assert_settled(batch, api)


def test_lines_that_are_no_results_are_left_out(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sent("one", "two")
    parsed = batch_api.parsed
    odd = iter([b"", b"null", b"[1]", b'{"custom_id"', b"\xff"])
    monkeypatch.setattr(batch_api, "parsed", lambda line: parsed(next(odd, line)))
    api.batches.script("results", Results(times=4))

    later(clock)

    assert_settled(batch, api)


def test_a_line_ends_where_a_line_of_json_does(api: AnthropicSimulator, clock: Clock) -> None:
    """And not at what a text may hold, such as the separators of Unicode."""
    text = "a\u2028b\u2029c\x85d\x1ee\r\nf"
    api.batches.enqueue(Reply(text=text), Reply(text="\u2028"))

    batch = over(clock, "one", "two", on_result=TAKE)

    assert {it.key: it.text for it in HANDED} == {"0": text, "1": "\u2028"}
    assert_settled(batch, api)


def test_a_result_that_never_comes_is_held_until_the_deadline(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = sent("one", "two", on_result=TAKE)
    missing = items_of(batch)[0]
    api.batches.script("results", *[Results(omit=[missing.custom_id])] * 3)

    later(clock)
    later(clock)
    assert (state(batch), submission_of(batch).error) == ("ended", "results are missing")
    later(clock, 2 * DAY)

    assert statuses(batch) == ["expired", "succeeded"]
    assert [(it.key, it.status) for it in HANDED] == [("1", "succeeded"), ("0", "expired")]
    assert now(batch).status == "finished"
    booked = sum(call.cost_nanousd or 0 for call in calls_of(batch))
    assert now(batch).spent_nanousd == booked + missing.reserved_nanousd
    assert_counted(batch)


# Canceling --------------------------------------------------------------------------------------


def test_what_waits_is_released(api: AnthropicSimulator, clock: Clock) -> None:
    batch = submit(on_result=TAKE)

    batch.cancel()
    work()

    assert statuses(batch) == ["canceled"] * 3
    assert {it.status for it in HANDED} == {"canceled"}
    assert creations(api) == 0
    assert_settled(batch, api)


def test_what_the_api_has_is_canceled_there(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace(seconds=1_000_000, canceling=1_000_000, done=0.5)
    batch = sent("one", "two")

    batch.cancel()
    work()
    assert (state(batch), statuses(batch)) == ("canceling", ["open"] * 2)
    later(clock)
    assert state(batch) == "canceling"
    api.batches.end()
    later(clock)

    assert statuses(batch) == ["succeeded", "canceled"]
    assert sum(it.path.endswith("/cancel") for it in api.requests) == 1
    assert_settled(batch, api)


def test_what_has_ended_is_booked(api: AnthropicSimulator, clock: Clock) -> None:
    batch = sent()

    batch.cancel()
    work()

    assert statuses(batch) == ["succeeded"] * 3
    assert_settled(batch, api)


def test_what_ends_at_the_same_moment_is_booked(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    batch = sent()
    batch.cancel()

    def ended(body: dict[str, Any]) -> BatchStep:
        api.batches.end()
        return Reply()

    api.batches.script("cancel", ended)
    work()
    later(clock)

    assert statuses(batch) == ["succeeded"] * 3
    assert_settled(batch, api)


def test_a_cancellation_that_fails_is_sent_again(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace(seconds=1_000_000, done=0)
    batch = sent()
    api.batches.script("cancel", Fail(status=500))

    batch.cancel()
    work()
    assert state(batch) == "sent"
    later(clock)
    later(clock)

    assert statuses(batch) == ["canceled"] * 3
    assert_settled(batch, api)


def test_what_is_just_being_sent_is_canceled_afterwards(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.pace = Pace(seconds=1_000_000, done=0)
    batch = submit()
    canceling = BatchSubmission.objects.filter(batch=batch)

    with during(batch_api, "create", batch.cancel):
        work()
    assert state(batch) == "sent"
    assert canceling.get().cancel_requested
    later(clock)
    later(clock)

    assert statuses(batch) == ["canceled"] * 3
    assert_settled(batch, api)


def test_what_is_canceled_just_before_it_is_sent_is_not_sent(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()

    with during(steps, "_body", batch.cancel):
        work()
    assert state(batch) == "waiting"
    work()

    assert statuses(batch) == ["canceled"] * 3
    assert creations(api) == 0
    assert_settled(batch, api)


def test_a_cancellation_counts_before_anybody_is_told_to_look(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    asked = BatchSubmission.objects.filter(batch=batch)

    with during(steps, "_body", lambda: asked.update(cancel_requested=True)):
        work()
    work()

    assert statuses(batch) == ["canceled"] * 3
    assert creations(api) == 0


def test_what_is_uncertain_stays_held_until_it_is_found(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = uncertain(api)

    batch.cancel()
    work()
    work()

    assert statuses(batch) == ["succeeded"] * 3
    assert_settled(batch, api)


# Whose it is ------------------------------------------------------------------------------------


class during:  # noqa: N801 - reads as a sentence
    """Do something in the middle of a step: before what a function does there, the first time."""

    def __init__(self, owner: Any, name: str, do: Callable[[], object]) -> None:
        self.owner, self.name, self.do = owner, name, do
        self.done = False

    def __enter__(self) -> None:
        self.whole = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self._step)

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.whole)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.done:
            self.done = True
            self.do()
        return self.whole(*args, **kwargs)


def test_what_somebody_has_is_not_due(api: AnthropicSimulator, clock: Clock) -> None:
    batch = submit()
    submission = submission_of(batch)

    with during(steps, "_body", lambda: batches.advance(submission.pk)):
        batches.advance(submission.pk)
        assert batches.due() == []

    assert (state(batch), creations(api)) == ("sent", 1)


def test_the_longest_due_comes_first(api: AnthropicSimulator, clock: Clock) -> None:
    submissions = [submission_of(submit("one")) for _ in range(3)]
    for minutes, submission in zip((2, 3, 1), submissions, strict=True):
        submission.next_look_at = clock.at - minutes * MINUTE
        submission.save()

    first, second, third = submissions
    assert batches.due() == [second.pk, first.pk, third.pk]
    assert batches.due(most=1) == [second.pk]


def test_a_worker_that_was_too_slow_to_send_leaves_it_to_the_next(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()

    def another() -> None:
        clock.at += OVER
        work()

    with during(steps, "_body", another):
        batches.advance(submission_of(batch).pk)

    assert (state(batch), creations(api)) == ("sent", 1)
    assert submission_of(batch).next_look_at == clock.at + steps.FIRST_LOOK
    later(clock)
    assert_settled(batch, api)


def test_a_worker_that_was_too_slow_does_not_send_what_another_is_about_to(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()

    def claimed() -> None:
        clock.at += OVER
        BatchSubmission.objects.update(next_look_at=clock.at + LEASE)

    with during(steps, "_body", claimed):
        batches.advance(submission_of(batch).pk)

    assert (state(batch), creations(api)) == ("waiting", 0)
    assert submission_of(batch).next_look_at == clock.at + LEASE


def test_a_worker_whose_lease_lapsed_while_it_sent_still_says_what_came_of_it(
    api: AnthropicSimulator, clock: Clock
) -> None:
    api.batches.pace = Pace.never()
    batch = submit()
    create = batch_api.create

    def slow(body: bytes) -> str:
        api_id = create(body)
        later(clock, OVER)
        assert state(batch) == "uncertain"
        return api_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_api, "create", slow)
        batches.advance(submission_of(batch).pk)

    assert (state(batch), submission_of(batch).api_id) == ("sent", api.batches.ids[0])
    api.batches.end()
    later(clock)
    assert_settled(batch, api)


def test_what_a_worker_hears_too_late_does_not_undo_a_decision(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    api.batches.pace = Pace.never()
    batch = submit()
    create = batch_api.create

    def slow(body: bytes) -> str:
        api_id = create(body)
        later(clock, OVER)
        batches.release(submission_of(batch))
        return api_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_api, "create", slow)
        batches.advance(submission_of(batch).pk)

    assert (state(batch), statuses(batch)) == ("done", ["canceled"] * 3)
    assert f"as {api.batches.ids[0]}" in caplog.text
    assert_counted(batch)


def test_a_worker_whose_lease_lapsed_while_it_read_stops(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ai_budget")
    batch = sent(on_result=TAKE)

    def another() -> None:
        clock.at += OVER
        work()

    clock.at += MINUTE
    with during(steps, "hand_results", another):
        batches.advance(submission_of(batch).pk)

    assert "was taken over" in caplog.text
    assert state(batch) == "done"
    assert len(HANDED) == 3
    assert_settled(batch, api)


def test_an_outage_of_the_ledger_leaves_it_for_later(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sent()
    clock.at += MINUTE

    def away(*args: Any) -> Any:
        raise LedgerUnavailable("Away.")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_of_the_run(), "settle_parts", away)
        with pytest.raises(LedgerUnavailable):
            batches.advance(submission_of(batch).pk)
    assert statuses(batch) == ["open"] * 3
    assert batches.due() == []

    later(clock, OVER)
    assert_settled(batch, api)


def test_an_outage_after_it_was_sent_is_no_reason_to_send_it_again(
    api: AnthropicSimulator,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = submit()
    retry = connection.retry
    accepted = [False]

    def away(connection: Any, step: Any) -> Any:
        if api.batches.ids and not accepted[0]:
            accepted[0] = True
            raise LedgerUnavailable("Away.")
        return retry(connection, step)

    monkeypatch.setattr(steps, "retry", away)
    with pytest.raises(LedgerUnavailable):
        batches.advance(submission_of(batch).pk)
    assert (state(batch), f"as {api.batches.ids[0]}" in caplog.text) == ("sending", True)

    later(clock, OVER)
    work()

    assert creations(api) == 1
    assert_settled(batch, api)


def test_what_is_done_stays_done(api: AnthropicSimulator, clock: Clock) -> None:
    batch = over(clock)
    BatchSubmission.objects.update(next_look_at=clock.at)
    before = list(CallLog.objects.values())

    work()

    assert (state(batch), submission_of(batch).next_look_at) == ("done", None)
    assert list(CallLog.objects.values()) == before


def test_nothing_that_is_asked_or_answered_is_logged(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ai_budget")
    secret = "the secret of Mrs. Miller"
    api.batches.script("create", Fail(status=500, message=secret), Reply())
    api.batches.script("retrieve", Fail(status=400, message=secret))
    batch = submit(secret)
    work()
    batches.send_again(submission_of(batch))
    work()

    for _ in range(3):
        later(clock)

    assert "HTTP 500" in caplog.text
    assert secret not in caplog.text
    assert not BatchItem.objects.filter(error__contains="secret").exists()
    assert_settled(batch, api)
