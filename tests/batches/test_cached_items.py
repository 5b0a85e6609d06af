"""Items that the response cache answers: not sent, and the same answers that ``ask`` gets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model

import ai_budget
from ai_budget import batches
from ai_budget.batches import Result
from ai_budget.exceptions import BudgetExceeded, FeatureDisabled, LedgerUnavailable, QuotaExceeded
from ai_budget.guard.batch import opening as openings
from ai_budget.models import Batch, CallLog, CallText, UserQuota
from ai_budget.testing import AnthropicSimulator, Errored, Reply, freeze, override_budget
from tests.batches.submitted import (
    FEATURE,
    HAIKU,
    differences,
    items,
    reservation,
    statuses_of,
    submit,
    work_off,
)
from tests.guard.books import ledger_of_the_run, rows, site

pytestmark = pytest.mark.django_db

PROMPT = "Why is the sky blue?"
SHARED: dict[str, Any] = {"cache_scope": "shared"}
handed: list[Result] = []


def take(result: Result) -> None:
    """Be a callback."""
    handed.append(result)


def ask(api: AnthropicSimulator, prompt: str = PROMPT, **options: Any) -> ai_budget.Answer:
    """Ask, so that the answer is kept."""
    api.enqueue(Reply(text=f"answer to {prompt}"))
    return ai_budget.ask(prompt, **{"feature": FEATURE, "max_tokens": 100, **options})


def texts(batch: Batch) -> dict[str, str]:
    return {result.key: result.text for result in batch.results()}


def test_what_was_asked_before_is_answered_without_being_sent(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, **SHARED):
        answer = ask(api)
        batch = submit([("known", PROMPT), ("new", "What else?")])

    assert statuses_of(batch) == ["cached", "open"]
    assert (batch.cached, batch.open) == (1, 1)
    (call,) = CallLog.objects.filter(call_id=items(batch)[0].call_id)
    assert (call.status, call.cost_nanousd, call.counted, call.kind) == ("cached", 0, 0, "batch")
    assert (call.saved_nanousd, call.saved_reason) == (answer.cost_nanousd, "response cache")
    assert (call.decision, call.stop_reason) == ("response cache, shared", "end_turn")
    assert texts(batch)["known"] == f"answer to {PROMPT}"
    work_off(batch)
    assert len((api.requests[1].body or {})["requests"]) == 1


def test_nothing_is_held_for_what_is_cached(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, **SHARED):
        ask(api)
        calls = site().calls
        batch = submit([PROMPT, "What else?"])

    assert items(batch)[0].reserved_nanousd == 0
    assert batch.held_nanousd == items(batch)[1].reserved_nanousd == site().held_nanousd
    assert site().calls == calls + 1


@pytest.mark.parametrize(("scope", "looked"), [("shared", True), ("off", False)])
def test_it_is_recorded_that_answers_were_looked_for(
    api: AnthropicSimulator, scope: str, looked: bool
) -> None:
    with override_budget(FEATURE, cache_scope=scope):
        batch = submit([PROMPT])

    assert reservation(batch).cache_checked == looked


def test_a_batch_that_is_all_cached_is_finished_without_the_api(api: AnthropicSimulator) -> None:
    handed.clear()
    with override_budget(FEATURE, **SHARED):
        ask(api)
        batch = submit([PROMPT, PROMPT], on_result=f"{__name__}.take")
        batches.tidy()

    batch.refresh_from_db()
    assert (batch.status, batch.cached, batch.spent_nanousd) == ("finished", 2, 0)
    assert [result.text for result in handed] == [f"answer to {PROMPT}"] * 2
    assert len(api.requests) == 1
    assert site().held_nanousd == 0


def test_no_money_is_needed_for_what_is_cached(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, **SHARED):
        ask(api)
        with override_budget(FEATURE, daily_limit_usd=0):
            assert statuses_of(submit([PROMPT])) == ["cached"]

            with pytest.raises(BudgetExceeded) as error:
                submit([PROMPT, "What else?"])
            batch = submit([PROMPT, "What else?"], allow_partial=True)

    assert error.value.items_fit == 1
    assert statuses_of(batch) == ["cached", "refused"]


def test_a_paused_feature_answers_nothing_from_its_cache(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, **SHARED):
        ask(api)
        with override_budget(FEATURE, enabled=False), pytest.raises(FeatureDisabled):
            submit([PROMPT])


@pytest.mark.parametrize(
    ("scope", "asked_by", "submitted_by", "found"),
    [
        ("shared", None, "ada", True),
        ("shared", "bob", "ada", True),
        ("private", "ada", "ada", True),
        ("private", "bob", "ada", False),
        ("private", "ada", None, False),
        ("off", "ada", "ada", False),
    ],
)
def test_answers_are_found_by_those_whose_they_are(
    api: AnthropicSimulator, scope: str, asked_by: str, submitted_by: str, found: bool
) -> None:
    create = get_user_model().objects.create_user
    users: dict[str | None, Any] = {None: None, "ada": create("ada"), "bob": create("bob")}

    with override_budget(FEATURE, cache_scope=scope):
        ask(api, user=users[asked_by])
        batch = submit([PROMPT], user=users[submitted_by])

    assert statuses_of(batch) == ["cached" if found else "open"]


@pytest.mark.parametrize(
    "other",
    [
        {"max_tokens": 101},
        {"system": "Be brief."},
        {"temperature": 1},
        {"model": "claude-opus-5-5"},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ],
)
def test_another_question_is_another(api: AnthropicSimulator, other: dict[str, Any]) -> None:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100, **other}

    with override_budget(FEATURE, **SHARED):
        ask(api)
        batch = submit([asked])

    assert statuses_of(batch) == ["open"]


def test_what_the_feature_changes_of_a_question_is_part_of_it(api: AnthropicSimulator) -> None:
    with override_budget(FEATURE, **SHARED, max_tokens=50, model=HAIKU):
        ask(api, max_tokens=None)
        batch = submit([PROMPT, {"messages": [{"role": "user", "content": PROMPT}]}])

    assert statuses_of(batch) == ["cached", "cached"]
    assert [item.max_tokens for item in items(batch)] == [50, 50]
    assert items(batch)[0].decision == "max_tokens 100 to 50; response cache, shared"


def test_an_answer_that_is_too_old_is_asked_for_anew(api: AnthropicSimulator) -> None:
    noon = datetime(2026, 11, 22, 12, tzinfo=UTC)

    with override_budget(FEATURE, **SHARED, cache_ttl=60):
        with freeze(noon):
            ask(api)
        with freeze(noon + timedelta(seconds=59)):
            assert statuses_of(submit([PROMPT])) == ["cached"]
        with freeze(noon + timedelta(seconds=61)):
            assert statuses_of(submit([PROMPT])) == ["open"]


def test_a_failed_item_is_answered_from_the_cache_when_it_is_submitted_once_more(
    api: AnthropicSimulator,
) -> None:
    with override_budget(FEATURE, **SHARED):
        api.batches.enqueue(Errored())
        batch = work_off(submit([("a", PROMPT)]))
        ask(api)

        again = batch.resubmit()

    assert statuses_of(again) == ["cached"]


# Where answers from the cache count as calls -----------------------------------------------------


@pytest.fixture
def counting(db: None) -> Any:
    with override_budget(FEATURE, **SHARED, cache_counts=True) as budget:
        yield budget


def test_they_take_calls_and_no_money(api: AnthropicSimulator, counting: Any) -> None:
    ask(api, subject="tenant")
    UserQuota.objects.create(daily_calls=4)

    batch = submit([PROMPT, PROMPT, "What else?"], subject="tenant")

    assert statuses_of(batch) == ["cached", "cached", "open"]
    assert site().calls == 4
    with pytest.raises(QuotaExceeded):
        submit([PROMPT], subject="tenant")
    work_off(batch)
    assert (site().held_nanousd, site().calls) == (0, 4)
    assert sorted(row.status for row in rows()) == [
        "cached",
        "cached",
        "released",
        "settled",
        "settled",
    ]
    assert differences(batch) == []


def test_a_batch_that_is_all_cached_takes_calls_alone(
    api: AnthropicSimulator, counting: Any
) -> None:
    ask(api)

    with override_budget(FEATURE, daily_limit_usd=0, requests_per_minute=0):
        batch = submit([PROMPT, PROMPT])

    assert statuses_of(batch) == ["cached", "cached"]
    assert (site().held_nanousd, site().calls) == (0, 3)
    assert differences(batch) == []


def test_a_quota_that_does_not_hold_them_refuses_the_batch(
    api: AnthropicSimulator, counting: Any
) -> None:
    ask(api)
    UserQuota.objects.create(daily_calls=1)

    with pytest.raises(QuotaExceeded):
        submit([PROMPT, PROMPT], subject="tenant")

    assert not Batch.objects.exists()
    assert site().calls == 1


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [False, True])
def test_what_cannot_be_booked_of_them_keeps_no_batch_back(
    api: AnthropicSimulator, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise LedgerUnavailable("not now")

    with override_budget(FEATURE, **SHARED, cache_counts=counts):
        ask(api)
        with monkeypatch.context() as broken:
            broken.setattr(ledger_of_the_run(), "settle_parts" if counts else "record", fail)
            batch = submit([PROMPT, "What else?"])

    assert batch.status == "open"
    assert work_off(batch).succeeded == 1
    assert differences(batch) == []


def test_a_batch_that_is_not_opened_books_none_of_them(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> bool:
        raise LedgerUnavailable("not now")

    with override_budget(FEATURE, **SHARED, cache_counts=True):
        ask(api)
        monkeypatch.setattr(openings.BatchOpening, "_open", fail)
        with pytest.raises(LedgerUnavailable):
            submit([PROMPT, "What else?"])

    assert sorted(row.status for row in rows()) == ["released", "settled"]
    assert (site().held_nanousd, site().calls) == (0, 1)
    assert not CallText.objects.exists()
