"""Every booking is one line of the log, whoever makes it, and says nothing of the prompt."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import logging
import re
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import anthropic
import pytest
from django.core.management import call_command

import ai_budget
from ai_budget import batches, periods
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger.base import Ledger
from ai_budget.metrics import log as lines_module
from ai_budget.metrics.log import PREFIX, fields, write_line
from ai_budget.models import Batch, CallLog
from ai_budget.testing import AnthropicSimulator, Errored, Fail, Hang, Pace, Reply, override_budget
from ai_budget.values import Amounts, Charge, Reservation
from tests.batches.given import (
    DAY,
    HOUR,
    MINUTE,
    MODEL,
    items_of,
    later,
    over,
    sent,
    standing_still,
    submit,
    work,
)
from tests.factories import UserFactory
from tests.guard.books import QUESTION, ledger_of_the_run, only_row, rows
from tests.ledger.given import CHAT, NOON, attempt, limit, reserve, settle, settled
from tests.metrics.conftest import Lines

pytestmark = pytest.mark.django_db

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
CACHED: dict[str, Any] = {"cache_scope": "shared"}


def a_line(charge: Charge = CHAT) -> dict[str, Any]:
    reservation = Reservation(
        id=1, attempt=attempt(charge), amounts=Amounts(nanousd=10), balances=()
    )
    return fields(reservation, settled(7))


# What a line says --------------------------------------------------------------------------------


def test_a_call_is_a_line_that_says_what_its_row_says(
    api: AnthropicSimulator, lines: Lines
) -> None:
    user: Any = UserFactory()
    with ai_budget.charge(tags={"plan": "free"}):
        ai_budget.ask("Hello", feature="chat", user=user, subject="acme", model=MODEL)

    row, line = only_row(), lines.only
    assert row.cost_nanousd
    assert line["call_id"] == str(row.call_id)
    assert line["reservation"] == row.pk
    assert (line["feature"], line["subject"], line["tags"]) == ("chat", "acme", {"plan": "free"})
    assert str(line["user_id"]) == str(user.pk)
    same = [
        "attempt",
        "status",
        "kind",
        "category",
        "provider",
        "model",
        "requested_model",
        "decision",
        "cost_nanousd",
        "reserved_nanousd",
        "saved_nanousd",
        "saved_reason",
        "input_tokens",
        "cache_write_5m_tokens",
        "cache_write_1h_tokens",
        "cache_read_tokens",
        "output_tokens",
        "thinking_tokens",
        "web_searches",
        "max_tokens",
        "service_tier",
        "speed",
        "inference_geo",
        "stop_reason",
        "request_id",
        "latency_ms",
        "first_token_ms",
        "error",
    ]
    assert {name: line[name] for name in same} == {name: getattr(row, name) for name in same}
    assert line["reserved_at"] == row.reserved_at.isoformat()
    assert line["downgraded"] is False


def test_dollars_are_a_text_and_exact(api: AnthropicSimulator, lines: Lines) -> None:
    ai_budget.ask("Hello", feature="chat", model=MODEL)

    assert re.fullmatch(r"0\.\d{9}", lines.only["cost_usd"])
    assert ai_budget.money.parse_usd(lines.only["cost_usd"]) == lines.only["cost_nanousd"]


def test_a_line_is_for_people_too(api: AnthropicSimulator, lines: Lines) -> None:
    ai_budget.ask("Hello", feature="chat", model=MODEL)

    (record,) = lines.records
    assert re.fullmatch(rf"chat ask: {MODEL} settled for \$0\.\d{{6}}", record.getMessage())
    assert (record.name, record.levelno) == ("ai_budget.calls", logging.INFO)


def test_nothing_of_prompt_answer_or_key_is_in_it(api: AnthropicSimulator, lines: Lines) -> None:
    api.enqueue(Reply(text="the answer is hunter2"))
    ai_budget.ask("my password is hunter2", feature="chat", system="hunter2 is secret")

    (record,) = lines.records
    assert "hunter2" not in str(vars(record))
    assert "test-key" not in str(vars(record))


def test_no_field_is_one_of_the_record_itself() -> None:
    record = logging.LogRecord("name", logging.INFO, "path", 1, "", (), None)
    names = {PREFIX + name for name in a_line()}

    assert names.isdisjoint({*vars(record), "message", "asctime"})


@pytest.mark.parametrize("user_id", [None, 7, uuid.UUID(int=7)])
def test_every_field_is_what_json_has(user_id: Any) -> None:
    line = a_line(Charge(feature="chat", user_id=user_id))

    assert json.loads(json.dumps(line)) == line
    assert not any(isinstance(value, float) for value in line.values())


def test_every_field_is_documented_and_no_other() -> None:
    section = DOCS.read_text(encoding="utf-8").split("## Prometheus")[0]
    table = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `ai_budget_")]
    documented = re.findall(r"`ai_budget_(\w+)`", " ".join(table))

    assert sorted(documented) == sorted(a_line())


def test_where_nobody_listens_it_is_not_even_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines_module, "fields", lambda *_: pytest.fail("put together"))

    write_line(reservation=None, settlement=None)  # type: ignore[arg-type]


# Which bookings have one -------------------------------------------------------------------------


def test_each_attempt_of_a_call_has_its_own(
    client: anthropic.Anthropic, api: AnthropicSimulator, lines: Lines
) -> None:
    api.enqueue(Fail(status=529, retry_after=0.001))
    client.messages.create(**QUESTION)

    first, second = lines
    assert first["call_id"] == second["call_id"]
    assert [first["attempt"], second["attempt"]] == [0, 1]
    assert (first["status"], first["cost_nanousd"], first["error"]) == ("settled", 0, "HTTP 529")
    assert second["cost_nanousd"] == rows()[1].cost_nanousd


def test_a_request_that_never_left_is_released(lines: Lines, settings: Any) -> None:
    nobody = "http://127.0.0.1:9"
    settings.AI_BUDGET = {**settings.AI_BUDGET, "BASE_URL": nobody}
    with (
        anthropic.Anthropic(api_key="key", base_url=nobody, max_retries=0) as bare,
        pytest.raises(anthropic.APIConnectionError),
    ):
        ai_budget.guard(bare, feature="chat").messages.create(**QUESTION)

    assert (lines.only["status"], lines.only["error"]) == ("released", "APIConnectionError")


def test_an_answer_that_never_came_is_estimated(api: AnthropicSimulator, lines: Lines) -> None:
    api.enqueue(Hang(seconds=30))
    with (
        anthropic.Anthropic(api_key="key", base_url=api.base_url, max_retries=0) as bare,
        pytest.raises(anthropic.APITimeoutError),
    ):
        ai_budget.guard(bare, feature="chat").messages.create(**QUESTION, timeout=0.05)

    assert lines.only["status"] == "estimated"
    assert lines.only["cost_nanousd"] == lines.only["reserved_nanousd"] > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_has_one_however_it_ends(
    client: anthropic.Anthropic, lines: Lines, whole: bool
) -> None:
    with client.messages.stream(**QUESTION) as stream:
        for _ in stream:
            if not whole:
                break

    assert lines.statuses == ["settled" if whole else "estimated"]


@pytest.mark.django_db(transaction=True)
async def test_so_has_one_that_is_read_by_async_code(api: AnthropicSimulator, lines: Lines) -> None:
    async with ai_budget.astream("Hello", feature="chat", model=MODEL) as answer:
        async for _ in answer:
            pass

    assert (lines.only["status"], lines.only["kind"]) == ("settled", "stream")


@pytest.mark.parametrize("counts", [False, True])
def test_an_answer_from_the_cache_has_one(
    api: AnthropicSimulator, lines: Lines, counts: bool
) -> None:
    with override_budget("chat", cache_scope="shared", cache_counts=counts):
        asked = ai_budget.ask("Hello", feature="chat", model=MODEL)
        ai_budget.ask("Hello", feature="chat", model=MODEL)

    _, line = lines
    assert (line["status"], line["cost_nanousd"]) == ("cached", 0)
    assert line["saved_nanousd"] == asked.cost_nanousd
    assert bool(line["reservation"]) is counts


def test_a_refusal_has_none(api: AnthropicSimulator, lines: Lines) -> None:
    with override_budget("chat", daily_limit_usd=0), pytest.raises(ai_budget.BudgetExceeded):
        ai_budget.ask("Hello", feature="chat")

    assert lines.statuses == []


def test_what_could_not_be_booked_has_one_when_the_tick_books_it(
    api: AnthropicSimulator, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> None:
        raise LedgerUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_of_the_run(), "settle", away)
        ai_budget.ask("Hello", feature="chat", model=MODEL)
    assert lines.statuses == []

    late = only_row().deadline + timedelta(hours=1)
    with periods.override_clock(lambda: late):
        call_command("ai_budget_tick")
        call_command("ai_budget_tick")

    row = only_row()
    assert (lines.only["status"], lines.only["error"]) == ("estimated", "deadline passed")
    assert lines.only["call_id"] == str(row.call_id)
    assert (lines.only["reservation"], lines.only["feature"]) == (row.pk, "chat")
    assert lines.only["cost_nanousd"] == row.cost_nanousd


def test_the_tick_tells_nothing_of_what_others_have_booked(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with periods.override_clock(lambda: NOON):
        reservation = reserve([limit(None)], 100)
    whole = ledger_of_the_run().settle_overdue

    def after_its_own_worker(self: Ledger, **options: Any) -> int:
        settle(reservation, settled(7))
        return whole(self, **options)

    monkeypatch.setattr(ledger_of_the_run(), "settle_overdue", after_its_own_worker)
    with periods.override_clock(lambda: NOON + timedelta(hours=1)):
        call_command("ai_budget_tick")

    assert only_row().status == "settled"
    assert lines.statuses == []


# Batches -----------------------------------------------------------------------------------------


def test_each_item_of_a_batch_has_one(api: AnthropicSimulator, lines: Lines) -> None:
    api.batches.enqueue(Reply(), Errored(), Reply())
    with standing_still() as clock:
        batch = over(clock)
        for _ in range(2):
            later(clock, HOUR)

    assert lines.statuses == ["settled", "released", "settled"]
    assert [line["call_id"] for line in lines] == [str(it.call_id) for it in items_of(batch)]
    assert {line["kind"] for line in lines} == {"batch"}
    assert sum(line["cost_nanousd"] for line in lines) == batch.spent_nanousd > 0
    held = [item.reserved_nanousd for item in items_of(batch)]
    assert [line["reserved_nanousd"] for line in lines] == held


@pytest.mark.parametrize("counts", [False, True])
def test_so_has_one_that_the_cache_answers(
    api: AnthropicSimulator, lines: Lines, counts: bool
) -> None:
    with override_budget("chat", cache_scope="shared", cache_counts=counts):
        ai_budget.ask("Hello", feature="chat", model=MODEL, max_tokens=50)
        batch = submit("Hello", "Hello", feature="chat")
        batches.tidy()

    assert lines.statuses == ["settled", "cached", "cached"]
    assert [line["call_id"] for line in lines][1:] == [str(it.call_id) for it in items_of(batch)]


def test_a_batch_that_is_given_up_is_one_and_the_truth_one_for_each_item(
    api: AnthropicSimulator, lines: Lines
) -> None:
    api.batches.pace = Pace.never()
    with standing_still() as clock:
        batch = sent("one", "two")
        later(clock, 2 * DAY + MINUTE)
        given_up = Batch.objects.get(pk=batch.pk).spent_nanousd

        (line,) = lines
        assert (line["status"], line["call_id"]) == ("estimated", str(batch.call_id))
        assert line["cost_nanousd"] == given_up > 0

        api.batches.end()
        later(clock, 2 * HOUR)

    assert lines.statuses == ["estimated", "settled", "settled"]
    assert {line["reservation"] for line in lines} == {line["reservation"]}


def test_a_batch_that_was_never_sent_is_one(
    api: AnthropicSimulator, lines: Lines, client: anthropic.Anthropic
) -> None:
    api.batches.script("create", Fail(status=400))
    with pytest.raises(anthropic.BadRequestError):
        client.messages.batches.create(requests=[{"custom_id": "one", "params": QUESTION}])  # type: ignore[typeddict-item]

    assert (lines.only["status"], lines.only["error"]) == ("released", "not sent")


def test_every_row_that_is_over_has_a_line(api: AnthropicSimulator, lines: Lines) -> None:
    with override_budget("chat", **CACHED), standing_still() as clock:
        for prompt in ("one", "one", "two"):
            ai_budget.ask(prompt, feature="chat", model=MODEL, max_tokens=50)
        submit("one", "three", feature="chat")
        work()
        later(clock)

    journal = CallLog.objects.exclude(call_id=Batch.objects.get().call_id)
    booked = {(str(row.call_id), row.attempt, row.status, row.cost_nanousd) for row in journal}
    told = [
        (line["call_id"], line["attempt"], line["status"], line["cost_nanousd"]) for line in lines
    ]
    assert len(told) == len(booked) == 5
    assert set(told) == booked
