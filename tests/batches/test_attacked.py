"""What was thought of to make batches spend twice, lose money or keep it held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anthropic
import pytest
from django.core.management import call_command
from django.db import OperationalError

import ai_budget
from ai_budget import batches
from ai_budget.batches import ending, steps
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError, LedgerUnavailable
from ai_budget.guard.batch import api as api_of_batches
from ai_budget.guard.batch import opening as openings
from ai_budget.guard.batch.through_client import ClientBatch
from ai_budget.guard.charge import charge, current_payer
from ai_budget.guard.deciding import decide
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import database
from ai_budget.models import Batch, BatchSubmission, CallLog
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    Reply,
    override_budget,
)
from tests.batches.given import (
    DAY,
    FEATURE,
    HOUR,
    MINUTE,
    assert_counted,
    assert_settled,
    bill,
    creations,
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
from tests.contention.books import assert_books_agree
from tests.guard.books import MODEL, ledger_of_the_run
from tests.ledger.threads import together
from tests.whole.clocks import Clock

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    with standing_still() as stopped:
        yield stopped


def requests_of(*ids: str) -> list[Any]:
    messages = [{"role": "user", "content": "Why?"}]
    params = {"model": MODEL, "max_tokens": 50, "messages": messages}
    return [{"custom_id": custom_id, "params": params} for custom_id in ids]


def guarded(api: AnthropicSimulator, *, key: str | None = None) -> anthropic.Anthropic:
    bare = anthropic.Anthropic(api_key=key or conf.API_KEY, base_url=api.base_url, max_retries=0)
    return ai_budget.guard(bare, feature=FEATURE)


def unheard(api: AnthropicSimulator, client: anthropic.Anthropic, *, taken: bool) -> None:
    """Create a batch of which nobody hears whether the API took it."""
    api.batches.script("create", CutBeforeResponse(billed=taken))
    with pytest.raises(anthropic.APIConnectionError):
        client.messages.batches.create(requests=requests_of("a", "b"))


# Taken twice -------------------------------------------------------------------------------------


def test_of_two_submissions_with_the_same_ids_one_takes_the_apis_batch(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = guarded(api)
    unheard(api, client, taken=False)
    unheard(api, client, taken=True)
    clock.at += 6 * MINUTE
    one, other = batches.due()
    is_of, met = steps.is_of, list[int]()

    def overtaken(submission: BatchSubmission, api_id: str) -> bool | None:
        found = is_of(submission, api_id)
        if not met:
            met.append(submission.pk)
            batches.advance(other if submission.pk == one else one)
        return found

    monkeypatch.setattr(steps, "is_of", overtaken)
    batches.advance(one)
    for _ in range(3):
        later(clock)

    assert BatchSubmission.objects.filter(api_id=api.batches.ids[0]).count() == 1
    assert site(Batch.objects.all()[0]).spent_nanousd == bill(api)


def test_two_workers_at_once_take_the_apis_batch_once(
    api: AnthropicSimulator, clock: Clock
) -> None:
    client = guarded(api)
    unheard(api, client, taken=False)
    unheard(api, client, taken=True)
    clock.at += 6 * MINUTE

    together([lambda pk=pk: batches.advance(pk) for pk in batches.due()])  # type: ignore[misc]
    for _ in range(3):
        later(clock)

    assert site(Batch.objects.all()[0]).spent_nanousd == bill(api)


def test_a_client_that_gives_up_late_changes_nothing_of_what_workers_found(
    api: AnthropicSimulator, clock: Clock
) -> None:
    with charge(feature=FEATURE):
        paying = current_payer().charge()
    body = {"requests": requests_of("a", "b")}
    opened = ClientBatch.open(body, paying, workspace_named=False)
    bare = anthropic.Anthropic(api_key=conf.API_KEY, base_url=api.base_url)
    bare.messages.batches.create(**opened.body)
    for _ in range(4):
        later(clock)

    opened.book_lost("APITimeoutError")

    submission = submission_of(Batch.objects.get())
    assert (submission.status, submission.api_id) == ("done", api.batches.ids[0])
    with pytest.raises(AIBudgetError, match="not uncertain"):
        batches.send_again(submission)
    assert creations(api) == 1


def test_answers_from_the_cache_are_booked_once_though_the_commit_was_not_heard(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ledger_of_the_run() is not database.DatabaseLedger:
        pytest.skip("the transaction is the other ledger's")
    settle, lost = database.DatabaseLedger._settle_parts, list[int]()

    def unheard_of(self: Any, connection: Any, *given: Any) -> Any:
        chunk = settle(self, connection, *given)
        if not lost:
            lost.append(1)
            connection.close()
            raise OperationalError("server closed the connection unexpectedly")
        return chunk

    with override_budget(FEATURE, cache_scope="shared", cache_counts=True):
        for prompt in ("one", "two"):
            ai_budget.ask(prompt, feature=FEATURE, model=MODEL, max_tokens=50)
        monkeypatch.setattr(database.DatabaseLedger, "_settle_parts", unheard_of)
        batch = submit("one", "two", "three")

    assert CallLog.objects.filter(status="cached").count() == 2
    assert now(batch).cached == 2
    assert_books_agree()


# Lost --------------------------------------------------------------------------------------------


def test_what_another_keys_client_sent_is_not_taken_for_never_accepted(
    api: AnthropicSimulator, clock: Clock
) -> None:
    """Lists show the batches of the settings' key alone."""
    unheard(api, guarded(api, key="of a tenant"), taken=True)

    for _ in range(10):
        later(clock, 3 * HOUR)
    batch = Batch.objects.get()
    assert site(batch).held_nanousd == batch.reserved_nanousd > bill(api)

    later(clock, DAY)
    assert (now(batch).status, now(batch).held_nanousd) == ("finished", 0)
    assert site(batch).spent_nanousd == batch.reserved_nanousd


