"""What the items of a batch are booked at, whatever the API says of them, and how often."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import pytest

import ai_budget
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.guard.batch.results import settle_results
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, CallText, ModelRate
from ai_budget.pricing import rates
from ai_budget.testing import (
    AnthropicSimulator,
    Canceled,
    Errored,
    Expired,
    Pace,
    Reply,
    Results,
    override_budget,
)
from tests.batches.given import (
    DAY,
    FEATURE,
    MODEL,
    asked,
    assert_counted,
    assert_settled,
    bill,
    calls_of,
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
from tests.factories import HAIKU, SONNET, ModelRateFactory, UserFactory
from tests.whole.clocks import Clock

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    with standing_still() as clock:
        yield clock


def message(**fields: Any) -> dict[str, Any]:
    """An answer as the API gives it."""
    usage = {"input_tokens": 8, "output_tokens": 4, "service_tier": "batch"}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "fine"}],
        "stop_reason": "end_turn",
        "usage": usage,
        **fields,
    }


def lines_for(batch: Any, *results: Any) -> list[dict[str, Any]]:
    ids = [item.custom_id for item in items_of(batch)]
    return [{"custom_id": it, "result": found} for it, found in zip(ids, results, strict=True)]


def answered(**fields: Any) -> dict[str, Any]:
    return {"type": "succeeded", "message": message(**fields)}


# What an answer costs ---------------------------------------------------------------------------


def test_an_answer_costs_half_of_what_it_costs_at_once(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = over(clock)

    assert [call.cost_nanousd for call in calls_of(batch)] == [
        ai_budget.price(it.model, {**it.usage, "service_tier": "standard"}) // 2
        for it in api.billed
    ]
    assert_settled(batch, api)


@pytest.mark.parametrize("tier", [{}, {"service_tier": "standard"}, {"service_tier": "priority"}])
def test_whatever_the_answer_says_of_its_tier_it_costs_half(
    api: AnthropicSimulator, clock: Clock, tier: dict[str, str]
) -> None:
    batch = sent("one")
    usage = {"input_tokens": 80, "output_tokens": 40}

    settle_results(submission_of(batch), lines_for(batch, answered(usage={**usage, **tier})))

    (call,) = calls_of(batch)
    assert call.cost_nanousd == ai_budget.price(MODEL, usage) // 2


def test_each_answer_has_a_row_of_its_own(api: AnthropicSimulator, clock: Clock) -> None:
    batch = over(clock, "one", "two")

    calls = calls_of(batch)
    assert [(call.kind, call.status, call.attempt) for call in calls] == [
        ("batch", "settled", 0)
    ] * 2
    assert [call.reserved_nanousd for call in calls] == [
        item.reserved_nanousd for item in items_of(batch)
    ]
    assert {call.request_id for call in calls} == set(api.batches.ids)
    assert {call.stop_reason for call in calls} == {"end_turn"}
    row = reservation_of(batch)
    assert (row.status, row.cost_nanousd, row.reserved_nanousd) == ("released", 0, 0)
    assert site(batch).calls == 2


USAGES = {
    "cache reads": {"cache_read_input_tokens": 2_001},
    "cache writes": {
        "cache_creation_input_tokens": 301,
        "cache_creation": {"ephemeral_5m_input_tokens": 101, "ephemeral_1h_input_tokens": 200},
    },
    "thinking": {"output_tokens": 41, "output_tokens_details": {"thinking_tokens": 31}},
    "inference in the US": {"inference_geo": "us"},
    "searches": {"server_tool_use": {"web_search_requests": 3}},
    "an advisor": {
        "iterations": [
            {"type": "message", "input_tokens": 11, "output_tokens": 7},
            {"type": "advisor_message", "model": SONNET, "input_tokens": 5, "output_tokens": 3},
        ]
    },
}


@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES)
def test_every_kind_of_usage_is_priced_to_the_nano_dollar(
    api: AnthropicSimulator, clock: Clock, usage: dict[str, Any]
) -> None:
    api.batches.enqueue(Reply(usage=usage))

    batch = over(clock, asked("Hello"), max_tokens=5_000)

    (call,) = calls_of(batch)
    (billed,) = api.billed
    single = {**billed.usage, "service_tier": "standard", "server_tool_use": None}
    searches = 10_000_000 * (usage.get("server_tool_use") or {}).get("web_search_requests", 0)
    half = -(-ai_budget.price(MODEL, single) // 2)
    assert abs((call.cost_nanousd or 0) - half - searches) <= 1  # it is rounded up once
    assert_settled(batch, api)


def test_a_refusal_before_any_output_is_free(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Reply(stop_reason="refusal", content=[]), Reply(stop_reason="refusal"))

    batch = over(clock, "one", "two")

    free, paid = calls_of(batch)
    assert (free.status, free.cost_nanousd, free.saved_nanousd) == ("settled", 0, 0)
    assert paid.cost_nanousd == ai_budget.price(MODEL, api.billed[1].usage, batch=True)
    assert statuses(batch) == ["succeeded", "succeeded"]
    assert_counted(batch)


@pytest.mark.parametrize(
    "usage", [{"service_tier": "express"}, {"input_tokens": "8"}, {"iterations": [{"type": "new"}]}]
)
def test_usage_that_has_no_price_rule_is_booked_at_the_bound(
    api: AnthropicSimulator, clock: Clock, usage: dict[str, Any]
) -> None:
    batch = sent("one")

    settle_results(
        submission_of(batch),
        lines_for(batch, answered(usage={**message()["usage"], **usage})),
    )

    (call,) = calls_of(batch)
    assert (call.status, call.error) == ("estimated", "UnclassifiedUsage")
    assert call.cost_nanousd == call.reserved_nanousd == items_of(batch)[0].reserved_nanousd > 0
    assert statuses(batch) == ["succeeded"]
    assert_counted(batch)


UNREADABLE = [
    None,
    "fine",
    {},
    {"type": ["succeeded"]},
    {"type": "succeeded"},
    {"type": "succeeded", "message": "fine"},
    {"type": "succeeded", "message": {"usage": None}},
    {"type": "postponed", "message": {}},
]


@pytest.mark.parametrize("result", UNREADABLE, ids=str)
def test_a_result_that_cannot_be_read_is_booked_at_the_bound(
    api: AnthropicSimulator, clock: Clock, settings: Any, result: Any
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": True}
    batch = sent("one")

    settle_results(submission_of(batch), lines_for(batch, result))

    (call,) = calls_of(batch)
    assert (call.status, call.error) == ("estimated", "unreadable answer")
    assert call.cost_nanousd == items_of(batch)[0].reserved_nanousd
    assert CallText.objects.get().message in ("", '{"usage":null}')
    assert_counted(batch)


def test_a_cost_above_the_bound_is_booked_and_told(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    api.batches.enqueue(Reply(usage={"output_tokens": 500_000}))

    batch = over(clock, "one", "two")

    dear, _ = calls_of(batch)
    assert (dear.cost_nanousd or 0) > items_of(batch)[0].reserved_nanousd
    assert "was too low" in caplog.text
    assert_settled(batch, api)


def test_a_fallback_is_paid_at_its_own_price(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Reply(model=SONNET), Reply(model="a-name-of-its-own"))

    batch = over(
        clock,
        asked("one", fallbacks=[{"model": SONNET}]),
        asked("two"),
    )

    fallback, alias = calls_of(batch)
    assert fallback.cost_nanousd == ai_budget.price(SONNET, api.billed[0].usage, batch=True)
    assert alias.cost_nanousd == ai_budget.price(MODEL, api.billed[1].usage, batch=True)
    assert_counted(batch)


# What it saved ----------------------------------------------------------------------------------


def test_what_the_batch_saves_is_noted(api: AnthropicSimulator, clock: Clock) -> None:
    batch = over(clock, "one")

    (call,) = calls_of(batch)
    single = {**api.billed[0].usage, "service_tier": "standard"}
    assert call.saved_nanousd == ai_budget.price(MODEL, single) - (call.cost_nanousd or 0) > 0
    assert call.saved_reason == "batch"


def test_the_prompt_cache_and_the_ladder_save_too(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Reply(usage={"cache_read_input_tokens": 2_000}))

    with override_budget(FEATURE, monthly_limit_usd="0.01", rungs=[(1, HAIKU)]):
        ai_budget.ask("Begin.", feature=FEATURE, model=SONNET, max_tokens=50)
        batch = over(clock, asked("one"), model=SONNET, max_tokens=200)

    (call,) = calls_of(batch)
    billed = api.billed[-1]
    assert (call.requested_model, call.model) == (SONNET, HAIKU)
    uncached = billed.usage["input_tokens"] + 2_000
    plain = {"input_tokens": uncached, "output_tokens": billed.usage["output_tokens"]}
    assert call.saved_nanousd == ai_budget.price(SONNET, plain) - (call.cost_nanousd or 0)
    assert call.saved_reason == "batch, prompt cache, downgrade"


# What costs nothing -----------------------------------------------------------------------------


def test_what_was_not_answered_is_released(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Errored(), Reply(), Canceled(), Expired())

    batch = over(clock, "one", "two", "three", "four")

    assert statuses(batch) == ["errored", "succeeded", "canceled", "expired"]
    assert len(calls_of(batch)) == 1
    assert site(batch).calls == 1
    assert_settled(batch, api)


def test_an_error_is_known_by_its_type_alone(
    api: AnthropicSimulator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its message may quote the prompt."""
    caplog.set_level(logging.DEBUG, "ai_budget")
    secret = "the secret of Mrs. Miller"
    api.batches.enqueue(
        Errored(error_type="invalid_request_error", message=f"messages: {secret!r} is too long")
    )

    batch = over(clock, "one")

    (item,) = items_of(batch)
    assert (item.status, item.error) == ("errored", "invalid_request_error")
    assert secret not in caplog.text
    assert not CallText.objects.filter(message__contains=secret).exists()
    assert [result.error for result in batch.results()] == ["invalid_request_error"]


