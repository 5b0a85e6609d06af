"""Results: read in order by whoever asks, and handed to the callback of their batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

import ai_budget
from ai_budget import batches
from ai_budget.batches import handing
from ai_budget.batches.ending import HANDED_WITHIN
from ai_budget.batches.steps import MOST_TRIES
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.batch.api import as_message
from ai_budget.guard.batch.rows import LEASE
from ai_budget.guard.charge import OpenCall
from ai_budget.models import Batch, BatchItem, CallText
from ai_budget.signals import batch_finished
from ai_budget.testing import (
    AnthropicSimulator,
    Canceled,
    CutStream,
    Errored,
    Expired,
    Fail,
    Pace,
    Reply,
    override_budget,
)
from ai_budget.values import Kind
from tests.batches.given import (
    FEATURE,
    HANDED,
    MINUTE,
    MODEL,
    OVER,
    TAKE,
    assert_settled,
    calls_of,
    later,
    now,
    over,
    sent,
    standing_still,
    statuses,
    submission_of,
    submit,
    work,
)
from tests.whole.clocks import Clock

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    FAILING.clear()
    with standing_still() as clock:
        yield clock


@pytest.fixture(params=[True, False], ids=["stored", "not stored"])
def stored(request: pytest.FixtureRequest, settings: Any) -> bool:
    """Whether texts are kept."""
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": request.param}
    return bool(request.param)


FAILING: list[str] = []
"""The keys of the results that ``fail_for_some`` does not take."""


def fail_for_some(result: batches.Result) -> None:
    HANDED.append(result)
    if result.key in FAILING:
        raise ValueError(result.text)


SOME_FAIL = f"{__name__}.fail_for_some"


def ask_claude(result: batches.Result) -> None:
    HANDED.append(result)
    messages: Any = [{"role": "user", "content": f"Translate: {result.text}"}]
    client = ai_budget.client(feature="translations")
    client.messages.create(model=MODEL, max_tokens=50, messages=messages)


# Read -------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_requests(
    api: AnthropicSimulator, clock: Clock, stored: bool
) -> None:
    api.batches.enqueue(*(Reply(text=f"answer {n}") for n in range(9)))

    batch = over(clock, *((f"id {n}", f"question {n}") for n in range(9)))

    found = list(batch.results())
    assert [result.key for result in found] == [f"id {n}" for n in range(9)]
    assert [result.text for result in found] == [f"answer {n}" for n in range(9)]
    assert [result.cost_nanousd for result in found] == [it.cost_nanousd for it in calls_of(batch)]
    assert sum(result.cost for result in found) == batch.spent_usd
    assert {result.status for result in found} == {"succeeded"}
    assert stored == CallText.objects.exists()


def test_every_submission_has_its_own(
    api: AnthropicSimulator, clock: Clock, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_BYTES", 1)
    monkeypatch.setattr("ai_budget.batches.rows.ROWS_AT_ONCE", 2)
    api.batches.enqueue(*(Reply(text=f"answer {n}") for n in range(3)))

    batch = over_all(clock, submit())

    assert [result.text for result in batch.results()] == [f"answer {n}" for n in range(3)]


def over_all(clock: Clock, batch: Batch) -> Batch:
    for _ in range(3):
        later(clock)
    assert now(batch).status == "finished"
    return now(batch)


def test_more_answers_than_memory_is_given_to_are_read(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handing, "_IN_MEMORY", 10)
    api.batches.enqueue(*(Reply(text=f"Zeile {n}\n\u2028ü") for n in range(3)))

    batch = over(clock)

    assert [result.text for result in batch.results()] == [f"Zeile {n}\n\u2028ü" for n in range(3)]


def test_what_has_no_answer_says_why(api: AnthropicSimulator, clock: Clock, stored: bool) -> None:
    api.batches.enqueue(Errored(error_type="overloaded_error"), Canceled(), Expired(), Reply())

    batch = over(clock, "one", "two", "three", "four")

    assert [(it.status, it.error, it.ok, it.message is None) for it in batch.results()] == [
        ("errored", "overloaded_error", False, True),
        ("canceled", "", False, True),
        ("expired", "", False, True),
        ("succeeded", "", True, False),
    ]


def test_what_is_not_over_is_open(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    batch = sent("one")

    (result,) = batch.results()

    assert (result.status, result.text, result.ok, result.cost_nanousd) == ("open", "", False, 0)


def test_what_the_api_has_forgotten_has_no_message(api: AnthropicSimulator, clock: Clock) -> None:
    batch = over(clock)
    api.batches.script("retrieve", Fail(status=404))

    found = list(batch.results())

    assert [(it.key, it.ok, it.text, it.message) for it in found] == [
        (str(n), True, "", None) for n in range(3)
    ]
    assert all(result.cost_nanousd > 0 for result in found)


def test_results_that_cannot_be_read_now_are_an_error(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """An answer that is there must not look like one that is gone."""
    batch = over(clock)
    api.batches.script("results", CutStream(after_events=1))

    with pytest.raises(AIBudgetError, match="cannot be read now"):
        list(batch.results())

    assert all(result.text for result in batch.results())


def test_a_result_shows_no_text_where_it_is_logged(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Reply(text="the secret of Mrs. Miller"))

    (result,) = over(clock, "one").results()

    assert result.text == "the secret of Mrs. Miller"
    assert "Miller" not in repr(result)


def test_what_is_odd_about_a_message_is_no_reason_to_fail() -> None:
    odd = as_message({"id": "msg_1", "content": None})
    mixed = as_message({"content": [{"type": "text", "text": "a"}, {"type": "new"}]})
    fields: Any = {"key": "0", "status": "succeeded", "call_id": None, "model": "m"}

    assert batches.Result(message=odd, **fields).text == ""
    assert batches.Result(message=mixed, **fields).text == "a"


def test_an_answer_from_the_cache_is_a_result(
    api: AnthropicSimulator, clock: Clock, stored: bool
) -> None:
    with override_budget(FEATURE, cache_scope="shared"):
        answer = ai_budget.ask("one", feature=FEATURE, model="claude-haiku-5-5", max_tokens=50)
        batch = submit("one", "two", on_result=TAKE)
        later(clock)
        later(clock)

    assert statuses(batch) == ["cached", "succeeded"]
    assert sorted((it.key, it.ok, it.text != "") for it in HANDED) == [
        ("0", True, True),
        ("1", True, True),
    ]
    assert {it.key: it.text for it in HANDED}["0"] == answer.text
    assert CallText.objects.count() == (2 if stored else 0)


# Handed on --------------------------------------------------------------------------------------


def test_the_callback_has_every_result_once(
    api: AnthropicSimulator, clock: Clock, stored: bool
) -> None:
    api.batches.enqueue(Reply(text="fine"), Errored(), Expired())

    batch = over(clock, ("a", "one"), ("b", "two"), ("c", "three"), on_result=TAKE)
    for _ in range(3):
        later(clock)

    assert sorted((it.key, it.status, it.text) for it in HANDED) == [
        ("a", "succeeded", "fine"),
        ("b", "errored", ""),
        ("c", "expired", ""),
    ]
    assert {it.key: it.cost_nanousd for it in HANDED}["a"] == now(batch).spent_nanousd
    assert not BatchItem.objects.filter(handed=False).exists()


def test_a_callback_that_fails_is_called_again_with_what_it_did_not_take(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    FAILING.append("1")
    batch = over(clock, on_result=SOME_FAIL)
    assert (submission_of(batch).status, batch.status) == ("ended", "open")
    assert batch.held_nanousd == 0  # it is booked all the same
    FAILING.clear()

    later(clock)

    assert sorted(it.key for it in HANDED) == ["0", "1", "1", "2"]
    assert "ValueError" in caplog.text
    assert HANDED[0].text not in caplog.text
    assert_settled(batch, api)


def test_a_batch_is_not_finished_before_its_last_result_is_taken(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.batch.preparing.MOST_BYTES", 1)
    FAILING.append("0")
    batch = submit("one", "two", on_result=SOME_FAIL)
    work()

    later(clock)
    assert statuses(batch) == ["succeeded"] * 2
    assert [it.status for it in batch.submissions.order_by("number")] == ["ended", "done"]
    assert now(batch).status == "open"
    FAILING.clear()
    later(clock)

    assert_settled(batch, api)


def test_a_callback_that_fails_on_and_on_is_given_up(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    FAILING.append("0")
    api.batches.enqueue(Errored())
    batch = sent("one", "two", on_result=SOME_FAIL)
    api.batches.script("results", *[Fail(status=500)] * 3)

    for _ in range(20):
        later(clock, 20 * MINUTE)

    assert sum(it.key == "0" for it in HANDED) == MOST_TRIES
    assert sum(it.key == "1" for it in HANDED) == 1
    assert "has not taken all results" in caplog.text
    assert now(batch).told_at is not None
    assert_settled(batch, api)


def test_a_callback_that_fails_for_what_was_never_sent_is_called_again(
    api: AnthropicSimulator, clock: Clock
) -> None:
    told: list[Batch] = []
    batch_finished.connect(hear := lambda batch, **kwargs: told.append(batch))
    FAILING.append("0")
    batch = submit("one", "two", on_result=SOME_FAIL)
    batch.cancel()

    work()
    assert (now(batch).status, told) == ("finished", [])
    later(clock, MINUTE)
    assert [it.key for it in HANDED] == ["0", "1"]
    FAILING.clear()
    later(clock, LEASE)

    assert [it.key for it in HANDED] == ["0", "1", "0"]
    assert told == [batch]
    batch_finished.disconnect(hear)


def test_it_is_called_ever_less_often_and_then_no_more(
    api: AnthropicSimulator, clock: Clock
) -> None:
    FAILING.append("0")
    batch = submit("one", on_result=SOME_FAIL)
    batch.cancel()
    called = []

    for minute in range(200):
        before = len(HANDED)
        later(clock, MINUTE)
        if len(HANDED) > before:
            called.append(minute)

    assert called == [0, 5, 10, 20, 40, 80]
    finished = now(batch)
    assert finished.told_at is not None
    assert finished.finished_at is not None
    assert HANDED_WITHIN <= finished.told_at - finished.finished_at <= 2 * HANDED_WITHIN


def test_a_callback_that_is_no_more_holds_no_money_up(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    batch = sent(on_result=TAKE)
    Batch.objects.update(on_result="shop.gone.take")

    for _ in range(20):
        later(clock, 20 * MINUTE)

    assert "dotted path" in caplog.text
    assert_settled(batch, api)


def test_a_callback_may_ask_claude_itself(api: AnthropicSimulator, clock: Clock) -> None:
    """What it asks is a call of its own, whatever its worker is in the middle of."""
    with OpenCall(kind=Kind.ASK) as call:
        batch = over(clock, "one", on_result=f"{__name__}.ask_claude")

    assert call.settled == []
    assert len(HANDED) == 1
    (asked,) = [it for it in api.billed if it.usage.get("service_tier") != "batch"]
    assert now(batch).spent_nanousd == ai_budget.price(
        api.billed[0].model, api.billed[0].usage, batch=True
    )
    spent = ai_budget.usage(feature="translations").day.balance.spent_nanousd
    assert spent == ai_budget.price(asked.model, asked.usage)


def test_a_worker_that_dies_in_a_callback_is_followed_by_another(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sent(on_result=SOME_FAIL)
    clock.at += MINUTE

    class Killed(BaseException):
        pass

    def die(item: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(handing, "_note_handed", die)
        with pytest.raises(Killed):
            work()
    assert statuses(batch) == ["succeeded"] * 3
    later(clock, OVER)

    assert sorted(it.key for it in HANDED) == ["0", "0", "1", "1", "2", "2"]
    assert_settled(batch, api)


def test_a_slow_callback_keeps_its_submission(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each result takes it a minute, and all of them longer than a lease."""
    monkeypatch.setattr(handing, "NOTED_EVERY", -1)
    batch = sent(*map(str, range(8)), on_result=f"{__name__}.take_slowly")
    SLOWLY.clock = clock

    later(clock)

    assert len(HANDED) == 8
    assert_settled(batch, api)


def test_a_slow_callback_keeps_what_it_is_told_in_the_end(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handing, "NOTED_EVERY", -1)
    batch = submit(*map(str, range(8)), on_result=f"{__name__}.take_slowly")
    SLOWLY.clock = clock
    batch.cancel()

    work()

    assert [it.key for it in HANDED] == list(map(str, range(8)))
    assert now(batch).told_at == clock.at


class SLOWLY:
    clock: Clock


def take_slowly(result: batches.Result) -> None:
    HANDED.append(result)
    SLOWLY.clock.at += timedelta(seconds=60)
    work()  # as another worker would, in the meantime


def test_what_a_callback_is_told_is_not_logged(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ai_budget")
    FAILING.append("0")
    api.batches.enqueue(Reply(text="the secret of Mrs. Miller"))

    over(clock, "one", on_result=SOME_FAIL)

    assert HANDED[0].text == "the secret of Mrs. Miller"
    assert "failed: ValueError" in caplog.text
    assert "Miller" not in caplog.text