@pytest.mark.parametrize("leave_batches", [True, False])
def test_results_that_lay_ready_while_no_worker_ran_are_not_given_up(
    api: AnthropicSimulator, clock: Clock, leave_batches: bool
) -> None:
    batch = sent("one", "two")
    clock.at += 3 * DAY

    call_command("ai_budget_tick", leave_batches=leave_batches)
    assert "expired" not in statuses(batch)

    work()
    assert set(statuses(batch)) == {"succeeded"}
    assert_settled(batch, api)


@pytest.mark.parametrize(
    "tampered",
    [
        {"stop_reason": "\ud800"},
        {"stop_reason": "end\0turn"},
        {"usage": {"input_tokens": 10**20, "output_tokens": 5}},
    ],
)
def test_an_answer_that_no_column_takes_holds_up_no_other(
    api: AnthropicSimulator,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tampered: Mapping[str, Any],
) -> None:
    batch = sent("one", "two", "three")
    results = api_of_batches.results

    def tampering(api_id: str) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(results(api_id)):
            if number == 0:
                line["result"]["message"] |= tampered
            yield line

    monkeypatch.setattr(api_of_batches, "results", tampering)
    later(clock)

    assert sorted(statuses(batch)) == ["succeeded"] * 3
    estimated = CallLog.objects.get(status="estimated")
    assert (estimated.cost_nanousd, estimated.error) == (
        estimated.reserved_nanousd,
        "unreadable answer",
    )
    assert_counted(batch)


@pytest.mark.parametrize("custom_id", ["\ud800", "a\0b", 7, None])
def test_an_id_that_no_item_has_holds_up_no_other(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch, custom_id: Any
) -> None:
    batch = sent("one", "two")
    results = api_of_batches.results

    def with_another(api_id: str) -> Iterator[dict[str, Any]]:
        yield {"custom_id": custom_id, "result": {"type": "expired"}}
        yield from results(api_id)

    monkeypatch.setattr(api_of_batches, "results", with_another)
    later(clock)

    assert_settled(batch, api)


def test_long_answers_are_kept_by_servers_that_take_little_at_once(
    api: AnthropicSimulator, clock: Clock, settings: Any
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": True}
    text = "x" * 700_000
    api.batches.default = Reply(text=text, output_tokens=40)

    batch = sent(*(f"question {number}" for number in range(30)))
    later(clock)

    assert set(statuses(batch)) == {"succeeded"}
    assert next(iter(batch.results())).text == text


# Held, or booked for nothing ---------------------------------------------------------------------


def test_a_maker_that_slept_until_it_was_given_up_holds_nothing(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of_the_run()
    reserve = ledger.reserve

    def asleep(self: Any, *given: Any) -> Any:
        clock.at += 2 * HOUR
        batches.tidy()
        return reserve(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "reserve", asleep)
        with pytest.raises(AIBudgetError, match="given up"):
            submit()

    assert set(CallLog.objects.values_list("status", flat=True)) <= {"released"}
    assert_books_agree()


def test_what_was_never_sent_is_released_though_it_was_booked_for_being_late(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    def busy(batch: Batch) -> None:
        raise LedgerUnavailable("Busy.")

    with monkeypatch.context() as patch:
        patch.setattr(openings.BatchOpening, "_open", die)
        patch.setattr(openings.BatchOpening, "discard", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            submit()
    clock.at += 3 * DAY
    with monkeypatch.context() as patch:
        patch.setattr(ending, "discard", busy)
        with pytest.raises(BaseException, match="Busy"):
            call_command("ai_budget_tick")
    assert CallLog.objects.get().status == "estimated"

    call_command("ai_budget_tick")

    assert (CallLog.objects.get().status, CallLog.objects.get().cost_nanousd) == ("released", 0)
    assert_books_agree()


def test_a_refused_batch_of_a_client_is_dropped_by_the_tick_if_its_worker_dies(
    api: AnthropicSimulator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with charge(feature=FEATURE):
        paying = current_payer().charge()
    body = {"requests": requests_of("a", "b")}
    opened = ClientBatch.open(body, paying, workspace_named=False)

    def die(batch: Batch) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ai_budget.guard.batch.through_client.discard", die)
        with pytest.raises(KeyboardInterrupt):
            opened.book_rejected(400, "")
    later(clock, 2 * HOUR)

    assert not Batch.objects.exists()
    assert ledgers.current().differences(CallLog.objects.get().day) == []
    assert CallLog.objects.get().status == "released"


# Changed in between ------------------------------------------------------------------------------


def test_prices_that_change_while_requests_are_read_are_refused(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = list[int]()

    def by_other_prices(*given: Any, **named: Any) -> Any:
        decision = decide(*given, **named)
        decided.append(1)
        source = f"read {len(decided)} times"
        return replace(decision, rates=replace(decision.rates, source=source))

    monkeypatch.setattr(openings, "decide", by_other_prices)

    with pytest.raises(AIBudgetError, match="submit it again"):
        submit("one", "two")

    assert not Batch.objects.exists()


def test_a_paused_feature_sends_nothing_until_it_goes_on(
    api: AnthropicSimulator, clock: Clock
) -> None:
    batch = submit()
    with override_budget(FEATURE, enabled=False):
        work()
        assert (submission_of(batch).status, creations(api)) == ("waiting", 0)
        assert submission_of(batch).error == "the feature is paused"

    later(clock, timedelta(minutes=1))
    assert creations(api) == 1