# When and by which prices -----------------------------------------------------------------------


def test_prices_are_those_of_the_reservation(api: AnthropicSimulator, clock: Clock) -> None:
    batch = sent("one")
    expected = bill(api)
    ModelRateFactory.create(model=MODEL, input_usd=900, output_usd=900, valid_from=clock.at - DAY)
    rates.forget()
    assert bill(api) > expected

    later(clock)

    (call,) = calls_of(batch)
    assert call.cost_nanousd == expected
    assert ModelRate.objects.exists()
    assert_counted(batch)


def test_an_item_belongs_to_the_day_and_month_of_its_reservation(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    clock.at = datetime(2026, 5, 31, 23, 50, tzinfo=UTC)
    batch = sent("one", "two")

    settings.AI_BUDGET = {**settings.AI_BUDGET, "TIME_ZONE": "Asia/Tokyo"}
    clock.at = datetime(2026, 6, 1, 3, tzinfo=UTC)
    work()

    assert {call.day for call in calls_of(batch)} == {date(2026, 5, 31)}
    assert {call.reserved_at for call in calls_of(batch)} == {batch.reserved_at}
    assert site(batch).spent_nanousd == bill(api)
    assert ledgers.current().differences(date(2026, 5, 1)) == []
    assert_settled(batch, api)


def test_a_feature_that_was_paused_meanwhile_gets_its_results(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = sent()

    with override_budget(FEATURE, enabled=False):
        later(clock)

    assert statuses(batch) == ["succeeded"] * 3
    assert_settled(batch, api)


def test_a_user_who_is_deleted_meanwhile_is_booked_all_the_same(
    api: AnthropicSimulator, clock: Clock
) -> None:
    user = UserFactory.create()
    pk = user.pk
    batch = sent(user=user)

    user.delete()
    later(clock)

    assert {call.user_id for call in calls_of(batch)} == {pk}
    assert_settled(batch, api)


# Once, however often they come ------------------------------------------------------------------


def test_results_that_come_twice_are_booked_once(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.script("results", Results(times=3))

    batch = over(clock)

    assert len(calls_of(batch)) == 3
    assert_settled(batch, api)


def test_of_two_results_for_one_item_one_is_booked(api: AnthropicSimulator, clock: Clock) -> None:
    batch = sent("one", "two")
    first, second = items_of(batch)
    twice = [
        {"custom_id": first.custom_id, "result": answered()},
        {"custom_id": first.custom_id, "result": {"type": "errored"}},
    ]

    (booked,) = settle_results(submission_of(batch), twice)
    assert settle_results(submission_of(batch), twice) == []

    assert booked.item.pk == first.pk
    assert statuses(batch)[1] == "open"
    assert now(batch).held_nanousd == second.reserved_nanousd
    assert_counted(batch)


def test_what_is_over_stays_as_it_is(api: AnthropicSimulator, clock: Clock) -> None:
    batch = sent("one")
    settle_results(submission_of(batch), lines_for(batch, {"type": "expired"}))

    assert settle_results(submission_of(batch), lines_for(batch, answered())) == []

    assert statuses(batch) == ["expired"]
    assert_counted(batch)


def test_lines_of_others_change_nothing(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.pace = Pace.never()
    mine, other = sent("one"), sent("two")

    lines = [
        *lines_for(other, answered()),
        {"custom_id": "nobody", "result": answered()},
        {"custom_id": items_of(mine)[0].custom_id.upper(), "result": answered()},
        {"result": answered()},
        {},
    ]
    assert settle_results(submission_of(mine), lines) == []

    assert statuses(mine) == statuses(other) == ["open"]
    assert not calls_of(mine)
    assert_counted(mine)


def test_a_chunk_that_cannot_be_booked_is_not_booked_in_part(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sent("one", "two")
    lines = lines_for(batch, answered(), {"type": "errored"})

    with monkeypatch.context() as broken:
        broken.setattr("ai_budget.ledger.parts._take_from", unavailable)
        with pytest.raises(LedgerUnavailable):
            settle_results(submission_of(batch), lines)
    assert statuses(batch) == ["open", "open"]
    assert_counted(batch)

    assert len(settle_results(submission_of(batch), lines)) == 2
    assert_counted(batch)


def unavailable(*args: Any) -> None:
    raise LedgerUnavailable("Away.")


# Texts ------------------------------------------------------------------------------------------


def test_of_an_answered_item_no_text_is_kept(api: AnthropicSimulator, clock: Clock) -> None:
    api.batches.enqueue(Reply(), Errored())

    batch = over(clock, "one", "two")

    (kept,) = CallText.objects.all()
    assert kept.call_id == items_of(batch)[1].call_id
    assert "two" in kept.request
    assert kept.message == ""


def test_texts_are_kept_where_the_settings_say_so(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": True}
    api.batches.enqueue(Reply(text="fine, \x00\udcff"))

    batch = over(clock, "one")

    kept = CallText.objects.get(call_id=items_of(batch)[0].call_id)
    assert "one" in kept.request
    assert "fine" in kept.message


def test_a_batch_without_a_reservation_has_nothing_to_book(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit("one")
    CallLog.objects.all().delete()

    assert settle_results(submission_of(batch), lines_for(batch, answered())) == []
